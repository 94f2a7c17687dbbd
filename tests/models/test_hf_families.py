"""The files of every family: in and out to the bit, the same on every mesh, one line for a fused tensor."""

import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models import load_model, read_config
from xtoken_jax.models.hf import loading as hf_weights
from xtoken_jax.models.hf.export import export_hf
from xtoken_jax.models.hf.families import FAMILIES

DATA = Path(__file__).parents[1] / "fixtures"
FOLDERS = {path.parent.name: path.parent for path in sorted(DATA.glob("tiny_*/*/config.json"))}
MESHES = [(8, 1, 1), (1, 2, 4), (1, 4, 2)]


def same_bits(a, b):
    assert {n: (t.dtype, t.shape) for n, t in a.items()} == {n: (t.dtype, t.shape) for n, t in b.items()}
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_every_family_is_there():
    there = {read_config(folder).architecture for folder in FOLDERS.values()}
    assert there == set(FAMILIES)


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_goes_in_and_out_unchanged(name, tmp_path):
    folder = FOLDERS[name]
    model, params = load_model(folder)
    out = export_hf(tmp_path / "out", model, params, folder, dtype="source")
    same_bits(load_file(out / "model.safetensors"), load_file(folder / "model.safetensors"))
    assert config_of(out) == config_of(folder)
    out = export_hf(tmp_path / "wide", model, params, folder)
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {np.dtype("float32")}
    assert config_of(out) == {**config_of(folder), "dtype": "float32"}


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("name", FOLDERS)
def test_every_mesh_gets_what_one_device_gets(name, shape):
    mesh = make_mesh(MeshConfig(*shape))
    model, split = load_model(FOLDERS[name], mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, split, load_model(FOLDERS[name])[1])
    assert jax.tree.map(lambda x: x.sharding, split) == model.param_shardings(mesh)


@pytest.mark.parametrize(
    ("name", "shape", "bytes_at_once"),
    [("phi3", (1, 4, 2), 2000), ("qwen3_biases", (1, 2, 4), 300), ("gemma2", (1, 1, 1), 3000),
     ("llama3", (2, 2, 2), 1)],
)  # fmt: skip
def test_blocks_make_the_same_parameters(name, shape, bytes_at_once, monkeypatch):
    """Parameters too large to go to the devices at once, by layers and, the embedding, by rows."""
    _, whole = load_model(FOLDERS[name], dtype="bfloat16")
    read = []
    place = hf_weights._Reader._place

    def counted(self, layout, shape, *rest):
        read.append((layout.path, np.prod(shape) * 2))
        return place(self, layout, shape, *rest)

    monkeypatch.setattr(hf_weights, "BLOCK_BYTES", bytes_at_once)
    monkeypatch.setattr(hf_weights._Reader, "_place", counted)
    mesh = make_mesh(MeshConfig(*shape), devices=jax.devices()[: int(np.prod(shape))])
    model, blocks = load_model(FOLDERS[name], mesh=mesh, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, blocks, whole)
    assert jax.tree.map(lambda x: x.sharding, blocks) == model.param_shardings(mesh)
    embedding = [size for path, size in read if path == "embedding"]
    assert len(embedding) > 1
    if bytes_at_once > 128 * shape[2]:  # else a block is one row of each shard
        assert max(embedding) <= bytes_at_once


def with_pictures(folder, prefix):
    """Gemma 3's text model within one that sees pictures, as published checkpoints have it."""
    text = config_of(FOLDERS["gemma3"])
    tensors = {
        (prefix + name if prefix == "language_model." else name.replace("model.", prefix, 1)): tensor
        for name, tensor in load_file(FOLDERS["gemma3"] / "model.safetensors").items()
    }
    outer = prefix.removesuffix("language_model.")
    tensors[f"{outer}vision_tower.vision_model.embeddings.patch_embedding.bias"] = np.ones(3, np.float32)
    tensors[f"{outer}multi_modal_projector.mm_soft_emb_norm.weight"] = np.ones(3, ml_dtypes.bfloat16)
    inner = {key: value for key, value in text.items() if key not in ("architectures", "dtype")}
    config = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "dtype": "bfloat16",
        "text_config": inner, "vision_config": {"model_type": "siglip_vision_model", "image_size": 8},
        "image_token_index": 60, "mm_tokens_per_image": 4,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_a_model_with_pictures_is_exported_as_its_text_model(prefix, tmp_path):
    folder = with_pictures(tmp_path / "gemma", prefix)
    model, params = load_model(folder)
    jax.tree.map(np.testing.assert_array_equal, params, load_model(FOLDERS["gemma3"])[1])
    for dtype in ("source", "float32"):
        out = export_hf(tmp_path / dtype, model, params, folder, dtype=dtype)
        assert config_of(out)["architectures"] == ["Gemma3ForCausalLM"]
        assert config_of(out)["model_type"] == "gemma3_text"
        assert config_of(out)["torch_dtype"] == ("bfloat16" if dtype == "source" else dtype)
        stored = load_file(FOLDERS["gemma3"] / "model.safetensors")
        wide = {name: tensor.astype(np.float32) for name, tensor in stored.items()}
        same_bits(load_file(out / "model.safetensors"), stored if dtype == "source" else wide)
        jax.tree.map(np.testing.assert_array_equal, load_model(out)[1], params)


def test_a_fused_tensor_of_other_rows_is_one_line(tmp_path):
    folder = tmp_path / "phi3"
    shutil.copytree(FOLDERS["phi3"], folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.1.self_attn.qkv_proj.weight", "model.layers.2.mlp.gate_up_proj.weight"):
        tensors[name] = tensors[name][:-8]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        load_model(folder)
    assert str(caught.value).endswith(
        "do not fit its config.json: shape of"
        " model.layers.1.self_attn.qkv_proj.weight [56, 32] instead of [64, 32]"
        " (32 query + 16 key + 16 value),"
        " model.layers.2.mlp.gate_up_proj.weight [40, 32] instead of [48, 32] (24 gate + 24 up)"
    )
    del tensors["model.layers.1.self_attn.qkv_proj.weight"]
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((32, 32), np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing .*1\.self_attn\.qkv_proj.*not used .*1\.self_attn\.q_proj"):
        load_model(folder)
