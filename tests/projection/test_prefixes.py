"""The tables of prefix KL, from tokenizers whose merges are written out."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from xtoken_jax import TokenizerPair, prefix_tables
from xtoken_jax.errors import UserError
from xtoken_jax.projection.prefixes import tables_of_pieces


def folder(path, merges, eos="<eos>"):
    """A byte-level BPE tokenizer of the 256 bytes and the results of some merges."""
    merges = [tuple(merge.split()) for merge in merges]
    vocabulary = [eos, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([eos])
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return path


PART = ["p a", "r t", "pa rt"]
ICULAR = ["i c", "ic u", "l a", "icu la", "icula r", "l y"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The student has "part" and "particularly", the teacher "part", "icular", "ly" and another EOS."""
    root = tmp_path_factory.mktemp("prefixes")
    whole = [*PART, *ICULAR, "icular ly", "part icularly", "2 0", "20 1"]
    return TokenizerPair.load(folder(root / "s", whole), folder(root / "t", [*PART, *ICULAR], "</s>"))


def run_of(table, token, d):
    """What each token of the run goes on with, by token."""
    begin, size = table.begin[token, d - 1], table.size[token, d - 1]
    return {int(i): int(table.following[i, d]) for i in table.order[begin : begin + size]}


def test_pieces_events_and_runs(pair):
    tables = prefix_tables(pair)
    student, teacher = (
        {content: i for i, content in enumerate(side.token_bytes.contents)}
        for side in (pair.student, pair.teacher)
    )
    assert tables.student_pieces.pieces[student[b"201"], :4].tolist() == [
        *(teacher[digit] for digit in (b"2", b"0", b"1")),
        -1,
    ]
    event = tables.student.event_of
    assert event[student[b"201"]] == event[student[b"2"]] == tables.teacher.event_of[teacher[b"2"]]
    assert event[student[b"0"]] != event[student[b"2"]]
    eos = [side.roles["eos"] for side in (pair.student, pair.teacher)]
    assert event[eos[0]] == tables.teacher.event_of[eos[1]] < tables.student.single.shape[0]
    # After "2": the end, or "0", of which "201" is no other than "20".
    assert run_of(tables.student_pieces, student[b"201"], 1) == {
        student[b"2"]: -1, student[b"20"]: teacher[b"0"], student[b"201"]: teacher[b"0"]
    }  # fmt: skip
    assert run_of(tables.student_pieces, student[b"201"], 2) == {
        student[b"20"]: -1, student[b"201"]: teacher[b"1"]
    }  # fmt: skip
    assert tables.student_pieces.size[student[b"201"], 2] == 0  # nothing is longer


def test_a_piece_that_can_come_behind_the_ended_token_counts_as_its_end(pair):
    """ "particular" is "part", "icular" to the student too: "icular" says nothing of "particularly"."""
    tables = prefix_tables(pair)
    student = {content: i for i, content in enumerate(pair.student.token_bytes.contents)}
    part, longer = student[b"part"], student[b"particularly"]
    assert tables.student_pieces.pieces[longer, 1] >= 0
    assert tables.student_pieces.following[longer, 1] == -1
    assert tables.student_pieces.size[part, 0] == 0  # both count as the end: nothing is to be told


def test_the_same_pair_gives_the_same_arrays(pair):
    first, second = prefix_tables(pair), prefix_tables(pair)
    for name in ("student_pieces", "teacher_pieces", "student", "teacher"):
        for key, value in vars(getattr(first, name)).items():
            np.testing.assert_array_equal(value, vars(getattr(second, name))[key])


def test_a_side_without_pieces_and_a_pair_without_text():
    tables = tables_of_pieces({}, {0: [0]}, {}, 2, 2)
    assert (tables.student.count, tables.student_pieces.longest) == (1, 1)
    with pytest.raises(UserError, match="no text in common"):
        tables_of_pieces({}, {}, {}, 2, 2)
