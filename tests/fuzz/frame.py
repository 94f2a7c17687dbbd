"""Runs each case of a fuzzer in a process of its own, with limits on time and memory, and counts verdicts.

A parser gives an intact folder, a way to spoil it, and a way to read it. A case is a parser, a seed and a
number, from which it can be made again. The child is forked after the imports, which makes a case cost
milliseconds; nothing here may start threads of XLA before the fork.
"""

import contextlib
import os
import random
import resource
import select
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from xtoken_jax.errors import UserError

SECONDS = 20  # of processor time
PATIENCE = 6  # times as long on the wall: other processes may hold the processors
MEMORY = 2 << 30  # bytes on top of what the parent has
LONGEST_MESSAGE = 1500  # characters, paths included
GOOD = ("ok", "refused")
BAD = ("traceback", "hang", "memory", "crash", "message", "noise")


@dataclass(frozen=True)
class Parser:
    """A reader of files from outside.

    Attributes:
        name: short, unique; letters and underscores.
        write: makes the intact files in an empty folder. It runs once; a case gets a copy of the folder.
        spoil: changes the copy of a case, by the random numbers that it is given.
        read: reads the folder as a user would. It may raise UserError and nothing else.
    """

    name: str
    write: Callable[[Path], None]
    spoil: Callable[[random.Random, Path], None]
    read: Callable[[Path], None]


@dataclass
class Outcome:
    """What became of a case.

    Attributes:
        verdict: ok, refused (a UserError of one line), or one of `BAD`.
        detail: the message or the traceback.
        seconds: of wall time.
        peak: bytes of memory that the child had at most.
    """

    verdict: str
    detail: str
    seconds: float
    peak: int


@dataclass
class Tally:
    """Verdicts of one parser, and the bad cases by their numbers."""

    counts: Counter = field(default_factory=Counter)
    bad: dict[int, Outcome] = field(default_factory=dict)
    slowest: float = 0.0
    peak: int = 0

    def add(self, number: int, outcome: Outcome) -> None:
        self.counts[outcome.verdict] += 1
        self.slowest = max(self.slowest, outcome.seconds)
        self.peak = max(self.peak, outcome.peak)
        if outcome.verdict not in GOOD:
            self.bad[number] = outcome


def fuzz(
    parsers: list[Parser],
    *,
    cases: int,
    seed: int,
    minutes: float | None = None,
    tell: Callable[[str, int, Outcome], None] = lambda name, number, outcome: None,
) -> dict[str, Tally]:
    """Run cases of all parsers in turn; Ctrl-C ends them early.

    Args:
        parsers: what to fuzz.
        cases: of each parser.
        seed: of the random numbers.
        minutes: an end, before all cases are done.
        tell: is called with the parser's name, the number and the outcome of each bad case.
    """
    tallies = {parser.name: Tally() for parser in parsers}
    end = None if minutes is None else time.monotonic() + 60 * minutes
    with contextlib.suppress(KeyboardInterrupt), intact_folders(parsers) as folders:
        for number in range(cases):
            for parser in parsers:
                if end is not None and time.monotonic() > end:
                    return tallies
                outcome = run_case(parser, folders[parser.name], seed, number)
                tallies[parser.name].add(number, outcome)
                if outcome.verdict in BAD:
                    tell(parser.name, number, outcome)
    return tallies


@contextlib.contextmanager
def intact_folders(parsers: list[Parser]) -> Iterator[dict[str, Path]]:
    """The intact files of each parser, by its name, written in a child: writing may start threads."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        folders = {parser.name: Path(root) / parser.name for parser in parsers}
        for parser in parsers:
            folders[parser.name].mkdir()
            if (child := os.fork()) == 0:
                code = 1
                try:
                    parser.write(folders[parser.name])
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            if os.waitpid(child, 0)[1] != 0:
                raise RuntimeError(f"the intact files of {parser.name} cannot be written")
        yield folders


def spoiled_copy(parser: Parser, intact: Path, folder: Path, seed: int, number: int) -> None:
    """Write the files of a case into `folder`, which does not exist yet."""
    shutil.copytree(intact, folder)
    parser.spoil(random.Random(f"{parser.name} {seed} {number}"), folder)


def run_case(parser: Parser, intact: Path, seed: int, number: int) -> Outcome:
    """Spoil a copy of the intact files and read it, in a child."""
    with tempfile.TemporaryDirectory(prefix="case-", dir=intact.parent) as root:
        folder = Path(root) / "folder"
        spoiled_copy(parser, intact, folder, seed, number)
        return run_child(lambda: parser.read(folder), Path(root) / "output")


def run_child(
    read: Callable[[], None], output: Path, *, seconds: float = SECONDS, memory: int = MEMORY
) -> Outcome:
    """Call a reader in a forked child.

    Args:
        read: the reader.
        output: a file for what the child prints.
        seconds: of processor time that it may take, and a `PATIENCE`th of the time on the wall.
        memory: bytes of address space that it may add to those of this process.
    """
    begin = time.monotonic()
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        _child(read, output, send, seconds, memory)
    os.close(send)
    said, end = b"", begin + PATIENCE * seconds
    try:
        while select.select([receive], [], [], max(0.0, end - time.monotonic()))[0]:
            if not (piece := os.read(receive, 1 << 16)):
                break
            said += piece
        else:
            os.kill(child, signal.SIGKILL)
    finally:
        os.close(receive)
        _, status, usage = os.wait4(child, 0)
    took = time.monotonic() - begin
    verdict, _, detail = said.decode(errors="replace").partition("\n")
    out_of_time = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU
    if out_of_time or time.monotonic() >= end:
        verdict, detail = "hang", f"no end within {seconds} s of processor time or {PATIENCE} times that"
    elif not verdict:
        verdict, detail = _end(status, output)
    elif b"panicked at" in output.read_bytes():
        verdict, detail = "noise", output.read_text(errors="replace")
    return Outcome(verdict, detail, took, usage.ru_maxrss * 1024)


def _end(status: int, output: Path) -> tuple[str, str]:
    """The verdict on a child that ended without one."""
    printed = output.read_text(errors="replace")[-2000:]
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    out_of_memory = "memory allocation of" in printed or "bad_alloc" in printed or "MemoryError" in printed
    return ("memory" if out_of_memory else "crash"), f"{how}: {printed}"


def _child(read: Callable[[], None], output: Path, send: int, seconds: float, memory: int) -> None:
    verdict, detail = "crash", ""
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
        limit = _address_space() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        used = int(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (used + int(seconds), used + int(seconds) + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        verdict, detail = verdict_of(read)
    finally:
        os.write(send, f"{verdict}\n{detail}".encode(errors="replace")[: 1 << 16])
        os._exit(0)


def verdict_of(read: Callable[[], None]) -> tuple[str, str]:
    """Call a reader here, and return the verdict and what it raised."""
    try:
        read()
    except UserError as error:
        message = str(error)
        odd = "\n" in message or len(message) > LONGEST_MESSAGE or not message.isprintable()
        return ("message" if odd else "refused"), message
    except MemoryError:
        return "memory", traceback.format_exc(limit=-6)
    except BaseException:  # a panic of Rust is no Exception
        return "traceback", traceback.format_exc(limit=-6)
    return "ok", ""


def _address_space() -> int:
    """Bytes of address space of this process; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return 0
