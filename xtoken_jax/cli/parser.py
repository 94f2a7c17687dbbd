"""The `xtoken` command."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from xtoken_jax import __version__
from xtoken_jax.cli import cache, cache_teacher, distill, evaluate, export, generate, report, tokenizers
from xtoken_jax.cli.argument_parser import Parser
from xtoken_jax.cli.completion import SHELLS, complete, of_settings, script
from xtoken_jax.cli.memory import memory_errors
from xtoken_jax.display.terminal import Terminal
from xtoken_jax.errors import UserError, first_line, is_panic, printable
from xtoken_jax.files.trust import UntrustedFileWarning
from xtoken_jax.run.config_groups import groups
from xtoken_jax.run.spelling import as_settings
from xtoken_jax.run.words import keys

_python_warning = warnings.showwarning
# Each has TEXT, HELP, add_arguments and run; in the order of --help.
_BEFORE_TOKENIZERS: dict[str, Any] = {"distill": distill, "cache-teacher": cache_teacher}
_AFTER_TOKENIZERS: dict[str, Any] = {
    "evaluate": evaluate, "generate": generate, "export": export, "report": report, "cache": cache,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for a mistake in the input, 130 on Ctrl-C.

    SIGTERM ends `xtoken distill` with 0, and a checkpoint. Of several processes, one that fails ends all.
    Without `arguments` the process is the command's: an error or a signal ends it here, since XLA's threads
    may still be busy, which the interpreter's shutdown does not survive.
    """
    parser, commands = make_parser()
    complete(parser)
    options, rest = parser.parse_known_args(arguments)
    if options.command is None:
        if options.completion:
            print(script(options.completion))
        elif rest:
            parser.error(parser.unknown_command(rest[0]))
        else:
            parser.print_help()
        return 0
    command = commands[options.command]
    if command.settings is None:
        # A setting in the place of a folder parses, and the folder does not exist.
        folder = str(getattr(options, "model", getattr(options, "run_folder", "")))
        setting = [folder] if "=" in folder and not Path(folder).exists() else []
        if unplaced := [*rest, *setting]:
            command.exit(2, f"xtoken: {command.advice(unplaced)}\n")
    sys.excepthook = lambda *error: print(
        printable("".join(traceback.format_exception(*error))), end="", file=sys.stderr
    )
    warnings.showwarning = _show_warning
    console = Terminal(stderr=options.command != "distill")
    try:
        if command.settings is not None:
            options.overrides += [word for word in rest if not word.startswith("-")]
            if unknown := [word for word in rest if word.startswith("-")]:
                from xtoken_jax.run.experiment import Experiment

                raise UserError(as_settings(command.prog, command.words, unknown, keys(Experiment), groups()))
        with memory_errors(options.command):
            options.run(options, console)
    except (UserError, OSError) as error:  # a full disk or a read-only folder is no fault of the program
        Terminal(stderr=True).print(f"xtoken: {error}", style="red")
        code = 2
    except KeyboardInterrupt as interrupt:
        print(f"xtoken: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        code = getattr(interrupt, "code", 130)
    except BaseException as error:
        if not is_panic(error):
            raise
        reason = printable(first_line(error))
        print(f"xtoken: a tokenizer fails on this text ({reason}); use another", file=sys.stderr)
        code = 2
    else:
        return 0
    if arguments is None:
        from xtoken_jax.train.signals import end_process

        end_process(code)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning about files in one line, and others as Python does."""
    if issubclass(category, UntrustedFileWarning):
        Terminal(stderr=True).print(f"warning: {message}", style="yellow")
    else:
        _python_warning(message, category, filename, lineno, file, line)


def make_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and that of each command by its name."""
    parser = Parser(
        prog="xtoken",
        description="Distil a language model into a student with another tokenizer.",
        epilog="first: xtoken distill experiment=quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xtoken-jax {__version__}")
    parser.add_argument(
        "--completion", choices=SHELLS, help="print the completion script of a shell, for eval or source"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Any, text: str, epilog: str) -> Parser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    for name, module in _BEFORE_TOKENIZERS.items():
        module.add_arguments(command(name, module.run, module.TEXT, module.HELP))
    tokenizers.add_commands(command)
    for name, module in _AFTER_TOKENIZERS.items():
        module.add_arguments(command(name, module.run, module.TEXT, module.HELP))
    for sub in commands.choices.values():
        if sub.settings is not None:
            sub.settings.completer = of_settings(_schema)  # type: ignore[attr-defined]
    return parser, commands.choices


def _schema() -> type:
    from xtoken_jax.run.experiment import Experiment

    return Experiment


if __name__ == "__main__":
    sys.exit(main())
