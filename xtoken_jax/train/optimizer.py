"""Learning-rate schedule and optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import optax

from xtoken_jax.errors import UserError


class Schedule(Enum):
    """The learning rate after warm-up."""

    cosine = "cosine"
    constant = "constant"


@dataclass
class OptimizerConfig:
    """AdamW with linear warm-up. The defaults are those of the official recipe (NeMo-RL's example).

    Attributes:
        learning_rate: peak.
        schedule: after warm-up, cosine to 0 or constant.
        warmup_steps: rising linearly from 0.02 times the peak; at most the number of steps.
        beta1, beta2, weight_decay: AdamW's.
        clip_norm: bound of the gradient's global norm.
    """

    learning_rate: float = 5e-5
    schedule: Schedule = Schedule.cosine
    warmup_steps: int = 250
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.001
    clip_norm: float = 1.0

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        if not self.learning_rate > 0:
            raise UserError(f"optimizer.learning_rate={self.learning_rate}: must be above 0")
        if self.warmup_steps < 0:
            raise UserError(f"optimizer.warmup_steps={self.warmup_steps}: must not be negative")
        if not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm={self.clip_norm}: must be above 0")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)}: must be in [0, 1)")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate, over a run of `steps` steps."""
    warmup = min(config.warmup_steps, steps)
    start = 0.02 * config.learning_rate
    rising = optax.linear_schedule(start, config.learning_rate, max(warmup, 1))
    if config.schedule is Schedule.cosine:
        after = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
    else:
        after = optax.constant_schedule(config.learning_rate)
    return optax.join_schedules([rising, after], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps), b1=config.beta1, b2=config.beta2, weight_decay=config.weight_decay
        ),
    )
