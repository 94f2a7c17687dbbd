"""Memory of a training step with adapters, beside one that trains all weights.

    python experiments/benchmarks/lora.py --rank 16 --batch 2 --length 512

Compiles only: what the compiler reserves for arguments (weights and optimizer state, which the results
reuse) and for temporaries (gradient and activations). Cross-entropy alone, float32, `remat=full`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import TokenRows
from xtoken_jax.data.batches import Batch
from xtoken_jax.distributed.mesh import single_device_mesh
from xtoken_jax.losses import LossConfig
from xtoken_jax.models import DecoderConfig, LoraConfig, Model, split_lora
from xtoken_jax.train.optimizer import OptimizerConfig, make_optimizer
from xtoken_jax.train.step import abstract_state, make_step

CONFIGS = Path(__file__).parents[2] / "tests" / "fixtures" / "hf_configs"


def memory(config: DecoderConfig, lora: LoraConfig | None, batch: int, length: int) -> tuple[int, int, int]:
    """Bytes of the state (what a checkpoint holds), of all arguments and of temporaries."""
    numbers, flags = (jax.ShapeDtypeStruct((batch, length), dtype) for dtype in (jnp.int32, jnp.bool))
    rows = TokenRows(numbers, flags, flags, numbers)
    model, mesh = Model(config, remat="full", lora=lora), single_device_mesh()
    optimizer = make_optimizer(OptimizerConfig(), 1000)
    step = make_step(model, {}, LossConfig(), optimizer, student_size=config.vocab_size)
    state, frozen = abstract_state(model, optimizer, mesh), split_lora(model.abstract(mesh))[1]
    texts = Batch(rows, {})
    compiled = jax.jit(step, donate_argnums=0).lower(state, {}, {}, texts, frozen).compile()
    found = compiled.memory_analysis()
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return held, found.argument_size_in_bytes, found.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["smollm2_135m", "llama3_2_1b"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    options = parser.parse_args()
    columns = ("student", "trained", "state", "arguments", "temporaries", "together", "ratio")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in options.models:
        config = DecoderConfig.from_hf(json.loads((CONFIGS / f"{name}.json").read_text()))
        whole = 0
        for lora in (None, LoraConfig(options.rank)):
            sizes = memory(config, lora, options.batch, options.length)
            together = sum(sizes[1:])
            whole = whole or together
            cells = [f"{size / 2**30:.2f} GiB" for size in (*sizes, together)]
            trained = "all weights" if lora is None else f"rank {options.rank}"
            print("| " + " | ".join([name, trained, *cells, f"{together / whole:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
