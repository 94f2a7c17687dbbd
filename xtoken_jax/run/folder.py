"""Whose a run's folder is: the settings and contents that it was begun with."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtoken_jax.distributed.checksum import checksum
from xtoken_jax.errors import UserError
from xtoken_jax.files import read_json, write_whole, writing
from xtoken_jax.files.folders import refuse_links
from xtoken_jax.files.new_files import partial_of, remove_partials
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.run.experiment import Experiment
from xtoken_jax.run.fingerprints import DAY
from xtoken_jax.run.report import RESULT_FILE
from xtoken_jax.run.resume import Difference, covers, differences
from xtoken_jax.run.run_file import (
    CHANGES,
    CONTENTS,
    ENDS,
    IDENTITY,
    RUN_FILE,
    SWEEP_FOLDER,
    TEMPLATE,
    flat_differences,
    read_run_file,
    settings_of,
)
from xtoken_jax.run.teachers import key_of
from xtoken_jax.teacher_cache.reader import read_index
from xtoken_jax.tokens.tokenizer import Tokenizer
from xtoken_jax.train.loop import CHECKPOINT_FOLDER

_NAMED = 3  # differences that an error names


def contents(
    models: Mapping[str, tuple[Model, Params | None, Tokenizer]],
    projections: Mapping[str, Projection],
    texts: Mapping[str, Mapping[str, str]],
) -> dict[str, str]:
    """What a run is made of besides its settings, as fingerprints that a change of content changes.

    Weights are compared by a checksum of the parameters as loaded: every one of them counts, at the cost of
    one pass over the devices' memory, and neither another split into files nor another mesh matters.

    Args:
        models: "student", "teacher", "teachers.NAME" -> the model, its parameters (None for random ones) and
            tokenizer.
        projections: each W that a loss reads, by its key in the config.
        texts: "train" and "validation" -> the digest of each of their sources by name.

    Returns:
        Key, such as student.weights or data.train.NAME -> fingerprint.
    """
    found = {}
    for side, (model, params, tokenizer) in models.items():
        config = json.dumps(model.config.to_hf(), sort_keys=True).encode()
        found[f"{side}.config"] = hashlib.sha256(config).hexdigest()[:16]
        if params is not None:
            found[f"{side}.weights"] = f"{checksum(params):08x}"
        found[f"{side}.tokenizer"] = tokenizer.file_fingerprint[:16]
    found |= {key: f"{checksum(projection):08x}" for key, projection in projections.items()}
    for part, sources in texts.items():
        found |= {f"data.{part}.{name}": digest for name, digest in sources.items()}
    return found


def day_of(run: Path, experiment: Experiment) -> str:
    """The date that a run's chat templates write: its first day's, also where it resumes.

    A run that reads a teacher cache takes the date that the cache was made with.

    Raises:
        UserError: a RUN_FILE or a cache that cannot be read.
    """
    made_of = (read_run_file(run / RUN_FILE).made_of or {}) if (run / RUN_FILE).is_file() else {}
    if DAY in made_of:
        return made_of[DAY]
    caches = [Path(t.cache).expanduser() for t in experiment.every_teacher().values() if t.cache is not None]
    for index in map(read_index, caches):
        if index is not None and DAY in index.made_of:
            return index.made_of[DAY]
    return datetime.date.today().isoformat()


def claim(
    run: Path, experiment: Experiment, made_of: Mapping[str, str], ends: Sequence[int] = ()
) -> list[Difference]:
    """Make the run's folder, or accept the one there if it holds this very experiment.

    Args:
        run: the folder.
        experiment: its settings; `resume.allow` says which differences are accepted.
        made_of: its `contents`.
        ends: ids of the tokens that end a text or a turn in its training text.

    Returns:
        The differences that were accepted. They are kept in the folder, whose settings and contents are
        then the new ones.

    Raises:
        UserError: it holds something else (what differs is named), or cannot be written.
    """
    mine = settings_of(experiment)
    path = run / RUN_FILE
    different: list[Difference] = []
    changes: list[str] = []
    identity = None
    remove_partials(run, lambda name: name == RUN_FILE)  # of starts that were killed
    if path.is_file():
        begun, there, identity, ends_there, changes = read_run_file(path)
        different = [*differences(settings_of(begun), mine), *flat_differences(there or made_of, made_of)]
        refused = [d for d in different if not covers(experiment.resume.allow, d.key)]
        if refused:
            keys = [d.key for d in refused]
            if len(keys) > _NAMED:
                keys = list(dict.fromkeys(key.split(".")[0] for key in keys))
            raise UserError(
                f"{run}: holds another run ({'; '.join(map(str, refused[:_NAMED]))}); choose another "
                f"run_dir=..., delete that folder, or go on all the same with resume.allow=[{','.join(keys)}]"
            )
        _keep_learnt(run, begun, experiment, {d.key for d in flat_differences(there or made_of, made_of)})
        if there is not None and identity is not None and ends_there == list(ends) and not different:
            _keep_template(run, experiment)
            return []
    elif run.exists() and not _is_new(run):
        raise UserError(f"{run}: exists and is not a run's folder; choose another run_dir=...")
    try:
        run.mkdir(parents=True, exist_ok=True)
        changes += [str(d) for d in different]
        settings = {key: value for key, value in mine.items() if key not in ("run_dir", "resume")}
        if identity is None:
            begun_with = json.dumps([settings, dict(made_of)], sort_keys=True)
            identity = hashlib.sha256(begun_with.encode()).hexdigest()[:16]
        content = settings | {IDENTITY: identity, ENDS: list(ends)}
        content |= {CONTENTS: dict(made_of)} | ({CHANGES: changes} if changes else {})
        write_whole(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"{run}: cannot be written ({error.strerror}); choose another run_dir=...") from error
    _keep_template(run, experiment)
    return different


def _is_new(run: Path) -> bool:
    """Whether nothing is there but a sweep's folder and what a start that was killed left."""
    if not run.is_dir():
        return False
    refuse_links(run)
    return all(path.name == SWEEP_FOLDER or partial_of(path.name) == RUN_FILE for path in run.iterdir())


def _keep_template(run: Path, experiment: Experiment) -> None:
    """Copy the student's chat template into the run's folder.

    Exports take the copy: a path in a run.json may be a stranger's, and name any file.
    """
    if experiment.student.chat_template is not None:
        template = Path(experiment.student.chat_template).expanduser().read_bytes()
        with writing(run / TEMPLATE):
            write_whole(run / TEMPLATE, template)


def _keep_learnt(run: Path, begun: Experiment, experiment: Experiment, changed: set[str]) -> None:
    """Refuse what a trained W in the run's checkpoints does not allow, whatever `resume.allow` says.

    Args:
        run: the folder.
        begun, experiment: the settings there and here.
        changed: keys of `contents` that are not what they were.
    """
    if not any(path.name.isdigit() for path in (run / CHECKPOINT_FOLDER).glob("*")):
        return
    teachers = experiment.every_teacher()
    for name, config in begun.every_teacher().items():
        if not config.loss.learn_projection:
            continue
        learn, w = (key_of(name, key) for key in ("loss.learn_projection", "projection"))
        held = f"{run}: its checkpoints hold a trained W and its moments"
        if name not in teachers or not teachers[name].loss.learn_projection:
            raise UserError(
                f"{held}, for which {learn}=false has no place; leave it true, or choose another run_dir=..."
            )
        if w in changed:
            raise UserError(
                f"{held}, which do not fit another {w}; put the one that it began with back, or choose "
                "another run_dir=..."
            )


def finished(run: Path, experiment: Experiment) -> dict[str, Any] | None:
    """What result.json says of a run with these very settings.

    Returns:
        Its content; None where the run has not ended, is another one, or has a broken result.json, which the
        run then writes again.
    """
    if not ((run / RUN_FILE).is_file() and (run / RESULT_FILE).is_file()):
        return None
    begun = read_run_file(run / RUN_FILE).experiment
    if differences(settings_of(begun), settings_of(experiment)):
        return None
    try:
        result: dict[str, Any] = read_json(run / RESULT_FILE, what="the result of a run")
    except UserError:
        return None
    return result if isinstance(result.get("figures"), dict) and result["figures"] else None
