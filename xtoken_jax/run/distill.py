"""The whole line, from an Experiment to a distilled student and its figures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console

from xtoken_jax.data.batches import training_batches
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.documents import Documents
from xtoken_jax.data.encode import Record
from xtoken_jax.data.ends import learnt_ends
from xtoken_jax.data.hold_out import number_in_source
from xtoken_jax.data.length_ratio import length_warnings
from xtoken_jax.data.markers import SAMPLE, spelled_markers
from xtoken_jax.data.tally import Tally
from xtoken_jax.distributed.mesh import check_batch_size, make_mesh, rows_here
from xtoken_jax.distributed.processes import from_first
from xtoken_jax.files import to_json, write_whole, writing
from xtoken_jax.hub import resolve_folder
from xtoken_jax.losses import LossKind
from xtoken_jax.models.config import LoraConfig
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.hf.export import check_replaceable
from xtoken_jax.models.load import Start, open_model
from xtoken_jax.models.lora import join_lora, split_lora
from xtoken_jax.projection.files import save_projection
from xtoken_jax.run.agreement import agree, agree_on
from xtoken_jax.run.experiment import FIRST_TEACHER, Experiment
from xtoken_jax.run.fingerprints import DAY, names_of, of_held_out, of_text
from xtoken_jax.run.folder import claim, contents, day_of
from xtoken_jax.run.held_out import Figures, describe_held_out, held_out_parts, read_texts
from xtoken_jax.run.report import BASELINE_FOLDER, RESULT_FILE, draw_curves
from xtoken_jax.run.student import export_student, folders_to_keep
from xtoken_jax.run.teachers import (
    Pairs,
    Teachers,
    chat_templates,
    group_of,
    introduce,
    key_of,
    load_teachers,
    model_warnings,
    open_tokenizers,
)
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair
from xtoken_jax.train.batch_loss import Teacher
from xtoken_jax.train.flops import peak_flops, step_flops
from xtoken_jax.train.loop import train
from xtoken_jax.train.metrics import METRICS_FILE, read_metrics
from xtoken_jax.train.optimizer import make_optimizer, make_schedule, warmup_warning
from xtoken_jax.train.outputs import Models
from xtoken_jax.train.signals import StopSignals
from xtoken_jax.train.step import abstract_state, init_state, make_step
from xtoken_jax.train.trained_projection import (
    Learnt,
    make_projection_optimizer,
    projection_of,
    start_learning,
)

STUDENT_FOLDER = "student"


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        loss: term of the first teacher.
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
    stop = StopSignals() if stop is None else stop
    agree(experiment)
    run = Path(experiment.run_dir).expanduser()
    mesh = make_mesh(experiment.mesh)
    check_batch_size(mesh, experiment.data.batch_size, experiment.train.accumulate)
    configs = experiment.every_teacher()
    with jax.set_mesh(mesh):
        tokenizer, pairs = open_tokenizers(experiment, from_first(lambda: day_of(run, experiment)))
        key = jax.random.key(experiment.train.seed)
        introduce(console, "student", tokenizer)
        student, params = open_model(experiment.student, tokenizer.size, mesh=mesh, key=key)
        start, frozen = split_lora(params)
        if student.lora is not None:
            console.print(_adapters(student.lora, start, params))
        del params
        teachers = load_teachers(experiment, pairs, mesh, console)
        kinds = {name: teacher.loss.kind for name, teacher in teachers.static.items()}
        taught = bool(pairs)
        # Without a teacher the student's own boundaries are those that rows are cut at.
        pairs = pairs or {"student": TokenizerPair(tokenizer, tokenizer)}
        with console.status("reading the text"):
            train_text, held_out_text = read_texts(experiment)
            held_out = held_out_parts(experiment, tokenizer, pairs, held_out_text)
        templates = chat_templates(tokenizer, pairs, [*train_text.values(), *held_out_text.values()])
        if DAY in templates:
            console.print(f"day      {templates[DAY]}: the date that chat templates write in this run")
        for name, cache in teachers.caches.items():
            cache.check(of_text(train_text) | templates, names_of(experiment, name))
        rows = rows_here(mesh, experiment.data.batch_size)
        # Too little text is said before anything is written.
        tallies: dict[str, Tally] = {}
        batches = training_batches(pairs, train_text, experiment.data, rows=rows, tallies=tallies)
        counts = ", ".join(f"{len(documents):,} of {name}" for name, documents in train_text.items())
        console.print(f"text     documents: {counts}", markup=False)
        if (held := describe_held_out(experiment, train_text, held_out_text)) is not None:
            console.print(f"held out {held}", markup=False)
        warnings = [
            *model_warnings(experiment, None, student, tokenizer),
            *_teacher_warnings(experiment, teachers, pairs),
            *length_warnings(pairs, train_text, experiment.data),
            *_spelled({"train": train_text, "validation": held_out_text}, pairs),
        ]
        if (late := warmup_warning(experiment.optimizer, experiment.train.steps)) is not None:
            warnings.append(late)
        for line in warnings:
            console.print(f"warning  {line}", markup=False, style="yellow")
        for name, tally in tallies.items():
            sample = tally.records < len(train_text[name])
            of = f" (sample: its first {tally.records:,} records)" if sample else ""
            console.print(f"targets  source {name!r}{of}: {tally.describe(taught=taught)}", markup=False)
        made_of = contents(
            _models(experiment, tokenizer, pairs, student, frozen or start, teachers),
            {key_of(name, "projection"): projection for name, projection in teachers.projections.items()},
            {
                part: {name: documents.digest for name, documents in texts.items()}
                for part, texts in (("train", train_text), ("validation", held_out_text))
            },
        )
        made_of |= templates
        for name, cache in teachers.caches.items():
            made_of |= {f"{group_of(name)}.cache": cache.index.checksum}
        agree_on(made_of)
        from_first(lambda: _check_student_folder(run, experiment))
        ends = learnt_ends(tokenizer, train_text)
        for change in from_first(lambda: [str(d) for d in claim(run, experiment, made_of, ends)]):
            console.print(f"warning  {change}: goes on all the same", markup=False, style="yellow")

        def one_run(
            params: Params, folder: Path, teachers: Teachers, title: str
        ) -> tuple[Params, Figures, Figures]:
            """Parameters at the end, and the held-out figures of the start and of the end."""
            optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
            of_projections = make_projection_optimizer(experiment.optimizer)
            learnt = start_learning(teachers.tables, of_projections, mesh)
            step = make_step(
                student, teachers.static, experiment.loss, optimizer,
                student_size=tokenizer.size, micro_batches=experiment.train.accumulate,
                packed=experiment.data.pack, combine=experiment.combine(),
                schedule=make_schedule(experiment.optimizer, experiment.train.steps),
                projection_optimizer=of_projections, logged=experiment.train.logged,
            )  # fmt: skip
            made = batches.anew(teachers.caches)
            evaluate = partial(held_out.of_student, student, between=stop.check)
            state = train(
                init_state(student, params, optimizer, mesh, learnt),
                abstract_state(student, optimizer, mesh, learnt),
                jax.jit(step, donate_argnums=0),
                made,
                teacher_params=teachers.params,
                tables=teachers.tables,
                evaluate=evaluate if experiment.data.measured else None,
                config=experiment.train,
                folder=folder,
                mesh=mesh,
                title=title,
                console=console,
                frozen=frozen,
                records=lambda number: [_in_sources(row, train_text) for row in made.records_of(number)],
                models=Models(
                    student,
                    tokenizer.size,
                    {name: t.model for name, t in teachers.static.items() if t.model is not None},
                    experiment.data.pack,
                ),
                stop=stop,
                settings=experiment.to_dict(),
                seconds_at_peak=_seconds_at_peak(experiment.data, student, teachers.static, mesh),
            )
            from_first(lambda: _save_learnt(folder, state.projections, teachers, pairs))
            begin, end = from_first(lambda: _ends(folder))
            return join_lora(state.params, frozen), begin, end

        figures = {}
        for name, teacher in teachers.static.items():
            row = "teacher" if name == FIRST_TEACHER else f"teacher {name}"
            if teacher.model is None:
                known = teachers.caches[name].index
                if known.held_out == of_held_out(experiment, held_out_text):
                    figures[row] = known.figures
                else:
                    console.print(
                        f"warning  {row}: cached with other held-out text, no figures of it are shown"
                    )
                continue
            with console.status(f"measuring {row} on the held-out text"):
                figures[row] = held_out.of_teacher(name, teacher.model, teachers.params[name])
        plain = None
        if configs and experiment.baseline:
            # A run donates the parameters that it starts from, and the next one needs the same.
            copy = jax.tree.map(lambda x: x.copy(), start)
            plain = one_run(copy, run / BASELINE_FOLDER, Teachers(), "without a teacher")[-1]
        title = "distilling" if configs else "training"
        trained, figures["student, untouched"], end = one_run(start, run, teachers, title)
        if plain is not None:
            figures["trained without a teacher"] = plain
        figures["distilled" if configs else "trained"] = end

        out = run / STUDENT_FOLDER
        if (added := export_student(run, out, student, trained, overwrite=True)) is not None:
            console.print(f"ends     {added}", markup=False)
    kind = kinds.get(FIRST_TEACHER, LossKind.none)
    result: dict[str, object] = {"loss": kind.value, "figures": figures}
    result["text"] = {
        name: {"records": t.records, "tokens": t.tokens, "targets": t.targets, "skipped": dict(t.skipped)}
        for name, t in tallies.items()
    }
    if len(kinds) > 1:
        result["losses"] = {name: kind.value for name, kind in kinds.items()}

    def write() -> str:
        with writing(run / RESULT_FILE):
            write_whole(run / RESULT_FILE, to_json(result, indent=2) + "\n")
        return str(draw_curves(run))

    picture = Path(from_first(write))
    return Result(kind, figures, out, run / METRICS_FILE, picture, time.perf_counter() - started)


def _teacher_warnings(experiment: Experiment, teachers: Teachers, pairs: Pairs) -> list[str]:
    """`model_warnings` of the teachers that are in memory."""
    return [
        line
        for name, teacher in teachers.static.items()
        if teacher.model is not None
        for line in model_warnings(experiment, name, teacher.model, pairs[name].teacher)
    ]


def _spelled(texts: Mapping[str, Mapping[str, Documents]], pairs: Pairs) -> list[str]:
    """Warnings about sources whose texts spell control tokens; one for a file that is read twice."""
    tokenizers = [tokenizer for pair in pairs.values() for tokenizer in (pair.student, pair.teacher)]
    lines: dict[str, str] = {}
    for part, sources in texts.items():
        for name, documents in sources.items():
            if documents.shape.messages is None and documents.digest not in lines:
                option = None if documents.shape.prompt else f"data.{part}.{name}.markers"
                sample = min(SAMPLE, documents.read_ahead)
                line = spelled_markers(name, documents, tokenizers, option=option, sample=sample)
                if line is not None:
                    lines[documents.digest] = line
    return [*lines.values()]


def _check_student_folder(run: Path, experiment: Experiment) -> None:
    """Refuse, before training, a run whose exported student would replace one of its models."""
    folder = resolve_folder(str(experiment.student.path), weights=False)
    keep = folders_to_keep(run, experiment)
    check_replaceable(run / STUDENT_FOLDER, folder, overwrite=True, keep=keep)


def _in_sources(row: Sequence[Record], texts: Mapping[str, Documents]) -> list[Record]:
    """Where the parts of a row come from, by the numbers of all records of their sources."""
    return [replace(r, document=number_in_source(texts[r.source], r.document)) for r in row]


def _ends(folder: Path) -> tuple[Figures, Figures]:
    """The first and the last held-out figures of a run; empty without held-out text."""
    rows = read_metrics(folder / METRICS_FILE)
    measured = [row["validation"] for row in rows if isinstance(row.get("validation"), dict)] or [{}]
    return measured[0], measured[-1]


def _seconds_at_peak(
    data: DataConfig, student: Model, teachers: dict[str, Teacher], mesh: Mesh
) -> float | None:
    """Of a step; None where the devices' peak is not known."""
    peak = peak_flops(list(mesh.devices.flat))
    live = {name: teacher.model for name, teacher in teachers.items() if teacher.model is not None}
    read = [(model, data.length_of(name)) for name, model in live.items()]
    return None if peak is None else step_flops(student, read, data.batch_size, data.student_length) / peak


def _adapters(lora: LoraConfig, adapters: Params, params: Params) -> str:
    trained, every = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (adapters, params))
    names = ", ".join(lora.targets)
    return f"lora     rank {lora.rank} on {names}: {trained:,} of {every:,} parameters train"


def _save_learnt(folder: Path, learnt: dict[str, Learnt], teachers: Teachers, pairs: Pairs) -> None:
    """Each W that was trained, as `projection=` and `teachers.NAME.projection=` read it."""
    for name, own in learnt.items():
        path = folder / ("projection" if name == FIRST_TEACHER else f"projection-{name}")
        path = path.with_name(f"{path.name}.safetensors")
        with writing(path):
            save_projection(path, projection_of(teachers.tables[name], own), pairs[name])


def _models(
    experiment: Experiment,
    tokenizer: Tokenizer,
    pairs: Pairs,
    student: Model,
    start: Params,
    teachers: Teachers,
) -> dict[str, tuple[Model, Params | None, Tokenizer]]:
    """What `contents` takes: a student's random start is not content, its seed is a setting.

    Of a cached teacher nothing is there; the cache is content.
    """
    given = None if experiment.student.init is Start.random else start
    found: dict[str, tuple[Model, Params | None, Tokenizer]] = {"student": (student, given, tokenizer)}
    for name, teacher in teachers.static.items():
        if teacher.model is None:
            continue
        found[group_of(name)] = teacher.model, teachers.params[name], pairs[name].teacher
    return found
