"""A trained student as a Hugging Face folder that `transformers` and every other runtime loads."""

import ctypes
import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from xtoken_jax.distributed.processes import from_first, is_first
from xtoken_jax.errors import UserError
from xtoken_jax.files import read_json, to_disk, write_whole, writing
from xtoken_jax.files.new_files import hidden, new_folder, remove_partials
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.hf.files import INDEX, WEIGHTS
from xtoken_jax.models.hf.saving import MAX_SHARD_SIZE, is_weights, save_weights, stored_dtypes
from xtoken_jax.models.hf.side_files import COPIED, refuse_links, side_files
from xtoken_jax.models.lora import merge_lora

CONFIG = "config.json"
MARKER = "xtoken.json"  # names the run that a folder was exported from
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
    ends: Sequence[int] = (),
    run: str | None = None,
    overwrite: bool = False,
    keep: Sequence[str | Path] = (),
) -> Path:
    """Writes config.json, safetensors and the student's tokenizer files; returns `out_dir`.

    Everything is written to a hidden folder beside `out_dir`, which then takes its place: a killed export
    leaves what was there or the new folder, whole. config.json has the values of the one that the model was
    read from, except for the dtype and `eos_token_id`.

    Args:
        out_dir: a new or empty folder, or an earlier export of the same run.
        params: the model's parameters; of several processes, all must call this, and process 0 writes.
            Adapters are merged into their kernels.
        tokenizer_folder: the student's folder; files of its tokenizer, its chat template and
            generation_config.json are copied where present.
        dtype: of the stored weights: "float32", "bfloat16" or "float16"; or "source", by which each tensor
            has the dtype that it has in `tokenizer_folder`, so that a model that was not trained is written
            as it was read. (Training runs in float32: for a trained student this rounds.)
        max_shard_size: bytes of weights in a file, a number or such as "5GB"; see `save_weights`.
        donate: merge adapters in the memory of `params`, which cannot be used afterwards.
        chat_template: a Jinja file in place of the folder's template.
        ends: ids of the tokens that the model was trained to end a text or a turn with; they are added to
            `eos_token_id` in config.json and generation_config.json.
        run: identity of the run, stored in the folder. None stands for the student's folder.
        overwrite: also replace a folder that is not an earlier export of the same run.
        keep: further folders that must not be replaced, nor a folder around them, such as the teacher's.

    Raises:
        UserError: a folder in the way that is not an earlier export of this run, no tokenizer folder, no
            weights there for "source", no room or permission to write, or what `save_weights` refuses.
    """
    out, source = Path(out_dir).resolve(), Path(tokenizer_folder)
    if not source.is_dir():
        raise UserError(f"no such tokenizer folder: {source}")
    dtypes: str | Mapping[str, str] = dtype
    if dtype == SOURCE:
        dtypes = stored_dtypes(source, dataclasses.replace(model, lora=None))

    config = model.config.to_hf()
    identity = {"run": run} if run is not None else {"student": str(source.resolve())}

    def begin() -> None:
        check_replaceable(out, source, run=run, overwrite=overwrite, keep=keep)
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            remove_partials(out.parent, lambda name: name == out.name)  # of exports that were killed

    from_first(begin)
    if model.lora is not None:
        # not through bfloat16, where the file could hold more
        wide = None if dtype == "bfloat16" else "float32"
        model, params = merge_lora(model, params, dtype=wide, donate=donate)

    def write() -> None:
        files, _ = side_files(source, config, ends, chat_template)
        files[MARKER] = (json.dumps({"exported_by": "xtoken", **identity}) + "\n").encode()
        if dtype != SOURCE:
            # in the spelling that it has: two of them might disagree
            spellings = [key for key in ("dtype", "torch_dtype") if key in config]
            config.update(dict.fromkeys(spellings or ["torch_dtype"], dtype))
        files[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
        with writing(out), new_folder(out) as partial:
            save_weights(partial, model, params, dtype=dtypes, max_shard_size=max_shard_size)
            for name, content in files.items():
                write_whole(partial / name, content)
            to_disk(partial)
            _swap_in(partial, out)

    if not is_first():
        save_weights(out, model, params, dtype=dtypes, max_shard_size=max_shard_size, writes=False)
    from_first(write)
    return Path(out_dir)


def check_replaceable(
    out_dir: str | Path,
    source: Path,
    *,
    run: str | None = None,
    overwrite: bool = False,
    keep: Sequence[str | Path] = (),
) -> None:
    """Check that an export may take the place of what is at `out_dir`; the arguments are `export_hf`'s.

    Raises:
        UserError: a file of the student's folder is a link to one outside; or at `out_dir` is a file, a
            folder that must be kept, or one that is not an earlier export of the same run and `overwrite` is
            false.
    """
    refuse_links(source)
    out = Path(out_dir).resolve()
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"cannot export to {out}: it is a file; name a new folder")
    if out == source.resolve():
        raise UserError(f"cannot export to {out}: it is the student's own folder; name a new folder")
    for path in (source, *keep, Path.cwd(), Path.home()):
        place = Path(path).expanduser().resolve()
        if place.is_relative_to(out):
            what = "it is" if place == out else "it is around"
            raise UserError(f"cannot export to {out}: {what} {path}, which must be kept; name a new folder")
    names = {path.name for path in out.iterdir()}
    if not names or overwrite:
        return
    if (reason := _foreign(out, names, source, run)) is not None:
        raise UserError(
            f"cannot export to {out}: {reason}; name a new folder, or replace it with --overwrite"
        )


def _foreign(out: Path, names: set[str], source: Path, run: str | None) -> str | None:
    """Why a folder of these files is not an earlier export of the same run; None where it is one."""
    others = sorted(name for name in names - {CONFIG, MARKER, *COPIED} if not is_weights(name))
    if others:
        return f"it holds {others[0]}, which is not part of an export"
    if not (CONFIG in names and names & {WEIGHTS, INDEX}):
        return "it is not empty and not an earlier export"
    try:
        marker = read_json(out / MARKER, what="the mark of an export")
    except UserError:
        return "it holds a model that this run did not export"
    key, value = ("run", run) if run is not None else ("student", str(source.resolve()))
    return None if marker.get(key) == value else "it holds the export of another run"


def _swap_in(partial: Path, out: Path) -> None:
    """Put the new folder into its place; an earlier export ends up at `partial`, or is gone."""
    if not out.exists():
        os.rename(partial, out)
    elif not _exchange(partial, out):
        # a kill between these two leaves the earlier export whole, beside its place, until the next one
        os.rename(out, hidden(out, "old"))
        os.rename(partial, out)
    to_disk(out.parent)
    remove_partials(out.parent, lambda name: name == out.name, "old")


def _exchange(a: Path, b: Path) -> bool:
    """Let two folders trade names in one step; False where the system or the disk cannot."""
    try:
        libc = ctypes.CDLL(None)
        if sys.platform == "darwin":
            return bool(libc.renamex_np(os.fsencode(a), os.fsencode(b), 2) == 0)  # RENAME_SWAP
        here = -100  # AT_FDCWD
        return bool(libc.renameat2(here, os.fsencode(a), here, os.fsencode(b), 2) == 0)  # RENAME_EXCHANGE
    except (AttributeError, TypeError):  # a C library without it
        return False
