"""`Model`: one decoder-only transformer for every family we have, as pure functions.

Everything outside of `models` sees a plain nested dict of arrays. The model returns hidden states and its
unembedding, never logits: a blockwise or vocabulary-parallel loss joins the two without holding [B, T, V].

Shape letters: B batch, T position, S cached position, V vocabulary, D width, L layer, N query head,
G key/value head, H head width, F feed-forward width.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from xtoken_jax.distributed.mesh import named_sharding
from xtoken_jax.errors import UserError
from xtoken_jax.models.attention import IMPLEMENTATIONS, cudnn_lacks
from xtoken_jax.models.config import DecoderConfig, LoraConfig
from xtoken_jax.models.network import REMAT, Cache, Decoder

Params = dict[str, Any]  # nested dict of arrays, the same keys as the modules' attributes
COMPUTE_DTYPES = ("float32", "bfloat16")


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
        attention: "xla" anywhere, "cudnn" on NVIDIA GPUs in bfloat16, "splash" on TPUs, or "auto": the one of
            the three that fits. On a mesh of several devices cuDNN and splash need `jax.set_mesh`.
        lora: adapters on some kernels; None: none.

    Raises:
        UserError: another compute dtype, remat or attention, or an attention that cannot do what is asked.
    """

    config: DecoderConfig
    compute_dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        for name, supported in (
            ("compute_dtype", COMPUTE_DTYPES),
            ("remat", tuple(REMAT)),
            ("attention", IMPLEMENTATIONS),
        ):
            if (value := getattr(self, name)) not in supported:
                raise UserError(f"{name}={value!r}; supported: {', '.join(supported)}")
        config = self.config
        lack = cudnn_lacks(self.compute_dtype, config.head_dim, config.attention_softcap)
        if self.attention == "cudnn" and lack is not None:
            raise UserError(lack)

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
            positions: [B, T] int32, rotary positions; by default from 0 on in each segment, without
                segments 0..T-1, also behind padding: only differences matter. (LongRoPE also asks whether the
                largest is past the pretrained length: of each segment, else of the whole batch.)
            mask: [B, T] bool, True at real tokens, on whichever side the others are. The others are seen
                by no real token. None: all are real.
            segments: [B, T] int32 of packed rows: a token sees those before it with its own number. Each is
                one run of positions.

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
            positions = positions if segments is None else positions - _first(segments)
        decoder = nnx.merge(self.graphdef, params)
        dtype = jnp.dtype(self.compute_dtype)
        numbers = _numbered(mask, segments)
        return decoder(tokens, positions, numbers, segments, cache, dtype, self.remat, keep_all)

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


def _numbered(mask: jax.Array | None, segments: jax.Array | None) -> jax.Array | None:
    """One number a token, int32 [B, T]: tokens with the same one may see each other.

    Padding is a segment of its own, so that no row of the softmax is empty.
    """
    if mask is None or segments is None:
        return segments if mask is None else jnp.asarray(mask, jnp.int32)
    return jnp.where(mask, segments, jnp.iinfo(jnp.int32).min)


def _first(segments: jax.Array) -> jax.Array:
    """int32 [B, T]: where the segment of each token begins."""
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    places = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1)
    return jax.lax.cummax(jnp.where(begins, places, 0), axis=1)
