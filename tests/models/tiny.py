"""The tiny Llamas of tests/fixtures, and copies of them to spoil."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

DATA = Path(__file__).parents[1] / "fixtures" / "tiny_llama"
NAMES = ("tied", "untied", "llama3")


def copy(name: str, folder: Path, **settings) -> Path:
    """A copy of a tiny Llama with some config.json keys changed; a value of ... removes the key."""
    shutil.copytree(DATA / name, folder)
    config = {**json.loads((folder / "config.json").read_text()), **settings}
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors(name_or_folder: str | Path) -> dict[str, np.ndarray]:
    return load_file(DATA / name_or_folder / "model.safetensors")


def replace_tensors(folder: Path, change) -> None:
    """Rewrites a folder's weights with `change(tensors) -> tensors`."""
    save_file(change(tensors(folder)), folder / "model.safetensors", metadata={"format": "pt"})
