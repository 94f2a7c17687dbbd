"""Byte strings, UTF-8 or not, as tokens of another tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import tokenizers

from xtoken_jax.tokens.token_bytes import byte_alphabet
from xtoken_jax.tokens.tokenizer import Tokenizer

# Encodings carry far more than their ids, so that a whole vocabulary of them at once would not be small.
_BLOCK = 8192
# What SentencePiece has no spelling for: bytes that are no character, and its own blank when it is text.
_UNSPELLED = re.compile("([\udc80-\udcff▁]+)")


def tokenize_bytes(tokenizer: Tokenizer, contents: list[bytes]) -> Iterator[list[int]]:
    """Tokenize byte strings that need not be UTF-8; [] where the tokenizer has no way to write one.

    A text goes through the tokenizer. Where that does not give the bytes back (they are not
    UTF-8, or it normalizes, or puts a blank in front), its model alone, without normalizer and
    word splitting, runs over the bytes; for WordPiece, which cannot begin within a word, its
    rule: the longest piece first.
    """
    model: tokenizers.models.Model = tokenizer.backend.model
    if tokenizer.token_bytes.kind == "byte_level":
        spell = _byte_level(model)
    elif tokenizer.token_bytes.kind == "sentencepiece":
        spell = _sentencepiece(model)
    else:
        spell = _longest_first(tokenizer.token_bytes.ids_by_bytes())
    unused = tokenizer.token_bytes.unused
    table = [
        b"" if content is None or i in unused else content
        for i, content in enumerate(tokenizer.token_bytes.table)
    ]
    for start in range(0, len(contents), _BLOCK):
        block = contents[start : start + _BLOCK]
        texts = [content.decode("utf-8", errors="replace") for content in block]
        encodings = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
        for content, encoding in zip(block, encodings, strict=True):
            ids = encoding.ids
            if b"".join([table[i] for i in ids]) != content:
                ids = spell(content)
                if b"".join([table[i] for i in ids]) != content:
                    ids = []
            yield ids


def _byte_level(model: tokenizers.models.Model) -> Callable[[bytes], list[int]]:
    """Every byte has a letter in the alphabet, and the model merges letters."""
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    return lambda content: [
        token.id for token in model.tokenize(content.decode("latin-1").translate(letters))
    ]


def _sentencepiece(model: tokenizers.models.Model) -> Callable[[bytes], list[int]]:
    """Characters go to the model, which spells unknown ones in bytes; what is no character, in bytes here."""

    def spell(content: bytes) -> list[int]:
        ids: list[int] = []
        runs = _UNSPELLED.split(content.decode("utf-8", errors="surrogateescape"))
        for place, run in enumerate(runs):
            if place % 2:
                for byte in run.encode("utf-8", errors="surrogateescape"):
                    token_id = model.token_to_id(f"<0x{byte:02X}>")
                    if token_id is None:
                        return []
                    ids.append(token_id)
            elif run:
                ids += [token.id for token in model.tokenize(run.replace(" ", "▁"))]
        return ids

    return spell


def _longest_first(ids: dict[bytes, int]) -> Callable[[bytes], list[int]]:
    longest = max(map(len, ids), default=0)

    def spell(content: bytes) -> list[int]:
        found: list[int] = []
        start = 0
        while start < len(content):
            ends = range(min(len(content), start + longest), start, -1)
            end = next((end for end in ends if content[start:end] in ids), None)
            if end is None:
                return []
            found.append(ids[content[start:end]])
            start = end
        return found

    return spell
