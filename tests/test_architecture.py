"""Who may import whom. A new edge fails here: either it is wrong, or the table says why it is not."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "xtoken_jax"

# Every module may import these: errors, whole writes of files, names that become folders.
COMMON = {"errors", "files", "hub"}

# Package or module -> what it may import besides COMMON and itself, in the order of the layers: no entry
# names one below it. A dotted name has a rule of its own, which replaces its package's.
ALLOWED = {
    "_moved": set(),
    "errors": set(),
    "files": set(),
    "hub": set(),
    "distributed": set(),
    "tokens": set(),
    "alignment.batch": set(),
    "alignment": {"tokens"},
    # These five need jax alone, as the losses do.
    "projection.readable": set(),
    "projection.partition": {"projection.readable"},
    "projection.matrix": {"projection.partition", "projection.readable"},
    "projection.events": {"projection.readable"},
    "projection.sharded": {"projection.matrix"},
    "projection": {"tokens"},
    "coverage": {"tokens", "projection"},
    "display": {"tokens", "alignment", "projection", "coverage"},
    "models": {"distributed"},
    # It compares the tokenizer's size with the model's vocabulary.
    "models.load": {"models", "distributed", "tokens.tokenizer"},
    # Checked arguments may be of any kind that a loss takes.
    "losses.config": set(),
    "losses.checks": {
        "losses.config", "alignment.batch", "projection.matrix", "projection.events", "projection.sharded",
        "projection.readable",
    },
    "losses.math": {"losses.checks", "distributed.mesh", "alignment.batch"},
    "losses.terms": {
        "losses.checks", "losses.math", "distributed.mesh", "alignment.batch", "projection.matrix",
        "projection.events", "projection.sharded", "projection.readable",
    },
    "losses": {
        "distributed.mesh", "alignment.batch", "projection.matrix", "projection.events", "projection.sharded",
        "projection.readable",
    },
    # It stores what losses read of a teacher.
    "teacher_cache": {"alignment", "models", "losses", "distributed"},
    "data.layouts": set(),
    "data.formats": {"data.layouts"},
    "data": {"tokens", "alignment", "teacher_cache"},
    # Where W trains, it is part of the state.
    "train": {"models", "losses", "data", "alignment.batch", "distributed", "projection.matrix"},
    "evaluate": {"models", "losses", "data", "alignment", "tokens", "distributed"},
    "run": {
        "tokens", "alignment", "projection", "coverage", "models", "losses", "data", "teacher_cache", "train",
        "evaluate", "distributed", "display",
    },
}  # fmt: skip
# These may import anything.
WIRING = {"__init__", "__main__", "cli"}

# Anyone's code can use these with nothing but jax.
JAX_ONLY = (
    "losses", "alignment.batch", "projection.matrix", "projection.events", "projection.partition",
    "projection.readable", "distributed.mesh",
)  # fmt: skip

AT_THE_ROOT = {"__init__", "__main__", "_moved", "errors", "hub"}
LONGEST = 400  # lines of a module


def modules():
    """Dotted name below the package -> path; a package's own file has the package's name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        yield name, path


NAMES = {name for name, _ in modules()}


def imports(tree, name, is_package):
    """Dotted names of all that a module imports, at whatever depth, TYPE_CHECKING included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                here = ["xtoken_jax", *name.split(".")]
                here = here[: len(here) - node.level + is_package]
                source = ".".join([*here, source] if source else here)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner.removeprefix("xtoken_jax.") in NAMES else source


def edges():
    for name, path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for target in imports(tree, name, path.name == "__init__.py"):
            yield name, target


EDGES = sorted(set(edges()))


def ours(target):
    """The part behind `xtoken_jax.`; "" for the package itself, None for other libraries."""
    if target == "xtoken_jax":
        return ""
    return target.removeprefix("xtoken_jax.") if target.startswith("xtoken_jax.") else None


def within(name, unit):
    return name == unit or name.startswith(unit + ".")


def rule_of(name):
    """The narrowest entry of the table that covers a module."""
    units = [unit for unit in ALLOWED if within(name, unit)]
    return max(units, key=len) if units else None


def test_every_module_has_a_place_in_the_table():
    lost = [n for n in NAMES if rule_of(n) is None and n.split(".")[0] not in WIRING]
    assert not lost, f"say in ALLOWED what {lost} may import"
    unknown = [unit for unit in ALLOWED if unit not in NAMES]
    assert not unknown, f"ALLOWED names modules that do not exist: {unknown}"


def test_imports_are_in_the_table():
    wrong = []
    for name, target in EDGES:
        inner, rule = ours(target), rule_of(name)
        if inner is None or rule is None:
            continue
        allowed = ALLOWED[rule] | COMMON | {rule}
        if not any(within(inner, unit) for unit in allowed):
            wrong.append(f"{name} imports {target}")
    assert not wrong, wrong


def test_nobody_imports_the_wiring():
    wrong = [
        f"{name} imports {target}"
        for name, target in EDGES
        if (inner := ours(target)) is not None
        and (inner == "" or inner.split(".")[0] in WIRING)
        and name.split(".")[0] not in WIRING
    ]
    assert not wrong, wrong


def test_the_table_flows_one_way():
    order = list(ALLOWED)
    for unit, allowed in ALLOWED.items():
        for other in allowed:
            entry = other if other in ALLOWED else other.split(".")[0]
            assert order.index(entry) < order.index(unit), f"{unit} may import {other}, which is below it"


@pytest.mark.parametrize("unit", JAX_ONLY)
def test_losses_need_nothing_but_jax(unit):
    libraries = {"jax", "numpy"}
    wrong = [
        f"{name} imports {target}"
        for name, target in EDGES
        if within(name, unit)
        and ours(target) is None
        and target.split(".")[0] not in libraries | sys.stdlib_module_names
    ]
    assert not wrong, wrong


def test_named_prohibitions():
    """The ones that matter most, whatever the table says."""
    for name, target in EDGES:
        inner = ours(target) or ""
        assert not (within(name, "models") and within(inner, "losses")), (name, target)
        assert not (within(name, "evaluate") and within(inner, "train.loop")), (name, target)


def cycles(edges):
    """Every group of names that import each other, directly or through others."""
    reach = {}
    for name, target in edges:
        reach.setdefault(name, set()).add(target)
    for middle in list(reach):
        for targets in reach.values():
            if middle in targets:
                targets |= reach[middle]
    groups = {frozenset(b for b in reach if b in reach[a] and a in reach[b]) for a in reach}
    return sorted(sorted(group) for group in groups if group)


def test_no_import_cycle():
    """Neither between modules, nor between packages."""
    inside = {(name, inner) for name, target in EDGES if (inner := ours(target)) and inner in NAMES}
    assert cycles(inside) == []
    units = {(a.split(".")[0], b.split(".")[0]) for a, b in inside}
    assert cycles({(a, b) for a, b in units if a != b and a not in WIRING}) == []


def test_cycles_are_seen():
    assert cycles([("a", "b"), ("b", "c"), ("c", "a"), ("d", "a")]) == [["a", "b", "c"]]
    assert cycles([("a", "b"), ("b", "c"), ("a", "c")]) == []


def test_few_modules_at_the_root_and_none_too_long():
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_ROOT
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules()}
    assert {name: n for name, n in lines.items() if n > LONGEST} == {}


def test_hidden_imports_are_seen():
    """The scan itself: conditional, nested, relative and aliased imports are all edges."""
    source = (
        "import xtoken_jax.losses.math.chunks as c\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from xtoken_jax.train import loop\n"
        "def f():\n    from xtoken_jax import losses\n"
        "    from ..models import load\n    from . import files\n"
    )
    found = set(imports(ast.parse(source), "projection.build", False))
    assert found == {
        "xtoken_jax.losses.math.chunks",
        "typing",
        "xtoken_jax.train.loop",
        "xtoken_jax.losses",
        "xtoken_jax.models.load",
        "xtoken_jax.projection.files",
    }


HEAVY = [
    "flax", "optax", "orbax", "transformers", "grain", "hydra", "omegaconf", "matplotlib", "tokenizers",
    "safetensors", "huggingface_hub", "torch", "tensorflow", "pyarrow", "datasets",
    "tensorflow_datasets", "array_record", "rich",
]  # fmt: skip


@pytest.mark.parametrize(
    ("statement", "barred"),
    [
        ("import xtoken_jax", [*HEAVY, "jax", "numpy"]),
        ("import xtoken_jax.losses", HEAVY),
        ("import xtoken_jax; xtoken_jax.losses; xtoken_jax.Partition; xtoken_jax.Alignment", HEAVY),
        ("import xtoken_jax.cli.parser", [*HEAVY[:-1], "jax"]),
        ("import xtoken_jax.data.sources", [*HEAVY, "jax"]),
    ],
)
def test_importing_is_light(statement, barred):
    code = f"{statement}\nimport sys\nprint([m for m in {barred} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_the_stops_of_a_batch_exist():
    """docs/architecture.md names a file and a function or class for each stop."""
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    stops = re.findall(r"`([\w/]+\.py):([\w.]+)`", text)
    numbered = re.findall(r"^\| (\d+) \| `[\w/]+\.py:", text, re.MULTILINE)
    assert [int(n) for n in numbered] == list(range(1, len(numbered) + 1))
    assert 15 <= len(numbered) <= 25
    for file, name in stops:
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        for part in name.split("."):
            inside = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
            assert part in inside, f"{file} has no {name}"
            tree = inside[part]


def test_the_layers_of_the_documentation_are_those_of_the_table():
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| ((?:`\w+` ?)+)\|$", text, re.MULTILINE)
    layer = {name: n for n, row in enumerate(rows) for name in re.findall(r"`(\w+)`", row)}
    units = {name.split(".")[0] for name in NAMES} - {"__init__", "__main__", "_moved"}
    assert set(layer) == units
    for name, target in EDGES:
        unit, inner = name.split(".")[0], (ours(target) or "").split(".")[0]
        if unit in layer and inner in layer and unit != inner and inner not in COMMON:
            assert layer[inner] < layer[unit], f"{name} imports {target}"
