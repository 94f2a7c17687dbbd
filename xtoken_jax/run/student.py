"""A run's student, also of an earlier checkpoint, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import jax

from xtoken_jax.distributed.mesh import single_device_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.hub import resolve_folder
from xtoken_jax.models.config import read_config
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.hf.export import SOURCE, check_replaceable, export_hf
from xtoken_jax.models.hf.saving import MAX_SHARD_SIZE
from xtoken_jax.models.hf.side_files import side_files
from xtoken_jax.models.load import open_model
from xtoken_jax.models.lora import join_lora, split_lora
from xtoken_jax.run.experiment import Experiment
from xtoken_jax.run.run_file import TEMPLATE, read_run
from xtoken_jax.tokens.backend import make_backend, read_definition
from xtoken_jax.train.checkpoint import Checkpoints
from xtoken_jax.train.loop import CHECKPOINT_FOLDER
from xtoken_jax.train.optimizer import make_optimizer
from xtoken_jax.train.step import abstract_state
from xtoken_jax.train.trained_projection import abstract_learnt, make_projection_optimizer


def folders_to_keep(run: Path, experiment: Experiment) -> list[Path]:
    """Folders that no export of the run may replace: its own, its teachers' and their caches."""
    teachers = experiment.every_teacher().values()
    paths = [path for teacher in teachers for path in (teacher.path, teacher.cache) if path is not None]
    return [run, *(place for path in paths if (place := Path(path).expanduser()).is_dir())]


def export_student(
    run: Path,
    out: Path,
    student: Model,
    params: Params,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> str | None:
    """Write a run's student as a Hugging Face folder, in the memory of `params`.

    Args:
        run: the run's folder.
        out: the folder to write.
        student, params: the model; of several processes, all must call this.
        dtype, max_shard_size, overwrite: as in `export_hf`; None for the run's export_dtype.

    Returns:
        A line about the tokens that were added to `eos_token_id`; None where none was.

    Raises:
        UserError: what `export_hf` refuses.
    """
    begun = read_run(run)
    config = begun.experiment.student
    dtype = begun.experiment.export_dtype.value if dtype is None else dtype
    folder = resolve_folder(str(config.path), weights=dtype == SOURCE)
    template = _template(run, begun.experiment)
    export_hf(
        out, student, params, folder,
        dtype=dtype, max_shard_size=max_shard_size, donate=True, chat_template=template,
        ends=begun.ends, run=begun.identity, overwrite=overwrite,
        keep=folders_to_keep(run, begun.experiment),
    )  # fmt: skip
    _, added = side_files(folder, student.config.to_hf(), begun.ends, template)
    if not added:
        return None
    path = folder / "tokenizer.json"
    spelled = make_backend(read_definition(path)[0], path)
    names = ", ".join(f"{spelled.id_to_token(end)} ({end})" for end in added)
    return f"{names} ends what the student learnt to write; added to eos_token_id of the exported folder"


def _template(run: Path, experiment: Experiment) -> str | None:
    """The chat template to export, copied into the run's folder at its start; None for the student's own."""
    if experiment.student.chat_template is None:
        return None
    path = run / TEMPLATE
    if not path.is_file():
        raise UserError(
            f"{run}: has no {TEMPLATE}, the copy of {experiment.student.chat_template} that training makes; "
            "give the command that trained it again"
        )
    return str(path)


def export_checkpoint(
    run: Path,
    step: int | None,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> tuple[int, str | None]:
    """Write the student of a run's checkpoint as a Hugging Face folder.

    Args:
        run: the run's folder.
        step: which checkpoint; None for the newest.
        out: the folder to write.
        dtype: of the stored weights, as `export_hf` takes it; None for the run's export_dtype.
        max_shard_size: bytes of weights in a file, a number or such as "5GB".
        overwrite: also replace a folder that is not an earlier export of this run.

    Returns:
        The step that was written, and the line that `export_student` returns.

    Raises:
        UserError: no run there, no such checkpoint, or a folder that cannot be written.
    """
    begun = read_run(run)
    experiment = begun.experiment
    folder = resolve_folder(str(experiment.student.path), weights=dtype == SOURCE)
    _template(run, experiment)
    keep = folders_to_keep(run, experiment)
    check_replaceable(out, folder, run=begun.identity, overwrite=overwrite, keep=keep)
    mesh = single_device_mesh()
    student, frozen = Model(read_config(folder)), {}
    if experiment.student.lora.rank:  # the checkpoint holds the adapters alone
        student, params = open_model(experiment.student, 0, mesh=mesh, key=jax.random.key(0))
        frozen = split_lora(params)[1]
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    if not (run / CHECKPOINT_FOLDER).is_dir():
        raise UserError(f"{run}: holds no checkpoint yet")
    with Checkpoints(run / CHECKPOINT_FOLDER, frozen=frozen, read_only=True) as checkpoints:
        found = checkpoints.latest if step is None else step
        if found is None:
            raise UserError(f"{run}: holds no checkpoint yet")
        of_projections = make_projection_optimizer(experiment.optimizer)
        learnt = abstract_learnt(checkpoints.projection_shapes(found), of_projections, mesh)
        state, _ = checkpoints.restore(found, abstract_state(student, optimizer, mesh, learnt))
    params = join_lora(state.params, frozen)
    added = export_student(
        run, out, student, params, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite
    )
    return found, added
