"""Rows of a batch in which a model's outputs are not finite: whose fault a loss of NaN is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import TokenRows
from xtoken_jax.data.batches import Batch
from xtoken_jax.distributed.mesh import whole
from xtoken_jax.models.decoder import Model, Params, logits
from xtoken_jax.models.lora import join_lora

_BLOCK = 32  # positions of every row whose logits exist at a time


class BadRows(NamedTuple):
    """How many rows of a batch have a token at which logits are NaN or +inf, or all of them -inf.

    Attributes:
        rows: of the batch.
        student: with the student's logits.
        teachers: with each teacher's, by its name.
    """

    rows: int
    student: int
    teachers: dict[str, int]


@dataclass(frozen=True)
class Models:
    """The models of a run, to be looked at after a loss that is not finite.

    Attributes:
        student: the network.
        student_size: V_s of its tokenizer.
        teachers: those that run, by name; a cache is checked where it is read.
        packed: whether rows hold several documents.
    """

    student: Model
    student_size: int
    teachers: Mapping[str, Model]
    packed: bool = True

    def bad_rows(
        self, params: Params, frozen: Params | None, teacher_params: Mapping[str, Params], batch: Batch
    ) -> BadRows:
        """Run all models over a batch; of several processes, all must call this.

        Args:
            params, frozen: the student's, as `split_lora` returns them.
            teacher_params: by teacher.
            batch: on the devices.
        """

        def count(model: Model, params: Params, rows: TokenRows, size: int | None) -> int:
            segments = rows.segments if self.packed else None
            return int(_bad_rows(model, params, rows.ids, rows.mask, segments, size))

        student = count(self.student, join_lora(params, frozen), batch.student, self.student_size)
        teachers = {
            name: count(model, teacher_params[name], batch.teachers[name].rows, None)
            for name, model in self.teachers.items()
        }
        return BadRows(len(batch.student.ids), student, teachers)


@functools.partial(jax.jit, static_argnames=("model", "size"))
def _bad_rows(
    model: Model,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    segments: jax.Array | None,
    size: int | None,
) -> jax.Array:
    """int32 scalar; ids, mask and segments are [B, T]."""
    hidden, unembedding = model(params, ids, segments=segments)
    blocks = -(-ids.shape[1] // _BLOCK)
    padded = jnp.pad(hidden, ((0, 0), (0, blocks * _BLOCK - ids.shape[1]), (0, 0)))

    def is_finite(block: jax.Array) -> jax.Array:
        """Bool [B, _BLOCK]."""
        scores = logits(block, unembedding[:size], softcap=model.config.logit_softcap)
        return jnp.isfinite(scores.max(axis=-1))  # NaN and +inf pass through the maximum

    parts = padded.reshape(len(ids), blocks, _BLOCK, -1)
    finite = jnp.moveaxis(jax.lax.map(is_finite, jnp.moveaxis(parts, 1, 0)), 0, 1)
    finite = finite.reshape(len(ids), -1)[:, : ids.shape[1]]
    return whole((mask & ~finite).any(axis=1).sum(dtype=jnp.int32))
