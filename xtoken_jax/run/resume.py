"""What a run's folder was begun with, and what is there now: settings and content, compared by key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from xtoken_jax.errors import printable

# Where a run is, how it is spread over devices and how often it saves changes no number in it, and how it
# meets a loss that is not finite none before that.
FREE = (
    "run_dir", "resume", "sweep", "mesh", "train.save_every", "train.keep", "train.non_finite",
    "train.max_skips", "train.tensorboard", "train.wandb",
)  # fmt: skip


@dataclass
class ResumeConfig:
    """Differences from the beginning of a run that are accepted when it resumes.

    Attributes:
        allow: keys or groups that may differ, such as data, loss.temperature or student.weights.
    """

    allow: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """One thing that is not what it was.

    Attributes:
        key: a setting's, or that of a content such as student.weights.
        there: what the folder holds.
        here: what the command names now.
    """

    key: str
    there: Any
    here: Any

    def __str__(self) -> str:
        return f"{self.key}={_short(self.there)} there, {_short(self.here)} here"


def differences(there: Any, here: Any, key: str = "") -> list[Difference]:
    """What differs between two trees of plain values, key by key, but for what is `FREE`."""
    if key in FREE:
        return []
    if isinstance(there, dict) and isinstance(here, dict):
        names = [*there, *(name for name in here if name not in there)]
        below = [differences(there.get(n), here.get(n), f"{key}.{n}" if key else n) for n in names]
        return [difference for part in below for difference in part]
    return [] if there == here else [Difference(key, there, here)]


def covers(allow: list[str], key: str) -> bool:
    """Whether one of the allowed keys is this one or a group around it."""
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in allow)


def _short(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 80 else text[:77] + "..."
