"""The dynamic program over token strings, beside its twin and beside the walk over the text."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from reference import dynamic as reference
from tokens import trained
from tokens.texts import DECOMPOSED, FEW, PIECES, texts

from xtoken_jax.alignment.dynamic import align_tokens, chunks_of_ids
from xtoken_jax.alignment.spans import walk
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import TokenizerPair

FAITHFUL = [(trained.three_digits, trained.single_digits), (trained.single_digits, trained.three_digits)]

TOKENS = st.sampled_from([b"a", b"b", b"aa", b"ab", b"ba", b"aab", b"aaaa", b"\xc3", b"\xa9", b"", None])
ROWS = st.lists(TOKENS, max_size=12)


def plain(aligned):
    chunks = aligned.student_chunks.tolist(), aligned.teacher_chunks.tolist()
    assert aligned.chunk_count == len(aligned.exact)
    return (*chunks, aligned.exact.tolist(), aligned.score)


def spans(pieces):
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    ends = np.cumsum(lengths)
    return np.stack([ends - lengths, ends], axis=1)


@FEW
@given(ROWS, ROWS, st.integers(1, 5))
@example([], [], 4)
@example([], [b"a", None], 4)
@example([b"a", None], [], 4)
@example([b"a"] * 9, [b"aaaa", b"aaaa", b"a"], 4)
@example([b"", b"ab", None], [b"a", b"", b"b"], 4)
@example([b"a", b"b", b"x"], [b"y", b"b", b"c", b"z"], 1)
def test_it_equals_the_twin(student, teacher, longest):
    assert plain(align_tokens(student, teacher, longest=longest)) == reference.align(
        student, teacher, longest
    )


def check_beside_the_walk(student, teacher, longest):
    """The walk's chunks, or a score above theirs; the second only if some bytes occur twice."""
    walked = walk(spans(student), spans(teacher))
    score = reference.score(student, teacher, *walked)
    found = align_tokens(student, teacher, longest=longest)
    assert reference.score(student, teacher, *plain(found)[:2], found.chunk_count) == found.score
    if found.score == score:
        assert plain(found) == (walked[0].tolist(), walked[1].tolist(), [True] * walked[2], score)
    assert found.score >= score
    return found.score == score


def split(chunks, cuts):
    """Chunks of one token against k: both sides' tokens, from their bytes and who has the one token."""
    student, teacher = [], []
    for content, student_whole, ends in zip(*chunks, cuts, strict=True):
        ends = sorted({e for e in ends if 0 < e < len(content)})
        pieces = [content[a:b] for a, b in zip([0, *ends], [*ends, len(content)], strict=True)]
        student += [content] if student_whole else pieces
        teacher += pieces if student_whole else [content]
    return student, teacher


@st.composite
def faithful(draw, letters):
    """Two rows that spell one text, every chunk 1-to-k or k-to-1 with k <= 4; `letters(n)` is the text."""
    lengths = draw(st.lists(st.integers(1, 8), max_size=12))
    ends = np.cumsum([0, *lengths]).tolist()
    text = draw(letters(ends[-1]))
    contents = [text[a:b] for a, b in itertools.pairwise(ends)]
    sides = draw(st.lists(st.booleans(), min_size=len(contents), max_size=len(contents)))
    cuts = [draw(st.lists(st.integers(1, 7), max_size=3)) for _ in contents]
    return split((contents, sides), cuts)


@FEW
@given(faithful(lambda n: st.lists(st.sampled_from(b"aab"), min_size=n, max_size=n).map(bytes)))
def test_the_walks_chunks_wherever_they_score_best(rows):
    check_beside_the_walk(*rows, longest=4)


@FEW
@given(faithful(lambda n: st.just(bytes(range(n)))))
def test_the_walks_chunks_whenever_nothing_occurs_twice(rows):
    """No run of tokens matches at another place, so that the walk's chunks are all there is."""
    assert check_beside_the_walk(*rows, longest=4)


@FEW
@given(texts(PIECES + DECOMPOSED))
@example("the cat 201 sat 222, 1234567890")
@pytest.mark.parametrize("makes", FAITHFUL, ids=["fine-student", "fine-teacher"])
def test_the_walks_chunks_under_real_tokenizers(makes, text):
    pair = trained.pair(*makes)
    sides = [[t.bytes_of(int(i)) for i in t.encode(text)] for t in (pair.student, pair.teacher)]
    walked = walk(*map(spans, sides))
    sizes = [np.bincount(chunks, minlength=walked[2]) for chunks in walked[:2]]
    assume(np.all(np.minimum(*sizes) == 1) and np.all(np.maximum(*sizes) <= 8))
    check_beside_the_walk(*sides, longest=8)


@pytest.mark.parametrize("times", [1, 2, 3, 5])
def test_a_repeated_character_can_score_more_when_shifted(times):
    """Where the best score is not the walk's: four equal tokens and one beat two combinations of four."""
    student = [b"aaaa", b"a", b"a", b"a", b"a"] * times
    teacher = [b"a", b"a", b"a", b"a", b"aaaa"] * times
    found = align_tokens(student, teacher)
    walked = walk(spans(student), spans(teacher))
    assert reference.score(student, teacher, *walked) == 12.0 * times
    if times <= 2:
        assert found.score == 12.0 * times
        assert found.student_chunks.tolist() == walked[0].tolist()
        return
    assert found.score == 15.0 * times - 6.0
    assert found.student_chunks.tolist() == [-1, *range(5 * times - 1)]
    assert found.teacher_chunks.tolist() == [*range(5 * times - 1), -1]


def test_numbers():
    found = align_tokens(
        [b"201", b"+", b"22", b"=", b"1", b"2"], [b"2", b"0", b"1", b"+", b"2", b"2", b"=", b"12"]
    )
    assert found.student_chunks.tolist() == [0, 1, 2, 3, 4, 4]
    assert found.teacher_chunks.tolist() == [0, 0, 0, 1, 2, 2, 3, 4]
    assert found.score == 4.5 + 3 + 3 + 3 + 3
    # Longer than may join: different tokens and gaps, and the neighbours stay.
    found = align_tokens([b"x", b"12345", b"y"], [b"x", b"1", b"2", b"3", b"4", b"5", b"y"])
    assert found.student_chunks.tolist() == [0, 1, 2]
    assert found.teacher_chunks.tolist() == [0, -1, -1, -1, -1, 1, 2]
    assert found.exact.tolist() == [True, False, True]


def test_one_sided_tokens_touch_nothing():
    words = [b"the", b" cat", b" sat"]
    found = align_tokens([None, *words, None], [*words[:2], None, words[2]])
    assert found.student_chunks.tolist() == [-1, 0, 1, 2, -1]
    assert found.teacher_chunks.tolist() == [0, 1, -1, 2]
    assert found.score == 9 - 4.5
    # Not even against each other: without a role, None is not known to be the other's None.
    assert align_tokens([None, b""], [None, b"", b"x"]).chunk_count == 0


@FEW
@given(texts(PIECES + DECOMPOSED))
@pytest.mark.parametrize("makes", FAITHFUL, ids=["bos-student", "bos-teacher"])
def test_ids_without_text(makes, text):
    """EOS pairs with EOS, a BOS on one side is a gap, and between them all is as without the marks."""
    pair = trained.pair(*makes)
    sides = [(tokenizer, tokenizer.encode(text)) for tokenizer in (pair.student, pair.teacher)]
    marked = [
        [*([t.roles["bos"]] if "bos" in t.roles else []), *ids.tolist(), t.roles["eos"]] for t, ids in sides
    ]
    found = chunks_of_ids(pair, *marked, longest=8)
    assert found.student_chunks[-1] == found.teacher_chunks[-1] == found.chunk_count - 1  # EOS
    opening = found.student_chunks if makes[0] is trained.three_digits else found.teacher_chunks
    assert opening[0] == -1  # BOS is on one side only
    words = align_tokens(*([t.bytes_of(int(i)) for i in ids] for t, ids in sides), longest=8)
    assert found.score == words.score + 3 - 1.5
    assert found.exact.tolist() == [*words.exact, True]


def test_one_id_for_both_marks_matches_either():
    pair = trained.pair(trained.single_digits, trained.sentencepiece)
    end = pair.student.roles["eos"]
    both = dataclasses.replace(pair.student, roles={"bos": end, "eos": end, "pad": end})
    teacher_ids = [pair.teacher.roles["bos"], *pair.teacher.encode("cat"), pair.teacher.roles["eos"]]
    student_ids = [end, *both.encode(" cat"), end]
    found = chunks_of_ids(TokenizerPair(both, pair.teacher), student_ids, teacher_ids)
    assert found.student_chunks[0] == found.teacher_chunks[0] == 0
    assert found.student_chunks[-1] == found.teacher_chunks[-1] == found.chunk_count - 1
    assert found.exact.all()


def test_markers_pair_by_role_and_unknown_and_padding_by_none():
    tokenizer = trained.load(trained.sentencepiece)
    unknown, begin, end = (tokenizer.roles[role] for role in ("unk", "bos", "eos"))
    word = int(tokenizer.encode("cat")[0])
    student = dataclasses.replace(tokenizer, roles={"turn_end": end, "unk": unknown, "pad": begin})
    teacher = dataclasses.replace(tokenizer, roles={"turn_end": begin, "unk": unknown, "pad": end})
    found = chunks_of_ids(
        TokenizerPair(student, teacher), [unknown, word, end, begin, begin], [unknown, word, begin, end]
    )
    assert found.student_chunks.tolist() == [-1, 0, 1, -1, -1]
    assert found.teacher_chunks.tolist() == [-1, 0, 1, -1]
    assert found.exact.all()


def test_mistakes_are_named():
    pair = trained.pair(*FAITHFUL[0])
    size = pair.teacher.size
    with pytest.raises(UserError, match=f"teacher id {size}: the tokenizer .* has ids 0 to {size - 1}"):
        chunks_of_ids(pair, np.array([1]), np.array([1, size]))
    with pytest.raises(UserError, match="student id -1: "):
        chunks_of_ids(pair, np.array([-1]), np.array([1]))
    for longest in (0, 33):
        with pytest.raises(UserError, match=f"longest={longest}: "):
            align_tokens([b"a"], [b"a"], longest=longest)
        with pytest.raises(UserError, match=f"longest={longest}: "):
            chunks_of_ids(pair, np.array([1]), np.array([1]), longest=longest)
