"""The benchmark of losses runs, at small sizes; its dense W gives the values of the package's P-KL."""

import importlib.util
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses import masked_mean, projection_kl, valid_chunks
from xtoken_jax.projection.matrix import Projection

FILE = Path(__file__).resolve().parents[2] / "experiments" / "benchmarks" / "losses.py"


@pytest.fixture(scope="module")
def benchmark():
    before = list(sys.path)
    sys.path.insert(0, str(FILE.parent))  # the benchmarks share modules; experiments are no package
    try:
        spec = importlib.util.spec_from_file_location("benchmark_of_losses", FILE)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path[:] = before


def test_the_dense_form_is_p_kl(benchmark):
    rng = np.random.default_rng(3)
    student, teacher = (jnp.asarray(rng.normal(0, 1, (2, 6, v)), jnp.float32) for v in (10, 12))
    chunks = np.tile(np.arange(6, dtype=np.int32) // 2, (2, 1))
    alignment = Alignment(chunks, chunks, np.ones((2, 3), bool))
    w = Projection(rng.integers(0, 12, (10, 1)).astype(np.int32), np.ones((10, 1), np.float32), 12)
    dense = np.zeros((10, 12), np.float32)
    dense[np.arange(10), w.indices[:, 0]] = 1
    values = projection_kl(student, teacher, alignment, w, top_k=5)
    expected = masked_mean(values, valid_chunks(alignment))
    found = benchmark.dense_p_kl(student, teacher, jnp.asarray(dense), alignment, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
