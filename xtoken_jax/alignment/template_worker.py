"""Render chat templates in a process with limits on time, memory and output.

`xtoken_jax.alignment.template_process` runs this file as a script. A chat template is a program from a
stranger: nothing that it does in here can stop, fill or read the process that trains. The script needs
jinja2 and the standard library alone, and starts in about 0.1 s.

One request a line on standard input, one answer a line on standard output, both JSON.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

MEGABYTES = 350  # of address space, plus room for the request
CHARACTERS = 1_000_000  # of rendered text, plus ten times the request
_ERROR_LENGTH = 300


class _Generation(jinja2.ext.Extension):
    """The `{% generation %}` block, with the ranges of text that such blocks wrote."""

    tags = {"generation"}  # noqa: RUF012

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        environment.extend(written=0, ranges=[])

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_track")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _track(self, caller: Callable[[], str]) -> str:
        text = caller()
        start = self.environment.written  # type: ignore[attr-defined]
        self.environment.ranges.append((start, start + len(text)))  # type: ignore[attr-defined]
        return text


class _Namespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:
        names = dict(*args[1:], **values)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: str) -> None:
    if name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no attribute {name!r}")


class _Dict:
    """`dict`, without the attributes of the type."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _NoFiles(jinja2.BaseLoader):
    def get_source(self, environment: jinja2.Environment, template: str) -> Any:
        raise jinja2.TemplateError(f"it includes another file, {template!r}; put all of it into one file")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """A template with what transformers gives to chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        loader=_NoFiles(),
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _raise, "dict": _Dict(), "namespace": _Namespace}
    return environment.from_string(source)


def _render(request: dict[str, Any], most: int) -> dict[str, Any]:
    midnight = datetime.datetime.combine(datetime.date.fromisoformat(request["day"]), datetime.time())
    template = _compiled(request["template"])
    environment: Any = template.environment
    environment.written, environment.ranges = 0, []
    parts = []
    for part in template.generate(**request["values"], strftime_now=midnight.strftime):
        parts.append(part)
        environment.written += len(part)
        if environment.written > most:
            return {"limit": f"writes more than {most:,} characters"}
    return {"text": "".join(parts), "ranges": environment.ranges}


def _answer(line: bytes) -> dict[str, Any]:
    try:
        return _render(json.loads(line), CHARACTERS + 10 * len(line))
    except MemoryError:
        raise
    except Exception as error:  # a template raises what it likes
        if isinstance(error, RecursionError):
            return {"error": "it is nested too deeply, or calls itself without end"}
        if type(error) is AssertionError:
            return {"error": "it is no valid template"}
        text = " ".join(str(error)[: 4 * _ERROR_LENGTH].split())
        return {"error": text[:_ERROR_LENGTH] or type(error).__name__}


def main(seconds: float) -> None:
    """Answer requests until standard input ends, each within so many seconds of processor time."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # kills the process, whatever it is doing
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    for line in sys.stdin.buffer:
        memory = MEGABYTES * 10**6 + 40 * len(line)
        resource.setrlimit(resource.RLIMIT_AS, (memory if hard < 0 else min(memory, hard), hard))
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer: dict[str, Any] = {"limit": f"takes more than {memory // 10**6} MB of memory"}
        try:
            written = json.dumps(_answer(line))
        except MemoryError:
            written = json.dumps(answer)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(written + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
