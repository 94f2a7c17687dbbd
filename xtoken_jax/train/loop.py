"""Iterate, log, evaluate, save; leave when asked to, and go on from there."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from rich.console import Console

from xtoken_jax.data.batches import Batch, Batches, join_states
from xtoken_jax.distributed.mesh import place_rows
from xtoken_jax.distributed.processes import from_first, gather
from xtoken_jax.errors import NonFiniteOutputsError, UserError
from xtoken_jax.losses.total import LossTables
from xtoken_jax.models.decoder import Params
from xtoken_jax.models.lora import join_lora
from xtoken_jax.train.checkpoint import Checkpoints
from xtoken_jax.train.metrics import METRICS_FILE, MetricsLog, shown_figure
from xtoken_jax.train.non_finite import (
    UPDATE_REMEDY,
    NonFinite,
    NonFiniteLossError,
    RecordsOf,
    Skips,
    model_remedy,
)
from xtoken_jax.train.outputs import BadRows, Models
from xtoken_jax.train.progress import Bar
from xtoken_jax.train.signals import Stopped, StopSignals
from xtoken_jax.train.step import Metrics, Step, TrainState
from xtoken_jax.train.trackers import Trackers, WandbConfig, check_installed

CHECKPOINT_FOLDER = "checkpoints"
# What 0 means, or what to take instead.
_ZERO = {
    "evaluate_every": "; 0 evaluates at the start and at the end only",
    "save_every": "; 0 saves at the end only",
    "log_every": "; the last step is logged in any case",
}


@dataclass
class TrainConfig:
    """Length of a run, and how often it logs, evaluates and saves.

    Attributes:
        steps: optimizer steps.
        accumulate: micro-batches per step, to save memory; loss and gradient are those of the whole batch.
        log_every: steps between two lines of metrics.jsonl.
        evaluate_every: steps between two evaluations on the held-out data; 0 evaluates only at the start and
            at the end.
        save_every: steps between two checkpoints; 0 saves only at the end.
        keep: number of checkpoints to keep.
        seed: seed of a student's random weights, or of its adapters.
        non_finite: what follows a loss or gradient that is not finite: stop ends the run; skip leaves the
            parameters unchanged and takes the next batch.
        max_skips: steps in a row that may be skipped.
        tensorboard: also write the metrics for TensorBoard.
        wandb: also send the metrics to Weights & Biases.
    """

    steps: int = 5000
    accumulate: int = 1
    log_every: int = 10
    evaluate_every: int = 250
    save_every: int = 500
    keep: int = 2
    seed: int = 0
    non_finite: NonFinite = NonFinite.stop
    max_skips: int = 10
    tensorboard: bool = False
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        for name, least in (
            ("steps", 1), ("accumulate", 1), ("log_every", 1), ("evaluate_every", 0), ("save_every", 0),
            ("keep", 1), ("max_skips", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                zero = _ZERO.get(name, "")
                raise UserError(f"train.{name}={getattr(self, name)}: must be at least {least}{zero}")
        check_installed(self.tensorboard, self.wandb)

    def logged(self, number: Any) -> Any:
        """Whether a step, an int or an array of one, has a line in metrics.jsonl."""
        return (number % self.log_every == 0) | (number == self.steps)


def train(
    state: TrainState,
    abstract: TrainState,
    step: Step,
    batches: Batches,
    *,
    teacher_params: dict[str, Params],
    tables: dict[str, LossTables],
    evaluate: Callable[[Params], dict[str, float]] | None,
    config: TrainConfig,
    folder: Path,
    mesh: Mesh,
    title: str,
    console: Console,
    frozen: Params | None = None,
    records: RecordsOf | None = None,
    models: Models | None = None,
    stop: StopSignals | None = None,
    seconds_at_peak: float | None = None,
    settings: Mapping[str, Any] | None = None,
) -> TrainState:
    """Train to `config.steps`, from the newest checkpoint in `folder` if it holds one.

    Args:
        state: the state at step 0.
        abstract: its shapes and shardings, to restore into.
        step: the jitted step.
        batches: endless, of the rows that this process makes; its position is saved and restored.
        teacher_params, tables: by teacher.
        evaluate: student parameters -> named figures on the validation text; None where there is none.
        folder: gets metrics.jsonl, checkpoints/ and, after a loss that was not finite, non_finite.jsonl.
        title: of the progress bar.
        frozen: the student's parameters that do not train, as `split_lora` returns them.
        records: step, from 1 -> where the parts of each row of its batch come from, for non_finite.jsonl.
        models: student and teachers, to say whose outputs are not finite.
        stop: signals to leave at, with a checkpoint.
        seconds_at_peak: what a step would take if the devices did nothing but its models' arithmetic, at
            their peak; None where that is not known.
        settings: of the experiment, to show beside the metrics.

    Returns:
        The last state.

    Raises:
        NonFiniteLossError: names the step and the last good checkpoint.
        Stopped: a signal came; the state is saved.
        UserError: a folder that cannot be written, or no checkpoint that can be read.
    """
    stop = StopSignals() if stop is None else stop
    with Checkpoints(folder / CHECKPOINT_FOLDER, keep=config.keep, frozen=frozen) as checkpoints:
        found = checkpoints.restore_latest(
            abstract, lambda line: console.print(f"warning  {line}", markup=False, style="yellow")
        )
        skipped = 0, 0
        if found is not None:
            restored, beside = found
            # A W that began to train since then is still as it starts.
            state = replace(restored, projections={**state.projections, **restored.projections})
            batches.set_state(beside["position"])
            skipped = beside["skips"]
            console.print(f"{title}: goes on from step {int(state.step)}", markup=False, style="dim")
        first = int(state.step)
        log = MetricsLog(folder / METRICS_FILE, first)
        for line in log.faults:
            console.print(f"warning  {line}", markup=False, style="yellow")
        skips = Skips(folder, first, config.non_finite, config.max_skips, records, *skipped, models)

        def due(number: int, every: int) -> bool:
            return number == config.steps or (every > 0 and number % every == 0)

        started, tokens = time.perf_counter(), 0
        trackers = Trackers(
            folder,
            log.kept,
            tensorboard=config.tensorboard,
            wandb=config.wandb,
            title=title,
            settings=settings,
        )
        bar = Bar(console, title, config.steps, completed=first, hidden=first >= config.steps)
        with trackers, bar, stop.held():

            def write(number: int, values: dict[str, Any]) -> None:
                log.write(number, values)
                trackers.write(number, values)

            def evaluate_at(number: int) -> None:
                nonlocal started
                if evaluate is None:
                    return
                begun = time.perf_counter()
                bar.update(completed=number, shown="evaluating")
                with stop.at_once():
                    try:
                        figures = evaluate(join_lora(state.params, frozen))
                    except NonFiniteOutputsError as error:
                        raise ended(
                            _untrained(error, models) if number == 0 else _diverged(error, number)
                        ) from error
                write(number, {"validation": figures})
                bar.line(_shown_figures(figures))
                bar.update(shown=shown)
                started += time.perf_counter() - begun  # tokens per second are those of training

            def ended(fault: str) -> NonFiniteLossError:
                checkpoints.wait()
                good = checkpoints.latest
                kept = (
                    "there is no checkpoint yet"
                    if good is None
                    else f"the last good checkpoint is {checkpoints.path(good)}"
                )
                return NonFiniteLossError(f"{fault}; {kept}")

            def bad_rows(models: Models, batch: Batch) -> BadRows:
                return models.bad_rows(state.params, frozen, teacher_params, batch)

            def look_at(number: int, metrics: Metrics, batch: Batch) -> None:
                """Each step's metrics, once, as soon as they are there."""
                if fault := skips.look_at(number, metrics, partial(bad_rows, batch=batch)):
                    raise ended(fault)

            shown = ""
            # One that a signal broke off is made up for.
            evaluated = from_first(
                lambda: any(row["step"] == first and "validation" in row for row in log.kept)
            )
            if not evaluated and (first == 0 or due(first, config.evaluate_every)):
                evaluate_at(first)
            pending: tuple[int, Metrics, Batch] | None = None
            warned = False
            for number in range(first + 1, config.steps + 1):
                own: Batch = next(batches)
                batch: Batch = place_rows(own, mesh)
                # of several processes, each counts its own rows and takes the others' for alike
                tokens += int(own.student.mask.sum()) * len(batch.student.mask) // len(own.student.mask)
                if number == first + 1:
                    bar.begin("compiling the step")
                state, metrics = step(state, teacher_params, tables, batch, frozen)
                if number == first + 1:
                    bar.update(completed=number, shown="")
                # The step before has ended by now: reading its metrics does not hold up this one.
                if pending is not None:
                    look_at(*pending)
                pending = number, metrics, batch
                if config.logged(number):
                    look_at(*pending)
                    pending = None
                    values = {name: float(value) for name, value in metrics.items() if name != "finite"}
                    elapsed = time.perf_counter() - started
                    rate = tokens / elapsed
                    speed: dict[str, float] = {"tokens_per_second": round(rate)}
                    if seconds_at_peak is not None:
                        speed["flops_utilization"] = seconds_at_peak * (number - first) / elapsed
                    write(number, {**values, **skips.counted(), **speed})
                    checkpoints.check()
                    if values.get("kd_scale_capped") and not warned:
                        warned = True
                        console.print(_capped(number, values), style="yellow")
                    parts = [f"{k} {values[k]:.3f}" for k in ("ce", "kd") if k in values]
                    shown = "  ".join([*parts, f"{rate:,.0f} tokens/s"])
                    bar.line(shown, completed=number)
                    bar.update(completed=number, shown=shown)
                if due(number, config.evaluate_every):
                    with contextlib.suppress(Stopped):
                        evaluate_at(number)
                leaving = stop.agreed(now=number == config.steps)
                if due(number, config.save_every) or leaving:
                    if pending is not None:
                        look_at(*pending)
                        pending = None
                    log.sync()
                    states = gather(batches.get_state())
                    position = join_states(states) if len(states) > 1 else states[0]
                    beside = {"position": position, "skips": [skips.total, skips.streak]}
                    checkpoints.save(number, state, beside)
                    bar.line(f"saving {checkpoints.path(number)}", completed=number)
                if leaving:
                    checkpoints.wait()
                    raise Stopped(
                        leaving,
                        f"step {number} of {config.steps} is saved in {checkpoints.path(number)}; "
                        "the same command goes on from there",
                    )
    return state


def _shown_figures(figures: Mapping[str, float]) -> str:
    """Held-out figures by name, for a line."""
    return "  ".join(f"{name} {shown_figure(name, value)}" for name, value in figures.items())


def _untrained(error: NonFiniteOutputsError, models: Models | None) -> str:
    remedy = UPDATE_REMEDY if models is None else model_remedy("student", models.student)
    return f"before any training, {error}; {remedy}"


def _diverged(error: NonFiniteOutputsError, number: int) -> str:
    return f"after step {number}, {error}; {UPDATE_REMEDY}"


def _capped(number: int, values: dict[str, float]) -> str:
    how = "below 0" if values["kd"] < 0 else "small"
    return (
        f"warning  step {number}: the distillation term is {how}, {values['kd']:.4g} beside a cross-entropy "
        f"of {values['ce']:.4g}: its factor is held at {values['kd_scale']:.4g}. kd_scale_capped in the "
        "metrics says how often; loss.max_scale is the bound, loss.dynamic_scaling=false takes fixed weights"
    )
