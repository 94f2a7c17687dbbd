"""A teacher, run once over the text of an experiment, to train from its outputs without it."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from xtoken_jax.alignment.align import pad
from xtoken_jax.cache_contents import of_held_out, of_teacher, of_text
from xtoken_jax.config import Experiment
from xtoken_jax.data.cache_shards import Entry, Form, PartRows, packed
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.encode import Document, cut_parts, encode
from xtoken_jax.data.sources import read_sources
from xtoken_jax.data.teacher_cache import Index, ShardInfo, add_shard, is_whole, read_index
from xtoken_jax.errors import UserError
from xtoken_jax.evaluate.distributions import Keep, Kept, Lost, distributions
from xtoken_jax.held_out import held_out_parts, read_held_out
from xtoken_jax.mesh import batch_sharding, check_batch_size, make_mesh
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.load import open_model
from xtoken_jax.teachers import chat_templates, open_tokenizer
from xtoken_jax.tokens.tokenizer import TokenizerPair

SHARD_BYTES = 64 * 2**20  # about as many, before compression
_AT_ONCE = 64  # documents encoded in one call
_SHORTEST = 16  # rows of fewer tokens are not worth a program of their own
_BINS = 16  # of a histogram, to a factor of 2


class _Part(NamedTuple):
    """A part of a document: where it comes from, the source by number, and the teacher's tokens."""

    key: tuple[int, int, int]
    ids: np.ndarray


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
) -> Summary:
    """Write a teacher's outputs over the training text, or go on with it where the folder holds a part.

    A shard holds whole documents and is run on its own, so that what is in it does not depend on where an
    earlier call ended: the folder comes out the same to the byte.

    Args:
        experiment: validated; its teacher, data, lengths and mesh are read.
        teacher: its name, "teacher" for the first one.
        keep: how much of each distribution.
        out: the folder.
        console: where progress is shown.
        shard_bytes: of a shard before compression, about; the same in every call.

    Raises:
        UserError: whatever is wrong with what the experiment names; a folder of another cache; a teacher
            whose outputs are not finite.
    """
    configs = experiment.every_teacher()
    if teacher not in configs:
        raise UserError(f"--teacher {teacher}: no such teacher; there is {', '.join(configs) or 'none'}")
    mesh = make_mesh(experiment.mesh)
    check_batch_size(mesh, experiment.data.batch_size)
    student = open_tokenizer(experiment.student)
    pairs = {name: TokenizerPair(student, open_tokenizer(config)) for name, config in configs.items()}
    size = pairs[teacher].teacher.size
    if keep.top_k is not None and keep.top_k >= size:
        keep = keep._replace(top_k=None)
    with console.status("reading the text"):
        train = read_sources(experiment.data.train)
        validation = read_held_out(experiment)
        texts = of_held_out(experiment, validation)
    made_of = of_teacher(experiment, teacher, pairs) | of_text(train)
    made_of |= chat_templates(student, pairs, [*train.values(), *validation.values()])
    index = _begin(
        out, Index(made_of, {**keep._asdict(), "temperatures": list(keep.temperatures)}, size, list(train))
    )
    if index.complete and not all(is_whole(out, shard) for shard in index.shards):
        index.complete = False
    rate = None
    if not index.complete or index.held_out != texts:
        with jax.set_mesh(mesh):
            model, params = open_model(configs[teacher], size, mesh=mesh, key=jax.random.key(0))
            if not index.complete:
                text = _Text(pairs, train, experiment.data, teacher)
                run = _Run(model, params, mesh, keep, index.form, experiment.data.batch_size)
                rate = _fill(out, index, run, text, run.tokens_of(shard_bytes), console)
            with console.status("measuring the teacher on the held-out text"):
                held_out = held_out_parts(experiment, student, pairs, validation)
                index.figures = held_out.of_teacher(teacher, model, params)
            index.held_out, index.complete = texts, True
            index.write(out)
    return summarized(index, rate)


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
                found = f"{key}={theirs.get(key)} there, {ours.get(key)} here"
                what = "choose another --out, or delete that folder"
                raise UserError(f"{out}: holds another teacher cache ({found}); {what}")
        return there
    try:
        out.mkdir(parents=True, exist_ok=True)
        mine.write(out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
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

    def parts(self, first: tuple[int, int], tokens: int) -> tuple[list[_Part], tuple[int, int]]:
        """Those of whole documents from (source, document) on, up to so many tokens or more; the next one."""
        found: list[_Part] = []
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
                        found.append(_Part((source, document, number), ids))
                        held += len(ids)
                    if held >= tokens:
                        last = document + 1 == len(texts)
                        return found, (source + 1, 0) if last else (source, document + 1)
        return found, (len(self.documents), 0)


def _fill(out: Path, index: Index, run: _Run, text: _Text, tokens: int, console: Console) -> float:
    """Write the shards that are not there or not whole; the teacher's tokens a second."""
    sizes = [len(texts) for texts in text.documents.values()]
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("documents"),
        TimeRemainingColumn(), TextColumn("{task.fields[shown]}"),
    )  # fmt: skip
    place, number, done = (0, 0), 0, 0
    started = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("caching", total=sum(sizes), shown="")
        while place[0] < len(sizes):
            known = index.shards[number] if number < len(index.shards) else None
            if known is not None and known.first == place and is_whole(out, known):
                following = known.next
            else:
                parts, following = text.parts(place, tokens)
                if not parts:
                    break
                entries, raw, width, lost = run.shard(parts, text.length)
                if not math.isfinite(lost["divergence"]["sum"]):
                    source = index.sources[place[0]]
                    raise UserError(
                        f"the teacher's outputs are not finite somewhere from {source} document {place[1]} "
                        "on; is teacher.compute_dtype too narrow for it?"
                    )
                index.width = max(index.width, width)
                add_shard(out, index, number, entries, first=place, next=following, raw_bytes=raw, lost=lost)
                done += sum(len(part.ids) for part in parts)
                rate = done / (time.perf_counter() - started)
                progress.update(bar, shown=f"{rate:,.0f} tokens/s")
            place, number = following, number + 1
            progress.update(bar, completed=sum(sizes[: place[0]]) + place[1])
    del index.shards[number:]
    return done / (time.perf_counter() - started)


@dataclass(frozen=True)
class _Run:
    """The teacher, and how its outputs are kept."""

    model: Model
    params: Params
    mesh: Mesh
    keep: Keep
    form: Form
    batch_size: int

    def tokens_of(self, size: int) -> int:
        """Tokens that take about so many bytes."""
        width = self.form.size if self.keep.top_k is None else min(self.keep.top_k, self.form.size)
        return max(1, size // (4 * width))

    def shard(self, parts: list[_Part], length: int) -> tuple[list[Entry], int, int, dict]:
        """The entries of a shard, their bytes before compression, the widest distribution, what was lost."""
        found: dict[int, PartRows] = {}
        lost = _Losses()
        lengths = [length]
        while lengths[-1] > _SHORTEST:
            lengths.append(-(-lengths[-1] // 2))
        by_length: dict[int, list[int]] = {}
        for place, part in enumerate(parts):
            fitting = min(size for size in lengths if size >= len(part.ids))
            by_length.setdefault(fitting, []).append(place)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for fitting, places in sorted(by_length.items()):
                rows = self.batch_size * (length // fitting)
                for first in range(0, len(places), rows):
                    here = places[first : first + rows]
                    self._batch([parts[place] for place in here], rows, fitting, here, found, lost)
            contents = list(pool.map(lambda place: packed(found[place], self.form), range(len(parts))))
        entries = [
            Entry(part.key, part.ids, content) for part, (content, _) in zip(parts, contents, strict=True)
        ]
        counts = [rows.counts.max() for rows in found.values() if rows.counts is not None]
        width = int(max(counts, default=self.form.size))
        return entries, sum(raw for _, raw in contents), width, lost.to_dict()

    def _batch(
        self,
        parts: list[_Part],
        rows: int,
        length: int,
        places: list[int],
        found: dict[int, PartRows],
        lost: _Losses,
    ) -> None:
        padded = [part.ids for part in parts] + [parts[0].ids[:0]] * (rows - len(parts))
        ids = jax.device_put(pad(padded, length, 0), batch_sharding(self.mesh))
        kept, costs = jax.device_get(
            distributions(self.model, self.params, ids, keep=self.keep, size=self.form.size)
        )
        for row, (part, place) in enumerate(zip(parts, places, strict=True)):
            inside = slice(row * length, row * length + len(part.ids))
            found[place] = _rows(kept, inside, part.ids, self.form)
            lost.add(Lost(*(x[inside] for x in costs)))


def _rows(kept: Kept, inside: slice, ids: np.ndarray, form: Form) -> PartRows:
    """Of one part, with the entries that are there alone."""
    tails, normalizers = np.asarray(kept.tails[:, inside]), np.asarray(kept.normalizers[inside])
    values = np.asarray(kept.log_probabilities[inside])
    if kept.ids is None:
        return PartRows(None, None, values.reshape(-1), tails, normalizers)
    tokens = np.array(kept.ids[inside])
    real = tokens < form.size
    real[-1, -1] = False  # behind the last token of a part nothing comes that belongs to it
    return PartRows(real.sum(-1), tokens[real], values[real], tails, normalizers)


class _Losses:
    """Sums and histograms of what was lost."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys(("mass", "divergence"), 0.0)
        self._bins: dict[str, dict[str, int]] = {"mass": {}, "divergence": {}}
        self._tokens = self._labels = self._found = 0
        self._label = 0.0

    def add(self, lost: Lost) -> None:
        """Those of one part."""
        self._tokens += len(lost.mass)
        self._labels += len(lost.mass) - 1  # the last token has no token behind it
        self._found += int(lost.found[:-1].sum())
        self._label += float(lost.label[:-1].sum(dtype=np.float64))
        for name, bins in self._bins.items():
            values = np.maximum(getattr(lost, name), 0.0)
            self._sums[name] += float(values.sum(dtype=np.float64))
            above = values[values > 0]
            numbers, counts = np.unique(np.ceil(_BINS * np.log2(above)).astype(int), return_counts=True)
            for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                bins[str(number)] = bins.get(str(number), 0) + count

    def to_dict(self) -> dict:
        """For the index."""
        found: dict = {"tokens": self._tokens, "labels": self._labels, "found": self._found}
        found["label"] = self._label
        for name, bins in self._bins.items():
            ordered = dict(sorted(bins.items(), key=lambda item: int(item[0])))
            found[name] = {"sum": self._sums[name], "bins": ordered}
        return found


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
            return 2 ** (number / _BINS)
    return 0.0
