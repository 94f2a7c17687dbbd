"""Attention against its float64 twin; the kernels simulated, and lowered for the devices they are for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh
from reference import attention as reference
from reference.gradient import differences

from models import tiny
from xtoken_jax.distributed.mesh import AXES, MeshConfig, make_mesh, single_device_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models import Model, attention, load_model, network, read_config
from xtoken_jax.models.attention import AttentionSetting, attend
from xtoken_jax.models.load import AttentionKind, ModelConfig, open_model

PACKED = [[1, 1, 1, 2, 2, 2, 2, 0, 0], [3, 3, 3, 3, 3, 3, 3, 3, 3]]
PADDED_LEFT = [[0, 0, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1, 1, 1]]
SWITCHES = [
    {},
    {"window": 3},
    {"softcap": 0.7},
    {"segments": PACKED},
    {"segments": PADDED_LEFT, "window": 2},
    {"segments": PACKED, "window": 4, "softcap": 0.5},
]
CUDNN_CALLS = ("Softmax", "SoftmaxBackward", "ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward")


def draw(rows, length, heads, groups, width, dtype=np.float32):
    """Queries, keys, values and the weights of a sum over the result."""
    rng = np.random.default_rng(5)
    shapes = [(rows, length, n, width) for n in (heads, groups, groups, heads)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnums=(5, 6))
def values_and_gradients(query, key, value, weight, segments, setting, window):
    def total(query, key, value):
        out = attend(query, key, value, setting, window=window, segments=segments)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    (_, out), gradients = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(query, key, value)
    return out, *gradients


def run(arrays, setting, window=None, segments=None):
    segments = None if segments is None else np.asarray(segments, np.int32)
    return values_and_gradients(*arrays, segments, setting, window)


def assert_close(found, expected, atol):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), b, atol=atol)


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
def test_the_plain_form_is_its_twin(heads, switches):
    arrays, scale = draw(2, 9, *heads, 6), 0.4
    expected = reference.attention(*arrays[:3], scale=scale, **switches)
    gradients = reference.gradients(*arrays, scale=scale, **switches)
    setting = AttentionSetting(scale, switches.get("softcap"))
    found = run(arrays, setting, switches.get("window"), switches.get("segments"))
    assert_close(found, (expected, *gradients), atol=2e-6)


def test_the_twins_gradients_are_differences():
    arrays, switches = draw(1, 5, 4, 2, 3), {"scale": 0.4, "softcap": 0.7, "window": 3}
    gradients = reference.gradients(*arrays, **switches)
    for place in range(3):

        def total(point, place=place):
            moved = [*arrays[:place], point, *arrays[place + 1 : 3]]
            return np.sum(arrays[3] * reference.attention(*moved, **switches))

        coordinates = list(np.ndindex(arrays[place].shape))[::5]
        found = differences(total, arrays[place], coordinates)
        np.testing.assert_allclose(found, [gradients[place][at] for at in coordinates], atol=1e-8)


@pytest.mark.parametrize("switches", [SWITCHES[0], *SWITCHES[4:]], ids=str)
def test_splash_simulated_is_the_twin(switches):
    arrays, scale = draw(2, 9, 4, 2, 6), 0.4
    expected = reference.attention(*arrays[:3], scale=scale, **switches)
    gradients = reference.gradients(*arrays, scale=scale, **switches)
    setting = AttentionSetting(scale, switches.get("softcap"), "splash", interpret=True)
    found = run(arrays, setting, switches.get("window"), switches.get("segments"))
    assert_close(found, (expected, *gradients), atol=2e-6)


@pytest.mark.parametrize(("length", "window"), [(300, 150), (400, 20)])
def test_splash_over_several_blocks_is_the_plain_form(length, window):
    arrays = draw(1, length, 2, 1, 8)
    segments = (np.arange(length) // 90)[None, :]
    plain = AttentionSetting(0.4, 2.0)
    expected = run(arrays, plain, window, segments)
    found = run(arrays, dataclasses.replace(plain, implementation="splash", interpret=True), window, segments)
    assert_close(found, expected, atol=1e-5)


def test_splash_in_bfloat16_is_no_worse_than_the_plain_form():
    arrays = draw(1, 130, 2, 1, 16)
    exact = run(arrays, AttentionSetting(0.25))
    half = [*(jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]), arrays[3]]
    errors = []
    for setting in (AttentionSetting(0.25), AttentionSetting(0.25, None, "splash", interpret=True)):
        found = run(half, setting)
        assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
        errors.append(
            [float(jnp.abs(a.astype(jnp.float32) - b).mean()) for a, b in zip(found, exact, strict=True)]
        )
    assert all(splash <= 1.1 * plain for plain, splash in zip(*errors, strict=True))


def test_the_block_adds_at_most_an_eighth():
    sizes = {length: attention._blocks(length) for length in (1, 128, 129, 512, 640, 1000, 1100, 2048, 8320)}
    assert sizes == {
        1: (128, 128),
        128: (128, 128),
        129: (256, 256),
        512: (512, 512),
        640: (128, 640),
        1000: (512, 1024),
        1100: (256, 1280),
        2048: (512, 2048),
        8320: (512, 8704),
    }


# 2 heads of keys over tensor=4 are copied; 3 heads of queries over tensor=2 stay whole, as does a lone row
@pytest.mark.parametrize(("shape", "rows", "heads"), [((1, 2, 4), 4, (4, 2)), ((2, 2, 2), 1, (3, 1))])
def test_splash_on_a_mesh_is_that_of_one_device(shape, rows, heads):
    arrays = draw(rows, 20, *heads, 8)
    segments = np.where(np.arange(20) < np.arange(rows)[:, None] + 3, 1, 2)
    setting = AttentionSetting(0.4, 1.5)
    expected = run(arrays, setting, 7, segments)
    with jax.set_mesh(make_mesh(MeshConfig(*shape))):
        found = run(
            arrays, dataclasses.replace(setting, implementation="splash", interpret=True), 7, segments
        )
    assert_close(found, expected, atol=1e-5)


def test_a_model_through_splash_on_a_mesh_is_the_model(monkeypatch):
    tokens = np.random.default_rng(0).integers(0, 64, (8, 12)).astype(np.int32)
    mask = np.arange(12)[None, :] >= np.arange(8)[:, None]
    segments = np.tile(np.arange(12) // 5, (8, 1)).astype(np.int32)

    def loss(params, model):
        hidden, _ = model(params, tokens, mask=mask, segments=segments)
        return jnp.mean(jnp.square(hidden) * mask[..., None]), hidden * mask[..., None]

    def step(model, params):
        return jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)(params, model)

    model, params = load_model(tiny.DATA / "untied", attention="xla")
    (_, expected), gradients = step(model, params)
    simulated = functools.partial(AttentionSetting, interpret=True)
    monkeypatch.setattr(network, "AttentionSetting", simulated)
    other = dataclasses.replace(model, attention="splash")
    mesh = make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        (_, found), found_gradients = step(other, load_model(tiny.DATA / "untied", mesh=mesh)[1])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found_gradients, gradients)


def lowered(platform, implementation, dtype, sizes, window=None, softcap=None, segmented=False):
    """The text of values and gradients for a platform that is not here."""
    rows, length, heads, groups, width = sizes
    setting = AttentionSetting(0.1, softcap, implementation)

    def total(query, key, value, segments):
        out = attend(query, key, value, setting, window=window, segments=segments if segmented else None)
        return jnp.sum(out.astype(jnp.float32))

    arrays = [jax.ShapeDtypeStruct((rows, length, n, width), dtype) for n in (heads, groups, groups)]
    allow = [export.DisabledSafetyCheck.custom_call(f"__cudnn$fmha{name}") for name in CUDNN_CALLS]
    step = jax.jit(jax.grad(total, (0, 1, 2)))
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return export.export(step, platforms=[platform], disabled_checks=allow)(*arrays, segments).mlir_module()


@pytest.mark.parametrize(
    ("dtype", "sizes", "options"),
    [
        ("bfloat16", (2, 1000, 9, 3, 64), {}),
        ("bfloat16", (2, 1000, 9, 3, 64), {"window": 64}),
        ("bfloat16", (1, 300, 8, 1, 256), {"softcap": 50.0, "segmented": True}),
        ("bfloat16", (1, 300, 2, 2, 96), {"segmented": True, "window": 200}),
        ("float32", (1, 1000, 2, 1, 128), {"segmented": True, "window": 300}),
    ],
)
def test_splash_lowers_for_a_tpu(monkeypatch, dtype, options, sizes):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    text = lowered("tpu", "auto", dtype, sizes, **options)
    assert text.count("tpu_custom_call") == 3  # forward, by queries, by keys and values
    assert f"{sizes[1]}x{sizes[1]}" not in text  # no dense mask


def test_a_training_step_lowers_for_eight_tpus(monkeypatch):
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    kinds = ("sliding_attention", "full_attention")
    config = dataclasses.replace(read_config(tiny.DATA / "untied"), sliding_window=8, layer_types=kinds)
    mesh = make_mesh(MeshConfig(2, 2, 2))
    model = Model(config, compute_dtype="bfloat16", remat="full")

    def loss(params, tokens, mask):
        return jnp.sum(model(params, tokens, mask=mask)[0].astype(jnp.float32))

    with jax.set_mesh(mesh):
        tokens = jax.ShapeDtypeStruct((8, 128), jnp.int32)
        mask = jax.ShapeDtypeStruct((8, 128), jnp.bool)
        step = jax.jit(jax.grad(loss))
        text = export.export(step, platforms=["tpu"])(model.abstract(mesh), tokens, mask).mlir_module()
    assert text.count("tpu_custom_call") >= 6  # forward and backward, of each kind of layer


@pytest.fixture
def hopper(monkeypatch):
    """As if this were an NVIDIA H100 with cuDNN 9.11."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(attention, "platform", lambda: "cuda")
    monkeypatch.setattr(attention, "_limit", lambda: 256)


@pytest.mark.parametrize("implementation", ["cudnn", "auto"])
@pytest.mark.parametrize("sizes", [(2, 256, 9, 3, 64), (1, 255, 4, 4, 256)])
@pytest.mark.parametrize("window", [None, 32])
def test_cudnn_lowers_for_a_gpu(hopper, implementation, sizes, window):
    text = lowered("cuda", implementation, "bfloat16", sizes, window)
    assert "__cudnn$fmhaSoftmaxBackward" in text
    assert "ScaleBias" not in text  # no dense mask
    assert f"sliding_window_length\\22: {window or 0}," in text
    assert "\\22CAUSAL\\22" in text


def test_cudnn_takes_segments_as_a_mask(hopper):
    text = lowered("cuda", "cudnn", "bfloat16", (2, 255, 4, 2, 64), 32, segmented=True)
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


def test_cudnn_on_a_mesh_lowers(hopper):
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        text = lowered("cuda", "cudnn", "bfloat16", (4, 64, 6, 3, 64))
    assert "tensor<1x64x3x64xbf16>" in text  # the rows and heads of one device


def test_auto_takes_the_plain_form_where_cudnn_lacks_something(hopper, monkeypatch):
    assert "__cudnn" not in lowered("cuda", "auto", "float32", (2, 32, 4, 2, 64))
    assert "__cudnn" not in lowered("cuda", "auto", "bfloat16", (2, 32, 4, 2, 64), softcap=50.0)
    assert "__cudnn" not in lowered("cuda", "auto", "bfloat16", (2, 32, 4, 2, 12))
    monkeypatch.setattr(attention, "_limit", lambda: 128)
    assert "__cudnn" not in lowered("cuda", "auto", "bfloat16", (2, 32, 4, 2, 256))
    with pytest.raises(UserError, match="at most 128; head_dim=256"):
        lowered("cuda", "cudnn", "bfloat16", (2, 32, 4, 2, 256))
    monkeypatch.setattr(attention, "_limit", lambda: 0)
    with pytest.raises(UserError, match="Ampere's generation or newer"):
        lowered("cuda", "cudnn", "bfloat16", (2, 32, 4, 2, 64))


@pytest.mark.parametrize(
    ("here", "chosen"), [("cpu", "xla"), ("rocm", "xla"), ("tpu", "splash"), ("cuda", "cudnn")]
)
def test_auto_goes_by_the_device(monkeypatch, here, chosen):
    monkeypatch.setattr(attention, "platform", lambda: here)
    monkeypatch.setattr(attention, "_limit", lambda: 128)
    assert attention.choose("auto", "bfloat16", 64, None) == chosen


def test_what_a_device_lacks_is_refused():
    assert attention.platform() == "cpu"
    for name, device in (("cudnn", "an NVIDIA GPU"), ("splash", "a TPU")):
        refused = f"attention={name} needs {device}; this process computes on cpu: take"
        heads = jnp.zeros((1, 4, 2, 16), jnp.bfloat16)
        with pytest.raises(UserError, match=refused):
            attend(heads, heads, heads, AttentionSetting(1.0, None, name))
        config = ModelConfig(path=str(tiny.DATA / "untied"), attention=AttentionKind[name])
        with pytest.raises(UserError, match=refused):
            open_model(config, 64, mesh=single_device_mesh(), key=jax.random.key(0))


def test_what_cudnn_lacks_is_refused_before_any_device():
    config = dataclasses.replace(read_config(tiny.DATA / "untied"), head_dim=16)
    Model(config, compute_dtype="bfloat16", attention="cudnn")
    with pytest.raises(UserError, match="a multiple of 8 and at most 256; head_dim=12"):
        Model(dataclasses.replace(config, head_dim=12), compute_dtype="bfloat16", attention="cudnn")


def test_the_meshs_devices_count_before_this_process_own():
    device = AbstractDevice("TPU v5 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1, 1, 1), AXES, abstract_device=device)):
        assert attention.platform() == "tpu"
    assert attention.platform() == "cpu"


def test_a_configs_choices_are_those_of_the_model():
    assert tuple(kind.value for kind in AttentionKind) == attention.IMPLEMENTATIONS
