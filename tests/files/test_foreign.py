"""Models in other formats are named as what they are, with what to do."""

import json
import shutil

import numpy as np
import pytest
from models import tiny

from xtoken_jax.errors import UserError
from xtoken_jax.hub import resolve_folder
from xtoken_jax.models.config import read_config
from xtoken_jax.models.hf.loading import load_model
from xtoken_jax.tokens.tokenizer import Tokenizer

# Files of a folder without config.json and tokenizer.json -> what it is, what to do.
FOLDERS = {
    "peft": (["adapter_config.json", "adapter_model.safetensors"], "a PEFT adapter", "merge_and_unload"),
    "mlx": (["weights.npz"], "a model of MLX", "made from"),
    "mlx shards": (["weights.00.npz", "tokenizer.model"], "a model of MLX", "made from"),
    "gguf": (["model-Q4_K_M.gguf"], "GGUF files of llama.cpp", "made from"),
    "onnx": (["onnx/model.onnx"], "an ONNX model", "made from"),
    "pickled": (["pytorch_model-00001-of-00002.bin"], "only pickled weights", "save_pretrained"),
    "meta": (["consolidated.00.pth", "params.json"], "only pickled weights", "save_pretrained"),
    "tensorflow": (["tf_model.h5"], "TensorFlow or Flax", "save_pretrained"),
    "diffusers": (["model_index.json", "unet/config.json"], "a diffusers pipeline", "language model"),
    "embeddings": (["modules.json", "1_Pooling/config.json"], "sentence-transformers", "language model"),
    "run": (["run.json", "metrics.jsonl", "student/config.json"], "the folder of a run", "/student"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_another_format_is_named(tmp_path, name):
    files, *words = FOLDERS[name]
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("{}")
    for read in (read_config, lambda folder: Tokenizer.load(folder, compare_auto=False)):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        message = str(error.value)
        assert str(tmp_path) in message
        assert [word for word in words if word not in message] == []
        assert "\n" not in message


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("model.Q8_0.gguf", ["GGUF file", "made from"]),
        ("model.onnx", ["ONNX"]),
        ("model.safetensors", ["name its folder"]),
        ("pytorch_model.bin", ["pickled", "save_pretrained"]),
        ("config.json", ["name its folder"]),
    ],
)
def test_a_file_is_named(tmp_path, file, words):
    (tmp_path / file).write_text("{}")
    with pytest.raises(UserError, match=f"not a folder: {tmp_path / file} is ") as error:
        resolve_folder(tmp_path / file)
    assert [word for word in words if word not in str(error.value)] == []


def test_an_adapter_next_to_a_model_is_not_left_out(tmp_path):
    folder = tiny.copy("tied", tmp_path / "model")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    with pytest.raises(UserError, match='a PEFT adapter of "org/base", not a whole model; merge it first'):
        load_model(folder)
    (folder / "adapter_config.json").write_text("[")
    with pytest.raises(UserError, match="a PEFT adapter, not a whole model"):
        read_config(folder)


def test_other_weights_next_to_safetensors_do_no_harm(tmp_path):
    folder = tiny.copy("tied", tmp_path / "model")
    for name in ("pytorch_model.bin", "model.gguf", "weights.npz", "tf_model.h5", "model.onnx"):
        (folder / name).write_text("")
    load_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "weights.npz").unlink()
    read_config(folder)  # of which a random start has enough
    with pytest.raises(UserError, match=r"GGUF files of llama\.cpp.*student\.init=random"):
        load_model(folder)


@pytest.mark.parametrize("suffix", ["scales", "qweight", "weight_scale_inv"])
def test_quantized_weights_are_named(tmp_path, suffix):
    """Of MLX, say, where config.json does not tell."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.DATA / "tied", folder)
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    tiny.replace_tensors(folder, lambda tensors: {**tensors, name: np.ones((4, 2), np.float32)})
    with pytest.raises(UserError, match=rf"the weights are quantized \({name}; by MLX, GPTQ"):
        load_model(folder)
