"""The teacher over the parts of one shard of its cache: in batches, what is kept of them, what that loses."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from xtoken_jax.alignment.align import pad
from xtoken_jax.distributed.mesh import fetch_rows, own_rows, place_rows, rows_here
from xtoken_jax.distributed.processes import gather_bytes
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.teacher_cache.distributions import Keep, Kept, Lost, distributions
from xtoken_jax.teacher_cache.shards import Entry, Form, PartRows, packed

BINS = 16  # of a histogram, to a factor of 2
_SHORTEST = 16  # rows of fewer tokens are not worth a program of their own


class Part(NamedTuple):
    """A part of a document: where it comes from, the source by number, and the teacher's tokens."""

    key: tuple[int, int, int]
    ids: np.ndarray


class MadeShard(NamedTuple):
    """What becomes of a shard's parts.

    Attributes:
        entries: in the order of the parts.
        raw_bytes: before compression.
        width: tokens of the widest distribution.
        lost: sums and histograms of what was lost.
    """

    entries: list[Entry]
    raw_bytes: int
    width: int
    lost: dict[str, Any]


class _Made(NamedTuple):
    """The same of one part."""

    content: bytes
    raw_bytes: int
    width: int
    lost: dict[str, Any]


class _Batch(NamedTuple):
    """Parts by their places, rows with those that stay empty, and tokens of a row."""

    places: list[int]
    rows: int
    length: int


@dataclass(frozen=True)
class TeacherRun:
    """The teacher, and how its outputs are kept.

    Attributes:
        model, params, mesh: the teacher; several processes run it together.
        keep, form: how much of its distributions, and how that is stored.
        batch_size: rows of the longest parts; of shorter ones more.
    """

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

    def shard(self, parts: list[Part], length: int, advance: Callable[[float], None]) -> MadeShard:
        """A shard of parts of `length` tokens at most; all processes get all of it.

        Each of them packs the rows of its own devices. `advance` is told the share that is done.
        """
        made: dict[int, Future[_Made]] = {}
        done, before = 0, None
        with ThreadPoolExecutor(os.cpu_count()) as pool:

            def keep(batch: _Batch, outputs: tuple[Kept, Lost]) -> None:
                kept, costs = fetch_rows(outputs)
                own = set(own_rows(self.mesh, batch.rows))
                for place, row in enumerate(rows_here(self.mesh, batch.rows)):
                    if row in own and row < len(batch.places):
                        part = batch.places[row]
                        begin = place * batch.length
                        inside = slice(begin, begin + len(parts[part].ids))
                        rows, lost = jax.tree.map(lambda x, inside=inside: x[inside], (kept, costs))
                        made[part] = pool.submit(_made, rows, lost, self.form)

            for batch in self._batches(parts, length):
                outputs = self._outputs([parts[place] for place in batch.places], batch)
                if before is not None:  # while the devices run the next one
                    keep(*before)
                    done += len(before[0].places)
                    advance(done / len(parts))
                before = batch, outputs
            if before is not None:
                keep(*before)
            own = {place: future.result() for place, future in made.items()}
        every = _of_all(own)
        ordered = [every[place] for place in range(len(parts))]
        return MadeShard(
            [Entry(part.key, part.ids, one.content) for part, one in zip(parts, ordered, strict=True)],
            sum(one.raw_bytes for one in ordered),
            max(one.width for one in ordered),
            _summed([one.lost for one in ordered]),
        )

    def _batches(self, parts: list[Part], length: int) -> Iterator[_Batch]:
        """Of parts that are alike in length."""
        lengths = [length]
        while lengths[-1] > _SHORTEST:
            lengths.append(-(-lengths[-1] // 2))
        by_length: dict[int, list[int]] = {}
        for place, part in enumerate(parts):
            fitting = min(size for size in lengths if size >= len(part.ids))
            by_length.setdefault(fitting, []).append(place)
        for fitting, places in sorted(by_length.items()):
            rows = self.batch_size * (length // fitting)
            for first in range(0, len(places), rows):
                yield _Batch(places[first : first + rows], rows, fitting)

    def _outputs(self, parts: list[Part], batch: _Batch) -> tuple[Kept, Lost]:
        """On the devices, perhaps not there yet."""
        every = [part.ids for part in parts] + [parts[0].ids[:0]] * (batch.rows - len(parts))
        here = [every[row] for row in rows_here(self.mesh, batch.rows)]
        ids = place_rows(pad(here, batch.length, 0), self.mesh)
        return distributions(self.model, self.params, ids, keep=self.keep, size=self.form.size)


def _made(kept: Kept, costs: Lost, form: Form) -> _Made:
    """A part as it is stored, with the entries that are there alone."""
    values, tails, normalizers = (
        np.asarray(x) for x in (kept.log_probabilities, kept.tails.T, kept.normalizers)
    )
    counts = tokens = None
    width = form.size
    if kept.ids is None:
        values = values.reshape(-1)
    else:
        ids = np.asarray(kept.ids)
        real = ids < form.size
        real[-1, -1] = False  # behind the last token of a part nothing comes that belongs to it
        counts, tokens, values = real.sum(-1), ids[real], values[real]
        width = int(counts.max())
    rows = PartRows(counts, tokens, values, tails, normalizers)
    return _Made(*packed(rows, form), width, _lost(costs))


def _lost(costs: Lost) -> dict[str, Any]:
    """Sums and histograms of one part; the last token has no token behind it."""
    found: dict[str, Any] = {
        "tokens": len(costs.mass),
        "labels": len(costs.mass) - 1,
        "found": int(costs.found[:-1].sum()),
        "label": float(costs.label[:-1].sum(dtype=np.float64)),
    }
    for name in ("mass", "divergence"):
        values = np.maximum(getattr(costs, name), 0.0)
        numbers, counts = np.unique(
            np.ceil(BINS * np.log2(values[values > 0])).astype(int), return_counts=True
        )
        bins = dict(zip(map(str, numbers.tolist()), counts.tolist(), strict=True))
        found[name] = {"sum": float(values.sum(dtype=np.float64)), "bins": bins}
    return found


def _summed(lost: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all parts, in their order: sums depend on it."""
    found: dict[str, Any] = {name: 0 for name in ("tokens", "labels", "found", "label")}
    sums = {"mass": 0.0, "divergence": 0.0}
    every: dict[str, dict[str, int]] = {name: {} for name in sums}
    for one in lost:
        for name in found:
            found[name] += one[name]
        for name, bins in every.items():
            sums[name] += one[name]["sum"]
            for number, count in one[name]["bins"].items():
                bins[number] = bins.get(number, 0) + count
    for name, bins in every.items():
        ordered = dict(sorted(bins.items(), key=lambda item: int(item[0])))
        found[name] = {"sum": sums[name], "bins": ordered}
    return found


def _of_all(own: dict[int, _Made]) -> dict[int, _Made]:
    """What all processes have made, on each of them."""
    if jax.process_count() == 1:
        return own
    head = json.dumps([(place, len(one.content), *one[1:]) for place, one in own.items()]).encode()
    message = b"".join([len(head).to_bytes(8, "little"), head, *(one.content for one in own.values())])
    found = {}
    for theirs in gather_bytes(message):
        begin = 8 + int.from_bytes(theirs[:8], "little")
        for place, size, *rest in json.loads(theirs[8:begin]):
            found[place] = _Made(theirs[begin : begin + size], *rest)
            begin += size
    return found
