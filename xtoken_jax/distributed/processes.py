"""Several processes as one run: how they find one another, agree on small things, and end together."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from xtoken_jax.distributed.heartbeat import Lifeline
from xtoken_jax.errors import UserError, printable

_ADDRESS = "JAX_COORDINATOR_ADDRESS"
_SLICE = 1000  # milliseconds of waiting without a look at signals
_rounds = itertools.count()  # each exchange has a name of its own, the same on all
_said: deque[str] = deque()  # by this process to `gather`, and still there

T = TypeVar("T")


@dataclass
class HostsConfig:
    """The processes of a run, one for each host or for each device; by default one process.

    Attributes:
        auto: find all processes as `jax.distributed.initialize()` does: on TPU slices, under Slurm, Open MPI
            and Kubernetes.
        coordinator: HOST:PORT of process 0, as the others reach it; null for $JAX_COORDINATOR_ADDRESS.
        count: number of processes.
        index: number of this process, from 0; the only key that differs between processes.
        wait: seconds in which all processes must have started.
        lost_after: seconds without a sign of life after which a process counts as lost and the others end.
    """

    auto: bool = False
    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    wait: int = 300
    lost_after: int = 100

    @property
    def several(self) -> bool:
        """Whether the run has more than this process."""
        return self.auto or self.count is not None

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        for name, least in (("wait", 1), ("lost_after", 3)):
            if getattr(self, name) < least:
                raise UserError(f"hosts.{name}={getattr(self, name)}: must be at least {least} seconds")
        named = {name: getattr(self, name) for name in ("coordinator", "count", "index")}
        given = [name for name, value in named.items() if value is not None]
        if self.auto:
            if given:
                raise UserError(
                    f"hosts.{given[0]} with hosts.auto=true, which finds it out; give one of both"
                )
            return
        if not given:
            return
        missing = [name for name in ("count", "index") if named[name] is None]
        if self.coordinator is None and _ADDRESS not in os.environ:
            missing.append("coordinator")
        if missing:
            raise UserError(
                f"hosts.{missing[0]}: not given, but hosts.{given[0]} is; name hosts.coordinator=HOST:PORT, "
                "hosts.count and, for each process its own, hosts.index, or leave it to hosts=auto"
            )
        assert self.count is not None
        assert self.index is not None
        if not 0 <= self.index < self.count:
            raise UserError(f"hosts.index={self.index}: must be from 0 to hosts.count - 1 = {self.count - 1}")
        address = self.coordinator or os.environ[_ADDRESS]
        if not address.rpartition(":")[0] or not address.rpartition(":")[2].isdigit():
            raise UserError(f"hosts.coordinator={address}: not of the form HOST:PORT")


@contextlib.contextmanager
def joined(config: HostsConfig) -> Iterator[None]:
    """Within, this process is one of the run's; to be entered before jax has touched a device.

    Where it ends with an error, all processes end: this one says what it was, the others name it. With
    several processes that is an exit at once, and nothing is raised. Alone, it does nothing.

    Raises:
        UserError: the others are not there in time, or jax finds no cluster.
    """
    if not config.several:
        yield
        return
    _connect(config)
    lifeline = Lifeline(_board(), jax.process_index(), jax.process_count(), config.lost_after)
    try:
        yield
        gather(None)
    except (UserError, OSError) as error:
        lifeline.end(2, printable(str(error)))
    except KeyboardInterrupt as interrupt:
        lifeline.end(getattr(interrupt, "code", 130), str(interrupt) or "interrupted")
    except BaseException as error:
        lines = (str(error) or "no message").splitlines()
        of_jax = isinstance(error, jax.errors.JaxRuntimeError)
        if not of_jax:
            print(printable(traceback.format_exc()), file=sys.stderr)
        lifeline.end(1, printable(f"{type(error).__name__}: {lines[0]}"), of_jax=of_jax)
    lifeline.close()
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """A small plain value, as JSON has them, of every process, in their order; all must ask."""
    if jax.process_count() == 1:
        return [value]
    name = f"xtoken_said/{next(_rounds)}/"
    _said.append(f"{name}{jax.process_index()}")
    _board().key_value_set(_said[-1], json.dumps(value))
    found = [_wait_for(f"{name}{i}") for i in range(jax.process_count())]
    if len(_said) > 1:  # all have read what was said before, or they would not be here
        _board().key_value_delete(_said.popleft())
    return found


def from_first(action: Callable[[], T]) -> T:
    """What process 0 alone does, and all wait for; what it returns, a small plain value, all return."""
    if jax.process_count() == 1:
        return action()
    name = f"xtoken_said/{next(_rounds)}"
    if is_first():
        value = action()
        _board().key_value_set(name, json.dumps(value))
        return value
    found: T = _wait_for(name)
    return found


def gather_bytes(content: bytes) -> list[bytes]:
    """What every process has, of any length, in their order; over the devices, and all must ask."""
    if jax.process_count() == 1:
        return [content]
    sizes = gather(len(content))
    # Few lengths, each of which is a program.
    padded = np.zeros(1 << max(sizes).bit_length(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    every = multihost_utils.process_allgather(padded)
    return [row[:size].tobytes() for row, size in zip(every, sizes, strict=True)]


def largest(number: int) -> jax.Array:
    """The largest of all processes' numbers, an int32 scalar that need not be there yet; all must ask."""
    flags, reduce = _reduction()
    return reduce(
        jax.make_array_from_callback((jax.device_count(),), flags, lambda _: np.array([number], np.int32))
    )


@functools.cache
def _reduction() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("all")), jax.jit(jnp.max, out_shardings=everywhere)


def _wait_for(name: str) -> Any:
    """What a process has said or will say; one that is lost is noticed elsewhere."""
    while True:
        try:
            return json.loads(_board().blocking_key_value_get(name, _SLICE))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _board() -> Any:
    """The key-value store behind jax.distributed, for which jax has no public name."""
    return jax._src.distributed.global_state.client


def _connect(config: HostsConfig) -> None:
    # xtoken saves on SIGTERM itself, on all processes at the same step
    jax.config.update("jax_enable_preemption_service", False)
    found: dict[str, Any] = {}
    if not config.auto:
        found = {
            "coordinator_address": config.coordinator,
            "num_processes": config.count,
            "process_id": config.index,
            "cluster_detection_method": "deactivate",  # else, under Slurm, it would pick one device
        }
    problems: list[Exception] = []

    def connect() -> None:
        try:
            # longer than here, so that what is said is said here
            jax.distributed.initialize(
                **found,
                initialization_timeout=config.wait + 60,
                heartbeat_timeout_seconds=2 * config.lost_after + 60,
            )
        except Exception as error:  # of the runtime, of a name that does not resolve, of a cluster's files
            problems.append(error)

    # in a thread, since signals are not served while it waits
    thread = threading.Thread(target=connect, name="xtoken_connect", daemon=True)
    thread.start()
    thread.join(config.wait)
    if thread.is_alive():
        which = "" if config.auto else f"of the {config.count} processes "
        where = config.coordinator or os.environ.get(_ADDRESS, "the address that jax found")
        print(
            f"xtoken: hosts.wait={config.wait}: not all {which}came to {where} in time; start the same "
            "command on all of them, each with its own hosts.index",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # jax would abort
    if problems:
        first = (str(problems[0]) or type(problems[0]).__name__).splitlines()[0]
        if config.auto and isinstance(problems[0], ValueError):
            raise UserError(
                f"hosts=auto: jax finds no cluster around this process ({first}); name hosts.coordinator, "
                "hosts.count and hosts.index"
            )
        raise UserError(f"hosts: the processes cannot be joined ({first})") from problems[0]
