"""The real tokenizers of the cache folder, each loaded once."""

import functools
import itertools
import sys
from pathlib import Path

EXPERIMENT = Path(__file__).resolve().parents[2] / "experiments" / "tokenizers"
sys.path.insert(0, str(EXPERIMENT))
import fetch  # noqa: E402

from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair  # noqa: E402

FOLDER = fetch.cache_folder()
NAMES = tuple(fetch.SOURCES)
# Unordered; the tests align each both ways.
PAIRS = tuple(itertools.combinations(NAMES, 2))


def absent():
    """Tokenizers that are not in the cache."""
    return fetch.missing(FOLDER)


@functools.cache
def load(name):
    return Tokenizer.load(FOLDER / name, compare_auto=False)


def pair(student, teacher):
    return TokenizerPair(load(student), load(teacher))


@functools.cache
def special_tokens():
    """The spellings of special and added tokens, some dozens of each tokenizer."""
    spellings = {}
    for name in NAMES:
        added = [token.content for token in load(name).backend.get_added_tokens_decoder().values()]
        step = max(1, len(added) // 40)
        spellings |= dict.fromkeys([*added[:20], *added[::step]])
    return tuple(spelling for spelling in spellings if spelling)
