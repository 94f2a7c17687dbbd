"""Texts, exchanges and conversations: what a record is taken for, and the line that each mistake gives."""

import json

import numpy as np
import pytest

from xtoken_jax.data.shapes import (
    Conversation,
    Exchange,
    Shape,
    Targets,
    document_of,
    find_shape,
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
    "array": (['[{"text": "a"},', ' {"text": "b"}]'], {}, "a JSON array has to become one object a line"),
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
        [EXCHANGE, {"prompt": "a", "completion": ["b"]}], {}, "FILE:2: 'completion' holds list, not text",
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
        "FILE:1: 'messages[0].content' holds list, not text",
    ),
    "unknown-role": (
        [{"messages": [USER, {"role": "gpt", "content": "a"}]}], {},
        "FILE:1: messages[1] is of the unknown role 'gpt'; there is system, developer, user, assistant, "
        "tool, function",
    ),
    "unknown-speaker": (
        [{"conversations": [{"from": "bot", "value": "a"}]}], {},
        "FILE:1: conversations[0] is of the unknown role 'bot'; there is system, developer, user, assistant, "
        "tool, function, human, gpt, observation",
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
