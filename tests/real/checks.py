"""Checks of many texts at once, in numpy, from the bytes of each token id."""

import functools
from dataclasses import dataclass

import numpy as np
from real_tokenizers import NAMES, load
from touched import touched_everywhere


@functools.cache
def table(name):
    """The bytes of every id, b"" where it has none."""
    tokenizer = load(name)
    return [tokenizer.bytes_of(i) or b"" for i in range(tokenizer.size)]


@functools.cache
def lengths(name):
    return np.array([len(content) for content in table(name)], np.int64)


def spelled(name, ids):
    """uint8: the bytes of the tokens, joined."""
    content = table(name)
    return np.frombuffer(b"".join([content[i] for i in ids.tolist()]), np.uint8)


def after(sizes):
    """Running total with a 0 in front."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def covered(size, starts, ends):
    """bool [size]: the bytes that lie in some span."""
    edges = np.bincount(starts, minlength=size + 1) - np.bincount(ends, minlength=size + 1)
    return np.cumsum(edges)[:size] > 0


def equal_runs(left, left_ends, right, right_ends):
    """bool by run: whether run k of `left`, which ends at left_ends[k], is run k of `right`."""
    sizes = [np.diff(np.concatenate([[0], ends])) for ends in (left_ends, right_ends)]
    same = sizes[0] == sizes[1]
    kept = [side[np.repeat(same, size)] for side, size in zip((left, right), sizes, strict=True)]
    run = np.repeat(np.arange(len(same)), np.where(same, sizes[0], 0))
    different = np.bincount(run[kept[0] != kept[1]], minlength=len(same)) > 0
    return same & ~different


@dataclass(frozen=True)
class Batch:
    """Texts and what can be said of them without the package."""

    texts: list
    raw: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, texts):
        contents = [text.encode() for text in texts]
        raw = np.frombuffer(b"".join(contents), np.uint8)
        return cls(texts, raw, after([len(content) for content in contents]))

    def text_at(self, byte):
        """The text that holds a byte, for messages."""
        return self.texts[int(np.searchsorted(self.starts, byte, side="right")) - 1]

    @functools.cached_property
    def touched(self):
        return {name: touched_everywhere(name, self.texts) for name in NAMES}


def check_located(name, batch, located):
    """That every token is where it came from, and is called faithful exactly where it spells its span."""
    tokenizer, texts = load(name), batch.texts
    ids, offsets, starts, ends = (np.asarray(x) for x in (located.ids, located.offsets, *located.spans.T))

    encodings = tokenizer.backend.encode_batch(texts, add_special_tokens=False)
    assert ids.tolist() == [i for encoding in encodings for i in encoding.ids]
    assert offsets.tolist() == after([len(encoding.ids) for encoding in encodings]).tolist()
    special = tokenizer.token_bytes.special
    unknown = {tokenizer.roles.get("unk")}
    assert not (set(ids.tolist()) & special) - unknown

    text_of = np.repeat(np.arange(len(texts)), np.diff(offsets))
    assert np.all(starts <= ends)
    assert np.all(starts >= batch.starts[text_of])
    assert np.all(ends <= batch.starts[text_of + 1])
    # In order, and two tokens share a span or do not overlap.
    assert np.all(np.diff(starts) >= 0)
    assert np.all(np.diff(ends) >= 0)
    shared = (starts[1:] == starts[:-1]) & (ends[1:] == ends[:-1])
    assert np.all(shared | (starts[1:] >= ends[:-1]))

    # Faithful is what spells its span and shares it with nobody.
    place = np.repeat(starts - after(ends - starts)[:-1], ends - starts) + np.arange((ends - starts).sum())
    pieces = spelled(name, ids)
    spells = equal_runs(pieces, after(lengths(name)[ids])[1:], batch.raw[place], after(ends - starts)[1:])
    spells &= ~(np.append(shared, False) | np.insert(shared, 0, False))
    wrong = np.flatnonzero((spells != located.faithful) & ((ends > starts) | (lengths(name)[ids] > 0)))
    assert not len(wrong), (name, batch.text_at(starts[wrong[0]]), ids[wrong[0]], spells[wrong[0]])

    # A text that its tokens spell is placed by counting.
    totals = after(lengths(name)[ids])
    plain = equal_runs(pieces, totals[offsets[1:]], batch.raw, batch.starts[1:])
    np.testing.assert_array_equal(located.plain, plain)
    counted = (batch.starts[:-1] - totals[offsets[:-1]])[text_of] + totals[1:]
    assert np.all(np.where(plain[text_of], ends == counted, True))
    assert np.all(np.where(plain[text_of], ends - starts == lengths(name)[ids], True))

    # What nothing touches is covered, once, by tokens that spell it.
    dirty = after(batch.touched[name])
    clean = (dirty[ends] == dirty[starts]) & (ends > starts)
    wrong = np.flatnonzero(clean & ~spells)
    assert not len(wrong), (name, batch.text_at(starts[wrong[0]]), ids[wrong[0]])
    assert np.all(batch.touched[name] | covered(len(batch.raw), starts, ends)), name
    return plain


def expected_chunks(sides, text_of, text_starts):
    """The definition, for all texts in one run: between two boundaries that are common.

    Args:
        sides: starts and ends of the tokens, for both.
        text_of: the text of each token, for both.
        text_starts: where each text begins, and the end; the two ends of a text are common boundaries.

    Returns:
        The chunk of each token on both sides, -1 for none, and the boundaries of each chunk.
    """
    # One position more a text, so that the end of one is not the start of the next.
    places = [(starts + text, ends + text) for (starts, ends), text in zip(sides, text_of, strict=True)]
    texts = np.arange(len(text_starts) - 1)
    limits = (text_starts[:-1] + texts, text_starts[1:] + texts)
    edges = np.union1d(np.intersect1d(*(np.concatenate(place) for place in places)), np.concatenate(limits))
    if not len(edges):
        return [np.full(len(text), -1) for text in text_of], edges, edges
    owner = np.zeros(int(edges[-1]) + 1, np.int64)
    for (starts, ends), text in zip([*places, limits], [*text_of, texts], strict=True):
        for place in (starts, ends):
            owner[place[place < len(owner)]] = text[place < len(owner)]
    closed = owner[edges[1:]] == owner[edges[:-1]]
    intervals = []
    for starts, ends in places:
        interval = np.searchsorted(edges, ends, side="left") - 1
        inside = (ends > starts) & (interval >= 0) & (ends <= edges[-1])
        inside &= np.append(closed, False)[interval]
        intervals.append(np.where(inside, interval, -1))
    both = np.intersect1d(*intervals)
    both = both[both >= 0]
    numbers = np.full(len(edges) + 1, -1)
    numbers[both] = np.arange(len(both))
    return [numbers[interval] for interval in intervals], *(
        edges[k] - owner[edges[k]] for k in (both, both + 1)
    )


def flat(spans, side):
    """Chunk ids of all texts on one side, numbered through; -1 stays."""
    before = after([s.chunk_count for s in spans])
    parts = [
        np.where(getattr(s, side).chunks >= 0, getattr(s, side).chunks + base, -1)
        for s, base in zip(spans, before[:-1], strict=True)
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def check_aligned(names, batch, located, spans, plain):
    """All properties of one ordered pair on a batch; returns counts for the table.

    Args:
        names: student's and teacher's.
        batch: the texts.
        located: for both.
        spans: the package's alignment of each text.
        plain: bool [B] for both: the text is what its tokens spell.
    """
    assert len(spans) == len(batch.texts)
    size = len(batch.raw)
    sides = [(side.spans[:, 0], side.spans[:, 1]) for side in located]
    chunks = [flat(spans, "student"), flat(spans, "teacher")]
    count = sum(s.chunk_count for s in spans)
    exact = np.concatenate([np.zeros(0, bool), *(s.exact for s in spans)])
    assert exact.shape == (count,)
    assert exact.dtype == bool
    for side, spot in zip(("student", "teacher"), located, strict=True):
        ids = np.concatenate([np.zeros(0, np.int32), *(getattr(s, side).ids for s in spans)])
        np.testing.assert_array_equal(ids, spot.ids)
        assert [len(getattr(s, side).chunks) for s in spans] == np.diff(spot.offsets).tolist()

    # Rising by one, none without tokens on both sides.
    for ids in chunks:
        inside = ids[ids >= 0]
        assert np.all(np.isin(np.diff(inside), (0, 1)))
        assert inside.size == 0 if count == 0 else (inside[0], inside[-1]) == (0, count - 1)

    # The chunks of the definition: as small as possible, nothing left out that has a counterpart.
    text_of = [np.repeat(np.arange(len(batch.texts)), np.diff(spot.offsets)) for spot in located]
    expected, first, last = expected_chunks(sides, text_of, batch.starts)
    for ids, wanted, (starts, _) in zip(chunks, expected, sides, strict=True):
        wrong = np.flatnonzero(ids != wanted)
        assert not len(wrong), (names, batch.text_at(starts[wrong[0]]), ids[wrong[0]], wanted[wrong[0]])
    assert len(first) == count

    # `exact` is equality of bytes.
    runs = []
    for name, spot, ids in zip(names, located, chunks, strict=True):
        kept = ids >= 0
        per_chunk = np.bincount(ids[kept], weights=lengths(name)[spot.ids[kept]], minlength=count)
        runs += [spelled(name, spot.ids[kept]), after(per_chunk.astype(np.int64))[1:]]
    equal = equal_runs(*runs)
    wrong = np.flatnonzero(equal != exact)
    assert not len(wrong), (names, batch.text_at(first[wrong[0]]), exact[wrong[0]])

    # What neither tokenizer touches is in a chunk, and the chunk is exact.
    dirty = batch.touched[names[0]] | batch.touched[names[1]]
    total = after(dirty)
    clean = total[first] == total[last]
    wrong = np.flatnonzero(clean & ~exact)
    assert not len(wrong), (names, batch.text_at(first[wrong[0]]))
    lost = np.flatnonzero(~dirty & ~covered(size, first, last))
    assert not len(lost), (names, batch.text_at(lost[0]))

    # Texts that both sides spell: every chunk exact, no token without one.
    both = plain[0] & plain[1]
    text_of_chunk = np.searchsorted(batch.starts, first, side="right") - 1
    assert np.all(exact[both[text_of_chunk]])
    for spot, ids in zip(located, chunks, strict=True):
        assert np.all(ids[np.repeat(both, np.diff(spot.offsets))] >= 0)
    return len(batch.texts), count, int(exact.sum()), int(both.sum())


def check_mirrored(spans, swapped):
    """That the teacher's part and the student's are the same algorithm."""
    assert len(spans) == len(swapped)
    for one, other in zip(spans, swapped, strict=True):
        assert one.chunk_count == other.chunk_count
        assert one.student.chunks.tobytes() == other.teacher.chunks.tobytes()
        assert one.teacher.chunks.tobytes() == other.student.chunks.tobytes()
        assert one.exact.tobytes() == other.exact.tobytes()
