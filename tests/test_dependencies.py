"""pyproject.toml declares every package that xtoken_jax imports."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOADERS = {"import_module", "find_spec"}


def declared(requirements):
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in requirements}


BASE = declared(PROJECT["dependencies"])
EXTRAS = BASE | declared(line for lines in PROJECT["optional-dependencies"].values() for line in lines)


def imported(node):
    """Names that one statement or call imports; the fixed beginning of one that is put together."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [node.module]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS:
        name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
        return [name.value] if isinstance(name, ast.Constant) else []
    return []


def at_import(tree):
    """Nodes that run when the module is imported: all outside of functions and `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        checks = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        if not checks and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import(node)


def undeclared(source, distributions, provided):
    """Imports of `source` that no declared distribution provides, as "name" or "name, when imported"."""
    tree = ast.parse(source)
    found = {}
    for nodes, allowed, what in ((at_import(tree), BASE, "at import"), (ast.walk(tree), EXTRAS, "at all")):
        for node in nodes:
            for name in imported(node):
                top = name.split(".")[0]
                if top in sys.stdlib_module_names or top in provided:
                    continue
                owners = {d.lower().replace("_", "-") for d in distributions.get(top, [top])}
                if not owners & allowed:
                    found[top] = what
    return found


def test_every_import_is_declared():
    distributions = importlib.metadata.packages_distributions()
    missing = {}
    for path in sorted((ROOT / "xtoken_jax").rglob("*.py")):
        for name, what in undeclared(path.read_text(), distributions, {"xtoken_jax"}).items():
            missing[f"{path.relative_to(ROOT)}: {name}"] = what
    assert missing == {}


def test_undeclared_imports_are_seen():
    source = """
import json, sparse_things.graph
import numpy as np
if TYPE_CHECKING:
    import pyarrow
try:
    from zstandard import decompress
except ImportError:
    pass
def read(name):
    import pyarrow
    importlib.import_module(f"other_package.{name}")
    importlib.util.find_spec(name)
"""
    assert undeclared(source, {"sparse_things": ["Sparse_Things"]}, set()) == {
        "sparse_things": "at all",
        "zstandard": "at import",
        "other_package": "at all",
    }
