"""Generated sums and differences, a stated share of them wrong: text that knows less than a teacher can."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum

import numpy as np


class Operation(Enum):
    """sums: "a+b=c", operands up to a largest; differences: "a-b=c" with a result of one digit."""

    sums = "sums"
    differences = "differences"


@dataclass(frozen=True)
class Problem:
    """A prompt such as "12+30=" and its right answer, "42"."""

    prompt: str
    answer: str


def operand_pairs(operation: Operation, largest: int, split: str) -> np.ndarray:
    """int32 [N, 2]: all operand pairs of one split; a tenth is for validation.

    The split hashes the problem itself, so that a held-out one occurs in no training text,
    whatever its seed.

    Args:
        operation: sums take all ordered pairs of 0..largest; differences those of them whose
            result is one digit, 0 to 9.
        largest: largest operand.
        split: "train" or "validation".
    """
    first, second = np.divmod(np.arange((largest + 1) ** 2), largest + 1)
    if operation is Operation.differences:
        one_digit = (first - second >= 0) & (first - second <= 9)
        first, second = first[one_digit], second[one_digit]
    prompts = [_prompt(operation, a, b) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    held_out = np.array([hashlib.sha256(prompt.encode()).digest()[0] < 26 for prompt in prompts])
    chosen = held_out if split == "validation" else ~held_out
    return np.stack([first, second], axis=1)[chosen].astype(np.int32)


def _prompt(operation: Operation, a: int, b: int) -> str:
    return f"{a}+{b}=" if operation is Operation.sums else f"{a}-{b}="


def _results(operation: Operation, operands: np.ndarray) -> np.ndarray:
    return operands.sum(-1) if operation is Operation.sums else operands[..., 0] - operands[..., 1]


def problems(operation: Operation, count: int, *, largest: int, split: str, seed: int) -> list[Problem]:
    """At most `count` problems drawn from a split with their right answers, for measuring accuracy."""
    pairs = operand_pairs(operation, largest, split)
    chosen = pairs[np.random.default_rng(seed).permutation(len(pairs))[:count]]
    answers = _results(operation, chosen).tolist()
    return [Problem(_prompt(operation, *ab), str(c)) for ab, c in zip(chosen.tolist(), answers, strict=True)]


def documents(
    operation: Operation,
    count: int,
    *,
    largest: int,
    split: str,
    seed: int,
    wrong_share: float,
    lines: int = 18,
) -> list[str]:
    """`count` documents of `lines` problems with results, such as "12+30=42", each.

    Args:
        operation: sums or differences.
        largest: largest operand.
        split: "train" or "validation"; the two share no problem.
        seed: of everything drawn.
        wrong_share: share of the lines, in expectation, whose result is not the right one but
            uniform over the other possible results (0 to 2 * largest, or 0 to 9).
    """
    rng = np.random.default_rng([seed, split == "validation"])
    pairs = operand_pairs(operation, largest, split)
    operands = pairs[rng.integers(len(pairs), size=(count, lines))]
    results = _results(operation, operands)
    possible = 2 * largest + 1 if operation is Operation.sums else 10
    # An offset of 1 .. possible - 1, around the ring of all results, is never the right one.
    offset = rng.integers(1, possible, size=results.shape)
    wrong = rng.random(results.shape) < wrong_share
    results = np.where(wrong, (results + offset) % possible, results)
    return [
        "".join(f"{_prompt(operation, a, b)}{c}\n" for (a, b), c in zip(pair, values, strict=True))
        for pair, values in zip(operands.tolist(), results.tolist(), strict=True)
    ]
