"""Which bytes of a text a tokenizer writes otherwise, worked out with unicodedata alone."""

import functools
import itertools
import sys
import unicodedata

import numpy as np

# What each tokenizer does to a text before it splits it; the others leave it as it is.
RULES = {
    "qwen3": ("NFC",),
    "claude": ("NFKC",),
    "gemma3": ("marker",),
    "llama2": ("marker", "first"),
    "bert": ("all",),
    "smollm2": ("dropped",),
}
# SmolLM2 has no token for these bytes and leaves them out, in whatever character they are; of those that
# can occur in UTF-8 the last two open the planes 4 to 11, where nothing is assigned.
DROPPED = bytes([0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2])


@functools.cache
def _joins_backwards():
    """Characters that may change, or be changed by, the one before them under NFC or NFKC."""
    seconds = {*map(chr, range(0x1161, 0x1176)), *map(chr, range(0x11A8, 0x11C3))}  # Hangul
    for point in range(sys.maxunicode + 1):
        parts = unicodedata.decomposition(chr(point)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(chr(int(parts[1], 16)))
    joins = set()
    for point in range(sys.maxunicode + 1):
        if 0xD800 <= point < 0xE000:
            continue
        first = unicodedata.normalize("NFKD", chr(point))[0]
        if unicodedata.combining(chr(point)) or unicodedata.combining(first) or first in seconds:
            joins.add(chr(point))
    return frozenset(joins)


def _segments(text):
    """Runs that normalize each for itself: a new one opens with what joins nothing before it."""
    joins = _joins_backwards()
    first = 0
    for place in range(1, len(text)):
        if text[place] not in joins:
            yield text[first:place]
            first = place
    if text:
        yield text[first:]


def _normalized(text, form):
    """bool per UTF-8 byte. Unassigned here, a character may be known to another Unicode version."""
    mask = []
    for segment in _segments(text):
        changes = unicodedata.normalize(form, segment) != segment
        changes |= not segment.isascii() and any(unicodedata.category(c) == "Cn" for c in segment)
        mask += [changes] * len(segment.encode())
    return mask


def _symbol(character):
    return unicodedata.category(character)[0] not in "LNZ" and character not in "\t\n\v\f\r\x85"


def _dropped(text):
    """bool per UTF-8 byte: the run of symbols that loses a character, in which offsets then are wrong."""
    mask = []
    for symbols, run in itertools.groupby(text, _symbol):
        content = "".join(run).encode()
        mask += [symbols and any(byte in content for byte in DROPPED)] * len(content)
    return mask


def touched(name, text):
    """bool [bytes of the text], True where tokenizer `name` may write other bytes."""
    raw = text.encode()
    mask = np.zeros(len(raw), bool)
    for rule in RULES.get(name, ()):
        if rule == "all":
            mask[:] = True
        elif rule == "first":
            mask[: len(text[:1].encode())] = True
        elif rule == "marker":
            place = raw.find("▁".encode())
            while place >= 0:
                mask[place : place + 3] = True
                place = raw.find("▁".encode(), place + 3)
        elif rule == "dropped":
            if any(byte in raw for byte in DROPPED):
                mask |= np.array(_dropped(text), bool)
        elif not text.isascii():
            mask |= np.array(_normalized(text, rule), bool)
    return mask


def touched_everywhere(name, texts):
    """The masks of all texts, joined."""
    return np.concatenate([np.zeros(0, bool), *(touched(name, text) for text in texts)])
