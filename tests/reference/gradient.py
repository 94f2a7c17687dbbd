"""Central differences."""

import numpy as np


def differences(function, point, coordinates, step=1e-5):
    """d function / d point at some coordinates (tuples of indices), in float64."""
    out = []
    for coordinate in coordinates:
        values = []
        for sign in (1, -1):
            moved = np.array(point, np.float64)
            moved[coordinate] += sign * step
            values.append(function(moved.tolist()))
        out.append((values[0] - values[1]) / (2 * step))
    return np.array(out)
