"""Hard text under all ordered pairs of the real tokenizers."""

import functools
import unicodedata

import hard_texts
import numpy as np
import pytest
from checks import Batch, check_aligned, check_located, check_mirrored, table
from real_tokenizers import NAMES, PAIRS, load, pair, special_tokens
from reference import alignment as reference
from touched import RULES

from xtoken_jax.alignment.locate import locate
from xtoken_jax.alignment.spans import align_located

COUNT = 600
LONG = ("devanagari", "hebrew", "arabic", "other digits", "long")  # run by hand: half of these tests' time
SAMPLE = 6  # texts a kind and pair that go through the twin's loops


@functools.cache
def batch_of(kind):
    return Batch.of(hard_texts.texts(kind, COUNT, special_tokens()))


@functools.cache
def located(name, kind):
    return locate(load(name), batch_of(kind).texts)


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=pytest.mark.slow) if k in LONG else k for k in hard_texts.NAMES]
)
def test_tokens_are_where_they_came_from_and_pairs_align(kind):
    batch = batch_of(kind)
    places = {name: located(name, kind) for name in NAMES}
    plain = {name: check_located(name, batch, places[name]) for name in NAMES}
    for one, other in PAIRS:
        spans = align_located(pair(one, other), places[one], places[other])
        swapped = align_located(pair(other, one), places[other], places[one])
        check_mirrored(spans, swapped)
        sides = (places[one], places[other])
        check_aligned((one, other), batch, sides, spans, (plain[one], plain[other]))
        check_twin((one, other), spans, np.flatnonzero(plain[one] & plain[other])[:SAMPLE])


def check_twin(names, spans, texts):
    """Equality with the loops over end offsets, for texts that both sides spell."""
    for b in texts:
        sides = (spans[b].student, spans[b].teacher)
        pieces = [[table(name)[i] for i in s.ids.tolist()] for name, s in zip(names, sides, strict=True)]
        if max(map(len, pieces)) > 1000:
            continue  # the twin is quadratic
        *chunks, count = reference.chunks(*pieces)
        assert [side.chunks.tolist() for side in sides] == chunks
        assert spans[b].chunk_count == count


TOUCHED = [
    "e\u0301",
    "\u212b",
    "ﬁ ½ ²",
    "a\u0323\u0302",
    "\u1100\u1161",
    "▁",
    "\x04\x16",
    "Ĳ ㎏",
    "<s> ▁▁",
    "\u0344",
]
LINE = "Then the line goes on: 201 + 22 = 223, and so it should."


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_the_line_after_a_touched_one_is_aligned_in_full(names):
    """Whatever a normalizer does to a line, the next one is aligned as if it stood alone."""
    texts = [f"{touched}\n{LINE}" for touched in ("a", *TOUCHED)]
    texts += [f"x {touched} y\n{LINE}" for touched in TOUCHED]
    places = [locate(load(name), texts) for name in names]
    # BERT drops line ends, and writes the first word of a line as it would behind a blank.
    behind = len("Then") if "bert" in names else 0
    rows = align_located(pair(*names), *places)
    plain, *others = [last_line(spans, places, b, behind) for b, spans in enumerate(rows)]
    for text, line in zip(texts[1:], others, strict=True):
        assert line == plain, (names, text)
    for _, chunks in plain[:2]:
        assert len(chunks) >= 15
        assert min(chunks) == 0
        assert len(set(chunks)) == len(plain[2])
    # Nor does it know of the blanks before + and =.
    assert plain[2].count(False) == (2 if "bert" in names else 0)


def last_line(spans, places, b, behind):
    """Ids and chunks of the tokens that start in the last line, on both sides, and `exact` of the chunks."""
    start = places[0].text_starts[b + 1] - len(LINE) + behind
    sides = []
    for side, place in zip((spans.student, spans.teacher), places, strict=True):
        inside = place.starts[place.offsets[b] : place.offsets[b + 1]] >= start
        sides.append((side.ids[inside].tolist(), side.chunks[inside].tolist()))
    first = sides[0][1][0]
    sides = [(ids, [chunk - first for chunk in chunks]) for ids, chunks in sides]
    return *sides, spans.exact[first:].tolist()


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_the_empty_text_and_batches_of_none(names):
    for texts in ([], [""], ["", "", "a", ""]):
        spans = align_located(pair(*names), *(locate(load(name), texts) for name in names))
        assert [s.chunk_count for s in spans] == [1 if text else 0 for text in texts]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RULES])
def test_byte_faithful_tokenizers_spell_every_text(name):
    for kind in hard_texts.NAMES:
        assert located(name, kind).plain.all()
        assert located(name, kind).faithful.all()


@pytest.mark.parametrize(("name", "form"), [("qwen3", "NFC"), ("claude", "NFKC")])
def test_a_normalizing_tokenizer_spells_the_normalized_text(name, form):
    """On text in its own form it is byte-faithful."""
    texts = [
        unicodedata.normalize(form, text)
        for kind in ("accents", "european", "mixtures")
        for text in hard_texts.texts(kind, COUNT)
    ]
    texts = [text for text in texts if not any(unicodedata.category(c) == "Cn" for c in text)]
    assert len(texts) > COUNT
    assert locate(load(name), texts).plain.all()
