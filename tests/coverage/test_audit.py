"""Coverage by class of token, and the loss that follows."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from tokens import trained

import xtoken_jax
from xtoken_jax.errors import UserError
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.matrix import Partition, Projection
from xtoken_jax.tokens.token_bytes import byte_alphabet
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair


def other_three_digits():
    """Keeps numerals whole as the student does, and knows fewer words."""
    return trained.byte_level(r"\p{N}{1,3}", 1450, ["<|end|>"], numerals=True), {"eos_token": "<|end|>"}


def classes(audit):
    """Those with tokens."""
    return {c.name: (c.size, c.common) for c in audit.classes if c.size}


def test_a_teacher_that_splits_numbers_calls_for_p_kl():
    pair = trained.pair(trained.three_digits, trained.single_digits)
    audit = xtoken_jax.audit(pair)
    assert audit.recommended_loss == "p_kl"
    found = classes(audit)
    assert found["1-digit numerals"] == (10, 10)
    assert found["2-digit numerals"] == (100, 0)
    assert found["3-digit numerals"] == (1000, 0)
    assert "2-digit numerals (0 of 100 common)" in audit.reason
    assert "3-digit numerals (0 of 1000 common)" in audit.reason
    assert sum(size for size, _ in found.values()) == pair.student.size
    assert audit.empty_rows == 1  # the student's BOS has no counterpart


def test_a_teacher_that_keeps_numbers_calls_for_h_kl():
    audit = xtoken_jax.audit(trained.pair(trained.three_digits, other_three_digits))
    assert audit.recommended_loss == "h_kl"
    found = classes(audit)
    assert found["2-digit numerals"] == (100, 100)
    assert found["3-digit numerals"] == (1000, 1000)
    assert found["words with leading space"][1] < found["words with leading space"][0]


def test_a_student_without_numerals_has_nothing_to_lose_there():
    audit = xtoken_jax.audit(trained.pair(trained.single_digits, trained.three_digits))
    assert "3-digit numerals" not in classes(audit)
    assert next(c for c in audit.classes if c.name == "3-digit numerals").coverage == 1.0
    assert audit.recommended_loss == "h_kl"
    assert "the student has no 2-digit numerals or 3-digit numerals, so nothing is lost there" in audit.reason


def test_bytes_behind_a_piece_are_not_counted_beside_it():
    """SentencePiece has `.` and `<0x2E>`; half of the punctuation would seem to be missing."""
    audit = xtoken_jax.audit(trained.pair(trained.sentencepiece, trained.single_digits))
    found = classes(audit)
    assert found["1-digit numerals"] == (11, 10)  # with ` 1`, which the teacher splits
    shadowed = trained.load(trained.sentencepiece).token_bytes.shadowed
    assert found["bytes behind a token"] == (len(shadowed), 0)
    assert sum(size for size, _ in found.values()) == trained.load(trained.sentencepiece).size


def handmade(tmp_path, merges):
    """Byte-level BPE with the 256 bytes, these merges and one special token, without training."""
    vocab = {character: i for i, character in enumerate(sorted(byte_alphabet()))}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    trained.save(tmp_path, tokenizer, {"eos_token": "<eos>"})
    return Tokenizer.load(tmp_path)


STUDENT_MERGES = [
    ("1", "2"), ("12", "3"), ("123", "4"), ("4", "5"),
    ("a", "b"), ("Ġ", "ab"), ("!", "!"), ("Ġ", "("), ("Ċ", "Ċ"), ("x", "1"), ("Ã", "©"),
]  # fmt: skip
TEACHER_MERGES = [("1", "2"), ("a", "b"), ("!", "!"), ("Ċ", "Ċ"), ("Ã", "©")]


@pytest.fixture
def pair(tmp_path):
    return TokenizerPair(handmade(tmp_path / "s", STUDENT_MERGES), handmade(tmp_path / "t", TEACHER_MERGES))


def test_counts_by_hand(pair):
    audit = xtoken_jax.audit(pair)
    # The bytes alone: 10 digits, 32 marks, 52 letters, 6 ASCII blanks, 128 from 0x80 on.
    others = 128 - 10 - 32 - 52 - 6
    assert classes(audit) == {
        "1-digit numerals": (10, 10),
        "2-digit numerals": (2, 1),
        "3-digit numerals": (1, 0),
        "longer numerals": (1, 0),
        "ASCII punctuation": (33, 32),  # with " ("
        "punctuation runs": (1, 1),
        "words with leading space": (1, 0),
        "words": (53, 53),
        "code and mixed": (1, 0),  # "x1"
        "whitespace runs": (7, 7),
        "Latin with accents": (1, 1),
        "pieces of characters": (128, 128),
        "other": (others, others),
        "special: eos": (1, 1),
    }
    assert sum(c.size for c in audit.classes) == pair.student.size
    by_name = {c.name: c for c in audit.classes}
    (fallen,) = by_name["2-digit numerals"].missing
    assert (fallen.text, [text for text, _ in fallen.pieces]) == ("45", ["4", "5"])
    np.testing.assert_allclose([w for _, w in fallen.pieces], [1 / 1.1, 0.1 / 1.1], rtol=1e-6)
    assert by_name["2-digit numerals"].coverage == 0.5
    assert {c.name for c in audit.classes if c.critical} == {
        "2-digit numerals", "3-digit numerals", "ASCII punctuation",
    }  # fmt: skip
    assert audit.recommended_loss == "p_kl"
    assert "such as 45 → 4 0.91 + 5 0.09" in audit.reason


def test_the_relaxed_set_is_counted_too(pair):
    by_name = {c.name: c for c in xtoken_jax.audit(pair).classes}
    # `1234` and `123` both start with the teacher's `12`, which the student's own `12` keeps.
    assert by_name["longer numerals"].relaxed == by_name["3-digit numerals"].relaxed == 0
    assert by_name["2-digit numerals"].relaxed == 1
    # ` ab` is mostly a blank, `x1` mostly an x, which the student has as well.
    assert by_name["words with leading space"].relaxed == by_name["code and mixed"].relaxed == 0
    relaxed = Partition.relaxed(build_projection(pair)).common_student
    assert sum(c.relaxed for c in by_name.values()) == len(relaxed)


def test_a_share_of_another_pair_is_refused(pair):
    with pytest.raises(UserError, match="the projection has 1,511 rows, the student 268 tokens"):
        xtoken_jax.audit(pair, build_projection(trained.pair(trained.three_digits, trained.single_digits)))
    with pytest.raises(UserError, match=r"minimum_coverage=1.5: must be between 0 and 1"):
        xtoken_jax.audit(pair, minimum_coverage=1.5)


@pytest.mark.parametrize(("minimum", "loss"), [(0.5, "h_kl"), (0.500001, "p_kl")])
def test_the_threshold_is_inclusive(tmp_path, minimum, loss):
    merges = [m for m in STUDENT_MERGES if m[0] not in ("12", "123")]
    pair = TokenizerPair(handmade(tmp_path / "s", merges), handmade(tmp_path / "t", TEACHER_MERGES))
    audit = xtoken_jax.audit(pair, build_projection(pair), minimum_coverage=minimum)
    assert classes(audit)["2-digit numerals"] == (2, 1)
    assert audit.recommended_loss == loss


def test_named_tokens_decide(tmp_path):
    merges = [m for m in STUDENT_MERGES if m[0] not in ("12", "123", "4")]
    pair = TokenizerPair(handmade(tmp_path / "s", merges), handmade(tmp_path / "t", TEACHER_MERGES))
    assert xtoken_jax.audit(pair).recommended_loss == "h_kl"
    audit = xtoken_jax.audit(pair, critical_tokens=["é", " ab"])
    assert (audit.named.size, audit.named.common, audit.named.critical) == (2, 1, True)
    assert audit.recommended_loss == "p_kl"
    assert "named by you (1 of 2 common)" in audit.reason
    # The class they belong to by themselves keeps them.
    assert classes(audit) == classes(xtoken_jax.audit(pair))
    # A text names its tokens: ` (`, `ab`, `x1`.
    audit = xtoken_jax.audit(pair, critical_text=" (abx1")
    assert (audit.named.size, audit.named.common) == (3, 1)
    assert xtoken_jax.audit(pair, critical_tokens=["<eos>"]).named.common == 1


def test_named_tokens_without_a_row_are_told():
    """BOS, which the teacher does not have: P-KL cannot teach it either."""
    audit = xtoken_jax.audit(
        trained.pair(trained.three_digits, trained.single_digits), critical_tokens=["<|begin|>"]
    )
    assert "named by you (0 of 1 common) fall out" in audit.reason
    assert "(1 of them have none, and no loss teaches these)" in audit.reason


def test_a_named_token_that_the_student_splits_is_refused(pair):
    with pytest.raises(UserError, match=r"critical token 'x12': .* reads 'x' \+ '12'"):
        xtoken_jax.audit(pair, critical_tokens=["12", "x12"])
    with pytest.raises(UserError, match=r"critical token '': .* reads nothing"):
        xtoken_jax.audit(pair, critical_tokens=[""])
    with pytest.raises(UserError, match="critical_text: holds no text"):
        xtoken_jax.audit(pair, critical_text="")


def test_what_a_text_loses_by_hand(pair):
    text = "1234 abx1é (ab ab"
    assert [pair.student.bytes_of(i).decode() for i in pair.student.encode(text)] == [
        "1234", " ab", "x1", "é", " (", "ab", " ab",
    ]  # fmt: skip
    audit = xtoken_jax.audit(pair, text=[text, ""], critical_tokens=["12", "ab"])
    whole, *parts = audit.sample
    assert (whole.tokens, whole.bytes) == (7, 18)
    # All but "é" and "ab" fall out, and none of them is in the relaxed set; every row has an entry.
    assert (whole.outside_strict, whole.outside_strict_bytes) == (5, 14)
    assert (whole.outside_relaxed, whole.outside_relaxed_bytes) == (5, 14)
    assert (whole.empty, whole.empty_bytes) == (0, 0)
    assert whole.frequent[0] == (" ab", 2)
    assert {p.name: (p.tokens, p.bytes, p.outside_strict) for p in parts} == {
        "longer numerals": (1, 4, 1),
        "ASCII punctuation": (1, 2, 1),
        "words with leading space": (2, 6, 2),
        "words": (1, 2, 0),
        "code and mixed": (1, 2, 1),
        "Latin with accents": (1, 2, 0),
        "named by you": (1, 2, 0),
    }
    assert "3-digit numerals (0 of 1 common, 0.0% of the text)" in audit.reason
    with pytest.raises(UserError, match="text: holds no text"):
        xtoken_jax.audit(pair, text="")


def test_empty_rows_of_a_text(pair):
    projection = build_projection(pair)
    indices, weights = np.array(projection.indices), np.array(projection.weights)
    gone = pair.student.encode("x1")
    indices[gone], weights[gone] = -1, 0
    audit = xtoken_jax.audit(pair, Projection(indices, weights, pair.teacher.size), text="x1ab")
    assert (audit.sample[0].empty, audit.sample[0].empty_bytes) == (1, 2)
    assert next(c for c in audit.classes if c.name == "code and mixed").empty == 1
    assert audit.empty_rows == 1


def test_json_round_trip(pair):
    audit = xtoken_jax.audit(pair, text="12 + 45", critical_tokens=["45"])
    found = json.loads(json.dumps(audit.to_dict()))
    assert found["recommended_loss"] == "p_kl"
    assert found["named"]["coverage"] == 0.0
    assert found["sample"][0]["name"] == "all"
    two = next(c for c in found["classes"] if c["name"] == "2-digit numerals")
    assert (two["coverage"], two["missing"][0]["text"]) == (0.5, "45")
    assert [piece for piece, _ in two["missing"][0]["pieces"]] == ["4", "5"]
