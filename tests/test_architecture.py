"""Who may import whom. A new edge fails here: either it is wrong, or the table says why it is not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "xtoken_jax"

# Everything may import these: `hub` turns a name into a folder, `foreign` names folders of other formats,
# `errors` holds the error that a user sees, `files` writes files whole and reads JSON, `fields` checks types
# and ranges of values.
COMMON = {"errors", "fields", "files", "foreign", "hub"}

# Module or package -> what it may import besides COMMON and, for a package, itself. A name with a
# dot is one module, which has a rule of its own. In the order data flows: nobody imports from below.
ALLOWED = {
    "errors": set(),
    "fields": set(),
    "files": set(),
    "foreign": set(),
    "hub": set(),
    "checksum": set(),
    "resume": set(),
    "command_line": set(),
    "ranking": set(),
    "tokens": set(),
    "mesh": set(),
    "lifeline": set(),
    "hosts": {"lifeline"},
    "alignment.batch": set(),
    "alignment": {"tokens"},
    # As the losses, these five need jax alone.
    "projection.readable": set(),
    "projection.partition": {"projection.readable"},
    "projection.matrix": {"projection.partition", "projection.readable"},
    "projection.events": {"projection.readable"},
    "projection.sharded": {"projection.matrix"},
    "projection": {"tokens"},
    # What tokens stand for, and rows of W as text.
    "coverage": {"tokens", "projection"},
    # What a person looks at.
    "display": {"tokens", "alignment", "projection", "coverage"},
    "data": {"tokens", "alignment"},
    "models": {"mesh"},
    # It compares the tokenizer's size with the model's vocabulary.
    "models.load": {"models", "mesh", "tokens.tokenizer"},
    "losses": {
        "mesh", "alignment.batch", "projection.matrix", "projection.events", "projection.sharded",
        "projection.readable",
    },
    # Where W trains, it is part of the state.
    "train": {
        "models", "losses", "data", "alignment.batch", "mesh", "hosts", "checksum", "projection.matrix",
    },
    "evaluate": {"models", "losses", "data", "alignment", "tokens", "mesh"},
    "export": {"models", "tokens", "mesh", "hosts"},
    # It reads what the loop writes.
    "report": {"train.metrics", "ranking"},
    # The experiment's schema is made of each part's own config.
    "config": {
        "command_line.groups", "command_line.words", "data.config", "data.sources", "hosts", "losses", "mesh",
        "models.load", "ranking", "resume", "train.loop", "train.optimizer",
    },
}  # fmt: skip
# These may import anything.
WIRING = {
    "__init__", "__main__", "cache_contents", "cache_run", "cache_teacher", "cli", "cli_cache", "cli_copies",
    "cli_generate", "cli_tokenizers", "distill", "held_out", "runs", "sweep", "teachers",
}  # fmt: skip

# Anyone's code can use these with nothing but jax.
JAX_ONLY = (
    "losses", "alignment.batch", "projection.matrix", "projection.events", "projection.partition",
    "projection.readable",
)  # fmt: skip


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
        allowed = ALLOWED[rule] | COMMON | ({rule} if "." not in rule else set())
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
        assert not (
            (within(name, "evaluate") or within(name, "export")) and within(inner, "train.loop")
        ), (name, target)  # fmt: skip


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
