"""A trained student as a Hugging Face folder that `transformers` and every other runtime loads."""

import ctypes
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from xtoken_jax.errors import UserError
from xtoken_jax.files import to_disk, writing
from xtoken_jax.hosts import from_first, is_first
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.hf_files import INDEX, WEIGHTS
from xtoken_jax.models.hf_saving import MAX_SHARD_SIZE, is_weights, save_weights, stored_dtypes
from xtoken_jax.models.lora import merge_lora

CONFIG = "config.json"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)
SOURCE = "source"


def export_hf(
    out_dir: str | Path,
    model: Model,
    params: Params,
    tokenizer_folder: str | Path,
    *,
    dtype: str = "float32",
    max_shard_size: int | str = MAX_SHARD_SIZE,
    donate: bool = False,
    chat_template: str | None = None,
) -> Path:
    """Writes config.json, safetensors and the student's tokenizer files; returns `out_dir`.

    Everything is written to a hidden folder beside `out_dir`, which then takes its place: a killed export
    leaves what was there or the new folder, whole. config.json has the values of the one that the model was
    read from, but for the dtype.

    Args:
        out_dir: a new or empty folder, or an earlier export.
        params: the model's parameters; of several processes, all must call this, and process 0 writes.
            Adapters are merged into their kernels.
        tokenizer_folder: the student's folder; tokenizer.json, tokenizer_config.json,
            special_tokens_map.json, generation_config.json and chat_template.jinja are copied where present.
        dtype: of the stored weights: "float32", "bfloat16" or "float16"; or "source", by which each tensor
            has the dtype that it has in `tokenizer_folder`, so that a model that was not trained is written
            as it was read. (Training runs in float32: for a trained student this rounds.)
        max_shard_size: bytes of weights in a file, a number or such as "5GB"; see `save_weights`.
        donate: merge adapters in the memory of `params`, which cannot be used afterwards.
        chat_template: a Jinja file in place of the folder's template.

    Raises:
        UserError: a folder in the way that is not an export, no tokenizer folder, no weights there for
            "source", no room or permission to write, or what `save_weights` refuses.
    """
    out, source = Path(out_dir).resolve(), Path(tokenizer_folder)
    if not source.is_dir():
        raise UserError(f"no such tokenizer folder: {source}")
    dtypes: str | Mapping[str, str] = dtype
    if dtype == SOURCE:
        dtypes = stored_dtypes(source, dataclasses.replace(model, lora=None))
    partial = out.parent / f".{out.name}.partial"

    def begin() -> None:
        with writing(out):
            _make_way(out, source, partial)

    from_first(begin)
    if model.lora is not None:
        # not through bfloat16, where the file could hold more
        wide = None if dtype == "bfloat16" else "float32"
        model, params = merge_lora(model, params, dtype=wide, donate=donate)

    def write() -> None:
        copied = {name: (source / name).read_bytes() for name in COPIED if (source / name).is_file()}
        if chat_template is not None:
            copied["chat_template.jinja"] = Path(chat_template).expanduser().read_bytes()
        with writing(out):
            write_beside(copied)

    def write_beside(copied: dict[str, bytes]) -> None:
        save_weights(partial, model, params, dtype=dtypes, max_shard_size=max_shard_size)
        config = model.config.to_hf()
        if dtype != SOURCE:
            # in the spelling that it has: two of them might disagree
            spellings = [key for key in ("dtype", "torch_dtype") if key in config]
            config |= dict.fromkeys(spellings or ["torch_dtype"], dtype)
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name, content in copied.items():
            (partial / name).write_bytes(content)
        for path in [*partial.iterdir(), partial]:
            to_disk(path)
        _swap_in(partial, out)

    if not is_first():
        save_weights(partial, model, params, dtype=dtypes, max_shard_size=max_shard_size, writes=False)
    try:
        from_first(write)
    finally:
        if is_first():
            shutil.rmtree(partial, ignore_errors=True)
    return Path(out_dir)


def _make_way(out: Path, source: Path, partial: Path) -> None:
    _check_replaceable(out, source)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed


def _check_replaceable(out: Path, source: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"cannot export to {out}: it is a file")
    if out.samefile(source):
        raise UserError(f"cannot export to {out}: it is the student's own folder")
    names = {path.name for path in out.iterdir()}
    others = sorted(name for name in names - {CONFIG, *COPIED} if not is_weights(name))
    if others:
        raise UserError(f"cannot export to {out}: it holds {others[0]}, which is not part of an export")
    if names and not (CONFIG in names and names & {WEIGHTS, INDEX}):
        raise UserError(f"cannot export to {out}: it is not empty and not an earlier export")


def _swap_in(partial: Path, out: Path) -> None:
    """Put the new folder into its place; an earlier export ends up at `partial`, or is gone."""
    old = out.parent / f".{out.name}.old"
    if not out.exists():
        os.rename(partial, out)
    elif not _exchange(partial, out):
        # a kill between these two leaves the earlier export whole, beside its place, until the next one
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
        os.rename(partial, out)
    to_disk(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders trade names in one step; False where the system or the disk cannot."""
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(libc.renamex_np(os.fsencode(a), os.fsencode(b), 2) == 0)  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return bool(libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), 2) == 0)  # RENAME_EXCHANGE
    except (AttributeError, TypeError):  # a C library without it, and Windows
        return False
