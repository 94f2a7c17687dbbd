"""The losses in code bases that are not ours: both examples learn, and need no more than they say."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "experiments" / "reuse"
OURS = ("xtoken_jax.losses", "xtoken_jax.alignment.batch", "xtoken_jax.projection.matrix")


def run(*words):
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def values_of(output):
    return [float(value) for value in re.findall(r"step +\d+  P-KL (\S+)", output)]


def test_plain_jax_learns():
    values = values_of(run(FOLDER / "plain_jax.py"))
    assert len(values) == 7
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] / 3


@pytest.mark.skipif(
    importlib.util.find_spec("equinox") is None, reason="no equinox: pip install 'xtoken-jax[reuse]'"
)
def test_equinox_learns_the_student_and_w():
    output = run(FOLDER / "equinox_student.py")
    values = values_of(output)
    assert len(values) == 7
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] / 3
    moved = float(re.search(r"entry of W: (\S+)", output)[1])
    assert 1e-3 < moved < 1


def test_the_examples_use_three_modules_of_the_package():
    used = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            used |= {name for name in names if name.split(".")[0] == "xtoken_jax"}
    assert used == set(OURS)


ONLY_JAX = """
import sys
import jax, jax.numpy, numpy
def libraries(): return {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
before = libraries()
jax.jit(lambda x: x @ x)(numpy.ones((2, 2)))  # what jax loads when it first runs
class Refuse:
    def find_spec(self, name, path=None, target=None):
        allowed = before | set(sys.stdlib_module_names) | {"xtoken_jax", "two_tokenizers"}
        if name.partition(".")[0] not in allowed:
            raise ImportError(f"{name} is not jax")
sys.meta_path.insert(0, Refuse())
"""


def test_the_three_modules_load_jax_and_numpy_alone():
    imports = "".join(f"import {name}\n" for name in OURS)
    output = run("-c", f"{ONLY_JAX}{imports}print(*libraries() - before, *sys.modules)").split()
    assert output[0] == "xtoken_jax"
    assert not {"flax", "optax", "transformers", "tokenizers", "safetensors", "equinox"} & set(output)
    parts = {name for name in output if name.startswith("xtoken_jax.")}
    allowed = {"losses", "alignment", "projection", "errors", "distributed", "_moved"}
    assert {name.split(".")[1] for name in parts} <= allowed
    assert {name for name in parts if ".distributed." in name} == {"xtoken_jax.distributed.mesh"}
    assert {name for name in parts if name.startswith("xtoken_jax.alignment.")} == {OURS[1]}
    assert "xtoken_jax.projection.build" not in parts
    assert "xtoken_jax.projection.files" not in parts


def test_plain_jax_runs_where_nothing_else_can_be_imported():
    script = (
        f"import runpy\nsys.path.insert(0, {str(FOLDER)!r})\nrunpy.run_path({str(FOLDER / 'plain_jax.py')!r})"
    )
    assert len(values_of(run("-c", ONLY_JAX + script))) == 7
