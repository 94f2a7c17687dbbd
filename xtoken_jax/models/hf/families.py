"""The families of checkpoints: what their `config.json` means, and the names of their tensors.

A family is an entry of `FAMILIES`: a table of weights and a mapping of settings, no code of its own. The
decoder is one for all of them (`decoder.py`); CONTRIBUTING.md shows how an entry is added.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Weight(NamedTuple):
    """Where the file keeps a parameter: its tensor's name, and the order of its axes.

    `axes` uses the parameter's shape letters less L; letters written together share one axis of the
    file: "NH D" is [heads x head width, width]. `before` names the parameters whose rows come first in
    a tensor that holds several, by the first axis of each: "NH GH" for a value in a fused query, key, value.
    """

    name: str
    axes: str
    before: str = ""


class Family(NamedTuple):
    """One architecture.

    Attributes:
        model_type: of config.json.
        weights: parameter path -> its tensor, one for each layer where the name says {layer}. Paths that a
            model does not have (biases, say) are not looked at.
        settings: fields of `DecoderConfig` that all its models share.
        keys: further keys of config.json -> the fields they set.
        defaults: what an absent key means, where it is not what it means for Llama.
        activation: the key that names the activation.
        activations: further names of activations.
        windows: which layers have the sliding window: "none", "all", "qwen" (`use_sliding_window`, from
            `max_window_layers` on), "pattern" (`layer_types`, or all but each n-th), "first" (the same, but
            for the first of each n) or "layers" (`layer_types`, or all).
        pattern: n of "pattern" and "first" where config.json does not say.
        partial_rotary: heads may be rotated in part.
        two_ropes: sliding layers have a rotary base of their own.
        rope_types: names of rope types -> what they mean, where these are the only ones.
        ignored: further keys of config.json that are harmless at any value.
        values: further keys of config.json -> the values at which they are harmless.
        sizes: what an absent key means in the text_config of a multimodal checkpoint.
    """

    model_type: str
    weights: Mapping[str, Weight]
    settings: Mapping[str, Any] = {}
    keys: Mapping[str, tuple[str, ...]] = {}
    defaults: Mapping[str, Any] = {}
    activation: str = "hidden_act"
    activations: Mapping[str, str] = {}
    windows: str = "none"
    pattern: int = 2
    partial_rotary: bool = False
    two_ropes: bool = False
    rope_types: Mapping[str, str] = {}
    ignored: frozenset[str] = frozenset()
    values: Mapping[str, tuple[Any, ...]] = {}
    sizes: Mapping[str, int] = {}


class Multimodal(NamedTuple):
    """A checkpoint of a language model and more; only its language model is read, and exported on its own.

    Attributes:
        model_type: of config.json.
        texts: `model_type` of text_config -> architecture of the language model; the first one where
            text_config has none.
        other_tensors: prefixes of tensors that do not belong to the language model.
        keys: keys of config.json that do not concern the language model.
    """

    model_type: str
    texts: Mapping[str, str]
    other_tensors: tuple[str, ...]
    keys: frozenset[str]


_LAYER = "model.layers.{layer}."


def _attention(name: str, axes: str, bias: str) -> dict[str, Weight]:
    tensor = f"{_LAYER}self_attn.{name[0]}_proj"
    path = f"layers/attention/{name}"
    return {path: Weight(f"{tensor}.weight", axes), f"{path}_bias": Weight(f"{tensor}.bias", bias)}


def _feed_forward(name: str, axes: str) -> dict[str, Weight]:
    tensor, path = f"{_LAYER}mlp.{name}_proj", f"layers/feed_forward/{name}"
    return {path: Weight(f"{tensor}.weight", axes), f"{path}_bias": Weight(f"{tensor}.bias", axes.split()[0])}


_LLAMA = {
    "embedding": Weight("model.embed_tokens.weight", "V D"),
    "layers/attention_norm": Weight(f"{_LAYER}input_layernorm.weight", "D"),
    **_attention("query", "NH D", "NH"),
    **_attention("key", "GH D", "GH"),
    **_attention("value", "GH D", "GH"),
    **_attention("output", "D NH", "D"),
    "layers/attention/query_norm": Weight(f"{_LAYER}self_attn.q_norm.weight", "H"),
    "layers/attention/key_norm": Weight(f"{_LAYER}self_attn.k_norm.weight", "H"),
    "layers/feed_forward_norm": Weight(f"{_LAYER}post_attention_layernorm.weight", "D"),
    **_feed_forward("gate", "F D"),
    **_feed_forward("up", "F D"),
    **_feed_forward("down", "D F"),
    "final_norm": Weight("model.norm.weight", "D"),
    "unembedding": Weight("lm_head.weight", "V D"),
}
_PHI3 = _LLAMA | {
    "layers/attention/query": Weight(f"{_LAYER}self_attn.qkv_proj.weight", "NH D"),
    "layers/attention/key": Weight(f"{_LAYER}self_attn.qkv_proj.weight", "GH D", before="NH"),
    "layers/attention/value": Weight(f"{_LAYER}self_attn.qkv_proj.weight", "GH D", before="NH GH"),
    "layers/feed_forward/gate": Weight(f"{_LAYER}mlp.gate_up_proj.weight", "F D"),
    "layers/feed_forward/up": Weight(f"{_LAYER}mlp.gate_up_proj.weight", "F D", before="F"),
}
_GEMMA = _LLAMA | {
    "layers/attention_post_norm": Weight(f"{_LAYER}post_attention_layernorm.weight", "D"),
    "layers/feed_forward_norm": Weight(f"{_LAYER}pre_feedforward_layernorm.weight", "D"),
    "layers/feed_forward_post_norm": Weight(f"{_LAYER}post_feedforward_layernorm.weight", "D"),
}

_ATTENTION_BIAS = {"attention_bias": ("qkv_bias", "output_bias")}
_GEMMA_SETTINGS = {"unit_offset_norms": True, "post_norms": True, "scale_embedding": True}
_GEMMA_KEYS = {
    **_ATTENTION_BIAS,
    "query_pre_attn_scalar": ("query_pre_attn_scalar",),
    "final_logit_softcapping": ("logit_softcap",),
}
_GEMMA_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_GEMMA3 = Family(
    "gemma3_text",
    _GEMMA,
    settings={**_GEMMA_SETTINGS, "qk_norm": True},
    keys=_GEMMA_KEYS,
    defaults={
        **_GEMMA_DEFAULTS,
        "vocab_size": 262_208,
        "max_position_embeddings": 131_072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    activation="hidden_activation",
    windows="pattern",
    pattern=6,
    two_ropes=True,
)


def _sizes(vocabulary: int, hidden: int, intermediate: int, positions: int) -> dict[str, int]:
    """Defaults of transformers for a config.json that says nothing, as text_config in LLaVA's."""
    return {
        "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": positions,
    }  # fmt: skip


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        "llama",
        _LLAMA,
        keys={**_ATTENTION_BIAS, "mlp_bias": ("mlp_bias",)},
        sizes=_sizes(32_000, 4096, 11_008, 2048),
    ),
    "MistralForCausalLM": Family(
        "mistral",
        _LLAMA,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        windows="all",
        sizes=_sizes(32_000, 4096, 14_336, 131_072),
    ),
    # Mistral whose layers differ
    "MinistralForCausalLM": Family(
        "ministral", _LLAMA, defaults={"num_key_value_heads": 8, "sliding_window": 4096}, windows="layers"
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2",
        _LLAMA,
        settings={"qkv_bias": True},
        defaults={"sliding_window": 4096, "max_window_layers": 28},
        windows="qwen",
        sizes=_sizes(151_936, 4096, 22_016, 32_768),
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3",
        _LLAMA,
        settings={"qk_norm": True},
        keys=_ATTENTION_BIAS,
        defaults={"head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
        windows="qwen",
        sizes=_sizes(151_936, 4096, 22_016, 32_768),
    ),
    # Phi-3, Phi-3.5-mini and Phi-4-mini
    "Phi3ForCausalLM": Family(
        "phi3",
        _PHI3,
        defaults={
            "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "max_position_embeddings": 4096,
        },
        windows="all",
        partial_rotary=True,
        rope_types=dict.fromkeys(("longrope", "su", "yarn"), "longrope"),
    ),
    # Code World Model
    "CwmForCausalLM": Family(
        "cwm",
        _LLAMA,
        keys={"mlp_bias": ("mlp_bias",)},
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "sliding_window": 8192,
            "max_position_embeddings": 131_072,
            "rope_theta": 1e6,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 1e6, "factor": 16.0, "high_freq_factor": 4.0,
                "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            },
            "bos_token_id": 128_000,
            "eos_token_id": [128_001, 128_008, 128_009],
        },
        windows="first",
        pattern=4,
    ),
    # Its dropout, like all dropout, is left out in training.
    "SeedOssForCausalLM": Family(
        "seed_oss",
        _LLAMA,
        keys={
            "attention_bias": ("qkv_bias",),
            "attention_out_bias": ("output_bias",),
            "mlp_bias": ("mlp_bias",),
        },
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "attention_bias": True,
            "max_position_embeddings": 524_288,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "pad_token_id": 1,
        },
        ignored=frozenset({"attention_dropout", "residual_dropout"}),
    ),
    "GemmaForCausalLM": Family(
        "gemma",
        _LLAMA,
        settings={"unit_offset_norms": True, "scale_embedding": True},
        keys=_ATTENTION_BIAS,
        defaults={
            "hidden_act": "gelu_pytorch_tanh",
            "head_dim": 256,
            "num_key_value_heads": 16,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        # the first releases say "gelu" and mean this
        activations={"gelu": "gelu_tanh"},
        values={"hidden_activation": ("gelu_pytorch_tanh", "gelu", None)},
    ),
    "Gemma2ForCausalLM": Family(
        "gemma2",
        _GEMMA,
        settings=_GEMMA_SETTINGS,
        keys={**_GEMMA_KEYS, "attn_logit_softcapping": ("attention_softcap",)},
        defaults={
            **_GEMMA_DEFAULTS,
            "vocab_size": 256_000,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        activation="hidden_activation",
        windows="pattern",
    ),
    "Gemma3ForCausalLM": _GEMMA3,
}  # fmt: skip

_PICTURES = {"vision_config", "image_token_index", "image_token_id"}
_PICTURE_TENSORS = tuple(
    f"{outer}{part}" for outer in ("", "model.") for part in ("vision_tower.", "multi_modal_projector.")
)
MULTIMODAL: dict[str, Multimodal] = {
    "Gemma3ForConditionalGeneration": Multimodal(
        "gemma3",
        {"gemma3_text": "Gemma3ForCausalLM"},
        _PICTURE_TENSORS,
        frozenset(
            {
                *_PICTURES, "boi_token_index", "eoi_token_index", "mm_tokens_per_image", "boi_token_id",
                "eoi_token_id",
            }
        ),
    ),
    "LlavaForConditionalGeneration": Multimodal(
        "llava",
        {
            "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM",
        },
        _PICTURE_TENSORS,
        frozenset(
            {
                *_PICTURES, "image_seq_length", "projector_hidden_act", "vision_feature_select_strategy",
                "vision_feature_layer", "multimodal_projector_bias", "ignore_index", "projection_dim",
                "vocab_size",
            }
        ),
    ),
}  # fmt: skip
