"""Coverage by class of token, and the loss that follows."""

import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from tokens import trained

import xtoken_jax
from xtoken_jax.projection.build import build_projection
from xtoken_jax.tokens.token_bytes import byte_alphabet
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair


def other_three_digits():
    """Keeps numerals whole as the student does, and knows fewer words."""
    return trained.byte_level(r"\p{N}{1,3}", 1450, ["<|end|>"], numerals=True), {"eos_token": "<|end|>"}


def classes(audit):
    return {c.name: (c.size, c.common) for c in audit.classes}


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
    assert classes(audit)["3-digit numerals"] == (0, 0)
    assert audit.recommended_loss == "h_kl"


def test_bytes_behind_a_piece_are_not_counted_beside_it():
    """SentencePiece has `.` and `<0x2E>`; half of the punctuation would seem to be missing."""
    audit = xtoken_jax.audit(trained.pair(trained.sentencepiece, trained.single_digits))
    assert classes(audit)["1-digit numerals"] == (10, 10)


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


def test_counts_by_hand(tmp_path):
    pair = TokenizerPair(handmade(tmp_path / "s", STUDENT_MERGES), handmade(tmp_path / "t", TEACHER_MERGES))
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
        "whitespace": (7, 7),
        "multi-byte text": (129, 129),
        "other": (others + 1, others),
        "special": (1, 1),
    }
    by_name = {c.name: c for c in audit.classes}
    assert by_name["2-digit numerals"].missing_examples == ("45",)
    assert by_name["2-digit numerals"].coverage == 0.5
    assert {c.name for c in audit.classes if c.critical} == {
        "2-digit numerals", "3-digit numerals", "ASCII punctuation",
    }  # fmt: skip
    assert audit.recommended_loss == "p_kl"
    assert json.loads(json.dumps(audit.to_dict()))["recommended_loss"] == "p_kl"


@pytest.mark.parametrize(("minimum", "loss"), [(0.5, "h_kl"), (0.500001, "p_kl")])
def test_the_threshold_is_inclusive(tmp_path, minimum, loss):
    merges = [m for m in STUDENT_MERGES if m[0] not in ("12", "123")]
    pair = TokenizerPair(handmade(tmp_path / "s", merges), handmade(tmp_path / "t", TEACHER_MERGES))
    audit = xtoken_jax.audit(pair, build_projection(pair), minimum_coverage=minimum)
    assert classes(audit)["2-digit numerals"] == (2, 1)
    assert audit.recommended_loss == loss
