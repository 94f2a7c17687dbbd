"""Attention of one layer: grouped queries, windows, segments, soft caps, with and without a cache.

Shape letters: B batch, T query position, S key position, N query head, G key/value head, H head width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend

from xtoken_jax.distributed.mesh import context_specs
from xtoken_jax.errors import UserError

IMPLEMENTATIONS = ("xla", "cudnn", "splash", "auto")
# Where a kernel runs, as `platform` and as the user calls it.
PLATFORMS = {"cudnn": ("cuda", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}
LANES = 128  # a TPU's; splash wants lengths and blocks in multiples
BLOCKS = (512, 256, LANES)


@dataclasses.dataclass(frozen=True)
class AttentionSetting:
    """What is the same in all calls of a layer; hashable.

    Attributes:
        scale: of the scores.
        softcap: c of c tanh(score / c), or None.
        implementation: "xla" anywhere; "cudnn" on NVIDIA GPUs, in bfloat16, without soft caps; "splash" on
            TPUs; "auto": of the two the one that can, else "xla".
        interpret: run splash's kernel step by step in plain JAX, on any device, for tests.
    """

    scale: float
    softcap: float | None = None
    implementation: str = "xla"
    interpret: bool = False


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    setting: AttentionSetting,
    *,
    window: int | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Causal self-attention over whole rows.

    The kernels run shard by shard on the mesh of `jax.set_mesh`: rows over ("data", "fsdp"), heads over
    "tensor".

    Args:
        query: [B, T, N, H].
        key, value: [B, T, G, H]; N is a multiple of G.
        setting: scale, soft cap and implementation.
        window: how many positions a token sees, its own included; None: all before it.
        segments: int32 [B, T]: a token sees those with its own number; None: all. Rows that are padded on
            the right only need none, as no token sees what is behind it: cuDNN, which has no segments,
            then reads no [B, 1, T, T] mask.

    Returns:
        [B, T, N, H] in query's dtype; softmax in float32.

    Raises:
        UserError: an implementation that this process's devices lack, or cuDNN for what it cannot do.
    """
    length, head_dim = query.shape[1], query.shape[-1]
    window = None if window is None or window >= length else window
    chosen = choose(setting.implementation, str(query.dtype), head_dim, setting.softcap, setting.interpret)
    if chosen == "xla":
        seen = causal(length, window)[None, None, :, :]
        return _plain(
            query, key, value, setting, seen if segments is None else seen & _same_segment(segments)
        )
    kernel = functools.partial(_splash if chosen == "splash" else _cudnn, setting=setting, window=window)
    return _by_shard(kernel, query, key, value, segments)


def attend_cached(
    query: jax.Array, key: jax.Array, value: jax.Array, setting: AttentionSetting, allowed: jax.Array
) -> jax.Array:
    """New tokens over a cache: query [B, T, N, H], key and value [B, S, G, H], allowed bool [B, 1, T, S]."""
    return _plain(query, key, value, setting, allowed)


def choose(
    implementation: str, dtype: str, head_dim: int, softcap: float | None, interpret: bool = False
) -> str:
    """The implementation to run on this process's devices: "xla", "cudnn" or "splash".

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        dtype: of queries, keys and values.
        head_dim: H.
        softcap: of the scores.
        interpret: whether splash is only to be simulated.

    Raises:
        UserError: one that was asked for by name is not to be had here.
    """
    if implementation == "auto":
        here = platform()
        fits_cudnn = here == "cuda" and cudnn_lacks(dtype, head_dim, softcap, _limit()) is None
        return "splash" if here == "tpu" else "cudnn" if fits_cudnn else "xla"
    if not (interpret and implementation == "splash"):
        require_device(implementation)
    if implementation == "cudnn" and (lack := cudnn_lacks(dtype, head_dim, softcap, _limit())) is not None:
        raise UserError(lack)
    return implementation


def require_device(implementation: str) -> None:
    """Refuses an implementation, one of `IMPLEMENTATIONS`, that this process's devices cannot run.

    Raises:
        UserError: which devices it needs.
    """
    wanted, spoken = PLATFORMS.get(implementation, (None, None))
    if wanted is not None and (here := platform()) != wanted:
        raise UserError(
            f"attention={implementation} needs {spoken}; this process computes on {here}:"
            " take attention=auto or xla"
        )


def cudnn_lacks(dtype: str, head_dim: int, softcap: float | None, limit: int = 256) -> str | None:
    """Why cuDNN cannot compute this, in a line for the user; None if it can.

    Args:
        dtype, head_dim, softcap: as of `choose`.
        limit: the widest head: 128 before NVIDIA's Hopper, 0 before Ampere.
    """
    remedy = "take attention=auto or xla"
    if dtype not in ("bfloat16", "float16"):
        return f"attention=cudnn computes in bfloat16; compute_dtype={dtype}: set it, or {remedy}"
    if limit == 0:
        return f"attention=cudnn needs an NVIDIA GPU of Ampere's generation or newer: {remedy}"
    if head_dim % 8 or head_dim > limit:
        return (
            f"attention=cudnn wants heads whose width is a multiple of 8 and at most {limit};"
            f" head_dim={head_dim}: {remedy}"
        )
    if softcap is not None:
        return f"attention=cudnn has no soft cap of scores; attention_softcap={softcap}: {remedy}"
    return None


def platform() -> str:
    """Of the devices that compute: "cpu", "cuda", "rocm" or "tpu".

    They are those of the mesh of `jax.set_mesh`, else `jax.default_device`, else this process's first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    device = mesh.abstract_device or chosen or jax.local_devices()[0]
    name = str(getattr(device, "platform", device))
    if name != "gpu":
        return name
    return "cuda" if "cuda" in get_backend("gpu").platform_version else "rocm"


def causal(length: int, window: int | None) -> jax.Array:
    """bool [T, T]: who is before whom, and within the window."""
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _limit() -> int:
    """The widest head that cuDNN's kernel takes on this process's GPUs."""
    capability = float(getattr(jax.local_devices(backend="gpu")[0], "compute_capability", 0))
    return 256 if capability >= 9 else 128 if capability >= 8 else 0


def _cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    *,
    setting: AttentionSetting,
    window: int | None,
) -> jax.Array:
    length = query.shape[1]
    # its backward pass refuses odd lengths; nobody sees a token behind the row
    query, key, value, segments = _longer(query, key, value, segments, length + length % 2)
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=None if segments is None else _same_segment(segments),
        scale=setting.scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
    return mixed[:, :length]


def _splash(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    *,
    setting: AttentionSetting,
    window: int | None,
) -> jax.Array:
    # of use on TPUs only, and half a second to import
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads = query.shape[1], query.shape[2]
    block, padded = _blocks(length)
    scaled = (query.astype(jnp.float32) * setting.scale).astype(query.dtype)  # the kernel has no scale
    scaled, key, value, segments = _longer(scaled, key, value, segments, padded)
    shape = (padded, padded)
    seen = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        attn_logits_soft_cap=setting.softcap,
        interpret=setting.interpret,
    )
    ids = None if segments is None else splash.SegmentIds(segments, segments)
    rows = (x.swapaxes(1, 2) for x in (scaled, key, value))
    mixed = jax.vmap(kernel, in_axes=(0, 0, 0, None if ids is None else 0))(*rows, ids)
    return mixed.swapaxes(1, 2)[:, :length]


def _blocks(length: int) -> tuple[int, int]:
    """The kernel's block and the length to pad to: the largest block that adds at most an eighth."""
    least = -(-length // LANES) * LANES
    for block in BLOCKS:
        padded = -(-length // block) * block
        if 8 * padded <= 9 * least:
            return block, padded
    raise AssertionError("unreachable: the smallest block adds nothing")


def _longer(
    query: jax.Array, key: jax.Array, value: jax.Array, segments: jax.Array | None, length: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The same with zeros up to a length, behind all tokens and so seen by none of them."""
    add = length - query.shape[1]
    if add == 0:
        return query, key, value, segments
    query, key, value = (jnp.pad(x, ((0, 0), (0, add), (0, 0), (0, 0))) for x in (query, key, value))
    return query, key, value, None if segments is None else jnp.pad(segments, ((0, 0), (0, add)))


def _by_shard(
    kernel: Callable[..., jax.Array],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
) -> jax.Array:
    """A kernel, which the compiler cannot partition, on each device's rows and heads."""
    specs = context_specs({"B T N H": query.shape, "B T G H": key.shape, "B T": query.shape[:2]})
    if specs is None:
        return kernel(query, key, value, segments)
    groups, parts = key.shape[2], jax.sharding.get_abstract_mesh().shape["tensor"]
    if specs["B T N H"] != specs["B T G H"]:
        # a device has whole query heads but not whole key heads: it gets copies of those that it needs
        copies = math.lcm(groups, parts) // groups
        key, value = (jnp.repeat(x, copies, axis=2) for x in (key, value))
    of_heads, of_rows = specs["B T N H"], None if segments is None else specs["B T"]
    return jax.shard_map(
        kernel, in_specs=(of_heads, of_heads, of_heads, of_rows), out_specs=of_heads, check_vma=False
    )(query, key, value, segments)


def _same_segment(segments: jax.Array) -> jax.Array:
    """bool [B, 1, T, T] of int32 [B, T]."""
    return segments[:, None, :, None] == segments[:, None, None, :]


def _plain(
    query: jax.Array, key: jax.Array, value: jax.Array, setting: AttentionSetting, allowed: jax.Array
) -> jax.Array:
    """For XLA: query [B, T, N, H], key and value [B, S, G, H], allowed bool [B or 1, 1, T, S]."""
    batch, length, _, width = query.shape
    groups = key.shape[2]
    # A group's heads as the rows of one product; with an axis of their own, CPUs take 1.8 times as long
    # for the gradient. bfloat16 says so, or the backward pass multiplies in float32.
    split = query.reshape(batch, length, groups, -1, width).transpose(0, 2, 3, 1, 4)
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if query.dtype == jnp.bfloat16 else None
    scores = setting.scale * jnp.matmul(
        split.reshape(batch, groups, -1, width),
        key.transpose(0, 2, 3, 1),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    if setting.softcap is not None:
        scores = setting.softcap * jnp.tanh(scores / setting.softcap)
    # All in the product's shape: the backward pass keeps what is reshaped between the two a second time.
    seen = jnp.tile(allowed, (1, 1, query.shape[2] // groups, 1))
    least = jnp.finfo(jnp.float32).min  # not -inf: a row that may see nothing gets a mean, not NaN
    shares = jax.nn.softmax(jnp.where(seen, scores, least), axis=-1).astype(value.dtype)
    mixed = jnp.matmul(shares, value.swapaxes(1, 2))
    return mixed.reshape(batch, groups, -1, length, width).transpose(0, 3, 1, 2, 4).reshape(query.shape)
