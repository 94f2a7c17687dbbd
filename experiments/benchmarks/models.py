"""The decoder beside transformers on torch, what depth costs to compile, and what remat saves.

    pip install torch==2.13.0
    python experiments/benchmarks/models.py                 # all three tables, some minutes
    python experiments/benchmarks/models.py speed --batch 2

Everything has SmolLM2-135M's shape, random weights and float32. `speed` runs this decoder and
transformers' (eager attention, torch's own threads) on the same weights in turn, round after round:
`forward` ends at the logits, `forward + backward` at the gradient of the mean next-token cross-entropy.
A ratio is the median over rounds of the ratios within a round. `compile` traces, lowers and compiles a
training step of 4 and of 36 layers. `memory` is what the compiler reserves for a step's temporaries.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.losses import masked_mean, next_token_cross_entropy
from xtoken_jax.models import DecoderConfig, Model, load_model, logits
from xtoken_jax.models.decoder import Params

SMOLLM2 = DecoderConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    norm_eps=1e-5,
    rope_theta=100000.0,
    tie_embeddings=True,
)


def loss_of(params: Params, model: Model, tokens: jax.Array) -> jax.Array:
    """Mean next-token cross-entropy of tokens [B, T], through whole logits."""
    values = logits(*model(params, tokens))
    return masked_mean(*next_token_cross_entropy(values, tokens, jnp.ones(tokens.shape, bool)))


Run = Callable[[], float]  # does the work and returns a number by which two of them can be compared


def runs_here(folder: Path, tokens: np.ndarray) -> dict[str, Run]:
    model, params = load_model(folder)
    forward = jax.jit(lambda params, tokens: logits(*model(params, tokens)))
    step = jax.jit(jax.value_and_grad(loss_of), static_argnums=1)

    def run_step() -> float:
        value, gradient = step(params, model, tokens)
        jax.block_until_ready(gradient)
        return float(value)

    return {
        "forward": lambda: float(jax.block_until_ready(forward(params, tokens))[0, -1, 0]),
        "forward + backward": run_step,
    }


def runs_of_torch(folder: Path, tokens: np.ndarray) -> dict[str, Run]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    ids = torch.tensor(tokens, dtype=torch.long)

    def forward() -> float:
        with torch.no_grad():
            return float(model(ids, use_cache=False).logits[0, -1, 0])

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    return {"forward": forward, "forward + backward": step}


def write_weights(folder: Path, config: DecoderConfig) -> None:
    """transformers' random start of a config, as a folder."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    settings = config.to_hf()
    settings = {key: settings[key] for key in settings.keys() - {"architectures", "model_type"}}
    AutoModelForCausalLM.from_config(LlamaConfig(**settings)).save_pretrained(folder)


def seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def speed(batch: int, length: int, rounds: int) -> None:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokens = np.random.default_rng(0).integers(SMOLLM2.vocab_size, size=(batch, length)).astype(np.int32)
    with tempfile.TemporaryDirectory() as name:
        write_weights(Path(name), SMOLLM2)
        ours, torchs = runs_here(Path(name), tokens), runs_of_torch(Path(name), tokens)
    print(f"B {batch}, T {length}, float32, torch {torch.__version__} on {torch.get_num_threads()} threads")
    print("| | ours, s | torch, s | ours / torch | quartiles |\n|---|---|---|---|---|")
    for what, run in ours.items():
        np.testing.assert_allclose(run(), torchs[what](), atol=1e-3)  # and compiles
        times: dict[str, list[float]] = {"ours": [], "torch": []}
        for number in range(rounds):
            pair = [("ours", run), ("torch", torchs[what])]
            for name, one in reversed(pair) if number % 2 else pair:
                times[name].append(seconds(one))
        ratios = np.divide(times["ours"], times["torch"])
        low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
        medians = " | ".join(f"{statistics.median(times[name]):.3f}" for name in ("ours", "torch"))
        print(f"| {what} | {medians} | {middle:.2f} | {low:.2f} to {high:.2f} |", flush=True)


def lowered(layers: int, remat: str, batch: int, length: int) -> jax.stages.Lowered:
    model = Model(dataclasses.replace(SMOLLM2, num_layers=layers), remat=remat)
    step = jax.jit(jax.value_and_grad(loss_of), static_argnums=1)
    return step.lower(model.abstract(), model, jax.ShapeDtypeStruct((batch, length), jnp.int32))


def compile_times(batch: int, length: int, rounds: int) -> None:
    times: dict[int, list[float]] = {4: [], 36: []}
    for number in range(rounds):
        for layers in sorted(times, reverse=number % 2 == 1):
            jax.clear_caches()
            start = time.perf_counter()
            lowered(layers, "none", batch, length).compile()
            times[layers].append(time.perf_counter() - start)
    ratio = statistics.median(np.divide(times[36], times[4]))
    few, many = (statistics.median(times[layers]) for layers in (4, 36))
    print("| compiling a step | 4 layers, s | 36 layers, s | 36 / 4 |\n|---|---|---|---|")
    print(f"| | {few:.2f} | {many:.2f} | {ratio:.2f} |", flush=True)


def memory(batch: int, length: int) -> None:
    print(f"| remat, B {batch}, T {length} | temporaries, MiB | of none |\n|---|---|---|")
    none = 0.0
    for remat in ("none", "dots", "full"):
        analysis = lowered(SMOLLM2.num_layers, remat, batch, length).compile().memory_analysis()
        size = analysis.temp_size_in_bytes / 2**20
        none = none or size
        print(f"| {remat} | {size:,.0f} | {size / none:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", default=["speed", "compile", "memory"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    batch, length = arguments.batch, arguments.length
    if "speed" in arguments.what:
        speed(batch, length, arguments.rounds)
    if "compile" in arguments.what:
        compile_times(batch, length, 3)
    if "memory" in arguments.what:
        memory(batch, length)


if __name__ == "__main__":
    main()
