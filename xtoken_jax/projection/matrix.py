"""W as a pytree (jax only)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.projection.partition import Partition
from xtoken_jax.projection.readable import readable, rows_of, size_of

__all__ = [
    "Array",
    "LearnableProjection",
    "Partition",
    "Projection",
    "SplitProjection",
    "TransposedProjection",
    "log_weights",
    "row_softmax",
]

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Projection:
    """W [V_s, V_t], sparse and row-stochastic, K entries a row.

    Attributes:
        indices: int32 [V_s, K], teacher ids by falling weight, -1 as padding.
        weights: float32 [V_s, K], 0 where padded; a row sums to 1, or to 0 if it is empty.
        teacher_size: V_t of the teacher's *tokenizer*. A teacher's logits can be wider;
            columns from here on never enter a loss. None: all columns count.
    """

    indices: Array
    weights: Array
    teacher_size: int | None = field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        return readable(self, _headline(size_of(self.indices), self.teacher_size) + rows_of(self.indices))

    @property
    def student_size(self) -> int:
        """V_s of the student's tokenizer, the number of rows."""
        return self.indices.shape[0]

    def project(
        self, probabilities: jax.Array, columns: jax.Array | None = None, width: int | None = None
    ) -> jax.Array:
        """probabilities @ W, all of it or a subset of the teacher's columns.

        Args:
            probabilities: float32 [..., V_s].
            columns: int32 [n], the teacher ids wanted, without repetition. None: 0 .. width - 1.
            width: V_t or more, one past the highest id in use. None: `teacher_size`.

        Returns:
            float32 [..., n]. Mass that W sends elsewhere is dropped.
        """
        width = _width(self.teacher_size, width)
        slots, count = _slots(columns, width)
        flat = probabilities.reshape(-1, probabilities.shape[-1]).T
        total = jnp.zeros((count + 1, flat.shape[1]), flat.dtype)
        # Rows of `flat` are contiguous, so each entry adds one run of memory to another. Index
        # -1 of a padded entry reads the last slot, which is that of what is not wanted.
        indices, weights = jnp.asarray(self.indices), jnp.asarray(self.weights)
        for k in range(indices.shape[1]):
            total = total.at[slots[indices[:, k]]].add(weights[:, k, None] * flat)
        return total[:count].T.reshape(*probabilities.shape[:-1], count)

    @property
    def T(self) -> TransposedProjection:  # noqa: N802
        """W^T as a view: `W.T.project(values)` is values @ W^T, and `W.T.T` is W."""
        return TransposedProjection(self)

    def learnable(self) -> LearnableProjection:
        """W with weights that can be trained, on the entries that it has; it starts as this W (host)."""
        with jax.ensure_compile_time_eval():  # a W from outside is known inside a traced function too
            logits, indices = log_weights(self)
        places = np.asarray(indices)
        source, rows = _sources(places, (places >= 0).sum(1) == 1, self.teacher_size)
        return LearnableProjection(logits, indices, jnp.asarray(source), jnp.asarray(rows), self.teacher_size)

    def split(self) -> SplitProjection:
        """The same W for fast projection: one-to-one rows apart from the rest (host)."""
        indices, weights = np.asarray(self.indices), np.asarray(self.weights)
        alone = (weights[:, 0] == 1.0) & ((indices >= 0).sum(1) == 1)
        source, rows = _sources(indices, alone, self.teacher_size)
        return SplitProjection(
            source, rows, indices[rows], weights[rows], self.student_size, self.teacher_size
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitProjection:
    """W in two parts: columns that copy one student token, and the other rows.

    Most rows of a real W have one entry, so that a gather does most of the work; made by
    `Projection.split`, with the same values and gradients.

    Attributes:
        source: int32 [V_t], the student id that a teacher id copies, V_s for none.
        rows: int32 [R], the student ids that are no source and have a row.
        indices, weights: int32 and float32 [R, K], their rows of W.
        student_size, teacher_size: as in `Projection`.
    """

    source: Array
    rows: Array
    indices: Array
    weights: Array
    student_size: int = field(metadata={"static": True})
    teacher_size: int | None = field(metadata={"static": True})

    def __repr__(self) -> str:
        return readable(self, _headline(f"{self.student_size:,}", self.teacher_size))

    def project(
        self, probabilities: jax.Array, columns: jax.Array | None = None, width: int | None = None
    ) -> jax.Array:
        """As `Projection.project`."""
        flat = jnp.asarray(probabilities).reshape(-1, probabilities.shape[-1])
        total = self._project(flat, lambda chosen: chosen, 0.0, columns, width)
        return total.reshape(*probabilities.shape[:-1], -1)

    def project_softmax(
        self,
        logits: jax.Array,
        log_normalizer: jax.Array,
        columns: jax.Array | None = None,
        width: int | None = None,
    ) -> jax.Array:
        """`project` of exp(logits - log_normalizer), of which it computes what the columns need.

        Args:
            logits: float32 [N, V_s].
            log_normalizer: float32 [N].
            columns, width: as in `Projection.project`.

        Returns:
            float32 [N, n].
        """
        normalizer = log_normalizer[:, None]
        return self._project(logits, lambda chosen: jnp.exp(chosen - normalizer), -jnp.inf, columns, width)

    def _project(
        self,
        values: jax.Array,
        transform: Callable[[jax.Array], jax.Array],
        absent: float,
        columns: jax.Array | None,
        width: int | None,
    ) -> jax.Array:
        """transform(values [N, V_s]) @ W at the columns; `absent` is what transforms to 0."""
        width = _width(self.teacher_size, width)
        slots, count = _slots(columns, width)
        if columns is None:
            columns = jnp.arange(width, dtype=jnp.int32)
        source = jnp.asarray(self.source).at[columns].get(mode="fill", fill_value=self.student_size)
        copied = transform(values.at[:, source].get(mode="fill", fill_value=absent))
        others = transform(values[:, jnp.asarray(self.rows)]).T
        # Each entry adds one run of memory to another. Those outside the wanted columns have the slot
        # past the end, where adding does nothing; index -1 reads the last slot, which is that one.
        total = jnp.zeros((count, len(values)), values.dtype)
        for k in range(self.indices.shape[1]):
            share = jnp.asarray(self.weights)[:, k, None] * others
            total = total.at[slots[jnp.asarray(self.indices)[:, k]]].add(share, mode="drop")
        return copied + total.T

    def pull_back(
        self, values: jax.Array, columns: jax.Array | None = None, width: int | None = None
    ) -> jax.Array:
        """values @ W^T: the transpose of `project`.

        Args:
            values: float32 [N, n], of the columns.
            columns, width: as in `Projection.project`.

        Returns:
            float32 [N, V_s].
        """
        width = _width(self.teacher_size, width)
        slots, count = _slots(columns, width)
        values = jnp.pad(values, ((0, 0), (0, 1)))  # what is not wanted is worth 0
        indices, weights = jnp.asarray(self.indices), jnp.asarray(self.weights)
        others = sum(weights[None, :, k] * values[:, slots[indices[:, k]]] for k in range(indices.shape[1]))
        # One table, in which every student token has its place.
        rows, size = jnp.asarray(self.rows), self.student_size
        place = jnp.full(size, count, jnp.int32)
        taken = jnp.arange(len(self.source), dtype=jnp.int32)
        place = place.at[jnp.asarray(self.source)].set(slots[jnp.minimum(taken, width)], mode="drop")
        place = place.at[rows].set(count + 1 + jnp.arange(len(rows), dtype=jnp.int32))
        return jnp.concatenate([values, others], axis=1)[:, place]

    def pull_to_weights(
        self,
        values: jax.Array,
        logits: jax.Array,
        log_normalizer: jax.Array,
        columns: jax.Array | None = None,
        width: int | None = None,
    ) -> jax.Array:
        """The gradient of sum(values * `project_softmax`) by the weights.

        Args:
            values: float32 [N, n], of the columns.
            logits, log_normalizer, columns, width: as in `project_softmax`.

        Returns:
            float32 [R, K].
        """
        slots, _ = _slots(columns, _width(self.teacher_size, width))
        values = jnp.pad(values, ((0, 0), (0, 1))).T  # what is not wanted is worth 0
        others = jnp.exp(logits[:, jnp.asarray(self.rows)] - log_normalizer[:, None]).T
        indices = jnp.asarray(self.indices)
        sums = [(others * values[slots[indices[:, k]]]).sum(-1) for k in range(indices.shape[1])]
        return jnp.stack(sums, axis=-1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TransposedProjection:
    """W^T [V_t, V_s], read from W; made by `Projection.T`.

    Attributes:
        projection: W.
    """

    projection: Projection

    @property
    def T(self) -> Projection:  # noqa: N802
        """W itself."""
        return self.projection

    def project(self, values: jax.Array) -> jax.Array:
        """values @ W^T: what a student token is worth where teacher tokens are worth `values`.

        It is the gradient of `Projection.project`, and its gradient is that.

        Args:
            values: float32 [..., V_t]; columns that are missing count as 0.

        Returns:
            float32 [..., V_s].
        """
        indices, weights = jnp.asarray(self.projection.indices), jnp.asarray(self.projection.weights)
        flat = jnp.asarray(values).reshape(-1, values.shape[-1]).T
        # A negative index would count from the end, so padding reads past it.
        places = jnp.where(indices < 0, flat.shape[0], indices)
        total = jnp.zeros((indices.shape[0], flat.shape[1]), flat.dtype)
        for k in range(indices.shape[1]):
            read = flat.at[places[:, k]].get(mode="fill", fill_value=0.0)
            total = total + weights[:, k, None] * read
        return total.T.reshape(*values.shape[:-1], indices.shape[0])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LearnableProjection:
    """W with trained weights on a fixed support (X-Token, section 4; P-KL only).

    Only `logits` is trained, for example with `dataclasses.replace(w, logits=logits)` inside the
    loss: W stays as sparse as it was, and its rows non-negative and normalized. A row of one entry
    has weight 1 whatever its logit is, so that it is copied as in `SplitProjection`. Made by
    `Projection.learnable`.

    Attributes:
        logits: float32 [V_s, K], log-weights; what stands on padded places has no effect.
        indices: int32 [V_s, K], teacher ids, -1 as padding.
        source: int32 [V_t], the student id of one entry that a teacher id copies, V_s for none.
        rows: int32 [R], the student ids that are no source and have a row.
        teacher_size: as in `Projection`.
    """

    logits: Array
    indices: Array
    source: Array
    rows: Array
    teacher_size: int | None = field(default=None, metadata={"static": True})

    def __repr__(self) -> str:
        return readable(self, _headline(size_of(self.indices), self.teacher_size))

    @property
    def student_size(self) -> int:
        """V_s of the student's tokenizer, the number of rows."""
        return self.indices.shape[0]

    def projection(self) -> Projection:
        """W as it now is: the softmax of each row over its entries; empty rows stay empty."""
        return Projection(self.indices, row_softmax(self.logits, self.indices), self.teacher_size)

    def split(self) -> SplitProjection:
        """W as it now is, for fast projection; its weights have a gradient to the logits."""
        rows = jnp.asarray(self.rows)
        indices, logits = jnp.asarray(self.indices)[rows], jnp.asarray(self.logits)[rows]
        weights = row_softmax(logits, indices)
        return SplitProjection(self.source, rows, indices, weights, self.student_size, self.teacher_size)

    def project(
        self, probabilities: jax.Array, columns: jax.Array | None = None, width: int | None = None
    ) -> jax.Array:
        """As `Projection.project`, with a gradient to the logits."""
        return self.split().project(probabilities, columns, width)


def log_weights(projection: Projection) -> tuple[jax.Array, jax.Array]:
    """Where W starts to learn: logits float32 and indices int32, both [V_s, K]; -1 where it has no weight."""
    indices, weights = jnp.asarray(projection.indices), jnp.asarray(projection.weights)
    support = (indices >= 0) & (weights > 0)
    logits = jnp.where(support, jnp.log(jnp.where(support, weights, 1.0)), 0.0)
    return logits, jnp.where(support, indices, -1)


def row_softmax(logits: Array, indices: Array) -> jax.Array:
    """Weights of W, float32 [V_s, K], from log-weights: the softmax of each row over its entries.

    Padded places, of index -1, get 0 and a gradient of exactly 0, whatever stands there.
    """
    support = jnp.asarray(indices) >= 0
    # No -inf and no division by 0 anywhere.
    logits = jnp.where(support, logits, jnp.finfo(logits.dtype).min)
    top = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    raw = jnp.where(support, jnp.exp(logits - top), 0.0)
    total = raw.sum(-1, keepdims=True)
    return raw / jnp.where(total > 0, total, 1.0)


def _headline(student_size: str, teacher_size: int | None) -> str:
    teacher = "?" if teacher_size is None else f"{teacher_size:,}"
    return f"W of {student_size} student and {teacher} teacher tokens"


def _sources(indices: np.ndarray, alone: np.ndarray, size: int | None) -> tuple[np.ndarray, np.ndarray]:
    """`source` and `rows` of a split W, from indices [V_s, K] and the rows [V_s] of one entry of weight 1."""
    size = int(indices.max(initial=-1)) + 1 if size is None else size
    ids = np.flatnonzero(alone)
    targets, first = np.unique(indices[ids].max(1), return_index=True)
    source = np.full(size, len(indices), np.int32)
    source[targets] = ids[first]
    # What remains: pieces of several, and student tokens that share a teacher token.
    rest = (indices >= 0).sum(1) > 0
    rest[ids[first]] = False
    return source, np.flatnonzero(rest).astype(np.int32)


def _width(teacher_size: int | None, width: int | None) -> int:
    size = teacher_size if width is None else width
    if size is None:
        raise ValueError("width is needed: the projection does not carry the size of its teacher")
    return size


def _slots(columns: jax.Array | None, width: int) -> tuple[jax.Array, int]:
    """A slot for every teacher id, int32 [width + 1], and how many there are: n for what is not wanted."""
    if columns is None:
        return jnp.arange(width + 1, dtype=jnp.int32), width
    count = columns.shape[0]
    numbers = jnp.arange(count, dtype=jnp.int32)
    return jnp.full(width + 1, count, jnp.int32).at[columns].set(numbers), count
