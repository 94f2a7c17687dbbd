"""The `xtoken` command."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

from xtoken_jax import __version__
from xtoken_jax.cli import cache as cli_copies
from xtoken_jax.cli import cache_teacher as cli_cache
from xtoken_jax.cli import generate as cli_generate
from xtoken_jax.cli import tokenizers as cli_tokenizers
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
_DISTILL_HELP = """\
arguments are key=value pairs:

  experiment=quickstart       an embedded run of minutes, on the CPU, without any download
  experiment=quickstart_two_teachers   the same with a second teacher and its tokenizer
  experiment=smollm2          SmolLM2-135M into a Llama 3.1 student (see experiments/smollm2)
  loss=p_kl | h_kl | prefix_kl | none  instead of the audit's choice
  student.path=DIR teacher.path=DIR    your own Hugging Face folders
  student.lora.rank=16        train low-rank adapters alone, merged in the student's folder
  data.train.text.path=FILE.jsonl      your own text
  hosts=auto mesh=fsdp        on all hosts of a TPU slice or a Slurm job (README: pods)
  train.steps=1000 optimizer.learning_rate=1e-4 data.batch_size=16 run_dir=runs/mine

  -m loss=p_kl,h_kl optimizer.learning_rate=1e-5,5e-5   a run for each combination, in runs/NAME/sweep
  -m ... --cfg job                                      the settings of each job; runs nothing
  -m ... hydra/launcher=submitit_slurm                  on a cluster, all at once
  -m ... hydra/sweeper=optuna hydra.sweeper.n_trials=20 'optimizer.learning_rate=interval(1e-5,1e-3)'

The run's folder gets metrics.jsonl, curves.png, checkpoints/ and student/, an ordinary Hugging
Face folder. The same command again goes on where a run was interrupted; SIGTERM and Ctrl-C save
first. resume.allow=[KEY,...] goes on with settings or content that differ.
"""
_ROW = 1024  # tokens of a row in `evaluate`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for a mistake in the input, 130 on Ctrl-C.

    SIGTERM ends `xtoken distill` with 0, and a checkpoint. Of several processes, one that fails ends all.
    Without `arguments` the process is the command's: an error or a signal ends it here, since XLA's threads
    may still be busy, which the interpreter's shutdown does not survive.
    """
    parser, commands = _parser()
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


def _parser() -> tuple[Parser, dict[str, Parser]]:
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

    sub = command("distill", _distill, "train a student with a teacher, from a config", _DISTILL_HELP)
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    sub.add_argument("-m", "--multirun", action="store_true", help="a sweep: commas part values to try")
    sub.add_argument("--cfg", choices=["job"], help="print the composed settings and do nothing")
    sub.add_argument("--json", action="store_true", help="print the final figures as JSON on stdout")

    sub = command("cache-teacher", cli_cache.run, cli_cache.TEXT, cli_cache.HELP)
    cli_cache.add_arguments(sub)

    cli_tokenizers.add_commands(command)

    sub = command(
        "evaluate",
        _evaluate,
        "bits per byte of a model on your text, or on Python's documentation",
        "example: xtoken evaluate runs/quickstart/student --data held_out.jsonl",
    )
    sub.add_argument("model", metavar="DIR", help="Hugging Face folder or hub id")
    sub.add_argument(
        "--data",
        metavar="DATA",
        help="file, folder or pattern of jsonl, csv, txt, parquet, ...; default: held-out topics of help()",
    )
    cli_tokenizers.takes_source(sub, "--data")
    sub.add_argument("--length", type=int, help="tokens a row (default: 1024, or the model's positions)")
    sub.add_argument("--batch-size", type=int, default=8, help="rows at once (default: 8)")
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command("generate", cli_generate.run, cli_generate.TEXT, cli_generate.HELP)
    cli_generate.add_arguments(sub)

    sub = command(
        "export",
        _export,
        "write a checkpoint of a run as a Hugging Face folder",
        "example: xtoken export runs/quickstart --step 150 --out student-150",
    )
    sub.add_argument("run_folder", metavar="RUN", type=Path, help="the run's folder")
    sub.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    sub.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    sub.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "source"],
        help="of the weights; source: each tensor's in the student's folder (default: export_dtype)",
    )
    sub.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of one file of weights; more than that becomes several with an index (default: 5GB)",
    )

    sub.add_argument(
        "--overwrite", action="store_true", help="replace DIR even if this run did not write what it holds"
    )

    sub = command(
        "report",
        _report,
        "draw a run's curves from its metrics.jsonl, or rank the runs of a sweep",
        "example: xtoken report runs/quickstart",
    )
    sub.add_argument(
        "run_folder", metavar="RUN", type=Path, help="the folder of a run, of a sweep, or of several of them"
    )

    sub = command("cache", cli_copies.run, cli_copies.TEXT, cli_copies.HELP)
    cli_copies.add_arguments(sub)
    for sub in commands.choices.values():
        if sub.settings is not None:
            sub.settings.completer = of_settings(_schema)  # type: ignore[attr-defined]
    return parser, commands.choices


def _schema() -> type:
    from xtoken_jax.run.experiment import Experiment

    return Experiment


def _distill(options: argparse.Namespace, console: Console) -> None:
    if options.cfg:
        from xtoken_jax.run.sweep import dump

        print(dump(options.overrides, sweep=options.multirun), end="")
        return
    if options.multirun:
        _sweep(options)
        return
    from xtoken_jax.train.signals import StopSignals

    with StopSignals() as stop:  # before the imports, which take seconds
        from xtoken_jax.distributed.processes import is_first, joined
        from xtoken_jax.run.experiment import load_experiment

        experiment = load_experiment(options.overrides)
        with joined(experiment.hosts):  # before anything touches a device
            from xtoken_jax.run.distill import distill

            first = is_first()  # which alone shows anything
            shown = Terminal(stderr=options.json, quiet=not first)
            result = distill(experiment, shown, stop)
    if not first:
        return
    if options.json:
        cli_tokenizers.print_json(
            {"loss": result.loss.value, "figures": result.figures, "student": str(result.student)}
        )
        return
    from xtoken_jax.train.metrics import shown_figure

    names = list(result.figures["student, untouched"])
    table = Table(title=f"{experiment.name}: held-out figures after {experiment.train.steps} steps")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for row, figures in result.figures.items():
        table.add_row(
            row, *(shown_figure(n, figures[n]) for n in names), style="bold" if row == "distilled" else None
        )
    if names:  # without held-out text there are no figures
        console.print(table)
    console.print(f"student  {result.student}   (an ordinary Hugging Face folder)")
    console.print(f"metrics  {result.metrics}")
    console.print(f"curves   {result.picture}")
    console.print(f"took     {result.seconds:.0f} s")


def _evaluate(options: argparse.Namespace, console: Console) -> None:
    import jax

    from xtoken_jax.data.config import DataConfig
    from xtoken_jax.data.encode import read_parts, student_of
    from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents
    from xtoken_jax.distributed.mesh import single_device_mesh
    from xtoken_jax.evaluate.bits_per_byte import bits_per_byte
    from xtoken_jax.models.load import ModelConfig, open_model
    from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

    if options.batch_size < 1:
        raise UserError(f"--batch-size {options.batch_size}: must be at least 1")
    tokenizer = Tokenizer.load(options.model)
    if options.source and options.data is None:
        raise UserError("--source: sets how --data is read, and there is none; name it, or leave this out")
    length = _row_length(options)
    if options.data is None:
        source = SourceConfig(kind=SourceKind.python_docs, split="validation")
    else:
        source = cli_tokenizers.source_of(options.data, options.source)
    data = DataConfig(
        validation={"text": source},
        student_length=length,
        teacher_length=length,
        batch_size=options.batch_size,
    )
    mesh = single_device_mesh()
    with jax.set_mesh(mesh):
        model, params = open_model(
            ModelConfig(path=options.model), tokenizer.size, mesh=mesh, key=jax.random.key(0)
        )
        own = {"student": TokenizerPair(tokenizer, tokenizer)}
        parts = read_parts(own, {"text": read_documents(source)}, data)["text"]
        rows = [student_of(part) for part in parts]
        with console.status(f"running the model over {len(rows)} rows"):
            value = bits_per_byte(
                model,
                params,
                tokenizer,
                [row.ids for row in rows],
                batch_size=options.batch_size,
                length=length,
                targets=[row.targets for row in rows],
            )
    if options.json:
        cli_tokenizers.print_json({"bits_per_byte": value, "rows": len(rows)})
    else:
        print(f"{value:.4f} bits per byte over {len(rows)} rows of {options.data or 'Python documentation'}")


def _row_length(options: argparse.Namespace) -> int:
    """The --length of `evaluate`, which the model has positions for."""
    from xtoken_jax.hub import resolve_folder
    from xtoken_jax.models.config import read_config

    positions = read_config(resolve_folder(options.model, weights=False)).max_position_embeddings
    length = min(_ROW, positions) if options.length is None else options.length
    if not 2 <= length <= positions:
        raise UserError(
            f"--length {length}: must be at least 2, and at most {positions:,}, the positions that the model "
            "was made for (max_position_embeddings)"
        )
    return length


def _export(options: argparse.Namespace, console: Console) -> None:
    from xtoken_jax.run.student import export_checkpoint

    step, ends = export_checkpoint(
        options.run_folder,
        options.step,
        options.out,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
        overwrite=options.overwrite,
    )
    console.print(f"step {step} of {options.run_folder} -> {options.out}", markup=False)
    if ends is not None:
        console.print(f"ends     {ends}", markup=False)


def _sweep(options: argparse.Namespace) -> None:
    from xtoken_jax.run.sweep import run_sweep

    folder, jobs = run_sweep(options.overrides, quiet=options.json)
    _rank(folder, Terminal(stderr=options.json))
    if options.json:
        cli_tokenizers.print_json([job.to_dict() for job in jobs])
    failed = [job for job in jobs if job.status == "failed"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(jobs)} jobs failed, the first with: {failed[0].error}; the same command "
            "runs them again, and no others"
        )


def _rank(folder: Path, console: Console) -> None:
    from xtoken_jax.run.ranking import ranking_table, read_jobs, write_ranking
    from xtoken_jax.run.report import draw_sweep

    def tell(line: str) -> None:
        console.print(f"warning  {line}", style="yellow")

    jobs = read_jobs(folder, tell)
    write_ranking(folder, jobs)
    console.print(ranking_table(folder, jobs))
    console.print(f"ranking  {folder / 'sweep.json'}, {folder / 'sweep.csv'}")
    if (picture := draw_sweep(folder, jobs, tell)) is not None:
        console.print(f"curves   {picture}")


def _report(options: argparse.Namespace, console: Console) -> None:
    from xtoken_jax.run.ranking import is_sweep
    from xtoken_jax.run.report import draw_curves, runs_and_sweeps

    for folder in runs_and_sweeps(options.run_folder):
        if is_sweep(folder):
            _rank(folder, Terminal())
        else:
            picture = draw_curves(folder, lambda line: console.print(f"warning  {line}", style="yellow"))
            console.print(f"curves   {picture}")


if __name__ == "__main__":
    sys.exit(main())
