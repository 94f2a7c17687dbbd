"""Cross-tokenizer knowledge distillation for JAX."""
