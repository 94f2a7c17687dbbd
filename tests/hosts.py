"""Runs of `xtoken distill` as several processes on this machine, told apart by a port each test takes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEVICES = 8  # in all


def start(words, count=1, log=None, keys=()):
    """The processes of a run, started; `keys` are further words of each, by index."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    processes = []
    for index in range(count):
        more = [f"hosts.coordinator=127.0.0.1:{port}", f"hosts.count={count}", f"hosts.index={index}"]
        command = [sys.executable, "-m", "xtoken_jax.cli", "distill", *words, *(more if count > 1 else [])]
        with open(f"{log}-{index}.txt", "w") as file:
            processes.append(
                subprocess.Popen(
                    [*command, *(keys[index] if keys else [])],
                    env=environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    return processes


def finish(processes, log, seconds=240):
    """Exit code and output of each."""
    try:
        codes = [process.wait(seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(code, Path(f"{log}-{index}.txt").read_text()) for index, code in enumerate(codes)]


def run(words, count=1, log=None, keys=(), seconds=240):
    """Exit code and output of each process of a run, at its end."""
    return finish(start(words, count, log, keys), log, seconds)
