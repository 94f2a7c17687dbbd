"""The two-pass W of an ordered tokenizer pair (host, numpy); no model, no training."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from xtoken_jax.projection.matrix import Projection
from xtoken_jax.tokens.token_bytes import byte_alphabet
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

BETA, GAMMA = 0.9, 0.1
# Where one id plays several roles the last one named here decides: EOS is the one that is predicted.
_ROLE_ORDER = ("unk", "pad", "bos", "eos")


def build_projection(pair: TokenizerPair, *, entries: int = 4) -> Projection:
    """Build W [V_s, V_t] (X-Token, section 4).

    1. A student token whose bytes are a teacher token's gets that one entry, of weight 1
       (several such teacher tokens: the lowest id).
    2. Any other is re-tokenized by the teacher; piece i gets 0.9 * 0.1**i, the first K
       pieces are kept, a repeated piece adds up, the row is normalized.
    3. Special tokens map role to role with weight 1. Rows without a mapping stay empty.

    Byte-fallback tokens of characters that have a token of their own take no part: neither
    tokenizer ever gives them, and they would take the place of the character's own token.

    Args:
        pair: student's and teacher's tokenizer.
        entries: K, entries a row at most.

    Returns:
        Projection of numpy arrays; the same pair gives the same arrays, bit for bit.
    """
    student, teacher = pair.student, pair.teacher
    indices = np.full((student.size, entries), -1, np.int32)
    weights = np.zeros((student.size, entries), np.float32)

    by_bytes = teacher.token_bytes.ids_by_bytes()

    inexact: list[int] = []
    for token_id, content in enumerate(student.token_bytes.table):
        if content is None or token_id in student.token_bytes.shadowed:
            continue
        if content in by_bytes:
            indices[token_id, 0], weights[token_id, 0] = by_bytes[content], 1.0
        elif content:
            inexact.append(token_id)

    for role in _ROLE_ORDER:
        token_id = student.roles.get(role, -1)
        if token_id in student.token_bytes.special and role in teacher.roles:
            indices[token_id, 0], weights[token_id, 0] = teacher.roles[role], 1.0

    contents = [student.token_bytes.table[i] or b"" for i in inexact]
    for token_id, pieces in zip(inexact, tokenize_bytes(teacher, contents), strict=True):
        row: dict[int, float] = {}
        for place, piece in enumerate(pieces[:entries]):
            row[piece] = row.get(piece, 0.0) + BETA * GAMMA**place
        total = sum(row.values())
        for k, (piece, weight) in enumerate(sorted(row.items(), key=lambda item: -item[1])):
            indices[token_id, k], weights[token_id, k] = piece, weight / total
    return Projection(indices, weights, teacher.size)


def tokenize_bytes(tokenizer: Tokenizer, contents: list[bytes]) -> Iterator[list[int]]:
    """Tokenize byte strings that need not be UTF-8; [] where the tokenizer has no way to write one.

    A text goes through the tokenizer. Where that does not give the bytes back (they are not
    UTF-8, or it normalizes, or puts a blank in front), its own merges run over the bytes.
    """
    texts = [content.decode("utf-8", errors="replace") for content in contents]
    merges = _Merges(tokenizer)
    for content, encoding in zip(contents, tokenizer.encode_batch(texts), strict=True):
        ids = np.asarray(encoding.ids, np.int32)
        yield ids.tolist() if tokenizer.token_bytes.join(ids) == content else merges.tokenize(content)


class _Merges:
    """A tokenizer's byte-pair merges, applied to bytes without splitting them into words first."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.byte_level = tokenizer.token_bytes.kind == "byte_level"
        self.ids = tokenizer.token_bytes.ids_by_bytes()
        alphabet = byte_alphabet()

        def content_of(piece: str) -> bytes:
            return (
                bytes(map(alphabet.__getitem__, piece))
                if self.byte_level
                else piece.replace("▁", " ").encode()
            )

        self.ranks: dict[tuple[bytes, bytes], int] = {}
        for rank, merge in enumerate(tokenizer.definition["model"].get("merges") or []):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            self.ranks.setdefault((content_of(left), content_of(right)), rank)

    def tokenize(self, content: bytes) -> list[int]:
        parts = self._units(content)
        none = len(self.ranks)
        while len(parts) > 1:
            ranks = [self.ranks.get(both, none) for both in itertools.pairwise(parts)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] == none:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        ids = [self.ids[part] for part in parts if part in self.ids]
        return ids if len(ids) == len(parts) else []

    def _units(self, content: bytes) -> list[bytes]:
        """What merges start from: single bytes, or the characters that SentencePiece has a token for."""
        if self.byte_level:
            return [bytes([b]) for b in content]
        units: list[bytes] = []
        for character in content.decode("utf-8", errors="surrogateescape"):
            raw = character.encode("utf-8", errors="surrogateescape")
            units.extend([raw] if raw in self.ids else [bytes([b]) for b in raw])
        return units
