"""Training state and data position on disk (orbax), verified, restorable on any mesh."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from xtoken_jax.distributed.checksum import checksum
from xtoken_jax.distributed.processes import from_first, gather, is_first
from xtoken_jax.errors import UserError
from xtoken_jax.files.fields import OBJECT, check_fields, optional, whole
from xtoken_jax.files.folders import lock_folder
from xtoken_jax.models.decoder import Params
from xtoken_jax.train.orbax_logging import without_orbax_reports
from xtoken_jax.train.step import TrainState

# What `save` writes next to the state.
_BESIDE = {
    "beside": OBJECT,
    "frozen": optional(whole(0, 2**64)),
    "state": whole(0, 2**64),
}
_LONGEST = 100  # characters of what orbax says that are passed on


class UnusableCheckpointError(UserError):
    """A checkpoint whose files are damaged, or that holds another kind of state."""


class Checkpoints:
    """The checkpoints of one run, the last `keep` of them.

    A save that was killed half-way leaves no step behind: `latest` is the last complete one. Each carries a
    checksum of its arrays and one of the rest, since orbax returns some damaged bytes as numbers. Of several
    processes all call every method; each writes and reads its shards, the first one does the rest.
    """

    def __init__(
        self, folder: Path, *, keep: int = 2, frozen: Params | None = None, read_only: bool = False
    ) -> None:
        """Open a folder, or make it.

        Args:
            folder: of this run's checkpoints.
            keep: how many.
            frozen: the student's parameters that do not train. They are not kept, the student's own folder
                has them, but a checkpoint is restored only beside the same ones.
            read_only: touch nothing, as beside a run under way; else the folder is this process's alone.

        Raises:
            UserError: another process writes there, or the folder cannot be made.
        """
        self.folder = folder
        self._frozen = checksum(frozen) if frozen else None
        lock = None if read_only else from_first(lambda: lock_folder(folder, "run_dir=..."))
        self._lock = lock if is_first() else None
        without_orbax_reports()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,  # of saves that were killed
        )
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def path(self, step: int) -> Path:
        """Where a step is kept."""
        return self.folder / str(step)

    def save(self, step: int, state: TrainState, beside: dict[str, Any]) -> None:
        """Start saving; the state is copied before this returns, written in the background.

        Args:
            step: its number.
            state: what is trained.
            beside: what else is needed to go on, such as the position in the data; plain values.

        Raises:
            UserError: this save, or the one before, could not be written.
        """
        content = {"beside": beside, "frozen": self._frozen, "state": checksum(state)}
        with self._told():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave({**content, "checksum": _crc(content)}),
                ),
            )

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state of a step, laid out as `abstract` says, and what was saved beside it.

        A W that began to train later is not in the state.

        Raises:
            UnusableCheckpointError: it is damaged, or cannot be read into this state.
            UserError: no such step, it holds a W that does not train in this state, or its adapters were
                trained on other weights.
        """
        steps = self._steps()
        if step not in steps:
            known = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{self.folder}: holds no checkpoint of step {step}; it has {known}")
        held = self.projection_shapes(step)
        if lost := [name for name in held if name not in abstract.projections]:
            raise UserError(
                f"{self.path(step)}: holds the trained W of {', '.join(lost)} and its moments, for which "
                "loss.learn_projection=false has no place; leave it true, or choose another run_dir=..."
            )
        kept = {name: learnt for name, learnt in abstract.projections.items() if name in held}
        abstract = replace(abstract, projections=kept)
        cause: Exception | None = None
        fault: str | None = None
        content: dict[str, Any] = {}
        state: Any = None
        try:
            # not the manager's restore, in which a process that fails would leave the others waiting
            path = self.path(step).resolve()
            state = ocp.StandardCheckpointHandler().restore(
                path / "state", args=ocp.args.StandardRestore(abstract)
            )
            content = dict(ocp.JsonCheckpointHandler().restore(path / "data", args=ocp.args.JsonRestore()))
            whole = content.pop("checksum", None) == _crc(content)
            check_fields(content, _BESIDE, "its data", complete=True)
            fault = None if whole else "its checksum does not fit"
        except Exception as error:  # orbax and TensorStore raise bare Exception too
            cause, fault = error, f"or is not of this student ({_said(error)})"
        faults = [fault for fault in gather(fault) if fault is not None]
        if not faults and content["state"] != checksum(state):
            faults = ["its checksum does not fit"]
        if faults:
            raise UnusableCheckpointError(f"{self.path(step)}: is damaged, {faults[0]}") from cause
        if content["frozen"] != self._frozen:
            raise UserError(
                f"{self.path(step)}: its adapters were trained on other weights than the student's folder "
                "holds now; put those back, or choose another run_dir=..."
            )
        return state, content["beside"]

    def projection_shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Of the log-weights of each W that a step holds, by teacher; none where it cannot be read."""
        if step not in self._manager.all_steps():
            return {}
        with contextlib.suppress(Exception):  # `restore` says what is wrong
            found = ocp.StandardCheckpointHandler().metadata(self.path(step).resolve() / "state")
            held = found.tree["projections"]
            return {name: tuple(learnt["logits"].shape) for name, learnt in held.items()}
        return {}

    def restore_latest(
        self, abstract: TrainState, tell: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be used; None where the folder holds none at all.

        Newer ones that cannot be used are named and moved to a folder beside this one, out of the way of
        those that will be written, but only where an older one shows that the fault is theirs.

        Args:
            abstract: as in `restore`.
            tell: gets a line for each checkpoint that was passed over, and for each W that is in none.

        Raises:
            UserError: none of them can be used; they stay as they are.
        """
        faults: dict[int, UnusableCheckpointError] = {}
        for step in reversed(self._steps()):
            try:
                found = self.restore(step, abstract)
            except UnusableCheckpointError as error:
                faults[step] = error
                continue
            for bad, fault in faults.items():
                aside = self._move_aside(bad)
                tell(f"{fault}; it is now in {aside}, and {self.path(step)} is used")
            for name in abstract.projections:
                if name not in found[0].projections:
                    tell(f"{self.path(step)}: W of {name} did not train yet; it starts as it was built")
            return found
        if not faults:
            return None
        (newest, fault), others = next(iter(faults.items())), len(faults) - 1
        also = f", nor can the {others} before it" if others else " and there is no other"
        raise UserError(
            f"{fault}{also}; put back a copy of {self.path(newest)}, choose another run_dir=..., or delete "
            f"{self.folder} to begin anew"
        )

    def _steps(self) -> list[int]:
        """Of all complete checkpoints, in order."""
        return from_first(lambda: sorted(self._manager.all_steps()))

    def _move_aside(self, step: int) -> Path:
        aside = Path(from_first(lambda: str(self._moved(step))))
        self._manager.reload()
        return aside

    def _moved(self, step: int) -> Path:
        folder = self.folder.with_name(f"{self.folder.name}-damaged")
        aside = folder / str(step)
        number = 1
        while aside.exists():
            number += 1
            aside = folder / f"{step}-{number}"
        folder.mkdir(exist_ok=True)
        os.rename(self.path(step), aside)
        return aside

    def check(self) -> None:
        """Raise what went wrong in a save that has ended, without waiting for one under way.

        Raises:
            UserError: it could not be written.
        """
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Wait for saves under way.

        Raises:
            UserError: one could not be written.
        """
        with self._told():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the threads that write came upon
            good = self.latest
            kept = "there is none yet" if good is None else f"the last one is {self.path(good)}"
            raise UserError(
                f"{self.folder}: a checkpoint could not be written ({_said(error)}); {kept}. Once there is "
                "room the same command goes on"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Finish saves under way, however the run ends; but not those that wait for a process that is lost.

        Raises:
            UserError: one could not be written, unless something else is being raised.
        """
        if kind is not None and jax.process_count() > 1:
            return  # the process is about to end
        try:
            with contextlib.nullcontext() if kind is None else contextlib.suppress(UserError):
                self.wait()
        finally:
            # what could not be written would be raised again
            with contextlib.suppress(Exception):
                self._manager.close()
            if self._lock is not None:
                os.close(self._lock)


def _crc(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _said(error: BaseException) -> str:
    """Its first line, shortened; the operating system's word where there is one."""
    text = str(error).strip()
    code = error.errno if isinstance(error, OSError) else None
    if found := re.search(r"os_error_code='(\d+)'", text):  # TensorStore's spelling
        code = int(found[1])
    first = os.strerror(code) if code else (text.splitlines() or [type(error).__name__])[0]
    return first if len(first) <= _LONGEST else first[:_LONGEST] + "..."
