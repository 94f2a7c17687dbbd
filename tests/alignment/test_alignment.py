"""Chunks of hard text under real tokenizers."""

import dataclasses
import unicodedata

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from reference import alignment as reference
from tokens import trained
from tokens.texts import DECOMPOSED, FEW, PIECES, texts

from xtoken_jax.alignment.align import align, align_texts, collate, cut, with_document_marks
from xtoken_jax.alignment.spans import Spans, walk
from xtoken_jax.tokens.tokenizer import TokenizerPair

FAITHFUL = [(trained.three_digits, trained.single_digits), (trained.single_digits, trained.three_digits)]
OTHERS = [
    (trained.three_digits, trained.composing),
    (trained.composing, trained.sentencepiece),
    (trained.sentencepiece, trained.single_digits),
    (trained.three_digits, trained.sentencepiece),
]


def aligned(pair, text):
    (spans,) = align_texts(pair, [text])
    return spans


def sides(pair, spans):
    return (
        (pair.student, spans.student_ids, spans.student_chunks),
        (pair.teacher, spans.teacher_ids, spans.teacher_chunks),
    )


def chunk_bytes(tokenizer, ids, chunks, chunk):
    return b"".join(tokenizer.bytes_of(int(i)) or b"" for i, c in zip(ids, chunks, strict=True) if c == chunk)


def check_invariants(pair, spans):
    """What holds for every pair: ids rise by one and none is one-sided, `exact` means equal bytes."""
    for _, ids, chunks in sides(pair, spans):
        assert len(ids) == len(chunks)
        inside = chunks[chunks >= 0]
        assert np.all(np.diff(inside) >= 0)
        assert sorted(set(inside.tolist())) == list(range(spans.chunk_count))
    for chunk in range(spans.chunk_count):
        student, teacher = (chunk_bytes(*side, chunk) for side in sides(pair, spans))
        assert spans.exact[chunk] == (student == teacher)


@FEW
@given(texts(PIECES + DECOMPOSED))
@example("")
@example("7")
@example("🏳\ufe0f\u200d🌈1234 \r\n\t日本e\u0301")
@pytest.mark.parametrize("makes", FAITHFUL, ids=["fine-student", "fine-teacher"])
def test_byte_faithful_pairs_equal_the_twin(makes, text):
    pair = trained.pair(*makes)
    spans = aligned(pair, text)
    check_invariants(pair, spans)
    assert np.all(spans.exact)
    pieces = [[tokenizer.bytes_of(int(i)) for i in ids] for tokenizer, ids, _ in sides(pair, spans)]
    student, teacher, count = reference.chunks(*pieces)
    assert spans.student_chunks.tolist() == student
    assert spans.teacher_chunks.tolist() == teacher
    assert spans.chunk_count == count
    # As small as possible: inside a chunk no boundary is common.
    for chunk in range(count):
        inner = [
            set(reference.ends([p for p, c in zip(side, ids, strict=True) if c == chunk])[:-1])
            for side, ids in zip(pieces, (student, teacher), strict=True)
        ]
        assert not inner[0] & inner[1]


@FEW
@given(texts(PIECES + DECOMPOSED))
@example("")
@pytest.mark.parametrize("makes", OTHERS, ids=lambda m: "-".join(f.__name__ for f in m))
def test_pairs_that_normalize(makes, text):
    pair = trained.pair(*makes)
    check_invariants(pair, aligned(pair, text))


@FEW
@given(texts([p for p in PIECES if "▁" not in p], anything=False))
@example("日本🏳️‍🌈1234 \r\n\t x")
@pytest.mark.parametrize("makes", [OTHERS[2], OTHERS[3]], ids=lambda m: "-".join(f.__name__ for f in m))
def test_a_dummy_blank_costs_the_first_chunk(makes, text):
    pair = trained.pair(*makes)
    spans = aligned(pair, text)
    check_invariants(pair, spans)
    assert np.all(spans.student_chunks >= 0)
    assert np.all(spans.teacher_chunks >= 0)
    assert np.flatnonzero(~spans.exact).tolist() == ([0] if text else [])


CLEAN = [p for p in PIECES if unicodedata.normalize("NFC", p) == p]


@FEW
@given(texts(CLEAN, anything=False), st.sampled_from(DECOMPOSED), texts(CLEAN, anything=False))
@example("the cat  sat\n", "e\u0301", "  and\t 201 \n\n dogs")
@pytest.mark.parametrize("swap", [False, True])
def test_composed_accents_cost_only_what_they_touch(swap, before, touched, after):
    head, tail = before + "\n", "\nThen " + after
    assume(all(unicodedata.normalize("NFC", part) == part for part in (head, tail)))
    makes = (trained.three_digits, trained.composing)
    pair = trained.pair(*(reversed(makes) if swap else makes))
    spans = aligned(pair, head + touched + tail)
    check_invariants(pair, spans)
    plain, ids, chunks = sides(pair, spans)[swap]
    assert plain.token_bytes.join(ids) == (head + touched + tail).encode()
    ends = np.cumsum([len(plain.bytes_of(int(i))) for i in ids])
    starts = np.concatenate([[0], ends[:-1]])
    first, last = len(head.encode()), len((head + touched).encode())
    away = (ends <= first) | (starts >= last)
    assert np.all(chunks[away] >= 0)
    assert np.all(spans.exact[chunks[away]])
    assert away.sum() >= 2


def test_blank_tokens_take_part_beside_a_tokenizer_that_normalizes():
    """The student's own post-processor would trim blanks off the offsets."""
    pair = trained.pair(trained.three_digits, trained.composing)
    spans = aligned(pair, "e\u0301\n\n  two   cats\t 201")
    assert (spans.student_chunks < 0).sum() == 2  # the two bytes of the combining accent
    assert (~spans.exact).sum() == 1


def test_numbers():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    spans = aligned(pair, "201+22=1234")
    assert spans.student_chunks.tolist() == [0, 1, 2, 3, 4, 5]
    assert spans.teacher_chunks.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5]


def test_walk_with_text_that_one_side_leaves_out():
    student = np.array([[0, 0], [0, 2], [2, 3], [3, 5], [7, 9], [9, 9]])
    teacher = np.array([[0, 2], [2, 5], [5, 7], [7, 8], [8, 9]])
    ids = walk(student, teacher)
    assert ids[0].tolist() == [-1, 0, 1, 1, 2, -1]
    assert ids[1].tolist() == [0, 1, -1, 2, 2]
    assert ids[2] == 3
    nothing = np.zeros((0, 2), np.int64)
    assert walk(nothing, teacher)[1].tolist() == [-1] * 5
    assert walk(nothing, nothing)[2] == 0


def without_eos(tokenizer):
    return dataclasses.replace(tokenizer, roles={r: i for r, i in tokenizer.roles.items() if r != "eos"})


@pytest.mark.parametrize("text", ["", "the cat 201 sat", "7"])
def test_marks_on_both_sides_pair(text):
    pair = trained.pair(trained.three_digits, trained.sentencepiece)
    plain = aligned(pair, text)
    marked = with_document_marks(pair, plain)
    assert marked.chunk_count == plain.chunk_count + 2
    for tokenizer, (_, ids, chunks), (_, inner_ids, inner) in zip(
        (pair.student, pair.teacher), sides(pair, marked), sides(pair, plain), strict=True
    ):
        assert ids.tolist() == [tokenizer.roles["bos"], *inner_ids, tokenizer.roles["eos"]]
        assert chunks.tolist() == [0, *(np.where(inner >= 0, inner + 1, -1)), marked.chunk_count - 1]
    assert marked.exact.tolist() == [True, *plain.exact, True]


def test_marks_leave_gaps_alone():
    pair = trained.pair(trained.three_digits, trained.sentencepiece)
    plain = Spans(*np.array([[5, 6], [7, 8], [-1, 0], [0, -1]], np.int32), 1, np.array([True]))
    marked = with_document_marks(pair, plain)
    assert marked.student_chunks.tolist() == [0, -1, 1, 2]
    assert marked.teacher_chunks.tolist() == [0, 1, -1, 2]


def test_marks_on_one_side_are_gaps_that_touch_nothing():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    plain = aligned(pair, "the cat 201 sat")
    marked = with_document_marks(pair, plain)
    # BOS is the student's alone; both close with EOS.
    assert marked.student_chunks.tolist() == [-1, *plain.student_chunks, plain.chunk_count]
    assert marked.teacher_chunks.tolist() == [*plain.teacher_chunks, plain.chunk_count]
    for student, teacher in (
        (pair.student, without_eos(pair.teacher)),
        (without_eos(pair.student), pair.teacher),
    ):
        one_sided = with_document_marks(TokenizerPair(student, teacher), plain)
        assert one_sided.chunk_count == plain.chunk_count
        eos = [[-1] if "eos" in t.roles else [] for t in (student, teacher)]
        assert one_sided.student_chunks.tolist() == [-1, *plain.student_chunks, *eos[0]]
        assert one_sided.teacher_chunks.tolist() == [*plain.teacher_chunks, *eos[1]]


def units(chunks, count):
    """How many tokens come with each chunk: its own and the gaps behind it, leading gaps with the first."""
    sizes, current = [0] * count, 0
    for chunk in chunks.tolist():
        current = max(current, chunk)
        sizes[current] += 1
    return sizes


@FEW
@given(texts(PIECES + DECOMPOSED), st.integers(1, 9), st.integers(1, 9), st.booleans())
@pytest.mark.parametrize("makes", [*FAITHFUL, OTHERS[0], OTHERS[3]], ids=lambda m: m[0].__name__)
def test_windows(makes, text, student_length, teacher_length, marks):
    pair = trained.pair(*makes)
    whole = aligned(pair, text)
    whole = with_document_marks(pair, whole) if marks else whole
    windows = list(cut(whole, student_length, teacher_length))
    lengths = (student_length, teacher_length)
    sizes = (
        [units(chunks, whole.chunk_count) for _, _, chunks in sides(pair, whole)] if whole.chunk_count else []
    )

    first = 0
    places = [0, 0]
    for window in windows:
        last = first + window.chunk_count
        assert window.chunk_count > 0
        for side in (0, 1):
            _, ids, chunks = sides(pair, window)[side]
            _, all_ids, all_chunks = sides(pair, whole)[side]
            assert len(ids) <= lengths[side]
            here = sum(sizes[side][first:last])
            fits = here <= lengths[side]
            assert fits or window.chunk_count == 1
            assert len(ids) == min(here, lengths[side])
            begin = places[side]
            assert ids.tolist() == all_ids[begin : begin + len(ids)].tolist()
            expected = all_chunks[begin : begin + len(ids)]
            assert chunks.tolist() == np.where(expected >= 0, expected - first, -1).tolist()
            places[side] += here
        for chunk in range(window.chunk_count):
            complete = all(
                np.sum(side_chunks == chunk) == np.sum(all_chunks == first + chunk)
                for (_, _, side_chunks), (_, _, all_chunks) in zip(
                    sides(pair, window), sides(pair, whole), strict=True
                )
            )
            assert window.exact[chunk] == (whole.exact[first + chunk] and complete)
        # As long as possible: the next chunk would not have fitted.
        if last < whole.chunk_count:
            assert any(sum(sizes[s][first : last + 1]) > lengths[s] for s in (0, 1))
        first = last
    assert first == whole.chunk_count
    if whole.chunk_count:
        assert places == [len(whole.student_ids), len(whole.teacher_ids)]


def test_a_chunk_longer_than_a_window_is_not_exact_there():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    whole = aligned(pair, "201a")
    first, second = cut(whole, 2, 2)
    assert first.teacher_ids.tolist() == whole.teacher_ids[:2].tolist()
    assert first.exact.tolist() == [False]
    assert second.student_ids.tolist() == whole.student_ids[1:].tolist()
    assert second.exact.tolist() == [True]


@FEW
@given(st.lists(texts(PIECES + DECOMPOSED), min_size=1, max_size=3), st.integers(1, 8), st.integers(1, 8))
@pytest.mark.parametrize("makes", [FAITHFUL[0], OTHERS[3]], ids=["byte-level", "sentencepiece"])
def test_a_truncated_chunk_does_not_count(makes, documents, student_length, teacher_length):
    pair = trained.pair(*makes)
    rows = [with_document_marks(pair, aligned(pair, text)) for text in documents]
    alignment = collate(rows, student_length, teacher_length)
    capacity = min(student_length, teacher_length)
    assert alignment.valid.shape == (len(rows), capacity)
    for row, spans in enumerate(rows):
        for length, chunks, ours in (
            (student_length, spans.student_chunks, alignment.student_chunks[row]),
            (teacher_length, spans.teacher_chunks, alignment.teacher_chunks[row]),
        ):
            assert ours.shape == (length,)
            for position in range(length):
                chunk = chunks[position] if position < len(chunks) else -1
                # An id past the arrays belongs to a chunk whose other side is cut off altogether.
                assert ours[position] == (chunk if chunk < capacity else -1)
        for chunk in range(capacity):
            survives = chunk < spans.chunk_count and spans.exact[chunk]
            # Nothing predicts the first token of a row.
            survives = survives and chunk not in (spans.student_chunks[0], spans.teacher_chunks[0])
            for length, chunks in (
                (student_length, spans.student_chunks),
                (teacher_length, spans.teacher_chunks),
            ):
                survives = survives and all(p < length for p, c in enumerate(chunks) if c == chunk)
            assert alignment.valid[row, chunk] == survives


def test_align_pads_with_each_tokenizers_own_id():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    texts = ["201+22", "", "the <|end|> cat"]
    student, teacher, alignment = align(pair, texts, student_length=8, teacher_length=12)
    assert student.shape == (3, 8)
    assert teacher.shape == (3, 12)
    assert student[0].tolist() == [0, *pair.student.encode("201+22"), 1, 1, 1, 1]
    assert teacher[0].tolist() == [*pair.teacher.encode("201+22"), 0, *[0] * 5]
    assert alignment.student_chunks[0].tolist() == [-1, 0, 1, 2, 3, -1, -1, -1]
    assert alignment.teacher_chunks[0].tolist() == [0, 0, 0, 1, 2, 2, 3, *[-1] * 5]
    # What opens the teacher's row is predicted by nothing there: 201, and the EOS of the empty text.
    assert alignment.valid[0].tolist() == [False, True, True, True, *[False] * 4]
    assert alignment.student_chunks[1].tolist()[:2] == [-1, 0]
    assert not alignment.valid[1].any()
    unmarked = align(pair, texts, student_length=8, teacher_length=12, document_marks=False)[0]
    assert unmarked[2, 0] == pair.student.encode("the")[0]
    # Spelled-out control tokens are text on both sides.
    assert (
        not set(unmarked[2][: len(pair.student.encode(texts[2]))].tolist()) & pair.student.token_bytes.special
    )


def test_spans_of_nothing_are_cut_into_nothing():
    empty = np.zeros(0, np.int32)
    assert list(cut(Spans(empty, empty, empty, empty, 0, np.zeros(0, bool)), 4, 4)) == []
