"""One decoder-only transformer for every family we have, and `Model`, its pure functions.

NNX modules define the parameters and the arithmetic; everything outside this file sees a plain nested
dict of arrays. The layers are one module whose parameters carry a leading [L] axis, run by a scan, so
compile time does not grow with depth. The model returns hidden states and its unembedding, never
logits: a blockwise or vocabulary-parallel loss joins the two without holding [B, T, V].

Shape letters: B batch, T position, V vocabulary, D width, L layer, N query head, G key/value head,
H head width, F feed-forward width.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from xtoken_jax.errors import UserError
from xtoken_jax.mesh import constrain, named_sharding
from xtoken_jax.models.config import DecoderConfig, RopeScaling

Params = dict[str, Any]  # nested dict of arrays, the same keys as the modules' attributes
COMPUTE_DTYPES = ("float32", "bfloat16")


class Parameters:
    """Makes the parameters of one config: an array for shape letters, drawn from successive keys."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        c = config
        self.sizes = {"V": c.vocab_size, "D": c.hidden_size, "L": c.num_layers, "N": c.num_heads}
        self.sizes |= {"G": c.num_kv_heads, "H": c.head_dim, "F": c.intermediate_size}
        self.std = c.initializer_range
        self.rngs = nnx.Rngs(key)

    # The letters travel with each parameter; shardings and the weight files' layout are read from them.
    def normal(self, letters: str) -> nnx.Param:
        shape = self._shape(letters)
        return nnx.Param(self.std * jax.random.normal(self.rngs(), shape, jnp.float32), letters=letters)

    def ones(self, letters: str) -> nnx.Param:
        return nnx.Param(jnp.ones(self._shape(letters), jnp.float32), letters=letters)

    def _shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self.sizes[letter] for letter in letters.split())


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, make: Parameters):
        self.query = make.normal("L D N H")
        self.key = make.normal("L D G H")
        self.value = make.normal("L D G H")
        self.output = make.normal("L N H D")

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array | None) -> jax.Array:
        """x [B, T, D] -> [B, T, D], inside the scan, where the parameters have lost their [L] axis."""
        query = _rotate(jnp.einsum("btd,dnh->btnh", x, self.query[...].astype(x.dtype)), rope)
        key = _rotate(jnp.einsum("btd,dgh->btgh", x, self.key[...].astype(x.dtype)), rope)
        value = jnp.einsum("btd,dgh->btgh", x, self.value[...].astype(x.dtype))
        mixed = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=True)
        return jnp.einsum("btnh,nhd->btd", mixed, self.output[...].astype(x.dtype))


class FeedForward(nnx.Module):
    """SwiGLU."""

    def __init__(self, make: Parameters):
        self.gate = make.normal("L D F")
        self.up = make.normal("L D F")
        self.down = make.normal("L F D")

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = jax.nn.silu(jnp.einsum("btd,df->btf", x, self.gate[...].astype(x.dtype)))
        up = jnp.einsum("btd,df->btf", x, self.up[...].astype(x.dtype))
        return jnp.einsum("btf,fd->btd", gate * up, self.down[...].astype(x.dtype))


class Layer(nnx.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, make: Parameters, norm_eps: float):
        self.norm_eps = norm_eps
        self.attention_norm = make.ones("L D")
        self.attention = Attention(make)
        self.feed_forward_norm = make.ones("L D")
        self.feed_forward = FeedForward(make)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array | None) -> jax.Array:
        x = x + self.attention(_rms_norm(x, self.attention_norm[...], self.norm_eps), rope, mask)
        x = x + self.feed_forward(_rms_norm(x, self.feed_forward_norm[...], self.norm_eps))
        return constrain(x, "B T D")


class Decoder(nnx.Module):
    """The whole network; with tied embeddings there is no `unembedding` parameter at all."""

    def __init__(self, config: DecoderConfig, key: jax.Array):
        make = Parameters(config, key)
        self.config = config
        self.embedding = make.normal("V D")
        self.layers = Layer(make, config.norm_eps)
        self.final_norm = make.ones("D")
        if not config.tie_embeddings:
            self.unembedding = make.normal("V D")

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        mask: jax.Array | None,
        compute_dtype: jnp.dtype,
        remat: bool,
    ) -> tuple[jax.Array, jax.Array]:
        # an id outside the vocabulary gives NaN rather than some other token's row
        x = self.embedding[...].at[tokens].get(mode="fill", fill_value=jnp.nan).astype(compute_dtype)
        x = constrain(x, "B T D")
        angles = positions.astype(jnp.float32)[:, :, None] * _inverse_frequencies(self.config)[None, None, :]
        rope = (jnp.cos(angles), jnp.sin(angles))
        graph, stacked = nnx.split(self.layers)

        def body(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(x, rope, mask), None

        # a scan already keeps the backward pass from sharing work with the forward one
        body_fn: Callable = jax.checkpoint(body, prevent_cse=False) if remat else body
        x, _ = jax.lax.scan(body_fn, x, stacked)
        hidden = _rms_norm(x, self.final_norm[...], self.config.norm_eps)
        unembedding = self.embedding if self.config.tie_embeddings else self.unembedding
        return hidden, unembedding[...].astype(compute_dtype)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its parameters: hashable, so static under `jax.jit`, with pure functions.

    Two models with the same fields are equal, and share one compilation.

    Args:
        config: sizes and settings.
        compute_dtype: "float32" or "bfloat16", of activations and matrix products; norms, rotary
            positions and softmax are float32 in either.
        remat: recompute each layer in the backward pass instead of keeping its activations.

    Raises:
        UserError: another compute dtype.
    """

    config: DecoderConfig
    compute_dtype: str = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise UserError(f"compute_dtype={self.compute_dtype!r}; supported: {', '.join(COMPUTE_DTYPES)}")

    def __call__(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states after the final norm, and the unembedding to join them with.

        Args:
            params: what `init` or `load_model` returned, in float32 or bfloat16.
            tokens: [B, T] int32; an id of `vocab_size` or above makes its row of the output NaN.
            positions: [B, T] int32, rotary positions; by default 0..T-1. Only differences matter, so
                the default serves left padding too.
            mask: [B, T] bool, True at real tokens: the others are attended by nobody but themselves,
                on whichever side they are. None: causal only.

        Returns:
            hidden [B, T, D] and unembedding [V, D], both in the compute dtype.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        decoder = nnx.merge(self.graphdef, params)
        attend = None if mask is None else _attention_mask(mask)
        return decoder(tokens, positions, attend, jnp.dtype(self.compute_dtype), self.remat)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters: normal with std `initializer_range`, norms one.

        The values do not depend on the mesh: jit this with `out_shardings=model.param_shardings(mesh)`.
        """
        return nnx.to_pure_dict(nnx.state(Decoder(self.config, key)))

    def abstract(self, mesh: Mesh | None = None, dtype: str = "float32") -> Params:
        """The parameters as `jax.ShapeDtypeStruct`s, with shardings where a mesh is given."""
        struct = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
        if mesh is None:
            return jax.tree.map(lambda x: struct(x.shape), self._shapes)
        shardings = self.param_shardings(mesh)
        return jax.tree.map(lambda x, s: struct(x.shape, sharding=s), self._shapes, shardings)

    def param_shardings(self, mesh: Mesh) -> Params:
        """A NamedSharding for each parameter; an axis that does not divide its dimension is dropped."""
        return jax.tree.map(lambda n, x: named_sharding(mesh, n, x.shape), self.letters, self._shapes)

    @property
    def letters(self) -> Params:
        """The shape letters of each parameter, such as "L D N H"."""
        return self._split[2]

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The NNX structure that `nnx.merge(graphdef, params)` turns into a `Decoder`."""
        return self._split[0]

    @property
    def _shapes(self) -> Params:
        return self._split[1]

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, Params, Params]:
        make = functools.partial(Decoder, self.config)
        graphdef, state = nnx.split(nnx.eval_shape(make, jax.random.key(0)))
        is_param = lambda x: isinstance(x, nnx.Param)  # noqa: E731
        letters = jax.tree.map(lambda p: p.get_metadata("letters"), state, is_leaf=is_param)
        return graphdef, nnx.to_pure_dict(state), nnx.to_pure_dict(letters)


def logits(hidden: jax.Array, unembedding: jax.Array, *, softcap: float | None = None) -> jax.Array:
    """hidden [B, T, D], unembedding [V, D] -> [B, T, V] float32, whatever the inputs are in.

    With a `softcap` c > 0, such as `DecoderConfig.logit_softcap`, they are c tanh(logits / c), within
    -c and c (Gemma 2, arXiv 2408.00118, section 2).
    """
    raw = jnp.einsum("btd,vd->btv", hidden, unembedding, preferred_element_type=jnp.float32)
    return raw if softcap is None else softcap * jnp.tanh(raw / softcap)


def _attention_mask(mask: jax.Array) -> jax.Array:
    """Real tokens [B, T] -> who may be attended [B, 1, T, T]; causality is added by the attention.

    A padding position sees itself, so that no row of the softmax is empty.
    """
    itself = jnp.eye(mask.shape[1], dtype=bool)[None, None, :, :]
    return mask[:, None, None, :] | itself


def _rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [B, T, D] over its width in float32, times weight [D]."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)[None, None, :]).astype(x.dtype)


def _rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotary positions on x [B, T, heads, H], halves paired (Hugging Face's layout), in float32."""
    cos, sin = (part[:, :, None, :] for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _inverse_frequencies(config: DecoderConfig) -> np.ndarray:
    """[H / 2] float32 radians a position, computed in float32 as the checkpoints' own code does."""
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies = np.float32(1) / np.power(np.float32(config.rope_theta), exponent)
    return _llama3(frequencies, config.rope_scaling) if config.rope_scaling else frequencies


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are slowed by `factor`, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / frequencies
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position_embeddings / wavelength
    keep = np.clip((turns - low) / (high - low), 0, 1)
    return ((1 - keep) * frequencies / scaling.factor + keep * frequencies).astype(np.float32)
