"""A W with rows of every kind."""

import numpy as np

from xtoken_jax.projection.matrix import Projection


def random_w(seed, student, teacher, entries=4):
    """Empty rows, single entries, shared teacher ids, several pieces; the last row is empty too."""
    rng = np.random.default_rng(seed)
    indices = np.full((student, entries), -1, np.int32)
    weights = np.zeros((student, entries), np.float32)
    for i in range(student - 1):
        count = i % (entries + 1)
        if count:
            indices[i, :count] = rng.choice(teacher, count, replace=False)
            weights[i, :count] = np.sort(rng.dirichlet(np.ones(count)))[::-1]
    return Projection(indices, weights, teacher)


def rows_of(projection):
    """Its rows as lists of (teacher id, weight)."""
    return [
        [(int(j), float(w)) for j, w in zip(ids, weights, strict=True) if j >= 0]
        for ids, weights in zip(np.asarray(projection.indices), np.asarray(projection.weights), strict=True)
    ]
