"""How a command's process ends after a signal or an error, past the interpreter's shutdown."""

import os
import signal
import sys

import pytest

from xtoken_jax import __main__
from xtoken_jax.cli import parser as cli
from xtoken_jax.errors import UserError


class ExitedError(Exception):
    """`os._exit` was called."""


@pytest.fixture
def codes(monkeypatch):
    """The codes that the process exited with at once."""
    found = []

    def leave(code):
        found.append(code)
        raise ExitedError

    monkeypatch.setattr(os, "_exit", leave)
    return found


def fail(*_):
    raise UserError("no such thing")


@pytest.mark.parametrize(
    ("ends", "code", "said"),
    [
        (lambda *_: signal.raise_signal(signal.SIGTERM), 0, "stopped by SIGTERM"),
        (lambda *_: signal.raise_signal(signal.SIGINT), 130, "stopped by Ctrl-C"),
        (fail, 2, "no such thing"),
    ],
)
def test_a_command_that_is_ended_exits_without_the_shutdown(ends, code, said, codes, monkeypatch, capsys):
    monkeypatch.setattr("xtoken_jax.run.distill.distill", ends)
    words = ["distill", "experiment=quickstart"]
    monkeypatch.setattr(sys, "argv", ["xtoken", *words])
    with pytest.raises(ExitedError):
        cli.main()
    assert codes == [code]
    assert said in capsys.readouterr().err
    assert cli.main(words) == code  # a caller with arguments of its own lives on
    assert codes == [code]


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("distill", signal.SIGTERM, 0),
        ("cache-teacher", signal.SIGTERM, 0),
        ("distill", signal.SIGINT, 130),
        ("cache-teacher", signal.SIGINT, 130),
    ],
)
def test_a_signal_while_the_command_loads(command, number, code, codes, monkeypatch, capfd):
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(sys, "argv", ["xtoken", command])
    monkeypatch.setattr(cli, "main", lambda: signal.raise_signal(number))
    try:
        with pytest.raises(ExitedError):
            __main__.main()
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
    assert codes == [code]
    assert "the same command" in capfd.readouterr().err


def test_other_commands_keep_the_system_s_own_handlers(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["xtoken", "report", "runs/none"])
    monkeypatch.setattr(cli, "main", lambda: 7)
    assert __main__.main() == 7
    assert signal.getsignal(signal.SIGTERM) is before
