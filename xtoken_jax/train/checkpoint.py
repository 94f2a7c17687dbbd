"""Training state and data position on disk (orbax), restorable on any mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from xtoken_jax.errors import UserError
from xtoken_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints of one run, the last `keep` of them.

    A save that was killed half-way leaves no step behind: `latest` is the last complete one.
    """

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        self.folder = folder

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Where a step is kept."""
        return self.folder / str(step)

    def save(self, step: int, state: TrainState, data_position: dict[str, Any]) -> None:
        """Start saving; the state is copied before this returns, written in the background."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"position": data_position})
            ),
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, laid out as `abstract` says, and the data position.

        Raises:
            UserError: no such step, or it cannot be read into this state.
        """
        steps = self._manager.all_steps()
        if step not in steps:
            known = ", ".join(map(str, sorted(steps))) or "none"
            raise UserError(f"{self.folder}: holds no checkpoint of step {step}; it has {known}")
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
                ),
            )
        except (ValueError, KeyError, OSError) as error:
            first = str(error).splitlines()[0]
            raise UserError(f"{self.path(step)}: cannot be restored into this student ({first})") from error
        return restored["state"], restored["data"]["position"]

    def wait(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish saves under way, however the run ends."""
        self._manager.close()
