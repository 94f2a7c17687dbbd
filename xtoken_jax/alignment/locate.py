"""Encodings of texts by one tokenizer, each token placed in the bytes of its text (host, numpy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers

from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Located:
    """The tokens of several texts, one text after the other, and the bytes that each came from.

    Attributes:
        ids: int32 [N].
        offsets: int64 [B + 1], text b has the tokens offsets[b] to offsets[b + 1].
        starts, ends: int64 [N], in the UTF-8 bytes of all texts joined. A token without any
            text has start = end; tokens that write characters together, without spelling them,
            share one span.
        faithful: bool [N], the token's bytes are those of its span.
        plain: bool [B], the tokens of the text spell it.
        dummy: bool [B], they spell it behind one blank more: that of the first token.
        text_starts: int64 [B + 1], where each text begins in the joined bytes.
    """

    ids: np.ndarray
    offsets: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    faithful: np.ndarray
    plain: np.ndarray
    dummy: np.ndarray
    text_starts: np.ndarray

    @property
    def spans(self) -> np.ndarray:
        """int64 [N, 2], starts and ends."""
        return np.stack([self.starts, self.ends], axis=1)


def to_bytes(texts: Sequence[str]) -> list[bytes]:
    """UTF-8 of each text; UserError for one that is not valid Unicode."""
    raw = []
    for place, text in enumerate(texts):
        try:
            raw.append(text.encode())
        except UnicodeEncodeError as error:
            raise UserError(
                f"text {place}: {text[error.start]!r} at character {error.start} is half of a surrogate "
                "pair, not valid Unicode; mend it (text.encode('utf-16', 'surrogatepass').decode('utf-16'))"
            ) from error
    return raw


def locate(
    tokenizer: Tokenizer, texts: Sequence[str], encoded: Sequence[np.ndarray] | None = None
) -> Located:
    """Place every token of every text.

    A text that its tokens spell is placed by counting their bytes, one with a dummy blank in
    front of them as well. Any other (composed accents, lower case, dropped blanks) is encoded again
    with character offsets: there a run of tokens that spells its characters is placed exactly,
    and the rest covers the characters it came from without being faithful.

    Args:
        tokenizer: with which the texts are encoded.
        texts: B texts.
        encoded: what `tokenizer.encode_batch` gave for them, where that is there already.

    Raises:
        UserError: a text with half a surrogate pair.
    """
    raw = to_bytes(texts)
    encoded = tokenizer.encode_batch(texts) if encoded is None else encoded
    counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
    offsets = _running(counts)
    ids = np.concatenate(encoded) if len(encoded) else np.zeros(0, np.int32)
    lengths = tokenizer.token_bytes.lengths[ids]
    ends = np.cumsum(lengths, dtype=np.int64)
    spelled = np.diff(np.concatenate([[0], ends])[offsets])
    text_starts = _running(np.fromiter(map(len, raw), np.int64, len(raw)))

    extra = spelled - np.diff(text_starts)
    plain, dummy = extra == 0, extra == 1
    unproved = (plain | dummy) & ~_proved(tokenizer, raw)
    if unproved.any():
        wrong = _misspelled(tokenizer, raw, ids, counts, spelled, unproved, dummy)
        plain[wrong] = dummy[wrong] = False

    # From the count of bytes so far to the place in the texts.
    shift = text_starts[:-1] - (np.cumsum(spelled) - spelled) - dummy
    ends += np.repeat(shift, counts)
    starts = ends - lengths
    faithful = np.ones(len(ids), bool)
    first = offsets[:-1][dummy]
    starts[first] += 1
    faithful[first] = False
    others = np.flatnonzero(~plain & ~dummy).tolist()
    again = tokenizer.backend.encode_batch([texts[b] for b in others], add_special_tokens=False)
    for b, encoding in zip(others, again, strict=True):
        here = slice(offsets[b], offsets[b + 1])
        if encoding.ids != encoded[b].tolist():
            raise ValueError(f"text {b}: the ids given for it are not those of {tokenizer.name}")
        starts[here], ends[here], faithful[here] = by_characters(tokenizer, texts[b], raw[b], encoding)
        starts[here] += text_starts[b]
        ends[here] += text_starts[b]
    return Located(ids, offsets, starts, ends, faithful, plain, dummy, text_starts)


def _running(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _proved(tokenizer: Tokenizer, raw: list[bytes]) -> np.ndarray:
    """bool [B]: the texts for which the number of bytes proves that the tokens spell them."""
    match tokenizer.token_bytes.length_proves:
        case "any":
            return np.ones(len(raw), bool)
        case "ascii":
            return np.fromiter((content.isascii() for content in raw), bool, len(raw))
        case _:
            return np.zeros(len(raw), bool)


def _misspelled(
    tokenizer: Tokenizer,
    raw: list[bytes],
    ids: np.ndarray,
    counts: np.ndarray,
    spelled: np.ndarray,
    chosen: np.ndarray,
    dummy: np.ndarray,
) -> np.ndarray:
    """Of the chosen texts, those whose tokens do not spell them (behind a blank where `dummy`)."""
    places = np.flatnonzero(chosen)
    written = tokenizer.token_bytes.written(ids[np.repeat(chosen, counts)])
    wanted = b"".join(b" " + raw[b] if dummy[b] else raw[b] for b in places.tolist())
    differs = written != np.frombuffer(wanted, np.uint8)
    if not differs.any():
        return places[:0]
    return places[np.bincount(np.repeat(np.arange(len(places)), spelled[places]), differs, len(places)) > 0]


def by_characters(
    tokenizer: Tokenizer, text: str, raw: bytes, encoding: tokenizers.Encoding
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Starts, ends (bytes of this text) and faithful of the tokens of one text, from character offsets."""
    ids = np.array(encoding.ids, np.int32)
    byte_of = byte_offsets(text)
    starts, ends = byte_of[np.asarray(encoding.offsets, np.int64).reshape(-1, 2).T]
    if not len(ids):
        return starts, ends, np.zeros(0, bool)

    # Tokens whose characters overlap write them together: a group. Pieces of one character all have
    # the whole character's offsets.
    reach = np.maximum.accumulate(ends)
    opens = np.concatenate([[True], starts[1:] >= reach[:-1]])
    group = np.cumsum(opens) - 1
    first = np.flatnonzero(opens)
    group_start = np.minimum.reduceat(starts, first)
    group_end = np.maximum.reduceat(ends, first)
    lengths = tokenizer.token_bytes.lengths[ids].astype(np.int64)
    size = np.add.reduceat(lengths, first)
    # Text in front that no token covers belongs to the group if its tokens spell it too: the blank
    # before a word piece.
    before = np.concatenate([[0], np.maximum.accumulate(group_end)[:-1]])
    widened = np.where(size == group_end - before, before, group_start)

    written = tokenizer.token_bytes.written(ids)
    place = np.arange(len(written)) + np.repeat(widened - (np.cumsum(size) - size), size)
    there = np.frombuffer(raw, np.uint8)[np.minimum(place, len(raw) - 1)] if len(raw) else written
    wrong = np.bincount(np.repeat(np.arange(len(size)), size), written != there, len(size))
    spells = (size == group_end - widened) & (wrong == 0)
    group_start = np.where(spells, widened, group_start)

    faithful = spells[group] & (lengths > 0)
    counted = np.cumsum(lengths) + (group_start - (np.cumsum(size) - size))[group]
    ends = np.where(faithful, counted, group_end[group])
    starts = np.where(faithful, counted - lengths, group_start[group])
    return np.where(lengths > 0, starts, ends), ends, faithful


def byte_offsets(text: str) -> np.ndarray:
    """int64 [n + 1]: where each of the n characters of a text begins in its UTF-8, and the end."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return _running(1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))
