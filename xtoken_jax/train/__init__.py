"""The training step, its optimizer, the loop around it and its checkpoints."""
