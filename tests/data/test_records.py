"""Texts, exchanges and conversations: what a record is taken for, and the line that each mistake gives."""

import json

import numpy as np
import pytest

from xtoken_jax.data.detect import find_shape
from xtoken_jax.data.records import (
    Conversation,
    Exchange,
    Shape,
    Targets,
    document_of,
    says_nothing,
    text_of,
)
from xtoken_jax.data.sources import SourceConfig, read_documents
from xtoken_jax.errors import UserError

USER, ASSISTANT = {"role": "user", "content": "12 + 189?"}, {"role": "assistant", "content": "201"}
CHAT = Conversation((USER, ASSISTANT))


def read(folder, *records, **options):
    path = folder / "a.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return read_documents(SourceConfig(path=str(path), **options))


def test_the_record_tells_its_shape(tmp_path):
    assert list(read(tmp_path, {"id": 1, "text": "a"})) == ["a"]
    assert list(read(tmp_path, {"prompt": "a", "completion": " b"})) == [Exchange("a", " b")]
    assert list(read(tmp_path, {"prompt": "a", "messages": [USER, ASSISTANT]})) == [CHAT]
    shared = [{"from": "human", "value": "12 + 189?"}, {"from": "gpt", "value": "201"}]
    assert list(read(tmp_path, {"id": "x", "conversations": shared})) == [CHAT]


def test_named_keys_decide(tmp_path):
    record = {"text": "t", "body": "b", "question": "q", "completion": "c", "turns": [USER, ASSISTANT]}
    assert list(read(tmp_path, record, field="body")) == ["b"]
    assert list(read(tmp_path, record, prompt="question")) == [Exchange("q", "c")]
    assert list(read(tmp_path, record, prompt="question", completion="body")) == [Exchange("q", "b")]
    assert list(read(tmp_path, record, messages="turns")) == [CHAT]


def test_targets(tmp_path):
    exchange, chat = {"prompt": "a", "completion": "b"}, {"messages": [USER, ASSISTANT]}
    for record, targets, expected in (
        (exchange, Targets.auto, "completion"),
        (exchange, Targets.completion, "completion"),
        (exchange, Targets.all, "all"),
        (chat, Targets.auto, "assistant"),
        (chat, Targets.all, "all"),
    ):
        found = read(tmp_path, record, targets=targets)
        assert found.shape.targets == found[0].targets == expected


def test_what_formats_make_of_messages():
    def read_one(messages):
        return document_of(Shape(messages="m", targets="assistant"), {"m": messages}, lambda: "here")

    # Columns give all messages all keys; TFDS keeps lists of objects as objects of lists, of bytes.
    with_nones = ({**USER, "name": None}, {**ASSISTANT, "name": None})
    assert read_one(with_nones) == CHAT
    assert read_one(np.array([USER, ASSISTANT], object)) == CHAT
    columns = {"role": [b"user", b"assistant"], "content": np.array([b"12 + 189?", b"201"], object)}
    assert read_one(columns) == CHAT
    parts = {"role": "user", "content": [{"type": "text", "text": "12 "}, {"type": "text", "text": "+ 189?"}]}
    assert read_one([parts, ASSISTANT]) == CHAT
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert read_one([USER, call]).messages[1] == call


@pytest.mark.parametrize(
    ("document", "nothing"),
    [
        ("", True),
        (" \n", True),
        ("a", False),
        (Exchange("a", " "), True),
        (Exchange("a", " ", "all"), False),
        (Exchange("", "b"), False),
        (Conversation((USER,)), True),
        (Conversation((USER,), "all"), False),
        (CHAT, False),
    ],
)
def test_what_says_nothing(document, nothing):
    assert says_nothing(document) == nothing


def test_the_text_of_a_document():
    assert [text_of(d) for d in ("a", Exchange("a", "b"), CHAT)] == ["a", "ab", "12 + 189?\n201"]


GOOD = {"text": "fine"}
EXCHANGE = {"prompt": "a", "completion": "b"}
# Records, options of the source -> the line. FILE is the file's path.
MISTAKES = {
    "no-json": ([GOOD, '{"text": "cut'], {}, "FILE:2: not a JSON object (Unterminated string"),
    "array": (['[{"text": "a"}', ' {"text": "b"}]'], {}, "FILE, record 0: not a JSON object (Extra data"),
    "pretty": (["{", '"text": "a"', "}"], {}, "an object goes on one line, or all objects in one list"),
    "twice": ([GOOD, '{"text": "a", "text": "b"}'], {}, "FILE:2: not a JSON object (the key 'text' has two"),
    "digits": ([GOOD, '{"text": "a", "n": 1' + "0" * 5000 + "}"], {}, "(Exceeds the limit (4300 digits)"),
    "list": ([GOOD, "", ["text"]], {}, "FILE:3: not a JSON object but list"),
    "number": ([GOOD, "3"], {}, "FILE:2: not a JSON object but int"),
    "missing-key": ([GOOD, {"txet": "a"}], {}, "FILE:2: no 'text' in this record, which has 'txet'"),
    "null": ([GOOD, {"text": None}], {}, "FILE:2: 'text' holds NoneType, not text"),
    "number-as-text": ([{"text": 3}], {}, "FILE:1: 'text' holds int, not text"),
    "half-surrogate": ([GOOD, '{"text": "\\ud800"}'], {}, "FILE:2: 'text' is not text ('utf-8' codec"),
    "deep": ([GOOD, "[" * 100_000], {}, "FILE:2: not a JSON object ("),
    "nothing": ([], {}, "FILE: holds no text"),
    "blank": ([{"text": " "}, {"text": ""}], {}, "FILE: holds no text"),
    "no-shape": (
        [{"a": 1, "prompt": "x"}],
        {},
        "FILE: no 'text', 'prompt' with 'completion', or 'messages' in its first record, which has 'a', "
        "'prompt'; name the one to read with field=, prompt= and completion=, or messages=",
    ),
    "two-shapes": (
        [EXCHANGE | GOOD],
        {},
        "FILE: could be read in several ways, as text and prompt + completion; name the one to read with",
    ),
    "named-key-missing": (
        [GOOD], {"field": "body"}, "FILE: no 'body' in its first record, which has 'text'",
    ),
    "named-completion-missing": (
        [GOOD], {"prompt": "text"}, "FILE: no 'completion' in its first record, which has 'text'",
    ),
    "completion-of-a-text": (
        [GOOD], {"targets": Targets.completion},
        "FILE: targets=completion, but it holds texts; choose all",
    ),
    "assistant-of-an-exchange": (
        [EXCHANGE], {"targets": Targets.assistant},
        "FILE: targets=assistant, but it holds prompts and completions; choose completion or all",
    ),
    "completion-of-a-chat": (
        [{"messages": [USER]}], {"targets": Targets.completion},
        "FILE: targets=completion, but it holds conversations; choose assistant or all",
    ),
    "completion-no-text": (
        [EXCHANGE, {"prompt": "a", "completion": ["b"]}], {},
        "FILE:2: 'completion' holds a list and 'prompt' does not; make both texts, or both lists of",
    ),
    "no-completion-at-all": ([{"prompt": "a", "completion": ""}], {}, "FILE: holds no completion to learn"),
    "messages-no-list": ([{"messages": "hi"}], {}, "FILE:1: 'messages' holds str, not a list of messages"),
    "messages-one-object": (
        [{"messages": USER}], {}, "FILE:1: 'messages' holds one object, not a list of messages",
    ),
    "no-messages": ([{"messages": []}], {}, "FILE:1: 'messages' holds no message"),
    "message-no-object": (
        [{"messages": [USER, "hi"]}], {},
        "FILE:1: messages[1] holds str, not an object with role and content",
    ),
    "no-role": ([{"messages": [{"content": "a"}]}], {}, "FILE:1: messages[0] has no 'role', only 'content'"),
    "no-content": (
        [{"messages": [{"role": "user"}]}], {}, "FILE:1: messages[0] has no 'content', only 'role'",
    ),
    "content-no-text": (
        [{"messages": [{"role": "user", "content": 3}]}], {},
        "FILE:1: 'messages[0].content' holds int, not text",
    ),
    "content-an-image": (
        [{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}], {},
        "FILE:1: messages[0].content[0] is of type 'image', and only 'text' is read; leave such records out",
    ),
    "unknown-role": (
        [{"messages": [USER, {"role": "judge", "content": "a"}]}], {},
        "FILE:1: messages[1] is of the unknown role 'judge'; rename it to one of system, developer, user, "
        "assistant, tool, function, human, gpt, ",
    ),
    "unknown-speaker": (
        [{"conversations": [{"from": "function_call", "value": "a"}]}], {},
        "FILE:1: conversations[0] is of the unknown role 'function_call'; rename it to one of system, ",
    ),
    "nobody-answers": ([{"messages": [USER]}], {}, "FILE: holds no assistant to learn"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_the_line_that_a_mistake_gives(tmp_path, name):
    records, options, expected = MISTAKES[name]
    with pytest.raises(UserError) as error:
        read(tmp_path, *records, **options)
    line = str(error.value).replace(str(tmp_path / "a.jsonl"), "FILE")
    assert expected in line
    assert "\n" not in line
    assert line.startswith("FILE")


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not UTF-8"):
        read_documents(SourceConfig(path=str(path)))
    with pytest.raises(UserError, match="here: 't' is not UTF-8"):
        document_of(Shape(text="t"), {"t": b"\xff"}, lambda: "here")


def test_texts_have_no_keys():
    with pytest.raises(UserError, match="here: its records are plain text, without a key 'a'"):
        find_shape(None, Shape(text="a"), Targets.auto, "here")
    assert find_shape(None, Shape(), Targets.auto, "here") == Shape()


def test_instructions_are_prompts_in_parts(tmp_path):
    records = (
        {"instruction": "Add.", "input": "2 + 3", "output": "5"},
        {"instruction": "Name a colour.", "input": " ", "output": "red"},
        {"instruction": "Name a tree.", "output": "oak"},
    )
    prompts = ["Add.\n\n2 + 3\n\n", "Name a colour.\n\n", "Name a tree.\n\n"]
    expected = [Exchange(p, c) for p, c in zip(prompts, ("5", "red", "oak"), strict=True)]
    assert list(read(tmp_path, *records)) == expected
    assert list(read(tmp_path, *records[::-1], prompt="instruction", completion="output")) == expected[::-1]
    dolly = {"instruction": "When?", "context": "It was 1912.", "response": "1912", "category": "qa"}
    assert list(read(tmp_path, dolly)) == [Exchange("When?\n\nIt was 1912.\n\n", "1912")]
    named = {"q": "a", "more": "b", "a": "c", "s": "d"}
    found = read(tmp_path, named, prompt="q", completion="a", input="more", system="s")
    assert list(found) == [Exchange("d\n\na\n\nb\n\n", "c")]
    (chat,) = read(tmp_path, records[0] | {"system": "Be brief."}, chat=True)
    assert chat.targets == "assistant"
    assert chat.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add.\n\n2 + 3"},
        {"role": "assistant", "content": "5"},
    )


def test_of_messages_in_prompt_and_completion_the_completion_is_learnt(tmp_path):
    record = {
        "prompt": [USER, ASSISTANT, {"role": "user", "content": "And 1 more?"}],
        "completion": [{"role": "assistant", "content": "202"}],
    }
    (chat,) = read(tmp_path, record)
    assert chat.targets == "assistant"
    assert [m.get("weight") for m in chat.messages] == [None, 0, None, None]
    assert [m["content"] for m in chat.messages] == ["12 + 189?", "201", "And 1 more?", "202"]
    (chat,) = read(tmp_path, record, targets=Targets.all)
    assert chat.targets == "all"
    assert all("weight" not in m for m in chat.messages)


def test_messages_as_data_sets_spell_them(tmp_path):
    turns = [
        {"from": "Human", "value": "a"},
        {"from": "chatgpt", "value": "b"},
        {"from": "bot", "value": "c"},
    ]
    (chat,) = read(tmp_path, {"conversations": turns, "system": "Be brief."})
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "assistant"]
    for mark in ({"weight": 0}, {"train": False}, {"loss": False}, {"weight": 0.0}):
        assert says_nothing(read_one_chat(ASSISTANT | mark))
    for mark in ({"weight": 1}, {"train": True}, {"weight": None}):
        assert read_one_chat(ASSISTANT | mark) == CHAT
    parts = {"role": "user", "content": [{"type": "text", "text": "12 + 189?", "image_url": None}]}
    assert list(read(tmp_path, {"messages": [parts, ASSISTANT], "images": []})) == [CHAT]


def read_one_chat(answer):
    return document_of(Shape(messages="m", targets="assistant"), {"m": [USER, answer]}, lambda: "here")


@pytest.mark.parametrize(
    ("record", "options", "line"),
    [
        (
            {"messages": [USER, ASSISTANT | {"weight": 0.5}]},
            {},
            "messages[1].weight is 0.5; only 0 and 1 are",
        ),
        (
            {"messages": [USER, ASSISTANT | {"weight": 0}]},
            {"targets": Targets.all},
            "messages[1] is marked as no target, and targets=all learns every message; choose",
        ),
        ({"messages": [USER, ASSISTANT], "images": ["a.png"]}, {}, "has 'images', which is not read; leave"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            {},
            "has 'history', which is not read",
        ),
        (
            {"messages": [{"role": "system", "content": "x"}, ASSISTANT], "system": "y"},
            {},
            "two system prompts",
        ),
        ({"chosen": "a", "rejected": "b"}, {}, "these are preference pairs: messages=chosen reads"),
        (
            {"prompt": "a", "completion": "b", "label": False},
            {},
            "a 'label', which may mark completions that",
        ),
        ({"question": "a", "answer": "b"}, {}, "; perhaps prompt=question completion=answer"),
        ({"content": "a", "lang": "C"}, {}, "; perhaps field=content"),
        (
            {"text": "a"},
            {"chat": True},
            "chat=true is for prompts with completions, and it holds texts; leave",
        ),
        ({"text": "a"}, {"system": "s"}, "system=s, and it holds texts; leave it out"),
        (
            {"prompt": "a", "completion": "b"},
            {"input": "c"},
            "no 'c' in its first record, which has 'prompt'",
        ),
    ],
)
def test_records_that_say_more_than_is_read(tmp_path, record, options, line):
    with pytest.raises(UserError) as error:
        read(tmp_path, record, **options)
    assert line in str(error.value)
    assert "\n" not in str(error.value)
