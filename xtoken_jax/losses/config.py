"""What the objective is made of, with one teacher and with several, and which settings go together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum

from xtoken_jax.errors import UserError


class LossKind(Enum):
    """The distillation term; "auto" leaves the choice to the audit, "none" trains without a teacher.

    `uld` (Universal Logit Distillation) is `rank_l1`; `alm` (approximate likelihood matching) is
    `likelihood_matching`; `prefix_kl` compares the same events on both sides; `same_vocabulary` is for a
    teacher that shares
    the student's tokenizer.
    """

    auto = "auto"
    p_kl = "p_kl"
    h_kl = "h_kl"
    gold = "gold"
    uld = "uld"
    alm = "alm"
    prefix_kl = "prefix_kl"
    same_vocabulary = "same_vocabulary"
    none = "none"


class Direction(Enum):
    """Of the KL: weighed by the teacher (forward) or the student (reverse); or Jensen-Shannon (jsd)."""

    forward = "forward"
    reverse = "reverse"
    jsd = "jsd"


class Merge(Enum):
    """How a chunk's positions become one distribution."""

    mean = "mean"
    mean_normalized = "mean_normalized"
    first = "first"
    last = "last"


@dataclass
class LossConfig:
    """The objective.

    Attributes:
        kind: auto, p_kl, h_kl, gold, uld, alm, prefix_kl, same_vocabulary or none.
        temperature: tau > 0, on both sides; the loss is multiplied by tau^2. Not for ALM.
        likelihood_temperature: tau > 0 of ALM, which takes the tau-th root of the probability of a chunk.
            Loss and gradient are about tau times smaller than those of other kinds; max_scale or kd_weight
            can make up for it.
        top_k: number of teacher columns that P-KL and same_vocabulary compare; null compares all.
        uncommon_top_k: number of sorted entries that GOLD and H-KL compare.
        direction: forward KL, reverse KL or jsd; not for ULD and ALM.
        beta: weight of the teacher in the mixture of jsd, 0 to 1; TRL's GOLD uses 0.5.
        merge: how the positions of a chunk are merged: mean; first or last for P-KL, GOLD and H-KL;
            mean_normalized for P-KL.
        common_weight, uncommon_weight: weights of the two parts of GOLD and H-KL; null takes the matched
            fraction of the teacher's vocabulary and its complement, as TRL does.
        dynamic_scaling: scale the distillation loss to the size of cross-entropy; false uses kd_weight and
            ce_weight.
        max_scale: upper bound of the dynamic factor; null for no bound, as in the official code.
        kd_weight, ce_weight: weights of the two losses without dynamic scaling.
        learn_projection: train the nonzero entries of P-KL's W together with the student.
        block: student positions whose logits exist at a time; null computes the logits of the whole batch,
            which is faster for small vocabularies.
    """

    kind: LossKind = LossKind.auto
    temperature: float = 1.0
    likelihood_temperature: float = 100.0
    top_k: int | None = 8192
    uncommon_top_k: int = 8192
    direction: Direction = Direction.forward
    beta: float = 0.5
    merge: Merge = Merge.mean
    common_weight: float | None = 1.0
    uncommon_weight: float | None = 1.0
    dynamic_scaling: bool = True
    max_scale: float | None = 10.0
    kd_weight: float = 1.0
    ce_weight: float = 0.1
    learn_projection: bool = False
    block: int | None = 128

    def validate(self) -> None:
        """Raise UserError for the first value, or combination of values, that makes no sense."""
        for name, (holds, rule) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UserError(f"loss.{name}={value}: {rule}")
        if self.kind is LossKind.none:
            return  # a sweep's run without a teacher reads none of the rest
        self._validate_combinations()

    def validate_merge(self) -> None:
        """Raise UserError where a term that may be meant has no such merge."""
        for kind in _CHOICES.get(self.kind, (self.kind,)):
            if self.merge not in _MERGES[kind]:
                choices = ", ".join(merge.value for merge in _MERGES[kind])
                auto = ", which auto may choose" if self.kind is LossKind.auto else ""
                raise UserError(
                    f"loss.merge={self.merge.value}: not for loss.kind={kind.value}{auto}; choose {choices}"
                )

    @property
    def needs_ids(self) -> bool:
        """Whether the term reads which token came at a position, and so the ids of both sides."""
        return self.kind in (LossKind.alm, LossKind.prefix_kl) or self.merge in (Merge.first, Merge.last)

    @property
    def logit_temperature(self) -> float:
        """Of the logits on both sides; ALM has one of chunks instead."""
        return 1.0 if self.kind is LossKind.alm else self.temperature

    def _validate_combinations(self) -> None:
        kinds = _CHOICES.get(self.kind, (self.kind,))
        for name, readers in _READ_BY.items():
            value = getattr(self, name)
            if value != _DEFAULTS[name] and not set(readers) & set(kinds):
                raise UserError(
                    f"loss.{name}={_shown(value)}: loss.kind={self.kind.value} does not read it; "
                    f"{', '.join(kind.value for kind in readers)} would"
                )
        self.validate_merge()
        if self.beta != _DEFAULTS["beta"] and self.direction is not Direction.jsd:
            raise UserError(f"loss.beta={self.beta}: only loss.direction=jsd reads it")
        if self.common_weight == 0 and self.uncommon_weight == 0:
            raise UserError("loss.common_weight=0 and loss.uncommon_weight=0 leave nothing to learn from")
        if not self.dynamic_scaling and self.kd_weight == 0 and self.ce_weight == 0:
            raise UserError("loss.kd_weight=0 and loss.ce_weight=0 leave nothing to learn from")


class TeachersMode(Enum):
    """How several teachers make one distillation term."""

    sum = "sum"
    adaptive = "adaptive"
    averaged_logits = "averaged_logits"
    select = "select"


class Score(Enum):
    """What adaptive weights compare teachers by, on each teacher's own tokens."""

    negative_ce = "negative_ce"
    negative_entropy = "negative_entropy"
    max_probability = "max_probability"


@dataclass
class TeachersConfig:
    """How several teachers make one distillation term (X-Token, section 4).

    Attributes:
        mode: sum, the teachers' terms by fixed weights, which the paper finds best; adaptive, weights from
            each batch, softmax over teachers of sharpness * score; select, only the teacher with the lowest
            cross-entropy on the batch; averaged_logits, one full-vocabulary term against the weighted mean
            of the logits of teachers that share the student's tokenizer.
        score: negative_ce, negative_entropy or max_probability, for adaptive weights.
        sharpness: a > 0 of the softmax.
        scale_by_vocabulary: multiply each term by log V_t / log of the smallest V_t.
    """

    mode: TeachersMode = TeachersMode.sum
    score: Score = Score.negative_ce
    sharpness: float = 1.0
    scale_by_vocabulary: bool = False

    @property
    def measured(self) -> str | None:
        """The score that weights are computed from in every step; None for weights that are fixed."""
        if self.mode is TeachersMode.select:
            return Score.negative_ce.value
        return self.score.value if self.mode is TeachersMode.adaptive else None

    def validate(self) -> None:
        """Raise UserError for the first setting that the mode does not read or that is out of range."""
        if self.mode is not TeachersMode.adaptive:
            if self.score is not Score.negative_ce:
                raise UserError(f"teachers_score={self.score.value}: only teachers_mode=adaptive reads it")
            if self.sharpness != 1.0:
                raise UserError(
                    f"teachers_sharpness={self.sharpness:g}: only teachers_mode=adaptive reads it"
                )
        if not 0 < self.sharpness < math.inf:
            raise UserError(f"teachers_sharpness={self.sharpness:g}: must be above 0")
        if self.scale_by_vocabulary and self.mode is TeachersMode.averaged_logits:
            raise UserError(
                "teachers_scale_by_vocabulary=true: with teachers_mode=averaged_logits all teachers have "
                "the student's vocabulary; leave it out"
            )

    def validate_averaged(self, losses: Mapping[str, LossConfig]) -> None:
        """Raise UserError where logits cannot be averaged; losses by teacher, with their settled kinds."""
        name = "teachers_mode=averaged_logits"
        for teacher, loss in losses.items():
            if loss.kind is not LossKind.same_vocabulary:
                raise UserError(
                    f"{name}: {teacher} has loss.kind={loss.kind.value}; only teachers that share the "
                    "student's tokenizer can be averaged, with loss.kind=same_vocabulary"
                )
            if loss.top_k is not None:
                raise UserError(
                    f"{name}: {teacher} has loss.top_k={loss.top_k}; it compares full vocabularies, set "
                    "top_k=null"
                )
        if len({repr(loss) for loss in losses.values()}) > 1:
            raise UserError(
                f"{name}: makes one term of all teachers; give {', '.join(losses)} the same loss settings"
            )


def _shown(value: object) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


_DEFAULTS = {field.name: field.default for field in fields(LossConfig)}
_POSITIVE = (lambda x: 0 < x < math.inf, "must be above 0")
_WEIGHT = (lambda x: 0 <= x < math.inf, "must not be negative")
_COUNT = (lambda x: x >= 1, "must be at least 1")
RANGES = {
    "temperature": _POSITIVE,
    "likelihood_temperature": _POSITIVE,
    "top_k": _COUNT,
    "uncommon_top_k": _COUNT,
    "block": _COUNT,
    "beta": (lambda x: 0 <= x <= 1, "must be between 0, the forward KL, and 1, the reverse one"),
    "common_weight": _WEIGHT,
    "uncommon_weight": _WEIGHT,
    "max_scale": (lambda x: 0 < x < math.inf, "must be above 0, or null for no bound"),
    "kd_weight": _WEIGHT,
    "ce_weight": _WEIGHT,
}

_CHOICES = {LossKind.auto: (LossKind.p_kl, LossKind.h_kl)}
_HYBRID = (LossKind.gold, LossKind.h_kl)
# Settings of only some of the terms. The others in LossConfig are for all.
_READ_BY = {
    "temperature": (LossKind.p_kl, *_HYBRID, LossKind.uld, LossKind.prefix_kl, LossKind.same_vocabulary),
    "likelihood_temperature": (LossKind.alm,),
    "top_k": (LossKind.p_kl, LossKind.same_vocabulary),
    "uncommon_top_k": _HYBRID,
    "direction": (LossKind.p_kl, *_HYBRID, LossKind.prefix_kl, LossKind.same_vocabulary),
    "common_weight": _HYBRID,
    "uncommon_weight": _HYBRID,
    "learn_projection": (LossKind.p_kl,),
}
_MERGES = {
    LossKind.p_kl: tuple(Merge),
    LossKind.gold: (Merge.mean, Merge.first, Merge.last),
    LossKind.h_kl: (Merge.mean, Merge.first, Merge.last),
    LossKind.uld: (Merge.mean,),
    LossKind.alm: (Merge.mean,),  # it sums, whatever the merge
    LossKind.prefix_kl: (Merge.mean,),  # it has no merge: events are compared where they happen
    LossKind.same_vocabulary: (Merge.mean,),
}
