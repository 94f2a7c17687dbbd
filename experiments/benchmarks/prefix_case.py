"""Prefix KL's tables and real text for the benchmarks: its cost depends on which tokens come."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax import TokenizerPair, align, prefix_tables
from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.data.formats.python_docs import topics
from xtoken_jax.hub import cache_folder


@cache
def fetched_pair(student: str, teacher: str) -> TokenizerPair | None:
    """The two tokenizers, where `make tokenizers` has fetched them."""
    folders = [cache_folder() / "tokenizers" / name for name in (student, teacher)]
    if not all((folder / "tokenizer.json").is_file() for folder in folders):
        return None
    return TokenizerPair.load(*folders)


def prefix_case(pair: TokenizerPair, batch: int, length: int) -> tuple[Any, Alignment, jax.Array, jax.Array]:
    """Tables, alignment, and ids of both sides [B, T]: English, `length` tokens a row on both sides."""
    text = "\n".join(topics().values())
    size = len(text) // batch
    rows = [text[row * size : row * size + 8 * length] for row in range(batch)]
    student, teacher, alignment = align(pair, rows, student_length=length, teacher_length=length)
    tables = jax.tree.map(jnp.asarray, prefix_tables(pair))
    ids = [jnp.asarray(side.astype(np.int32)) for side in (student, teacher)]
    return tables, jax.tree.map(jnp.asarray, alignment), ids[0], ids[1]
