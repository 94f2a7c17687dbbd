"""The two-pass W of real tokenizers."""

import numpy as np
import pytest
from reference import projection as reference
from tokens import trained

from xtoken_jax.projection.build import build_projection, tokenize_bytes
from xtoken_jax.tokens.token_bytes import byte_alphabet
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

MAKES = [trained.single_digits, trained.three_digits, trained.composing, trained.sentencepiece]
PAIRS = [(s, t) for s in MAKES for t in MAKES if s is not t]
NAMES = [f"{s.__name__}-{t.__name__}" for s, t in PAIRS]


def row(projection, token_id):
    kept = projection.indices[token_id] >= 0
    return projection.indices[token_id][kept].tolist(), projection.weights[token_id][kept].tolist()


def twin_retokenize(tokenizer):
    """The tokenizer where it gives the bytes back, else its merges over the bytes."""
    alphabet = byte_alphabet()
    byte_level = tokenizer.token_bytes.kind == "byte_level"

    def spelled(piece):
        return bytes(alphabet[c] for c in piece) if byte_level else piece.replace("▁", " ").encode()

    merges = [tuple(map(spelled, merge)) for merge in tokenizer.definition["model"]["merges"]]
    written = [
        (content, i)
        for i, content in enumerate(tokenizer.token_bytes.table)
        if content and i not in tokenizer.token_bytes.shadowed
    ]
    ids = {content: min(i for other, i in written if other == content) for content, _ in written}

    def retokenize(content):
        try:
            found = tokenizer.encode(content.decode()).tolist()
        except UnicodeDecodeError:
            found = []
        if b"".join(tokenizer.bytes_of(i) or b"" for i in found) == content:
            return found
        units = [content[i : i + 1] for i in range(len(content))]
        if not byte_level:  # characters that have a piece, else their bytes
            parts = reference.characters(content)
            units = [u for c in parts for u in ([c] if c in ids else [bytes([b]) for b in c])]
        return [ids[part] for part in reference.merge(units, merges)]

    return retokenize


@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=NAMES)
def test_rows_are_stochastic_and_sorted(student, teacher):
    pair = trained.pair(student, teacher)
    projection = build_projection(pair)
    indices, weights = projection.indices, projection.weights
    assert indices.shape == weights.shape == (pair.student.size, 4)
    assert (indices.dtype, weights.dtype) == (np.int32, np.float32)
    sums = weights.astype(np.float64).sum(1)
    filled = indices[:, 0] >= 0
    np.testing.assert_allclose(sums[filled], 1.0, atol=1e-6)
    assert np.all(sums[~filled] == 0)
    assert np.array_equal(indices >= 0, weights > 0)
    assert np.all(np.diff(weights, axis=1) <= 0)
    assert np.all(indices < pair.teacher.size)
    for i in range(pair.student.size):
        assert len(set(row(projection, i)[0])) == len(row(projection, i)[0])


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (trained.three_digits, trained.single_digits),
        (trained.sentencepiece, trained.single_digits),
        (trained.three_digits, trained.sentencepiece),
    ],
)
def test_equals_the_twin(student, teacher):
    pair = trained.pair(student, teacher)
    projection = build_projection(pair)
    tables = [
        [None if i in t.token_bytes.shadowed else content for i, content in enumerate(t.token_bytes.table)]
        for t in (pair.student, pair.teacher)
    ]
    rows = reference.two_pass(*tables, pair.student.roles, pair.teacher.roles, twin_retokenize(pair.teacher))
    for i, expected in enumerate(rows):
        ids, weights = row(projection, i)
        order = sorted(expected, key=lambda j: -expected[j])
        assert ids == order, (i, tables[0][i])
        np.testing.assert_allclose(weights, [expected[j] for j in order], rtol=1e-6)
    inexact = sum(len(r) > 1 for r in rows)
    assert inexact > 20


def test_numbers():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    projection = build_projection(pair)
    vocab = pair.student.definition["model"]["vocab"]

    def of(number):
        ids, weights = row(projection, vocab[number])
        return [pair.teacher.bytes_of(i).decode() for i in ids], weights

    digits, weights = of("201")
    assert digits == ["2", "0", "1"]
    np.testing.assert_allclose(weights, [0.9009, 0.0901, 0.0090], atol=5e-5)
    assert of("222") == (["2"], [1.0])
    assert of("7") == (["7"], [1.0])
    digits, weights = of("212")  # the repeated piece adds up
    assert digits == ["2", "1"]
    np.testing.assert_allclose(weights, [0.909 / 0.999, 0.09 / 0.999], rtol=1e-6)
    digits, weights = of("211")
    np.testing.assert_allclose(weights, [0.9 / 0.999, 0.099 / 0.999], rtol=1e-6)


def test_only_the_first_pieces_count():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    token = pair.student.definition["model"]["vocab"]["201"]
    two = build_projection(pair, entries=2)
    assert two.indices.shape[1] == 2
    np.testing.assert_allclose(two.weights[token], [0.9 / 0.99, 0.09 / 0.99], rtol=1e-6)


def add_piece(piece, *, special=False):
    """A tokenizer with one more token that spells the same as one it has."""

    def edit(definition):
        vocab = definition["model"]["vocab"]
        definition["added_tokens"].append(
            {"id": len(vocab), "content": piece, "special": special, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}
        )  # fmt: skip

    return edit


def test_a_tie_goes_to_the_lowest_id():
    """A written blank is the byte-level token `Ġ` and, added as it reads, a second token."""
    teacher = trained.edited(trained.single_digits, add_piece(" "))
    blanks = [i for i in range(teacher.size) if teacher.bytes_of(i) == b" "]
    assert len(blanks) == 2
    student = trained.load(trained.three_digits)
    pair = TokenizerPair(student, teacher)
    (blank,) = (i for i in range(student.size) if student.bytes_of(i) == b" ")
    assert row(build_projection(pair), blank) == ([min(blanks)], [1.0])


def test_a_character_goes_to_its_piece_and_not_to_the_byte_it_shadows():
    pair = trained.pair(trained.single_digits, trained.sentencepiece)
    vocab = pair.teacher.definition["model"]["vocab"]
    projection = build_projection(pair)
    for character in "at,.":
        (token,) = (i for i in range(pair.student.size) if pair.student.bytes_of(i) == character.encode())
        assert vocab[f"<0x{ord(character):02X}>"] < vocab[character]
        assert row(projection, token) == ([vocab[character]], [1.0])
    (token,) = (i for i in range(pair.student.size) if pair.student.bytes_of(i) == b"<")
    assert row(projection, token) == ([vocab["<0x3C>"]], [1.0])
    # The other way round the shadowed bytes stay empty, and the characters keep their partner.
    backward = build_projection(trained.pair(trained.sentencepiece, trained.single_digits))
    assert row(backward, vocab["<0x61>"]) == ([], [])
    assert pair.student.bytes_of(row(backward, vocab["a"])[0][0]) == b"a"


def test_bytes_that_are_not_text_go_through_the_merges():
    student, teacher = trained.load(trained.composing), trained.load(trained.single_digits)
    halves = [b"\xe6", b"\xe6\x97", b"\x97\xa5\xe6", b"\xf0\x9f\x91", b"\xff\xfe", b"a\xcc"]
    for content, ids in zip(halves, tokenize_bytes(teacher, halves), strict=True):
        assert teacher.token_bytes.join(np.asarray(ids)) == content
        assert ids == twin_retokenize(teacher)(content)
    # Every byte of the student's is a byte of the teacher's.
    projection = build_projection(trained.pair(trained.composing, trained.single_digits))
    for i in range(student.size):
        if student.bytes_of(i) is not None:
            assert row(projection, i)[0]


def test_a_tokenizer_that_composes_still_maps_decomposed_bytes():
    """é written as two characters is not what its tokenizer gives back, so its merges are used."""
    teacher = trained.load(trained.composing)
    (ids,) = tokenize_bytes(teacher, ["e\u0301".encode()])
    assert teacher.token_bytes.join(np.asarray(ids)) == "e\u0301".encode()


def test_roles_map_to_roles():
    pair = trained.pair(trained.three_digits, trained.sentencepiece)
    projection = build_projection(pair)
    for role in ("bos", "eos"):
        assert row(projection, pair.student.roles[role]) == ([pair.teacher.roles[role]], [1.0])
    # No role on the other side: the row is empty.
    lone = trained.pair(trained.three_digits, trained.single_digits)
    projection = build_projection(lone)
    assert row(projection, lone.student.roles["bos"]) == ([], [])
    assert row(projection, lone.student.roles["eos"]) == ([lone.teacher.roles["eos"]], [1.0])


def test_text_in_a_role_stays_text(tmp_path):
    """A folder may name an ordinary token as its EOS; the student still writes it as text."""
    trained.save(tmp_path, trained.three_digits()[0], {"eos_token": "."})
    pair = TokenizerPair(Tokenizer.load(tmp_path), trained.load(trained.single_digits))
    ids, weights = row(build_projection(pair), pair.student.roles["eos"])
    assert [pair.teacher.bytes_of(i) for i in ids] == [b"."]
    assert weights == [1.0]


def test_a_special_token_does_not_match_text_that_spells_it():
    teacher = trained.edited(trained.single_digits, add_piece("<|begin|>"))
    student = trained.load(trained.three_digits)
    pair = TokenizerPair(student, teacher)
    assert row(build_projection(pair), student.roles["bos"]) == ([], [])
