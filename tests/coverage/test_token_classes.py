"""Classes of tokens, by hand."""

import pytest
from tokens import trained

from xtoken_jax.coverage.token_classes import TEXT_CLASSES, class_names, sort_key, text_class

EXAMPLES = {
    "1-digit numerals": ["7", " 7"],
    "2-digit numerals": ["42", " 42"],
    "3-digit numerals": ["201"],
    "longer numerals": ["1999", " 20240101"],
    "ASCII punctuation": ["!", " $", "\\", " _"],
    "punctuation runs": ["!!", " ->", ";\n", " }\r\n\r\n", "////////", ". ."],
    "words with leading space": [" the"],
    "words": ["the", "CamelCase"],
    "code and mixed": ["_name", ".get", "x1", "\tint", " it's", "the ", "  word", "(a\n"],
    "whitespace runs": ["  ", "\n\n", "\t", " \r\n", "\u00a0", "\u3000\u3000"],
    "Latin with accents": ["é", " naïve", "\uff41", "ß1"],
    "Greek": ["λ", " µm", "ΔE"],
    "Cyrillic": [" мир"],
    "Arabic": ["في", "٣"],
    "Hebrew": ["של"],
    "Devanagari and other Indic": ["हिन्दी", "ि", "தமிழ்", "।" + "क"],
    "Thai": ["ไทย", "ั"],
    "Han": ["日本", "々", "\uff0c我"],
    "Kana": ["の", "ー", "ｶﾅ", "が日"],
    "Hangul": ["한국", " ㅇ"],
    "other scripts": ["ქ", "ក", "၂"],
    "emoji and symbols": ["🙂", "…the", "“", "→", "²", "\U0001d431", "\u211d", "\ufe0f", "€", "ℏ", "。"],
    "other": ["\x00", "\x1b[", "1.5"],
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, texts in EXAMPLES.items() for t in texts])
def test_classes_by_hand(name, text):
    assert text_class(text.encode()) == name
    assert name in TEXT_CLASSES


@pytest.mark.parametrize("content", [b"\xe2\x80", "日".encode()[:2], " 日".encode()[:-1], b"a\xff"])
def test_bytes_that_are_no_text_alone(content):
    assert text_class(content) == "pieces of characters"


def test_special_tokens_go_by_role_and_what_is_no_text_apart():
    def edit(definition):
        size = len(definition["model"]["vocab"])
        flags = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
        definition["added_tokens"] += [
            {"id": size + i, "content": content, "special": content != "<think>", **flags}
            for i, content in enumerate(("<|im_start|>", "<|reserved_7|>", "<|odd|>", "<think>"))
        ]

    tokenizer = trained.edited(trained.single_digits, edit)
    names = class_names(tokenizer)
    assert len(names) == tokenizer.size
    at = {tokenizer.backend.id_to_token(i): name for i, name in enumerate(names)}
    assert at["<|end|>"] == "special: eos"
    assert at["<|im_start|>"] == "special: turn_start"
    assert at["<|reserved_7|>"] == "unused and reserved"
    assert at["<|odd|>"] == "special, no role"
    assert at["<think>"] == "special: think_open"


def test_order_for_display():
    names = [
        "unused and reserved", "special: turn_start", "words", "special, no role", "special: eos", "Han",
        "bytes behind a token", "1-digit numerals",
    ]  # fmt: skip
    assert sorted(names, key=sort_key) == [
        "1-digit numerals", "words", "Han", "special: eos", "special: turn_start", "special, no role",
        "unused and reserved", "bytes behind a token",
    ]  # fmt: skip
