"""Chunks of hard text under real tokenizers."""

import dataclasses
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, example, given
from hypothesis import strategies as st
from reference import alignment as reference
from tokens import trained
from tokens.texts import DECOMPOSED, FEW, PIECES, texts

from xtoken_jax.alignment.align import align, collate, token_rows
from xtoken_jax.alignment.locate import Located, locate
from xtoken_jax.alignment.rows import cut, join, pack, truncate, with_document_marks
from xtoken_jax.alignment.spans import Side, Spans, align_located, align_texts, walk
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
        (pair.student, spans.student.ids, spans.student.chunks),
        (pair.teacher, spans.teacher.ids, spans.teacher.chunks),
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
    assert spans.student.chunks.tolist() == student
    assert spans.teacher.chunks.tolist() == teacher
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
@example("\t")
@pytest.mark.parametrize("makes", [OTHERS[2], OTHERS[3]], ids=lambda m: "-".join(f.__name__ for f in m))
def test_a_dummy_blank_costs_the_first_chunk_at_most(makes, text):
    """A blank that is a token of its own is a gap, one that is part of a token spoils that chunk."""
    pair = trained.pair(*makes)
    spans = aligned(pair, text)
    check_invariants(pair, spans)
    plain, prefixed = (spans.teacher, spans.student)[:: 1 if makes is OTHERS[2] else -1]
    tokenizer = pair.student if makes is OTHERS[2] else pair.teacher
    alone = bool(text) and tokenizer.bytes_of(int(prefixed.ids[0])) == b" "
    assert np.all(plain.chunks >= 0)
    assert np.flatnonzero(prefixed.chunks < 0).tolist() == ([0] if alone else [])
    assert np.flatnonzero(~spans.exact).tolist() == ([0] if text and not alone else [])


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
    assert (spans.student.chunks < 0).sum() == 2  # the two bytes of the combining accent
    assert (~spans.exact).sum() == 1


def word_pieces():
    """As BERT, uncased."""
    tokenizer = tokenizers.BertWordPieceTokenizer()
    tokenizer.train_from_iterator(trained.ENGLISH, vocab_size=400, show_progress=False)
    return tokenizer._tokenizer, {"unk_token": "[UNK]"}


def test_word_pieces_take_the_blank_in_front_of_them():
    pair = trained.pair(trained.three_digits, word_pieces)
    for first in ("the", "The"):  # a blank too many in front of it; a capital more
        spans = aligned(pair, first + " cats sat on the mat, 201 of them")
        check_invariants(pair, spans)
        assert spans.exact.tolist() == [False] + [True] * (spans.chunk_count - 1)
        assert spans.chunk_count > 8
        assert np.all(spans.student.chunks >= 0)
        assert np.all(spans.teacher.chunks >= 0)


def test_word_pieces_take_nothing_else_that_is_in_front_of_them():
    """A line end is as long as a blank, but not one; nor are two blanks."""
    tokenizer = trained.load(word_pieces)
    for text, start in (("the\nthe", 4), ("The the", 3), ("the  the", 5), ("the\tThe", 4)):
        located = locate(tokenizer, [text])
        (last,) = np.flatnonzero(located.ends == len(text))
        assert located.starts[last] == start
        assert located.faithful[last] == (start == 3)


def test_sides_that_leave_out_other_bytes_are_not_alike():
    """Five bytes of six on each side, every token spelling its own: as many, but not the same."""
    pair = trained.pair(trained.three_digits, trained.single_digits)
    no, yes = np.zeros(1, bool), np.ones(2, bool)

    def side(tokenizer, spans):
        starts, ends = np.array(spans).T
        lengths = [tokenizer.token_bytes.lengths.tolist().index(n) for n in (ends - starts).tolist()]
        ids = np.array(lengths, np.int32)
        return Located(ids, np.array([0, 2]), starts, ends, yes, no, no, np.array([0, 6]))

    student, teacher = side(pair.student, [[0, 3], [4, 6]]), side(pair.teacher, [[0, 1], [2, 6]])
    (spans,) = align_located(pair, student, teacher)
    assert spans.chunk_count == 1
    written = [chunk_bytes(*part, 0) for part in sides(pair, spans)]
    assert len(written[0]) == len(written[1])
    assert written[0] != written[1]
    assert spans.exact.tolist() == [False]


def test_the_first_token_of_a_document_is_no_target():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    row = join([with_document_marks(pair, s) for s in align_texts(pair, ["12 a", "201"])])
    for side, pad_id in ((row.student, pair.student.pad_id), (row.teacher, pair.teacher.pad_id)):
        for padding_side in ("right", "left"):
            rows = token_rows([side], 16, pad_id, padding_side=padding_side)
            first = [i for i in range(16) if rows.segments[0, i] != (rows.segments[0, i - 1] if i else 0)]
            opens = [i for i in first if rows.segments[0, i] > 0]
            assert len(opens) == 2
            assert rows.mask[0].sum() == len(side)
            assert np.flatnonzero(rows.mask[0] & ~rows.targets[0]).tolist() == opens
            assert rows.ids[0][rows.mask[0]].tolist() == side.ids.tolist()
            assert np.array_equal(rows.mask[0], rows.segments[0] > 0)


def test_numbers():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    spans = aligned(pair, "201+22=1234")
    assert spans.student.chunks.tolist() == [0, 1, 2, 3, 4, 5]
    assert spans.teacher.chunks.tolist() == [0, 0, 0, 1, 2, 2, 3, 4, 4, 4, 5]


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
    student, teacher = (
        Side.of(*np.array(arrays, np.int32)) for arrays in ([[5, 6], [-1, 0]], [[7, 8], [0, -1]])
    )
    plain = Spans(student, teacher, 1, np.array([True]))
    marked = with_document_marks(pair, plain)
    assert marked.student.chunks.tolist() == [0, -1, 1, 2]
    assert marked.teacher.chunks.tolist() == [0, 1, -1, 2]


def test_marks_on_one_side_are_gaps_that_touch_nothing():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    plain = aligned(pair, "the cat 201 sat")
    marked = with_document_marks(pair, plain)
    # BOS is the student's alone; both close with EOS.
    assert marked.student.chunks.tolist() == [-1, *plain.student.chunks, plain.chunk_count]
    assert marked.teacher.chunks.tolist() == [*plain.teacher.chunks, plain.chunk_count]
    for student, teacher in (
        (pair.student, without_eos(pair.teacher)),
        (without_eos(pair.student), pair.teacher),
    ):
        one_sided = with_document_marks(TokenizerPair(student, teacher), plain)
        assert one_sided.chunk_count == plain.chunk_count
        eos = [[-1] if "eos" in t.roles else [] for t in (student, teacher)]
        assert one_sided.student.chunks.tolist() == [-1, *plain.student.chunks, *eos[0]]
        assert one_sided.teacher.chunks.tolist() == [*plain.teacher.chunks, *eos[1]]


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
        # A chunk longer than a window has it alone, and is gone from it if it lost a token of its own.
        last = first + max(window.chunk_count, 1)
        lost = False
        for side in (0, 1):
            _, ids, _ = sides(pair, window)[side]
            _, all_ids, all_chunks = sides(pair, whole)[side]
            here = sum(sizes[side][first:last])
            assert here <= lengths[side] or last == first + 1
            assert len(ids) == min(here, lengths[side])
            begin = places[side]
            assert ids.tolist() == all_ids[begin : begin + len(ids)].tolist()
            lost |= bool(np.any(all_chunks[begin + len(ids) : begin + here] >= 0))
        assert window.chunk_count == (last - first if not lost else 0)
        for side in (0, 1):
            _, _, chunks = sides(pair, window)[side]
            all_chunks = sides(pair, whole)[side][2]
            expected = all_chunks[places[side] : places[side] + len(chunks)]
            renumbered = np.where(expected >= 0, expected - first, -1)
            assert chunks.tolist() == ([-1] * len(chunks) if lost else renumbered.tolist())
            places[side] += sum(sizes[side][first:last])
        assert window.exact.tolist() == ([] if lost else whole.exact[first:last].tolist())
        # As long as possible: the next chunk would not have fitted.
        if last < whole.chunk_count:
            assert any(sum(sizes[s][first : last + 1]) > lengths[s] for s in (0, 1))
        first = last
    assert first == whole.chunk_count
    if whole.chunk_count:
        assert places == [len(whole.student.ids), len(whole.teacher.ids)]


def test_a_chunk_longer_than_a_window_is_gone_there():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    whole = aligned(pair, "201a")
    first, second = cut(whole, 2, 2)
    assert first.teacher.ids.tolist() == whole.teacher.ids[:2].tolist()
    assert first.teacher.chunks.tolist() == [-1, -1]
    assert first.chunk_count == 0
    assert second.student.ids.tolist() == whole.student.ids[1:].tolist()
    assert second.exact.tolist() == [True]


@FEW
@given(
    st.lists(texts(PIECES + DECOMPOSED), min_size=1, max_size=3),
    st.integers(1, 8),
    st.integers(1, 8),
    st.sampled_from(["right", "left"]),
    st.sampled_from(["right", "left"]),
)
@pytest.mark.parametrize("makes", [FAITHFUL[0], OTHERS[3]], ids=["byte-level", "sentencepiece"])
def test_truncation_and_padding_on_either_side(
    makes, documents, student_length, teacher_length, truncation_side, padding_side
):
    pair = trained.pair(*makes)
    student_ids, teacher_ids, alignment = align(
        pair,
        documents,
        student_length=student_length,
        teacher_length=teacher_length,
        padding_side=padding_side,
        truncation_side=truncation_side,
    )
    rows = [with_document_marks(pair, aligned(pair, text)) for text in documents]
    assert alignment.valid.shape == (len(rows), min(student_length, teacher_length))
    for row, spans in enumerate(rows):
        kept, ours = [], []
        for (tokenizer, ids, chunks), length, row_ids, row_chunks in zip(
            sides(pair, spans),
            (student_length, teacher_length),
            (student_ids[row], teacher_ids[row]),
            (alignment.student_chunks[row], alignment.teacher_chunks[row]),
            strict=True,
        ):
            assert row_ids.shape == row_chunks.shape == (length,)
            places = range(len(ids))[:length] if truncation_side == "right" else range(len(ids))[-length:]
            kept.append([int(chunks[p]) for p in places])
            real = len(places)
            here = slice(0, real) if padding_side == "right" else slice(length - real, length)
            assert row_ids[here].tolist() == [int(ids[p]) for p in places]
            padding = np.delete(row_ids, np.arange(length)[here])
            assert np.all(padding == tokenizer.pad_id)
            assert np.all(np.delete(row_chunks, np.arange(length)[here]) == -1)
            ours.append(row_chunks[here].tolist())
        whole = [
            c
            for c in range(spans.chunk_count)
            if all(
                k.count(c) == np.sum(side[2] == c) for k, side in zip(kept, sides(pair, spans), strict=True)
            )
        ]
        number = {c: i for i, c in enumerate(whole)}
        assert ours == [[number.get(c, -1) for c in side] for side in kept]
        for i, chunk in enumerate(whole):
            # Nothing predicts the first token of a row.
            opens = chunk in (kept[0][0], kept[1][0])
            assert alignment.valid[row, i] == (spans.exact[chunk] and not opens)
        assert not alignment.valid[row, len(whole) :].any()


def test_sides_are_right_or_left():
    pair = trained.pair(*FAITHFUL[0])
    for name in ("padding_side", "truncation_side"):
        with pytest.raises(ValueError, match=f"{name}='both'"):
            align(pair, ["a"], student_length=4, teacher_length=4, **{name: "both"})


@FEW
@given(st.lists(texts(PIECES + DECOMPOSED), min_size=1, max_size=6), st.integers(4, 20), st.integers(4, 20))
@pytest.mark.parametrize("makes", [FAITHFUL[0], OTHERS[3]], ids=["byte-level", "sentencepiece"])
def test_packed_documents_share_no_chunk(makes, documents, student_length, teacher_length):
    pair = trained.pair(*makes)
    spans = [with_document_marks(pair, s) for s in align_texts(pair, documents)]
    rows = pack(spans, student_length, teacher_length)
    alignment = collate(rows, student_length, teacher_length)
    left = [truncate(s, student_length, teacher_length) for s in spans]
    for row, valid in zip(rows, alignment.valid, strict=True):
        assert len(row.student) <= student_length
        assert len(row.teacher) <= teacher_length
        check_rising = [side.segments for side in (row.student, row.teacher)]
        assert all(np.all(np.diff(s) >= 0) for s in check_rising)
        first = 0
        for segment in range(1 + max(s.max(initial=0) for s in check_rising)):
            here = [side.segments == segment for side in (row.student, row.teacher)]
            # The next document, in order, that is exactly what this segment holds.
            place = next(
                i for i, d in enumerate(left)
                if d.student.ids.tolist() == row.student.ids[here[0]].tolist()
                and d.teacher.ids.tolist() == row.teacher.ids[here[1]].tolist()
            )  # fmt: skip
            document = left.pop(place)
            for side, own, at in (
                (row.student, document.student, here[0]), (row.teacher, document.teacher, here[1]),
            ):  # fmt: skip
                assert side.chunks[at].tolist() == np.where(own.chunks >= 0, own.chunks + first, -1).tolist()
            alone = collate([document], student_length, teacher_length).valid[0, : document.chunk_count]
            assert valid[first : first + document.chunk_count].tolist() == alone.tolist()
            first += document.chunk_count
        assert first == row.chunk_count
    assert not left


def test_documents_go_where_they_fit_first():
    def document(student, teacher):
        sides = (Side.of(np.full(n, n, np.int32), np.full(n, -1, np.int32)) for n in (student, teacher))
        return Spans(*sides, 0, np.zeros(0, bool))

    rows = pack([document(3, 2), document(2, 4), document(1, 3), document(2, 1), document(9, 9)], 4, 5)
    assert [row.student.ids.tolist() for row in rows] == [[3, 3, 3, 1], [2, 2, 2, 2], [9, 9, 9, 9]]
    assert [row.student.segments.tolist() for row in rows] == [[0, 0, 0, 1], [0, 0, 1, 1], [0, 0, 0, 0]]
    assert [row.teacher.ids.tolist() for row in rows] == [[2, 2, 3, 3, 3], [4, 4, 4, 4, 1], [9] * 5]
    assert rows[1].teacher.segments.tolist() == [0, 0, 0, 0, 1]


def test_a_document_that_is_empty_on_one_side_keeps_the_segments_in_step():
    def document(student, teacher):
        sides = (Side.of(np.arange(n, dtype=np.int32), np.full(n, -1, np.int32)) for n in (student, teacher))
        return Spans(*sides, 0, np.zeros(0, bool))

    row = join([document(1, 2), document(0, 1), document(2, 1)])
    assert row.student.segments.tolist() == [0, 2, 2]
    assert row.teacher.segments.tolist() == [0, 0, 1, 2]


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
    nothing = Side.of(empty, empty)
    assert list(cut(Spans(nothing, nothing, 0, np.zeros(0, bool)), 4, 4)) == []
