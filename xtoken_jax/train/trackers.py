"""What metrics.jsonl holds, shown elsewhere too: TensorBoard files, Weights & Biases."""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from xtoken_jax.errors import UserError
from xtoken_jax.files import write_whole, writing

TENSORBOARD_FOLDER = "tensorboard"
_WANDB_ID_FILE = "wandb_id"
_WANDB_ID = re.compile(r"[\w-]{1,64}", re.ASCII)


@dataclass
class WandbConfig:
    """Weights & Biases; its variables (WANDB_API_KEY, WANDB_MODE=offline, ...) set everything else.

    Attributes:
        project: Weights & Biases project to write to; null to write to none.
    """

    project: str | None = None


def check_installed(tensorboard: bool, wandb: WandbConfig) -> None:
    """Raise UserError where a package that is asked for is missing."""
    for wanted, key, module, extra in (
        (tensorboard, "train.tensorboard=true", "tensorboardX", "tensorboard"),
        (wandb.project is not None, f"train.wandb.project={wandb.project}", "wandb", "wandb"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f"{key}: needs {module}; pip install 'xtoken-jax[{extra}]'")


class Trackers:
    """Writes rows on process 0, and nothing twice in a run that goes on."""

    def __init__(
        self,
        folder: Path,
        kept: Iterable[Mapping[str, Any]],
        *,
        tensorboard: bool,
        wandb: WandbConfig,
        title: str,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open them.

        Args:
            folder: the run's; TensorBoard's files are a folder in it.
            kept: the rows of metrics.jsonl that are there already.
            tensorboard, wandb: which.
            title: of the run, beside the name of its folder.
            settings: of the experiment, for Weights & Biases.

        Raises:
            UserError: Weights & Biases cannot be reached or refuses.
        """
        self._writers: list[Callable[[int, dict[str, float]], None]] = []
        self._closers: list[Callable[[], None]] = []
        if jax.process_index() != 0:
            return
        if tensorboard:
            self._open_tensorboard(folder / TENSORBOARD_FOLDER, kept)
        if wandb.project is not None:
            self._open_wandb(folder, wandb.project, f"{folder.name}: {title}", settings)

    def _open_tensorboard(self, folder: Path, kept: Iterable[Mapping[str, Any]]) -> None:
        writer_of: Any = importlib.import_module("tensorboardX").SummaryWriter
        # Anew from what stays: rows past the checkpoint that a run goes on from are in the old files.
        if folder.exists():
            with writing(folder):
                shutil.rmtree(folder)
        writer = writer_of(str(folder))

        def write(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        for row in kept:
            write(row["step"], flat(row))
        self._writers.append(write)
        self._closers.append(writer.close)

    def _open_wandb(self, folder: Path, project: str, name: str, settings: Mapping[str, Any] | None) -> None:
        wandb: Any = importlib.import_module("wandb")
        path = folder / _WANDB_ID_FILE
        if not path.is_file():
            write_whole(path, secrets.token_hex(8))
        number = path.read_text(errors="replace")
        if not _WANDB_ID.fullmatch(number):
            raise UserError(f"{path}: no id of a Weights & Biases run; delete it for a new one")
        try:
            run = wandb.init(
                project=project, name=name, id=number, resume="allow", dir=str(folder),
                config=dict(settings or {}),
            )  # fmt: skip
        except Exception as error:  # whatever it came upon, on the way to a server
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"train.wandb.project={project}: {first}") from error
        there = run.step  # one past the last step that the server has, 0 in a new run

        def write(step: int, values: dict[str, float]) -> None:
            if step >= there:
                run.log(values, step=step)

        self._writers.append(write)
        self._closers.append(run.finish)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """A row, as in metrics.jsonl."""
        plain = flat(values) if self._writers else {}
        for write in self._writers:
            write(step, plain)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        for close in self._closers:
            close()


def flat(row: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The finite numbers of a row, "validation/NAME" for those within; without the step."""
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{before}{name}/")
        elif isinstance(value, int | float) and math.isfinite(value) and (before or name != "step"):
            found[before + name] = float(value)
    return found
