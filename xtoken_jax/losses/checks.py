"""Checks of what a loss is called with: kinds, shapes and settings.

The checks run when a function is traced, so a compiled loss does not contain them. Values of arrays, such as
token ids, are checked only where they are known at that time: outside `jax.jit`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.errors import KindError
from xtoken_jax.losses.config import RANGES, Direction, LossConfig, LossKind, Merge
from xtoken_jax.projection.events import PrefixTables
from xtoken_jax.projection.matrix import (
    LearnableProjection,
    Partition,
    Projection,
    SplitProjection,
)
from xtoken_jax.projection.readable import described
from xtoken_jax.projection.sharded import ShardedProjection

Dimension = int | str  # a length, or the letter of a dimension of any length
Sizes = tuple[int | None, int | None]  # V_s and V_t; None where the tables do not say

DIRECTIONS = tuple(direction.value for direction in Direction)
PROJECTIONS = (Projection, SplitProjection, LearnableProjection, ShardedProjection)

_KINDS = {"float": jnp.floating, "int": jnp.integer, "bool": jnp.bool_}
_INTEGERS = {"top_k", "uncommon_top_k", "block", "teacher_block"}
_OPTIONAL = {"top_k", "common_weight", "uncommon_weight", "max_scale"}
_REMEDIES = {
    Projection: "build_projection(pair) makes one",
    Partition: "Partition.strict(W) or Partition.relaxed(W) makes one",
    PrefixTables: "prefix_tables(pair) makes them",
}
# Models pad their vocabularies: by less than 2 % in published ones, up to a multiple of 1,024 in small ones.
_PADDING, _PADDED_SHARE = 1024, 1 / 8


def check_array(name: str, value: Any, kind: str, *wanted: Dimension) -> None:
    """Raise unless `value` is an array of this kind ("float", "int" or "bool") and shape."""
    message = f"{name}: {described(value)}, but {kind} [{', '.join(map(str, wanted))}] is needed"
    if not isinstance(value, jax.Array | np.ndarray) or not jnp.issubdtype(value.dtype, _KINDS[kind]):
        raise KindError(message)
    if len(value.shape) != len(wanted) or any(
        not isinstance(length, str) and length != actual
        for length, actual in zip(wanted, value.shape, strict=True)
    ):
        raise ValueError(message)


def check_scalar(name: str, value: Any) -> None:
    """Raise unless `value` is one number: a Python one or an array without dimensions."""
    if not isinstance(value, int | float | np.number | np.ndarray | jax.Array):
        raise KindError(f"{name}: {described(value)}, but a number is needed")
    if np.shape(value) != ():
        raise ValueError(f"{name}: {described(value)}, but one number is needed")


def check_logits(name: str, logits: Any, rows: tuple[Dimension, ...], size: int | None, source: str) -> None:
    """Raise unless `logits` are float [B, T, V] with the columns of a tokenizer, padded or not.

    Args:
        name: the argument.
        logits: its value.
        rows: B and T.
        size: V of the tokenizer; None where it is not known.
        source: the argument that says so.
    """
    check_array(name, logits, "float", *rows, "V")
    if size is not None:
        check_width(name, logits, logits.shape[-1], size, source)


def check_width(name: str, value: Any, width: int, size: int, source: str) -> None:
    """Raise unless a vocabulary of `width` can be that of a tokenizer of `size` tokens with padding."""
    if width < size:
        problem = f"a vocabulary of {width} is too small"
    elif width - size > max(_PADDING, size * _PADDED_SHARE) or (size > 1 and width >= 2 * size):
        problem = f"a vocabulary of {width} is too large to be that of a padded model; cut it to {size}"
    else:
        return
    raise ValueError(
        f"{name}: {described(value)}, but {source} is for {size} tokens: {problem}. "
        "Student and teacher may be swapped"
    )


def check_ids(name: str, ids: Any, rows: tuple[Dimension, ...], size: int | None) -> None:
    """Raise unless `ids` are int [B, T]; and between 0 and `size`, where they are known."""
    check_array(name, ids, "int", *rows)
    values = known(ids)
    if size is None or values is None or not values.size:
        return
    wrong = (values < 0) | (values >= size)
    if wrong.any():
        place = np.unravel_index(np.argmax(wrong), values.shape)
        raise ValueError(
            f"{name}: {described(ids)} has {values[place]} at {[int(i) for i in place]}, but ids from 0 to "
            f"{size - 1} are needed, in padding too"
        )


def known(array: Any) -> np.ndarray | None:
    """The values of an array; None where they are not known: under `jax.jit`, or on other processes."""
    if isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)


def check_alignment(alignment: Any, rows: int | None = None) -> None:
    """Raise unless `alignment` is an Alignment of one number of rows, that of the logits if given."""
    if not isinstance(alignment, Alignment):
        raise KindError(f"alignment: {described(alignment)}, but an Alignment is needed; align() makes one")
    check_array("alignment.valid", alignment.valid, "bool", "B" if rows is None else rows, "C")
    count = alignment.valid.shape[0]
    check_array("alignment.student_chunks", alignment.student_chunks, "int", count, "T_s")
    check_array("alignment.teacher_chunks", alignment.teacher_chunks, "int", count, "T_t")


def check_rows(name: str, value: Any, other_name: str, other: Any) -> None:
    """Raise unless two arrays [B, T, ...] have the same B and T."""
    if value.shape[:2] != other.shape[:2]:
        raise ValueError(
            f"{name}: {described(value)} and {other_name}: {described(other)} must have the same B and T"
        )


def check_sides(
    student_logits: Any,
    teacher_logits: Any,
    alignment: Any,
    sizes: Sizes,
    source: str,
    *,
    student_ids: Any = None,
    teacher_ids: Any = None,
    teacher_mask: Any = None,
) -> None:
    """Raise unless all arrays of both sides of a batch belong together.

    Args:
        student_logits, teacher_logits: float [B, T_s, >= V_s] and [B, T_t, >= V_t].
        alignment: an Alignment of their rows and lengths.
        sizes: of the tokenizers.
        source: the argument that `sizes` are read from.
        student_ids, teacher_ids: int [B, T_s] and [B, T_t], or None.
        teacher_mask: bool [B, T_t], or None.
    """
    check_alignment(alignment)
    chunks = alignment.student_chunks, alignment.teacher_chunks
    logits, ids = (student_logits, teacher_logits), (student_ids, teacher_ids)
    for place, name in enumerate(("student", "teacher")):
        own, size = logits[place], sizes[place]
        check_logits(f"{name}_logits", own, ("B", "T"), size, source)
        check_rows(f"{name}_logits", own, f"alignment.{name}_chunks", chunks[place])
        if ids[place] is not None:
            check_ids(f"{name}_ids", ids[place], chunks[place].shape, own.shape[-1] if size is None else size)
    if teacher_mask is not None:
        check_array("teacher_mask", teacher_mask, "bool", *teacher_logits.shape[:2])


def check_needed(function: str, **arguments: Any) -> None:
    """Raise unless every argument is given."""
    missing = [name for name, value in arguments.items() if value is None]
    if missing:
        raise ValueError(f"{function} needs {' and '.join(missing)}")


def check_tables(name: str, tables: Any, kinds: Sequence[type]) -> Sizes:
    """Raise unless `tables` are of one of these kinds and agree with themselves; return V_s and V_t.

    Where W does not say V_t, the highest teacher id that it has says the least that it can be.
    """
    if not isinstance(tables, tuple(kinds)):
        names = " or ".join(kind.__name__ for kind in kinds)
        remedy = _REMEDIES.get(kinds[0])
        raise KindError(
            f"{name}: {described(tables)}, but {names} is needed{f'; {remedy}' if remedy else ''}"
        )
    if isinstance(tables, ShardedProjection):
        return tables.student_size, check_tables(name, tables.projection, [Projection])[1]
    if isinstance(tables, Projection | LearnableProjection | SplitProjection):
        return tables.student_size, _teacher_size(name, tables)
    sized: Any = tables
    return sized.student_size, sized.teacher_size


def _teacher_size(name: str, w: Projection | LearnableProjection | SplitProjection) -> int | None:
    check_array(f"{name}.indices", w.indices, "int", "V_s", "K")
    weights = "logits" if isinstance(w, LearnableProjection) else "weights"
    check_array(f"{name}.{weights}", getattr(w, weights), "float", *w.indices.shape)
    indices = known(w.indices)
    least = None if indices is None else int(indices.max(initial=-1)) + 1
    if isinstance(w, SplitProjection) and least is not None:
        least = max(least, len(w.source))
    if w.teacher_size is None:
        return least
    if least is not None and least > w.teacher_size:
        raise ValueError(
            f"{name}.indices: {described(w.indices)} has teacher id {least - 1}, but {name}.teacher_size is "
            f"{w.teacher_size}"
        )
    return w.teacher_size


def check_sizes(**sizes: Any) -> None:
    """Raise unless every size of a vocabulary is a Python integer above 0, or None."""
    for name, size in sizes.items():
        if size is not None and _integer(name, size) < 1:
            raise ValueError(f"{name}={size}: must be at least 1, or None")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of these words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}: choose one of {', '.join(choices)}")


def check_settings(**settings: Any) -> None:
    """Raise unless every setting is in the range of the same field of `LossConfig`, where it is known."""
    for name, value in settings.items():
        if name == "direction":
            check_choice(name, value, DIRECTIONS)
        elif value is None and name in _OPTIONAL:
            continue
        elif name in _INTEGERS:
            if _integer(name, value) < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        else:
            _check_number(name, value)


def _check_number(name: str, value: Any) -> None:
    check_scalar(name, value)
    if isinstance(value, jax.core.Tracer):
        return
    holds, rule = RANGES[name]
    if not holds(float(value)):
        raise ValueError(f"{name}={value}: {rule}")


def _integer(name: str, value: Any) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise KindError(f"{name}={value!r}: {described(value)}, but a Python integer is needed") from None


def check_config(config: Any) -> None:
    """Raise unless `config` is a LossConfig of known words and values in their ranges."""
    if not isinstance(config, LossConfig):
        raise KindError(f"config: {described(config)}, but a LossConfig is needed")
    for name, kind in (("kind", LossKind), ("direction", Direction), ("merge", Merge)):
        check_word(f"config.{name}", getattr(config, name), kind)
    settings = {name: getattr(config, name) for name in RANGES}
    if settings["block"] is None:
        del settings["block"]
    check_settings(**settings)


def check_word(name: str, value: Any, kind: type) -> None:
    """Raise unless `value` is of an Enum, such as LossKind."""
    if not isinstance(value, kind):
        choices = ", ".join(str(member) for member in kind)  # type: ignore[attr-defined]
        raise KindError(f"{name}={value!r}: must be one of {choices}")


def check_mesh(mesh: Any, axis: str, data_axes: Sequence[str]) -> None:
    """Raise unless all axes are axes of the mesh."""
    if isinstance(data_axes, str):
        raise KindError(f"data_axes={data_axes!r}: a tuple of names is needed")
    for name, value in [("axis", axis), *(("data_axes", value) for value in data_axes)]:
        if value not in mesh.shape:
            raise ValueError(f"{name}: {value!r} is no axis of the mesh, which has {', '.join(mesh.shape)}")


def check_count(name: str, count: Any) -> None:
    """Raise unless a count of the global batch is None, or one number, not negative where it is known."""
    if count is None:
        return
    check_scalar(name, count)
    value = known(count)
    if value is not None and not 0 <= float(value) < math.inf:
        raise ValueError(f"{name}={value}: must be a number from 0 on")
