"""The decoder against torch's numbers, on any mesh, in either precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import AS_OUTSIDE

from models import tiny
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models import LoraConfig, Model, load_model, logits, read_config
from xtoken_jax.models.config import LORA_TARGETS

# jitted once for all tests: a Model is hashable, so it can be static
forward = jax.jit(lambda model, *args, **kwargs: model(*args, **kwargs), static_argnums=0)
load = functools.cache(lambda name: load_model(tiny.DATA / name))


@pytest.mark.parametrize("side", ["whole", "right", "left"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_and_hidden_states_are_torchs(name, side):
    model, params = load(name)
    expected = np.load(tiny.DATA / name / "expected.npz")
    tokens, mask = expected[f"{side}_tokens"], expected[f"{side}_mask"]
    hidden, unembedding = forward(model, params, tokens, mask=None if side == "whole" else mask)
    assert (hidden.shape, unembedding.shape) == ((2, 12, 32), (64, 32))
    real = mask[..., None]
    np.testing.assert_allclose(hidden * real, expected[f"{side}_hidden"] * real, atol=1e-4)
    values = logits(hidden, unembedding)
    np.testing.assert_allclose(values * real, expected[f"{side}_logits"] * real, atol=1e-4)
    assert np.isfinite(values).all()


def test_padding_on_either_side_leaves_a_text_alone():
    model, params = load("llama3")
    tokens = np.random.default_rng(3).integers(3, 64, (2, 7)).astype(np.int32)
    alone, _ = forward(model, params, tokens)
    for pad in [((0, 0), (0, 5)), ((0, 0), (5, 0))]:
        padded, mask = np.pad(tokens, pad, constant_values=9), np.pad(np.ones((2, 7), bool), pad)
        hidden, _ = forward(model, params, padded, mask=mask)
        np.testing.assert_allclose(hidden[mask], alone.reshape(14, 32), atol=1e-4)


def test_only_earlier_tokens_are_seen():
    model, params = load("untied")
    tokens = np.arange(3, 13, dtype=np.int32)[None, :]
    changed = tokens.copy()
    changed[0, 6] = 40
    before, after = forward(model, params, tokens)[0], forward(model, params, changed)[0]
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before - after)[:, 6:].max(-1) > 1e-2).all()


def test_padding_sees_no_text_and_text_no_padding():
    model, params = load("untied")
    tokens = np.arange(3, 13, dtype=np.int32)[None, :]
    mask = np.isin(np.arange(10), [0, 1, 5, 6, 7, 8])[None, :]
    hidden, _ = forward(model, params, tokens, mask=mask)
    for part in (mask, ~mask):
        other, _ = forward(model, params, np.where(part, 30, tokens), mask=mask)
        np.testing.assert_array_equal(other[~part], hidden[~part])
        assert np.abs(other - hidden)[part].max() > 0.1


def test_a_segment_is_as_alone():
    model, params = load("llama3")
    tokens = np.arange(3, 15, dtype=np.int32)[None, :]
    segments = np.array([[1] * 5 + [2] * 4 + [0] * 3], np.int32)
    hidden, _ = forward(model, params, tokens, segments=segments)
    for piece in (slice(0, 5), slice(5, 9)):
        alone, _ = forward(model, params, tokens[:, piece])
        np.testing.assert_allclose(hidden[:, piece], alone, atol=1e-4)
    # with padding at the start of the first
    segments, mask = np.array([[1] * 5 + [2] * 7], np.int32), np.arange(12)[None, :] >= 2
    hidden, _ = forward(model, params, tokens, segments=segments, mask=mask)
    for piece in (slice(2, 5), slice(5, 12)):
        alone, _ = forward(model, params, tokens[:, piece])
        np.testing.assert_allclose(hidden[:, piece], alone, atol=1e-4)


def test_segments_choose_their_frequencies_alone():
    """LongRoPE has others for texts past the pretrained length, which a short neighbour is not."""
    folder = tiny.DATA.parent / "tiny_families" / "phi4_long"
    model, params = load_model(folder)
    length = model.config.rope_scaling.original_max_position_embeddings
    tokens = np.arange(3, 3 + 2 * length, dtype=np.int32)[None, :] % model.config.vocab_size
    segments = np.array([[1] * (length - 4) + [2] * (length + 4)], np.int32)
    hidden, _ = forward(model, params, tokens, segments=segments)
    for piece in (slice(0, length - 4), slice(length - 4, 2 * length)):
        alone, _ = forward(model, params, tokens[:, piece])
        np.testing.assert_allclose(hidden[:, piece], alone, atol=1e-4)
    whole, _ = forward(model, params, tokens)
    assert np.abs(whole - hidden)[:, : length - 4].max() > 1e-2


def test_positions_count_by_their_differences():
    model, params = load("llama3")
    tokens = np.arange(3, 13, dtype=np.int32)[None, :]
    positions = np.arange(10, dtype=np.int32)[None, :]
    default, _ = forward(model, params, tokens)
    given, _ = forward(model, params, tokens, positions=positions)
    np.testing.assert_array_equal(given, default)
    shifted, _ = forward(model, params, tokens, positions=positions + 100)
    np.testing.assert_allclose(shifted, default, atol=1e-3)
    spread, _ = forward(model, params, tokens, positions=positions * 3)
    assert np.abs(spread - default).max() > 0.1


def test_rope_scaling_is_felt():
    model, params = load("llama3")
    plain = Model(dataclasses.replace(model.config, rope_scaling=None))
    tokens = np.arange(3, 15, dtype=np.int32)[None, :]
    difference = forward(model, params, tokens)[0] - forward(plain, params, tokens)[0]
    assert np.abs(difference).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "shape"), [("llama3", (8, 1, 1)), ("tied", (1, 4, 2)), ("untied", (2, 2, 2))]
)
def test_any_mesh_gives_one_devices_values_and_gradients(name, shape):
    tokens = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
    mask = np.arange(12)[None, :] >= np.arange(8)[:, None]

    def loss(params, model, tokens):
        values = logits(*model(params, tokens, mask=mask))
        return jnp.mean(jnp.square(values) * mask[..., None]), values

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    model, params = load(name)
    (_, values), gradients = step(params, model, tokens)

    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        model, params = load_model(tiny.DATA / name, mesh=mesh)
        (_, sharded_values), sharded_gradients = step(params, model, tokens)
    np.testing.assert_allclose(sharded_values, values, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sharded_gradients, gradients)


def test_parameters_are_split_where_they_divide():
    model = Model(read_config(tiny.DATA / "untied"))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    shardings = model.param_shardings(mesh)
    local = jax.tree.map(lambda x, s: s.shard_shape(x.shape), model.abstract(), shardings)
    assert local["embedding"] == local["unembedding"] == (16, 16)
    assert local["layers"]["attention"]["query"] == (2, 16, 1, 12)
    assert local["layers"]["attention"]["key"] == (2, 16, 2, 12)  # 2 heads do not divide by 4
    assert local["layers"]["attention"]["output"] == (2, 1, 12, 16)
    assert local["layers"]["feed_forward"]["down"] == (2, 6, 16)
    assert local["layers"]["attention_norm"] == (2, 32)
    assert local["final_norm"] == (32,)


def test_a_random_start_has_the_right_spread():
    config = dataclasses.replace(
        read_config(tiny.DATA / "untied"), hidden_size=64, vocab_size=512, initializer_range=0.05
    )
    model = Model(config)
    params = jax.jit(model.init)(jax.random.key(1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.abstract()
    )
    drawn = {
        "embedding": params["embedding"],
        **params["layers"]["attention"],
        **params["layers"]["feed_forward"],
    }
    for value in drawn.values():
        assert abs(float(jnp.std(value)) / 0.05 - 1) < 0.05
        assert abs(float(jnp.mean(value))) < 0.005
    assert len({float(value.reshape(-1)[0]) for value in drawn.values()}) == len(drawn)  # no key used twice
    np.testing.assert_array_equal(params["layers"]["attention_norm"], np.ones((2, 64)))


def test_the_abstract_parameters_carry_shape_dtype_and_sharding():
    model = Model(read_config(tiny.DATA / "tied"))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    abstract = model.abstract(mesh, dtype="bfloat16")
    assert abstract["embedding"].shape == (64, 32)
    assert {x.dtype for x in jax.tree.leaves(abstract)} == {jnp.dtype("bfloat16")}
    assert jax.tree.map(lambda x: x.sharding, abstract) == model.param_shardings(mesh)
    assert model.abstract()["embedding"].sharding is None


def test_tied_embeddings_are_one_parameter_with_both_gradients():
    model, params = load("tied")
    assert "unembedding" not in params
    tokens = np.array([[3, 4, 5]], np.int32)

    def loss(params, out):
        hidden, unembedding = model(params, tokens)
        return logits(hidden, unembedding)[0, 0, out]

    gradient = jax.jit(jax.grad(loss), static_argnums=1)(params, 9)["embedding"]
    touched = set(np.flatnonzero(np.abs(gradient).max(-1) > 1e-6))
    assert touched == {3, 9}  # read at position 0 and as the row of logit 9


def test_remat_does_not_change_gradients():
    tokens = np.arange(3, 27, dtype=np.int32).reshape(2, 12)
    model, params = load("llama3")
    kept = dataclasses.replace(model, remat="full")

    def loss(params, model):
        return jnp.sum(jnp.square(model(params, tokens)[0][:, :, 0]))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(params, model),
        gradient(params, kept),
    )


def test_remat_holds_one_layers_activations():
    config = dataclasses.replace(read_config(tiny.DATA / "untied"), num_layers=16)

    def scratch_bytes(remat):
        model = Model(config, remat=remat)
        gradient = jax.jit(jax.grad(lambda params, tokens: jnp.sum(model(params, tokens)[0])))
        tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
        program = gradient.lower(model.abstract(), tokens).compile(AS_OUTSIDE)
        return program.memory_analysis().temp_size_in_bytes

    assert scratch_bytes(remat="full") < scratch_bytes(remat="none") / 4


def test_the_program_does_not_grow_with_depth():
    tokens = np.zeros((1, 8), np.int32)
    config = read_config(tiny.DATA / "untied")

    def size(layers):
        model = Model(dataclasses.replace(config, num_layers=layers))
        return len(jax.jit(model).lower(model.abstract(), tokens).as_text().splitlines())

    assert size(2) == size(40)


def test_bfloat16_computes_in_bfloat16_near_float32():
    tokens = np.arange(3, 27, dtype=np.int32).reshape(2, 12)
    model, params = load("untied")
    exact = logits(*forward(model, params, tokens))
    half = dataclasses.replace(model, compute_dtype="bfloat16")
    hidden, unembedding = forward(half, params, tokens)
    assert hidden.dtype == unembedding.dtype == jnp.bfloat16
    values = logits(hidden, unembedding)
    assert values.dtype == jnp.float32
    error = np.abs(values - exact)
    assert 1e-4 < error.max() < 0.3
    assert error.mean() < 0.05
    small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    assert forward(half, small, tokens)[0].dtype == jnp.bfloat16


@pytest.mark.parametrize("softcap", [30.0, 5.0, 0.7])
def test_capped_logits_are_the_formula(softcap):
    rng = np.random.default_rng(1)
    hidden, unembedding = rng.normal(0, 4, (2, 5, 6)), rng.normal(0, 1, (9, 6))
    hidden, unembedding = hidden.astype(np.float32), unembedding.astype(np.float32)
    raw = np.einsum("btd,vd->btv", hidden.astype(np.float64), unembedding.astype(np.float64))
    found = logits(hidden, unembedding, softcap=softcap)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, softcap * np.tanh(raw / softcap), rtol=2e-6, atol=2e-6)
    assert np.abs(found).max() <= softcap
    np.testing.assert_allclose(logits(hidden, unembedding), raw, rtol=2e-6, atol=2e-6)
    low = (jnp.asarray(x, jnp.bfloat16) for x in (hidden, unembedding))
    assert logits(*low, softcap=softcap).dtype == jnp.float32


def test_a_token_outside_the_vocabulary_is_loud():
    model, params = load("untied")
    hidden, _ = forward(model, params, np.array([[3, 64], [3, 4]], np.int32))
    assert np.isnan(hidden[0, 1]).all()
    assert np.isfinite(hidden[1]).all()


def test_gradients_are_finite_with_a_row_of_padding():
    model, params = load("tied")
    mask = np.array([[False] * 6, [False, False, True, True, True, False]])

    def loss(params):
        values = logits(*model(params, np.zeros((2, 6), np.int32), mask=mask))
        return jnp.sum(jnp.where(mask[..., None], values, 0))

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_equal_models_share_a_compilation():
    config = read_config(tiny.DATA / "tied")
    assert Model(config) == Model(read_config(tiny.DATA / "tied"))
    assert hash(Model(config)) == hash(Model(read_config(tiny.DATA / "tied")))
    assert Model(config) != Model(config, remat="full")
    traces = []
    jitted = jax.jit(lambda model, x: traces.append(model) or x, static_argnums=0)
    jitted(Model(config), 1.0)
    jitted(Model(read_config(tiny.DATA / "tied")), 2.0)
    assert len(traces) == 1


def test_an_adapter_adds_its_product():
    """As if alpha / rank A B were added to each kernel; nothing at the start."""
    model, params = load("untied")
    adapted = dataclasses.replace(model, lora=LoraConfig(rank=3, alpha=6.0))
    tokens = np.arange(3, 13, dtype=np.int32)[None, :]
    fresh = adapted.init(jax.random.key(0))
    kernels = {
        name: (part, name) for part in ("attention", "feed_forward") for name in params["layers"][part]
    }
    assert set(kernels) == set(LORA_TARGETS)
    joined = jax.tree.map(lambda x: x, params)
    for part, name in kernels.values():
        first, second = (fresh["layers"][part][f"{name}_lora_{x}"] for x in "ab")
        assert not np.asarray(second).any()
        joined["layers"][part] |= {f"{name}_lora_a": first, f"{name}_lora_b": second}
    plain = forward(model, params, tokens)[0]
    np.testing.assert_array_equal(forward(adapted, joined, tokens)[0], plain)
    merged = jax.tree.map(lambda x: x, params)
    for key, (part, name) in enumerate(kernels.values()):
        second = joined["layers"][part][f"{name}_lora_b"]
        second = 0.1 * jax.random.normal(jax.random.key(key), second.shape)
        joined["layers"][part][f"{name}_lora_b"] = second
        first = joined["layers"][part][f"{name}_lora_a"]
        change = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(first, second)
        merged["layers"][part][name] = params["layers"][part][name] + 2.0 * change
    found = forward(adapted, joined, tokens)[0]
    np.testing.assert_allclose(found, forward(model, merged, tokens)[0], atol=1e-4)
    assert np.abs(found - plain).max() > 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"rank": 0}, "rank=0"), ({"alpha": 0.0}, "alpha=0.0"), ({"targets": ("gates",)}, "gates.*query, key")],
)
def test_an_adapter_that_cannot_be_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        LoraConfig(**settings)


def test_what_cudnn_cannot_do_is_refused():
    config = read_config(tiny.DATA / "tied")
    with pytest.raises(UserError, match="computes in bfloat16; compute_dtype=float32"):
        Model(config, attention="cudnn")
    capped = dataclasses.replace(config, attention_softcap=50.0)
    with pytest.raises(UserError, match="no soft cap"):
        Model(capped, compute_dtype="bfloat16", attention="cudnn")
    with pytest.raises(UserError, match="attention='flash'; supported: xla, cudnn"):
        Model(config, attention="flash")


def test_another_compute_dtype_is_refused():
    with pytest.raises(UserError, match=r"compute_dtype='float16'; supported: float32, bfloat16"):
        Model(read_config(tiny.DATA / "tied"), compute_dtype="float16")
