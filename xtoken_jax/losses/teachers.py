"""Several teachers: one distillation term from the terms of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from xtoken_jax.alignment.batch import StoredRows
from xtoken_jax.distributed.mesh import BATCH
from xtoken_jax.errors import KindError
from xtoken_jax.losses.blockwise.checks import check_stored
from xtoken_jax.losses.blockwise.teacher import HiddenStates, Stored
from xtoken_jax.losses.checks import (
    check_array,
    check_choice,
    check_count,
    check_ids,
    check_logits,
    check_rows,
    check_scalar,
    check_settings,
    check_sizes,
    check_width,
)
from xtoken_jax.losses.math.reduce import masked_mean
from xtoken_jax.losses.terms.same_vocabulary import check_labels
from xtoken_jax.projection.readable import described

SCORES = ("negative_ce", "negative_entropy", "max_probability")


class TeacherScores(NamedTuple):
    """How well a teacher knows its own text: float32 scalars, higher is better."""

    negative_ce: jax.Array
    negative_entropy: jax.Array
    max_probability: jax.Array


class TeacherTerm(NamedTuple):
    """One teacher's share of the objective.

    Attributes:
        kd: scalar, the mean over the global batch of its own loss, by its own alignment and W.
        weight: alpha_m >= 0, where the weights are fixed.
        scores: `teacher_scores` of the batch, where they are not.
        vocabulary_size: V_t of its tokenizer, for `scale_by_vocabulary`.
    """

    kd: jax.Array
    weight: float = 1.0
    scores: TeacherScores | None = None
    vocabulary_size: int | None = None


def teacher_scores(
    logits: jax.Array,
    token_ids: jax.Array,
    token_mask: jax.Array,
    *,
    size: int | None = None,
    count: jax.Array | float | None = None,
) -> TeacherScores:
    """Means over the teacher's positions of log p(next token), sum p log p and max p (no gradient).

    Under `jax.jit` the scores that nobody reads are not computed.

    Args:
        logits: float [B, T, >= V].
        token_ids: int32 [B, T], in the teacher's tokenizer.
        token_mask: bool [B, T], tokens that count as labels.
        size: V of its tokenizer; columns from there on do not count. None: all do.
        count: labels in the global batch, see `masked_mean`.

    Returns:
        TeacherScores.

    Example:
        >>> scores = teacher_scores(jnp.zeros((1, 2, 4)), jnp.array([[0, 3]]), jnp.ones((1, 2), bool))
        >>> [round(float(score), 4) for score in scores]  # -log 4 twice, and a quarter
        [-1.3863, -1.3863, 0.25]
    """
    check_labels(logits, token_ids, token_mask, size)
    check_count("count", count)
    logits = jax.lax.stop_gradient(jnp.asarray(logits[:, :-1, :size], jnp.float32))
    log_p = jax.nn.log_softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(log_p, jnp.asarray(token_ids)[:, 1:, None], axis=-1)[..., 0]
    information = jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * log_p).sum(-1)
    mask = jnp.asarray(token_mask[:, 1:], bool)
    values = chosen, information, _highest(log_p, chosen[..., None])[..., 0]
    return TeacherScores(*(masked_mean(each, mask, count) for each in values))


def blockwise_teacher_scores(
    teacher: tuple[jax.Array, jax.Array] | StoredRows,
    token_ids: jax.Array,
    token_mask: jax.Array,
    *,
    size: int,
    softcap: float | None = None,
    block: int = 512,
    mesh: Mesh | AbstractMesh | None = None,
    data_axes: tuple[str, ...] = BATCH,
) -> TeacherScores:
    """`teacher_scores` from hidden states or cached distributions, a block of positions at a time.

    Args:
        teacher: hidden states [B, T, D] and unembedding [>= V, D], or what a cache stores of the batch, for
            temperature 1 (for any, where it stores every token).
        token_ids: int32 [B, T], in the teacher's tokenizer.
        token_mask: bool [B, T], tokens that count as labels.
        size: V of its tokenizer.
        softcap: of the logits from hidden states.
        block: positions whose logits exist at a time, on each device.
        mesh: None: that of `jax.set_mesh`, if any.
        data_axes: mesh axes that split B.

    Returns:
        TeacherScores.

    Raises:
        ValueError: stored rows of another temperature; an argument that does not fit.
    """
    _check_scored(teacher, token_ids, token_mask, size)
    check_settings(block=block)
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    axes = tuple(axis for axis in data_axes if mesh.shape.get(axis, 1) > 1)
    rows: jax.Array | StoredRows
    if isinstance(teacher, StoredRows):
        rows, whole = teacher, None
    else:  # cut here: inside, that is an exchange between devices that wait for each other
        rows, whole = jnp.asarray(teacher[0]), jnp.asarray(teacher[1])[:size]

    def local(
        rows: jax.Array | StoredRows, unembedding: jax.Array | None, ids: jax.Array, mask: jax.Array
    ) -> TeacherScores:
        source: HiddenStates | Stored
        if isinstance(rows, StoredRows):
            source = Stored.of(rows)
        else:
            assert unembedding is not None
            source = HiddenStates(rows.reshape(-1, rows.shape[-1]), unembedding, softcap)
        labels = jnp.roll(ids, -1, axis=1).reshape(-1)
        counted = jnp.roll(mask, -1, axis=1).at[:, -1].set(False).reshape(-1)
        every = len(labels)
        (order,) = jnp.nonzero(counted, size=every, fill_value=every)
        number = counted.sum(dtype=jnp.int32)
        most = jax.lax.pmax(number, axes) if axes else number

        def one(carry: tuple[jax.Array, TeacherScores]) -> tuple[jax.Array, TeacherScores]:
            place, sums = carry
            positions = order.at[place + jnp.arange(block)].get(mode="fill", fill_value=every)
            log_p = jax.nn.log_softmax(source.logits(positions, 1.0), axis=-1)
            real = (positions < every)[:, None]
            label = labels.at[positions].get(mode="fill", fill_value=0)[:, None]
            chosen = jnp.take_along_axis(log_p, label, axis=-1)
            information = jnp.where(log_p == -jnp.inf, 0.0, jnp.exp(log_p) * log_p).sum(-1, keepdims=True)
            values = chosen, information, _highest(log_p, chosen)
            added = (jnp.where(real, value, 0.0).sum() for value in values)
            return place + block, TeacherScores(*map(jnp.add, sums, added))

        sums = TeacherScores(*(jnp.float32(0),) * 3)
        _, sums = jax.lax.while_loop(lambda carry: carry[0] < most, one, (jnp.int32(0), sums))
        if axes:
            sums, number = jax.lax.psum((sums, number), axes)
        return TeacherScores(*(total / jnp.maximum(number, 1) for total in sums))

    arguments = jax.lax.stop_gradient((rows, whole)), jnp.asarray(token_ids), jnp.asarray(token_mask, bool)
    (rows, whole), ids, mask = arguments
    if not axes:
        return local(rows, whole, ids, mask)
    split, every_row = PartitionSpec(axes), PartitionSpec()
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(split, every_row, split, split),
        out_specs=every_row,
        axis_names=set(axes),
        check_vma=False,  # nothing is differentiated through it
    )(rows, whole, ids, mask)


def _highest(log_p: jax.Array, chosen: jax.Array) -> jax.Array:
    """The largest probability [..., 1] of log-probabilities [..., V]; NaN where one of them, [..., 1], is.

    A maximum alone may drop NaN, depending on XLA's flags.
    """
    return jnp.where(jnp.isnan(chosen), chosen, jnp.exp(log_p.max(-1, keepdims=True)))


def _check_scored(teacher: Any, token_ids: jax.Array, token_mask: jax.Array, size: int) -> None:
    check_sizes(size=size)
    if isinstance(teacher, StoredRows):
        check_stored("teacher", teacher, size)
        name, rows = "teacher.others", teacher.others
    else:
        if not isinstance(teacher, tuple) or len(teacher) != 2:
            raise KindError(
                f"teacher: {described(teacher)}, but (hidden states, unembedding) or StoredRows are needed"
            )
        name, rows = "teacher[0]", teacher[0]
        check_array(name, rows, "float", "B", "T", "D")
        check_array("teacher[1]", teacher[1], "float", "V", rows.shape[-1])
        check_width("teacher[1]", teacher[1], len(teacher[1]), size, "size")
    check_ids("token_ids", token_ids, ("B", "T"), size)
    check_rows(name, rows, "token_ids", token_ids)
    check_array("token_mask", token_mask, "bool", *token_ids.shape)


def combine_teachers(
    teachers: Sequence[TeacherTerm],
    *,
    combine: str = "sum",
    score: str | None = None,
    sharpness: float = 1.0,
    scale_by_vocabulary: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """KD = sum_m alpha_m KD_m (X-Token, section 4); the result goes where one teacher's term would.

    Args:
        teachers: at least one.
        combine: "sum", or "select_teacher" for only the one with the lowest cross-entropy.
        score: None for the fixed weights, which the paper finds best; "negative_ce",
            "negative_entropy" or "max_probability" for alpha = softmax over teachers of
            sharpness * score, without a gradient.
        sharpness: a of the softmax; 0 makes all weights equal.
        scale_by_vocabulary: multiply KD_m by log V_t,m / log min V_t.

    Returns:
        KD, float32 scalar, and the alphas float32 [M] without the vocabularies' factors.

    Raises:
        ValueError: no teacher, another name, or a teacher without what the choice reads.

    Example:
        >>> terms = [TeacherTerm(jnp.float32(2.0), 0.8), TeacherTerm(jnp.float32(1.0), 0.2)]
        >>> kd, alphas = combine_teachers(terms)
        >>> round(float(kd), 4)
        1.8
    """
    if not teachers:
        raise ValueError("combine_teachers needs at least one teacher")
    check_choice("combine", combine, ("sum", "select_teacher"))
    if score is not None:
        check_choice("score", score, SCORES)
    check_scalar("sharpness", sharpness)
    for number, teacher in enumerate(teachers):
        check_scalar(f"teachers[{number}].kd", teacher.kd)
        check_scalar(f"teachers[{number}].weight", teacher.weight)
    if combine == "select_teacher":
        scores = _scores(teachers, "negative_ce")
        alphas = jax.nn.one_hot(jnp.argmax(scores), len(teachers))
        alphas = jnp.where(jnp.isnan(scores).any(), jnp.nan, alphas)
    elif score is None:
        alphas = jnp.array([teacher.weight for teacher in teachers], jnp.float32)
    else:
        alphas = jax.nn.softmax(sharpness * _scores(teachers, score))
    factors = [1.0] * len(teachers)
    if scale_by_vocabulary:
        factors = vocabulary_factors([teacher.vocabulary_size for teacher in teachers])
    kds = jnp.stack([jnp.asarray(teacher.kd, jnp.float32) for teacher in teachers])
    # A teacher without weight may be infinite, which 0 times would make NaN. It may be NaN too where it does
    # not take part, but not where the softmax of the scores underflows.
    ignored = alphas == 0
    if combine == "sum" and score is not None:
        ignored &= ~jnp.isnan(kds)
    shares = jnp.where(ignored, 0.0, alphas * jnp.array(factors, jnp.float32) * kds)
    return shares.sum(), alphas


def average_logits(
    teacher_logits: Sequence[jax.Array], weights: Sequence[float], *, size: int | None = None
) -> jax.Array:
    """sum_m w_m z_m / sum_m w_m: one teacher out of several that share the student's tokenizer.

    For `same_vocabulary_kl` over the full vocabulary.

    Args:
        teacher_logits: float [B, T, >= V] each, of the same tokens.
        weights: >= 0, not all 0.
        size: V of the tokenizer; columns from there on are cut off. None: all have its width.

    Returns:
        float32 [B, T, V].

    Raises:
        ValueError: shapes that differ, which other tokenizers bring about, or weights that make no
            sense.

    Example:
        >>> average_logits([jnp.zeros((1, 1, 2)), jnp.ones((1, 1, 3))], [1.0, 3.0], size=2).tolist()
        [[[0.75, 0.75]]]
    """
    if len(weights) != len(teacher_logits) or not teacher_logits:
        raise ValueError(f"{len(teacher_logits)} teachers and {len(weights)} weights")
    for number, logits in enumerate(teacher_logits):
        check_array(f"teacher_logits[{number}]", logits, "float", "B", "T", "V")
    if not 0 < sum(weights) < math.inf or min(weights) < 0:
        raise ValueError(f"weights {list(weights)}: must not be negative, nor all 0")
    cut = [jnp.asarray(logits[..., :size], jnp.float32) for logits in teacher_logits]
    shapes = [logits.shape for logits in cut]
    if len(set(shapes)) > 1 or (size is not None and shapes[0][-1] < size):
        raise ValueError(
            f"logits of shapes {shapes} for a tokenizer of size {size}: averaged logits need teachers that "
            "share the student's tokenizer"
        )
    for number, logits in enumerate(teacher_logits):
        check_logits(f"teacher_logits[{number}]", logits, ("B", "T"), size, "size")
    total = sum(weights)
    average = jnp.zeros_like(cut[0])
    for logits, weight in zip(cut, weights, strict=True):
        if weight > 0:  # a teacher without weight may exclude tokens, which 0 times would make NaN
            average = average + weight / total * logits
    return average


def _scores(teachers: Sequence[TeacherTerm], name: str) -> jax.Array:
    """float32 [M], without a gradient."""
    found = [teacher.scores for teacher in teachers]
    missing = [i for i, scores in enumerate(found) if scores is None]
    if missing:
        raise ValueError(f"teachers {missing} come without scores, which {name} needs")
    return jax.lax.stop_gradient(jnp.stack([getattr(scores, name) for scores in found]))


def vocabulary_factors(sizes: Sequence[int | None]) -> list[float]:
    """log V_m / log min V of each teacher.

    Raises:
        ValueError: a size that is unknown or below 2.
    """
    known = [size for size in sizes if size is not None and size > 1]
    if len(known) < len(sizes):
        raise ValueError(
            f"vocabulary sizes {list(sizes)}: scale_by_vocabulary needs each, of 2 tokens or more"
        )
    return [math.log(size) / math.log(min(known)) for size in known]
