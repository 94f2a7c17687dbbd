"""Fuzz the readers of files from outside, and print a table of verdicts.

    python tests/fuzz/run.py --cases 500 --seed 1
    python tests/fuzz/run.py --only tokenizer --case 17 --seed 1 --keep DIR   # one case, and its files

Ends with 1 if a case was bad. Case N of a parser is the same for the same seed.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# Before the libraries are imported: no thread may run when a case is forked.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

from fuzz.frame import BAD, GOOD, Outcome, Parser, Tally, fuzz, intact_folders, run_case, spoiled_copy

# Each has a list PARSERS.
MODULES = ("model_files", "tokenizer_files", "cache_files", "data_files", "run_folders")


def all_parsers(modules: Sequence[str] = MODULES) -> list[Parser]:
    """Import the modules, and return their parsers."""
    return [parser for name in modules for parser in importlib.import_module(f"fuzz.{name}").PARSERS]


def table(tallies: dict[str, Tally]) -> str:
    """Return the verdicts as text, a parser a line."""
    lines = [
        f"{'parser':18} {'cases':>6} " + " ".join(f"{v:>9}" for v in (*GOOD, *BAD)) + "  slowest    peak"
    ]
    for name, tally in tallies.items():
        counts = " ".join(f"{tally.counts[verdict]:9}" for verdict in (*GOOD, *BAD))
        total = sum(tally.counts.values())
        lines.append(f"{name:18} {total:6} {counts}  {tally.slowest:6.1f}s {tally.peak / 2**20:6.0f}M")
    return "\n".join(lines)


def _tell(name: str, number: int, outcome: Outcome) -> None:
    detail = outcome.detail.strip()[-1500:].replace("\n", "\n    ")
    print(f"{name} {number}: {outcome.verdict} after {outcome.seconds:.1f} s\n    {detail}", flush=True)


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--cases", type=int, default=100, help="of each parser")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--minutes", type=float, help="end after this time")
    options.add_argument("--modules", nargs="*", default=MODULES, help="those with the parsers")
    options.add_argument("--only", nargs="*", help="names of parsers")
    options.add_argument("--case", type=int, help="run this case alone")
    options.add_argument("--keep", type=Path, help="with --case: leave its files in this new folder")
    options.add_argument("--json", action="store_true", help="print the counts and the bad cases as JSON")
    words = options.parse_args()
    parsers = [p for p in all_parsers(words.modules) if words.only is None or p.name in words.only]
    if words.case is not None:
        with intact_folders(parsers) as folders:
            for parser in parsers:
                if words.keep:
                    spoiled_copy(parser, folders[parser.name], words.keep, words.seed, words.case)
                print(parser.name, run_case(parser, folders[parser.name], words.seed, words.case))
        return 0
    tell = (lambda *_: None) if words.json else _tell
    tallies = fuzz(parsers, cases=words.cases, seed=words.seed, minutes=words.minutes, tell=tell)
    bad = {name: {n: [o.verdict, o.detail] for n, o in tally.bad.items()} for name, tally in tallies.items()}
    if words.json:
        counts = {name: dict(tally.counts) for name, tally in tallies.items()}
        print(json.dumps({"counts": counts, "bad": bad}))
    else:
        print(table(tallies))
    return 1 if any(bad.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
