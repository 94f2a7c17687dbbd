"""Many runs from one command: Hydra's sweepers choose them, its launchers start them, each is resumable."""

from __future__ import annotations

import importlib.util
import itertools
import math
import secrets
import time
import traceback
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xtoken_jax.display.terminal import Terminal
from xtoken_jax.errors import UserError, printable
from xtoken_jax.files import to_json, write_whole
from xtoken_jax.files.folders import refuse_links
from xtoken_jax.run.experiment import (
    CONFIG_FOLDER,
    Experiment,
    checked_words,
    experiment_of,
    load_experiment,
    one_line,
)
from xtoken_jax.run.folder import finished
from xtoken_jax.run.ranking import JOB_FILE, Job, read_jobs
from xtoken_jax.run.run_file import SWEEP_FOLDER
from xtoken_jax.run.words import NOT_MEASURED

_HYDRA_FOLDER = "hydra"  # Hydra's own files, and the logs of a scheduler
_LONGEST = 120  # characters of a job's folder
# What these words of Hydra's choose -> the module that must be there, and the extra that brings it.
_PLUGINS = {
    "hydra/launcher=submitit": ("hydra_plugins.hydra_submitit_launcher", "submitit"),
    "hydra/sweeper=optuna": ("hydra_plugins.hydra_optuna_sweeper", "optuna"),
}


def run_sweep(words: Sequence[str], *, quiet: bool = False) -> tuple[Path, list[Job]]:
    """Run `xtoken distill -m`.

    Args:
        words: as on the command line, with commas or Hydra's functions where a key is swept, and Hydra's own
            settings, such as hydra/launcher=submitit_slurm.
        quiet: whether jobs write to stderr and leave stdout to the caller.

    Returns:
        The sweep's folder, and the jobs that this command ran or found finished.

    Raises:
        UserError: a word that makes no sense, or a sweeper that gave up. A job that fails is no error: it is
            told, and the others go on.
    """
    for start, (module, extra) in _PLUGINS.items():
        if any(word.startswith(start) for word in words) and not _installed(module):
            raise UserError(f"{start}: not installed; pip install 'xtoken-jax[{extra}]'")
    words = checked_words(words, sweep=True)
    try:
        fixed, _ = _parted(words)
        base = _composed(fixed, validate=False)
        folder = _folder(base)
        if not base.data.measured and any(word.startswith("hydra/sweeper") for word in words):
            raise UserError(f"{NOT_MEASURED}: a search needs held-out figures; leave one of the two out")
        if folder.parent.is_dir():
            refuse_links(folder.parent)
        number = secrets.token_hex(4)
        keys = {_key(word) for word in fixed}
        job = partial(run_job, folder=folder, fixed=keys, sweep=number, quiet=quiet)
        with initialize_config_dir(str(CONFIG_FOLDER.resolve()), version_base="1.3"):
            hydra = GlobalHydra.instance().hydra
            assert hydra is not None
            settings = [*_settings(folder, base, words), *words]
            hydra.multirun("distill", job, settings, with_log_configuration=False)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error
    return folder, [job for job in read_jobs(folder) if job.sweep == number]


def _parted(words: Sequence[str]) -> tuple[list[str], list[Override]]:
    """The words with a single value, and those with several; Hydra's own settings are in neither."""
    own = [word for word in words if not word.startswith("hydra")]
    parsed = OverridesParser.create().parse_overrides(own)
    swept = {_key(word): found for word, found in zip(own, parsed, strict=True) if found.is_sweep_override()}
    return [word for word in own if _key(word) not in swept], [*swept.values()]


def _folder(base: Experiment) -> Path:
    return Path(base.run_dir).expanduser().resolve() / SWEEP_FOLDER


def _composed(words: Sequence[str], *, validate: bool = True) -> Experiment:
    with initialize_config_dir(str(CONFIG_FOLDER.resolve()), version_base="1.3"):
        return experiment_of(compose("distill", overrides=list(words)), validate=validate)


def _settings(folder: Path, base: Experiment, words: Sequence[str]) -> list[str]:
    """What Hydra is told of a sweep, unless the command says otherwise."""
    own = str(folder / _HYDRA_FOLDER).replace("'", "\\'")
    settings = [f"hydra.sweep.dir='{own}'", "hydra.output_subdir=null"]
    settings += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    if any(word.startswith("hydra/sweeper=optuna") for word in words):
        direction = "maximize" if base.sweep_rises() else "minimize"
        settings += [f"hydra.sweeper.direction={direction}", "hydra.sweeper.max_failure_rate=1.0"]
    named = {_key(word) for word in words}
    return [word for word in settings if _key(word) not in named]


def run_job(
    config: DictConfig, *, folder: Path, fixed: set[str], sweep: str, quiet: bool = False
) -> float | None:
    """One job, in whatever process Hydra's launcher put it.

    Returns:
        The figure that the sweep is after; None if the job failed.
    """
    from xtoken_jax.run.distill import distill
    from xtoken_jax.train.signals import Stopped, StopSignals

    console = Terminal(stderr=quiet)
    # Of a key that is given twice, the last value holds.
    last = {_key(word): word.lstrip("+") for word in HydraConfig.get().overrides.task}
    overrides = [word for key, word in last.items() if key not in fixed]
    run = folder / _name(overrides)
    console.print(run.name, style="bold")
    job = Job(run, overrides, sweep, "running")
    begun = time.perf_counter()
    try:
        OmegaConf.update(config, "run_dir", str(run), force_add=True)
        experiment = experiment_of(config)
        result = finished(run, experiment)
        if result is None:
            _write(job)
            with StopSignals() as stop:
                distill(experiment, console, stop)
            result = finished(run, experiment)
            assert result is not None
        else:
            console.print("finished before", style="dim")
        *_, figures = result["figures"].values()
        name = experiment.sweep.metric or next(iter(figures), None)
        if name is None:
            _write(replace(job, status="finished", loss=result["loss"]))
            return None
        if name not in figures:
            raise UserError(f"sweep.metric={name}: no such held-out figure; there is {', '.join(figures)}")
        _write(replace(job, status="finished", loss=result["loss"], figures=figures, metric=name))
        return math.nan if figures[name] is None else figures[name]
    except Stopped:
        _write(replace(job, status="stopped"))
        raise
    except Exception as error:  # whatever it is, the other jobs are not to suffer
        first = printable((str(error).strip().splitlines() or [""])[0])
        told = first if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {first}"
        console.print(f"failed   {told}", markup=False, style="red")
        _write(replace(job, status="failed", error=told))
        if not isinstance(error, UserError | OSError):
            console.print(traceback.format_exc(), markup=False, style="dim")
        return None
    finally:
        _forget_programs()
        console.print(f"{time.perf_counter() - begun:.0f} s", style="dim")


def _write(job: Job) -> None:
    """Beside the run's folder, which is the run's own."""
    path = job.folder.with_name(job.folder.name + JOB_FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, to_json(job.to_dict(), indent=2) + "\n")


def _forget_programs() -> None:
    """The compiled programs of one job are of no use to the next."""
    import jax

    jax.clear_caches()


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _name(overrides: Sequence[str]) -> str:
    """A job's folder: what it is swept to; a checksum tells apart what is too long or has other signs."""
    whole = ",".join(overrides) or "all"
    plain = "".join(c if c.isalnum() or c in "=,.-_+" else "_" for c in whole)
    if plain == whole and len(plain) <= _LONGEST:
        return plain
    return f"{plain[: _LONGEST - 9]}-{zlib.crc32(whole.encode()):08x}"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def dump(words: Sequence[str], *, sweep: bool = False) -> str:
    """The composed experiment as YAML; of a sweep, a document for each job.

    Of a search, whose values Hydra's sweeper chooses as it goes, it is one document without the keys that are
    searched, which a comment names. Hydra's own settings are not part of an experiment and are not looked at:
    neither launcher nor sweeper has to be installed.

    Raises:
        UserError: as in `load_experiment`, in any of the jobs.
    """
    if not sweep:
        return _yaml(load_experiment(words))
    try:
        fixed, swept = _parted(checked_words(words, sweep=True))
        if not all(found.is_discrete_sweep() for found in swept):
            searched = ", ".join(str(found.input_line).lstrip("+") for found in swept)
            return f"# searched: {searched}\n{_yaml(_composed(fixed))}"
        values = [
            [f"{str(found.input_line).partition('=')[0]}={value}" for value in found.sweep_string_iterator()]
            for found in swept
        ]
        folder = _folder(_composed(fixed, validate=False))
        documents = [_document(folder, fixed, job) for job in itertools.product(*values)]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(one_line(error)) from error
    return "---\n".join(documents)


def _document(folder: Path, fixed: Sequence[str], job: Sequence[str]) -> str:
    """The settings of one job of the sweep in `folder`."""
    experiment = _composed([*fixed, *job])
    experiment.run_dir = str(folder / _name([word.lstrip("+") for word in job]))
    return _yaml(experiment)


def _yaml(experiment: Experiment) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(experiment.to_dict()))
