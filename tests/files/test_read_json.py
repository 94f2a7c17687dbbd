"""The reader of JSON that anyone may have written: one line for each kind of fault."""

import json
import os
import re

import pytest

from xtoken_jax.errors import UserError, first_line
from xtoken_jax.files import MAX_JSON_DEPTH, parse_json, read_json

FAULTS = {
    "empty": (b"", "not valid JSON: Expecting value, line 1 column 1"),
    "cut": (b'{"a":\n[1, 2', "not valid JSON: Expecting ',' delimiter, line 2 column 6"),
    "two values": (b"{} {}", "not valid JSON: Extra data"),
    "lists": (b"[" * 100_000, "nested more than 100 deep"),
    "closed lists": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested more than 100 deep"),
    "objects": (b'{"a":' * 100_000, "nested more than 100 deep"),
    "one too deep": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "nested more than 100 deep"),
    "nan": (b'{"a": NaN}', "NaN, which is not JSON"),
    "infinity": (b'{"a": [-Infinity]}', "-Infinity, which is not JSON"),
    "beyond float": (b'{"a": 1e999}', "the number '1e999' is beyond float64"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "a whole number of 5,000 digits"),
    "key twice": (b'{"size": 1, "b": 0, "size": 2}', "the key 'size' has two different values"),
    "nested twice": (b'[{"a": {"x": [1], "x": [2]}}]', "the key 'x' has two different values"),
    "latin 1": ('{"ä": 1}'.encode("latin-1"), "not UTF-8 at byte 2"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "UTF-16 or UTF-32, not UTF-8"),
    "utf-16 without mark": ('{"a": 1}'.encode("utf-16-be"), "UTF-16 or UTF-32, not UTF-8"),
    "utf-32": ('{"a": 1}'.encode("utf-32"), "UTF-16 or UTF-32, not UTF-8"),
    "surrogate": (rb'{"a": "\ud83d"}', "half of a surrogate pair"),
    "surrogate key": (rb'{"\uDC00": 1}', "half of a surrogate pair"),
    "list": (b"[]", "a list where an object belongs"),
    "null": (b"null", "null where an object belongs"),
    "string": (b'"{}"', "a string where an object belongs"),
    "large": (b'{"a": "' + b"x" * 2000 + b'"}', "larger than 1,000 bytes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_json_is_one_line(tmp_path, fault):
    content, reason = FAULTS[fault]
    path = tmp_path / "index.json"
    path.write_bytes(content)
    limit = {"max_bytes": 1000} if fault == "large" else {}
    with pytest.raises(UserError, match=re.escape(reason)) as error:
        read_json(path, what="an index", remedy="write it again", **limit)
    message = str(error.value)
    assert message.startswith(f"{path}: not an index (")
    assert message.endswith("); write it again")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 150


def test_strict_json_is_read(tmp_path):
    deepest = "[" * (MAX_JSON_DEPTH - 1) + "]" * (MAX_JSON_DEPTH - 1)
    text = f'{{"a": {deepest}, "b": 1000000000000000019884624838656, "c": "\\ud83d\\ude00", "d": 1, "d": 1}}'
    wanted = {"a": json.loads(deepest), "b": 1000000000000000019884624838656, "c": "\U0001f600", "d": 1}
    path = tmp_path / "a.json"
    for content in (text.encode(), text.encode("utf-8-sig")):
        path.write_bytes(content)
        assert read_json(path, what="a") == wanted
        assert parse_json(content, "a header", what="a") == wanted
    assert parse_json("\ufeff[1, 2.5]", "a list", what="a", kind=list) == [1, 2.5]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    places = {
        tmp_path / "pipe": "not a regular file",
        tmp_path: "Is a directory",
        tmp_path / "none.json": "No such file",
        tmp_path / "a\0b": "null",
        "/dev/zero": "not a regular file",
    }
    for path, reason in places.items():
        with pytest.raises(UserError, match=reason) as error:
            read_json(path, what="an index")
        assert "\n" not in str(error.value)


def test_a_message_is_one_line_whatever_it_names():
    message = str(UserError("a\nb\r\n\u2028c: not read; " + "x" * 5000 + "; get it again"))
    assert message.startswith(r"a\nb\r\n\u2028c: not read; xxx")
    assert message.endswith("xxx; get it again")
    assert len(message) <= 1500
    assert len(first_line(ValueError("\n" + "y" * 5000))) == 200
