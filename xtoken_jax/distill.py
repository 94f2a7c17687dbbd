"""The whole line, from an Experiment to a distilled student and its figures."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from xtoken_jax.config import Experiment
from xtoken_jax.coverage.audit import audit
from xtoken_jax.data import arithmetic
from xtoken_jax.data.batches import DataConfig, Windows, batch_records, read_windows, training_batches
from xtoken_jax.data.sources import SourceKind
from xtoken_jax.errors import UserError
from xtoken_jax.evaluate.accuracy import exact_match
from xtoken_jax.evaluate.bits_per_byte import bits_per_byte
from xtoken_jax.export import export_hf
from xtoken_jax.files import write_whole
from xtoken_jax.hub import resolve_folder
from xtoken_jax.losses import LossKind, loss_tables
from xtoken_jax.losses.objective import LossTables, VocabularySizes
from xtoken_jax.mesh import make_mesh, replicated
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.load import Start, open_model
from xtoken_jax.models.lora import LoraConfig, join_lora, split_lora
from xtoken_jax.projection.cache import cached_projection
from xtoken_jax.projection.files import load_projection
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.projection.prefixes import prefix_tables
from xtoken_jax.report import BASELINE_FOLDER, RESULT_FILE, draw_curves
from xtoken_jax.runs import claim, contents
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair
from xtoken_jax.train.loop import train
from xtoken_jax.train.metrics import METRICS_FILE, read_metrics
from xtoken_jax.train.optimizer import make_optimizer
from xtoken_jax.train.signals import StopSignals
from xtoken_jax.train.step import abstract_state, init_state, make_step

STUDENT_FOLDER = "student"
_PROMPTS_AT_ONCE = 256

Figures = dict[str, float]
Texts = dict[str, Windows]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        figures: row of the final table -> name -> held-out figure.
        student, metrics, picture: what was written.
        seconds: since the start.
    """

    loss: LossKind
    figures: dict[str, Figures]
    student: Path
    metrics: Path
    picture: Path
    seconds: float


@dataclass(frozen=True)
class _Teacher:
    model: Model
    params: Params
    tables: LossTables
    projection: Projection | None = None  # W, where the tables are made of it


def distill(experiment: Experiment, console: Console, stop: StopSignals | None = None) -> Result:
    """Run an experiment to its end, or go on with it where its folder holds a part of it.

    Args:
        experiment: validated.
        console: where progress is shown.
        stop: signals at which training saves and leaves.

    Raises:
        UserError: whatever is wrong with what the experiment names, and a loss that is not finite.
        Stopped: one of the signals came.
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
        pair = _load_pair(experiment)
        key = jax.random.key(experiment.train.seed)
        _name(console, "student", pair.student)
        student, params = open_model(experiment.student, pair.student.size, mesh=mesh, key=key)
        start, frozen = split_lora(params)
        if student.lora is not None:
            console.print(_adapters(student.lora, start, params))
        del params
        kind, teacher = _load_teacher(experiment, pair, mesh, console)
        with console.status("tokenizing and aligning the text"):
            windows = read_windows(pair, experiment.data.train, experiment.data)
            held_out = _held_out(experiment, pair)
        batches = partial(training_batches, pair, windows, experiment.data)
        batches()  # too little text is said before anything is written
        tokens = sum(len(w.student.ids) for part in windows.values() for w in part)
        console.print(f"text     {sum(map(len, windows.values())):,} rows, {tokens:,} student tokens")
        given = None if experiment.student.init is Start.random else frozen or start
        models: dict[str, tuple[Model, Params | None, Tokenizer]] = {
            "student": (student, given, pair.student)
        }
        projection = None
        if teacher is not None:
            models["teacher"] = (teacher.model, teacher.params, pair.teacher)
            projection = teacher.projection
        made_of = contents(models, projection, {"train": windows, "validation": held_out.windows})
        for change in claim(run, experiment, made_of):
            console.print(f"warning  {change}: goes on all the same", markup=False, style="yellow")
        records_of = batch_records(windows, experiment.data)

        def one_run(
            params: Params, folder: Path, teacher: _Teacher | None, title: str
        ) -> tuple[Params, Figures, Figures]:
            """Parameters at the end, and the held-out figures of the start and of the end."""
            optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
            loss = replace(experiment.loss, kind=kind if teacher else LossKind.none)
            step = make_step(
                student, teacher.model if teacher else None, loss, optimizer, student_size=pair.student.size
            )
            state = train(
                init_state(student, params, optimizer, mesh),
                abstract_state(student, optimizer, mesh),
                jax.jit(step, donate_argnums=0),
                batches(),
                teacher_params=teacher.params if teacher else None,
                tables=teacher.tables if teacher else None,
                evaluate=partial(held_out.of_student, student),
                config=experiment.train,
                folder=folder,
                mesh=mesh,
                title=title,
                console=console,
                frozen=frozen,
                records=lambda number: records_of(number - 1),
                stop=stop,
            )
            rows = read_metrics(folder / METRICS_FILE)
            measured = [row["validation"] for row in rows if "validation" in row]
            return join_lora(state.params, frozen), measured[0], measured[-1]

        figures = {}
        if teacher is not None:
            with console.status("measuring the teacher on the held-out text"):
                figures["teacher"] = held_out.of_teacher(teacher.model, teacher.params)
        plain = None
        if teacher is not None and experiment.baseline:
            # A run donates the parameters that it starts from, and the next one needs the same.
            copy = jax.tree.map(lambda x: x.copy(), start)
            plain = one_run(copy, run / BASELINE_FOLDER, None, "without a teacher")[-1]
        title = "distilling" if teacher else "training"
        trained, figures["student, untouched"], end = one_run(start, run, teacher, title)
        if plain is not None:
            figures["trained without a teacher"] = plain
        figures["distilled" if teacher else "trained"] = end

        out = run / STUDENT_FOLDER
        dtype = experiment.export_dtype.value
        folder = resolve_folder(str(experiment.student.path), weights=False)
        export_hf(out, student, trained, folder, dtype=dtype, donate=True)
    write_whole(run / RESULT_FILE, json.dumps({"loss": kind.value, "figures": figures}, indent=2) + "\n")
    picture = draw_curves(run)
    return Result(kind, figures, out, run / METRICS_FILE, picture, time.perf_counter() - started)


def _load_pair(experiment: Experiment) -> TokenizerPair:
    student = Tokenizer.load(str(experiment.student.path))
    if experiment.loss.kind is LossKind.none:
        return TokenizerPair(student, student)
    return TokenizerPair(student, Tokenizer.load(str(experiment.teacher.path)))


def _name(console: Console, side: str, tokenizer: Tokenizer) -> None:
    console.print(f"{side}  {tokenizer.name}\n         {tokenizer.describe()}", markup=False)
    if tokenizer.warning:
        console.print(f"warning  {tokenizer.warning}", markup=False, style="yellow")


def _adapters(lora: LoraConfig, adapters: Params, params: Params) -> str:
    trained, every = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (adapters, params))
    names = ", ".join(lora.targets)
    return f"lora     rank {lora.rank} on {names}: {trained:,} of {every:,} parameters train"


def _sizes(pair: TokenizerPair) -> LossTables:
    return VocabularySizes(pair.student.size, pair.teacher.size)


# What these losses read is made of the two tokenizers alone.
_WITHOUT_W: dict[LossKind, Callable[[TokenizerPair], LossTables]] = {
    LossKind.prefix_kl: prefix_tables, LossKind.uld: _sizes, LossKind.alm: _sizes,
}  # fmt: skip


def _load_teacher(
    experiment: Experiment, pair: TokenizerPair, mesh: Mesh, console: Console
) -> tuple[LossKind, _Teacher | None]:
    """The teacher with what its loss reads, and the loss, which the audit chooses for "auto"."""
    kind = experiment.loss.kind
    if kind is LossKind.none:
        console.print("loss     next-token cross-entropy, no teacher")
        return kind, None
    _name(console, "teacher", pair.teacher)
    model, params = open_model(experiment.teacher, pair.teacher.size, mesh=mesh, key=jax.random.key(0))
    if kind in _WITHOUT_W:
        if experiment.projection is not None:
            raise UserError(f"projection={experiment.projection}: loss.kind={kind.value} reads no W")
        console.print(f"loss     {kind.value}: as configured")
        return kind, _Teacher(model, params, jax.device_put(_WITHOUT_W[kind](pair), replicated(mesh)))
    if experiment.projection is None:
        projection = cached_projection(pair)
    else:
        projection = load_projection(experiment.projection, pair)
    reason = "as configured"
    if kind is LossKind.auto:
        found = audit(pair, projection)
        kind, reason = LossKind(found.recommended_loss), found.reason
    console.print(f"loss     {kind.value}: {reason}")
    tables = jax.device_put(loss_tables(kind, projection), replicated(mesh))
    return kind, _Teacher(model, params, tables, projection)


@dataclass(frozen=True)
class _HeldOut:
    """The validation sources, ready for models of either side."""

    data: DataConfig
    pair: TokenizerPair
    windows: Texts
    problems: dict[str, list[arithmetic.Problem]]

    def of_student(self, model: Model, params: Params) -> Figures:
        """Figures of a model with the student's tokenizer."""
        rows = {name: [w.student.ids for w in part] for name, part in self.windows.items()}
        return self._figures(model, params, self.pair.student, rows, self.data.student_length)

    def of_teacher(self, model: Model, params: Params) -> Figures:
        """Figures of a model with the teacher's tokenizer."""
        rows = {name: [w.teacher.ids for w in part] for name, part in self.windows.items()}
        return self._figures(model, params, self.pair.teacher, rows, self.data.teacher_length)

    def _figures(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        texts: dict[str, list[np.ndarray]],
        length: int,
    ) -> Figures:
        """Bits per byte of each text and accuracy on each set of problems."""
        found = {
            f"{name} bits/byte": bits_per_byte(
                model, params, tokenizer, rows, batch_size=self.data.batch_size, length=length
            )
            for name, rows in texts.items()
        }
        for name, problems in self.problems.items():
            accuracy = exact_match(model, params, tokenizer, problems, batch_size=_PROMPTS_AT_ONCE)
            found[f"{name} accuracy"] = accuracy
        return found


def _held_out(experiment: Experiment, pair: TokenizerPair) -> _HeldOut:
    sources = experiment.data.validation
    texts = {name: s for name, s in sources.items() if s.kind is not SourceKind.arithmetic}
    problems = {
        name: arithmetic.problems(s.documents, split=s.split, seed=s.seed)
        for name, s in sources.items()
        if s.kind is SourceKind.arithmetic
    }
    return _HeldOut(experiment.data, pair, read_windows(pair, texts, experiment.data), problems)
