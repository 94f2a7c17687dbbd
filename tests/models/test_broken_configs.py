"""Settings of other types and out of all proportion are one line, before anything is allocated."""

import json
import time

import pytest

from xtoken_jax.errors import UserError
from xtoken_jax.models.config import DecoderConfig, read_config
from xtoken_jax.models.hf.loading import load_model
from xtoken_jax.models.hf.side_files import side_files

from . import tiny

QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896,
    "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
}  # fmt: skip
ODD = {
    "vocab_size": (0, -1, 1.0, True, "151936", [], {}, 10**12),
    "hidden_size": (0, -896, 896.0, False, [896], 2**40),
    "intermediate_size": (0, "4864", 10**9),
    "num_hidden_layers": (0, 10**6, 10**30, 24.0, "24"),
    "num_attention_heads": (0, 14.0, 10**7, [14]),
    "num_key_value_heads": (0, -2, 2.5, "2"),
    "head_dim": (0, 64.0, 10**9, {}),
    "hidden_act": ([], {}, 3, True),
    "rms_norm_eps": (-1e-6, "1e-6", 5, []),
    "rope_theta": (-1, "10000", 1e300, []),
    "max_position_embeddings": (0, -1, 1e30, "32768", 10**30),
    "sliding_window": (0, 4096.0, "4096", []),
    "max_window_layers": (-1, 3.5, "24"),
    "layer_types": ("full_attention", {}, [1], [None] * 24, ["full_attention"] * 3000),
    "tie_word_embeddings": ("false", 0, []),
    "use_sliding_window": (1, "no"),
    "initializer_range": (-0.02, "0.02"),
    "eos_token_id": ("</s>", [[1]], [1.0], {}, True, -5, 10**12),
    "bos_token_id": ([1], "<s>", 0.5),
    "pad_token_id": ([[]], "x"),
    "torch_dtype": (16, ["bfloat16"]),
    "architectures": ({"x": 1}, 3, [1], [["Qwen2ForCausalLM"]]),
    "model_type": (["qwen2"], 2),
}
CASES = [(key, value) for key, values in ODD.items() for value in values]


@pytest.mark.parametrize(("key", "value"), CASES, ids=[f"{key}-{n}" for n, (key, _) in enumerate(CASES)])
def test_an_odd_value_is_named(key, value):
    DecoderConfig.from_hf(QWEN)
    with pytest.raises(UserError) as error:
        DecoderConfig.from_hf({**QWEN, key: value})
    message = str(error.value)
    assert message.startswith(f"{key}=")
    assert " must be " in message
    assert "\n" not in message
    assert len(message) < 250


ROPE = {
    "factor": (-2, "4", [4.0], 1e300, True),
    "original_max_position_embeddings": (0, 4096.5, "4096"),
    "beta_fast": ("32", []),
    "attention_factor": ({}, -1.0),
    "truncate": (1, "yes"),
    "rope_theta": ("1e6", [1e6]),
    "type": (3, ["yarn"]),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ROPE.items() for value in values])
def test_an_odd_rope_setting_is_named(key, value):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    DecoderConfig.from_hf({**QWEN, "rope_scaling": rope})
    with pytest.raises(UserError, match=key) as error:
        DecoderConfig.from_hf({**QWEN, "rope_scaling": {**rope, key: value}})
    assert "\n" not in str(error.value)


def test_sizes_that_no_machine_holds_are_refused():
    sizes = {
        "hidden_size": 2**19,
        "intermediate_size": 2**21,
        "num_hidden_layers": 2000,
        "num_attention_heads": 16,
    }
    with pytest.raises(UserError, match=r"the sizes make .* parameters, more than any machine holds"):
        DecoderConfig.from_hf({**QWEN, **sizes})


def test_many_layers_are_compared_with_the_weights_in_no_time(tmp_path):
    folder = tiny.copy("tied", tmp_path / "model", num_hidden_layers=2048)
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"do not fit its config.json: missing model\.layers\.2\."):
        load_model(folder)
    assert time.monotonic() - begin < 10
    (folder / "config.json").write_text(
        json.dumps({**json.loads((folder / "config.json").read_text()), "num_hidden_layers": 10**6})
    )
    with pytest.raises(UserError, match=r"config\.json: num_hidden_layers=1000000 must be"):
        read_config(folder)


@pytest.mark.parametrize("value", ["</s>", [[2]], {}, 1.5, [None]])
def test_ends_of_another_type_in_generation_config_are_refused(tmp_path, value):
    folder = tiny.copy("tied", tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id=.* must be"):
        side_files(folder, {"eos_token_id": 1}, ends=(3,))


@pytest.mark.parametrize("files", ["[]", "{}", '{"a": 3}', '{"a": ["x.safetensors"]}', "null"])
def test_an_index_without_files_is_refused(tmp_path, files):
    folder = tiny.copy("tied", tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(f'{{"weight_map": {files}}}')
    with pytest.raises(
        UserError, match=r"weight_map must name the file of each tensor\); get the model's files"
    ):
        load_model(folder)
