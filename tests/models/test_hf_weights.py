"""Weights in from every layout of safetensors, and each way a folder can be wrong."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from models import tiny
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models import Model, init_model, load_model, read_config, save_weights
from xtoken_jax.models.hf import layout as hf_layout
from xtoken_jax.models.hf import loading_bar

STORED = {"tied": "float32", "untied": "bfloat16", "llama3": "float16"}


def equal_bits(a, b):
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape
        assert a[name].tobytes() == b[name].tobytes(), name


def refused(folder, *words):
    with pytest.raises(UserError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize("name", tiny.NAMES)
def test_in_and_out_is_the_same_to_the_bit(name, tmp_path):
    model, params = load_model(tiny.DATA / name)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    path = save_weights(tmp_path / "out", model, params, dtype=STORED[name])
    equal_bits(load_file(path), tiny.tensors(name))
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # tensors are aligned for mmap
    assert os.listdir(tmp_path / "out") == ["model.safetensors"]
    wide = load_file(save_weights(tmp_path / "wide", model, params))
    equal_bits(wide, {k: v.astype(np.float32) for k, v in tiny.tensors(name).items()})


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_every_mesh_reads_and_writes_the_same_weights(shape, tmp_path):
    mesh = make_mesh(MeshConfig(*shape))
    model, params = load_model(tiny.DATA / "llama3", mesh=mesh)
    _, whole = load_model(tiny.DATA / "llama3")
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    assert jax.tree.map(lambda x: x.sharding, params) == model.param_shardings(mesh)
    path = save_weights(tmp_path, model, params, dtype="float16")
    equal_bits(load_file(path), tiny.tensors("llama3"))


def test_each_device_reads_only_its_shard(monkeypatch):
    read = []
    cut = hf_layout.Layout.cut

    def counted(self, tensor, index):
        part = cut(self, tensor, index)
        read.append(part.size)
        return part

    monkeypatch.setattr(hf_layout.Layout, "cut", counted)
    _, params = load_model(tiny.DATA / "untied", mesh=make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    assert sum(read) == sum(leaf.size for leaf in jax.tree.leaves(params))  # copies share one read
    assert max(read) == 64 * 32 // 4


def test_a_frozen_teacher_is_kept_in_bfloat16():
    model, params = load_model(tiny.DATA / "untied", dtype="bfloat16", compute_dtype="bfloat16", remat="full")
    assert (model.compute_dtype, model.remat) == ("bfloat16", "full")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    stored = tiny.tensors("untied")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(np.asarray(params["embedding"]), stored)


def test_a_sharded_checkpoint_is_the_same_model(tmp_path):
    folder = tiny.copy("untied", tmp_path / "model")
    tensors = tiny.tensors("untied")
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    jax.tree.map(np.testing.assert_array_equal, load_model(folder)[1], load_model(tiny.DATA / "untied")[1])

    index.write_text(json.dumps({"weight_map": {**files, "model.norm.weight": "elsewhere.safetensors"}}))
    refused(folder, "elsewhere.safetensors", "not in the folder")
    index.write_text(json.dumps({"weight_map": {**files, "model.norm.weight": "../model.safetensors"}}))
    refused(folder, "../model.safetensors", "not in the folder")
    other = {**files, "model.norm.weight": next(f for f in files.values() if f != files["model.norm.weight"])}
    index.write_text(json.dumps({"weight_map": other}))
    refused(folder, "do not hold", "model.norm.weight")
    for broken in ["{", "[]", "{}", '{"weight_map": 3}']:
        index.write_text(broken)
        refused(folder, "index.json: not the index of a checkpoint", "get the model's files again")


def test_buffers_of_old_checkpoints_are_ignored(tmp_path):
    folder = tiny.copy("tied", tmp_path / "model")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    tiny.replace_tensors(folder, lambda t: {**t, name: np.ones(4, np.float32)})
    load_model(folder)


def test_a_tied_head_may_be_stored_if_it_is_equal(tmp_path):
    folder = tiny.copy("tied", tmp_path / "model")
    tiny.replace_tensors(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].copy()})
    model, params = load_model(folder)
    assert "unembedding" not in params
    assert "lm_head.weight" not in load_file(save_weights(tmp_path / "out", model, params))
    tiny.replace_tensors(folder, lambda t: {**t, "lm_head.weight": t["lm_head.weight"] + 1})
    refused(folder, "ties the embeddings", "lm_head.weight differs")
    tiny.replace_tensors(folder, lambda t: {**t, "lm_head.weight": t["lm_head.weight"][:5]})
    refused(folder, "lm_head.weight differs")


def test_missing_unused_and_misshapen_tensors_are_named_together(tmp_path):
    folder = tiny.copy("untied", tmp_path / "model")

    def spoil(tensors):
        tensors = {n: t for n, t in tensors.items() if "layers.1." not in n and n != "model.norm.weight"}
        tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 5), np.float32)
        tensors["model.layers.0.input_layernorm.weight"] = np.zeros(32, np.float64)
        return {**tensors, "model.layers.0.self_attn.q_proj.bias": np.zeros(48, np.float32)}

    tiny.replace_tensors(folder, spoil)
    refused(
        folder,
        "missing model.norm.weight, model.layers.1.self_attn.k_proj.weight,",
        "and 7 more",
        "not used model.layers.0.self_attn.q_proj.bias",
        "shape of model.layers.0.mlp.up_proj.weight [3, 5] instead of [24, 32]",
        "dtype of model.layers.0.input_layernorm.weight F64 (supported: F32, BF16, F16)",
    )


def test_an_untied_checkpoint_needs_its_head(tmp_path):
    folder = tiny.copy("tied", tmp_path / "model", tie_word_embeddings=False)
    refused(folder, "missing lm_head.weight")


def test_a_config_with_fewer_layers_does_not_drop_weights(tmp_path):
    folder = tiny.copy("llama3", tmp_path / "model", num_hidden_layers=2)
    refused(folder, "not used model.layers.2.", "and 6 more")


def test_a_folder_without_weights_points_to_a_random_start(tmp_path):
    folder = tiny.copy("tied", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights in", str(folder), "student.init=random")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    refused(folder, "only pickled weights", "save_pretrained", "student.init=random")
    refused(tmp_path / "nowhere", "no such model folder")


@pytest.mark.parametrize(
    "spoil", [lambda b: b[:-7], lambda b: b[:100], lambda b: b"", lambda b: b"\xff" * 64]
)
def test_truncated_or_foreign_files_are_refused(spoil, tmp_path):
    path = tiny.copy("tied", tmp_path / "model") / "model.safetensors"
    path.write_bytes(spoil(path.read_bytes()))
    refused(path.parent, "cannot read", str(path), "truncated or not safetensors")


def test_a_random_start_needs_only_the_config(tmp_path):
    folder = tiny.copy("tied", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    model, params = init_model(folder, jax.random.key(0))
    assert model == Model(read_config(folder))
    assert 0.15 < float(jnp.std(params["embedding"])) < 0.25
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    model, sharded = init_model(folder, jax.random.key(0), mesh=mesh, dtype="bfloat16")
    assert jax.tree.map(lambda x: x.sharding, sharded) == model.param_shardings(mesh)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)), sharded, params)


def test_other_dtypes_are_refused():
    with pytest.raises(UserError, match="dtype='float16'; supported: float32, bfloat16"):
        load_model(tiny.DATA / "tied", dtype="float16")
    with pytest.raises(UserError, match="dtype='int8'"):
        init_model(tiny.DATA / "tied", jax.random.key(0), dtype="int8")


def test_parameters_do_not_hang_on_the_file(tmp_path):
    folder = tiny.copy("tied", tmp_path / "model")
    _, params = load_model(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xff" * 4096)
    jax.tree.map(np.testing.assert_array_equal, params, load_model(tiny.DATA / "tied")[1])


def test_a_bar_shows_what_is_read_on_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.setattr(loading_bar, "PATIENCE", -1.0)
    load_model(tiny.DATA / "tied")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    # On a dumb terminal rich draws no bar, and in few columns a short one.
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    load_model(tiny.DATA / "tied")
    shown = capsys.readouterr()
    total = sum(tensor.nbytes for tensor in tiny.tensors("tied").values())
    assert "loading tied" in shown.err
    assert f"{total / 1000:.1f}/{total / 1000:.1f} kB" in shown.err
    assert shown.out == ""
    monkeypatch.setattr(loading_bar, "PATIENCE", 60.0)
    load_model(tiny.DATA / "tied")
    assert capsys.readouterr().err == ""
