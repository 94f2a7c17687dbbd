"""Every test sees 8 virtual CPU devices; set before jax is imported anywhere."""

import os

# NPROC gives the CPU client enough threads for 8 devices to meet in a collective on 2 cores;
# without it, queued steps time out in the rendezvous and abort the process.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def pair_folders(tmp_path_factory):
    """Folders of a tiny student and a tiny teacher; tests that change files copy them first."""
    from tiny_pair import write_pair

    return write_pair(tmp_path_factory.mktemp("pair"))
