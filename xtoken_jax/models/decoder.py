"""One decoder-only transformer for every family we have, and `Model`, its pure functions.

NNX modules define the parameters and the arithmetic; everything outside this file sees a plain nested
dict of arrays. The layers are one module whose parameters carry a leading [L] axis, run by a scan, so
compile time does not grow with depth. The model returns hidden states and its unembedding, never
logits: a blockwise or vocabulary-parallel loss joins the two without holding [B, T, V].

Shape letters: B batch, T position, S cached position, V vocabulary, D width, L layer, N query head,
G key/value head, H head width, F feed-forward width, R rank of an adapter.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from xtoken_jax.errors import UserError
from xtoken_jax.mesh import constrain, named_sharding
from xtoken_jax.models.attention import (
    IMPLEMENTATIONS,
    AttentionSetting,
    attend,
    attend_cached,
)
from xtoken_jax.models.config import DecoderConfig
from xtoken_jax.models.lora import LoraConfig
from xtoken_jax.models.rope import Angles, angles, rotate

Params = dict[str, Any]  # nested dict of arrays, the same keys as the modules' attributes
COMPUTE_DTYPES = ("float32", "bfloat16")
# What the forward pass keeps of a layer for the backward one.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
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
        y = jnp.einsum(f"bt{inputs},{inputs}{outputs}->bt{outputs}", x, kernel)
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
        allowed: which pairs may see each other, without and with the window: bool [B, 1, T, S].
        new_at: where the cache is written, None without one.
    """

    rope: tuple[Angles, Angles]
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
            return lambda: attend(query, key, value, self.setting, window=window, allowed=inputs.allowed[0])

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
        gate = jax.nn.silu(gate) if self.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        return self.product(gate * up, "down", "f", "d")


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
        allowed: jax.Array | None,
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
        inputs = self._inputs(positions, allowed, cache)
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

    def _inputs(self, positions: jax.Array, allowed: jax.Array | None, cache: Cache | None) -> LayerInput:
        config = self.config
        full = local = angles(positions, config.rotary_dim, config.rope_theta, config.rope_scaling)
        if config.sliding_rope_theta is not None:
            local = angles(positions, config.rotary_dim, config.sliding_rope_theta)
        if cache is None:
            return LayerInput((full, local), (allowed, allowed), None)
        slots = jnp.arange(cache.real.shape[1])
        distance = (cache.filled + jnp.arange(positions.shape[1]))[:, None] - slots[None, :]
        seen = (distance >= 0)[None, None] & cache.real[:, None, None, :]
        window = config.sliding_window
        near = seen if window is None else seen & (distance < window)[None, None]
        return LayerInput((full, local), (seen, near), cache.filled)


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder without its parameters: hashable, so static under `jax.jit`, with pure functions.

    Two models with the same fields are equal, and share one compilation.

    Args:
        config: sizes and settings.
        compute_dtype: "float32" or "bfloat16", of activations and matrix products; norms, rotary
            positions and softmax are float32 in either.
        remat: what a layer keeps for the backward pass: "none" recomputes nothing, "full" recomputes a layer
            from its input, "dots" all but its matrix products.
        attention: "xla" anywhere, or "cudnn" on NVIDIA GPUs with bfloat16.
        lora: adapters on some kernels; None: none.

    Raises:
        UserError: another compute dtype, remat or attention.
    """

    config: DecoderConfig
    compute_dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        for name, supported in (
            ("compute_dtype", COMPUTE_DTYPES),
            ("remat", tuple(REMAT)),
            ("attention", IMPLEMENTATIONS),
        ):
            if (value := getattr(self, name)) not in supported:
                raise UserError(f"{name}={value!r}; supported: {', '.join(supported)}")

    def __call__(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states after the final norm, and the unembedding to join them with.

        Args:
            params: what `init` or `load_model` returned, in float32 or bfloat16.
            tokens: [B, T] int32; an id of `vocab_size` or above makes its row of the output NaN.
            positions: [B, T] int32, rotary positions; by default 0..T-1, also in later segments and behind
                padding: only differences matter. (LongRoPE also asks whether the largest is past the
                pretrained length.)
            mask: [B, T] bool, True at real tokens, on whichever side the others are. The others are seen
                by no real token. None: all are real.
            segments: [B, T] int32 of packed rows: a token sees those before it with its own number.

        Returns:
            hidden [B, T, D] and unembedding [V, D], both in the compute dtype. Logits are `logits(hidden,
            unembedding, softcap=model.config.logit_softcap)`.
        """
        hidden, unembedding, _, _ = self._run(params, tokens, positions, mask, segments)
        return hidden, unembedding

    def hidden_states(
        self,
        params: Params,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        mask: jax.Array | None = None,
        segments: jax.Array | None = None,
    ) -> jax.Array:
        """[L + 1, B, T, D]: the embeddings, each layer's output, the last one behind the final norm.

        Arguments as in `__call__`.
        """
        every = self._run(params, tokens, positions, mask, segments, keep_all=True)[3]
        assert every is not None
        return every

    def init_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for `length` tokens of `batch` rows, padding included."""
        c = self.config
        shape = (c.num_layers, batch, length, c.num_kv_heads, c.head_dim)
        # two arrays: one would be donated twice
        key, value = (jnp.zeros(shape, jnp.dtype(self.compute_dtype)) for _ in range(2))
        return Cache(key, value, jnp.int32(0), jnp.zeros((batch, length), bool))

    def extend(
        self,
        params: Params,
        tokens: jax.Array,
        cache: Cache,
        *,
        positions: jax.Array,
        mask: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, Cache]:
        """New tokens behind those in a cache.

        Args:
            params: as in `__call__`.
            tokens: [B, T] int32.
            cache: with room for T more.
            positions: [B, T] int32, rotary positions, by which a row padded on the left counts from its text.
            mask: [B, T] bool, real tokens. None: all.

        Returns:
            hidden [B, T, D], unembedding [V, D] and the cache with the new tokens.
        """
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        real = jax.lax.dynamic_update_slice(cache.real, mask, (0, cache.filled))
        hidden, unembedding, after, _ = self._run(
            params, tokens, positions, None, None, cache=cache._replace(real=real)
        )
        assert after is not None
        return hidden, unembedding, after

    def _run(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array | None,
        mask: jax.Array | None,
        segments: jax.Array | None,
        *,
        cache: Cache | None = None,
        keep_all: bool = False,
    ) -> tuple[jax.Array, jax.Array, Cache | None, jax.Array | None]:
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None, :], tokens.shape)
        decoder = nnx.merge(self.graphdef, params)
        dtype = jnp.dtype(self.compute_dtype)
        allowed = _allowed(mask, segments)
        return decoder(tokens, positions, allowed, cache, dtype, self.remat, keep_all)

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters: normal with std `initializer_range`, norms that scale by one.

        The values do not depend on the mesh: jit this with `out_shardings=model.param_shardings(mesh)`.
        """
        return nnx.to_pure_dict(nnx.state(self._make(key)))

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

    def _make(self, key: jax.Array) -> Decoder:
        return Decoder(self.config, self.lora, self.attention, key)

    @functools.cached_property
    def _split(self) -> tuple[nnx.GraphDef, Params, Params]:
        graphdef, state = nnx.split(nnx.eval_shape(self._make, jax.random.key(0)))
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


def _allowed(mask: jax.Array | None, segments: jax.Array | None) -> jax.Array | None:
    """Which pairs are of one segment, bool [B, 1, T, T]; causality is added by the attention.

    Padding is a segment of its own, so that no row of the softmax is empty.
    """
    if mask is None and segments is None:
        return None
    parts = [part for part in (mask, segments) if part is not None]
    same = [part[:, None, :, None] == part[:, None, None, :] for part in parts]
    return functools.reduce(jnp.logical_and, same)


def _choose(sliding: jax.Array | bool, without: Any, within: Any) -> Any:
    """Of two trees, the one of this layer's kind."""
    if isinstance(sliding, bool) or without is within:
        return within if sliding is True else without
    return jax.tree.map(lambda a, b: jnp.where(sliding, b, a), without, within)


def _rms_norm(x: jax.Array, weight: jax.Array, config: DecoderConfig) -> jax.Array:
    """x [..., D] over its last axis in float32, times weight [D], or 1 + weight."""
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + config.norm_eps)
    factor = weight.astype(jnp.float32) + (1.0 if config.unit_offset_norms else 0.0)
    return (wide * scale * factor.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)
