"""The process that renders chat templates, started when it is needed and again after a template ended it."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

_WORKER = Path(__file__).with_name("template_worker.py")
SECONDS = 4.0  # of processor time for one rendering
# A template has no use for the user's environment, tokens and keys included.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "LANG", "LC_ALL", "SYSTEMROOT")


class TemplateError(Exception):
    """What a template did instead of rendering; the text continues "the chat template of X ..."."""


class _Renderer:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        line = json.dumps(request, default=lambda value: f"<{type(value).__name__}>").encode() + b"\n"
        with self.lock:
            process = self.process = self.process or _start()
            answer = b""
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            if not answer.endswith(b"\n"):
                code = self.stop()
                raise TemplateError(_reason(code))
            reply: dict[str, Any] = json.loads(answer)
            if "limit" in reply:
                self.stop()  # its memory is in a state that nobody knows
        return reply

    def stop(self) -> int:
        """End the process and return its exit status."""
        process, self.process = self.process, None
        if process is None:
            return 0
        with contextlib.suppress(OSError):
            process.communicate()
        return process.wait()


def _start() -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return subprocess.Popen(
        # -P: the modules next to the script do not hide those of the standard library.
        [sys.executable, "-P", str(_WORKER), str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C is for the process that trains, which may still render to end well
    )


def _reason(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"takes more than {SECONDS:g} s to render"
    name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
    return f"ends the process that renders it ({name})"


RENDERER = _Renderer()


def _forget() -> None:
    """A forked process starts its own."""
    global RENDERER
    RENDERER = _Renderer()


os.register_at_fork(after_in_child=_forget)
atexit.register(lambda: RENDERER.stop())


def render_in_process(template: str, values: dict[str, Any], day: str) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat template in another process, within limits on time, memory and output.

    Args:
        template: Jinja source.
        values: the names that the template may use, JSON values.
        day: ISO date that `strftime_now` writes.

    Returns:
        The rendered text, and the character ranges of its `{% generation %}` blocks.

    Raises:
        TemplateError: the template refuses the values, is no template, or exceeds a limit.
    """
    answer = RENDERER.ask({"template": template, "values": values, "day": day})
    if "limit" in answer:
        raise TemplateError(answer["limit"])
    if "error" in answer:
        raise TemplateError(f"refuses it: {answer['error']}")
    return answer["text"], [(start, end) for start, end in answer["ranges"]]
