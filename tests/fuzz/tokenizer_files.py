"""Fuzzers of tokenizer.json and tokenizer_config.json."""

import json
import random
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from tokens import trained

from fuzz.frame import Parser
from fuzz.mutations import spoil_json
from xtoken_jax.tokens.tokenizer import Tokenizer

TEXTS = ("", " a", "The sum 12+30=42, théâtre\n\n\t日本 <|end|></s>", "x" * 200, "\u2581##a \ufeff")
KINDS = {
    "single_digits": trained.single_digits,
    "three_digits": trained.three_digits,
    "composing": trained.composing,
    "sentencepiece": trained.sentencepiece,
}
TEMPLATE = "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}{% endfor %}"


def _unigram():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((f"<0x{b:02X}>", -9.0) for b in range(256))]
    pieces += [
        (piece, -2.0 - 0.1 * place)
        for place, piece in enumerate(["▁", "a", "e", "▁a", "▁the", "the", "s", "um", "▁sum", "1", "2"])
    ]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, 0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "▁"), normalizers.NFKC()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    return tokenizer, {"eos_token": "</s>", "unk_token": "<unk>"}


def _wordpiece():
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *"abcdehmstu",
        *(f"##{c}" for c in "abcdehmstu"),
        "the",
        "sum",
    ]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer, {"unk_token": "[UNK]", "pad_token": "[PAD]"}


def _write(folder: Path) -> None:
    for name, make in {**KINDS, "unigram": _unigram, "wordpiece": _wordpiece}.items():
        tokenizer, config = make()
        trained.save(folder / name, tokenizer, {**config, "add_bos_token": False, "chat_template": TEMPLATE})


def _spoil(rng: random.Random, folder: Path, name: str) -> None:
    chosen = folder / rng.choice(sorted(path.name for path in folder.iterdir()))
    for path in sorted(chosen.iterdir()):
        path.rename(folder / path.name)
    if name == "tokenizer.json" and rng.random() < 0.3:
        _replace_step(rng, folder / name)
    else:
        spoil_json(rng, folder / name)


# Steps of all kinds, right and wrong, among them those at which the library panics.
_STEPS = {
    "normalizer": (
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Precompiled", "precompiled_charsmap": "//////////8="},
        {"type": "Precompiled", "precompiled_charsmap": ""},
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"},
        {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
        {"type": "Replace", "pattern": {"String": ""}, "content": "xx"},
        {"type": "Prepend", "prepend": ""},
        {"type": "Strip", "strip_left": True, "strip_right": None},
        {"type": "BertNormalizer", "clean_text": 1},
        {"type": "Sequence", "normalizers": []},
        {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "Nmt"}]},
    ),
    "pre_tokenizer": (
        {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed", "invert": False},
        {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": True},
        {"type": "Split", "pattern": {"String": ""}, "behavior": "Isolated", "invert": False},
        {"type": "Metaspace", "replacement": "", "prepend_scheme": "always", "split": True},
        {"type": "Metaspace", "replacement": "##", "prepend_scheme": "x", "split": True},
        {"type": "Punctuation", "behavior": "Contiguous"},
        {"type": "CharDelimiterSplit", "delimiter": ""},
        {"type": "Digits", "individual_digits": "x"},
        {"type": "FixedLength", "length": 0},
        {"type": "UnicodeScripts"},
        {"type": "Whitespace"},
    ),
    "post_processor": (
        {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "none", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {},
        },
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"x": {"id": "x", "ids": [1, 2], "tokens": ["x"]}},
        },
        {"type": "RobertaProcessing", "sep": ["</s>", 9], "cls": ["<s>", -1]},
        {"type": "BertProcessing", "sep": ["x", 4_000_000_000], "cls": ["y", 0]},
    ),
    "decoder": (
        {"type": "WordPiece", "prefix": "", "cleanup": True},
        {"type": "CTC", "pad_token": 1},
        {"type": "Strip", "content": "xx", "start": -1, "stop": 0},
        {"type": "Replace", "pattern": {"Regex": "*"}, "content": ""},
        {"type": "ByteFallback"},
    ),
    "truncation": ({"max_length": 0, "stride": 5, "strategy": "LongestFirst", "direction": "Right"}, [], 3),
    "padding": ({"strategy": {"Fixed": 10**9}, "direction": "Left", "pad_id": 0, "pad_token": "x"}, [], 3),
}  # fmt: skip


def _replace_step(rng: random.Random, path: Path) -> None:
    definition = json.loads(path.read_text())
    model = definition["model"]
    kind = rng.randrange(5)
    if kind == 0:
        key = rng.choice(("continuing_subword_prefix", "end_of_word_suffix", "unk_token", "dropout", "type"))
        model[key] = rng.choice(
            ("##", "", "#", "é", "</w>", "Ġ", 0.5, 2, "BPE", "Unigram", "WordLevel", None)
        )
    elif kind == 1 and isinstance(model["vocab"], dict):
        piece = rng.choice(sorted(model["vocab"]))
        model["vocab"][piece] = rng.choice((10**8, 4 * 10**9, 2**32, -1, 0, 1.5, "0", 5, 20_000, 10**6))
    elif kind == 2:
        added = {"id": 3, "content": "<x>", "special": True, "normalized": False, "single_word": False,
                 "lstrip": False, "rstrip": False}  # fmt: skip
        added[rng.choice(sorted(added))] = rng.choice(
            (10**8, -1, "", "x", None, [], {}, 0.5, True, "<" * 3000)
        )
        definition["added_tokens"].append(added)
    else:
        key = rng.choice(sorted(_STEPS))
        definition[key] = rng.choice(_STEPS[key])
        if rng.random() < 0.3:
            step = definition[key]
            definition[key] = {"type": "Sequence", "normalizers": [step], "pretokenizers": [step]}
    path.write_text(json.dumps(definition))


def _read(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder, compare_auto=False)
    tokenizer.describe()
    for text in TEXTS:
        tokenizer.decode(tokenizer.encode(text))
        tokenizer.markup_backend.encode(text, add_special_tokens=False)
    tokenizer.encode_batch(TEXTS)


def _parser(name: str, file: str) -> Parser:
    return Parser(name, _write, lambda rng, folder: _spoil(rng, folder, file), _read)


PARSERS = [_parser("tokenizer", "tokenizer.json"), _parser("tokenizer_config", "tokenizer_config.json")]
