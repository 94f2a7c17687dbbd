"""A run's folder: whose it is, and what can be taken out of it."""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xtoken_jax.cache_contents import DAY
from xtoken_jax.checksum import checksum
from xtoken_jax.config import Experiment
from xtoken_jax.data.teacher_cache import read_index
from xtoken_jax.errors import UserError
from xtoken_jax.export import SOURCE, check_replaceable, export_hf
from xtoken_jax.files import partial_path, read_json, write_whole
from xtoken_jax.hosts import from_first, gather
from xtoken_jax.hub import resolve_folder
from xtoken_jax.mesh import single_device_mesh
from xtoken_jax.models.config import read_config
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.hf_saving import MAX_SHARD_SIZE
from xtoken_jax.models.hf_side_files import side_files
from xtoken_jax.models.load import open_model
from xtoken_jax.models.lora import join_lora, split_lora
from xtoken_jax.projection.matrix import Projection
from xtoken_jax.report import RESULT_FILE
from xtoken_jax.resume import Difference, covers, differences
from xtoken_jax.teachers import key_of
from xtoken_jax.tokens.backend import make_backend, read_definition
from xtoken_jax.tokens.tokenizer import Tokenizer
from xtoken_jax.train.checkpoint import Checkpoints
from xtoken_jax.train.learnt import abstract_learnt, make_projection_optimizer
from xtoken_jax.train.loop import CHECKPOINT_FOLDER
from xtoken_jax.train.optimizer import make_optimizer
from xtoken_jax.train.step import abstract_state

RUN_FILE = "run.json"  # the settings, and beside them:
CONTENTS = "contents"
SWEEP_FOLDER = "sweep"  # of runs that were swept from the same name; not of this one
IDENTITY = "id"  # hash of the settings and contents that it began with; exported folders name it
ENDS = "ends"  # ids of the tokens that end a text or a turn in the training text
CHANGES = "changes"  # what differed, one line each, where a run went on all the same
_PATIENCE = 30.0  # seconds until what one host writes is seen by all
_NAMED = 3  # differences that an error names


def agree(experiment: Experiment) -> None:
    """Refuse processes of one run that were not started alike, or do not see one folder.

    Raises:
        UserError: on all of them; what differs is named.
    """
    if jax.process_count() == 1:
        return
    agree_on_settings(experiment, {})
    run = Path(experiment.run_dir).expanduser().absolute()
    levels, content = from_first(lambda: _leave_probe(run))
    probe = partial_path([run, *run.parents][levels] / RUN_FILE)
    unseen = [index for index, seen in enumerate(gather(_appears(probe, content))) if not seen]
    from_first(lambda: probe.unlink())
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
    settings = gather(_settings(experiment) | dict(options))
    for index, theirs in enumerate(settings):
        if different := differences(settings[0], theirs):
            first = different[0]
            raise UserError(
                f"{first.key}: {first.there} for process 0, {first.here} for process {index}; start all with "
                "the same command, but for hosts.index"
            )


def _settings(experiment: Experiment) -> dict[str, Any]:
    """All that has to be the same in every process."""
    return {key: value for key, value in experiment.to_dict().items() if key != "hosts"}


def _leave_probe(run: Path) -> tuple[int, str]:
    """A file in the run's folder, or in the nearest above it: how far above, and what it holds."""
    levels = next(n for n, folder in enumerate([run, *run.parents]) if folder.is_dir())
    path, content = partial_path([run, *run.parents][levels] / RUN_FILE), secrets.token_hex(8)
    try:
        path.write_text(content)
    except OSError as error:
        raise UserError(
            f"{path.parent}: cannot be written ({error.strerror}); choose another run_dir=..."
        ) from error
    return levels, content


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
        if different := _flat_differences(every[0], theirs):
            raise UserError(
                f"{different[0].key}: process {index} reads other content than process 0; give all hosts "
                "the same"
            )


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


class _RunFile(NamedTuple):
    """Content of a run's RUN_FILE: settings, contents, identity, ends and changes."""

    experiment: Experiment
    made_of: dict[str, str] | None
    identity: str | None
    ends: list[int]
    changes: list[str]


def day_of(run: Path, experiment: Experiment) -> str:
    """The date that a run's chat templates write: its first day's, also where it resumes.

    A run that reads a teacher cache takes the date that the cache was made with.

    Raises:
        UserError: a RUN_FILE or a cache that cannot be read.
    """
    made_of = (_read(run / RUN_FILE).made_of or {}) if (run / RUN_FILE).is_file() else {}
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
    mine = _settings(experiment)
    path = run / RUN_FILE
    different: list[Difference] = []
    changes: list[str] = []
    identity = None
    if path.is_file():
        begun, there, identity, ends_there, changes = _read(path)
        different = [*differences(_settings(begun), mine), *_flat_differences(there or made_of, made_of)]
        refused = [d for d in different if not covers(experiment.resume.allow, d.key)]
        if refused:
            keys = [d.key for d in refused]
            if len(keys) > _NAMED:
                keys = list(dict.fromkeys(key.split(".")[0] for key in keys))
            raise UserError(
                f"{run}: holds another run ({'; '.join(map(str, refused[:_NAMED]))}); choose another "
                f"run_dir=..., delete that folder, or go on all the same with resume.allow=[{','.join(keys)}]"
            )
        _keep_learnt(run, begun, experiment, {d.key for d in _flat_differences(there or made_of, made_of)})
        if there is not None and identity is not None and ends_there == list(ends) and not different:
            return []
    elif run.exists() and (not run.is_dir() or set(run.iterdir()) - {partial_path(path), run / SWEEP_FOLDER}):
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
    return different


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
    """What result.json says of a run with these very settings; None where it has not ended, or is another."""
    if not ((run / RUN_FILE).is_file() and (run / RESULT_FILE).is_file()):
        return None
    begun = _read(run / RUN_FILE).experiment
    different = differences(_settings(begun), _settings(experiment))
    return None if different else _read_object(run / RESULT_FILE)


def _flat_differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[Difference]:
    keys = dict.fromkeys([*there, *here])
    return [Difference(k, there.get(k), here.get(k)) for k in keys if there.get(k) != here.get(k)]


def _read_object(path: Path) -> dict[str, Any]:
    return read_json(path, what="the file of a run", remedy="choose another run_dir=...")


def _read(path: Path) -> _RunFile:
    """Read a RUN_FILE; a setting that came up after the run began has its default."""
    found = _read_object(path)
    made_of, changes = found.pop(CONTENTS, None), found.pop(CHANGES, [])
    identity, ends = found.pop(IDENTITY, None), found.pop(ENDS, [])
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Experiment), found)
        return _RunFile(cast(Experiment, OmegaConf.to_object(typed)), made_of, identity, ends, changes)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or path.name
        raise UserError(
            f"{path}: {key} is no setting of this version of xtoken; choose another run_dir=..."
        ) from error


def _read_run(run: Path) -> _RunFile:
    path = run / RUN_FILE
    if not path.is_file():
        raise UserError(f"{run}: not a run's folder, it has no {RUN_FILE}")
    return _read(path)


def folders_to_keep(run: Path, experiment: Experiment) -> list[Path]:
    """Folders that no export of the run may replace: its own, its teachers' and their caches."""
    teachers = experiment.every_teacher().values()
    paths = [path for teacher in teachers for path in (teacher.path, teacher.cache) if path is not None]
    return [run, *(place for path in paths if (place := Path(path).expanduser()).is_dir())]


def export_student(
    run: Path,
    out: Path,
    student: Model,
    params: Params,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> str | None:
    """Write a run's student as a Hugging Face folder, in the memory of `params`.

    Args:
        run: the run's folder.
        out: the folder to write.
        student, params: the model; of several processes, all must call this.
        dtype, max_shard_size, overwrite: as in `export_hf`; None for the run's export_dtype.

    Returns:
        A line about the tokens that were added to `eos_token_id`; None where none was.

    Raises:
        UserError: what `export_hf` refuses.
    """
    begun = _read_run(run)
    config = begun.experiment.student
    dtype = begun.experiment.export_dtype.value if dtype is None else dtype
    folder = resolve_folder(str(config.path), weights=dtype == SOURCE)
    export_hf(
        out, student, params, folder,
        dtype=dtype, max_shard_size=max_shard_size, donate=True, chat_template=config.chat_template,
        ends=begun.ends, run=begun.identity, overwrite=overwrite,
        keep=folders_to_keep(run, begun.experiment),
    )  # fmt: skip
    _, added = side_files(folder, student.config.to_hf(), begun.ends, config.chat_template)
    if not added:
        return None
    path = folder / "tokenizer.json"
    spelled = make_backend(read_definition(path)[0], path)
    names = ", ".join(f"{spelled.id_to_token(end)} ({end})" for end in added)
    return f"{names} ends what the student learnt to write; added to eos_token_id of the exported folder"


def export_checkpoint(
    run: Path,
    step: int | None,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> tuple[int, str | None]:
    """Write the student of a run's checkpoint as a Hugging Face folder.

    Args:
        run: the run's folder.
        step: which checkpoint; None for the newest.
        out: the folder to write.
        dtype: of the stored weights, as `export_hf` takes it; None for the run's export_dtype.
        max_shard_size: bytes of weights in a file, a number or such as "5GB".
        overwrite: also replace a folder that is not an earlier export of this run.

    Returns:
        The step that was written, and the line that `export_student` returns.

    Raises:
        UserError: no run there, no such checkpoint, or a folder that cannot be written.
    """
    begun = _read_run(run)
    experiment = begun.experiment
    folder = resolve_folder(str(experiment.student.path), weights=dtype == SOURCE)
    keep = folders_to_keep(run, experiment)
    check_replaceable(out, folder, run=begun.identity, overwrite=overwrite, keep=keep)
    mesh = single_device_mesh()
    student, frozen = Model(read_config(folder)), {}
    if experiment.student.lora.rank:  # the checkpoint holds the adapters alone
        student, params = open_model(experiment.student, 0, mesh=mesh, key=jax.random.key(0))
        frozen = split_lora(params)[1]
    optimizer = make_optimizer(experiment.optimizer, experiment.train.steps)
    if not (run / CHECKPOINT_FOLDER).is_dir():
        raise UserError(f"{run}: holds no checkpoint yet")
    with Checkpoints(run / CHECKPOINT_FOLDER, frozen=frozen, read_only=True) as checkpoints:
        found = checkpoints.latest if step is None else step
        if found is None:
            raise UserError(f"{run}: holds no checkpoint yet")
        of_projections = make_projection_optimizer(experiment.optimizer)
        learnt = abstract_learnt(checkpoints.projection_shapes(found), of_projections, mesh)
        state, _ = checkpoints.restore(found, abstract_state(student, optimizer, mesh, learnt))
    params = join_lora(state.params, frozen)
    added = export_student(
        run, out, student, params, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite
    )
    return found, added
