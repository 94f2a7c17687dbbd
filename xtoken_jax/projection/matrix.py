"""W as a pytree, and the partition of two vocabularies read from it (jax only)."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

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

    @property
    def student_size(self) -> int:
        """V_s of the student's tokenizer, the number of rows."""
        return self.indices.shape[0]

    def project(self, probabilities: jax.Array, columns: jax.Array, width: int) -> jax.Array:
        """probabilities @ W, on a subset of the teacher's columns.

        Args:
            probabilities: float32 [..., V_s].
            columns: int32 [n], the teacher ids wanted, without repetition.
            width: V_t or more, one past the highest id in use.

        Returns:
            float32 [..., n]. Mass that W sends elsewhere is dropped.
        """
        count = columns.shape[0]
        # A slot for every teacher id; slot `count` collects what is not wanted. Index -1 of
        # a padded entry reads the last element, which is that slot.
        slots = jnp.full(width + 1, count, jnp.int32).at[columns].set(jnp.arange(count, dtype=jnp.int32))
        flat = probabilities.reshape(-1, probabilities.shape[-1]).T
        total = jnp.zeros((count + 1, flat.shape[1]), flat.dtype)
        # Rows of `flat` are contiguous, so each entry adds one run of memory to another.
        indices, weights = jnp.asarray(self.indices), jnp.asarray(self.weights)
        for k in range(indices.shape[1]):
            total = total.at[slots[indices[:, k]]].add(weights[:, k, None] * flat)
        return total[:count].T.reshape(*probabilities.shape[:-1], count)

    def split(self) -> SplitProjection:
        """The same W for fast projection: one-to-one rows apart from the rest (host)."""
        indices, weights = np.asarray(self.indices), np.asarray(self.weights)
        size = int(indices.max(initial=-1)) + 1 if self.teacher_size is None else self.teacher_size
        alone = np.flatnonzero((weights[:, 0] == 1.0) & ((indices >= 0).sum(1) == 1))
        targets, first = np.unique(indices[alone, 0], return_index=True)
        source = np.full(size, len(indices), np.int32)
        source[targets] = alone[first]
        # What remains: pieces of several, and student tokens that share a teacher token.
        rest = indices >= 0
        rest[alone[first]] = False
        rows, entries = np.nonzero(rest)
        return SplitProjection(
            source,
            rows.astype(np.int32),
            indices[rows, entries],
            weights[rows, entries],
            self.student_size,
            self.teacher_size,
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SplitProjection:
    """W in two parts: columns that copy one student token, and single entries.

    Most rows of a real W have one entry, so that a gather does most of the work; made by
    `Projection.split`, with the same values and gradients.

    Attributes:
        source: int32 [V_t], the student id that a teacher id copies, V_s for none.
        rows, columns, weights: int32 [n], int32 [n], float32 [n], all other entries of W.
        student_size, teacher_size: as in `Projection`.
    """

    source: Array
    rows: Array
    columns: Array
    weights: Array
    student_size: int = field(metadata={"static": True})
    teacher_size: int | None = field(metadata={"static": True})

    def project(self, probabilities: jax.Array, columns: jax.Array, width: int) -> jax.Array:
        """As `Projection.project`."""
        count = columns.shape[0]
        # Ids past the width read the last slot, which is that of what is not wanted.
        slots = jnp.full(width + 1, count, jnp.int32).at[columns].set(jnp.arange(count, dtype=jnp.int32))
        flat = jnp.asarray(probabilities).reshape(-1, probabilities.shape[-1]).T
        source = jnp.asarray(self.source).at[columns].get(mode="fill", fill_value=self.student_size)
        total = flat.at[source].get(mode="fill", fill_value=0.0)
        # Entries outside the wanted columns have the slot past the end, where adding does nothing.
        entries = jnp.asarray(self.weights)[:, None] * flat[jnp.asarray(self.rows)]
        total = total.at[slots[jnp.asarray(self.columns)]].add(entries, mode="drop")
        return total.T.reshape(*probabilities.shape[:-1], count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Partition:
    """The tokens that two vocabularies have in common, paired, and the rest of each.

    Attributes:
        common_student, common_teacher: int32 [M], pair m is (common_student[m],
            common_teacher[m]); by rising student id.
        uncommon_student, uncommon_teacher: int32, all other ids below the tokenizers' sizes.
    """

    common_student: Array
    common_teacher: Array
    uncommon_student: Array
    uncommon_teacher: Array

    @classmethod
    def strict(cls, projection: Projection, *, teacher_size: int | None = None) -> Partition:
        """GOLD's: rows with one entry, of weight 1; a teacher id goes to the lowest student id."""
        indices, weights = np.asarray(projection.indices), np.asarray(projection.weights)
        exact = (weights[:, 0] == 1.0) & ((indices >= 0).sum(1) == 1)
        return cls._from_candidates(indices, weights, exact, _size(projection, teacher_size))

    @classmethod
    def relaxed(
        cls, projection: Projection, *, teacher_size: int | None = None, threshold: float = 0.6
    ) -> Partition:
        """H-KL's: rows whose top weight reaches the threshold.

        A teacher id that several rows point at goes to the highest weight, then to the
        lowest student id (official implementation).
        """
        indices, weights = np.asarray(projection.indices), np.asarray(projection.weights)
        strong = (weights[:, 0] >= threshold) & (indices[:, 0] >= 0)
        return cls._from_candidates(indices, weights, strong, _size(projection, teacher_size))

    @classmethod
    def _from_candidates(
        cls, indices: np.ndarray, weights: np.ndarray, candidate: np.ndarray, teacher_size: int
    ) -> Partition:
        student = np.flatnonzero(candidate)
        student = student[np.lexsort((student, -weights[student, 0]))]
        teacher, first = np.unique(indices[student, 0], return_index=True)
        order = np.argsort(student[first])
        common_student, common_teacher = student[first][order], teacher[order]
        return cls(
            common_student.astype(np.int32),
            common_teacher.astype(np.int32),
            np.setdiff1d(np.arange(len(indices)), common_student).astype(np.int32),
            np.setdiff1d(np.arange(teacher_size), common_teacher).astype(np.int32),
        )


def _size(projection: Projection, teacher_size: int | None) -> int:
    size = projection.teacher_size if teacher_size is None else teacher_size
    if size is None:
        raise ValueError("teacher_size is needed: the projection does not carry the size of its teacher")
    return size
