"""config.json in both spellings, its round trip, and everything that must be refused by name."""

import dataclasses
import json
import math

import pytest

from models import tiny
from xtoken_jax.errors import UserError
from xtoken_jax.models import DecoderConfig, LinearScaling, Llama3Scaling, Yarn, read_config

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
        ({"rope_scaling": {"rope_type": "yarn"}}, ["yarn", "lack factor"]),
        ({"rope_scaling": {"rope_type": "dynamic"}}, ['rope type "dynamic"', "llama3, longrope, yarn"]),
        ({"rope_scaling": {"rope_type": "su"}}, ['rope type "su"']),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, ["factor=0"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "alpha": 3}}, ["alpha=3"]),
        ({"rope_scaling": {"full_attention": {"rope_type": "default"}}}, ["full_attention", "llama"]),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
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
    }
    assert DecoderConfig.from_hf({**LLAMA_31, **neutral}) == DecoderConfig.from_hf(LLAMA_31)


# Keys that published files of these families carry.
PUBLISHED = {
    "max_length": 4096, "max_sequence_length": 2048, "model_name": "x", "_pre_quantization_dtype": "float16",
    "_attn_implementation_autoset": True, "_flash_attn_2_enabled": True, "activation": "swiglu",
    "quantization_config": {}, "unsloth_version": "2025.1", "unsloth_fixed": True, "neftune_noise_alpha": 5,
    "transformers.js_config": {"dtype": "q4"}, "_name_or_path": "a/b", "torchscript": False,
    "use_bfloat16": False, "tf_legacy_loss": False, "task_specific_params": None, "num_beams": 4, "top_k": 50,
    "temperature": 0.6, "repetition_penalty": 1.05, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
    "pruned_heads": {}, "is_encoder_decoder": False, "is_decoder": True, "add_cross_attention": False,
    "cross_attention_hidden_size": None, "prefix": None, "sep_token_id": None, "use_mrope": False,
    "rope_interleaved": False, "lm_head_bias": False, "attn_logit_softcapping": None, "is_causal": True,
    "auto_map": {"AutoConfig": "c.LlamaConfig", "AutoModelForCausalLM": "m.LlamaForCausalLM"},
    "gradient_checkpointing": False, "seq_length": 8192, "bad_words_ids": None, "quantization": None,
}  # fmt: skip


@pytest.mark.parametrize("key", PUBLISHED)
def test_a_key_that_changes_nothing_is_accepted(key):
    config = DecoderConfig.from_hf({**LLAMA_31, key: PUBLISHED[key]})
    assert config == DecoderConfig.from_hf(LLAMA_31)
    assert config.to_hf()[key] == PUBLISHED[key]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_causal", False), ("is_causal", None), ("some_future_key", False), ("some_future_key", None),
        ("use_norm", False), ("scale_scores", 0), ("norm_layers", []), ("extra", {}),
        ("pruned_heads", {"1": [0]}), ("activation", "geglu"), ("rope_interleaved", True),
        ("use_mrope", True), ("is_encoder_decoder", True),
        ("quantization_config", {"quant_method": "awq"}), ("quantization", {"group_size": 64, "bits": 4}),
        ("auto_map", {"AutoModelForCausalLM": "model.DiffusionLlama"}), ("num_local_experts", 8),
        ("attn_logit_softcapping", 50.0), ("per_layer_config", {"0": {"head_dim": 4}}), ("clip_qkv", 8),
    ],
)  # fmt: skip
def test_any_other_key_is_refused_whatever_its_value(key, value):
    with pytest.raises(UserError, match=key) as caught:
        DecoderConfig.from_hf({**LLAMA_31, key: value})
    assert "\n" not in str(caught.value)


def test_the_second_window_of_gemma_2_must_agree_with_the_first():
    gemma = {
        **{key: LLAMA_31[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")},
        "model_type": "gemma2",
    }
    both = DecoderConfig.from_hf({**gemma, "sliding_window": 1024, "sliding_window_size": 1024})
    assert both == DecoderConfig.from_hf({**gemma, "sliding_window": 1024})
    with pytest.raises(UserError, match="sliding_window_size=512 differs from sliding_window=1024"):
        DecoderConfig.from_hf({**gemma, "sliding_window": 1024, "sliding_window_size": 512})


LINEAR = {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "theta", "scaling"),
    [
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, 1e4, 4.0),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 7e5}, "rope_theta": 3e5}, 3e5, 4.0),
        ({"rope_scaling": {**LINEAR, "rope_theta": 2e5}, "rope_theta": 3e5}, 2e5, 4.0),
        ({"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 7e5}, "rope_theta": 3e5}, 7e5, 4.0),
        ({"rope_scaling": None, "rope_parameters": LINEAR, "rope_theta": 3e5}, 3e5, 4.0),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": {**LINEAR, "rope_theta": 7e5}}, 1e4, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e4, 2),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2}}, 1e4, None),
        ({"rope_scaling": {"rope_type": "default", "factor": 4.0}}, 1e4, None),
        ({"rope_parameters": {}, "rope_theta": 3e5}, 3e5, None),
    ],
)
def test_of_two_rope_settings_transformers_choice_is_read(keys, theta, scaling):
    plain = {key: value for key, value in LLAMA_31.items() if key not in ("rope_scaling", "rope_theta")}
    config = DecoderConfig.from_hf({**plain, **keys})
    assert config.rope_theta == theta
    assert config.rope_scaling == (None if scaling is None else LinearScaling(scaling))


def test_yarn_is_read_with_its_defaults():
    def yarn(top=(), **settings):
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, **settings}
        return DecoderConfig.from_hf({**LLAMA_31, "rope_scaling": rope, **dict(top)}).rope_scaling

    assert yarn() == Yarn(4.0, 8192, 0.1 * math.log(4) + 1, 32.0, 1.0, True)
    assert yarn(attn_factor=0.8) == yarn()  # as in transformers
    assert yarn(attention_factor=0.5, truncate=False) == Yarn(4.0, 8192, 0.5, truncate=False)
    assert yarn(mscale=2, mscale_all_dim=1).attention_factor == pytest.approx(1.277259 / 1.138629, rel=1e-6)
    assert yarn(mscale=2) == yarn()
    assert yarn(factor=None).factor == 16.0  # 131,072 / 8,192
    assert yarn({"original_max_position_embeddings": 4096}).original_max_position_embeddings == 4096
    assert yarn(original_max_position_embeddings=None).original_max_position_embeddings == 131072
    with pytest.raises(UserError, match="truncate"):
        yarn(truncate="no")


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
    refused("config.json: not the settings of a model (not valid JSON")
    path.write_bytes(b"\xff\xfe")
    refused("UTF-16")
    path.write_text("[1]")
    refused("a list where an object belongs")
    path.write_text('{"model_type": "llama"}')
    refused("config.json: ", "lacks vocab_size")


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_tiny_llamas_are_read(name):
    config = read_config(tiny.DATA / name)
    assert config.tie_embeddings == (name == "tied")
    assert (config.rope_scaling is not None) == (name == "llama3")
    assert config.head_dim == (12 if name == "untied" else 8)
