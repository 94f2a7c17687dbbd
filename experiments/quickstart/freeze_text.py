"""Writes the English that the package ships: the topics of Python's `help()` and its library's docstrings.

    python3.11 experiments/quickstart/freeze_text.py --out DIR

The texts come from the Python that runs this script and differ between releases. The package has those of
3.11.7, which the quickstart's tokenizers and models were trained on. The script needs nothing but the
standard library.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import json
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
    """Name -> text of every topic of `help()`."""
    from pydoc_data.topics import topics

    return dict(topics)


def docstrings(stdlib: Path) -> dict[str, str]:
    """Module -> its docstrings. Source files are parsed, never imported.

    Args:
        stdlib: the folder of the standard library.
    """
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
        if text := "\n\n".join(_docstrings(tree)):
            texts[module.as_posix()] = text
    return texts


def _docstrings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _SHORTEST:
                yield text


def write(texts: Mapping[str, str], path: Path) -> None:
    """Write a gzipped JSON object without a date, so the same texts give the same bytes."""
    content = json.dumps(texts, ensure_ascii=False, indent=0).encode()
    path.write_bytes(gzip.compress(content, compresslevel=9, mtime=0))
    print(f"{path}: {len(texts)} texts, {path.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write(topics(), out / "topics.json.gz")
    write(docstrings(Path(sysconfig.get_paths()["stdlib"])), out / "docstrings.json.gz")


if __name__ == "__main__":
    main()
