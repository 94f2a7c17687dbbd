"""The teachers of an experiment: their models or caches, the terms of the loss and what these read."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh
from rich.console import Console

from xtoken_jax.coverage.audit import audit
from xtoken_jax.data.documents import Documents
from xtoken_jax.distributed.mesh import place, replicated
from xtoken_jax.errors import UserError
from xtoken_jax.losses import LossKind, TeachersConfig, TeachersMode, loss_tables
from xtoken_jax.losses.total import LossTables, VocabularySizes
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.load import ModelConfig, Start, foreign_tokenizer, open_model, untrained_positions
from xtoken_jax.projection.cache import cached_projection
from xtoken_jax.projection.files import load_projection
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.projection.partners import partners_of_teacher
from xtoken_jax.projection.prefixes import prefix_tables
from xtoken_jax.run.experiment import FIRST_TEACHER, Experiment, FurtherTeacherConfig
from xtoken_jax.run.fingerprints import DAY, names_of, of_teacher
from xtoken_jax.teacher_cache.reader import TeacherCache
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair
from xtoken_jax.train.batch_loss import Teacher

Pairs = dict[str, TokenizerPair]


@dataclass(frozen=True)
class Teachers:
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


def open_tokenizers(experiment: Experiment, day: str | None = None) -> tuple[Tokenizer, Pairs]:
    """The student's, and its pair with each teacher's by name; each with its chat template or the named one.

    Args:
        experiment: names their folders.
        day: the date that chat templates write, such as 2026-11-29; None for today.

    Raises:
        UserError: what `Tokenizer.load` refuses, with whose tokenizer it is.
    """

    def load(group: str, config: ModelConfig) -> Tokenizer:
        try:
            tokenizer = Tokenizer.load(str(config.path), chat_template=config.chat_template)
        except UserError as error:
            raise UserError(f"{group}: {error}") from error
        return tokenizer if day is None else replace(tokenizer, day=datetime.date.fromisoformat(day))

    student = load("student", experiment.student)
    every = experiment.every_teacher()
    return student, {name: TokenizerPair(student, load(group_of(name), every[name])) for name in every}


def chat_templates(student: Tokenizer, pairs: Pairs, texts: Sequence[Documents]) -> dict[str, str]:
    """Key -> fingerprint of each side's chat template, where there are conversations to render.

    `DAY` is among them if a template writes the date.
    """
    if not any(documents.shape.messages for documents in texts):
        return {}
    teachers = {group_of(name): pair.teacher for name, pair in pairs.items() if pair.teacher is not student}
    sides = {"student": student} | teachers
    dated = any("strftime_now" in (tokenizer.chat_template or "") for tokenizer in sides.values())
    return ({DAY: student.day.isoformat()} if dated else {}) | {
        f"{side}.chat_template": hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest()[:16]
        for side, tokenizer in sides.items()
    }


def introduce(console: Console, side: str, tokenizer: Tokenizer, name: str = "") -> None:
    """Say what a tokenizer is, and what is odd about it; `name` is that of one of several teachers."""
    named = f"{name}: " if name else ""
    console.print(f"{side}  {named}{tokenizer.name}\n         {tokenizer.describe()}", markup=False)
    if tokenizer.warning:
        console.print(f"warning  {tokenizer.warning}", markup=False, style="yellow")


def different_ends(pair: TokenizerPair) -> str | None:
    """Return a warning where two tokenizers of one vocabulary end a text with different tokens."""
    student, teacher = pair.student.roles.get("eos"), pair.teacher.roles.get("eos")
    if student is None or teacher is None or student == teacher:
        return None
    names = [pair.student.backend.id_to_token(end) for end in (student, teacher)]
    return (
        f"the student ends a text with {names[0]} (id {student}), the teacher with {names[1]} (id {teacher}):"
        f" after a text the teacher's probability is on {teacher}, which the student learns; set the"
        f" student's eos_token in tokenizer_config.json to {names[1]}, or the teacher's to {names[0]}"
    )


def group_of(name: str) -> str:
    """Where a teacher stands in the config."""
    return FIRST_TEACHER if name == FIRST_TEACHER else f"teachers.{name}"


def key_of(name: str, key: str) -> str:
    """What a key is called in the config that the experiment itself has for the first teacher."""
    return key if name == FIRST_TEACHER else f"{group_of(name)}.{key}"


def model_warnings(experiment: Experiment, name: str | None, model: Model, tokenizer: Tokenizer) -> list[str]:
    """Lines on a model that does not fit its tokenizer or the lengths of rows.

    Args:
        experiment: lengths.
        name: of a teacher; None for the student.
        model, tokenizer: the model and what is in its folder.
    """
    data = experiment.data
    if name is None:
        group, key, length = "student", "data.student_length", data.student_length
        trained = experiment.student.init is Start.weights
    else:
        group, length, trained = group_of(name), data.length_of(name), True
        key = f"data.teacher_lengths.{name}" if name in data.teacher_lengths else "data.teacher_length"
    lines = [foreign_tokenizer(group, model.config, tokenizer)]
    if trained:  # positions of a random start are all alike
        lines.append(untrained_positions(group, key, length, model.config))
    return [line for line in lines if line is not None]


def _sizes(pair: TokenizerPair) -> LossTables:
    return VocabularySizes(pair.student.size, pair.teacher.size)


# What these losses read is made of the two tokenizers alone.
_WITHOUT_W: dict[LossKind, Callable[[TokenizerPair], LossTables]] = {
    LossKind.prefix_kl: prefix_tables, LossKind.uld: _sizes, LossKind.alm: _sizes,
}  # fmt: skip


def load_teachers(experiment: Experiment, pairs: Pairs, mesh: Mesh, console: Console) -> Teachers:
    """The teachers with what their terms read, and the terms, which the audit chooses for "auto"."""
    found, configs = Teachers(), experiment.every_teacher()
    if not configs:
        console.print("loss     next-token cross-entropy, no teacher")
    for name, config in configs.items():
        pair = pairs[name]
        introduce(console, "teacher", pair.teacher, "" if name == FIRST_TEACHER else name)
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
                Path(config.cache).expanduser(), loss.logit_temperature, key=f"{group_of(name)}.cache"
            )
            cache.check(of_teacher(experiment, name, pairs), names_of(experiment, name))
            console.print(f"cache    {config.cache}", markup=False)
            found.caches[name] = cache
        weight = f", weight {config.weight:g}" if len(configs) > 1 else ""
        console.print(f"loss     {term.kind.value}{weight}: {term.reason}")
        if term.kind is LossKind.same_vocabulary and (warning := different_ends(pair)) is not None:
            console.print(f"warning  {warning}", markup=False, style="yellow")
        found.static[name] = Teacher(model, loss, config.weight, pair.teacher.size, partners_of_teacher(pair))
        found.tables[name] = place(term.tables, replicated(mesh))
        if term.projection is not None:
            found.projections[name] = term.projection
    _check_combined(experiment.combine(), found)
    return found


def _check_combined(combine: TeachersConfig, teachers: Teachers) -> None:
    """Raise UserError where the teachers do not have what their mode reads."""
    mode = f"teachers_mode={combine.mode.value}"
    for name, teacher in teachers.static.items():
        key, cache = group_of(name), teachers.caches.get(name)
        temperature = teacher.loss.logit_temperature
        averaged = combine.mode is TeachersMode.averaged_logits
        if averaged and teacher.model is None:
            raise UserError(f"{key}.cache: {mode} needs the model itself; leave the cache out")
        if averaged and teacher.model is not None and teacher.model.config.logit_softcap is not None:
            raise UserError(
                f"{key}.path: its logits have a soft cap of {teacher.model.config.logit_softcap:g}, which "
                f"{mode} does not support; choose teachers_mode=sum"
            )
        at_one = temperature == 1.0 or cache is None or cache.any_temperature
        if combine.measured is not None and not at_one:
            raise UserError(
                f"{key}.cache: {mode} reads the teacher at temperature 1, and this cache is read at "
                f"{temperature:g}; set the temperature of its loss to 1, or leave the cache out"
            )
    if combine.mode is TeachersMode.averaged_logits:
        combine.validate_averaged({name: teacher.loss for name, teacher in teachers.static.items()})


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
                f"{key_of(name, 'projection')}={config.projection}: {key_of(name, 'loss.kind')}={kind.value} "
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
        f"{key_of(name, 'loss.learn_projection')}=true: auto takes {kind.value}, whose W does not train "
        f"({reason}); choose p_kl, or leave it out"
    )
