"""Attention of one layer: grouped queries, windows, segments, soft caps, with and without a cache.

Shape letters: B batch, T query position, S key position, N query head, G key/value head, H head width.
"""

import dataclasses

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("xla", "cudnn")


@dataclasses.dataclass(frozen=True)
class AttentionSetting:
    """What is the same in all calls of a layer; hashable.

    Attributes:
        scale: of the scores.
        softcap: c of c tanh(score / c), or None.
        implementation: "xla" anywhere; "cudnn" on NVIDIA GPUs, in bfloat16.
    """

    scale: float
    softcap: float | None = None
    implementation: str = "xla"


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    setting: AttentionSetting,
    *,
    window: int | None = None,
    allowed: jax.Array | None = None,
) -> jax.Array:
    """Causal self-attention over whole rows.

    Args:
        query: [B, T, N, H].
        key, value: [B, T, G, H]; N is a multiple of G.
        setting: scale, soft cap and implementation.
        window: how many positions a token sees, its own included; None: all before it.
        allowed: bool [B, 1, T, T], pairs of the same segment; None: all.

    Returns:
        [B, T, N, H] in query's dtype; softmax in float32.
    """
    length = query.shape[1]
    window = None if window is None or window >= length else window
    if setting.softcap is not None:
        seen = causal(length, window)[None, None, :, :]
        return _with_mask(query, key, value, setting, seen if allowed is None else seen & allowed)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=allowed,
        scale=setting.scale,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn" if setting.implementation == "cudnn" else "xla",
    )


def attend_cached(
    query: jax.Array, key: jax.Array, value: jax.Array, setting: AttentionSetting, allowed: jax.Array
) -> jax.Array:
    """New tokens over a cache: query [B, T, N, H], key and value [B, S, G, H], allowed bool [B, 1, T, S]."""
    return _with_mask(query, key, value, setting, allowed)


def causal(length: int, window: int | None) -> jax.Array:
    """bool [T, T]: who is before whom, and within the window."""
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _with_mask(
    query: jax.Array, key: jax.Array, value: jax.Array, setting: AttentionSetting, allowed: jax.Array
) -> jax.Array:
    """The plain form, for what the library's call does not offer: soft caps, and queries behind a cache."""
    groups = key.shape[2]
    grouped = query.reshape(*query.shape[:2], groups, -1, query.shape[-1])
    scores = jnp.einsum("btgmh,bsgh->bgmts", grouped, key, preferred_element_type=jnp.float32) * setting.scale
    if setting.softcap is not None:
        scores = setting.softcap * jnp.tanh(scores / setting.softcap)
    least = jnp.finfo(jnp.float32).min  # not -inf: a row that may see nothing gets a mean, not NaN
    shares = jax.nn.softmax(jnp.where(allowed[:, :, None], scores, least), axis=-1).astype(value.dtype)
    return jnp.einsum("bgmts,bsgh->btgmh", shares, value).reshape(query.shape)
