"""Texts of digits in two tokenizers, as arrays, such as any tokenizers and data pipeline may give them.

The student's tokens are the 10 digits and the 100 pairs of them (token 10 + 10 a + b is "ab"), the
teacher's the 10 digits.
"""

import numpy as np

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.projection.matrix import Projection

V_S, V_T = 110, 10

# W: a digit is itself; a pair is mostly its first digit, which is what comes next.
indices = np.array([[d, -1] for d in range(10)] + [[a, b] for a in range(10) for b in range(10)], np.int32)
weights = np.array([[1.0, 0.0]] * 10 + [[0.9, 0.1]] * 100, np.float32)
twice = indices[:, 0] == indices[:, 1]  # "33" is the digit 3 twice: one entry
indices[twice, 1], weights[twice] = -1, [1.0, 0.0]
W = Projection(indices, weights, teacher_size=V_T)

# 32 texts of 12 digits. The student reads a pair and a digit in turn, the teacher digit by digit; where
# both have the end of a token, a chunk ends.
teacher_ids = np.random.default_rng(0).integers(0, 10, (32, 12)).astype(np.int32)
a, b, c = teacher_ids[:, 0::3], teacher_ids[:, 1::3], teacher_ids[:, 2::3]
student_ids = np.stack([10 + 10 * a + b, c], axis=-1).reshape(32, 8)
alignment = Alignment(
    student_chunks=np.tile(np.arange(8, dtype=np.int32), (32, 1)),
    teacher_chunks=np.tile(np.array([0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7], np.int32), (32, 1)),
    valid=np.ones((32, 8), bool),
)

# The teacher: the logits of the next digit, given the last one.
teacher_table = (3 * np.random.default_rng(1).normal(size=(10, 10))).astype(np.float32)
teacher_logits = teacher_table[teacher_ids]
