"""`xtoken export`: a checkpoint of a run as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

TEXT = "write a checkpoint of a run as a Hugging Face folder"
HELP = "example: xtoken export runs/quickstart --step 150 --out student-150"


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    sub.add_argument("run_folder", metavar="RUN", type=Path, help="the run's folder")
    sub.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    sub.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "source"],
        help="of the weights; source: each tensor's in the student's folder (default: export_dtype)",
    )
    sub.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of one file of weights; more than that becomes several with an index (default: 5GB)",
    )

    sub.add_argument(
        "--overwrite", action="store_true", help="replace DIR even if this run did not write what it holds"
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Write the folder, and say which step it is of."""
    from xtoken_jax.run.student import export_checkpoint

    step, ends = export_checkpoint(
        options.run_folder,
        options.step,
        options.out,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    console.print(f"step {step} of {options.run_folder} -> {options.out}", markup=False)
    if ends is not None:
        console.print(f"ends     {ends}", markup=False)
