"""Kinds of tokenizer.json that are rarer than Llama's and Qwen's: one small tokenizer each."""

import json
import string

import pytest
from alignment.test_alignment import aligned, check_invariants
from hypothesis import example, given
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from tokens import trained
from tokens.texts import DECOMPOSED, FEW, PIECES, texts
from xtoken_jax.data.sources import SourceConfig, read_sources
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

ALPHABET = pre_tokenizers.ByteLevel.alphabet()
SPECIAL = ["<unk>", "<s>", "</s>"]
CONFIG = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LETTERS = string.ascii_lowercase + "<>/|_.,é日"
METASPACE_DECODER = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def special(tokenizer):
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    return tokenizer, CONFIG


def unigram(*, fallback=256, scheme="always", split=True, normalizer=None):
    words = ["▁the", "▁cat", "at", "201", "the"]
    pieces = [(name, 0.0) for name in SPECIAL] + [(piece, -3.0) for piece in [*"▁", *LETTERS, *words]]
    pieces += [(f"<0x{byte:02X}>", -1.0) for byte in range(fallback)]
    tokenizer = Backend(models.Unigram(pieces, 0, byte_fallback=fallback > 0))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    tokenizer.decoder = METASPACE_DECODER
    return special(tokenizer)


def word_piece(prefix):
    vocab = [*SPECIAL, *LETTERS, "the", "cat"]
    if prefix:
        vocab += [prefix + letter for letter in LETTERS]
    tokenizer = Backend(
        models.WordPiece(
            {p: i for i, p in enumerate(vocab)}, unk_token="<unk>", continuing_subword_prefix=prefix
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix=prefix)
    return special(tokenizer)


def byte_level(normalizer=None, *, add_prefix_space=False, use_regex=True, added=(), **options):
    tokenizer = Backend(models.BPE(**options))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    affixes = {key: options[key] for key in options if key.endswith(("prefix", "suffix"))}
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=ALPHABET, show_progress=False, special_tokens=SPECIAL, **affixes
    )
    tokenizer.train_from_iterator(trained.ENGLISH, trainer)
    tokenizer.add_tokens([*added])
    return tokenizer, CONFIG


def clip():
    tokenizer, config = byte_level(end_of_word_suffix="</w>")
    splits = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    steps = [splits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    return tokenizer, config


def tag(**options):
    return [AddedToken("<tag>", **options)]


KINDS = {
    "unigram": unigram,
    "unigram without bytes": lambda: unigram(fallback=0),
    "unigram with some bytes": lambda: unigram(fallback=100),
    "metaspace first": lambda: unigram(scheme="first"),
    "metaspace never": lambda: unigram(scheme="never"),
    "metaspace unsplit": lambda: unigram(split=False),
    "unigram stripped": lambda: unigram(normalizer=normalizers.Strip()),
    "unigram NFKC": lambda: unigram(normalizer=normalizers.NFKC()),
    "word pieces ##": lambda: word_piece("##"),
    "word pieces @@": lambda: word_piece("@@"),
    "word pieces without prefix": lambda: word_piece(""),
    "prefix in BPE": lambda: byte_level(continuing_subword_prefix="##"),
    "suffix in BPE": lambda: byte_level(end_of_word_suffix="</w>"),
    "CLIP": clip,
    "ignore_merges": lambda: byte_level(ignore_merges=True, use_regex=False),
    "no regex": lambda: byte_level(use_regex=False),
    "prefix space": lambda: byte_level(add_prefix_space=True),
    "lower case": lambda: byte_level(normalizers.Lowercase()),
    "NFKC": lambda: byte_level(normalizers.NFKC()),
    "prepended": lambda: byte_level(normalizers.Prepend("x")),
    "added, strips": lambda: byte_level(added=tag(lstrip=True, rstrip=True)),
    "added, single word": lambda: byte_level(added=tag(single_word=True)),
    "added, normalized": lambda: byte_level(normalizers.Lowercase(), added=tag(normalized=True)),
    "unknown, fused": lambda: byte_level(unk_token="<unk>", fuse_unk=True),
}  # fmt: skip
HARD = [*PIECES, *DECOMPOSED, "<tag>", " <tag> ", "<TAG>", "</w>", "##", "\uff1c/s\uff1e", "</S>"]


def load(name):
    return trained.load(KINDS[name])


@FEW
@given(texts(HARD))
@example("the cat</w> ##at </s>")
@example("a  <tag>  the cat 201")
@pytest.mark.parametrize("name", KINDS)
def test_alignment_holds_and_text_gives_no_control_token(name, text):
    tokenizer, other = load(name), trained.load(trained.single_digits)
    for pair in (TokenizerPair(tokenizer, other), TokenizerPair(other, tokenizer)):
        check_invariants(pair, aligned(pair, text))
    unknown = tokenizer.roles["unk"]
    control = tokenizer.token_bytes.special - {unknown}
    assert not control & set(tokenizer.encode(text).tolist())
    assert tokenizer.bytes_of(unknown) is None


@pytest.mark.parametrize("name", ["unigram", "metaspace unsplit", "ignore_merges", "word pieces ##"])
def test_markup_still_gives_control_tokens_and_names_stay(name):
    tokenizer = load(name)
    for role in ("bos", "eos"):
        spelling, token_id = CONFIG[f"{role}_token"], tokenizer.roles[role]
        assert tokenizer.backend.id_to_token(token_id) == spelling
        text = spelling if name == "ignore_merges" else f"a {spelling} b"
        assert token_id in tokenizer.markup_backend.encode(text, add_special_tokens=False).ids
        assert token_id not in tokenizer.encode(text)


def test_a_spelled_byte_is_text():
    tokenizer = load("unigram")
    assert tokenizer.decode(tokenizer.encode("a<0x41>")) == " a<0x41>"


def test_marks_of_words_have_no_bytes():
    for name in ("suffix in BPE", "prefix in BPE"):
        tokenizer = load(name)
        ids = tokenizer.encode("the cat sat")
        assert tokenizer.token_bytes.join(ids) == b"the cat sat"
    tokenizer = load("word pieces @@")
    assert tokenizer.bytes_of(tokenizer.backend.token_to_id("@@a")) == b"a"


def variant(tmp_path, edit, config=None, encoding="utf-8", **layout):
    tokenizer, plain = trained.three_digits()
    definition = json.loads(tokenizer.to_str())
    edit(definition)
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition, **layout), encoding=encoding)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config or plain), encoding=encoding)
    return Tokenizer.load(tmp_path, compare_auto=False)


def old_merges(definition):
    definition["model"]["merges"] = [" ".join(pair) for pair in definition["model"]["merges"]]
    for key in ("ignore_merges", "byte_fallback", "fuse_unk"):
        del definition["model"][key]


def swap(definition):
    vocab = definition["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


SAME = {
    "merges of an older version": old_merges,
    "padding": lambda d: d.update(padding={"strategy": "BatchLongest", "direction": "Right", "pad_id": 0,
                                           "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "x"}),
    "no post-processor": lambda d: d.update(post_processor=None),
    "dropout": lambda d: d["model"].update(dropout=0.3),
    "order": lambda d: d["model"].update(vocab=dict(reversed(d["model"]["vocab"].items()))),
}  # fmt: skip
DIFFERENT = {
    "ids": swap,
    "merges": lambda d: d["model"]["merges"].reverse(),
    "normalizer": lambda d: d.update(normalizer={"type": "NFC"}),
    "splits": lambda d: d["pre_tokenizer"]["pretokenizers"].pop(0),
    "an added token": lambda d: d["added_tokens"].append(
        {"id": len(d["model"]["vocab"]), "content": "<new>", "special": True, "normalized": False,
         "single_word": False, "lstrip": False, "rstrip": False}),
}  # fmt: skip


@pytest.mark.parametrize("name", [*SAME, *DIFFERENT])
def test_the_fingerprint_is_that_of_what_it_does(tmp_path, name):
    plain = trained.load(trained.three_digits)
    tokenizer = variant(tmp_path, {**SAME, **DIFFERENT}[name])
    assert (tokenizer.fingerprint == plain.fingerprint) == (name in SAME)
    assert tokenizer.file_fingerprint != plain.file_fingerprint


def test_layout_roles_and_a_byte_order_mark_make_no_other_tokenizer(tmp_path):
    config = {"eos_token": "<|begin|>", "pad_token": "<|end|>"}
    tokenizer = variant(tmp_path, lambda _: None, config, encoding="utf-8-sig", indent=3)
    assert tokenizer.fingerprint == trained.load(trained.three_digits).fingerprint
    assert tokenizer.roles["eos"] == 0


def test_dropout_is_off_and_said(tmp_path):
    tokenizer = variant(tmp_path, SAME["dropout"])
    text = "the cats sat on another mat there"
    assert {tuple(tokenizer.encode(text)) for _ in range(9)} == {
        tuple(trained.load(trained.three_digits).encode(text))
    }
    assert "model.dropout=0.3" in tokenizer.warning
    assert variant(tmp_path, lambda d: d["model"].update(dropout=0.0)).warning is None


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone \xef\xbb\xbftwo")
    assert read_sources({"a": SourceConfig(path=str(tmp_path / "a.txt"))})["a"][0] == "one \ufefftwo"
