"""Exchanges and conversations as rows: marks, targets, several teachers of one student."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tokens import trained

from xtoken_jax.alignment.chat import align_chats
from xtoken_jax.alignment.prompts import align_completions
from xtoken_jax.alignment.rows import with_document_marks
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.encode import cut_little, cut_parts, encode, read_parts, student_of
from xtoken_jax.data.records import Conversation, Exchange
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import TokenizerPair

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|MARK|>{{ m.role }}\n{{ m.content }}<|end|>{% endfor %}"
MESSAGES = (
    {"role": "user", "content": "12 + 189?"},
    {"role": "assistant", "content": "It is 201."},
    {"role": "user", "content": "really"},
    {"role": "assistant", "content": "yes"},
)
DOCUMENTS = [
    "12 + 189 = 201",
    Exchange("12 + 189 =", " 201"),
    Conversation(MESSAGES),
    " \n",
    Exchange("12 + 189 =", " 201", "all"),
    Conversation(MESSAGES, "all"),
    Conversation(MESSAGES[:1]),
    Exchange("no answer:", "  "),
]
CONFIG = DataConfig(student_length=16, teacher_length=24, batch_size=2)


@functools.cache
def with_template(makes, mark):
    def made():
        tokenizer, config = makes()
        tokenizer.add_special_tokens([f"<|{mark}|>", "<|end|>"])
        return tokenizer, {**config, "chat_template": TEMPLATE.replace("MARK", mark)}

    return made


@functools.cache
def pairs():
    one = trained.pair(
        with_template(trained.three_digits, "student"), with_template(trained.single_digits, "teacher")
    )
    other = trained.pair(
        with_template(trained.three_digits, "student"), with_template(trained.three_digits, "other")
    )
    return {"one": one, "other": TokenizerPair(one.student, other.teacher)}


def written(tokenizer, side, chosen):
    """What the chosen tokens of a side say; special ones by their names."""
    return "".join(tokenizer.backend.decode([int(i)], skip_special_tokens=False) for i in side.ids[chosen])


def test_every_document_is_as_its_own_kind_makes_it():
    rows = encode(pairs(), DOCUMENTS)
    for number, name in ((0, "one"), (1, "other")):
        pair = [*pairs().values()][number]
        whole = align_completions(pair, [""], ["12 + 189 = 201"])[0]
        expected = {
            0: with_document_marks(pair, whole),
            1: with_document_marks(pair, align_completions(pair, ["12 + 189 ="], [" 201"])[0]),
            2: align_chats(pair, [MESSAGES])[0],
            4: with_document_marks(pair, whole),
            5: align_chats(pair, [MESSAGES], targets="all")[0],
        }
        for place, spans in expected.items():
            for side in ("student", "teacher"):
                found, wanted = getattr(rows[place][name], side), getattr(spans, side)
                for part in ("ids", "chunks", "targets", "segments"):
                    np.testing.assert_array_equal(getattr(found, part), getattr(wanted, part))
            np.testing.assert_array_equal(rows[place][name].exact, spans.exact)
    for row in rows:  # a student has one text, whoever teaches
        for part in ("ids", "targets", "segments"):
            np.testing.assert_array_equal(
                getattr(row["one"].student, part), getattr(row["other"].student, part)
            )
    for place in (3, 6, 7):
        assert [len(student_of(rows[place])), *cut_parts(rows[place], CONFIG)] == [0]


def test_what_is_learnt():
    rows = encode(pairs(), DOCUMENTS)
    pair = pairs()["one"]
    student, teacher = rows[1]["one"].student, rows[1]["one"].teacher
    assert written(pair.student, student, student.targets & (student.chunks > 0)).strip().startswith("201")
    chat = rows[2]["one"]
    for tokenizer, side in ((pair.student, chat.student), (pair.teacher, chat.teacher)):
        assert written(tokenizer, side, side.targets) == "It is 201.<|end|>yes<|end|>"
    assert rows[5]["one"].student.targets.all()
    assert len(teacher)
    assert not student.targets.all()


def test_an_answer_of_weight_0_is_context():
    first = MESSAGES[1] | {"weight": 0}
    chat = Conversation((MESSAGES[0], first, *MESSAGES[2:]))
    (row,) = encode(pairs(), [chat])
    (whole,) = encode(pairs(), [Conversation(MESSAGES)])
    for name, pair in pairs().items():
        for side, tokenizer in (("student", pair.student), ("teacher", pair.teacher)):
            found, learnt = getattr(row[name], side), getattr(whole[name], side)
            assert found.ids.tolist() == learnt.ids.tolist()
            assert written(tokenizer, found, found.targets) == "yes<|end|>"


def test_encoding_together_or_alone_is_the_same():
    together = encode(pairs(), DOCUMENTS)
    for document, row in zip(DOCUMENTS, together, strict=True):
        (alone,) = encode(pairs(), [document])
        for name in row:
            np.testing.assert_array_equal(row[name].student.ids, alone[name].student.ids)
            np.testing.assert_array_equal(row[name].teacher.targets, alone[name].teacher.targets)


def test_conversations_from_several_threads():
    expected = [row["one"].student.ids.tolist() for row in encode(pairs(), [DOCUMENTS[2]])]
    with ThreadPoolExecutor(4) as pool:
        for rows in pool.map(lambda _: encode(pairs(), [DOCUMENTS[2]]), range(60)):
            assert [row["one"].student.ids.tolist() for row in rows] == expected


def test_parts_of_a_prompt_alone_are_left_out():
    document = Exchange("12 + 189, 7 and 8 in the sum of many numbers " * 4, "201")
    (row,) = encode(pairs(), [document])
    parts = cut_parts(row, CONFIG)
    assert len(student_of(row)) > 3 * 16
    assert len(parts) < 3
    learnt = np.concatenate([student_of(part).ids[student_of(part).targets] for part in parts])
    assert "201" in pairs()["one"].student.decode(learnt)


def test_a_side_without_a_chat_template_is_named():
    plain = trained.pair(with_template(trained.three_digits, "student"), trained.single_digits)
    with pytest.raises(
        UserError, match=r"no chat template for conversations; put a chat_template\.jinja"
    ) as e:
        cut_little({"teacher": plain}, {"chats": [Conversation(MESSAGES)] * 3}, CONFIG)
    assert str(e.value).startswith(plain.teacher.name)


def test_what_a_template_refuses_is_named_by_its_place():
    template = "{{ raise_exception('only one turn') if messages | length > 2 else messages[0].content }}"

    def picky():
        tokenizer, config = trained.single_digits()
        return tokenizer, {**config, "chat_template": template}

    pair = trained.pair(picky, picky)
    documents = [
        Conversation(MESSAGES[:2], where=lambda: "a.jsonl:1"),
        Conversation(MESSAGES, where=lambda: "a.jsonl:2"),
    ]
    with pytest.raises(UserError, match=r"^a\.jsonl:2: the chat template of .* refuses it: only one turn"):
        encode({"teacher": pair}, documents)


def test_nothing_to_learn_in_a_whole_source():
    with pytest.raises(UserError, match="source 'chats': no row has a token to learn; of its"):
        read_parts(pairs(), {"chats": [Conversation(MESSAGES[:1])]}, CONFIG)
