"""Steps whose loss or gradient is not finite: counted, their rows written down, the run ended if need be."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from xtoken_jax.data.encode import Record
from xtoken_jax.distributed.processes import gather
from xtoken_jax.errors import UserError
from xtoken_jax.models.decoder import Model
from xtoken_jax.train.metrics import MetricsLog
from xtoken_jax.train.outputs import BadRows, Models
from xtoken_jax.train.step import Metrics

NON_FINITE_FILE = "non_finite.jsonl"
_HOPELESS = 3  # skipped steps in a row with outputs of one model that are not finite in any row

RecordsOf = Callable[[int], Sequence[Sequence[Record]]]  # step -> of each row of its batch, its parts


class NonFiniteLossError(UserError):
    """The loss, its gradient or the student's outputs on held-out text became NaN or infinite."""


class NonFinite(Enum):
    """What follows a step whose loss or gradient is not finite: the end of the run, or the next batch."""

    stop = "stop"
    skip = "skip"


def outputs_of(name: str) -> str:
    """How a message calls the outputs of a teacher."""
    return "the outputs of the teacher" if name == "teacher" else f"the outputs of teacher {name!r}"


def model_remedy(group: str, model: Model) -> str:
    """What to do about a model whose finite weights give outputs that are not.

    Args:
        group: its config group: student, teacher or teachers.NAME.
        model: the network.
    """
    if model.compute_dtype == "bfloat16":
        return f"try {group}.compute_dtype=float32 or another checkpoint in {group}.path"
    return f"its weights or config.json lead to numbers past float32: put another checkpoint in {group}.path"


UPDATE_REMEDY = "try a lower optimizer.learning_rate or more optimizer.warmup_steps"


@dataclass(frozen=True)
class _Cause:
    """Whose outputs are not finite in a step, what to do, and whether that is so in every row."""

    whose: str
    remedy: str
    everywhere: bool


_UNKNOWN = _Cause("", "try a lower optimizer.learning_rate", False)


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
        models: Models | None = None,
    ) -> None:
        """Go on counting.

        Args:
            folder: the run's, gets non_finite.jsonl: of each such step the loss, the norm of the gradient,
                the number of rows with outputs that are not finite, by model, and where the rows of its
                batch come from.
            first: the step that the run goes on from.
            policy: what follows such a step.
            most: in a row that may be skipped.
            records: step -> where the parts of each row of its batch come from.
            total, streak: counted before.
            models: student and teachers, to say whose outputs are not finite.
        """
        self.total, self.streak = total, streak
        self._hopeless = 0
        self._path = folder / NON_FINITE_FILE
        self._log = MetricsLog(self._path, first)
        self._policy, self._most, self._records, self._models = policy, most, records, models

    def counted(self) -> dict[str, int]:
        """For the metrics."""
        return {"skipped_steps": self.total} if self._policy is NonFinite.skip else {}

    def look_at(
        self, number: int, metrics: Metrics, bad_rows: Callable[[Models], BadRows] | None = None
    ) -> str | None:
        """Take in the metrics of a step; returns what is wrong if the run must end there.

        Args:
            number: of the step.
            metrics: as the step returned them.
            bad_rows: looks at the models over the step's batch.
        """
        if bool(metrics["finite"]):
            self.streak = self._hopeless = 0
            return None
        updates = number - 1 - self.total
        self.total, self.streak = self.total + 1, self.streak + 1
        loss, norm = (str(float(metrics[name])) for name in ("loss", "gradient_norm"))
        found = [] if self._records is None else self._records(number)
        rows = [[asdict(record) for record in row] for row in found]
        rows = [row for own in gather(rows) for row in own]  # of all processes
        cause, of_models = _UNKNOWN, {}
        if self._models is not None and bad_rows is not None:
            bad = bad_rows(self._models)
            cause = _cause(bad, self._models, updates, metrics)
            of_models = {"bad_rows": {"student": bad.student, "teachers": bad.teachers}}
        self._log.write(number, {"loss": loss, "gradient_norm": norm, **of_models, "rows": rows})
        self._hopeless = self._hopeless + 1 if cause.everywhere else 0
        what = f"step {number}: the loss is {loss} with a gradient of norm {norm}"
        whose = f": {cause.whose}" if cause.whose else ""
        rest = f"{self._path} names the rows of its batch; {cause.remedy}"
        if self._policy is NonFinite.stop:
            return f"{what}{whose}; {rest}{'' if cause.everywhere else ', or train.non_finite=skip'}"
        if self._hopeless >= _HOPELESS:
            return (
                f"{what}{whose}, as in the {_HOPELESS - 1} steps before, and skipping cannot mend it; {rest}"
            )
        if self.streak <= self._most:
            return None
        return f"{what}, the last of {self.streak} in a row (train.max_skips={self._most}){whose}; {rest}"


def _cause(bad: BadRows, models: Models, updates: int, metrics: Metrics) -> _Cause:
    """Whose outputs are not finite.

    Args:
        bad: rows of the step's batch.
        models: student and teachers.
        updates: of the student before the step.
        metrics: of the step.
    """
    for name, count in bad.teachers.items():
        if count:
            group = "teacher" if name == "teacher" else f"teachers.{name}"
            whose = f"{outputs_of(name)} are not finite in {count} of {bad.rows} rows"
            return _Cause(whose, model_remedy(group, models.teachers[name]), count == bad.rows)
    everywhere = bad.student == bad.rows
    if bad.student or not math.isfinite(float(metrics["ce"])):
        when = f"after {updates} updates" if updates else "before any training"
        remedy = UPDATE_REMEDY if updates else model_remedy("student", models.student)
        return _Cause(f"the student's outputs are not finite {when}", remedy, everywhere)
    what = "gradient" if math.isfinite(float(metrics["loss"])) else "distillation term"
    return _Cause(f"all outputs are finite, the {what} is not", UPDATE_REMEDY, False)
