"""How often student and teacher would write the same token next, from hidden states, a block at a time."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.distributed.mesh import BATCH
from xtoken_jax.losses.blockwise.plan import logits_of, rows_at
from xtoken_jax.losses.math.chunks import single_positions
from xtoken_jax.losses.math.softmax import not_finite


def top_token_agreement(
    student_hidden: jax.Array,
    student_unembedding: jax.Array,
    teacher: tuple[jax.Array, jax.Array] | jax.Array,
    alignment: Alignment,
    partners: jax.Array,
    *,
    student_size: int,
    block: int = 128,
    mesh: Mesh | AbstractMesh | None = None,
    data_axes: tuple[str, ...] = BATCH,
) -> jax.Array:
    """The share of chunks at which the likeliest token of both sides is the same text or role.

    Of chunks that count and are one token on each side: there, both models choose at the same place of the
    text. Where several logits are the highest, the student agrees if the teacher's token is among them.

    Args:
        student_hidden: [B, T_s, D_s].
        student_unembedding: [>= V_s, D_s].
        teacher: [B, T_t, D_t] and [>= V_t, D_t]; or, where that is known, its likeliest token at each
            position, int32 [B, T_t].
        alignment: chunk ids of tokens and `valid` [B, C].
        partners: int32 [V_t], the student's token of the same bytes or role, -1 for none.
        student_size: V_s.
        block: pairs of positions at a time.
        mesh: None: that of `jax.set_mesh`, if any.
        data_axes: mesh axes that split B.

    Returns:
        float32 scalar without a gradient; NaN where there is no such chunk or its logits are not finite.
    """
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    axes = tuple(axis for axis in data_axes if mesh.shape.get(axis, 1) > 1)
    of_teacher, their_unembedding = teacher if isinstance(teacher, tuple) else (teacher, None)
    # Cut here: inside, that is an exchange between devices that wait for each other.
    unembeddings = (
        student_unembedding[:student_size],
        None if their_unembedding is None else their_unembedding[: len(partners)],
    )

    def local(
        student_hidden: jax.Array,
        teacher_rows: jax.Array,
        alignment: Alignment,
        unembeddings: tuple[jax.Array, jax.Array | None],
        partners: jax.Array,
    ) -> jax.Array:
        student, teacher = (x.reshape(-1, *x.shape[2:]) for x in (student_hidden, teacher_rows))
        at_student, at_teacher, single = (x.reshape(-1) for x in single_positions(alignment))
        number, every = single.sum(dtype=jnp.int32), len(single)
        (order,) = jnp.nonzero(single, size=every, fill_value=every)
        most = jax.lax.pmax(number, axes) if axes else number

        def one(
            carry: tuple[jax.Array, jax.Array, jax.Array],
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            place, hits, faults = carry
            places = place + jnp.arange(block, dtype=jnp.int32)
            chunks = order.at[places].get(mode="fill", fill_value=every)
            ours, theirs = (
                rows_at(x, at.at[chunks].get(mode="fill", fill_value=len(x)))
                for x, at in ((student, at_student), (teacher, at_teacher))
            )
            z_s = logits_of(ours, unembeddings[0])
            faulty = not_finite(z_s)
            if unembeddings[1] is not None:
                z_t = logits_of(theirs, unembeddings[1])
                theirs, faulty = z_t.argmax(axis=-1), faulty | not_finite(z_t)
            partner = partners.at[theirs].get(mode="fill", fill_value=-1)
            own = jnp.take_along_axis(z_s, jnp.maximum(partner, 0)[:, None], axis=-1)[:, 0]
            agrees = (partner >= 0) & (own >= z_s.max(axis=-1)) & (chunks < every)
            faults += (faulty & (chunks < every)).sum(dtype=jnp.int32)
            return place + block, hits + agrees.sum(dtype=jnp.int32), faults

        start = jnp.int32(0), jnp.int32(0), jnp.int32(0)
        _, hits, faults = jax.lax.while_loop(lambda carry: carry[0] < most, one, start)
        if axes:
            hits, faults, number = jax.lax.psum((hits, faults, number), axes)
        measured = (number > 0) & (faults == 0)
        return jnp.where(measured, hits / jnp.maximum(number, 1), jnp.nan).astype(jnp.float32)

    hidden = jax.lax.stop_gradient((student_hidden, of_teacher))
    rest: Any = alignment, jax.lax.stop_gradient(unembeddings), jnp.asarray(partners)
    if not axes:
        return local(*hidden, *rest)
    rows, whole = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, rows, whole, whole),
        out_specs=whole,
        axis_names=set(axes),
        check_vma=False,  # nothing is differentiated through it
    )(*hidden, *rest)
