"""`xtoken evaluate`: bits per byte of a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from xtoken_jax.cli.tokenizers import print_json, source_of, takes_source
from xtoken_jax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

TEXT = "bits per byte of a model on your text, or on Python's documentation"
HELP = "example: xtoken evaluate runs/quickstart/student --data held_out.jsonl"
_ROW = 1024  # tokens of a row


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    sub.add_argument("model", metavar="DIR", help="Hugging Face folder or hub id")
    sub.add_argument(
        "--data",
        metavar="DATA",
        help="file, folder or pattern of jsonl, csv, txt, parquet, ...; default: held-out topics of help()",
    )
    takes_source(sub, "--data")
    sub.add_argument("--length", type=int, help="tokens a row (default: 1024, or the model's positions)")
    sub.add_argument("--batch-size", type=int, default=8, help="rows at once (default: 8)")
    sub.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure the model, and print the figure."""
    import jax

    from xtoken_jax.data.config import DataConfig
    from xtoken_jax.data.encode import read_parts, student_of
    from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents
    from xtoken_jax.distributed.mesh import single_device_mesh
    from xtoken_jax.evaluate.bits_per_byte import bits_per_byte
    from xtoken_jax.models.load import ModelConfig, open_model
    from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: must be at least 1")
    tokenizer = Tokenizer.load(options.model)
    if options.source and options.data is None:
        raise UserError("--source: sets how --data is read, and there is none; name it, or leave this out")
    length = _row_length(options)
    if options.data is None:
        source = SourceConfig(kind=SourceKind.python_docs, split="validation")
    else:
        source = source_of(options.data, options.source)
    data = DataConfig(
        validation={"text": source},
        student_length=length,
        teacher_length=length,
        batch_size=options.batch_size,
    )
    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        model, params = open_model(
            ModelConfig(path=options.model), tokenizer.size, mesh=mesh, key=jax.random.key(0)
        )
        own = {"student": TokenizerPair(tokenizer, tokenizer)}
        parts = read_parts(own, {"text": read_documents(source)}, data)["text"]
        rows = [student_of(part) for part in parts]
        with console.status(f"running the model over {len(rows)} rows"):
            value = bits_per_byte(
                model,
                params,
                tokenizer,
                [row.ids for row in rows],
                batch_size=options.batch_size,
                length=length,
                targets=[row.targets for row in rows],
            )
    if options.json:
        print_json({"bits_per_byte": value, "rows": len(rows)})
    else:
        print(f"{value:.4f} bits per byte over {len(rows)} rows of {options.data or 'Python documentation'}")


def _row_length(options: argparse.Namespace) -> int:
    """The --length of `evaluate`, which the model has positions for."""
    from xtoken_jax.hub import resolve_folder
    from xtoken_jax.models.config import read_config

    positions = read_config(resolve_folder(options.model, weights=False)).max_position_embeddings
    length = min(_ROW, positions) if options.length is None else options.length
    if not 2 <= length <= positions:
        raise UserError(
            f"--length {length}: must be at least 2, and at most {positions:,}, the positions that the model "
            "was made for (max_position_embeddings)"
        )
    return length
