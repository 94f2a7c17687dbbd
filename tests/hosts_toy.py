"""A loop of a few numbers as one process of several.

python hosts_toy.py INDEX COUNT PORT FOLDER OPTIONS; of which, as JSON, `seconds` is what a step takes, `bad`
the step with a loss of NaN, and `blind` the process that cannot read the checkpoint of the last step.
"""

import json
import sys
from pathlib import Path

from xtoken_jax.distributed.processes import HostsConfig, from_first, gather, is_first, joined

STEPS, ROWS = 12, 8


class Batches:
    """Row r of batch n, from 1, holds the number n + r; there are `ROWS`."""

    def __init__(self, rows):
        self.rows, self.drawn = rows, 0

    def __next__(self):
        import numpy as np

        from xtoken_jax.alignment.batch import TokenRows
        from xtoken_jax.data.batches import Batch

        self.drawn += 1
        ids = np.array(self.rows, np.int32)[:, None] + np.full((1, 2), self.drawn, np.int32)
        return Batch(TokenRows(ids, ids > 0, ids > 0, ids), {})

    def get_state(self):
        return {"lanes": {str(row): self.drawn for row in self.rows}}

    def set_state(self, state):
        assert [*state["lanes"]] == [str(row) for row in range(ROWS)]
        self.drawn = state["lanes"][str(self.rows[0])]


def run(folder, stop, seconds=0.0, bad=0):
    import time

    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec
    from rich.console import Console

    from xtoken_jax.data.encode import Record
    from xtoken_jax.distributed.mesh import MeshConfig, make_mesh, place, replicated, rows_here
    from xtoken_jax.train.loop import TrainConfig, train
    from xtoken_jax.train.step import TrainState

    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
    split = NamedSharding(mesh, PartitionSpec("fsdp"))

    @jax.jit
    def one(state, teacher_params, tables, batch, frozen=None):
        w = state.params["w"] * 0.9 + jnp.sin(batch.student.ids.astype(jnp.float32)).mean()
        loss = jnp.where(state.step + 1 == bad, jnp.nan, (w * w).sum())
        metrics = {"loss": loss, "gradient_norm": loss, "finite": jnp.isfinite(loss)}
        return TrainState(state.step + 1, {"w": w}, state.opt_state), metrics

    def step(*arguments):
        time.sleep(seconds)
        return one(*arguments)

    rows = rows_here(mesh, ROWS)
    with jax.set_mesh(mesh):
        zero = place(np.int32(0), replicated(mesh))
        state = TrainState(zero, {"w": place(np.arange(8, dtype=np.float32), split)}, {})
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        state = train(
            state,
            abstract,
            step,
            Batches(rows),
            teacher_params={},
            tables={},
            evaluate=lambda params: {"w": float(params["w"].sum())},
            config=TrainConfig(steps=STEPS, log_every=1, evaluate_every=0, save_every=4),
            folder=Path(folder),
            mesh=mesh,
            title="toy",
            console=Console(quiet=not is_first(), soft_wrap=True),
            records=lambda number: [[Record("text", number + row, 0)] for row in rows],
            stop=stop,
        )
        return float(jax.jit(lambda params: params["w"].sum())(state.params))


def blind():
    """From now on, fail to read one checkpoint."""
    import orbax.checkpoint as ocp

    restore = ocp.StandardCheckpointHandler.restore

    def failing(self, path, **arguments):
        if f"/{STEPS}/" in str(path):
            raise OSError(5, "Input/output error")
        return restore(self, path, **arguments)

    ocp.StandardCheckpointHandler.restore = failing


def main(index, count, port, folder, options):
    from xtoken_jax.train.signals import StopSignals

    options = json.loads(options)
    if options.pop("blind", None) == int(index):
        blind()
    address = f"127.0.0.1:{port}"
    config = HostsConfig(coordinator=address, count=int(count), index=int(index), wait=60, lost_after=4)
    with StopSignals() as stop, joined(config):
        once = from_first(lambda: [int(index), "said"])
        said = gather({"index": int(index)})
        total = run(folder, stop, **options)
    print(json.dumps({"first": once, "all": said, "total": total}))


if __name__ == "__main__":
    main(*sys.argv[1:])
