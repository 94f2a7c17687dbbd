"""Chunks of a text that two tokenizers agree on."""
