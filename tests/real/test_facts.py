"""Figures of the method and of these tokenizers, on the real files."""

import functools
import os
import subprocess
import sys

import numpy as np
import pytest
from real_tokenizers import FOLDER, NAMES, load, pair
from touched import DROPPED

from xtoken_jax.alignment.locate import locate
from xtoken_jax.coverage.audit import audit
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.files import load_projection, save_projection


@functools.cache
def projection(teacher):
    return build_projection(pair("llama3_1", teacher))


@pytest.mark.parametrize(
    ("name", "size", "text", "ids"),
    [
        ("llama3_1", 128256, "Hello world", [9906, 1917]),
        ("qwen3", 151669, "Hello world", [9707, 1879]),
        ("gemma3", 262145, "Hello world", [9259, 1902]),
        ("gptoss", 200019, "Hello world", [13225, 2375]),
        ("gpt4o", 200019, "Hello world", [13225, 2375]),
        ("deepseek_v3", 128815, "Hello world", [19923, 2058]),
        ("llama2", 32000, "Hello world", [22557, 1526]),  # as Mistral 7B, whatever its package says
        ("claude", 65000, "Hello world", [10002, 2253]),
        ("bert", 30522, "hello world", [7592, 2088]),
        ("smollm2", 49152, "Gravity is 9", [22007, 6463, 314, 216, 41]),
    ],
)
def test_sizes_and_known_ids(name, size, text, ids):
    assert (load(name).size, load(name).encode(text).tolist()) == (size, ids)


@pytest.mark.parametrize(
    ("teacher", "rows"), [("qwen3", 109_566), ("gptoss", 103_245), ("gpt4o", 103_245), ("gemma3", 86_434)]
)
def test_rows_of_equal_bytes(teacher, rows):
    student = load("llama3_1")
    W = projection(teacher)
    target = np.asarray(W.indices)[:, 0]
    single = (np.asarray(W.weights)[:, 0] == 1) & (np.asarray(W.indices)[:, 1] < 0)
    contents = [student.bytes_of(i) for i in range(student.size)]
    equal = [
        single[i] and content is not None and content == load(teacher).bytes_of(int(target[i]))
        for i, content in enumerate(contents)
    ]
    assert sum(equal) == rows


@pytest.mark.parametrize(
    ("teacher", "spaces", "newlines"),
    [
        ("qwen3", 109_566, 109_566),
        ("gptoss", 103_245, 103_245),
        ("gpt4o", 103_245, 103_245),
        ("gemma3", 65_197, 65_210),
    ],
)
def test_vocabularies_compared_as_strings(teacher, spaces, newlines):
    """With space markers unified, and newline markers too.

    Between byte-level vocabularies that is equality of bytes. Against SentencePiece's it misses what is not
    ASCII: byte-level BPE writes é as two other characters. Of the 86,434 tokens that Gemma 3 has with the
    same bytes, 65,077 are ASCII.
    """

    def strings(name, replace):
        return {
            functools.reduce(lambda s, r: s.replace(*r), replace, s) for s in load(name).backend.get_vocab()
        }

    unify = [("Ġ", " "), ("▁", " "), ("Ċ", "\n")]
    for count, replace in ((spaces, unify[:2]), (newlines, unify)):
        assert len(strings("llama3_1", replace) & strings(teacher, replace)) == count


@pytest.mark.parametrize("teacher", ["qwen3", "gemma3"])
def test_the_row_of_a_split_numeral(teacher):
    W = projection(teacher)
    (row,) = load("llama3_1").encode("201")
    pieces = [load(teacher).bytes_of(int(i)) for i in W.indices[row][:3]]
    assert pieces == [b"2", b"0", b"1"]
    assert W.indices[row][3] == -1
    np.testing.assert_allclose(W.weights[row], [0.9009009, 0.0900901, 0.0090090, 0], atol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "loss", "two", "three"),
    [
        ("qwen3", "p_kl", 0, 0),
        ("gemma3", "p_kl", 0, 0),
        ("gptoss", "h_kl", 100, 1000),
        ("gpt4o", "h_kl", 100, 1000),
    ],
)
def test_the_audit_of_a_llama_student(teacher, loss, two, three):
    found = audit(pair("llama3_1", teacher), projection(teacher))
    classes = {c.name: (c.common, c.size) for c in found.classes}
    assert found.recommended_loss == loss
    assert classes["2-digit numerals"] == (two, 100)
    assert classes["3-digit numerals"] == (three, 1000)
    common, size = classes["ASCII punctuation"]
    assert common == size > 0


def test_two_builds_of_w_are_the_same_file(tmp_path):
    """Also in another process, where Python hashes strings otherwise."""
    tokenizers = pair("llama3_1", "qwen3")
    save_projection(tmp_path / "one", projection("qwen3"), tokenizers)
    code = (
        "import sys\n"
        "from xtoken_jax.projection.build import build_projection\n"
        "from xtoken_jax.projection.files import save_projection\n"
        "from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair\n"
        "pair = TokenizerPair(*(Tokenizer.load(p, compare_auto=False) for p in sys.argv[1:3]))\n"
        "save_projection(sys.argv[3], build_projection(pair), pair)\n"
    )
    words = [str(FOLDER / "llama3_1"), str(FOLDER / "qwen3"), str(tmp_path / "two")]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, *words], check=True, env=environment)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    again = load_projection(tmp_path / "two", tokenizers)
    np.testing.assert_array_equal(again.indices, projection("qwen3").indices)


def test_smollm2_has_no_token_for_some_bytes():
    """It leaves them out without a word; every other tokenizer of byte strings has all 256."""
    for name in NAMES:
        single = {load(name).bytes_of(i) for i in range(load(name).size)}
        absent = {b for b in range(256) if bytes([b]) not in single}
        if name == "smollm2":
            never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # not in UTF-8
            assert absent == {*DROPPED} | never
        elif name != "bert":
            assert not absent, name
    text = "a\x04b\x14c"
    assert load("smollm2").decode(load("smollm2").encode(text)) == "abc"
    assert not locate(load("smollm2"), [text]).plain[0]


def test_wordpiece_spells_lower_case_words_behind_single_blanks():
    """Its first word has no blank in front, and counts as written otherwise."""
    located = locate(load("bert"), ["the cat sat on the mat"])
    assert located.faithful.tolist() == [False] + [True] * 5
