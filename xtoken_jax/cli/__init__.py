"""The `xtoken` command."""

from xtoken_jax.cli.parser import main

__all__ = ["main"]
