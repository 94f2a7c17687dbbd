"""Every test sees 8 virtual CPU devices; set before jax is imported anywhere."""

import json
import os

from programs import QUICK

# NPROC gives the CPU client enough threads for 8 devices to meet in a collective on 2 cores;
# without it, queued steps time out in the rendezvous and abort the process.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Of a flag that is there twice the last counts: what the environment says goes before.
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count=8 {QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Compiled programs are dropped with the module that made them: all together they take 5 GB."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Nothing kept by an earlier run is read, and nothing is left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XTOKEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pair_folders(tmp_path_factory):
    """Folders of a tiny student and a tiny teacher; tests that change files copy them first."""
    from tiny_pair import write_pair

    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def words(pair_folders, tmp_path):
    """Words of an experiment with the tiny pair, on sums that a file of the test holds."""
    path = tmp_path / "text.jsonl"
    texts = [f"{a}+{b}={a + b}, as everybody knows.\n" * 4 for a in range(8) for b in range(8)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    student, teacher = pair_folders
    return [
        f"student.path={student}",
        f"teacher.path={teacher}",
        f"data.train.text.path={path}",
        f"data.validation.text.path={path}",
        "data.student_length=32",
        "data.teacher_length=48",
        "data.batch_size=8",
    ]
