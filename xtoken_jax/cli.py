"""The `xtoken` command."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from xtoken_jax import __version__, cli_cache, cli_generate
from xtoken_jax.errors import UserError

if TYPE_CHECKING:
    from xtoken_jax.data.sources import SourceConfig
    from xtoken_jax.tokens.tokenizer import TokenizerPair

_DISTILL_HELP = """\
arguments are key=value pairs:

  experiment=quickstart       an embedded run of minutes, on the CPU, without any download
  experiment=smollm2          SmolLM2-135M into a Llama 3.1 student (see experiments/smollm2)
  loss=p_kl | h_kl | prefix_kl | none  instead of the audit's choice
  student.path=DIR teacher.path=DIR    your own Hugging Face folders
  student.lora.rank=16        train low-rank adapters alone, merged in the student's folder
  data.train.text.path=FILE.jsonl      your own text
  hosts=auto mesh=fsdp        on all hosts of a TPU slice or a Slurm job (README: pods)
  train.steps=1000 optimizer.learning_rate=1e-4 data.batch_size=16 run_dir=runs/mine

The run's folder gets metrics.jsonl, curves.png, checkpoints/ and student/, an ordinary Hugging
Face folder. The same command again goes on where a run was interrupted; SIGTERM and Ctrl-C save
first. resume.allow=[KEY,...] goes on with settings or content that differ.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 0, 2 for a mistake in the input, 130 on Ctrl-C.

    SIGTERM ends `xtoken distill` with 0, and a checkpoint. Of several processes, one that fails ends all.
    """
    parser = _parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    options, rest = parser.parse_known_args(words)
    takes_settings = options.command in ("distill", "cache-teacher")
    if rest and not takes_settings:
        name = f" {options.command}" if options.command else ""
        parser.error(f"unknown argument {rest[0]!r}; see xtoken{name} --help")
    if options.command is None:
        parser.print_help()
        return 0
    console = Console(stderr=options.command != "distill", highlight=False, soft_wrap=True)
    try:
        if takes_settings:
            options.overrides += [word for word in rest if not word.startswith("-")]
            unknown = [word for word in rest if word.startswith("-")]
            if unknown:
                see = f"see xtoken {options.command} --help"
                raise UserError(f"unknown option {unknown[0]}; settings are key=value, {see}")
        options.run(options, console)
    except (UserError, OSError) as error:  # a full disk or a read-only folder is no fault of the program
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"xtoken: {error}", markup=False, style="red"
        )
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"xtoken: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return getattr(interrupt, "code", 130)
    return 0


def _load_pair(options: argparse.Namespace, console: Console) -> TokenizerPair:
    """The two tokenizers, said on stderr what they are."""
    from xtoken_jax.tokens.tokenizer import TokenizerPair

    with console.status("loading the tokenizers"):
        pair = TokenizerPair.load(options.student, options.teacher)
    for side, tokenizer in (("student", pair.student), ("teacher", pair.teacher)):
        console.print(f"{side}  {tokenizer.name}: {tokenizer.describe()}", markup=False)
        if tokenizer.warning:
            console.print(f"warning: {tokenizer.name}: {tokenizer.warning}", markup=False, style="yellow")
    return pair


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xtoken",
        description="Distil a language model into a student with another tokenizer.",
        epilog="first: xtoken distill experiment=quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"xtoken-jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, run: Any, text: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        return sub

    def takes_pair(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--student", required=True, metavar="DIR", help="Hugging Face folder or hub id")
        sub.add_argument("--teacher", required=True, metavar="DIR", help="Hugging Face folder or hub id")

    sub = command("distill", _distill, "train a student with a teacher, from a config", _DISTILL_HELP)
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    sub.add_argument("--json", action="store_true", help="print the final figures as JSON on stdout")

    sub = command("cache-teacher", cli_cache.run, cli_cache.TEXT, cli_cache.HELP)
    cli_cache.add_arguments(sub)

    sub = command(
        "audit",
        _audit,
        "which tokens the two vocabularies share, and the loss that follows",
        "next: xtoken distill student.path=DIR teacher.path=DIR data.train.text.path=FILE.jsonl",
    )
    takes_pair(sub)
    sub.add_argument(
        "--critical",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help='tokens that must not fall out, such as " €"',
    )
    sub.add_argument("--critical-file", metavar="FILE", help="a text all of whose tokens must not fall out")
    sub.add_argument(
        "--text-file", metavar="DATA", help="measure how much of this text (any data of distill) falls out"
    )
    sub.add_argument(
        "--picture",
        type=Path,
        metavar="FILE.png",
        help="draw coverage, and rows of W beside it (FILE-rows.png)",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(
        "project",
        _project,
        "build W, the projection of the student's vocabulary into the teacher's",
        "next: xtoken distill ... projection=W.safetensors",
    )
    takes_pair(sub)
    sub.add_argument("--out", required=True, type=Path, metavar="FILE", help="W.safetensors to write")
    sub.add_argument("--entries", type=int, default=4, metavar="K", help="entries a row at most (4)")
    sub.add_argument(
        "--reverse", action="store_true", help="also re-tokenize the teacher's tokens with the student"
    )
    sub.add_argument(
        "--scale-trick",
        action="store_true",
        help="set the last of K entries to 0.2, as the official tool can",
    )
    sub.add_argument(
        "--similar-special",
        action="store_true",
        help="match special tokens without a common role by spelling",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")

    sub = command(
        "align",
        _align,
        "show which tokens of a text pair with which",
        'example: xtoken align --student DIR --teacher DIR --text "12 + 189 = 201"',
    )
    takes_pair(sub)
    source = sub.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", help="the text itself")
    source.add_argument("--file", type=Path, help="a UTF-8 file")
    source.add_argument(
        "--chat",
        type=Path,
        metavar="FILE.json",
        help='a list of messages {"role": ..., "content": ...}, rendered by each side\'s chat template',
    )
    sub.add_argument("--marks", action="store_true", help="with BOS and EOS, as in training")
    sub.add_argument("--json", action="store_true", help="print JSON")

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
        help="file, folder or pattern of jsonl, txt, parquet, ...; default: held-out topics of help()",
    )
    sub.add_argument("--length", type=int, default=1024, help="tokens a row (default: 1024)")
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

    sub = command(
        "report",
        _report,
        "draw a run's curves from its metrics.jsonl",
        "example: xtoken report runs/quickstart",
    )
    sub.add_argument("run_folder", metavar="RUN", type=Path, help="the run's folder")
    return parser


def _distill(options: argparse.Namespace, console: Console) -> None:
    from xtoken_jax.train.signals import StopSignals

    with StopSignals() as stop:  # before the imports, which take seconds
        from xtoken_jax.config import load_experiment
        from xtoken_jax.hosts import is_first, joined

        experiment = load_experiment(options.overrides)
        with joined(experiment.hosts):  # before anything touches a device
            from xtoken_jax.distill import distill

            first = is_first()  # which alone shows anything
            shown = Console(stderr=options.json, highlight=False, soft_wrap=True, quiet=not first)
            result = distill(experiment, shown, stop)
    if not first:
        return
    if options.json:
        _print_json({"loss": result.loss.value, "figures": result.figures, "student": str(result.student)})
        return
    names = list(result.figures["student, untouched"])
    table = Table(title=f"{experiment.name}: held-out figures after {experiment.train.steps} steps")
    table.add_column("model")
    for name in names:
        table.add_column(name, justify="right")
    for row, figures in result.figures.items():
        cells = [f"{figures[n]:.1%}" if n.endswith("accuracy") else f"{figures[n]:.3f}" for n in names]
        table.add_row(row, *cells, style="bold" if row == "distilled" else None)
    console.print(table)
    console.print(f"student  {result.student}   (an ordinary Hugging Face folder)")
    console.print(f"metrics  {result.metrics}")
    console.print(f"curves   {result.picture}")
    console.print(f"took     {result.seconds:.0f} s")


def _audit(options: argparse.Namespace, console: Console) -> None:
    from xtoken_jax.coverage.audit import audit
    from xtoken_jax.display.audit_table import show_audit
    from xtoken_jax.projection.cache import cached_projection

    critical_text, text = (
        None if path is None else _read_texts(path) for path in (options.critical_file, options.text_file)
    )
    pair = _load_pair(options, console)
    projection = cached_projection(pair)
    found = audit(pair, projection, critical_tokens=options.critical, critical_text=critical_text, text=text)
    if options.json:
        _print_json(found.to_dict())
    else:
        show_audit(found, Console(highlight=False, soft_wrap=True))
    if options.picture:
        from xtoken_jax.display.audit_pictures import draw_audit, draw_row

        rows = options.picture.with_stem(options.picture.stem + "-rows")
        draw_audit(found, options.picture)
        draw_row(pair, projection, options.critical or None, rows)
        console.print(f"coverage  {options.picture}\nrows      {rows}")


def _read_texts(path: str) -> list[str]:
    from xtoken_jax.data.shapes import text_of
    from xtoken_jax.data.sources import read_documents

    return [text_of(document) for document in read_documents(_source(path))]


def _source(path: str) -> SourceConfig:
    """Data that a command names by its path alone: a file with an ending of no kind is a text."""
    from xtoken_jax.data.sources import SourceConfig, SourceKind, kind_of

    file = Path(path).expanduser()
    text = file.is_file() and kind_of(file) is None
    return SourceConfig(kind=SourceKind.text if text else SourceKind.auto, path=path)


def _project(options: argparse.Namespace, console: Console) -> None:
    import time
    from dataclasses import asdict

    from xtoken_jax.projection.build import ProjectionOptions, build_projection
    from xtoken_jax.projection.counts import count_rows
    from xtoken_jax.projection.files import save_projection

    how = ProjectionOptions(
        options.entries, options.reverse, options.scale_trick, options.similar_special
    )  # refused before anything is loaded
    pair = _load_pair(options, console)
    start = time.perf_counter()
    projection = build_projection(pair, **asdict(how))
    seconds = time.perf_counter() - start
    try:
        save_projection(options.out, projection, pair, how)
    except OSError as error:
        raise UserError(f"{options.out}: cannot be written ({error.strerror})") from error
    counts = count_rows(pair, projection)
    size, teacher_size = pair.student.size, pair.teacher.size
    if options.json:
        shape = {"rows": size, "teacher_size": teacher_size}
        rest = {"options": asdict(how), "seconds": round(seconds, 3), "file": str(options.out)}
        _print_json({**shape, **counts, **rest})
        return
    table = Table(title=f"W [{size:,} x {teacher_size:,}], {how.entries} entries a row at most")
    table.add_column("student tokens that have")
    table.add_column("rows", justify="right")
    for kind, text in (
        ("bytes", "the same bytes as a teacher token"),
        ("role", "the same role as one"),
        ("similar", "special, a similar spelling"),
        ("several", "several teacher tokens"),
        ("repeated", "one teacher token without being its equal, such as 222 -> 2"),
        ("empty", "none: their mass is dropped"),
    ):
        if counts[kind] or kind != "similar":
            table.add_row(text, f"{counts[kind]:,}")
    Console(highlight=False, soft_wrap=True).print(table)
    console.print(f"built in {seconds:.2f} s -> {options.out}")


def _align(options: argparse.Namespace, console: Console) -> None:
    from dataclasses import asdict

    from xtoken_jax.alignment.chat import align_chats
    from xtoken_jax.alignment.rows import with_document_marks
    from xtoken_jax.alignment.spans import align_texts
    from xtoken_jax.display.alignment_table import columns, show_alignment

    file = options.file or options.chat
    if file is None:
        text = options.text
    else:
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: cannot be read as UTF-8 text ({error})") from error
    pair = _load_pair(options, console)
    if options.chat:
        try:
            messages = json.loads(text)
        except ValueError as error:
            raise UserError(f"{file}: not valid JSON ({error})") from error
        messages = messages.get("messages") if isinstance(messages, dict) else messages
        if not isinstance(messages, list):
            raise UserError(f'{file}: neither a list of messages nor {{"messages": [...]}}')
        (spans,) = align_chats(pair, [messages])
    else:
        (spans,) = align_texts(pair, [text])
    if options.marks:
        spans = with_document_marks(pair, spans)
    if options.json:
        _print_json([asdict(column) for column in columns(pair, spans)])
    else:
        show_alignment(pair, spans, Console(highlight=False))


def _evaluate(options: argparse.Namespace, console: Console) -> None:
    import jax

    from xtoken_jax.data.config import DataConfig
    from xtoken_jax.data.encode import read_parts, student_of
    from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents
    from xtoken_jax.evaluate.bits_per_byte import bits_per_byte
    from xtoken_jax.mesh import single_device_mesh
    from xtoken_jax.models.load import ModelConfig, open_model
    from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

    tokenizer = Tokenizer.load(options.model)
    if options.data is None:
        source = SourceConfig(kind=SourceKind.python_docs, split="validation")
    else:
        source = _source(options.data)
    data = DataConfig(
        validation={"text": source},
        student_length=options.length,
        teacher_length=options.length,
        batch_size=options.batch_size,
    )
    if options.length < 2 or options.batch_size < 1:
        raise UserError("--length must be at least 2 and --batch-size at least 1")
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
                length=options.length,
                targets=[row.targets for row in rows],
            )
    if options.json:
        _print_json({"bits_per_byte": value, "rows": len(rows)})
    else:
        print(f"{value:.4f} bits per byte over {len(rows)} rows of {options.data or 'Python documentation'}")


def _export(options: argparse.Namespace, console: Console) -> None:
    from xtoken_jax.runs import export_checkpoint

    step = export_checkpoint(
        options.run_folder,
        options.step,
        options.out,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    console.print(f"step {step} of {options.run_folder} -> {options.out}")


def _report(options: argparse.Namespace, console: Console) -> None:
    from xtoken_jax.report import draw_curves

    console.print(f"curves   {draw_curves(options.run_folder)}")


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    sys.exit(main())
