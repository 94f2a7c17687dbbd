"""The partition of two vocabularies into common pairs and the rest, read from W (jax only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np

from xtoken_jax.projection.readable import size_of

Array = jax.Array | np.ndarray


class Rows(Protocol):
    """The part of a Projection that a partition is read from."""

    @property
    def indices(self) -> Array: ...
    @property
    def weights(self) -> Array: ...
    @property
    def teacher_size(self) -> int | None: ...


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

    def __repr__(self) -> str:
        pairs, student, teacher = map(
            size_of, (self.common_student, self.uncommon_student, self.uncommon_teacher)
        )
        return f"Partition({pairs} common pairs; uncommon: {student} student and {teacher} teacher tokens)"

    @property
    def student_size(self) -> int:
        """V_s of the student's tokenizer."""
        return self.common_student.shape[0] + self.uncommon_student.shape[0]

    @property
    def teacher_size(self) -> int:
        """V_t of the teacher's tokenizer."""
        return self.common_teacher.shape[0] + self.uncommon_teacher.shape[0]

    @classmethod
    def strict(cls, projection: Rows, *, teacher_size: int | None = None) -> Partition:
        """GOLD's: rows with one entry, of weight 1; a teacher id goes to the lowest student id."""
        indices, weights = np.asarray(projection.indices), np.asarray(projection.weights)
        exact = (weights[:, 0] == 1.0) & ((indices >= 0).sum(1) == 1)
        return cls._from_candidates(indices, weights, exact, _size(projection, teacher_size))

    @classmethod
    def relaxed(
        cls, projection: Rows, *, teacher_size: int | None = None, threshold: float = 0.6
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


def _size(projection: Rows, teacher_size: int | None) -> int:
    size = projection.teacher_size if teacher_size is None else teacher_size
    if size is None:
        raise ValueError("teacher_size is needed: the projection does not carry the size of its teacher")
    return size
