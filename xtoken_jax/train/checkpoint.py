"""Training state and data position on disk (orbax), restorable on any mesh."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from xtoken_jax.errors import UserError
from xtoken_jax.models.decoder import Params
from xtoken_jax.train.step import TrainState


class Checkpoints:
    """The checkpoints of one run, the last `keep` of them.

    A save that was killed half-way leaves no step behind: `latest` is the last complete one.
    """

    def __init__(self, folder: Path, *, keep: int = 2, frozen: Params | None = None) -> None:
        """Open a folder, or make it.

        Args:
            folder: of this run's checkpoints.
            keep: how many.
            frozen: the student's parameters that do not train. They are not kept, the student's own folder
                has them, but a checkpoint is restored only beside the same ones.
        """
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        self.folder = folder
        self._frozen = checksum(frozen) if frozen else None

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Where a step is kept."""
        return self.folder / str(step)

    def save(self, step: int, state: TrainState, data_position: dict[str, Any]) -> None:
        """Start saving; the state is copied before this returns, written in the background."""
        beside: dict[str, Any] = {"position": data_position}
        if self._frozen is not None:
            beside["frozen"] = self._frozen
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(beside)),
        )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, laid out as `abstract` says, and the data position.

        Raises:
            UserError: no such step, it cannot be read into this state, or its adapters were trained on
                other weights.
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
        if restored["data"].get("frozen") != self._frozen:
            raise UserError(
                f"{self.path(step)}: its adapters were trained on other weights than the student's folder "
                "holds now; put those back, or choose another run_dir=..."
            )
        return restored["state"], restored["data"]["position"]

    def wait(self) -> None:
        """Wait for saves under way."""
        self._manager.wait_until_finished()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        """Finish saves under way, however the run ends."""
        self._manager.close()


def checksum(params: Params) -> int:
    """A number of the bits of all parameters, float32 or bfloat16; the same however they are laid out."""

    @jax.jit
    def sums(params: Params) -> Params:
        # sums of integers do not depend on their order
        words = {2: jnp.uint16, 4: jnp.uint32}
        bits = lambda x: jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize])  # noqa: E731
        return jax.tree.map(lambda x: bits(x).astype(jnp.uint32).sum(dtype=jnp.uint32), params)

    return zlib.crc32(np.asarray(jax.tree.leaves(jax.device_get(sums(params))), np.uint32).tobytes())
