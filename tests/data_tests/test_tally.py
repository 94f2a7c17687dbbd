"""Counts of tokens, targets and skipped records by source."""

from data_tests.test_encode import CONFIG, DOCUMENTS, MESSAGES, pairs

from xtoken_jax.data.encode import cut_little, cut_parts, encode, read_parts, student_of
from xtoken_jax.data.shapes import Conversation, Exchange
from xtoken_jax.data.tally import BLANK, CUT_OFF, NOTHING_TO_LEARN, Tally

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
