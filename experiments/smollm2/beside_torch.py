"""SmolLM2-135M-Instruct here and in transformers on torch: bits per byte of English, and greedy text.

Needs the teacher and the text that prepare.py makes, and torch. Both sides read the same ids in float32:
documents of valid.jsonl, each alone behind its document mark, cut to rows of --length tokens.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from transformers import AutoModelForCausalLM

from xtoken_jax import Tokenizer
from xtoken_jax.evaluate.bits_per_byte import bits_per_byte
from xtoken_jax.models import load_model
from xtoken_jax.models.generate import generate

PROMPTS = (
    "The capital of France is",
    "In the year 1900 the President said that the nation",
    "def fibonacci(n):",
    "Water boils at a temperature of",
)
NEW_TOKENS = 64


def rows_of(
    tokenizer: Tokenizer, documents: list[str], size: int, length: int
) -> tuple[list[np.ndarray], int]:
    """Rows of ids, of the first `size` bytes of text at least, and how many bytes those are."""
    rows: list[np.ndarray] = []
    taken = 0
    for document in documents:
        if taken >= size:
            break
        taken += len(document.encode())
        ids = tokenizer.encode(document)
        mark = tokenizer.roles.get("document_end", tokenizer.roles.get("eos"))
        ids = np.concatenate([[mark], ids]).astype(np.int32)
        rows += [ids[first : first + length] for first in range(0, len(ids), length)]
    return [row for row in rows if len(row) > 1], taken


def torch_bits_per_byte(model: torch.nn.Module, tokenizer: Tokenizer, rows: list[np.ndarray]) -> float:
    """As `bits_per_byte`, a row at a time."""
    nats, count = 0.0, 0
    for row in track(rows, "torch"):
        ids = torch.from_numpy(row.astype(np.int64))
        with torch.no_grad():
            scores = model(ids[None]).logits[0, :-1]
        costs = torch.nn.functional.cross_entropy(scores, ids[1:], reduction="none")
        nats += float(costs.double().sum())
        count += int(tokenizer.token_bytes.lengths[row[1:]].sum())
    return nats / math.log(2) / count


def main() -> None:
    """Measure, print a line a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--files", type=Path, default=Path(__file__).parent / "files", help="what prepare.py made"
    )
    parser.add_argument("--bytes", type=int, default=100_000, help="of English, at least (default 100000)")
    parser.add_argument("--length", type=int, default=512, help="tokens a row (default 512)")
    args = parser.parse_args()

    folder = args.files / "teacher"
    tokenizer = Tokenizer.load(str(folder))
    lines = (args.files / "text" / "valid.jsonl").read_text(encoding="utf-8").splitlines()
    rows, taken = rows_of(tokenizer, [json.loads(line)["text"] for line in lines], args.bytes, args.length)
    print(f"{taken:,} bytes of English, {sum(map(len, rows)):,} tokens in {len(rows)} rows")

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    reference.eval()
    reference.generation_config.eos_token_id = None  # both write on behind an EOS
    theirs = torch_bits_per_byte(reference, tokenizer, rows)
    model, params = load_model(folder)
    ours = bits_per_byte(model, params, tokenizer, rows, batch_size=4, length=args.length)
    print(f"bits per byte: {ours:.6f} here, {theirs:.6f} in torch, difference {abs(ours - theirs):.1e}")

    prompts = [tokenizer.encode(prompt).tolist() for prompt in PROMPTS]
    written = generate(model, params, prompts, max_new_tokens=NEW_TOKENS, size=tokenizer.size)
    for prompt, ids, new in zip(PROMPTS, prompts, written, strict=True):
        with torch.no_grad():
            whole = reference.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[
                0
            ].tolist()
        equal = sum(a == b for a, b in zip(new, whole[len(ids) :], strict=True))
        print(f"{equal} of {len(new)} greedy tokens equal behind {prompt!r}")


if __name__ == "__main__":
    main()
