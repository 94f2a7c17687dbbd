"""Tokens as bytes, roles, and what is refused."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from tokenizers import processors

from tokens import trained
from tokens.texts import DECOMPOSED, FEW, PIECES, texts
from xtoken_jax.alignment.locate import locate
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
    assert three.roles == {"bos": 0, "eos": 1, "turn_end": 1}
    assert three.adds_bos
    assert sentencepiece.roles == {"bos": 1, "eos": 2, "unk": 0, "document_start": 1, "document_end": 2}
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
    vocab = trained.definition(tokenizer)["model"]["vocab"]
    assert tokenizer.bytes_of(vocab["▁▁▁"]) == b"   "
    assert tokenizer.bytes_of(vocab["[mask]"]) == b"[mask]"
    assert tokenizer.bytes_of(vocab["<0xE6>"]) == b"\xe6"
    letter = tokenizer.bytes_of(vocab["a"])
    assert tokenizer.bytes_of(vocab["<0x61>"]) == letter == b"a"
    assert vocab["<0x61>"] in tokenizer.token_bytes.shadowed
    assert tokenizer.token_bytes.ids_by_bytes()[b"a"] == vocab["a"]
    assert "<" not in vocab
    assert tokenizer.token_bytes.ids_by_bytes()[b"<"] == vocab["<0x3C>"]


def test_words_that_each_get_a_blank_prove_nothing():
    """As T5: what WhitespaceSplit takes off and Metaspace puts in front can add up to the same length."""

    def edit(definition):
        blank = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
        parts = [{"type": "WhitespaceSplit"}, blank]
        definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
        definition["normalizer"] = None

    tokenizer = trained.edited(trained.sentencepiece, edit)
    assert tokenizer.token_bytes.length_proves == "none"
    located = locate(tokenizer, ["the  cat", " the cat"])
    assert tokenizer.token_bytes.join(located.ids[: located.offsets[1]]) == b" the cat"
    assert located.plain.tolist() == [False, True]


def add_word(definition, token_id=None):
    definition["added_tokens"].append(
        {"id": len(definition["model"]["vocab"]) if token_id is None else token_id, "content": "<tool>",
         "special": False, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    )  # fmt: skip


def with_added(token_id):
    return trained.edited(trained.single_digits, lambda definition: add_word(definition, token_id))


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


def test_a_role_is_part_of_the_file_fingerprint_alone(tmp_path):
    tokenizer, config = trained.three_digits()
    trained.save(tmp_path / "a", tokenizer, config)
    trained.save(tmp_path / "b", tokenizer, {"bos_token": "<|begin|>"})
    one, other = Tokenizer.load(tmp_path / "a"), Tokenizer.load(tmp_path / "b")
    assert one.file_fingerprint != other.file_fingerprint
    assert one.fingerprint == other.fingerprint


def word_pieces(*, lowercase=True):
    """As BERT: pieces inside a word start with `##`, blanks are forgotten."""
    tokenizer = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
    tokenizer.train_from_iterator(trained.ENGLISH, vocab_size=400, show_progress=False)
    return tokenizer._tokenizer, {"unk_token": "[UNK]", "cls_token": "[CLS]"}


def test_word_pieces_open_behind_a_blank():
    tokenizer = trained.load(word_pieces)
    assert tokenizer.token_bytes.kind == "wordpiece"
    ids = tokenizer.encode("the cats, 201 of them")
    pieces = [tokenizer.bytes_of(i) for i in ids]
    assert b"".join(pieces) == b" the cats, 201 of them"
    assert pieces[0] == b" the"
    assert b"," in pieces
    vocab = trained.definition(tokenizer)["model"]["vocab"]
    inside = next(piece for piece in vocab if piece.startswith("##") and piece[2:].isalpha())
    assert tokenizer.bytes_of(vocab[inside]) == inside[2:].encode()
    assert tokenizer.bytes_of(vocab["[UNK]"]) is None
    assert "WordPiece" in tokenizer.describe()


def test_tokenizers_without_bytes_are_refused(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="WordLevel tokenizer without a byte alphabet") as error:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_markers_take_roles_and_reserved_ids_are_known():
    tokenizer = trained.edited(
        trained.single_digits,
        lambda definition: [
            definition["added_tokens"].append(
                {"id": len(definition["model"]["vocab"]) + i, "content": content, "special": special,
                 "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
            )
            for i, (content, special) in enumerate(
                [("<|im_start|>", True), ("<think>", False), ("<unused0>", False), ("<|reserved_7|>", True)]
            )
        ],
    )  # fmt: skip
    first = tokenizer.size - 4
    assert tokenizer.roles["turn_start"] == first
    assert tokenizer.roles["think_open"] == first + 1
    assert tokenizer.bytes_of(first) is None
    assert tokenizer.bytes_of(first + 1) == b"<think>"
    assert tokenizer.token_bytes.unused == {first + 2, first + 3}
    assert b"<unused0>" not in tokenizer.token_bytes.ids_by_bytes()
    assert tokenizer.encode("a<unused0>").tolist()[-1] == first + 2
    line = tokenizer.describe()
    for words in ("byte-level BPE", f"{tokenizer.size:,} ids", "EOS 0", "think_open", "2 reserved"):
        assert words in line
    # Words of the vocabulary that are no added tokens never take a role.
    assert set(trained.load(trained.single_digits).roles) == {"eos", "turn_end"}


def test_the_tokenizer_that_transformers_would_rebuild_is_told_apart(tmp_path, monkeypatch):
    """GPT2Tokenizer puts its own pre-tokenizer in place of one that cuts numbers by threes."""
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    tokenizer, _ = trained.three_digits()
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    trained.save(tmp_path / "told", tokenizer, {**config, "tokenizer_class": "GPT2Tokenizer"})
    told = Tokenizer.load(tmp_path / "told")
    assert "AutoTokenizer (tokenizer_class 'GPT2Tokenizer') gives other ids" in told.warning
    assert told.encode("1234567").tolist() == trained.load(trained.three_digits).encode("1234567").tolist()
    trained.save(tmp_path / "kept", tokenizer, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})
    assert Tokenizer.load(tmp_path / "kept").warning is None
    # Compared once: the second answer is read.
    (answer,) = [p for p in (tmp_path / "cache" / "auto_tokenizer").iterdir() if "null" not in p.read_text()]
    answer.write_text('{"difference": "as kept"}')
    assert Tokenizer.load(tmp_path / "told").warning == "as kept"
    assert Tokenizer.load(tmp_path / "told", compare_auto=False).warning is None


@pytest.mark.parametrize(
    ("make", "proves"),
    [
        (trained.single_digits, "any"),
        (trained.composing, "ascii"),
        (trained.sentencepiece, "any"),
        (word_pieces, "none"),
    ],
)
def test_what_the_length_of_the_bytes_proves(make, proves):
    assert trained.load(make).token_bytes.length_proves == proves
    if make is trained.sentencepiece:  # an added token parts a text in two, and each gets its blank
        assert trained.edited(make, add_word).token_bytes.length_proves == "none"
    lowering = trained.edited(make, lambda d: d.update(normalizer={"type": "Lowercase"}))
    assert lowering.token_bytes.length_proves == "none"


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


def test_a_broken_model_config_beside_it_does_not_matter(tmp_path):
    trained.save(tmp_path, trained.single_digits()[0], {"eos_token": "<|end|>"})
    (tmp_path / "config.json").write_bytes(b"\xff{")
    assert Tokenizer.load(tmp_path).warning is None  # loading the model says what is wrong


def test_a_chat_template_that_is_no_text(tmp_path):
    trained.save(tmp_path, *trained.single_digits())
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja: cannot be read as a chat template"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize(("setting", "adds"), [(True, True), (False, False), (None, True), ("absent", True)])
def test_whether_a_text_opens_with_bos_is_as_configured(tmp_path, setting, adds):
    """The post-processor of these adds BOS; where the configuration says something it decides."""
    tokenizer, config = trained.three_digits()
    config = config if setting == "absent" else {**config, "add_bos_token": setting}
    trained.save(tmp_path, tokenizer, config)
    assert Tokenizer.load(tmp_path).adds_bos == adds
    # DeepSeek: BOS by configuration alone. Without a BOS there is none to add.
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trained.save(tmp_path, tokenizer, config)
    assert Tokenizer.load(tmp_path).adds_bos == (setting is True)
    trained.save(tmp_path, tokenizer, {"add_bos_token": True})
    assert not Tokenizer.load(tmp_path).adds_bos


def test_the_tokenizers_own_configuration_decides_roles(tmp_path):
    trained.save(tmp_path, trained.three_digits()[0], {"eos_token": "<|end|>"})
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<|begin|>", "pad_token": "."})
    )
    loaded = Tokenizer.load(tmp_path)
    assert loaded.roles["eos"] == 1
    assert loaded.bytes_of(loaded.roles["pad"]) == b"."
