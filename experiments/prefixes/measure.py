"""What prefix KL's events are on real tokenizers and real text; no model takes part.

    make tokenizers                                            # once
    python experiments/prefixes/measure.py
    python experiments/prefixes/measure.py --pairs llama3_1:qwen3 --kinds numbers --examples 5

The first table counts the events of each pair and what its tables cost. The others walk through texts that
both tokenizers have encoded: the tokens that come are put into the events that the loss would put them
into, and where the two sides' tokens fall into different events, mass is mis-assigned. README.md beside
this file defines every figure. The defaults take three minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import alignment as benchmark_texts

from xtoken_jax.alignment.spans import Side, Spans, align_texts
from xtoken_jax.data.formats import python_docs
from xtoken_jax.hub import cache_folder
from xtoken_jax.projection.events import Continuations, PrefixTables
from xtoken_jax.projection.prefixes import prefix_tables
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

END = -1  # in `Continuations.following`: the token has ended, or the piece could come behind its end too
DOCUMENT = 4_000  # bytes
TEACHERS = ("qwen3", "gemma3", "gptoss", "gpt4o", "deepseek_v3", "llama2", "claude", "smollm2", "bert")
PAIRS = (*(f"llama3_1:{teacher}" for teacher in TEACHERS), "qwen3:llama3_1", "smollm2:qwen3", "llama2:gemma3")


@dataclass(frozen=True)
class TableFigures:
    """Of the tables of a pair.

    Attributes:
        events: connected components.
        one_to_one: those of one token on each side.
        student_tokens, teacher_tokens: tokens in the others.
        largest: tokens of the largest one, both sides.
        mixed: those in which a student token has several teacher pieces and a teacher token several
            student pieces.
        student_longest, teacher_longest: the longest run of `Continuations` that is compared.
        megabytes: of all arrays.
    """

    events: int
    one_to_one: int
    student_tokens: int
    teacher_tokens: int
    largest: int
    mixed: int
    student_longest: int
    teacher_longest: int
    megabytes: float


class Runs(NamedTuple):
    """`Continuations` as Python objects.

    Attributes:
        pieces: each token's pieces, D + 1 of them at most.
        goes_on: each token's row of `Continuations.following`.
        following: prefix of pieces -> how the tokens that begin with it go on (`END` among them), or None
            where all go on in one way.
        depth: D.
    """

    pieces: list[list[int]]
    goes_on: list[list[int]]
    following: dict[tuple[int, ...], frozenset[int] | None]
    depth: int

    @classmethod
    def of(cls, table: Continuations) -> Runs:
        """The same content."""
        depth = table.begin.shape[1]
        pieces = [[piece for piece in row if piece >= 0] for row in np.asarray(table.pieces).tolist()]
        following: dict[tuple[int, ...], frozenset[int] | None] = {}
        for token in np.asarray(table.order).tolist():
            for d in range(1, min(depth, len(pieces[token])) + 1):
                prefix = tuple(pieces[token][:d])
                if prefix not in following:
                    begin, size = table.begin[token, d - 1], table.size[token, d - 1]
                    run = table.following[table.order[begin : begin + size], d].tolist()
                    following[prefix] = frozenset(run) if size else None
        return cls(pieces, np.asarray(table.following).tolist(), following, depth)


class Events(NamedTuple):
    """`PrefixTables` as Python objects, student first.

    Attributes:
        of_token: each token's event, on each side; `count` for none.
        runs: of each side's tokens by the other's pieces.
        mixed: bool by event, False for none.
        alone: events of one token on each side come first; how many.
        count: of all.
    """

    of_token: tuple[list[int], list[int]]
    runs: tuple[Runs, Runs]
    mixed: list[bool]
    alone: int
    count: int

    @classmethod
    def of(cls, tables: PrefixTables) -> Events:
        """The same content."""
        return cls(
            (tables.student.event_of.tolist(), tables.teacher.event_of.tolist()),
            (Runs.of(tables.student_pieces), Runs.of(tables.teacher_pieces)),
            [*mixed_events(tables).tolist(), False],
            len(tables.student.single),
            tables.student.count,
        )


def mixed_events(tables: PrefixTables) -> np.ndarray:
    """bool [C]: both sides have a token there that is longer than the other's."""
    longer = []
    sides = ((tables.student, tables.student_pieces), (tables.teacher, tables.teacher_pieces))
    for components, table in sides:
        several = np.asarray(table.pieces)[:, 1] >= 0
        longer.append(np.bincount(components.event_of, several, components.count + 1)[:-1] > 0)
    return longer[0] & longer[1]


def table_figures(tables: PrefixTables) -> TableFigures:
    """The first table's row of a pair."""
    sides = (tables.student, tables.teacher)
    sizes = sum(np.bincount(side.event_of, minlength=side.count + 1)[:-1] for side in sides)
    parts = (tables.student, tables.teacher, tables.student_pieces, tables.teacher_pieces)
    arrays = [x for part in parts for x in vars(part).values() if isinstance(x, np.ndarray)]
    return TableFigures(
        tables.student.count,
        len(tables.student.single),
        len(tables.student.tokens),
        len(tables.teacher.tokens),
        int(sizes.max(initial=0)),
        int(mixed_events(tables).sum()),
        tables.student_pieces.longest,
        tables.teacher_pieces.longest,
        sum(x.nbytes for x in arrays) / 1e6,
    )


class Found(NamedTuple):
    """What texts have met.

    Attributes:
        counts: by name; README.md says what is counted under each.
        groups: how often (steps along "t" or "s", prefix, "one" or "several", group) came: at a boundary
            the token of one side begins with the prefix, or the tokens of the other do, and this is how
            they went on.
    """

    counts: Counter[str]
    groups: Counter[tuple[str, tuple[int, ...], str, int]]

    @classmethod
    def nothing(cls) -> Found:
        """Of no text."""
        return cls(Counter(), Counter())

    def distance(self, name: str) -> float:
        """Total variation between the two sides' groups of a prefix, on average over those that came."""
        by_prefix: dict[tuple[int, ...], dict[str, Counter[int]]] = {}
        for (along, prefix, side, group), count in self.groups.items():
            if along == name:
                by_prefix.setdefault(prefix, {"one": Counter(), "several": Counter()})[side][group] += count
        total, weight = 0.0, 0
        for sides in by_prefix.values():
            one, several = sides["one"], sides["several"]
            sizes = one.total(), several.total()
            if min(sizes):
                apart = sum(abs(one[g] / sizes[0] - several[g] / sizes[1]) for g in one | several)
                total, weight = total + min(sizes) * apart / 2, weight + min(sizes)
        return total / weight if weight else 0.0


class Meeting(NamedTuple):
    """A boundary whose two first tokens are not in one event: where it is, and the ids."""

    student_place: int
    teacher_place: int
    why: str


def text_figures(events: Events, spans: Spans, found: Found | None = None) -> Found:
    """What one aligned text meets.

    Args:
        events: of the pair.
        spans: the text, aligned; chunks that are not exact take no part, as in the loss.
        found: what to add to.
    """
    found = Found.nothing() if found is None else found
    for _ in walk(events, spans, found):
        pass
    return found


def walk(events: Events, spans: Spans, found: Found) -> Iterator[Meeting]:
    """`text_figures`, yielding the mis-assigned boundaries on the way."""
    sides = (spans.student, spans.teacher)
    ids = [side.ids.tolist() for side in sides]
    places = [_places(side, spans.chunk_count) for side in sides]
    # By place, the tokens that would have continued the chunk before.
    excluded: tuple[dict[int, frozenset[int]], ...] = ({}, {})
    for c in np.flatnonzero(spans.exact).tolist():
        first, past = zip(*(where[c] for where in places), strict=True)
        tokens = [ids[side][first[side] : past[side]] for side in (0, 1)]
        why = _boundary(events, [run[0] for run in tokens], first, excluded, found.counts)
        if why:
            yield Meeting(*first, why)
        found.counts[_shape(tokens)] += 1
        taken = 0
        for several in (1, 0):
            name = "ts"[1 - several]  # steps along the teacher's tokens are "t", along the student's "s"
            stream = ids[several][first[several] :]
            runs = events.runs[1 - several]
            if len(tokens[1 - several]) == 1:
                taken += _steps(
                    runs, tokens[1 - several][0], stream, len(tokens[several]), name, found.counts
                )
                told = _told(runs, tokens[1 - several][0], tokens[several])
                if told:
                    excluded[several][past[several] - 1] = told - {END}
            _prefixes(runs, tokens[1 - several][0], stream, name, found)
            found.counts[f"loose {name}"] += _loose(runs, tokens[1 - several], tokens[several])
        found.counts["chunks with a step"] += taken > 0


def _places(side: Side, count: int) -> list[tuple[int, int]]:
    """First place and the place past the last of each chunk."""
    inside = np.flatnonzero(side.chunks >= 0)
    chunks = side.chunks[inside]
    first = np.searchsorted(chunks, np.arange(count))
    last = np.searchsorted(chunks, np.arange(count), side="right") - 1
    return list(zip(inside[first].tolist(), (inside[last] + 1).tolist(), strict=True)) if count else []


def _boundary(
    events: Events,
    tokens: Sequence[int],
    first: Sequence[int],
    excluded: Sequence[dict[int, frozenset[int]]],
    found: Counter[str],
) -> str:
    """Why the first tokens of a chunk are not in one event; empty where they are."""
    own, other = (events.of_token[side][tokens[side]] for side in (0, 1))
    out = [tokens[side] in excluded[side].get(first[side] - 1, ()) for side in (0, 1)]
    found["boundaries"] += 1
    found["mixed"] += events.mixed[own] or events.mixed[other]
    found["several"] += own >= events.alone or other >= events.alone
    found["excluded student"] += out[0]
    found["excluded teacher"] += out[1]
    why = ""
    if events.count in (own, other):
        why = "in none"
    elif own != other:
        why = "different"
    found[why] += bool(why)
    why = why or ("excluded" if any(out) else "")
    found["mis-assigned"] += bool(why)
    return why


def _shape(tokens: Sequence[Sequence[int]]) -> str:
    return ":".join("1" if len(run) == 1 else "n" for run in tokens)


def _steps(runs: Runs, one: int, stream: list[int], length: int, name: str, found: Counter[str]) -> int:
    """Along a chunk's `length` tokens of the side with several, the first of `stream`; steps taken."""
    pieces, taken = runs.pieces[one], 0
    for d in range(1, length + 1):
        found[f"steps {name}"] += 1
        if d > runs.depth or pieces[:d] != stream[:d]:
            found[f"{'deep' if d > runs.depth else 'departed'} {name}"] += 1
            continue
        following = runs.following[tuple(stream[:d])]
        if following is None:
            continue
        taken += 1
        found[f"taken {name}"] += 1
        # Behind the last token of a text nothing is seen.
        if d < len(stream):
            found[f"differs {name}"] += _seen(following, stream[d]) != runs.goes_on[one][d]
    return taken


def _seen(following: frozenset[int], token: int) -> int:
    return token if token in following else END


def _told(runs: Runs, one: int, several: list[int]) -> frozenset[int] | None:
    """How the tokens go on that begin as the whole chunk does; None where the loss takes no step."""
    if len(several) > runs.depth or runs.pieces[one][: len(several)] != several:
        return None
    return runs.following[tuple(several)]


def _prefixes(runs: Runs, one: int, stream: list[int], name: str, found: Found) -> None:
    """Prefixes with something to tell: of the pieces of `one` and of `stream`, or of one of them alone."""
    pieces = runs.pieces[one]
    for d in range(1, min(runs.depth, len(stream) - 1) + 1):
        expected, came = tuple(pieces[:d]), tuple(stream[:d])
        told = runs.following[expected] if d <= len(pieces) else None
        seen = runs.following.get(came)
        if told:
            found.groups[name, expected, "one", runs.goes_on[one][d]] += 1
        if seen:
            found.groups[name, came, "several", _seen(seen, stream[d])] += 1
        if expected == came:
            differs = seen and _seen(seen, stream[d]) != runs.goes_on[one][d]
            found.counts[f"prefix differs {name}"] += bool(differs)
        else:
            found.counts[f"prefix expected {name}"] += bool(told)
            found.counts[f"prefix came {name}"] += bool(seen)
        if d > len(pieces) and came not in runs.following:
            return


def _loose(runs: Runs, one: list[int], several: list[int]) -> int:
    """Boundaries of `several` within the chunk that no exclusion would cover, had the chunk ended there."""
    if len(one) > 1:
        return len(several) - 1
    ends = 0
    for d in range(1, len(several)):
        following = runs.following.get(tuple(several[:d])) if d <= runs.depth else None
        covered = following and END in following and several[d] in following
        ends += not covered
    return ends


def english(size: int) -> str:
    """Topics of Python's help() and docstrings of its library, in an order unrelated to their names."""
    return "\n\n".join(python_docs.split_of(python_docs.topics() | python_docs.docstrings(), "training"))[
        :size
    ]


def code(size: int) -> str:
    """Modules of Python's standard library, as they are."""
    library = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(library.glob("*.py"), key=lambda path: hashlib.sha256(path.name.encode()).digest())
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)[:size]


KINDS: dict[str, Callable[[int], str]] = {
    "english": english,
    "code": code,
    "numbers": benchmark_texts.numbers,
    "chinese": benchmark_texts.chinese,
}


def documents(kind: str, size: int) -> list[str]:
    """About `size` bytes of text, in documents of `DOCUMENT` bytes."""
    raw = KINDS[kind](size).encode()[:size]
    return [raw[start : start + DOCUMENT].decode(errors="ignore") for start in range(0, len(raw), DOCUMENT)]


def share(part: float, whole: float) -> str:
    """In percent."""
    return f"{100 * part / whole:.2f}" if whole else ""


TABLE_COLUMNS = (
    "pair | events | one to one | student tokens in the others | teacher tokens | largest | mixed | "
    "longest run, student | teacher | MB | seconds"
)


def table_row(name: str, figures: TableFigures, seconds: float) -> str:
    """Of the first table."""
    counts = list(asdict(figures).values())[:-1]
    cells = " | ".join(f"{count:,}" for count in counts)
    return f"{name} | {cells} | {figures.megabytes:.0f} | {seconds:.1f}"


TEXT_COLUMNS = {
    "boundaries": (
        "pair | text | boundaries | in several-token events % | in mixed ones % | mis-assigned % | "
        "different % | in none % | first token excluded, student % | teacher % | "
        "loose per 100, teacher | student"
    ),
    "chunks": "pair | text | 1:1 % | 1:n % | n:1 % | n:n % | with a step %",
    "steps": (
        "pair | text | along | steps | taken % | departed % | too deep % | taken, other event % | "
        "prefix of one side, per 100 taken | bound % | context-free %"
    ),
}


def text_rows(pair: str, kind: str, texts: Found) -> dict[str, list[str]]:
    """Rows of the tables of `TEXT_COLUMNS`."""
    found = texts.counts
    count = found["boundaries"]
    begin = f"{pair} | {kind}"
    names = (
        "several", "mixed", "mis-assigned", "different", "in none", "excluded student", "excluded teacher",
        "loose t", "loose s",
    )  # fmt: skip
    boundary = " | ".join(share(found[name], count) for name in names)
    shapes = " | ".join(
        share(found[name], count) for name in ("1:1", "1:n", "n:1", "n:n", "chunks with a step")
    )
    steps = []
    for side, label in (("t", "teacher"), ("s", "student")):
        total, taken = found[f"steps {side}"], found[f"taken {side}"]
        alone = found[f"prefix expected {side}"] + found[f"prefix came {side}"]
        cells = (
            f"{total:,}", share(taken, total), share(found[f"departed {side}"], total),
            share(found[f"deep {side}"], total),
            share(found[f"differs {side}"], taken), share(alone, taken),
            share(found[f"prefix differs {side}"] + alone, taken), share(texts.distance(side), 1),
        )  # fmt: skip
        steps.append(f"{begin} | {label} | {' | '.join(cells)}")
    return {
        "boundaries": [f"{begin} | {count:,} | {boundary}"],
        "chunks": [f"{begin} | {shapes}"],
        "steps": steps,
    }


def examples(pair: TokenizerPair, events: Events, all_spans: Iterable[Spans], most: int) -> list[str]:
    """Mis-assigned boundaries of both sides, different pairs of tokens, in the order of the text."""
    lines: dict[tuple[int, int], str] = {}
    for spans in all_spans:
        for meeting in walk(events, spans, Found.nothing()):
            if len(lines) == most:
                return list(lines.values())
            s, t = meeting.student_place, meeting.teacher_place
            student, teacher = spans.student.ids, spans.teacher.ids
            ahead = (
                "+".join(repr(tokenizer.decode(ids[i : i + 1])) for i in range(at, min(at + 3, len(ids))))
                for tokenizer, ids, at in ((pair.student, student, s), (pair.teacher, teacher, t))
            )
            behind = pair.student.decode(student[max(0, s - 6) : s])[-20:]
            line = "{}: after {!r} the student has {}, the teacher {}".format(meeting.why, behind, *ahead)
            lines.setdefault((int(student[s]), int(teacher[t])), line)
    return list(lines.values())


def table(title: str, columns: str, rows: list[str]) -> None:
    """As Markdown."""
    print(f"\n{title}\n\n| {columns} |\n|{'---|' * (columns.count('|') + 1)}")
    for row in rows:
        print(f"| {row} |")


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizers",
        type=Path,
        default=cache_folder() / "tokenizers",
        metavar="DIR",
        help="one Hugging Face folder a tokenizer (default: %(default)s)",
    )
    parser.add_argument(
        "--pairs",
        nargs="+",
        default=list(PAIRS),
        metavar="STUDENT:TEACHER",
        help="names of folders (default: Llama 3.1 with every teacher, and three others)",
    )
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of text")
    parser.add_argument(
        "--kilobytes", type=int, default=200, metavar="N", help="of each kind of text (default: %(default)s)"
    )
    parser.add_argument(
        "--examples",
        type=int,
        default=0,
        metavar="N",
        help="also show N mis-assigned boundaries of each kind",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all counts to a file")
    return parser


def main() -> int:
    """Prints the tables."""
    parser = options()
    args = parser.parse_args()
    for pair in args.pairs:
        if pair.count(":") != 1:
            parser.error(f"{pair}: not STUDENT:TEACHER, as in llama3_1:qwen3")
    names = sorted({name for pair in args.pairs for name in pair.split(":")})
    absent = [name for name in names if not (args.tokenizers / name / "tokenizer.json").is_file()]
    if absent:
        parser.error(f"{', '.join(absent)}: no tokenizer.json in {args.tokenizers}; run `make tokenizers`")
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    first: list[str] = []
    rows: dict[str, list[str]] = {title: [] for title in TEXT_COLUMNS}
    shown: list[str] = []
    counts: dict[str, dict] = {}
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tokenizers", total=len(names) + len(args.pairs) * (1 + len(args.kinds)))
        loaded = {}
        for name in names:
            loaded[name] = Tokenizer.load(args.tokenizers / name, compare_auto=False)
            progress.advance(task)
        texts = {kind: documents(kind, 1_000 * args.kilobytes) for kind in args.kinds}
        for name in args.pairs:
            progress.update(task, description=name)
            pair = TokenizerPair(*(loaded[side] for side in name.split(":")))
            start = time.perf_counter()
            tables = prefix_tables(pair)
            seconds = time.perf_counter() - start
            figures = table_figures(tables)
            first.append(table_row(name, figures, seconds))
            counts[name] = {"tables": asdict(figures)}
            events = Events.of(tables)
            progress.advance(task)
            for kind in args.kinds:
                progress.update(task, description=f"{name}, {kind}")
                all_spans = align_texts(pair, texts[kind])
                found = Found.nothing()
                for spans in all_spans:
                    text_figures(events, spans, found)
                counts[name][kind] = dict(found.counts)
                for title, made in text_rows(name, kind, found).items():
                    rows[title] += made
                for line in examples(pair, events, all_spans, args.examples) if args.examples else ():
                    shown.append(f"{name}, {kind}: {line}")
                progress.advance(task)
    table("Events", TABLE_COLUMNS, first)
    for title, columns_of in TEXT_COLUMNS.items():
        table(title.capitalize(), columns_of, rows[title])
    print("\n" + "\n".join(shown) if shown else "")
    if args.json:
        args.json.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
