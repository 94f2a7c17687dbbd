"""Folders and files in other formats than that of a Hugging Face model: what they are, and what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from xtoken_jax.errors import UserError
from xtoken_jax.files import read_json
from xtoken_jax.files.fields import shown

_SAVED = "save it with AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
_ORIGINAL = "use the checkpoint in the format of transformers that it was made from"


def foreign_format(path: Path, *, weights: bool = True) -> str | None:
    """Return what a file or folder is and what to do with it; None where it may be a model's folder.

    Args:
        path: what a user named as a model.
        weights: also tell formats apart by the files of weights, if there are no safetensors.
    """
    if path.is_file():
        return next((text for suffixes, text in _FILES if path.name.lower().endswith(suffixes)), None)
    with contextlib.suppress(OSError):
        return next(_formats(path), None) or (next(_formats_of_weights(path), None) if weights else None)
    return None


_FILES = (
    ((".gguf", ".ggml"), f"a GGUF file of llama.cpp; {_ORIGINAL}"),
    ((".onnx",), f"an ONNX file; {_ORIGINAL}"),
    ((".safetensors",), "a file of weights; name its folder, which also holds config.json and the tokenizer"),
    ((".bin", ".pt", ".pth", ".ckpt"), f"pickled weights, which are never opened; {_SAVED}"),
    ((".npz",), f"weights of MLX; {_ORIGINAL}"),
    ((".json",), "a file of a model; name its folder"),
)


def _formats(folder: Path) -> Iterator[str]:
    if (folder / "adapter_config.json").is_file():
        base = ""
        with contextlib.suppress(UserError):
            named = read_json(folder / "adapter_config.json", what="an adapter").get(
                "base_model_name_or_path"
            )
            base = f" of {shown(named)}" if isinstance(named, str) and named else ""
        yield (
            f"a PEFT adapter{base}, not a whole model; merge it first: AutoPeftModelForCausalLM"
            ".from_pretrained(folder).merge_and_unload().save_pretrained(merged), with the tokenizer"
        )
    if (folder / "model_index.json").is_file():
        yield "a diffusers pipeline, which makes pictures; name a language model's folder"
    if (folder / "modules.json").is_file() or (folder / "config_sentence_transformers.json").is_file():
        yield "a sentence-transformers model, which makes embeddings; name a language model's folder"
    if (folder / "run.json").is_file() and not (folder / "config.json").is_file():
        yield f"the folder of a run; its model is in {folder / 'student'}"


def _formats_of_weights(folder: Path) -> Iterator[str]:
    def has(*patterns: str) -> bool:
        return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))

    if has("model*.safetensors", "model.safetensors.index.json"):
        return
    if has("weights*.npz"):
        yield f"a model of MLX; {_ORIGINAL}"
    if has("*.gguf"):
        yield f"a folder of GGUF files of llama.cpp; {_ORIGINAL}"
    if has("*.onnx", "onnx/*.onnx"):
        yield f"an ONNX model; {_ORIGINAL}"
    if has("pytorch_model*.bin", "consolidated*.pth", "*.pt", "*.ckpt"):
        yield f"a model with only pickled weights, which are never opened; {_SAVED}"
    if has("tf_model*.h5", "saved_model.pb", "flax_model*.msgpack"):
        yield f"a model with weights for TensorFlow or Flax only; {_SAVED}"
