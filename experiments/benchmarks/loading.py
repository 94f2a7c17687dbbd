"""Host memory and time of loading a checkpoint, beside the size of the loaded model.

    python experiments/benchmarks/loading.py
    python experiments/benchmarks/loading.py --rounds 5 --layers 16 --max-shard-size 200MB

A Llama of many layers with random weights is written in float32 and in bfloat16, then loaded in either
dtype, on one device and on 8 virtual devices that split the parameters (fsdp). Each load has a fresh
process; what an idle process with as many devices holds is subtracted, and all is divided by the size of
the loaded model: 1 is the model itself.

The peak is the kernel's own high-water mark (VmHWM), which counts pages of the mapped files too. Those
are the kernel's to take back (they stay in its cache), but a limit on memory, such as a container's, feels
them; the loader gives them back block by block, so that the strict figure is the one to hold. Peaks of
anonymous (RssAnon) and of file pages (RssFile), which have no high-water mark of their own, are looked up
every few milliseconds beside it. Seconds are the medians of the rounds, and beside them the processor
time that the safetensors library takes to read the same files as numpy arrays, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16")
IDLE, LOAD, PLAIN = "idle", "load", "plain"


def memory() -> dict[str, int]:
    """VmHWM, RssAnon and RssFile of this process, in bytes."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    wanted = {"VmHWM:", "RssAnon:", "RssFile:"}
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words and words[0] in wanted}


class Peaks(threading.Thread):
    """Looks the memory up until it is stopped; `highest` has the largest of each figure."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.highest = memory()
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.005):
            self.look()

    def look(self) -> None:
        self.highest = {name: max(value, self.highest[name]) for name, value in memory().items()}


def child(what: str, folder: str, dtype: str, devices: int) -> dict[str, Any]:
    """What one fresh process measures: an idle one, a load, or a plain read of the files."""
    import jax
    import jax.numpy as jnp

    from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
    from xtoken_jax.models import load_model

    mesh = make_mesh(MeshConfig(data=1, fsdp=devices))
    jax.block_until_ready(jax.jit(jnp.ones, static_argnums=0)((8, 8)))
    size, watch = 0, Peaks()
    watch.start()
    wall, processor = time.perf_counter(), time.process_time()
    if what == LOAD:
        _, params = load_model(folder, mesh=mesh, dtype=dtype)
        jax.block_until_ready(params)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    elif what == PLAIN:
        from safetensors.numpy import load_file

        size = sum(t.nbytes for file in Path(folder).glob("*.safetensors") for t in load_file(file).values())
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    watch.stopped.set()
    watch.join()
    watch.look()
    return {"size": size, "seconds": seconds, **watch.highest}


def measured(what: str, folder: Path, dtype: str, devices: int) -> dict[str, Any]:
    """`child` in a process of its own."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "NPROC": "32",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, __file__, "--child", what, str(folder), dtype, str(devices)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def write(folder: Path, layers: int, max_shard_size: str) -> None:
    """The same random model as float32 and as bfloat16."""
    import jax

    from xtoken_jax.models import DecoderConfig, Model, save_weights

    config = DecoderConfig(
        vocab_size=32_000,
        hidden_size=512,
        intermediate_size=1536,
        num_layers=layers,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
    )
    model = Model(config)
    params = model.init(jax.random.key(0))
    for dtype in DTYPES:
        save_weights(folder / dtype, model, params, dtype=dtype, max_shard_size=max_shard_size)
        (folder / dtype / "config.json").write_text(json.dumps(config.to_hf()))


def note(text: str) -> None:
    print(f"\r{text:60}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=64, help="64 make 1.0 GB in float32, 0.5 in bfloat16")
    parser.add_argument("--max-shard-size", default="5GB", help="less than the model: several files")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, folder, dtype, devices = options.child
        print(json.dumps(child(what, folder, dtype, int(devices))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        note("writing the checkpoints")
        write(folder, options.layers, options.max_shard_size)
        note("")
        print(
            f"\r{'devices':>7} {'file':>9} {'loaded as':>10} {'size':>8} {'peak':>6} {'anonymous':>10}"
            f" {'file':>6} {'seconds':>8} {'processor':>10} {'plain read':>11}"
        )
        for devices in options.devices:
            idle = measured(IDLE, folder, "float32", devices)
            for stored in DTYPES:
                for dtype in DTYPES:
                    note(f"{devices} devices, {stored} as {dtype}")
                    what = (folder / stored, dtype, devices)
                    loads = [measured(LOAD, *what) for _ in range(options.rounds)]
                    plain = [measured(PLAIN, *what) for _ in range(options.rounds)]
                    size = loads[0]["size"]
                    peak, anonymous, mapped = (
                        max(load[figure] - idle[figure] for load in loads) / size
                        for figure in ("VmHWM", "RssAnon", "RssFile")
                    )
                    wall, processor, read = (
                        statistics.median(run["seconds"][kind] for run in runs)
                        for runs, kind in ((loads, "wall"), (loads, "processor"), (plain, "processor"))
                    )
                    note("")
                    print(
                        f"\r{devices:>7} {stored:>9} {dtype:>10} {size / 1e6:>5.0f} MB {peak:>6.2f}"
                        f" {anonymous:>10.2f} {mapped:>6.2f} {wall:>8.2f} {processor:>10.2f} {read:>11.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
