"""The modules of the decoder: what its parameters are, and the arithmetic of one forward pass.

NNX modules define the parameters; the layers are one module whose parameters carry a leading [L] axis, run
by a scan, so compile time does not grow with depth. `decoder.py` has the pure functions over them.

Shape letters: B batch, T position, S cached position, V vocabulary, D width, L layer, N query head,
G key/value head, H head width, F feed-forward width, R rank of an adapter.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from xtoken_jax.distributed.mesh import constrain
from xtoken_jax.models.attention import AttentionSetting, attend, attend_cached
from xtoken_jax.models.config import DecoderConfig, LoraConfig
from xtoken_jax.models.rope import Angles, angles, rotate

# What the forward pass keeps of a layer for the backward one.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # a kernel's product has a derivative of its own and goes by name; an adapter's are plain
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("product"),
    ),
}


class Cache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
        key, value: [L, B, S, G, H], in the compute dtype.
        filled: int32 scalar, how many of S are written; all rows are at the same place.
        real: bool [B, S], slots of real tokens, not of padding.
    """

    key: jax.Array
    value: jax.Array
    filled: jax.Array
    real: jax.Array


class Parameters:
    """Makes the parameters of one config: an array for shape letters, drawn from successive keys."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, key: jax.Array):
        c = config
        self.config, self.lora = config, lora
        self.sizes = {"V": c.vocab_size, "D": c.hidden_size, "L": c.num_layers, "N": c.num_heads}
        self.sizes |= {"G": c.num_kv_heads, "H": c.head_dim, "F": c.intermediate_size}
        self.sizes["R"] = 0 if lora is None else lora.rank
        self.std = c.initializer_range
        self.rngs = nnx.Rngs(key)

    # The letters travel with each parameter; shardings and the weight files' layout are read from them.
    def normal(self, letters: str, std: float | None = None) -> nnx.Param:
        shape = self._shape(letters)
        std = self.std if std is None else std
        return nnx.Param(std * jax.random.normal(self.rngs(), shape, jnp.float32), letters=letters)

    def constant(self, letters: str, value: float) -> nnx.Param:
        return nnx.Param(jnp.full(self._shape(letters), value, jnp.float32), letters=letters)

    def norm(self, letters: str) -> nnx.Param:
        """A scale that leaves its input as it is."""
        return self.constant(letters, 0.0 if self.config.unit_offset_norms else 1.0)

    def linear(self, module: nnx.Module, name: str, inputs: str, outputs: str, bias: bool) -> None:
        """A kernel `name`, its bias and its adapter, as attributes of a module."""
        setattr(module, name, self.normal(f"L {inputs} {outputs}"))
        if bias:
            setattr(module, f"{name}_bias", self.constant(f"L {outputs}", 0.0))
        if self.lora is not None and name in self.lora.targets:
            # the usual start: the adapter adds nothing at first
            fan_in = self._shape(inputs)
            setattr(
                module, f"{name}_lora_a", self.normal(f"L {inputs} R", std=float(math.prod(fan_in)) ** -0.5)
            )
            setattr(module, f"{name}_lora_b", self.constant(f"L R {outputs}", 0.0))

    def _shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self.sizes[letter] for letter in letters.split())


class Linear(nnx.Module):
    """What modules with kernels share."""

    def __init__(self, make: Parameters):
        self.lora_scale = 0.0 if make.lora is None else make.lora.alpha / make.lora.rank

    def product(self, x: jax.Array, name: str, inputs: str, outputs: str) -> jax.Array:
        """x [B, T, inputs] times a kernel, its bias and adapter added where there are such."""
        kernel = getattr(self, name)[...].astype(x.dtype)
        y = checkpoint_name(_product(inputs, outputs, x, kernel), "product")
        if hasattr(self, f"{name}_lora_a"):
            first, second = (getattr(self, f"{name}_lora_{part}")[...].astype(x.dtype) for part in "ab")
            low = jnp.einsum(f"bt{inputs},{inputs}r->btr", x, first)
            y += self.lora_scale * jnp.einsum(f"btr,r{outputs}->bt{outputs}", low, second)
        if hasattr(self, f"{name}_bias"):
            y += getattr(self, f"{name}_bias")[...].astype(x.dtype)[None, None]
        return y


class LayerInput(NamedTuple):
    """What every layer gets beside the residual stream.

    Attributes:
        rope: angles of layers without and with a sliding window; one and the same where they do not differ.
        segments: int32 [B, T], a token sees those with its own number; None: all, and with a cache.
        allowed: with a cache, what is seen of it, without and with the window: bool [B, 1, T, S].
        new_at: where the cache is written, None without one.
    """

    rope: tuple[Angles, Angles]
    segments: jax.Array | None
    allowed: tuple[jax.Array | None, jax.Array | None]
    new_at: jax.Array | None


class Attention(Linear):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, make: Parameters, implementation: str):
        super().__init__(make)
        config = make.config
        make.linear(self, "query", "D", "N H", config.qkv_bias)
        make.linear(self, "key", "D", "G H", config.qkv_bias)
        make.linear(self, "value", "D", "G H", config.qkv_bias)
        make.linear(self, "output", "N H", "D", config.output_bias)
        if config.qk_norm:
            self.query_norm = make.norm("L H")
            self.key_norm = make.norm("L H")
        self.config = config
        scalar = config.head_dim if config.query_pre_attn_scalar is None else config.query_pre_attn_scalar
        self.setting = AttentionSetting(scalar**-0.5, config.attention_softcap, implementation)

    def __call__(
        self,
        x: jax.Array,
        inputs: LayerInput,
        sliding: jax.Array | bool,
        cache: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """x [B, T, D] -> [B, T, D], inside the scan, where the parameters have lost their [L] axis."""
        query, key = self.product(x, "query", "d", "nh"), self.product(x, "key", "d", "gh")
        value = self.product(x, "value", "d", "gh")
        if self.config.qk_norm:
            query = _rms_norm(query, self.query_norm[...], self.config)
            key = _rms_norm(key, self.key_norm[...], self.config)
        rope = _choose(sliding, *inputs.rope)
        query, key = rotate(query, rope), rotate(key, rope)
        if cache is None:
            mixed = self._whole(query, key, value, inputs, sliding)
        else:
            assert inputs.new_at is not None
            at = (0, inputs.new_at, 0, 0)
            keys = jax.lax.dynamic_update_slice(cache[0], key.astype(cache[0].dtype), at)
            values = jax.lax.dynamic_update_slice(cache[1], value.astype(cache[1].dtype), at)
            cache = keys, values
            allowed = _choose(sliding, *inputs.allowed)
            mixed = attend_cached(query, *cache, self.setting, allowed)
        return self.product(mixed, "output", "nh", "d"), cache

    def _whole(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        inputs: LayerInput,
        sliding: jax.Array | bool,
    ) -> jax.Array:
        def run(window: int | None) -> Callable:
            return lambda: attend(query, key, value, self.setting, window=window, segments=inputs.segments)

        window = self.config.sliding_window
        if window is None or window >= query.shape[1] or sliding is False:
            return run(None)()
        # of two kinds of layers, only the one at hand is computed
        return run(window)() if sliding is True else jax.lax.cond(sliding, run(window), run(None))


class FeedForward(Linear):
    """A gated feed-forward: SwiGLU, or with tanh's GELU."""

    def __init__(self, make: Parameters):
        super().__init__(make)
        for name, inputs, outputs in (("gate", "D", "F"), ("up", "D", "F"), ("down", "F", "D")):
            make.linear(self, name, inputs, outputs, make.config.mlp_bias)
        self.activation = make.config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = self.product(x, "gate", "d", "f"), self.product(x, "up", "d", "f")
        return self.product(_gated(self.activation, gate, up), "down", "f", "d")


class Layer(nnx.Module):
    """Attention and feed-forward, a norm before each and, in Gemma, behind each, added to the stream."""

    def __init__(self, make: Parameters, implementation: str):
        self.config = make.config
        self.attention_norm = make.norm("L D")
        self.attention = Attention(make, implementation)
        self.feed_forward_norm = make.norm("L D")
        self.feed_forward = FeedForward(make)
        if make.config.post_norms:
            self.attention_post_norm = make.norm("L D")
            self.feed_forward_post_norm = make.norm("L D")

    def __call__(
        self,
        x: jax.Array,
        inputs: LayerInput,
        sliding: jax.Array | bool,
        cache: tuple[jax.Array, jax.Array] | None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        config, post = self.config, self.config.post_norms
        y, cache = self.attention(_rms_norm(x, self.attention_norm[...], config), inputs, sliding, cache)
        x = x + (_rms_norm(y, self.attention_post_norm[...], config) if post else y)
        y = self.feed_forward(_rms_norm(x, self.feed_forward_norm[...], config))
        x = x + (_rms_norm(y, self.feed_forward_post_norm[...], config) if post else y)
        return constrain(x, "B T D"), cache


class Decoder(nnx.Module):
    """The whole network; with tied embeddings there is no `unembedding` parameter at all."""

    def __init__(self, config: DecoderConfig, lora: LoraConfig | None, implementation: str, key: jax.Array):
        make = Parameters(config, lora, key)
        self.config = config
        self.embedding = make.normal("V D")
        self.layers = Layer(make, implementation)
        self.final_norm = make.norm("D")
        if not config.tie_embeddings:
            self.unembedding = make.normal("V D")

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segments: jax.Array | None,
        packed: jax.Array | None,
        cache: Cache | None,
        dtype: jnp.dtype,
        remat: str,
        keep_all: bool,
    ) -> tuple[jax.Array, jax.Array, Cache | None, jax.Array | None]:
        config = self.config
        # an id outside the vocabulary gives NaN rather than some other token's row
        x = self.embedding[...].at[tokens].get(mode="fill", fill_value=jnp.nan).astype(dtype)
        if config.scale_embedding:
            x = x * jnp.asarray(config.hidden_size**0.5, dtype)  # rounded as the checkpoints' own code does
        x = start = constrain(x, "B T D")
        inputs = self._inputs(positions, segments, packed, cache)
        graph, stacked = nnx.split(self.layers)
        kinds = set(config.sliding)
        flags = jnp.asarray(config.sliding) if len(kinds) > 1 else None

        def body(x: jax.Array, of_layer: tuple) -> tuple[jax.Array, tuple]:
            layer, flag, stored = of_layer
            sliding = config.sliding[0] if flag is None else flag
            x, stored = nnx.merge(graph, layer)(x, inputs, sliding, stored)
            return x, (stored, x if keep_all else None)

        # a scan already keeps the backward pass from sharing work with the forward one
        policy = REMAT[remat]
        body_fn: Callable = body if policy is None else jax.checkpoint(body, prevent_cse=False, policy=policy)
        stored = None if cache is None else (cache.key, cache.value)
        x, (stored, every) = jax.lax.scan(body_fn, x, (stacked, flags, stored))
        hidden = _rms_norm(x, self.final_norm[...], config)
        unembedding = self.embedding if config.tie_embeddings else self.unembedding
        if cache is not None and stored is not None:
            cache = Cache(stored[0], stored[1], cache.filled + tokens.shape[1], cache.real)
        if every is not None:
            every = jnp.concatenate([start[None], every[:-1], hidden[None]])
        return hidden, unembedding[...].astype(dtype), cache, every

    def _inputs(
        self,
        positions: jax.Array,
        segments: jax.Array | None,
        packed: jax.Array | None,
        cache: Cache | None,
    ) -> LayerInput:
        """Segments are who sees whom, those of packed rows what is a text of its own."""
        config = self.config
        full = local = angles(positions, config.rotary_dim, config.rope_theta, config.rope_scaling, packed)
        if config.sliding_rope_theta is not None:
            local = angles(positions, config.rotary_dim, config.sliding_rope_theta)
        if cache is None:
            return LayerInput((full, local), segments, (None, None), None)
        slots = jnp.arange(cache.real.shape[1])
        distance = (cache.filled + jnp.arange(positions.shape[1]))[:, None] - slots[None, :]
        seen = (distance >= 0)[None, None] & cache.real[:, None, None, :]
        window = config.sliding_window
        near = seen if window is None else seen & (distance < window)[None, None]
        return LayerInput((full, local), None, (seen, near), cache.filled)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(inputs: str, outputs: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [B, T, inputs] times kernel [inputs, outputs], such as "nh" and "d".

    The derived gradient of the kernel puts the output's gradient first, for which XLA on CPUs transposes it
    while it computes it, element by element: a fifth of a layer's backward pass.
    """
    return jnp.einsum(f"bt{inputs},{inputs}{outputs}->bt{outputs}", x, kernel)


def _product_forward(
    inputs: str, outputs: str, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(inputs, outputs, x, kernel), (x, kernel)


def _product_backward(
    inputs: str, outputs: str, kept: tuple[jax.Array, jax.Array], slope: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    by_x = jnp.einsum(f"bt{outputs},{inputs}{outputs}->bt{inputs}", slope, kernel)
    return by_x, jnp.einsum(f"bt{inputs},bt{outputs}->{inputs}{outputs}", x, slope)


_product.defvjp(_product_forward, _product_backward)


def _choose(sliding: jax.Array | bool, without: Any, within: Any) -> Any:
    """Of two trees, the one of this layer's kind."""
    if isinstance(sliding, bool) or without is within:
        return within if sliding is True else without
    return jax.tree.map(lambda a, b: jnp.where(sliding, b, a), without, within)


@functools.partial(jax.checkpoint, static_argnums=0, prevent_cse=False)
def _gated(activation: str, gate: jax.Array, up: jax.Array) -> jax.Array:
    """[B, T, F]; recomputed for the backward pass, which would keep three more arrays of that size."""
    gate = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return gate * up


@functools.partial(jax.checkpoint, static_argnums=2, prevent_cse=False)
def _rms_norm(x: jax.Array, weight: jax.Array, config: DecoderConfig) -> jax.Array:
    """x [..., D] over its last axis in float32, times weight [D], or 1 + weight."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    factor = weight.astype(jnp.float32) + (1.0 if config.unit_offset_norms else 0.0)
    return (wide * scale * factor.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)
