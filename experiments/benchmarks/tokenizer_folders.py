"""The options of the benchmarks on pairs of real tokenizers."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from xtoken_jax.hub import cache_folder


def parser(description: str | None, teachers: Sequence[str]) -> argparse.ArgumentParser:
    """--tokenizers, --student and --teachers; by default what `make tokenizers` fetched."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument(
        "--tokenizers",
        type=Path,
        default=cache_folder() / "tokenizers",
        metavar="DIR",
        help="one Hugging Face folder a tokenizer (default: %(default)s)",
    )
    options.add_argument("--student", default="llama3_1", metavar="NAME")
    options.add_argument("--teachers", nargs="+", default=list(teachers), metavar="NAME")
    return options
