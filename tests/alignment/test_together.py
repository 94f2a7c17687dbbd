"""One text with several teachers: windows end where all tokenizers have a boundary."""

import numpy as np
import pytest
from tokens import trained

from xtoken_jax.alignment.rows import cut, cut_together, with_document_marks
from xtoken_jax.alignment.spans import Side, Spans, align_texts, align_texts_together

STUDENT = trained.three_digits
TEACHERS = (trained.single_digits, trained.three_digits, trained.sentencepiece)
TEXT = "the sum of 12+345=357 and of 1999+1=2000 is 日本, they say: the rest of 123456 the same"


def pairs():
    return [trained.pair(STUDENT, teacher) for teacher in TEACHERS]


def test_a_text_is_aligned_with_each_as_with_one():
    together = align_texts_together(pairs(), [TEXT, "", "1 2"])
    for number, pair in enumerate(pairs()):
        for spans, alone in zip(together, align_texts(pair, [TEXT, "", "1 2"]), strict=True):
            for side in ("student", "teacher"):
                for name in ("ids", "chunks", "targets", "segments"):
                    found, expected = (getattr(getattr(s, side), name) for s in (spans[number], alone))
                    np.testing.assert_array_equal(found, expected)
            np.testing.assert_array_equal(spans[number].exact, alone.exact)


@pytest.mark.parametrize("lengths", [(6, (9, 5, 7)), (4, (20, 4, 20)), (30, (12, 30, 30))])
@pytest.mark.parametrize("marks", [False, True])
def test_windows_hold_the_same_text_for_every_teacher(lengths, marks):
    student_length, teacher_lengths = lengths
    (row,) = align_texts_together(pairs(), [TEXT])
    if marks:
        row = [with_document_marks(pair, spans) for pair, spans in zip(pairs(), row, strict=True)]
    windows = list(cut_together(row, student_length, teacher_lengths))
    assert len(windows) > 2
    for number, (pair, whole) in enumerate(zip(pairs(), row, strict=True)):
        # nothing is lost, nothing said twice
        for side in ("student", "teacher"):
            ids = np.concatenate([getattr(window[number], side).ids for window in windows])
            assert ids.tolist() == getattr(whole, side).ids.tolist()
        for window in windows:
            spans = window[number]
            assert len(spans.student) <= student_length
            assert len(spans.teacher) <= teacher_lengths[number]
            assert spans.student.ids.tolist() == window[0].student.ids.tolist()
            written = [
                tokenizer.token_bytes.join(side.ids).replace(b" ", b"")
                for tokenizer, side in ((pair.student, spans.student), (pair.teacher, spans.teacher))
            ]
            assert written[0] == written[1]
            for side in (spans.student, spans.teacher):
                inside = side.chunks[side.chunks >= 0]
                assert sorted(set(inside.tolist())) == list(range(spans.chunk_count))
            assert len(spans.exact) == spans.chunk_count


def test_the_tightest_teacher_ends_a_window():
    (row,) = align_texts_together(pairs()[:2], ["1 23 456 789"])
    by_digits, alike = row
    assert [len(w.student) for w in cut(alike, 100, 100)] == [len(alike.student)]
    windows = list(cut_together(row, 100, [4, 100]))
    assert [len(w[0].student) for w in windows] == [len(w.student) for w in cut(by_digits, 100, 4)]
    assert len(windows) == 3


def test_a_teacher_without_a_shared_boundary_leaves_nothing():
    (row,) = align_texts_together(pairs()[:2], ["1 2"])
    nothing = Side.of(np.zeros(0, np.int32), np.zeros(0, np.int32))
    apart = Spans(
        Side.of(row[0].student.ids, np.full(len(row[0].student), -1, np.int32)), nothing, 0, np.zeros(0, bool)
    )
    assert list(cut_together([row[0], apart], 8, [8, 8])) == []
