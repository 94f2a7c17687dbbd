"""Counts of tokens, targets and skipped records by source."""

from dataclasses import replace

import numpy as np
from data.test_encode import CONFIG, DOCUMENTS, MESSAGES, pairs
from tokens import trained

from xtoken_jax.alignment.spans import Side, Spans
from xtoken_jax.data.encode import cut_little, cut_parts, encode, read_parts, student_of
from xtoken_jax.data.records import Conversation, Exchange
from xtoken_jax.data.tally import BLANK, CUT_OFF, NOTHING_TO_LEARN, Tally, count_unguided
from xtoken_jax.tokens.tokenizer import TokenizerPair

SOURCES = {
    "mixed": DOCUMENTS,
    "texts": ["12 + 189 = 201", "", "\n\n", "x y z"],
    "answers": [Exchange("12 + 189 =", " 201"), Exchange("no answer:", ""), Exchange(" ", "\n")],
}


def test_counts_of_each_source():
    tallies: dict[str, Tally] = {}
    rows = read_parts(pairs(), SOURCES, CONFIG, tallies=tallies)
    for name, documents in SOURCES.items():
        tally = tallies[name]
        sides = [student_of(part) for part in rows[name]]
        assert tally.records == len(documents)
        assert tally.tokens == sum(map(len, sides))
        assert tally.targets == sum(int(side.targets[1:].sum()) for side in sides)
        assert 0 < tally.targets < tally.tokens
    assert tallies["mixed"].skipped == {BLANK: 1, NOTHING_TO_LEARN: 2}
    assert tallies["texts"].skipped == {BLANK: 2}
    assert tallies["answers"].skipped == {BLANK: 1, NOTHING_TO_LEARN: 1}
    assert tallies["texts"].describe().endswith("; skipped 2 of 4 records: 2 blank")


def test_little_text_is_counted_alike():
    read: dict[str, Tally] = {}
    cut: dict[str, Tally] = {}
    read_parts(pairs(), SOURCES, CONFIG, tallies=read)
    assert cut_little(pairs(), SOURCES, CONFIG, tallies=cut) is not None
    assert read == cut


MARKED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def test_targets_without_a_teacher_and_turns_without_an_end_are_counted():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    pair = TokenizerPair(*(replace(side, chat_template=MARKED) for side in (pair.student, pair.teacher)))
    chat = Conversation(
        (
            {"role": "user", "content": "12?"},
            {"role": "assistant", "content": "the cat"},
            {"role": "user", "content": "201"},
            {"role": "assistant", "content": "the mat"},
        )
    )
    tally: dict[str, Tally] = {}
    long = replace(CONFIG, student_length=64, teacher_length=64)
    (part,) = read_parts({"a": pair}, {"chats": [chat]}, long, tallies=tally)["chats"]
    side = student_of(part)
    assert side.ids[-1] == pair.student.roles["eos"]
    # EOS is in no chunk: it stands in the template, which each side writes for itself.
    assert tally["chats"].unguided == 1
    assert tally["chats"].endless == 1
    assert tally["chats"].describe(taught=True) == (
        f"{side.targets.sum()} of {len(side)} tokens are targets, 1 of them without a teacher: the two sides "
        "write other bytes there; assistant's turns without an end marker in the student's chat template, "
        "after which the student does not learn to stop: 1"
    )
    assert "teacher" not in tally["chats"].describe()


def test_a_target_is_without_a_teacher_where_none_covers_it():
    def spans(chunks, exact, *, targets=(True,) * 4):
        side = Side(np.arange(4, dtype=np.int32), np.array(chunks), np.array(targets), np.zeros(4, np.int32))
        return Spans(side, side, len(exact), np.array(exact))

    first, second = spans([0, 1, 2, -1], [True, True, False]), spans([-1, 0, 1, 2], [True, True, True])
    assert count_unguided([first]) == 2  # an inexact chunk and none
    assert count_unguided([first, second]) == 0
    assert count_unguided([spans([0, 0, 1, 1], [True, True])]) == 1
    assert count_unguided([spans([0, 1, 1, 2], [True] * 3, targets=(True, False, True, True))]) == 1


def test_targets_that_are_cut_off_are_counted():
    chat = Conversation(MESSAGES[:2])
    (row,) = encode(pairs(), [chat])
    tally = Tally()
    assert cut_parts(row, CONFIG)
    tally.add(chat, student_of(row), [])
    assert tally.skipped == {CUT_OFF: 1}
    assert tally.describe() == (
        "0 of 0 tokens are targets; skipped 1 of 1 records: 1 whose targets do not fit a row"
    )
