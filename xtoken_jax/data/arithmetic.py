"""Generated remainders, a stated share of them wrong: text that knows less than a teacher can.

A line is "347%5=2": a three-digit number, 2, 5 or 10, and the remainder, one digit. A tokenizer
that splits numbers shows the digit that decides; one that keeps them whole has to learn it for
every number. The remainder itself is one token in either.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

NUMBERS = range(100, 1000)
DIVISORS = (2, 5, 10)
LINES = 18  # a document


@dataclass(frozen=True)
class Problem:
    """A prompt such as "347%5=" and its right answer, "2"."""

    prompt: str
    answer: str


def operand_pairs(split: str) -> np.ndarray:
    """int32 [N, 2]: numbers and divisors of one split, "train" or "validation"; a tenth is held out.

    The split hashes the problem itself, so that a held-out one occurs in no training text,
    whatever its seed.
    """
    pairs = [(a, b) for a in NUMBERS for b in DIVISORS]
    held_out = [hashlib.sha256(_prompt(a, b).encode()).digest()[0] < 26 for a, b in pairs]
    chosen = [pair for pair, out in zip(pairs, held_out, strict=True) if out == (split == "validation")]
    return np.array(chosen, np.int32)


def _prompt(a: int, b: int) -> str:
    return f"{a}%{b}="


def problems(count: int, *, split: str, seed: int) -> list[Problem]:
    """At most `count` problems of a split with their right answers, for measuring accuracy."""
    pairs = operand_pairs(split)
    chosen = pairs[np.random.default_rng(seed).permutation(len(pairs))[:count]]
    return [Problem(_prompt(a, b), str(a % b)) for a, b in chosen.tolist()]


def documents(count: int, *, split: str, seed: int, wrong_share: float) -> list[str]:
    """`count` documents of 18 lines such as "347%5=2".

    Args:
        count: documents.
        split: "train" or "validation"; the two share no problem.
        seed: of everything drawn.
        wrong_share: share of the lines, in expectation, whose result is not the right one but
            uniform over the nine other digits.
    """
    rng = np.random.default_rng([seed, split == "validation"])
    pairs = operand_pairs(split)
    operands = pairs[rng.integers(len(pairs), size=(count, LINES))]
    results = operands[..., 0] % operands[..., 1]
    # An offset of 1 .. 9, around the ring of all digits, is never the right one.
    offset = rng.integers(1, 10, size=results.shape)
    wrong = rng.random(results.shape) < wrong_share
    results = np.where(wrong, (results + offset) % 10, results)
    return [
        "".join(f"{_prompt(a, b)}{c}\n" for (a, b), c in zip(document, values, strict=True))
        for document, values in zip(operands.tolist(), results.tolist(), strict=True)
    ]
