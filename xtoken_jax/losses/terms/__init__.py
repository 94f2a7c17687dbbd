"""One file a loss: its formula on logits."""
