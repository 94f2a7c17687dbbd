"""run.json: what a run's folder says of the run. It may come from a stranger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xtoken_jax.errors import UserError, printable
from xtoken_jax.files import read_json
from xtoken_jax.files.fields import TEXT, check_fields, listing, mapping, optional, whole
from xtoken_jax.files.folders import refuse_links
from xtoken_jax.run.experiment import Experiment, strings_in
from xtoken_jax.run.resume import Difference

RUN_FILE = "run.json"  # the settings, and beside them:
CONTENTS = "contents"
IDENTITY = "id"  # hash of the settings and contents that it began with; exported folders name it
ENDS = "ends"  # ids of the tokens that end a text or a turn in the training text
CHANGES = "changes"  # what differed, one line each, where a run went on all the same
SWEEP_FOLDER = "sweep"  # of runs that were swept from the same name; not of this one
TEMPLATE = "chat_template.jinja"  # copy of student.chat_template, which exports take
_REMEDY = "choose another run_dir=..."
_DEEPEST = 12  # objects and lists within each other; settings have 6
_OWN = {
    CONTENTS: optional(mapping(TEXT)),
    IDENTITY: optional(TEXT),
    ENDS: optional(listing(whole(0, 2**31), 10_000)),
    CHANGES: optional(listing(TEXT, 100_000)),
}


class RunFile(NamedTuple):
    """Content of a run's RUN_FILE: settings, contents, identity, ends and changes."""

    experiment: Experiment
    made_of: dict[str, str] | None
    identity: str | None
    ends: list[int]
    changes: list[str]


def read_run(run: Path) -> RunFile:
    """Read the RUN_FILE of a run's folder.

    Raises:
        UserError: no run there, or one whose settings make no sense.
    """
    path = run / RUN_FILE
    if not path.is_file():
        raise UserError(f"{run}: not a run's folder, it has no {RUN_FILE}")
    begun = read_run_file(path)
    try:
        begun.experiment.validate()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return begun


def read_run_file(path: Path) -> RunFile:
    """Read a RUN_FILE; a setting that came up after the run began has its default.

    Its strings stand for themselves: none is looked up in the environment, and none leads out of the folder.

    Raises:
        UserError: the file cannot be read or is not one of a run, or a link leads out of its folder.
    """
    refuse_links(path.parent)
    content = read_json(path, what="the file of a run", remedy=_REMEDY, max_depth=_DEEPEST)
    refuse_references(content, path)
    check_fields(content, _OWN, str(path), remedy=_REMEDY)
    made_of, identity, ends, changes = (content.pop(key, None) for key in _OWN)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Experiment), content)
        experiment = cast(Experiment, OmegaConf.to_object(typed))
        experiment.to_dict()  # which checks what a merge lets pass
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError, KeyError) as error:
        key = printable(str(getattr(error, "full_key", None) or path.name))[:100]
        raise UserError(f"{path}: {key} is no setting of this version of xtoken; {_REMEDY}") from error
    return RunFile(experiment, made_of, identity, ends or [], changes or [])


def refuse_references(content: Mapping[str, Any], path: Path) -> None:
    """Refuse settings in which a string would be looked up, such as ${oc.env:NAME}.

    Raises:
        UserError: names the key.
    """
    for key, text in strings_in(content):
        if "${" in text:
            raise UserError(
                f"{path}: {key} holds ${{...}}, which a run's file may not look up; write the value, or "
                f"{_REMEDY}"
            )


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """All settings that have to be the same in every process."""
    return {key: value for key, value in experiment.to_dict().items() if key != "hosts"}


def flat_differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[Difference]:
    """Differences between two tables of `contents`."""
    keys = dict.fromkeys([*there, *here])
    return [Difference(k, there.get(k), here.get(k)) for k in keys if there.get(k) != here.get(k)]
