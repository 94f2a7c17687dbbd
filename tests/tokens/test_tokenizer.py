"""Tokens as bytes, roles, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given

from tokens import trained
from tokens.texts import DECOMPOSED, FEW, PIECES, texts
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.token_bytes import byte_alphabet
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair


def test_byte_alphabet_is_that_of_the_tokenizers_library():
    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # These lead with, or hold, every byte that UTF-8 has.
    everything = (
        "".join(map(chr, [*range(0x800), *range(0x800, 0x110000, 0x200)])).encode(errors="ignore").decode()
    )
    assert len(set(everything.encode())) == 256 - 2 - 11
    ((written, _),) = split.pre_tokenize_str(everything)
    assert bytes(alphabet[c] for c in written) == everything.encode()
    assert sorted(alphabet.values()) == list(range(256))


@FEW
@given(texts(PIECES + DECOMPOSED))
@pytest.mark.parametrize("make", [trained.single_digits, trained.three_digits])
def test_byte_level_tokens_spell_the_text(make, text):
    tokenizer = trained.load(make)
    ids = tokenizer.encode(text)
    assert tokenizer.token_bytes.join(ids) == text.encode()
    assert tokenizer.decode(ids) == text
    lengths = [len(tokenizer.bytes_of(i)) for i in ids.tolist()]
    assert tokenizer.token_bytes.lengths[ids].tolist() == lengths


@FEW
@given(texts())
def test_sentencepiece_tokens_spell_the_text_behind_one_blank(text):
    tokenizer = trained.load(trained.sentencepiece)
    spelled = tokenizer.token_bytes.join(tokenizer.encode(text))
    assert spelled == (b" " + text.replace("▁", " ").encode() if text else b"")


@pytest.mark.parametrize("make", [trained.three_digits, trained.sentencepiece])
def test_special_tokens_are_roles_and_their_spelling_is_text(make):
    tokenizer = trained.load(make)
    special = set(tokenizer.roles.values())
    assert special == tokenizer.token_bytes.special
    for token_id in special:
        assert tokenizer.bytes_of(token_id) is None
        spelling = tokenizer.backend.id_to_token(token_id)
        ids = tokenizer.encode(f"a{spelling}b {spelling}")
        assert not special & set(ids.tolist())
        assert tokenizer.decode(ids).strip() == f"a{spelling}b {spelling}"


def test_roles():
    three, sentencepiece = trained.load(trained.three_digits), trained.load(trained.sentencepiece)
    assert three.roles == {"bos": 0, "eos": 1}
    assert three.adds_bos
    assert sentencepiece.roles == {"bos": 1, "eos": 2, "unk": 0}
    assert sentencepiece.adds_bos
    assert not trained.load(trained.single_digits).adds_bos
    assert three.pad_id == 1


def test_pieces_of_sentencepiece():
    """`<0x41>` is a byte and gives way to the piece `A`; blanks listed as added tokens stay blanks."""

    def edit(definition):
        vocab = definition["model"]["vocab"]
        vocab["▁▁▁"] = len(vocab)
        vocab["[mask]"] = len(vocab)
        for content in ("▁▁▁", "[mask]"):
            definition["added_tokens"].append(
                {"id": vocab[content], "content": content, "special": False, "normalized": False,
                 "single_word": False, "lstrip": False, "rstrip": False}
            )  # fmt: skip

    tokenizer = trained.edited(trained.sentencepiece, edit)
    vocab = tokenizer.definition["model"]["vocab"]
    assert tokenizer.bytes_of(vocab["▁▁▁"]) == b"   "
    assert tokenizer.bytes_of(vocab["[mask]"]) == b"[mask]"
    assert tokenizer.bytes_of(vocab["<0xE6>"]) == b"\xe6"
    letter = tokenizer.bytes_of(vocab["a"])
    assert tokenizer.bytes_of(vocab["<0x61>"]) == letter == b"a"
    assert vocab["<0x61>"] in tokenizer.token_bytes.shadowed
    assert tokenizer.token_bytes.ids_by_bytes()[b"a"] == vocab["a"]
    assert "<" not in vocab
    assert tokenizer.token_bytes.ids_by_bytes()[b"<"] == vocab["<0x3C>"]


def with_added(token_id):
    def edit(definition):
        definition["added_tokens"].append(
            {"id": token_id, "content": "<tool>", "special": False, "normalized": False,
             "single_word": False, "lstrip": False, "rstrip": False}
        )  # fmt: skip

    return trained.edited(trained.single_digits, edit)


def test_ids_of_added_tokens_count():
    plain = trained.load(trained.single_digits)
    more = with_added(plain.size)
    assert more.size == plain.size + 1
    assert more.bytes_of(plain.size) == b"<tool>"
    assert more.encode("a<tool>").tolist()[-1] == plain.size
    assert more.fingerprint != plain.fingerprint


def test_ids_that_change_when_loaded_are_refused():
    """The library gives an added token the next free id, whatever the file says."""
    with pytest.raises(UserError, match="'<tool>' has id 700 in the file but 410"):
        with_added(700)


def test_fingerprints_tell_tokenizers_apart():
    one, two = (trained.edited(trained.single_digits, lambda _: None) for _ in range(2))
    assert one.fingerprint == two.fingerprint
    assert one.fingerprint == two.fingerprint
    other = trained.pair(trained.single_digits, trained.composing)
    assert other.student.fingerprint != other.teacher.fingerprint

    def swap(definition):
        vocab = definition["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    assert trained.edited(trained.single_digits, swap).fingerprint != one.fingerprint


def test_a_role_is_part_of_the_fingerprint(tmp_path):
    tokenizer, config = trained.three_digits()
    trained.save(tmp_path / "a", tokenizer, config)
    trained.save(tmp_path / "b", tokenizer, {"bos_token": "<|begin|>"})
    assert Tokenizer.load(tmp_path / "a").fingerprint != Tokenizer.load(tmp_path / "b").fingerprint


def test_word_pieces_are_refused(tmp_path):
    tokenizer = tokenizers.BertWordPieceTokenizer()
    tokenizer.train_from_iterator(trained.ENGLISH, vocab_size=200, show_progress=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="WordPiece tokenizer without a byte alphabet") as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b'"BPE"', b"\xff\xfe", b'{"model": {"type": "BPE"}}'],
    ids=["empty", "cut", "object", "list", "string", "not-utf8", "no-vocabulary"],
)
def test_broken_tokenizer_json(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_truncated_tokenizer_json(tmp_path):
    tokenizer, config = trained.single_digits()
    trained.save(tmp_path, tokenizer, config)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        TokenizerPair.load(tmp_path / "nowhere", tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_broken_tokenizer_config(tmp_path, content):
    trained.save(tmp_path, *trained.single_digits())
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_a_folders_own_padding_and_truncation_are_off(tmp_path):
    tokenizer, config = trained.single_digits()
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    trained.save(tmp_path, tokenizer, config)
    plain = trained.load(trained.single_digits)
    text = "the cat sat on the mat"
    np.testing.assert_array_equal(Tokenizer.load(tmp_path).encode(text), plain.encode(text))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["padding"] is not None
