"""config.json in both spellings, its round trip, and everything that must be refused by name."""

import dataclasses
import json

import pytest

from models import tiny
from xtoken_jax.errors import UserError
from xtoken_jax.models import DecoderConfig, Llama3Scaling, read_config

# meta-llama/Llama-3.1-8B's config.json as published, in the older spelling
LLAMA_31 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_llama_3_1_is_read_whole():
    assert DecoderConfig.from_hf(LLAMA_31) == DecoderConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192),
        tie_embeddings=False,
        initializer_range=0.02,
        max_position_embeddings=131072,
        bos_token_id=128000,
        eos_token_id=(128001, 128008, 128009),
        dtype="bfloat16",
    )


def test_both_rope_spellings_are_the_same_model():
    newer = {k: v for k, v in LLAMA_31.items() if k not in ("rope_scaling", "rope_theta", "torch_dtype")}
    newer["rope_parameters"] = {**LLAMA_31["rope_scaling"], "rope_theta": 500000.0}
    newer["dtype"] = "bfloat16"
    assert DecoderConfig.from_hf(newer) == DecoderConfig.from_hf(LLAMA_31)
    plain = {**newer, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert DecoderConfig.from_hf(plain).rope_theta == 1e6
    assert DecoderConfig.from_hf(plain).rope_scaling is None


def test_the_round_trip_keeps_every_value():
    config = DecoderConfig.from_hf(LLAMA_31)
    hf = json.loads(json.dumps(config.to_hf()))
    assert DecoderConfig.from_hf(hf) == config
    dropped = {"pretraining_tp", "transformers_version", "use_cache", "attention_dropout"}
    assert {k: hf.get(k) for k in LLAMA_31 if k not in dropped} == {
        k: v for k, v in LLAMA_31.items() if k not in dropped
    }
    other = dataclasses.replace(config, rope_scaling=None, tie_embeddings=True, eos_token_id=7, dtype=None)
    assert DecoderConfig.from_hf(other.to_hf()) == other
    assert "torch_dtype" not in other.to_hf()


def test_absent_keys_take_llamas_defaults():
    keys = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    config = DecoderConfig.from_hf({"model_type": "llama", **{key: LLAMA_31[key] for key in keys}})
    assert (config.num_kv_heads, config.head_dim, config.norm_eps, config.rope_theta) == (32, 128, 1e-6, 1e4)
    assert not config.tie_embeddings
    assert config.rope_scaling is None


def test_a_given_head_dim_wins():
    assert DecoderConfig.from_hf({**LLAMA_31, "head_dim": 64}).head_dim == 64


def test_a_config_is_hashable():
    assert hash(DecoderConfig.from_hf(LLAMA_31)) == hash(DecoderConfig.from_hf(dict(LLAMA_31)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            ["MambaForCausalLM", "supported: LlamaForCausalLM, Mistral"],
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["Classification", "LlamaForCausalLM"]),
        ({"architectures": None, "model_type": "mamba"}, ["mamba", "supported: LlamaForCausalLM, Mistral"]),
        ({"architectures": None, "model_type": None}, ["null", "supported: LlamaForCausalLM, Mistral"]),
        ({"model_type": "mistral"}, ["mistral", "supported: LlamaForCausalLM, Mistral"]),
        ({"resid_pdrop": 0.1}, ["resid_pdrop=0.1"]),
        ({"some_future_key": 3}, ["some_future_key=3", "LlamaForCausalLM", "take it out"]),
        ({"attention_dropout": 0.1}, ["attention_dropout=0.1"]),
        ({"hidden_act": "gelu"}, ['hidden_act="gelu"', "silu"]),
        ({"sliding_window": 4096}, ["sliding_window=4096"]),
        ({"layer_types": ["sliding_attention"]}, ["layer_types"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"rope_scaling": {"type": "linear"}}, ["linear", "factor"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ['rope type "yarn"']),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ['rope type "dynamic"']),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor=0.5"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "original_max"]),
        ({"rope_scaling": "llama3"}, ["rope settings"]),
        ({"vocab_size": None, "hidden_size": None}, ["lacks vocab_size, hidden_size"]),
        ({"vocab_size": 0}, ["vocab_size=0"]),
        ({"hidden_size": "big"}, ['hidden_size="big"']),
        ({"num_attention_heads": 0}, ["num_attention_heads=0"]),
        ({"num_hidden_layers": 2.5}, ["num_hidden_layers=2.5"]),
        ({"num_key_value_heads": 5}, ["num_key_value_heads=5"]),
        ({"hidden_size": 4100}, ["hidden_size=4100", "num_attention_heads=32"]),
        ({"head_dim": 7}, ["head_dim=7"]),
        ({"rms_norm_eps": "small"}, ["norm_eps"]),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change, words):
    with pytest.raises(UserError) as caught:
        DecoderConfig.from_hf({**LLAMA_31, **change})
    message = str(caught.value)
    assert [word for word in words if word not in message] == []
    assert "\n" not in message


def test_settings_at_their_neutral_value_are_accepted():
    neutral = {
        "sliding_window": None,
        "use_sliding_window": False,
        "quantization_config": None,
        "layer_types": ["full_attention"] * 32,
        "partial_rotary_factor": 1.0,
        "some_future_key": False,
    }
    assert DecoderConfig.from_hf({**LLAMA_31, **neutral}) == DecoderConfig.from_hf(LLAMA_31)


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path):
    def refused(*words):
        with pytest.raises(UserError) as caught:
            read_config(tmp_path / "model")
        message = str(caught.value)
        assert str(tmp_path / "model") in message
        assert "\n" not in message
        assert [word for word in words if word not in message] == []

    refused("no such model folder")
    (tmp_path / "model").mkdir()
    refused("no config.json")
    path = tmp_path / "model" / "config.json"
    path.write_text('{"model_type": ')
    refused("cannot read", "config.json")
    path.write_bytes(b"\xff\xfe")
    refused("cannot read")
    path.write_text("[1]")
    refused("list, not an object")
    path.write_text('{"model_type": "llama"}')
    refused("config.json: ", "lacks vocab_size")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_tiny_llamas_are_read(name):
    config = read_config(tiny.DATA / name)
    assert config.tie_embeddings == (name == "tied")
    assert (config.rope_scaling is not None) == (name == "llama3")
    assert config.head_dim == (12 if name == "untied" else 8)
