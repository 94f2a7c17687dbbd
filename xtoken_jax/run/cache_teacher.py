"""A teacher, run once over the text of an experiment, to train from its outputs without it."""

from __future__ import annotations

import contextlib
import datetime
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.encode import Document, cut_parts, encode
from xtoken_jax.distributed.mesh import check_batch_size, make_mesh
from xtoken_jax.distributed.processes import from_first, is_first
from xtoken_jax.errors import UserError
from xtoken_jax.files.folders import locked
from xtoken_jax.models.load import open_model
from xtoken_jax.run.agreement import agree_on, agree_on_settings
from xtoken_jax.run.experiment import Experiment
from xtoken_jax.run.fingerprints import DAY, names_of, of_held_out, of_teacher, of_text
from xtoken_jax.run.held_out import describe_held_out, held_out_parts, read_texts
from xtoken_jax.run.teachers import chat_templates, group_of, model_warnings, open_tokenizers
from xtoken_jax.teacher_cache.distributions import Keep
from xtoken_jax.teacher_cache.reader import Index, ShardInfo, add_shard, difference, is_whole, read_index
from xtoken_jax.teacher_cache.writer import BINS, Part, TeacherRun
from xtoken_jax.tokens.tokenizer import TokenizerPair
from xtoken_jax.train.non_finite import model_remedy, outputs_of
from xtoken_jax.train.progress import Bar

SHARD_BYTES = 64 * 2**20  # about as many, before compression
_AT_ONCE = 64  # documents encoded in one call


@dataclass(frozen=True)
class Summary:
    """What a cache holds and what it lost.

    Attributes:
        index: of the cache.
        tokens, bytes, raw_bytes: the teacher's tokens; bytes on disk, and before compression.
        lost: name -> value: mean and 99th percentile of the mass that is not kept and of the KL from the
            teacher to what is read back, cross-entropy of the text, share of its tokens among the likeliest.
        tokens_per_second: of what this call computed; None where nothing was left to do.
    """

    index: Index
    tokens: int
    bytes: int
    raw_bytes: int
    lost: dict[str, float]
    tokens_per_second: float | None


def cache_teacher(
    experiment: Experiment,
    teacher: str,
    keep: Keep,
    out: Path,
    console: Console,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Summary | None:
    """Write a teacher's outputs over the training text, or go on with it where the folder holds a part.

    A shard holds whole documents and is run on its own, so that what is in it does not depend on where an
    earlier call ended: the folder comes out the same to the byte. Several processes run the teacher together,
    a shard at a time, each packs what its devices made, and process 0, which alone sees the folder, writes.

    Args:
        experiment: validated; its teacher, data, lengths and mesh are read.
        teacher: its name, "teacher" for the first one.
        keep: how much of each distribution.
        out: the folder.
        console: where progress is shown.
        shard_bytes: of a shard before compression, about; the same in every call.

    Returns:
        What the folder holds, on process 0; None on others.

    Raises:
        UserError: whatever is wrong with what the experiment names; a folder of another cache, or one that
            another process is writing; a teacher whose outputs are not finite; processes that were started
            otherwise, or read other content.
    """
    with contextlib.ExitStack() as locks:
        return _cache_teacher(experiment, teacher, keep, out, console, shard_bytes, locks)


def _cache_teacher(
    experiment: Experiment,
    teacher: str,
    keep: Keep,
    out: Path,
    console: Console,
    shard_bytes: int,
    locks: contextlib.ExitStack,
) -> Summary | None:
    configs = experiment.every_teacher()
    if teacher not in configs:
        raise UserError(f"--teacher {teacher}: no such teacher; there is {', '.join(configs) or 'none'}")
    agree_on_settings(experiment, {"--teacher": teacher, "--out": str(out), **_named(keep)})
    mesh = make_mesh(experiment.mesh)
    check_batch_size(mesh, experiment.data.batch_size)
    student, pairs = open_tokenizers(experiment, from_first(lambda: _day_of(out)))
    size = pairs[teacher].teacher.size
    if keep.top_k is not None and keep.top_k >= size:
        keep = keep._replace(top_k=None)
    with console.status("reading the text"):
        train, validation = read_texts(experiment)
        texts = of_held_out(experiment, validation)
    if (line := describe_held_out(experiment, train, validation)) is not None:
        console.print(f"held out {line}", markup=False)
    made_of = of_teacher(experiment, teacher, pairs) | of_text(train)
    made_of |= chat_templates(student, pairs, [*train.values(), *validation.values()])
    agree_on(made_of | texts)
    index = Index(made_of, {**keep._asdict(), "temperatures": list(keep.temperatures)}, size, list(train))
    index.names = names_of(experiment, teacher)
    if is_first():  # an error in which ends all
        locks.enter_context(locked(out, "--out"))
        index = _begin(out, index)
    whole = _Whole(*from_first(lambda: _whole(out, index)))
    measured = from_first(lambda: index.held_out == texts)
    rate = None
    if not whole.complete or not measured:
        with jax.set_mesh(mesh):
            model, params = open_model(configs[teacher], size, mesh=mesh, key=jax.random.key(0))
            for warning in model_warnings(experiment, teacher, model, pairs[teacher].teacher):
                console.print(f"warning  {warning}", markup=False, style="yellow")
            if not whole.complete:
                text = _Text(pairs, train, experiment.data, teacher)
                run = TeacherRun(model, params, mesh, keep, index.form, experiment.data.batch_size)
                rate = _fill(out, index, whole, run, text, run.tokens_of(shard_bytes), console)
            with console.status("measuring the teacher on the held-out text"):
                held_out = held_out_parts(experiment, student, pairs, validation)
                index.figures = held_out.of_teacher(teacher, model, params)
            index.held_out, index.complete = texts, True
            if is_first():
                index.write(out)
    return summarized(index, rate) if is_first() else None


def _day_of(out: Path) -> str:
    """The date that chat templates write in the cache at `out`; today's for a new one."""
    index = read_index(out)
    day = None if index is None else index.made_of.get(DAY)
    return datetime.date.today().isoformat() if day is None else day


def _named(keep: Keep) -> dict[str, Any]:
    """As the command's options are called."""
    return {
        f"--{name.replace('_', '-')}": list(v) if isinstance(v, tuple) else v
        for name, v in keep._asdict().items()
    }


@dataclass(frozen=True)
class _Whole:
    """What process 0 finds of a cache.

    Attributes:
        shards: (source, document) where each begins and the next one does; None for one that is damaged.
        complete: whether that is all.
    """

    shards: list[tuple[list[int], list[int]] | None]
    complete: bool

    def behind(self, number: int, first: tuple[int, int]) -> tuple[int, int] | None:
        """Where a shard that begins there ends; None where it is yet to be made."""
        found = self.shards[number] if number < len(self.shards) else None
        if found is None or tuple(found[0]) != first:
            return None
        source, document = found[1]
        return source, document


def _whole(out: Path, index: Index) -> list[Any]:
    """The fields of `_Whole`; a cache with a damaged shard is not complete."""
    shards = [
        [shard.first, shard.next] if is_whole(out, shard) and shard.lost else None for shard in index.shards
    ]
    index.complete = index.complete and None not in shards
    return [shards, index.complete]


def _begin(out: Path, mine: Index) -> Index:
    """The folder's index where it is of this very cache, else a new one."""
    there = read_index(out)
    if there is not None:
        theirs, ours = (
            {**index.made_of, **{f"keep.{name}": value for name, value in index.keep.items()}}
            for index in (there, mine)
        )
        for key in dict.fromkeys([*theirs, *ours]):
            if theirs.get(key) != ours.get(key):
                found = f"{key}={difference(key, theirs.get(key), ours.get(key), there.names, mine.names)}"
                what = "choose another --out, or delete that folder"
                raise UserError(f"{out}: holds another teacher cache ({found}); {what}")
        return there
    mine.write(out)
    return mine


@dataclass(frozen=True)
class _Text:
    """The documents, by source, and how they become the teacher's parts."""

    pairs: Mapping[str, TokenizerPair]
    documents: Mapping[str, Sequence[Document]]
    config: DataConfig
    teacher: str

    @property
    def length(self) -> int:
        """T_t."""
        return self.config.length_of(self.teacher)

    def parts(self, first: tuple[int, int], tokens: int) -> tuple[list[Part], tuple[int, int]]:
        """Those of whole documents from (source, document) on, up to so many tokens or more; the next one."""
        found: list[Part] = []
        held = 0
        for source, texts in enumerate(self.documents.values()):
            if source < first[0]:
                continue
            begin = first[1] if source == first[0] else 0
            for start in range(begin, len(texts), _AT_ONCE):
                rows = encode(self.pairs, texts[start : start + _AT_ONCE])
                for document, row in enumerate(rows, start):
                    for number, part in enumerate(cut_parts(row, self.config)):
                        ids = part[self.teacher].teacher.ids
                        found.append(Part((source, document, number), ids))
                        held += len(ids)
                    if held >= tokens:
                        last = document + 1 == len(texts)
                        return found, (source + 1, 0) if last else (source, document + 1)
        return found, (len(self.documents), 0)


def _fill(
    out: Path, index: Index, whole: _Whole, run: TeacherRun, text: _Text, tokens: int, console: Console
) -> float:
    """Write the shards that are not there or not whole; the teacher's tokens a second."""
    sizes = [len(texts) for texts in text.documents.values()]
    place, number, done = (0, 0), 0, 0
    started = time.perf_counter()

    def count(place: tuple[int, int]) -> int:
        return sum(sizes[: place[0]]) + place[1]

    with Bar(console, "caching", sum(sizes), unit="documents") as bar, ThreadPoolExecutor(1) as reader:
        coming: Future[tuple[list[Part], tuple[int, int]]] | None = None
        while place[0] < len(sizes):
            following = whole.behind(number, place)
            if following is None:
                parts, following = text.parts(place, tokens) if coming is None else coming.result()
                if not parts:
                    break
                coming = None
                if following[0] < len(sizes) and whole.behind(number + 1, following) is None:
                    coming = reader.submit(text.parts, following, tokens)  # read while the teacher runs
                begin, length = count(place), count(following) - count(place)
                made = run.shard(
                    parts,
                    text.length,
                    lambda share, begin=begin, length=length: bar.update(  # type: ignore[misc]
                        completed=begin + int(share * length)
                    ),
                )
                if not math.isfinite(made.lost["divergence"]["sum"]):
                    source = index.sources[place[0]]
                    raise UserError(
                        f"{outputs_of(text.teacher)} are not finite somewhere from {source} document "
                        f"{place[1]} on; {model_remedy(group_of(text.teacher), run.model)}"
                    )
                if is_first():
                    index.width = max(index.width, made.width)
                    add_shard(
                        out, index, number, made.entries,
                        first=place, next=following, raw_bytes=made.raw_bytes, lost=made.lost,
                    )  # fmt: skip
                done += sum(len(part.ids) for part in parts)
                rate = done / (time.perf_counter() - started)
                bar.line(f"{rate:,.0f} tokens/s", completed=count(following))
                bar.update(shown=f"{rate:,.0f} tokens/s")
            place, number = following, number + 1
            bar.update(completed=count(place))
    del index.shards[number:]
    return done / (time.perf_counter() - started)


def summarized(index: Index, rate: float | None = None) -> Summary:
    """A cache in numbers."""
    shards = index.shards
    lost: dict[str, float] = {}
    for name in ("mass", "divergence"):
        tokens = sum(shard.lost["tokens"] for shard in shards)
        lost[f"mean_{name}"] = sum(shard.lost[name]["sum"] for shard in shards) / tokens
        lost[f"p99_{name}"] = _percentile(shards, name, tokens)
    labels = sum(shard.lost["labels"] for shard in shards)
    lost["cross_entropy"] = sum(shard.lost["label"] for shard in shards) / max(labels, 1)
    lost["label_among_kept"] = sum(shard.lost["found"] for shard in shards) / max(labels, 1)
    return Summary(
        index,
        sum(shard.tokens for shard in shards),
        sum(shard.bytes for shard in shards),
        sum(shard.raw_bytes for shard in shards),
        lost,
        rate,
    )


def _percentile(shards: list[ShardInfo], name: str, tokens: int) -> float:
    """The 99th, as the upper edge of its bin, which is 4% wide."""
    bins: dict[int, int] = {}
    for shard in shards:
        for number, count in shard.lost[name]["bins"].items():
            bins[int(number)] = bins.get(int(number), 0) + count
    above = 0
    for number in sorted(bins, reverse=True):
        above += bins[number]
        if above > tokens / 100:
            return 2 ** (number / BINS)
    return 0.0
