"""Real English that every Python carries: the topics of `help()` and the library's docstrings."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

_SHORTEST = 80  # characters; shorter docstrings are labels more than sentences
_SKIPPED = {
    "dist-packages", "encodings", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip


def topics() -> dict[str, str]:
    """Name -> text of every topic of `help()`, about 460 kB."""
    from pydoc_data.topics import topics

    return dict(topics)


def docstrings(stdlib: Path | None = None) -> dict[str, str]:
    """Module -> its docstrings, of the standard library; source files are parsed, never imported.

    Args:
        stdlib: the library's folder; by default that of the running Python.
    """
    stdlib = stdlib or Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(stdlib.rglob("*.py")):
        module = path.relative_to(stdlib).with_suffix("")
        if _SKIPPED & set(module.parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in someone else's source
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # templates that only look like modules
        if found := "\n\n".join(_docstrings(tree)):
            texts[module.as_posix()] = found
    return texts


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                yield text


def split_of(works: Mapping[str, str], split: str) -> list[str]:
    """The texts of one split, in an order unrelated to the names; every tenth is for validation.

    Two names can share a text; it is not trained on if either is held out.
    """
    names = sorted(works, key=lambda name: hashlib.sha256(name.encode()).digest())
    held_out = [works[name] for name in names[::10]]
    if split == "validation":
        return held_out
    return [works[name] for name in names if works[name] not in held_out]
