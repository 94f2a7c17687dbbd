"""Whether the processes of one run were started alike, read the same content and see one folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from xtoken_jax.distributed.processes import from_first, gather
from xtoken_jax.errors import UserError
from xtoken_jax.files.new_files import NewFile
from xtoken_jax.run.experiment import Experiment
from xtoken_jax.run.resume import differences
from xtoken_jax.run.run_file import RUN_FILE, flat_differences, settings_of

_PATIENCE = 30.0  # seconds until what one host writes is seen by all


def agree(experiment: Experiment) -> None:
    """Refuse processes of one run that were not started alike, or do not see one folder.

    Raises:
        UserError: on all of them; what differs is named.
    """
    if jax.process_count() == 1:
        return
    agree_on_settings(experiment, {})
    run = Path(experiment.run_dir).expanduser().absolute()
    with contextlib.ExitStack() as stack:

        def leave() -> tuple[int, str]:
            levels, probe = _leave_probe(run)
            stack.callback(probe.discard)
            return levels, probe.partial.name

        levels, name = from_first(leave)
        probe = [run, *run.parents][levels] / name
        unseen = [index for index, seen in enumerate(gather(_appears(probe, name))) if not seen]
    if unseen:
        raise UserError(
            f"{run}: process {unseen[0]} does not see what process 0 writes there; run_dir must be a folder "
            "that all hosts share"
        )


def agree_on_settings(experiment: Experiment, options: Mapping[str, Any]) -> None:
    """Refuse processes that were not started alike.

    Args:
        experiment: its settings.
        options: further plain values, by what a user calls them.

    Raises:
        UserError: on all of them; what differs is named.
    """
    settings = gather(settings_of(experiment) | dict(options))
    for index, theirs in enumerate(settings):
        if different := differences(settings[0], theirs):
            first = different[0]
            raise UserError(
                f"{first.key}: {first.there} for process 0, {first.here} for process {index}; start all with "
                "the same command, but for hosts.index"
            )


def _leave_probe(run: Path) -> tuple[int, NewFile]:
    """Write a file into the run's folder, or into the nearest one above: how far above, and the file."""
    levels = next(n for n, folder in enumerate([run, *run.parents]) if folder.is_dir())
    folder = [run, *run.parents][levels]
    try:
        probe = NewFile(folder / RUN_FILE)
        probe.write(probe.partial.name.encode())
        probe.flush()
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another run_dir=..."
        ) from error
    return levels, probe


def _appears(path: Path, content: str) -> bool:
    """Whether a file of another host is here, in time: network file systems may be late."""
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            if path.read_text() == content:
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def agree_on(made_of: Mapping[str, str]) -> None:
    """Refuse processes whose copies of models or texts differ, by their `contents`.

    Raises:
        UserError: on all of them; names what differs.
    """
    every = gather(dict(made_of))
    for index, theirs in enumerate(every):
        if different := flat_differences(every[0], theirs):
            raise UserError(
                f"{different[0].key}: process {index} reads other content than process 0; give all hosts "
                "the same"
            )
