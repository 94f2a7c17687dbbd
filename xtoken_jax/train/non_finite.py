"""Steps whose loss or gradient is not finite: counted, their rows written down, the run ended if need be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path

from xtoken_jax.data.encode import Record
from xtoken_jax.errors import UserError
from xtoken_jax.train.metrics import MetricsLog
from xtoken_jax.train.step import Metrics

NON_FINITE_FILE = "non_finite.jsonl"

RecordsOf = Callable[[int], Sequence[Sequence[Record]]]  # step -> of each row of its batch, its parts


class NonFiniteLossError(UserError):
    """The loss or its gradient became NaN or infinite."""


class NonFinite(Enum):
    """What follows a step whose loss or gradient is not finite: the end of the run, or the next batch."""

    stop = "stop"
    skip = "skip"


class Skips:
    """The count of such steps, in a run that may go on from a checkpoint.

    Attributes:
        total: since the run began.
        streak: how many the last steps were, without one between that was finite.
    """

    def __init__(
        self,
        folder: Path,
        first: int,
        policy: NonFinite,
        most: int,
        records: RecordsOf | None,
        total: int = 0,
        streak: int = 0,
    ) -> None:
        """Go on counting.

        Args:
            folder: the run's, gets non_finite.jsonl: of each such step the loss, the norm of the gradient
                and where the rows of its batch come from.
            first: the step that the run goes on from.
            policy: what follows such a step.
            most: in a row that may be skipped.
            records: step -> where the parts of each row of its batch come from.
            total, streak: counted before.
        """
        self.total, self.streak = total, streak
        self._path = folder / NON_FINITE_FILE
        self._log = MetricsLog(self._path, first)
        self._policy, self._most, self._records = policy, most, records

    def counted(self) -> dict[str, int]:
        """For the metrics."""
        return {"skipped_steps": self.total} if self._policy is NonFinite.skip else {}

    def look_at(self, number: int, metrics: Metrics) -> str | None:
        """Take in the metrics of a step; returns what is wrong if the run must end there."""
        if bool(metrics["finite"]):
            self.streak = 0
            return None
        self.total, self.streak = self.total + 1, self.streak + 1
        loss, norm = (str(float(metrics[name])) for name in ("loss", "gradient_norm"))
        found = [] if self._records is None else self._records(number)
        rows = [[asdict(record) for record in row] for row in found]
        self._log.write(number, {"loss": loss, "gradient_norm": norm, "rows": rows})
        what = f"step {number}: the loss is {loss} with a gradient of norm {norm}"
        rest = f"{self._path} names the rows of its batch; try a lower optimizer.learning_rate"
        if self._policy is NonFinite.stop:
            return f"{what}; {rest}, or train.non_finite=skip"
        if self.streak <= self._most:
            return None
        return f"{what}, the last of {self.streak} in a row (train.max_skips={self._most}); {rest}"
