"""Time of the alignment beside encoding the same texts, and how it grows with a text's length.

    make tokenizers                                            # once
    python experiments/benchmarks/alignment.py
    python experiments/benchmarks/alignment.py --teachers gemma3 --kinds numbers --rounds 21

Encoding is what a pair costs anyway: both tokenizers' ids of a batch, as arrays. Alignment is all the
rest, given those ids: tokens to places in the text, places to chunks. They run in turn, round after
round, in one process; a figure is the median of the rounds. Tokenizers encode with all cores and the
alignment runs on one, so that the ratio of processor time is the one that holds on any machine.

The second table cuts a kind of text to several lengths: time per byte, as a multiple of that at 10 kB,
for one text alone and for a batch of 1 MB of them. Flat means linear; a text of 1 kB alone shows what a
call costs. Both tables take five minutes; --only, --teachers and --kinds ask for less.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import tokenizer_folders

from xtoken_jax.alignment.locate import locate
from xtoken_jax.alignment.spans import align_located, align_texts
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

BATCH, SIZE = 64, 4_000
LENGTHS = (1_000, 10_000, 100_000, 1_000_000)


def prose(size: int) -> str:
    """English about Python, and some code."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    return text * (1 + size // len(text))


def numbers(size: int) -> str:
    """Rows of numbers of 1 to 9 digits."""
    rng = random.Random(0)
    rows = (
        " ".join(str(rng.randrange(10 ** rng.randint(1, 9))) for _ in range(10)) for _ in range(size // 40)
    )
    return "\n".join(rows)


def chinese(size: int) -> str:
    """Characters drawn evenly from a block, common and rare, with commas and stops between."""
    rng = random.Random(0)
    clauses = (
        "".join(chr(rng.randint(0x4E00, 0x9FA5)) for _ in range(rng.randint(3, 12))) + rng.choice("、、。")
        for _ in range(size // 8)
    )
    return "".join(clauses)


def mixed(size: int) -> str:
    """English words, Han, Cyrillic, Hangul, Devanagari, emoji, numbers and runs of blanks."""
    rng = random.Random(0)
    words = prose(0).split()
    blocks = [(0x4E00, 0x9FA5), (0x430, 0x44F), (0xAC00, 0xD7A3), (0x905, 0x939), (0x1F600, 0x1F64F)]

    def run() -> str:
        kind = rng.randrange(8)
        if kind < 2:
            return rng.choice(words)
        if kind == 2:
            return str(rng.randrange(10 ** rng.randint(1, 9)))
        return "".join(chr(rng.randint(*blocks[kind - 3])) for _ in range(rng.randint(1, 6)))

    return "".join(run() + rng.choice([" ", " ", "  ", "\n", "\n\n", "\t"]) for _ in range(size // 6))


KINDS: dict[str, Callable[[int], str]] = {
    "prose": prose,
    "numbers": numbers,
    "chinese": chinese,
    "mixed": mixed,
    "accents": prose,  # one decomposed accent a text: a tokenizer that composes no longer spells it
}


def texts_of(kind: str, count: int, size: int) -> list[str]:
    """`count` texts of `size` bytes, less what a character at the end does not fit into."""
    raw = KINDS[kind](count * size).encode()
    cut = [raw[i * size : (i + 1) * size].decode(errors="ignore") for i in range(count)]
    return [text[:100] + "e\u0301" + text[102:] for text in cut] if kind == "accents" else cut


def ids_of(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """What encoding costs where nothing is aligned."""
    encodings = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, np.int32) for encoding in encodings]


def cases(pair: TokenizerPair, texts: list[str]) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    encoded = [tokenizer.encode_batch(texts) for tokenizer in (pair.student, pair.teacher)]

    def places() -> list:
        sides = zip((pair.student, pair.teacher), encoded, strict=True)
        return [locate(tokenizer, texts, ids) for tokenizer, ids in sides]

    located = places()
    return {
        "encoding": lambda: [ids_of(tokenizer, texts) for tokenizer in (pair.student, pair.teacher)],
        "places": places,
        "chunks": lambda: align_located(pair, *located),
        "all": lambda: list(align_texts(pair, texts)),
    }


def alignment(pair: TokenizerPair, texts: list[str]) -> Callable[[], object]:
    """All of the alignment after encoding."""
    timed = cases(pair, texts)
    return lambda: (timed["places"](), timed["chunks"]())


def medians(
    functions: dict[str, Callable[[], object]], rounds: int, least: float = 0.0
) -> dict[str, tuple[float, float]]:
    """Wall-clock and processor seconds of one call, by name, each call repeated for `least` seconds."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            calls, wall, cpu = 0, time.perf_counter(), time.process_time()
            while not calls or time.perf_counter() - wall < least:
                function()
                calls += 1
            if number:  # the first round warms up
                spent = time.perf_counter() - wall, time.process_time() - cpu
                taken[name].append((spent[0] / calls, spent[1] / calls))
    return {
        name: (statistics.median(w for w, _ in values), statistics.median(c for _, c in values))
        for name, values in taken.items()
    }


def note(text: str) -> None:
    print(f"\r{text:60}", end="", file=sys.stderr, flush=True)


def beside_encoding(options: argparse.Namespace, pairs: dict[str, TokenizerPair]) -> Iterator[str]:
    yield f"{BATCH} texts of {SIZE:,} bytes, student {options.student}; ms, and % of encoding"
    yield (
        f"{'teacher':14}{'text':10}{'encoding':>10}{'places':>8}{'chunks':>8}"
        f"{'alignment':>11}{'processor':>11}{'with encoding':>15}"
    )
    for name, pair in pairs.items():
        for kind in options.kinds:
            note(f"{name}, {kind}")
            seconds = medians(cases(pair, texts_of(kind, BATCH, SIZE)), options.rounds)
            base, places, chunks, whole = (seconds[n] for n in ("encoding", "places", "chunks", "all"))
            wall, cpu = ((p + c) / b for p, c, b in zip(places, chunks, base, strict=True))
            yield (
                f"{name:14}{kind:10}{base[0] * 1e3:>10.1f}{places[0] * 1e3:>8.2f}{chunks[0] * 1e3:>8.2f}"
                f"{wall:>11.1%}{cpu:>11.1%}{whole[0] / base[0]:>15.1%}"
            )


def growth(options: argparse.Namespace, pairs: dict[str, TokenizerPair]) -> Iterator[str]:
    yield f"alignment by length of text, student {options.student}; time per byte against that at 10 kB"
    yield f"{'teacher':14}{'text':10}{'':9}" + "".join(f"{length // 1000:>9,} kB" for length in LENGTHS)
    for name, pair in pairs.items():
        for kind in options.kinds:
            for batch in ("alone", "batch"):
                note(f"{name}, {kind}, {batch}")
                functions: dict[str, Callable[[], object]] = {}
                for length in LENGTHS:
                    count = LENGTHS[-1] // length if batch == "batch" else 1
                    functions[f"{length}"] = alignment(pair, texts_of(kind, count, length))
                seconds = medians(functions, min(options.rounds, 5), least=0.05)
                per_byte = [
                    seconds[f"{length}"][0] / (LENGTHS[-1] if batch == "batch" else length)
                    for length in LENGTHS
                ]
                base = per_byte[LENGTHS.index(10_000)]
                yield f"{name:14}{kind:10}{batch:9}" + "".join(f"{p / base:>12.2f}" for p in per_byte)


def main() -> None:
    parser = tokenizer_folders.parser(__doc__, ["qwen3", "gemma3", "gptoss", "deepseek_v3", "llama2"])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of text")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", choices=["encoding", "growth"], help="one of the two tables")
    options = parser.parse_args()
    names = [options.student, *options.teachers]
    there = [name for name in names if (options.tokenizers / name / "tokenizer.json").is_file()]
    if options.student not in there:
        parser.error(f"{options.tokenizers / options.student}: no tokenizer.json; run `make tokenizers`")
    for name in names:
        if name not in there:
            print(f"{name}: not in {options.tokenizers}, skipped")
    note("loading tokenizers")
    student = Tokenizer.load(options.tokenizers / options.student)
    pairs = {
        name: TokenizerPair(student, Tokenizer.load(options.tokenizers / name))
        for name in options.teachers
        if name in there
    }
    for title, table in (("encoding", beside_encoding), ("growth", growth)):
        if options.only in (None, title):
            for line in table(options, pairs):
                note("")
                print("\r" + line, flush=True)
            print()


if __name__ == "__main__":
    main()
