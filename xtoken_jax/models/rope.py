"""Rotary positions: frequencies of every kind of scaling, and the rotation.

Shape letters: B batch, T position, H head width, R half of the rotated width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling of the rotary frequencies (`rope_type` "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """All rotary frequencies divided by `factor` (`rope_type` "linear"), as in Gemma 3 from 4B on."""

    factor: float


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): each frequency divided by a factor of its own, in two sets.

    The long set holds from the first sequence with more positions than the model was pretrained with. Cosines
    and sines are multiplied by `attention_factor`.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): short wavelengths kept, long ones divided by `factor`, a ramp between them.

    The ramp lies between the dimensions that turn `beta_fast` and `beta_slow` times within the pretrained
    length, rounded outwards to whole dimensions with `truncate`. Cosines and sines are multiplied by
    `attention_factor`.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


RopeScaling = Llama3Scaling | LinearScaling | LongRope | Yarn


Angles = tuple[jax.Array, jax.Array]  # cosines and sines [B, T, R] float32


def angles(
    positions: jax.Array,
    dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    segments: jax.Array | None = None,
) -> Angles:
    """Cosines and sines for positions.

    Args:
        positions: [B, T] int32.
        dim: rotated width, even.
        theta: base of the frequencies.
        scaling: how they are scaled. LongRoPE's long set is taken where the largest position of
            the whole batch is past the pretrained length, as `transformers` does.
        segments: [B, T] int32 of packed rows, in each of which the largest of its own positions decides.

    Returns:
        Two float32 [B, T, dim / 2].
    """
    # in float32 throughout, as the checkpoints' own code does
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = np.power(np.float32(theta), exponent)
    frequencies = jnp.asarray(np.float32(1) / power)[None, None, :]
    factor = 1.0
    if isinstance(scaling, LinearScaling):
        frequencies = frequencies / np.float32(scaling.factor)
    elif isinstance(scaling, Llama3Scaling):
        frequencies = jnp.asarray(_llama3(np.float32(1) / power, scaling))[None, None, :]
    elif isinstance(scaling, Yarn):
        frequencies = jnp.asarray(_yarn(power, theta, scaling))[None, None, :]
        factor = scaling.attention_factor
    elif isinstance(scaling, LongRope):
        factors = (np.asarray(f, np.float32) for f in (scaling.short_factor, scaling.long_factor))
        short, long = ((np.float32(1) / (f * power))[None, None, :] for f in factors)
        past = positions >= scaling.original_max_position_embeddings
        if segments is None:
            is_long = past.any(keepdims=True)[..., None]
        else:
            same = segments[:, :, None] == segments[:, None, :]
            is_long = (same & past[:, None, :]).any(axis=-1, keepdims=True)
        frequencies = jnp.where(is_long, long, short)
        factor = scaling.attention_factor
    turned = positions.astype(jnp.float32)[:, :, None] * frequencies
    return jnp.cos(turned) * factor, jnp.sin(turned) * factor


def rotate(x: jax.Array, rope: Angles) -> jax.Array:
    """Turns the first 2 R dimensions of x [B, T, heads, H], halves paired (Hugging Face's layout).

    In float32; the result has x's dtype.
    """
    cos, sin = (part[:, :, None, :] for part in rope)
    half = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / wavelength
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)


def _yarn(power: np.ndarray, theta: float, scaling: Yarn) -> np.ndarray:
    """Frequencies float32 [R] from theta ** (2 i / dim), in the order of operations of `transformers`."""
    dim = 2 * len(power)

    def dimension(turns: float) -> float:
        """The dimension that turns so often within the pretrained length."""
        pretrained = scaling.original_max_position_embeddings
        return dim * math.log(pretrained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001
    ramp = np.clip((np.arange(len(power), dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    keep = 1 - ramp
    kept, divided = np.float32(1) / power, np.float32(1) / (np.float32(scaling.factor) * power)
    return (divided * (1 - keep) + kept * keep).astype(np.float32)
