"""Checks of what `blockwise_loss` is called with."""

from __future__ import annotations

from typing import Any

import jax

from xtoken_jax.alignment.batch import StoredRows
from xtoken_jax.errors import KindError
from xtoken_jax.losses.checks import (
    check_alignment,
    check_array,
    check_config,
    check_ids,
    check_rows,
    check_sizes,
    check_tables,
    check_width,
)
from xtoken_jax.losses.config import LossConfig, LossKind
from xtoken_jax.losses.total import TABLES
from xtoken_jax.projection.readable import described


def check_student(
    config: LossConfig,
    hidden: jax.Array,
    unembedding: jax.Array,
    ids: jax.Array,
    targets: jax.Array | None,
    size: int | None,
) -> None:
    """Raise unless the student's arguments of `blockwise_loss` fit each other."""
    check_config(config)
    if config.kind is LossKind.auto:
        raise ValueError(f"{config.kind} is not a distillation term")
    check_array("student_hidden", hidden, "float", "B", "T_s", "D_s")
    check_array("student_unembedding", unembedding, "float", "V_s", hidden.shape[-1])
    check_sizes(student_size=size)
    size = len(unembedding) if size is None else size
    check_width("student_unembedding", unembedding, len(unembedding), size, "student_size")
    check_ids("student_ids", ids, ("B", "T_s"), size)
    check_rows("student_hidden", hidden, "student_ids", ids)
    if targets is not None:
        check_array("student_targets", targets, "bool", *ids.shape)


def check_teacher(
    config: LossConfig,
    hidden: jax.Array | None,
    unembedding: jax.Array | None,
    stored: Any,
    alignment: Any,
    tables: Any,
    ids: jax.Array | None,
    mask: jax.Array | None,
    student_ids: jax.Array,
) -> None:
    """Raise unless the arguments of a distillation term fit each other and the student's ids."""
    live = hidden is not None and unembedding is not None
    if live == (stored is not None):
        raise ValueError(
            f"{config.kind} needs a teacher: teacher_hidden and teacher_unembedding, or teacher_stored"
        )
    config.validate_merge()
    if config.needs_ids and ids is None:
        raise ValueError(f"{config.kind.value} with merge={config.merge.value!r} needs teacher_ids")
    _, size = check_tables("tables", tables, TABLES[config.kind])
    if hidden is not None and unembedding is not None:
        check_array("teacher_hidden", hidden, "float", "B", "T_t", "D_t")
        check_array("teacher_unembedding", unembedding, "float", "V_t", hidden.shape[-1])
        size = len(unembedding) if size is None else size
        check_width("teacher_unembedding", unembedding, len(unembedding), size, "tables")
        name, rows = "teacher_hidden", hidden
    else:
        check_stored("teacher_stored", stored, size)
        name, rows, size = "teacher_stored.others", stored.others, stored.size
    check_alignment(alignment)
    check_rows("student_ids", student_ids, "alignment.student_chunks", alignment.student_chunks)
    check_rows(name, rows, "alignment.teacher_chunks", alignment.teacher_chunks)
    if ids is not None:
        check_ids("teacher_ids", ids, rows.shape[:2], size)
    if mask is not None:
        check_array("teacher_mask", mask, "bool", *rows.shape[:2])


def check_stored(name: str, stored: Any, size: int | None) -> None:
    """Raise unless stored rows agree with themselves and with V_t of the tables."""
    if not isinstance(stored, StoredRows):
        raise KindError(f"{name}: {described(stored)}, but StoredRows are needed")
    if size not in (None, stored.size):
        raise ValueError(f"{name}: rows of {stored.size} tokens, but the tables are for {size}")
    check_array(f"{name}.log_probabilities", stored.log_probabilities, "float", "B", "T_t", "k")
    shape = stored.log_probabilities.shape
    if stored.ids is not None:
        check_array(f"{name}.ids", stored.ids, "int", *shape)
    check_array(f"{name}.others", stored.others, "float", *shape[:2])
    check_array(f"{name}.normalizers", stored.normalizers, "float", *shape[:2])
