"""The whole line, from an Experiment to a distilled student and its figures."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from xtoken_jax.alignment.spans import Side
from xtoken_jax.cache_contents import of_held_out, of_teacher, of_text
from xtoken_jax.config import FIRST_TEACHER, Experiment, FurtherTeacherConfig
from xtoken_jax.coverage.audit import audit
from xtoken_jax.data import arithmetic
from xtoken_jax.data.batches import training_batches
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.documents import Documents
from xtoken_jax.data.encode import Part, read_parts, student_of
from xtoken_jax.data.sources import SourceKind, read_sources
from xtoken_jax.data.teacher_cache import TeacherCache
from xtoken_jax.errors import UserError
from xtoken_jax.evaluate.accuracy import exact_match
from xtoken_jax.evaluate.bits_per_byte import bits_per_byte
from xtoken_jax.export import export_hf
from xtoken_jax.files import write_whole
from xtoken_jax.hosts import from_first
from xtoken_jax.hub import resolve_folder
from xtoken_jax.losses import LossKind, loss_tables
from xtoken_jax.losses.objective import LossTables, VocabularySizes
from xtoken_jax.mesh import make_mesh, place, replicated, rows_here
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.load import ModelConfig, Start, open_model
from xtoken_jax.models.lora import LoraConfig, join_lora, split_lora
from xtoken_jax.projection.cache import cached_projection
from xtoken_jax.projection.files import load_projection, save_projection
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.projection.partners import partners_of_teacher
from xtoken_jax.projection.prefixes import prefix_tables
from xtoken_jax.report import BASELINE_FOLDER, RESULT_FILE, draw_curves
from xtoken_jax.runs import agree, agree_on, claim, contents
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair
from xtoken_jax.train.flops import peak_flops, step_flops
from xtoken_jax.train.learnt import Learnt, make_projection_optimizer, projection_of, start_learning
from xtoken_jax.train.loop import train
from xtoken_jax.train.metrics import METRICS_FILE, read_metrics
from xtoken_jax.train.objective import Teacher
from xtoken_jax.train.optimizer import make_optimizer, make_schedule
from xtoken_jax.train.signals import StopSignals
from xtoken_jax.train.step import abstract_state, init_state, make_step

STUDENT_FOLDER = "student"
_PROMPTS_AT_ONCE = 256

Figures = dict[str, float]
Pairs = dict[str, TokenizerPair]


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


@dataclass(frozen=True)
class _Teachers:
    """All teachers, by name."""

    static: dict[str, Teacher] = field(default_factory=dict)
    params: dict[str, Params] = field(default_factory=dict)
    tables: dict[str, LossTables] = field(default_factory=dict)
    projections: dict[str, Projection] = field(default_factory=dict)  # W, where the tables are made of it
    caches: dict[str, TeacherCache] = field(default_factory=dict)  # of those that are not in memory


class _Term(NamedTuple):
    """A teacher's term: the settled kind, why it is this one, what it reads, and the W that is made of."""

    kind: LossKind
    reason: str
    tables: LossTables
    projection: Projection | None = None


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
    devices, parts = mesh.shape["data"] * mesh.shape["fsdp"], experiment.train.accumulate
    if experiment.data.batch_size % (devices * parts):
        by = f", each in train.accumulate={parts} parts" if parts > 1 else ""
        raise UserError(
            f"data.batch_size={experiment.data.batch_size}: not a multiple of the {devices} devices of the "
            f"mesh's data and fsdp axes{by}"
        )
    configs = experiment.every_teacher()
    with jax.set_mesh(mesh):
        tokenizer = _tokenizer(experiment.student)
        pairs = {name: TokenizerPair(tokenizer, _tokenizer(config)) for name, config in configs.items()}
        key = jax.random.key(experiment.train.seed)
        _name(console, "student", tokenizer)
        student, params = open_model(experiment.student, tokenizer.size, mesh=mesh, key=key)
        start, frozen = split_lora(params)
        if student.lora is not None:
            console.print(_adapters(student.lora, start, params))
        del params
        teachers = _load_teachers(experiment, pairs, mesh, console)
        kinds = {name: teacher.loss.kind for name, teacher in teachers.static.items()}
        # Without a teacher the student's own boundaries are those that rows are cut at.
        pairs = pairs or {"student": TokenizerPair(tokenizer, tokenizer)}
        with console.status("reading the text"):
            train_text = read_sources(experiment.data.train)
            held_out_text = read_sources(
                {n: s for n, s in experiment.data.validation.items() if s.kind is not SourceKind.arithmetic}
            )
            held_out = held_out_parts(experiment, tokenizer, pairs, held_out_text)
        for cache in teachers.caches.values():
            cache.check(of_text(train_text))
        rows = rows_here(mesh, experiment.data.batch_size)
        batches = partial(training_batches, pairs, train_text, experiment.data, rows=rows)
        batches(caches=teachers.caches)  # too little text is said before anything is written
        counts = ", ".join(f"{len(documents):,} of {name}" for name, documents in train_text.items())
        console.print(f"text     documents: {counts}", markup=False)
        made_of = contents(
            _models(experiment, tokenizer, pairs, student, frozen or start, teachers),
            {_key(name, "projection"): projection for name, projection in teachers.projections.items()},
            {
                part: {name: documents.digest for name, documents in texts.items()}
                for part, texts in (("train", train_text), ("validation", held_out_text))
            },
        )
        made_of |= _chat_templates(tokenizer, pairs, [*train_text.values(), *held_out_text.values()])
        for name, cache in teachers.caches.items():
            made_of |= {f"{_group(name)}.cache": cache.index.checksum}
        agree_on(made_of)
        for change in from_first(lambda: [str(d) for d in claim(run, experiment, made_of)]):
            console.print(f"warning  {change}: goes on all the same", markup=False, style="yellow")

        def one_run(
            params: Params, folder: Path, teachers: _Teachers, title: str
        ) -> tuple[Params, Figures, Figures]:
            """Parameters at the end, and the held-out figures of the start and of the end."""
            optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
            of_projections = make_projection_optimizer(experiment.optimizer)
            learnt = start_learning(teachers.tables, of_projections, mesh)
            step = make_step(
                student, teachers.static, experiment.loss, optimizer,
                student_size=tokenizer.size, micro_batches=experiment.train.accumulate,
                packed=experiment.data.pack,
                schedule=make_schedule(experiment.optimizer, experiment.train.steps),
                projection_optimizer=of_projections, logged=experiment.train.logged,
            )  # fmt: skip
            made = batches(caches=teachers.caches)
            state = train(
                init_state(student, params, optimizer, mesh, learnt),
                abstract_state(student, optimizer, mesh, learnt),
                jax.jit(step, donate_argnums=0),
                made,
                teacher_params=teachers.params,
                tables=teachers.tables,
                evaluate=partial(held_out.of_student, student, between=stop.check),
                config=experiment.train,
                folder=folder,
                mesh=mesh,
                title=title,
                console=console,
                frozen=frozen,
                records=made.records_of,
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
            plain = one_run(copy, run / BASELINE_FOLDER, _Teachers(), "without a teacher")[-1]
        title = "distilling" if configs else "training"
        trained, figures["student, untouched"], end = one_run(start, run, teachers, title)
        if plain is not None:
            figures["trained without a teacher"] = plain
        figures["distilled" if configs else "trained"] = end

        out = run / STUDENT_FOLDER
        dtype = experiment.export_dtype.value
        folder = resolve_folder(str(experiment.student.path), weights=False)
        template = experiment.student.chat_template
        export_hf(out, student, trained, folder, dtype=dtype, donate=True, chat_template=template)
    kind = kinds.get(FIRST_TEACHER, LossKind.none)
    result: dict[str, object] = {"loss": kind.value, "figures": figures}
    if len(kinds) > 1:
        result["losses"] = {name: kind.value for name, kind in kinds.items()}

    def write() -> str:
        write_whole(run / RESULT_FILE, json.dumps(result, indent=2) + "\n")
        return str(draw_curves(run))

    picture = Path(from_first(write))
    return Result(kind, figures, out, run / METRICS_FILE, picture, time.perf_counter() - started)


def _ends(folder: Path) -> tuple[Figures, Figures]:
    """The first and the last held-out figures of a run."""
    rows = read_metrics(folder / METRICS_FILE)
    measured = [row["validation"] for row in rows if "validation" in row]
    return measured[0], measured[-1]


def _seconds_at_peak(
    data: DataConfig, student: Model, teachers: dict[str, Teacher], mesh: Mesh
) -> float | None:
    """Of a step; None where the devices' peak is not known."""
    peak = peak_flops(list(mesh.devices.flat))
    live = {name: teacher.model for name, teacher in teachers.items() if teacher.model is not None}
    read = [(model, data.length_of(name)) for name, model in live.items()]
    return None if peak is None else step_flops(student, read, data.batch_size, data.student_length) / peak


def _tokenizer(config: ModelConfig) -> Tokenizer:
    return Tokenizer.load(str(config.path), chat_template=config.chat_template)


def _chat_templates(student: Tokenizer, pairs: Pairs, texts: Sequence[Documents]) -> dict[str, str]:
    """Key -> fingerprint of each side's chat template, where there are conversations to render."""
    if not any(documents.shape.messages for documents in texts):
        return {}
    teachers = {_group(name): pair.teacher for name, pair in pairs.items() if pair.teacher is not student}
    sides = {"student": student} | teachers
    return {
        f"{side}.chat_template": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:16]
        for side, tokenizer in sides.items()
    }


def _name(console: Console, side: str, tokenizer: Tokenizer) -> None:
    console.print(f"{side}  {tokenizer.name}\n         {tokenizer.describe()}", markup=False)
    if tokenizer.warning:
        console.print(f"warning  {tokenizer.warning}", markup=False, style="yellow")


def _adapters(lora: LoraConfig, adapters: Params, params: Params) -> str:
    trained, every = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (adapters, params))
    names = ", ".join(lora.targets)
    return f"lora     rank {lora.rank} on {names}: {trained:,} of {every:,} parameters train"


def _group(name: str) -> str:
    """Where a teacher stands in the config."""
    return FIRST_TEACHER if name == FIRST_TEACHER else f"teachers.{name}"


def _save_learnt(folder: Path, learnt: dict[str, Learnt], teachers: _Teachers, pairs: Pairs) -> None:
    """Each W that was trained, as `projection=` and `teachers.NAME.projection=` read it."""
    for name, own in learnt.items():
        path = folder / ("projection" if name == FIRST_TEACHER else f"projection-{name}")
        save_projection(
            path.with_name(f"{path.name}.safetensors"), projection_of(teachers.tables[name], own), pairs[name]
        )


def _key(name: str, key: str) -> str:
    """What a key is called in the config that the experiment itself has for the first teacher."""
    return key if name == FIRST_TEACHER else f"{_group(name)}.{key}"


def _models(
    experiment: Experiment,
    tokenizer: Tokenizer,
    pairs: Pairs,
    student: Model,
    start: Params,
    teachers: _Teachers,
) -> dict[str, tuple[Model, Params | None, Tokenizer]]:
    """What `contents` takes: a student's random start is not content, its seed is a setting.

    Of a cached teacher nothing is there; the cache is content.
    """
    given = None if experiment.student.init is Start.random else start
    found: dict[str, tuple[Model, Params | None, Tokenizer]] = {"student": (student, given, tokenizer)}
    for name, teacher in teachers.static.items():
        if teacher.model is None:
            continue
        found[_group(name)] = teacher.model, teachers.params[name], pairs[name].teacher
    return found


def _sizes(pair: TokenizerPair) -> LossTables:
    return VocabularySizes(pair.student.size, pair.teacher.size)


# What these losses read is made of the two tokenizers alone.
_WITHOUT_W: dict[LossKind, Callable[[TokenizerPair], LossTables]] = {
    LossKind.prefix_kl: prefix_tables, LossKind.uld: _sizes, LossKind.alm: _sizes,
}  # fmt: skip


def _load_teachers(experiment: Experiment, pairs: Pairs, mesh: Mesh, console: Console) -> _Teachers:
    """The teachers with what their terms read, and the terms, which the audit chooses for "auto"."""
    found, configs = _Teachers(), experiment.every_teacher()
    if not configs:
        console.print("loss     next-token cross-entropy, no teacher")
    for name, config in configs.items():
        pair = pairs[name]
        _name(console, "teacher", pair.teacher)
        model = None
        if config.cache is None:
            model, found.params[name] = open_model(
                config, pair.teacher.size, mesh=mesh, key=jax.random.key(0)
            )
        term = _term(name, config, pair)
        loss = replace(config.loss, kind=term.kind)
        loss.validate_merge()
        if config.cache is not None:
            cache = TeacherCache(
                Path(config.cache).expanduser(), loss.logit_temperature, key=f"{_group(name)}.cache"
            )
            cache.check(of_teacher(experiment, name, pairs))
            console.print(f"cache    {config.cache}", markup=False)
            found.caches[name] = cache
        weight = f", weight {config.weight:g}" if len(configs) > 1 else ""
        console.print(f"loss     {term.kind.value}{weight}: {term.reason}")
        found.static[name] = Teacher(model, loss, config.weight, partners_of_teacher(pair))
        found.tables[name] = place(term.tables, replicated(mesh))
        if term.projection is not None:
            found.projections[name] = term.projection
    return found


def _term(name: str, config: FurtherTeacherConfig, pair: TokenizerPair) -> _Term:
    kind, reason = config.loss.kind, "as configured"
    shared = pair.student.fingerprint == pair.teacher.fingerprint
    if kind is LossKind.auto and shared and config.projection is None:
        kind, reason = LossKind.same_vocabulary, "the teacher has the student's tokenizer"
    if config.loss.learn_projection and kind not in (LossKind.auto, LossKind.p_kl):
        raise _trains_no_projection(name, kind, reason)
    if kind in _WITHOUT_W:
        if config.projection is not None:
            raise UserError(
                f"{_key(name, 'projection')}={config.projection}: {_key(name, 'loss.kind')}={kind.value} "
                "reads no W"
            )
        return _Term(kind, reason, _WITHOUT_W[kind](pair))
    if kind is LossKind.same_vocabulary and shared:
        return _Term(kind, reason, _sizes(pair))
    if config.projection is None:
        projection = cached_projection(pair)
    else:
        projection = load_projection(config.projection, pair)
    if kind is LossKind.auto:
        found = audit(pair, projection)
        kind, reason = LossKind(found.recommended_loss), found.reason
    if not config.loss.learn_projection:
        return _Term(kind, reason, loss_tables(kind, projection), projection)
    if kind is not LossKind.p_kl:
        raise _trains_no_projection(name, kind, reason)
    return _Term(kind, f"{reason}; W trains", loss_tables(kind, projection.learnable()), projection)


def _trains_no_projection(name: str, kind: LossKind, reason: str) -> UserError:
    return UserError(
        f"{_key(name, 'loss.learn_projection')}=true: auto takes {kind.value}, whose W does not train "
        f"({reason}); choose p_kl, or leave it out"
    )


@dataclass(frozen=True)
class HeldOut:
    """The validation sources, ready for models of either side."""

    data: DataConfig
    student: Tokenizer
    pairs: Pairs
    parts: dict[str, list[Part]]
    problems: dict[str, list[arithmetic.Problem]]

    def of_student(
        self, model: Model, params: Params, *, between: Callable[[], None] | None = None
    ) -> Figures:
        """Figures of a model with the student's tokenizer; what `between` raises now and then breaks off."""
        rows = {name: [student_of(part) for part in parts] for name, parts in self.parts.items()}
        return self._figures(model, params, self.student, rows, self.data.student_length, between)

    def of_teacher(self, teacher: str, model: Model, params: Params) -> Figures:
        """Figures of a model with a teacher's tokenizer."""
        rows = {name: [part[teacher].teacher for part in parts] for name, parts in self.parts.items()}
        return self._figures(model, params, self.pairs[teacher].teacher, rows, self.data.length_of(teacher))

    def _figures(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        texts: dict[str, list[Side]],
        length: int,
        between: Callable[[], None] | None = None,
    ) -> Figures:
        """Bits per byte of each text and accuracy on each set of problems."""
        found = {
            f"{name} bits/byte": bits_per_byte(
                model,
                params,
                tokenizer,
                [row.ids for row in rows],
                batch_size=self.data.batch_size,
                length=length,
                targets=[row.targets for row in rows],
                between=between,
            )
            for name, rows in texts.items()
        }
        for name, problems in self.problems.items():
            if between is not None:
                between()
            accuracy = exact_match(model, params, tokenizer, problems, batch_size=_PROMPTS_AT_ONCE)
            found[f"{name} accuracy"] = accuracy
        return found


def held_out_parts(
    experiment: Experiment, student: Tokenizer, pairs: Pairs, texts: Mapping[str, Documents]
) -> HeldOut:
    """Of an experiment whose validation texts have been read."""
    problems = {
        name: arithmetic.problems(s.documents, split=s.split, seed=s.seed)
        for name, s in experiment.data.validation.items()
        if s.kind is SourceKind.arithmetic
    }
    parts = read_parts(pairs, texts, experiment.data)
    return HeldOut(experiment.data, student, pairs, parts, problems)
