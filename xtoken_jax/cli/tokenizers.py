"""`xtoken audit`, `project` and `align`: what two tokenizers have in common."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.console import Console
from rich.table import Table

from xtoken_jax.display.terminal import Terminal
from xtoken_jax.errors import UserError, first_line
from xtoken_jax.files import parse_json, to_json

_CONTROLS = re.compile("[\x7f-\x9f\ud800-\udfff]")

if TYPE_CHECKING:
    from xtoken_jax.data.sources import SourceConfig
    from xtoken_jax.tokens.tokenizer import TokenizerPair


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """To the parser, by its `command(name, run, text, epilog)`."""

    def takes_pair(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--student", required=True, metavar="DIR", help="Hugging Face folder or hub id")
        sub.add_argument("--teacher", required=True, metavar="DIR", help="Hugging Face folder or hub id")

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
    takes_source(sub, "--text-file")
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


def _load_pair(options: argparse.Namespace, console: Console) -> TokenizerPair:
    from xtoken_jax.tokens.tokenizer import TokenizerPair

    with console.status("loading the tokenizers"):
        return TokenizerPair.load(options.student, options.teacher)


def _introduce(pair: TokenizerPair, console: Console) -> None:
    """Say on stderr what the two tokenizers are; an error is a line by itself, so only before results."""
    for side, tokenizer in (("student", pair.student), ("teacher", pair.teacher)):
        console.print(f"{side}  {tokenizer.name}: {tokenizer.describe()}", markup=False)
        if tokenizer.warning:
            console.print(f"warning: {tokenizer.name}: {tokenizer.warning}", markup=False, style="yellow")


def _audit(options: argparse.Namespace, console: Console) -> None:
    from xtoken_jax.coverage.audit import audit
    from xtoken_jax.data.markers import spelled_markers
    from xtoken_jax.data.records import text_of
    from xtoken_jax.data.sources import read_documents
    from xtoken_jax.display.audit_table import show_audit
    from xtoken_jax.projection.cache import cached_projection

    if options.source and options.text_file is None:
        raise UserError(
            "--source: sets how --text-file is read, and there is none; name it, or leave this out"
        )
    critical, documents = (
        None if path is None else read_documents(source_of(path, settings))
        for path, settings in ((options.critical_file, ()), (options.text_file, options.source))
    )
    critical_text, text = (
        None if part is None else [text_of(document) for document in part] for part in (critical, documents)
    )
    pair = _load_pair(options, console)
    projection = cached_projection(pair)
    found = audit(pair, projection, critical_tokens=options.critical, critical_text=critical_text, text=text)
    _introduce(pair, console)
    if documents is not None:
        tokenizers = pair.student, pair.teacher
        line = spelled_markers(options.text_file, documents, tokenizers, sample=len(documents))
        if line is not None:
            console.print(f"warning: {line}", markup=False, style="yellow")
    if options.json:
        print_json(found.to_dict())
    else:
        show_audit(found, Terminal())
    if options.picture:
        from xtoken_jax.display.audit_pictures import draw_audit, draw_row

        rows = options.picture.with_stem(options.picture.stem + "-rows")
        draw_audit(found, options.picture)
        draw_row(pair, projection, options.critical or None, rows)
        console.print(f"coverage  {options.picture}\nrows      {rows}")


def takes_source(sub: argparse.ArgumentParser, option: str) -> None:
    """Add the argument with the settings of the data that another option names."""
    sub.add_argument(
        "--source",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help=f"how {option} is read, as in data.train.NAME of distill: field=body, kind=lines, records=data",
    )


def source_of(path: str, settings: Sequence[str] = ()) -> SourceConfig:
    """Data that a command names: a file with an ending of no kind is a text.

    Args:
        path: of the data.
        settings: others of the source, as KEY=VALUE.

    Raises:
        UserError: no setting of a source, or a value that makes no sense.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from xtoken_jax.data.sources import SourceConfig, SourceKind, kind_of

    file = Path(os.path.expanduser(path))
    if str(file).startswith("~"):
        raise UserError(f"{path}: no such user on this machine as {file.parts[0]}")
    text = file.is_file() and kind_of(file) is None
    kind = SourceKind.text if text else SourceKind.auto
    try:
        config = OmegaConf.structured(SourceConfig(kind=kind, path=path))
        merged = OmegaConf.to_object(OmegaConf.merge(config, OmegaConf.from_dotlist([*settings])))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(
            f"--source {' '.join(settings)}: {first_line(error)}; give settings of a source as KEY=VALUE, "
            "such as field=body"
        ) from error
    source = cast(SourceConfig, merged)
    source.validate("--source")
    return source


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
    _introduce(pair, console)
    counts = count_rows(pair, projection)
    size, teacher_size = pair.student.size, pair.teacher.size
    if options.json:
        shape = {"rows": size, "teacher_size": teacher_size}
        rest = {"options": asdict(how), "seconds": round(seconds, 3), "file": str(options.out)}
        print_json({**shape, **counts, **rest})
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
    Terminal().print(table)
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
    if options.chat:
        messages = parse_json(text, str(file), what="a conversation", remedy="correct it", kind=object)
        messages = messages.get("messages") if isinstance(messages, dict) else messages
        if not isinstance(messages, list):
            raise UserError(f'{file}: neither a list of messages nor {{"messages": [...]}}')
    pair = _load_pair(options, console)
    (spans,) = align_chats(pair, [messages]) if options.chat else align_texts(pair, [text])
    _introduce(pair, console)
    if options.marks:
        spans = with_document_marks(pair, spans)
    if options.json:
        print_json([asdict(column) for column in columns(pair, spans)])
    else:
        show_alignment(pair, spans, Terminal())


def print_json(content: Any) -> None:
    """On stdout, indented; control characters beyond ASCII, of which terminals make commands, as escapes."""
    text = to_json(content, indent=2, ensure_ascii=False)
    print(_CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text))
