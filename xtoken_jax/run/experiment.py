"""An experiment: what `xtoken distill` reads, typed, composed from `configs/` by Hydra."""

from __future__ import annotations

import copy
import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.sources import SourceKind
from xtoken_jax.distributed.mesh import MeshConfig
from xtoken_jax.distributed.processes import HostsConfig
from xtoken_jax.errors import UserError, secret_in
from xtoken_jax.losses import LossConfig, LossKind, Score, TeachersConfig, TeachersMode
from xtoken_jax.models.load import AdapterConfig, Dtype, ModelConfig, Start
from xtoken_jax.run.config_groups import CONFIG_FOLDER, options_of
from xtoken_jax.run.ranking import rises
from xtoken_jax.run.resume import ResumeConfig
from xtoken_jax.run.words import checked, nearest
from xtoken_jax.train.loop import TrainConfig
from xtoken_jax.train.optimizer import OptimizerConfig

PACKAGE = Path(__file__).parents[1]
_DEFAULT_LOSS = LossConfig()
_PROJECTION_RATE = OptimizerConfig.projection_learning_rate
OmegaConf.register_new_resolver("embedded", lambda path: str(PACKAGE / "assets" / path), replace=True)


@dataclass
class TeacherConfig(ModelConfig):
    """A teacher.

    Attributes:
        weight: weight alpha of its loss in the sum over all teachers.
        cache: a folder that `xtoken cache-teacher` wrote; the model is then not loaded.
    """

    weight: float = 1.0
    cache: str | None = None


@dataclass
class FurtherTeacherConfig(TeacherConfig):
    """A teacher in addition to the first, with settings that the experiment itself has for the first one.

    Attributes:
        projection: a W file of the student and this teacher; null builds W.
        loss: its loss. Scaling, the weights of the two losses and block are those of the experiment.
    """

    projection: str | None = None
    loss: LossConfig = field(default_factory=LossConfig)


FIRST_TEACHER = "teacher"  # what the metrics call it
# What `loss` says for all teachers together.
_SHARED = ("dynamic_scaling", "max_scale", "kd_weight", "ce_weight", "block")


@dataclass
class SweepConfig:
    """Settings of `xtoken distill -m`.

    Attributes:
        metric: held-out figure that ranks the jobs and that a search optimizes, such as "text bits/byte" or
            "arithmetic accuracy"; null for the first figure.
    """

    metric: str | None = None


@dataclass
class Experiment:
    """One run of `xtoken distill`.

    Attributes:
        name: name of the experiment, and of its folder in runs/.
        run_dir: folder of the run.
        student, teacher: the two models.
        teachers: further teachers by name, whose losses are added to that of the first.
        teachers_mode: how the losses of several teachers are combined: sum (fixed weights), adaptive (weights
            from each batch), select (only the best teacher of each batch) or averaged_logits.
        teachers_score: score that adaptive weights compare: negative_ce, negative_entropy or max_probability.
        teachers_sharpness: a > 0; adaptive weights are the softmax over teachers of a * score.
        teachers_scale_by_vocabulary: multiply each loss by log V_t / log of the smallest V_t.
        projection: a W file made by `xtoken project`; null builds W.
        export_dtype: type of the weights in the student's Hugging Face folder.
        baseline: also train the same student without a teacher for the same number of steps, for comparison.
        loss, data, optimizer, train, mesh, hosts: see the group of that name.
        resume: differences that are accepted when a run resumes.
        sweep: settings of a sweep.
    """

    name: str = "distill"
    run_dir: str = "runs/${name}"
    student: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, FurtherTeacherConfig] = field(default_factory=dict)
    teachers_mode: TeachersMode = TeachersMode.sum
    teachers_score: Score = Score.negative_ce
    teachers_sharpness: float = 1.0
    teachers_scale_by_vocabulary: bool = False
    projection: str | None = None
    baseline: bool = False
    export_dtype: Dtype = Dtype.float32
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def validate(self) -> None:
        """Raise UserError for the first value that makes no sense."""
        for side in ("student",) if self.loss.kind is LossKind.none else ("student", "teacher"):
            if not getattr(self, side).path:
                raise UserError(
                    f"{side}.path: not given; name a Hugging Face folder or hub id, or start from an "
                    f"experiment ({', '.join(options_of('experiment'))})"
                )
        for key in ("name", "run_dir"):
            if not getattr(self, key).strip():
                raise UserError(f"{key}: empty; name the run, or the folder that it is written to")
        self._validate_adapters()
        if self.student.dtype is not Dtype.float32 and not self.student.lora.rank:
            raise UserError(
                f"student.dtype={self.student.dtype.value}: a student's parameters train in float32, unless "
                "student.lora.rank puts adapters in their place; student.compute_dtype=bfloat16 is how to "
                "compute in half precision"
            )
        for part in (self.loss, self.data, self.optimizer, self.train, self.hosts):
            part.validate()
        self._validate_teachers()
        rate, teachers = self.optimizer.projection_learning_rate, self.every_teacher().values()
        if rate != _PROJECTION_RATE and not any(teacher.loss.learn_projection for teacher in teachers):
            raise UserError(
                f"optimizer.projection_learning_rate={rate}: no W trains; loss.learn_projection=true would"
            )
        known = [f.name for f in dataclasses.fields(self)]
        for key in self.resume.allow:
            if key.split(".")[0] not in known:
                raise UserError(
                    f"resume.allow: no such key or group as {key}{nearest(key, known)}; there is "
                    f"{', '.join(known)}"
                )

    def _validate_teachers(self) -> None:
        """Of several teachers; a run without one reads none of it."""
        if self.loss.kind is LossKind.none:
            return
        for name, teacher in self.teachers.items():
            key = f"teachers.{name}"
            if name == FIRST_TEACHER:
                raise UserError(f"{key}: {name} is the name of the first one, teacher.path")
            if not teacher.path:
                raise UserError(f"{key}.path: not given; name a Hugging Face folder or hub id")
            if teacher.loss.kind is LossKind.none:
                raise UserError(
                    f"{key}.loss.kind=none: a teacher without a term teaches nothing; leave it out"
                )
            for shared in _SHARED:
                if getattr(teacher.loss, shared) != getattr(_DEFAULT_LOSS, shared):
                    raise UserError(f"{key}.loss.{shared}: one for all teachers; set loss.{shared}")
            try:
                teacher.loss.validate()
            except UserError as error:
                raise UserError(f"{key}.{error}") from error
        seen: dict[str, FurtherTeacherConfig] = {}
        for name, each in self.every_teacher().items():
            same = next(
                (n for n, other in seen.items() if dataclasses.replace(each, weight=other.weight) == other),
                None,
            )
            if same is not None:
                raise UserError(
                    f"teachers.{name}: the same as {same} but for its weight; give one the weight of both"
                )
            seen[name] = each
        for key, every in self._teachers().items():
            if every.lora != AdapterConfig():
                raise UserError(f"{key}.lora: a teacher does not train; adapters are for the student")
            if not 0 < every.weight < math.inf:
                raise UserError(f"{key}.weight={every.weight}: must be above 0; leave a teacher out instead")
        if not self.teachers and self.teacher.weight != 1.0:
            raise UserError(
                f"teacher.weight={self.teacher.weight}: it is for several teachers; of one alone, "
                "loss.kd_weight with loss.dynamic_scaling=false weighs the term"
            )
        self._validate_combined()
        for name in self.data.teacher_lengths:
            if name not in (FIRST_TEACHER, *self.teachers):
                raise UserError(f"data.teacher_lengths.{name}: no such teacher")

    def combine(self) -> TeachersConfig:
        """How several teachers make one term."""
        return TeachersConfig(
            self.teachers_mode,
            self.teachers_score,
            self.teachers_sharpness,
            self.teachers_scale_by_vocabulary,
        )

    def _validate_combined(self) -> None:
        """Check the settings for several teachers together."""
        combine = self.combine()
        combine.validate()
        if not self.teachers and combine != TeachersConfig():
            name = "mode" if combine.mode is not TeachersMode.sum else "scale_by_vocabulary"
            value = combine.mode.value if name == "mode" else "true"
            raise UserError(
                f"teachers_{name}={value}: there is one teacher; add another with teachers.NAME.path=DIR"
            )
        for key, teacher in self._teachers().items():
            if combine.measured is not None and teacher.weight != 1.0:
                raise UserError(
                    f"{key}.weight={teacher.weight:g}: teachers_mode={combine.mode.value} computes the "
                    "weights from each batch; leave the weight out"
                )

    def _teachers(self) -> dict[str, TeacherConfig]:
        """By key."""
        return {FIRST_TEACHER: self.teacher, **{f"teachers.{name}": t for name, t in self.teachers.items()}}

    def every_teacher(self) -> dict[str, FurtherTeacherConfig]:
        """By name, all in one form: the first with the experiment's own loss and projection; none without."""
        if self.loss.kind is LossKind.none:
            return {}
        first = {f.name: getattr(self.teacher, f.name) for f in dataclasses.fields(TeacherConfig)}
        return {
            FIRST_TEACHER: FurtherTeacherConfig(**first, projection=self.projection, loss=self.loss),
            **self.teachers,
        }

    def _validate_adapters(self) -> None:
        self.student.lora.validate("student.lora")
        rank = self.student.lora.rank
        if rank and self.student.init is Start.random:
            raise UserError(
                f"student.lora.rank={rank} with student.init=random: the random weights below the adapters "
                "would never train; take student.init=weights or student.lora.rank=0"
            )

    def sweep_rises(self) -> bool:
        """Whether more is better of the figure that a sweep is after."""
        sources = self.data.validation.values()
        texts = not sources or any(s.kind is not SourceKind.arithmetic for s in sources)
        return rises(self.sweep.metric or ("bits/byte" if texts else "accuracy"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plain = OmegaConf.to_container(OmegaConf.structured(self), resolve=True, enum_to_str=True)
        return typing.cast(dict[str, Any], plain)


def load_experiment(overrides: Sequence[str]) -> Experiment:
    """Compose and check an experiment.

    Args:
        overrides: as on the command line, "experiment=quickstart", "train.steps=100", ...

    Raises:
        UserError: an unknown group, option or key (with the nearest one), a value of the wrong
            type, or values that make no sense together.
    """
    words = checked_words(overrides)
    try:
        with initialize_config_dir(str(CONFIG_FOLDER.resolve()), version_base="1.3"):
            composed = compose("distill", overrides=words)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error
    return experiment_of(composed)


def experiment_of(composed: DictConfig, *, validate: bool = True) -> Experiment:
    """What was composed, typed and checked.

    Raises:
        UserError: as in `load_experiment`.
    """
    if OmegaConf.select(composed, "data.validation") == "none":
        composed = copy.deepcopy(composed)
        OmegaConf.set_struct(composed, False)
        composed.data.update(validation={}, validation_share=0.0)
    try:
        # Merged into the schema only now: a named source may then be begun on the command line.
        typed = OmegaConf.merge(OmegaConf.structured(Experiment), composed)
        experiment = typing.cast(Experiment, OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    for key, text in strings_in(dataclasses.asdict(experiment)):
        if "${" in text:
            raise UserError(
                f"{key}={text}: ${{...}} in what an interpolation gave is not read; write the value"
            )
        if (name := secret_in(text)) is not None:
            raise UserError(
                f"{key}: holds the value of {name}, which the run's folder would show; what needs a secret "
                "reads its variable itself"
            )
    if validate:
        experiment.validate()
    return experiment


def strings_in(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All strings below a value of a configuration, by key; names of keys are among them."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield key or "a key", str(name)
            yield from strings_in(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from strings_in(part, key)


def checked_words(overrides: Sequence[str], *, sweep: bool = False) -> list[str]:
    """The words of a command line as Hydra takes them; with `sweep`, commas part the values of a sweep.

    Raises:
        UserError: an unknown group, option or key, or no word of the form key=value.
    """
    return [checked(override, Experiment, sweep=sweep) for override in overrides]


def one_line(error: BaseException) -> str:
    """The innermost cause, which names the key and value, without Hydra's advice around it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines()]
    key = next(
        (f"{line.removeprefix('full_key: ')}: " for line in lines if line.startswith("full_key: ")), ""
    )
    return key + (lines[0] if lines else type(error).__name__)
