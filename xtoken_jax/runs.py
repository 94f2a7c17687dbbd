"""A run's folder: whose it is, and what can be taken out of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import jax
from omegaconf import OmegaConf

from xtoken_jax.config import Experiment
from xtoken_jax.errors import UserError
from xtoken_jax.export import SOURCE, export_hf
from xtoken_jax.hub import resolve_folder
from xtoken_jax.mesh import single_device_mesh
from xtoken_jax.models.config import read_config
from xtoken_jax.models.decoder import Model
from xtoken_jax.models.hf_saving import MAX_SHARD_SIZE
from xtoken_jax.models.load import open_model
from xtoken_jax.models.lora import join_lora, split_lora
from xtoken_jax.train.checkpoint import Checkpoints
from xtoken_jax.train.loop import CHECKPOINT_FOLDER
from xtoken_jax.train.optimizer import make_optimizer
from xtoken_jax.train.step import abstract_state

RUN_FILE = "run.json"


def claim(run: Path, experiment: Experiment) -> None:
    """Make the run's folder, or accept the one there if it holds this very experiment.

    Raises:
        UserError: it holds something else (the keys that differ are named), or cannot be written.
    """
    mine = experiment.to_dict()
    mine.pop("run_dir")
    path = run / RUN_FILE
    if path.is_file():
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not readable ({error}); choose another run_dir=...") from error
        different = _differences(theirs, mine)
        if different:
            raise UserError(
                f"{run}: holds another run ({'; '.join(different[:3])}); choose another run_dir=... "
                "or delete that folder"
            )
        return
    try:
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise UserError(f"{run}: exists and is not a run's folder; choose another run_dir=...")
        run.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(mine, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error.strerror}); choose another run_dir=...") from error


def _differences(theirs: Any, mine: Any, key: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        names = [*theirs, *(n for n in mine if n not in theirs)]
        inner = [_differences(theirs.get(n), mine.get(n), f"{key}.{n}" if key else n) for n in names]
        return [line for part in inner for line in part]
    return [] if theirs == mine else [f"{key}={theirs} there, {mine} here"]


def export_checkpoint(
    run: Path,
    step: int | None,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> int:
    """Write the student of a run's checkpoint as a Hugging Face folder.

    Args:
        run: the run's folder.
        step: which checkpoint; None for the newest.
        out: the folder to write.
        dtype: of the stored weights, as `export_hf` takes it; None for the run's export_dtype.
        max_shard_size: bytes of weights in a file, a number or such as "5GB".

    Returns:
        The step that was written.

    Raises:
        UserError: no run there, no such checkpoint, or a folder that cannot be written.
    """
    path = run / RUN_FILE
    if not path.is_file():
        raise UserError(f"{run}: not a run's folder, it has no {RUN_FILE}")
    typed = OmegaConf.merge(OmegaConf.structured(Experiment), json.loads(path.read_text()))
    experiment = cast(Experiment, OmegaConf.to_object(typed))
    dtype = experiment.export_dtype.value if dtype is None else dtype
    folder = resolve_folder(str(experiment.student.path), weights=dtype == SOURCE)
    mesh = single_device_mesh()
    student, frozen = Model(read_config(folder)), {}
    if experiment.student.lora.rank:  # the checkpoint holds the adapters alone
        student, params = open_model(experiment.student, 0, mesh=mesh, key=jax.random.key(0))
        frozen = split_lora(params)[1]
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    keep = experiment.train.keep
    with Checkpoints(run / CHECKPOINT_FOLDER, keep=keep, frozen=frozen) as checkpoints:
        found = checkpoints.latest if step is None else step
        if found is None:
            raise UserError(f"{run}: holds no checkpoint yet")
        state, _ = checkpoints.restore(found, abstract_state(student, optimizer, mesh))
    params = join_lora(state.params, frozen)
    export_hf(out, student, params, folder, dtype=dtype, max_shard_size=max_shard_size, donate=True)
    return found
