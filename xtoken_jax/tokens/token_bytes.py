"""What each token id stands for: a byte string, or a role, or nothing.

Everything that compares two vocabularies compares these bytes. Space and newline
markers, byte-fallback tokens and leading blanks then need no special case.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from xtoken_jax.errors import UserError
from xtoken_jax.tokens.roles import is_reserved

KINDS = {
    "byte_level": "byte-level BPE",
    "sentencepiece": "SentencePiece",
    "wordpiece": "WordPiece",
}
_SENTENCEPIECE_SPACE = "▁"
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each of the 256 bytes -> that byte.

    GPT-2's rule: bytes that print as themselves in Latin-1 keep their character, the other
    68 take the code points from 256 on, in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(b): b for b in printable}
    others = (b for b in range(256) if b not in printable)
    alphabet.update({chr(256 + i): b for i, b in enumerate(others)})
    return alphabet


@dataclass(frozen=True)
class TokenBytes:
    """The vocabulary of one tokenizer, as bytes.

    Attributes:
        kind: "byte_level", "sentencepiece" or "wordpiece".
        table: one entry an id; None for special tokens and ids without a token.
        lengths: int32 [V], bytes of each token; 0 where `table` has None.
        special: ids of special tokens.
        shadowed: byte-fallback ids of characters that have a token of their own, such as
            `<0x41>` beside `A`; the tokenizer never gives them.
        unused: ids that are kept in reserve, such as `<unused7>`. A text may spell one, so
            that it can have bytes; it takes no part in W.
        length_proves: which texts are known to be spelled by their tokens once the number of
            bytes agrees, or is one more, because the tokenizer can leave something out but write
            nothing else than one dummy blank: "any", "ascii" (it composes accents) or "none".
        byte_fallback: ids of the tokens for single bytes, such as `<0x41>`.
    """

    kind: str
    table: tuple[bytes | None, ...]
    lengths: np.ndarray
    special: frozenset[int]
    shadowed: frozenset[int] = frozenset()
    unused: frozenset[int] = frozenset()
    length_proves: str = "none"
    byte_fallback: frozenset[int] = frozenset()

    @cached_property
    def contents(self) -> tuple[bytes, ...]:
        """`table` with b"" in place of None."""
        return tuple(content or b"" for content in self.table)

    @cached_property
    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8, the bytes of all ids joined, and int64 [V], where each id's begin."""
        return np.frombuffer(b"".join(self.contents), np.uint8), np.cumsum(self.lengths) - self.lengths

    def written(self, ids: np.ndarray) -> np.ndarray:
        """`join` as a uint8 array, without a Python loop."""
        flat, begins = self._flat
        lengths = self.lengths[ids]
        ends = np.cumsum(lengths, dtype=np.int64)
        return flat[
            np.repeat(begins[ids] - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
        ]

    def ids_by_bytes(self) -> dict[bytes, int]:
        """Byte string -> the id that stands for it; the lowest where several do."""
        ids: dict[bytes, int] = {}
        left_out = self.shadowed | self.unused
        for token_id, content in enumerate(self.table):
            if content and token_id not in left_out:
                ids.setdefault(content, token_id)
        return ids

    def join(self, ids: np.ndarray) -> bytes:
        """The bytes that a run of ids stands for; special tokens contribute nothing."""
        return self.written(np.asarray(ids)).tobytes()


def _node_types(node: Any) -> set[str]:
    """The `type` of a pre-tokenizer or decoder and of all that it is made of."""
    if isinstance(node, dict):
        return {node.get("type", "")} | {t for child in node.values() for t in _node_types(child)}
    if isinstance(node, list):
        return {t for child in node for t in _node_types(child)}
    return set()


def _kind(tokenizer_json: dict[str, Any], where: str) -> str:
    model = tokenizer_json.get("model", {})
    types = _node_types(tokenizer_json.get("pre_tokenizer")) | _node_types(tokenizer_json.get("decoder"))
    if "ByteLevel" in types:
        return "byte_level"
    if model.get("type") == "WordPiece":
        return "wordpiece"
    if model.get("byte_fallback") or "Metaspace" in types or model.get("type") == "Unigram":
        return "sentencepiece"
    raise UserError(
        f"{where}: a {model.get('type', 'unknown')} tokenizer without a byte alphabet or byte fallback "
        "cannot reproduce its text byte by byte; supported are byte-level BPE (Llama 3, Qwen, GPT, SmolLM2), "
        "SentencePiece (Gemma, Llama 2, Mistral) and WordPiece (BERT)"
    )


# Steps that split a text, and can drop parts of it, but never write bytes of their own.
_SPLITTERS = {"Sequence", "Split", "Digits", "Punctuation", "UnicodeScripts", "FixedLength"}
_SPLITTERS |= {"Whitespace", "WhitespaceSplit", "CharDelimiterSplit"}


def _steps(node: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the list of its steps."""
    if not node:
        return []
    if node.get("type") == "Sequence":
        return [step for child in node.get(parts, []) for step in _steps(child, parts)]
    return [node]


def _fallback_pieces(tokenizer_json: dict[str, Any]) -> set[str]:
    vocab = tokenizer_json["model"]["vocab"]
    pieces = (piece for piece, _ in vocab) if isinstance(vocab, list) else vocab
    return {piece for piece in pieces if _BYTE_FALLBACK.fullmatch(piece)}


def _length_proves(tokenizer_json: dict[str, Any], kind: str) -> str:
    if kind == "wordpiece":
        return "none"
    dummies, proves = 0, "any"
    splitters = _steps(tokenizer_json.get("pre_tokenizer"), "pretokenizers")
    for step in splitters:
        match step.get("type"):
            case "ByteLevel" if not step.get("add_prefix_space", True):
                pass
            case "Metaspace":
                # Behind another splitter every part of the text gets a blank.
                dummies += len(splitters) * (step.get("prepend_scheme", "always") != "never")
            case name if name not in _SPLITTERS:
                return "none"
    for step in _steps(tokenizer_json.get("normalizer"), "normalizers"):
        match step.get("type"):
            case "NFC" | "NFD" | "NFKC" | "NFKD":
                proves = "ascii"
            # A written `▁` comes out as a blank, two bytes shorter, so that the length tells.
            case "Replace" if kind == "sentencepiece" and step.get("pattern") == {"String": " "}:
                if step.get("content") != _SENTENCEPIECE_SPACE:
                    return "none"
            case "Prepend" if kind == "sentencepiece" and step.get("prepend") == _SENTENCEPIECE_SPACE:
                dummies += 1
            case _:
                return "none"
    # Two bytes less for a `▁` cannot hide behind one dummy blank. A character left out could, and so
    # could a second blank, which parts of a text around an added token get.
    added = any(not t.get("special") for t in tokenizer_json.get("added_tokens") or [])
    every_byte = tokenizer_json["model"].get("byte_fallback") and len(_fallback_pieces(tokenizer_json)) == 256
    if dummies and (dummies > 1 or added or not every_byte):
        return "none"
    return proves


def _stands_alone(piece: str) -> bool:
    """Whether WordPiece splits a piece from its neighbours without a blank: punctuation, Han."""
    first = unicodedata.category(piece[0])
    return first[0] in "PS" or "CJK UNIFIED" in unicodedata.name(piece[0], "")


def _affixes(model: dict[str, Any]) -> tuple[str, str]:
    """What marks a piece inside a word, in front of it, and what marks the end of a word, behind it."""
    inner, end = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if inner is None and model.get("type") == "WordPiece":
        inner = "##"
    return inner or "", end or ""


def _unknown_ids(model: dict[str, Any], vocab: dict[str, int], role: int | None) -> set[int]:
    """The ids that a model gives for what its vocabulary cannot write, and the one that a folder names."""
    spelled = None if model.get("unk_token") is None else vocab.get(model["unk_token"])
    return {i for i in (spelled, model.get("unk_id"), role) if i is not None}


def read_token_bytes(
    tokenizer_json: dict[str, Any], *, where: str = "tokenizer.json", unknown: int | None = None
) -> TokenBytes:
    """Read the byte string of every id from the content of a `tokenizer.json`.

    Byte-level BPE and SentencePiece with byte fallback are exact. WordPiece forgets blanks: a
    piece that opens a word is read as the word behind one blank, `##` pieces and punctuation as
    they stand. That is exact where words are parted by single blanks and nothing is lower-cased
    or stripped of accents; elsewhere, at line ends, behind an opening bracket, with capitals
    under an uncased vocabulary or with `[UNK]`, its chunks are marked as not exact.

    The marks of BPE for the inside and the end of a word (`continuing_subword_prefix`,
    `end_of_word_suffix`, CLIP's `</w>`) are boundaries and have no bytes. The unknown token has none
    either: it does not spell what it stands for.

    Args:
        tokenizer_json: the parsed file.
        where: its name, for errors.
        unknown: the id that the folder's configuration names as the unknown token.

    Returns:
        TokenBytes over ids 0 .. the highest id.

    Raises:
        UserError: a kind of tokenizer whose tokens are not bytes (word level, BPE without bytes).
    """
    kind = _kind(tokenizer_json, where)
    model = tokenizer_json["model"]
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: [piece, score] by id
        vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
    added = tokenizer_json.get("added_tokens") or []
    size = 1 + max([*vocab.values(), *(t["id"] for t in added)], default=-1)
    table: list[bytes | None] = [None] * size

    alphabet = byte_alphabet()
    inner, end = _affixes(model)
    fallback_ids: set[int] = set()
    unused = {t["id"] for t in added if is_reserved(t["content"])}
    for piece, i in vocab.items():
        # An affix alone is text: a word is never empty.
        continues = bool(inner) and piece.startswith(inner) and piece != inner
        text = piece.removeprefix(inner) if continues else piece
        if end and text != end:
            text = text.removesuffix(end)
        if kind == "byte_level":
            try:
                table[i] = bytes(map(alphabet.__getitem__, text))
            except KeyError:  # a word added to the vocabulary as it reads
                table[i] = text.encode()
        elif kind == "wordpiece":
            opens = bool(inner) and bool(text) and not continues and not _stands_alone(text)
            table[i] = b" " * opens + text.encode()
            if is_reserved(text):
                unused.add(i)
        elif fallback := _BYTE_FALLBACK.fullmatch(text):
            table[i] = bytes([int(fallback[1], 16)])
            fallback_ids.add(i)
        else:
            table[i] = text.replace(_SENTENCEPIECE_SPACE, " ").encode()
    for token in added:
        if token["special"]:
            table[token["id"]] = None
        # SentencePiece's runs of blanks (Gemma's `▁▁`) are pieces too, and keep a piece's bytes.
        elif kind != "sentencepiece" or token["content"] not in vocab:
            table[token["id"]] = token["content"].encode()

    special = {t["id"] for t in added if t["special"]}
    # An ordinary added token is matched where a text spells it, and then it is that text.
    if unknown in {t["id"] for t in added}:
        unknown = None
    for token_id in _unknown_ids(model, vocab, unknown):
        table[token_id] = None
        special.add(token_id)

    lengths = np.array([len(b) if b is not None else 0 for b in table], np.int32)
    pieces = {content for i, content in enumerate(table) if i not in fallback_ids}
    return TokenBytes(
        kind,
        tuple(table),
        lengths,
        special=frozenset(special),
        shadowed=frozenset(i for i in fallback_ids if table[i] in pieces),
        unused=frozenset(unused),
        length_proves=_length_proves(tokenizer_json, kind),
        byte_fallback=frozenset(fallback_ids),
    )
