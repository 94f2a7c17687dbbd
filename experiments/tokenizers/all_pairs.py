"""Aligns the hard texts of tests/real under all ordered pairs of the real tokenizers; prints a table.

A chunk counts as exact when both sides' tokens are the same bytes; only these take part in a loss.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "real"))
import hard_texts
from real_tokenizers import NAMES, absent, load, pair, special_tokens

from xtoken_jax.alignment.locate import locate
from xtoken_jax.alignment.spans import align_located


def main() -> int:
    """Prints one row a kind, then the share of exact chunks of every pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=300, help="texts of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if absent():
        print(f"error: {', '.join(absent())} are missing: run `make tokenizers`", file=sys.stderr)
        return 2
    start = time.monotonic()
    ordered = [(s, t) for s in NAMES for t in NAMES if s != t]
    by_pair = {names: [0, 0] for names in ordered}
    total = [0, 0, 0, 0, 0]
    print("| kind | texts | chunks, 72 pairs | exact | chunks, 18 pairs with bert | exact |")
    print("|---|---|---|---|---|---|")
    for kind in hard_texts.NAMES:
        texts = hard_texts.texts(kind, args.texts, special_tokens(), args.seed)
        located = {name: locate(load(name), texts) for name in NAMES}
        row = [len(texts), 0, 0, 0, 0]
        for student, teacher in ordered:
            spans = align_located(pair(student, teacher), located[student], located[teacher])
            counts = sum(s.chunk_count for s in spans), sum(int(s.exact.sum()) for s in spans)
            place = 3 if "bert" in (student, teacher) else 1
            for k in (0, 1):
                by_pair[student, teacher][k] += counts[k]
                row[place + k] += counts[k]
        total = [t + r for t, r in zip(total, row, strict=True)]
        _print_row(kind, row)
    _print_row("all", total)
    print("\nExact share of the chunks, by student (row) and teacher (column):\n")
    print(f"| | {' | '.join(NAMES)} |\n|{'---|' * (len(NAMES) + 1)}")
    for student in NAMES:
        cells = ["" if student == teacher else _share(*by_pair[student, teacher]) for teacher in NAMES]
        print(f"| {student} | {' | '.join(cells)} |")
    print(f"\n{time.monotonic() - start:.0f} s", file=sys.stderr)
    return 0


def _print_row(kind: str, row: list[int]) -> None:
    texts, *counts = row
    cells = [f"{counts[k]:,} | {_share(*counts[k : k + 2])}" for k in (0, 2)]
    print(f"| {kind} | {texts:,} | {' | '.join(cells)} |", flush=True)


def _share(chunks: int, exact: int) -> str:
    """In percent, rounded down: 100.0 % means all."""
    return f"{int(exact * 1000 / chunks) / 10:.1f} %" if chunks else ""


if __name__ == "__main__":
    sys.exit(main())
