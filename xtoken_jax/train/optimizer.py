"""Learning-rate schedule and optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import optax

from xtoken_jax.errors import UserError


class Schedule(Enum):
    """The learning rate after warm-up: it falls as a cosine, linearly, not at all, or at the end (wsd)."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"


class OptimizerKind(Enum):
    """Optimizers of optax whose state has the shapes of the parameters."""

    adamw = "adamw"
    lamb = "lamb"
    lion = "lion"
    sgd = "sgd"


@dataclass
class OptimizerConfig:
    """An optimizer with linear warm-up. The defaults are those of the official recipe (NeMo-RL's example).

    Attributes:
        kind: adamw, lamb, lion or sgd (with momentum beta1).
        learning_rate: peak of the learning rate.
        schedule: after warm-up: cosine or linear decay, constant, or wsd (warm-up, stable, decay: constant,
            then linear decay in the last steps).
        warmup_steps: steps in which the learning rate rises linearly from 0.02 times the peak; at most the
            number of steps.
        end_scale: final learning rate of cosine, linear and wsd, relative to the peak.
        decay_share: share of all steps in which wsd decays.
        beta1, beta2, weight_decay: settings of the optimizer.
        clip_norm: bound of the global gradient norm; null for no clipping.
        projection_learning_rate: constant learning rate of W, with loss.learn_projection=true.
    """

    kind: OptimizerKind = OptimizerKind.adamw
    learning_rate: float = 5e-5
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 250
    end_scale: float = 0.0
    decay_share: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.001
    clip_norm: float | None = 1.0
    projection_learning_rate: float = 1e-2

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        for name in ("learning_rate", "projection_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: must be above 0")
        for name in ("warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: must not be negative")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm={self.clip_norm}: must be above 0, or null for no clipping")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: must be in [0, 1)")
        if not 0 <= self.end_scale <= 1:
            raise UserError(f"optimizer.end_scale={self.end_scale}: must be between 0 and 1")
        if not 0 < self.decay_share <= 1:
            raise UserError(f"optimizer.decay_share={self.decay_share}: must be above 0 and at most 1")
        self._validate_readers()

    def _validate_readers(self) -> None:
        for name, reads in (
            ("end_scale", self.schedule is not Schedule.constant),
            ("decay_share", self.schedule is Schedule.wsd),
        ):
            if getattr(self, name) != getattr(_DEFAULTS, name) and not reads:
                raise UserError(
                    f"optimizer.{name}={getattr(self, name)}: optimizer.schedule={self.schedule.value} "
                    "does not read it"
                )
        if self.beta2 != _DEFAULTS.beta2 and self.kind is OptimizerKind.sgd:
            raise UserError(f"optimizer.beta2={self.beta2}: optimizer.kind=sgd does not read it")


_DEFAULTS = OptimizerConfig()


def warmup_warning(config: OptimizerConfig, steps: int) -> str | None:
    """One line where the learning rate rises over the whole run of `steps` steps."""
    if config.warmup_steps < steps:
        return None
    return (
        f"optimizer.warmup_steps={config.warmup_steps} is not below train.steps={steps}: the learning rate "
        f"rises until the last step and never falls; take optimizer.warmup_steps={steps // 10}"
    )


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate, over a run of `steps` steps."""
    warmup, peak = min(config.warmup_steps, steps), config.learning_rate
    rising = optax.linear_schedule(0.02 * peak, peak, max(warmup, 1))
    rest, end = max(steps - warmup, 1), config.end_scale
    if config.schedule is Schedule.cosine:
        after = optax.cosine_decay_schedule(peak, rest, alpha=end)
    elif config.schedule is Schedule.linear:
        after = optax.linear_schedule(peak, end * peak, rest)
    elif config.schedule is Schedule.wsd:
        falling = min(max(round(config.decay_share * steps), 1), rest)
        after = optax.linear_schedule(peak, end * peak, falling, transition_begin=rest - falling)
    else:
        after = optax.constant_schedule(peak)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then the optimizer."""
    schedule = make_schedule(config, steps)
    decay = config.weight_decay
    if config.kind is OptimizerKind.sgd:
        momentum = optax.sgd(schedule, momentum=config.beta1 or None)
        chosen = optax.chain(optax.add_decayed_weights(decay), momentum)
    else:
        of_kind = {
            OptimizerKind.adamw: optax.adamw, OptimizerKind.lamb: optax.lamb, OptimizerKind.lion: optax.lion,
        }[config.kind]  # fmt: skip
        chosen = of_kind(schedule, b1=config.beta1, b2=config.beta2, weight_decay=decay)
    if config.clip_norm is None:
        return chosen
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), chosen)
