"""A teacher's outputs on disk: written once, read while training."""
