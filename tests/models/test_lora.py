"""Adapters: nothing at first, every kernel of every family, and the same model once merged."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models import tiny
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models import (
    LoraConfig,
    Model,
    add_lora,
    join_lora,
    load_model,
    logits,
    merge_lora,
    read_config,
    split_lora,
)
from xtoken_jax.models.config import LORA_TARGETS
from xtoken_jax.models.hf.export import export_hf

FAMILIES = Path(__file__).parents[1] / "fixtures" / "tiny_families"
# in phi3 three kernels share one tensor, and two another
NAMES = ["llama_biases", "phi3"]
TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params):
    return logits(*model(params, TOKENS), softcap=model.config.logit_softcap)


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def trained(params, seed=0, std=0.3):
    """With adapters as training leaves them: B is zero no more."""
    rng = np.random.default_rng(seed)
    adapters, others = split_lora(params)
    some = jax.tree.map(
        lambda x: jax.device_put(x + rng.normal(0, std, x.shape).astype(np.float32), x.sharding), adapters
    )
    return join_lora(some, others)


def added(folder, config=None, **options):
    model, params = load_model(folder, **options)
    return add_lora(
        model,
        params,
        config or LoraConfig(rank=3, alpha=2.0),
        jax.random.key(5),
        mesh=options.get("mesh"),
    )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_at_first_then_the_exported_folder_is_base_and_adapters(name, tmp_path):
    folder = FAMILIES / name
    base, base_params = load_model(folder)
    model, params = add_lora(base, base_params, LoraConfig(rank=3, alpha=2.0), jax.random.key(5))
    before = outputs(base, base_params)
    np.testing.assert_array_equal(outputs(model, params), before)

    params = trained(params, std=0.1)
    want = outputs(model, params)
    assert np.abs(want - before).max() > 1e-2
    out = export_hf(tmp_path / "out", model, params, folder)
    assert not [key for key in load_file(out / "model.safetensors") if "lora" in key]
    again, exported = load_model(out)
    assert again.config == dataclasses.replace(base.config, dtype="float32")
    np.testing.assert_allclose(outputs(again, exported), want, atol=1e-5)
    merged, merged_params = merge_lora(model, params)
    assert merged == base
    for path, value in paths(exported).items():
        np.testing.assert_array_equal(value, paths(merged_params)[path], err_msg=path)


@pytest.mark.parametrize("name", sorted(path.name for path in FAMILIES.iterdir() if path.is_dir()))
def test_every_kernel_of_a_layer_is_a_target(name):
    config = read_config(FAMILIES / name)
    plain = paths(Model(config).abstract())
    adapters, others = map(paths, split_lora(Model(config, lora=LoraConfig(rank=2)).abstract()))
    matrices = {p for p in plain if p.startswith("layers/") and "norm" not in p and "bias" not in p}
    assert len(matrices) == len(LORA_TARGETS)
    assert set(adapters) == {f"{path}_lora_{part}" for path in matrices for part in "ab"}
    assert others == plain


def test_targets_are_those_named():
    _, params = added(tiny.DATA / "untied", LoraConfig(rank=2, targets=("value", "down")))
    names = ("layers/attention/value", "layers/feed_forward/down")
    assert set(paths(split_lora(params)[0])) == {f"{name}_lora_{part}" for name in names for part in "ab"}


def test_split_and_join_are_inverse_and_copy_nothing():
    _, params = added(tiny.DATA / "untied", LoraConfig(rank=2, targets=("key",)))
    adapters, frozen = split_lora(params)
    again = join_lora(adapters, frozen)

    def same(a, b):
        leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return jax.tree.structure(a) == jax.tree.structure(b) and all(x is y for x, y in leaves)

    assert same(again, params)
    # a second split changes nothing, and without adapters everything trains
    for part in (adapters, frozen):
        trained, rest = split_lora(part)
        assert same(trained, part)
        assert rest == {}
    assert same(join_lora(frozen, None), frozen)


def test_a_merged_kernel_is_the_sum_by_hand():
    model, params = added(tiny.DATA / "untied", LoraConfig(rank=3, alpha=5.0, targets=("query", "output")))
    params = trained(params)
    merged = merge_lora(model, params)[1]["layers"]["attention"]
    parts = {name: np.asarray(x, np.float64) for name, x in params["layers"]["attention"].items()}
    for name, equation in (("query", "ldr,lrnh->ldnh"), ("output", "lnhr,lrd->lnhd")):
        by_hand = np.einsum(equation, parts[f"{name}_lora_a"], parts[f"{name}_lora_b"])
        assert np.abs(by_hand).max() > 0.1
        np.testing.assert_allclose(merged[name], parts[name] + 5 / 3 * by_hand, rtol=1e-6, atol=1e-6)
    assert merged["key"] is params["layers"]["attention"]["key"]


def test_on_a_mesh_adapters_and_merged_kernels_are_those_of_one_device():
    folder, config = FAMILIES / "qwen3", LoraConfig(rank=2, targets=("query", "output", "down"))
    model, params = added(folder, config)
    mesh = make_mesh(MeshConfig(1, 2, 4))
    there, spread = added(folder, config, mesh=mesh)
    assert there == model
    for path, sharding in paths(model.param_shardings(mesh)).items():
        assert paths(spread)[path].sharding == sharding, path
        np.testing.assert_array_equal(paths(spread)[path], paths(params)[path], err_msg=path)
    plain, merged = merge_lora(model, trained(params))[1], merge_lora(model, trained(spread))[1]
    for path, value in paths(merged).items():
        assert value.sharding == paths(spread)[path].sharding, path
        np.testing.assert_allclose(value, paths(plain)[path], rtol=1e-6, atol=1e-6, err_msg=path)


def test_weights_in_half_precision_have_adapters_in_full(tmp_path):
    folder = tiny.DATA / "untied"
    model, params = added(folder, LoraConfig(rank=3, alpha=2.0, targets=("key", "output")), dtype="bfloat16")
    adapters, frozen = split_lora(params)
    assert {x.dtype for x in jax.tree.leaves(adapters)} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    params = trained(params, std=0.1)
    _, narrow = merge_lora(model, params)
    assert {x.dtype for x in jax.tree.leaves(narrow)} == {jnp.dtype("bfloat16")}
    # a file in float32 holds the sum unrounded, one in bfloat16 the sum rounded once
    out = export_hf(tmp_path / "wide", model, params, folder)
    kernel, adapter_a, adapter_b = (
        np.asarray(params["layers"]["attention"][f"key{part}"], np.float64)
        for part in ("", "_lora_a", "_lora_b")
    )
    by_hand = kernel + 2 / 3 * np.einsum("ldr,lrgh->ldgh", adapter_a, adapter_b)
    np.testing.assert_allclose(
        load_model(out)[1]["layers"]["attention"]["key"], by_hand, rtol=1e-6, atol=1e-6
    )
    out = export_hf(tmp_path / "narrow", model, params, folder, dtype="bfloat16")
    for path, value in paths(load_model(out)[1]).items():
        np.testing.assert_array_equal(value, paths(narrow)[path].astype(np.float32), err_msg=path)
    # and so does one in the dtypes of the weights that were adapted, which are bfloat16
    same = export_hf(tmp_path / "same", model, params, folder, dtype="source")
    assert (same / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_donated_kernels_are_freed_and_nothing_else_is(dtype):
    model, params = added(tiny.DATA / "untied", LoraConfig(rank=2, targets=("query", "up")))
    kept = merge_lora(model, params, dtype=dtype)[1]
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    merged = merge_lora(model, params, dtype=dtype, donate=True)[1]
    freed = {path for path, x in paths(params).items() if x.is_deleted()}
    assert freed == {"layers/attention/query", "layers/feed_forward/up"}
    for a, b in zip(*map(jax.tree.leaves, (merged, kept)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_start_is_scaled_by_the_number_of_inputs():
    config = dataclasses.replace(
        read_config(tiny.DATA / "untied"), hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=32
    )
    targets = ("query", "output")
    _, params = add_lora(Model(config), {}, LoraConfig(rank=16, targets=targets), jax.random.key(0))
    attention = params["layers"]["attention"]
    np.testing.assert_allclose(np.std(attention["query_lora_a"]), 256**-0.5, rtol=0.1)
    np.testing.assert_allclose(np.std(attention["output_lora_a"]), 128**-0.5, rtol=0.1)
    assert not np.any(attention["query_lora_b"])


def test_mistakes_are_refused():
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"alpha": float("nan")}):
        with pytest.raises(UserError, match="must be above zero"):
            LoraConfig(**wrong)
    for targets in ((), ("query", "embedding")):
        with pytest.raises(UserError, match=f"choose among {', '.join(LORA_TARGETS)}"):
            LoraConfig(targets=targets)
    model, params = load_model(tiny.DATA / "untied")
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(model, params)
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(dataclasses.replace(model, lora=LoraConfig()), params, LoraConfig(), jax.random.key(0))
