"""W under training: each teacher's log-weights and their optimizer, apart from the student's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xtoken_jax.distributed.mesh import replicated
from xtoken_jax.losses.total import LossTables
from xtoken_jax.projection.matrix import LearnableProjection, Projection
from xtoken_jax.train.optimizer import OptimizerConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learnt:
    """One teacher's W, whole on every device: next to a model it is small.

    Attributes:
        logits: float32 [V_s, K], log-weights, as in `LearnableProjection`.
        opt_state: the state of their optimizer.
    """

    logits: Any
    opt_state: Any


def make_projection_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adam at a constant rate, without decay or clipping (X-Token, section 4)."""
    return optax.adam(config.projection_learning_rate)


def start_learning(
    tables: Mapping[str, LossTables], optimizer: optax.GradientTransformation, mesh: Mesh
) -> dict[str, Learnt]:
    """By teacher whose table is a `LearnableProjection`: the start, in memory of its own."""
    found = {}
    for name, table in tables.items():
        if isinstance(table, LearnableProjection):
            logits = jnp.array(table.logits, copy=True)
            found[name] = jax.device_put(Learnt(logits, optimizer.init(logits)), replicated(mesh))
    return found


def abstract_learnt(
    shapes: Mapping[str, tuple[int, ...]], optimizer: optax.GradientTransformation, mesh: Mesh
) -> dict[str, Learnt]:
    """Shapes and shardings, from those of the log-weights."""

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh))

    found = {}
    for name, shape in shapes.items():
        logits = jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
        found[name] = jax.tree.map(abstract, Learnt(logits, jax.eval_shape(optimizer.init, logits)))
    return found


def with_learnt(tables: Mapping[str, LossTables], logits: Mapping[str, jax.Array]) -> dict[str, LossTables]:
    """The tables with these log-weights in place of those that they began with."""
    own = {name: replace(cast(LearnableProjection, tables[name]), logits=z) for name, z in logits.items()}
    return {**tables, **own}


def learn(
    optimizer: optax.GradientTransformation, learnt: Mapping[str, Learnt], gradient: Mapping[str, jax.Array]
) -> dict[str, Learnt]:
    """After one update of each."""
    found = {}
    for name, own in learnt.items():
        updates, opt_state = optimizer.update(gradient[name], own.opt_state)
        found[name] = Learnt(cast(jax.Array, optax.apply_updates(own.logits, updates)), opt_state)
    return found


def projection_of(table: LossTables, learnt: Learnt) -> Projection:
    """W as it now is."""
    return replace(cast(LearnableProjection, table), logits=learnt.logits).projection()


def moved(table: LossTables, learnt: Learnt) -> jax.Array:
    """The mean over rows of several entries of the share of their weight that is elsewhere than at the start.

    float32 scalar, 0 to 1: half the sum of the absolute differences.
    """
    start = cast(LearnableProjection, table).projection()
    several = (jnp.asarray(start.indices) >= 0).sum(-1) > 1
    share = jnp.abs(projection_of(table, learnt).weights - start.weights).sum(-1) / 2
    return jnp.where(several, share, 0.0).sum() / jnp.maximum(several.sum(), 1)
