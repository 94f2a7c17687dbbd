"""Tokenizers as sequences of bytes."""
