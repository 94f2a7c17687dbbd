"""Low-rank adapters (LoRA, arXiv 2106.09685) on a decoder's kernels."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from xtoken_jax.distributed.mesh import single_device_mesh
from xtoken_jax.models.config import LoraConfig
from xtoken_jax.models.decoder import Model, Params

_A, _B = "_lora_a", "_lora_b"  # behind the name of the kernel that they belong to


def split_lora(params: Params) -> tuple[Params, Params]:
    """The parameters that train and those that do not; `join_lora` puts them together again.

    Args:
        params: of a model, or the trained part alone.

    Returns:
        With adapters: them, and all others. Without: all, and an empty dict. The arrays are not copied.
    """
    adapters, others = _split(params)
    return (adapters, others) if adapters else (others, {})


def join_lora(trained: Params, frozen: Params | None) -> Params:
    """The parameters whose parts `split_lora` returned; None is as good as an empty dict."""
    joined = {**(frozen or {}), **trained}
    for name in trained.keys() & (frozen or {}).keys():
        joined[name] = join_lora(trained[name], (frozen or {})[name])
    return joined


def add_lora(
    model: Model, params: Params, config: LoraConfig, key: jax.Array, *, mesh: Mesh | None = None
) -> tuple[Model, Params]:
    """New adapters on a model, which change nothing yet: A is random, B zero.

    Args:
        model, params: without adapters; the arrays of `params` are taken over, not copied.
        config: which kernels, of what rank.
        key: of A, which is normal with variance 1 / the number of inputs. The same key gives the same
            values on every mesh.
        mesh: where the adapters go; by default this process's first device.

    Returns:
        The model with adapters and its parameters, in which the adapters are float32.

    Raises:
        ValueError: the model has adapters already.
    """
    if model.lora is not None:
        raise ValueError("the model has adapters already")
    model = dataclasses.replace(model, lora=config)
    shardings = _split(model.param_shardings(mesh or single_device_mesh()))[0]
    # of the random start, only the adapters are computed
    adapters = jax.jit(lambda key: _split(model.init(key))[0], out_shardings=shardings)(key)
    return model, join_lora(adapters, params)


def merge_lora(
    model: Model, params: Params, *, dtype: str | None = None, donate: bool = False
) -> tuple[Model, Params]:
    """The same model without adapters: each target is W + alpha / rank * A B, added in float32.

    Args:
        model, params: with adapters.
        dtype: of the merged kernels, "float32" or "bfloat16"; None: that of W. All others stay as they are.
        donate: free each W as soon as it is merged, so that one kernel at a time exists twice; `params`
            cannot be used afterwards.

    Returns:
        The model without adapters and its parameters, each laid out as before.

    Raises:
        ValueError: the model has no adapters.
    """
    if model.lora is None:
        raise ValueError("the model has no adapters to merge")
    scale = model.lora.alpha / model.lora.rank

    def of_module(params: Params, letters: Params) -> Params:
        merged: dict[str, Any] = {}
        for name, value in params.items():
            if isinstance(value, dict):
                merged[name] = of_module(value, letters[name])
            elif name + _A in params:
                axes = [letters[name + part].replace(" ", "") for part in (_A, _B, "")]
                value = jnp.asarray(value)
                target = value.dtype if dtype is None else jnp.dtype(dtype)
                add = _adding("{},{}->{}".format(*axes), scale, target, value.sharding)
                merged[name] = add(value, params[name + _A], params[name + _B])
                if donate:
                    jax.block_until_ready(merged[name])
                    value.delete()
            elif not name.endswith((_A, _B)):
                merged[name] = value
        return merged

    return dataclasses.replace(model, lora=None), of_module(params, model.letters)


@functools.lru_cache
def _adding(equation: str, scale: float, dtype: jnp.dtype, sharding: Sharding) -> Callable[..., jax.Array]:
    """(W, A, B) -> the merged kernel; one compilation for all kernels of a shape."""

    def add(kernel: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
        first, second = first.astype(jnp.float32), second.astype(jnp.float32)
        # accelerators would take float32 products in fewer bits
        product = jnp.einsum(equation, first, second, precision=jax.lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * product).astype(dtype)

    return jax.jit(add, out_shardings=sharding)


def _split(tree: Params) -> tuple[Params, Params]:
    """Adapters and all else; a module without one or the other is left out there."""
    adapters: Params = {}
    others: Params = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            parts = _split(value)
        else:
            parts = (value, {}) if name.endswith((_A, _B)) else ({}, value)
        for part, into in zip(parts, (adapters, others), strict=True):
            if not isinstance(part, dict) or part:
                into[name] = part
    return adapters, others
