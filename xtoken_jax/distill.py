"""The whole line, from an Experiment to a distilled student and its figures."""

from __future__ import annotations

import json
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from omegaconf import OmegaConf
from rich.console import Console

from xtoken_jax.coverage import audit
from xtoken_jax.config import Experiment
from xtoken_jax.data import arithmetic
from xtoken_jax.data.batches import read_windows, training_batches
from xtoken_jax.data.sources import SourceKind
from xtoken_jax.errors import UserError
from xtoken_jax.evaluate.accuracy import exact_match
from xtoken_jax.evaluate.bits_per_byte import bits_per_byte
from xtoken_jax.export import export_hf
from xtoken_jax.hub import resolve_folder
from xtoken_jax.losses import LossKind, loss_tables
from xtoken_jax.losses.objective import LossTables
from xtoken_jax.mesh import make_mesh, replicated, single_device_mesh
from xtoken_jax.models.config import read_config
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.load import open_model
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.files import load_projection
from xtoken_jax.report import BASELINE_FOLDER, draw_curves
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair
from xtoken_jax.train.checkpoint import Checkpoints
from xtoken_jax.train.loop import CHECKPOINT_FOLDER, METRICS_FILE, train
from xtoken_jax.train.optimizer import make_optimizer
from xtoken_jax.train.step import abstract_state, init_state, make_step

RUN_FILE = "run.json"
STUDENT_FOLDER = "student"
_PROMPTS_AT_ONCE = 256

Figures = dict[str, float]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        loss: the kind that was used, and `reason`, why.
        figures: row of the final table -> held-out figures.
        student, metrics, picture: what was written.
        seconds: since the start.
    """

    loss: str
    reason: str
    figures: dict[str, Figures]
    student: Path
    metrics: Path
    picture: Path
    seconds: float


def distill(experiment: Experiment, console: Console) -> Result:
    """Run an experiment to its end, or go on with it where its folder holds a part of it.

    Raises:
        UserError: whatever is wrong with what the experiment names.
    """
    started = time.perf_counter()
    run = Path(experiment.run_dir).expanduser()
    mesh = make_mesh(experiment.mesh)
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    if experiment.data.batch_size % rows:
        raise UserError(
            f"data.batch_size={experiment.data.batch_size}: not a multiple of the {rows} devices of the "
            "mesh's data and fsdp axes"
        )
    with jax.set_mesh(mesh):
        pair = TokenizerPair.load(str(experiment.student.path), str(experiment.teacher.path))
        key = jax.random.key(experiment.train.seed)
        console.print(f"student  {experiment.student.path}  ({pair.student.size:,} tokens)")
        console.print(f"teacher  {experiment.teacher.path}  ({pair.teacher.size:,} tokens)")
        student, student_params = open_model(experiment.student, pair.student, mesh=mesh, key=key)
        teacher, teacher_params = open_model(experiment.teacher, pair.teacher, mesh=mesh, key=key)
        kind, reason, tables = _choose_loss(experiment, pair)
        console.print(f"loss     {kind.value}: {reason}")
        with console.status("tokenizing and aligning the text"):
            windows = read_windows(pair, experiment.data.train, experiment.data)
            student_figures = _evaluation(experiment, pair, pair.student)
            teacher_figures = _evaluation(experiment, pair, pair.teacher)
        tokens = sum(len(w.student_ids) for part in windows.values() for w in part)
        count = sum(map(len, windows.values()))
        console.print(f"text     {count:,} rows, {tokens:,} student tokens")
        _claim(run, experiment)

        figures = {"teacher": teacher_figures(teacher, teacher_params)}
        figures["student, untouched"] = student_figures(student, student_params)

        def one_run(folder: Path, loss: LossKind, title: str) -> Params:
            optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
            # The step donates its state; the other run needs the same start again.
            start = jax.tree.map(lambda x: x.copy(), student_params)
            with_teacher = loss is not LossKind.none
            step = make_step(
                student,
                teacher if with_teacher else None,
                replace(experiment.loss, kind=loss),
                optimizer,
                student_size=pair.student.size,
            )
            state = train(
                init_state(student, start, optimizer, mesh),
                abstract_state(student, optimizer, mesh),
                jax.jit(step, donate_argnums=0),
                training_batches(pair, windows, experiment.data),
                teacher_params=teacher_params if with_teacher else None,
                tables=jax.device_put(tables, replicated(mesh)) if with_teacher else None,
                evaluate=lambda params: student_figures(student, params),
                config=experiment.train,
                folder=folder,
                mesh=mesh,
                title=title,
                console=console,
            )
            return state.params

        trained = one_run(run, kind, "distilling" if kind is not LossKind.none else "training")
        if experiment.baseline and kind is not LossKind.none:
            plain = one_run(run / BASELINE_FOLDER, LossKind.none, "without a teacher")
            figures["trained without a teacher"] = student_figures(student, plain)
            del plain
        name = "distilled" if kind is not LossKind.none else "trained"
        figures[name] = student_figures(student, trained)
        with console.status("writing the student"):
            out = run / STUDENT_FOLDER
            export_hf(out, student, trained, resolve_folder(str(experiment.student.path)))
            picture = draw_curves(run, {k: {"teacher": v} for k, v in figures["teacher"].items()})
    seconds = time.perf_counter() - started
    result = Result(kind.value, reason, figures, out, run / METRICS_FILE, picture, seconds)
    _write_json(run / "result.json", {"loss": kind.value, "figures": figures})
    return result


def export_checkpoint(run: Path, step: int | None, out: Path) -> int:
    """Write the student of a run's checkpoint as a Hugging Face folder.

    Args:
        run: the run's folder.
        step: which checkpoint; None for the newest.
        out: the folder to write.

    Returns:
        The step that was written.

    Raises:
        UserError: no run there, no such checkpoint, or a folder that cannot be written.
    """
    path = run / RUN_FILE
    if not path.is_file():
        raise UserError(f"{run}: not a run's folder, it has no {RUN_FILE}")
    experiment = typing.cast(
        Experiment,
        OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Experiment), json.loads(path.read_text()))),
    )
    checkpoints = Checkpoints(run / CHECKPOINT_FOLDER, keep=experiment.train.keep)
    found = checkpoints.latest if step is None else step
    if found is None:
        raise UserError(f"{run}: holds no checkpoint yet")
    mesh = single_device_mesh()
    folder = resolve_folder(str(experiment.student.path))
    student = Model(read_config(folder))
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    state, _ = checkpoints.restore(found, abstract_state(student, optimizer, mesh))
    export_hf(out, student, state.params, folder)
    return found


def _choose_loss(experiment: Experiment, pair: TokenizerPair) -> tuple[LossKind, str, LossTables | None]:
    kind = experiment.loss.kind
    if kind is LossKind.none:
        return kind, "next-token cross-entropy alone", None
    if experiment.projection is None:
        projection = build_projection(pair)
    else:
        projection = load_projection(experiment.projection, pair)
    reason = "as configured"
    if kind is LossKind.auto:
        found = audit(pair, projection)
        kind, reason = LossKind(found.recommended_loss), found.reason
    return kind, reason, loss_tables(kind, projection)


def _evaluation(
    experiment: Experiment, pair: TokenizerPair, tokenizer: Tokenizer
) -> Callable[[Model, Params], Figures]:
    """Figures of one side's models on the validation sources: accuracy on sums, else bits per byte."""
    data = experiment.data
    is_student = tokenizer is pair.student
    texts = {n: s for n, s in data.validation.items() if s.kind is not SourceKind.arithmetic}
    rows: dict[str, list[np.ndarray]] = {
        name: [w.student_ids if is_student else w.teacher_ids for w in windows]
        for name, windows in read_windows(pair, texts, data).items()
    }
    problems = {
        name: arithmetic.problems(s.operation, s.documents, largest=s.largest, split=s.split, seed=s.seed)
        for name, s in data.validation.items()
        if s.kind is SourceKind.arithmetic
    }
    length = data.student_length if is_student else data.teacher_length

    def figures(model: Model, params: Params) -> Figures:
        found = {
            f"{name} bits/byte": bits_per_byte(
                model, params, tokenizer, part, batch_size=data.batch_size, length=length
            )
            for name, part in rows.items()
        }
        for name, part in problems.items():
            found[f"{name} accuracy"] = exact_match(
                model, params, tokenizer, part, batch_size=_PROMPTS_AT_ONCE
            )
        return found

    return figures


def _claim(run: Path, experiment: Experiment) -> None:
    """Make the run's folder, or accept the one there if it holds this very experiment.

    Raises:
        UserError: it holds something else; the keys that differ are named.
    """
    mine = experiment.to_dict()
    mine.pop("run_dir")
    path = run / RUN_FILE
    if path.is_file():
        try:
            theirs = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not readable ({error}); choose another run_dir") from error
        different = _differences(theirs, mine)
        if different:
            raise UserError(
                f"{run}: holds another run ({'; '.join(different[:3])}); choose another run_dir=... "
                "or delete that folder"
            )
    elif run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run}: exists and is not a run's folder; choose another run_dir=...")
    else:
        try:
            run.mkdir(parents=True, exist_ok=True)
            _write_json(path, mine)
        except OSError as error:
            raise UserError(f"{run}: cannot be written ({error.strerror}); choose another run_dir") from error


def _differences(theirs: Any, mine: Any, key: str = "") -> list[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        names = [*theirs, *(n for n in mine if n not in theirs)]
        inner = [_differences(theirs.get(n), mine.get(n), f"{key}.{n}" if key else n) for n in names]
        return [line for part in inner for line in part]
    return [] if theirs == mine else [f"{key}={theirs} there, {mine} here"]


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
