"""Keys of a `config.json` that the decoder does not read: which are harmless, and at which values.

Every other key is refused by name, whatever its value: `is_causal: false` is a different model.
"""

from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.files.fields import shown
from xtoken_jax.models.hf.families import Family
from xtoken_jax.models.hf.settings import REQUIRED

# Read for every family.
_READ = {
    *REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings",
    "tie_word_embeddings", "initializer_range", "max_position_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id", "dtype", "torch_dtype", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "sliding_window_pattern", "_sliding_window_pattern", "architectures", "model_type",
    "hidden_act", "hidden_activation",
}  # fmt: skip
# Harmless at any value.
_HARMLESS = {
    # notes: where the files come from, what wrote them
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "transformers.js_config",
    "unsloth_fixed", "unsloth_version", "model_name", "language", "license", "is_llama_config",
    "base_model_name_or_path", "finetuning_task", "task_specific_params", "multiple_of",
    "ffn_dim_multiplier", "_pre_quantization_dtype",
    # lengths that tokenizers and servers go by
    "max_sequence_length", "max_seq_len", "max_seq_length", "model_max_length", "seq_length",
    "tokenizer_model_max_length",
    # tokenizer and pipelines
    "tokenizer_class", "tokenizer_padding_side", "padding_side", "prefix", "sep_token_id", "unk_token_id",
    "mask_token_id", "eod_token_id", "decoder_start_token_id", "vocab_file",
    # generation defaults, which transformers too takes from generation_config.json only
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids", "begin_suppress_tokens",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length", "max_new_tokens",
    "min_length", "no_repeat_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "penalty_alpha",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "target_lookbehind", "temperature", "top_k", "top_p", "typical_p", "use_cache", "cache_implementation",
    # how it runs, not what it computes
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "attn_implementation", "_experts_implementation", "experts_implementation", "_flash_attn_2_enabled",
    "use_flash_attn", "use_flash_attention", "use_flash_attention_2", "chunk_size_feed_forward",
    "pretraining_tp", "torchscript", "use_bfloat16", "tf_legacy_loss", "return_dict", "output_attentions",
    "output_hidden_states", "tie_last_hidden_states",
    # training with transformers, and heads of classifiers
    "gradient_checkpointing", "neftune_noise_alpha", "classifier_dropout", "id2label", "label2id",
    "num_labels", "problem_type",
    # attention past 262,144 positions in vLLM (Qwen2.5-1M); transformers does not read it
    "dual_chunk_attention_config",
}  # fmt: skip
_OFF = (False, None)
# Key -> the values at which the decoder computes what the checkpoint means; an absent key is one of them.
_AT_VALUES: dict[str, tuple[Any, ...]] = {
    "is_causal": (True,),
    "use_bidirectional_attention": _OFF,
    "is_encoder_decoder": _OFF,
    "is_decoder": (True, *_OFF),
    "add_cross_attention": _OFF,
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": _OFF,
    "pruned_heads": ({}, None),
    "per_layer_config": ({}, None),
    "attention_dropout": (0, None),
    "embd_pdrop": (0, None),
    "resid_pdrop": (0, None),
    "residual_dropout": (0, None),
    "hidden_dropout": (0, None),
    "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
    "activation": ("swiglu", None),
    "attention_bias": _OFF,
    "attention_out_bias": _OFF,
    "mlp_bias": _OFF,
    "lm_head_bias": _OFF,
    "bias": _OFF,
    "use_bias": _OFF,
    "use_qk_norm": _OFF,
    "qk_layernorm": _OFF,
    "clip_qkv": (None,),
    "rope_interleaved": _OFF,
    "use_mrope": _OFF,
    "use_dynamic_ntk": _OFF,
    "use_logn_attn": _OFF,
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "num_nextn_predict_layers": (0, None),
    "quantization_config": (None, {}),
    "compression_config": (None, {}),
}


def refuse_unknown(hf: dict[str, Any], family: Family, architecture: str) -> None:
    """Raise UserError for a key of config.json that changes what the model computes, or might.

    Args:
        hf: content of config.json.
        family: whose config.json it is.
        architecture: its name.
    """
    if hf.get("quantization"):
        raise UserError(
            f"quantization={shown(hf['quantization'])}: the weights are quantized by MLX, which is not"
            " implemented; use the checkpoint that this one was converted from, or run mlx_lm.convert with"
            " --dequantize"
        )
    known = _READ | _HARMLESS | set(family.keys) | family.ignored
    values_of = {**_AT_VALUES, **family.values}
    for key, value in hf.items():
        if key in known and key not in family.values:
            continue
        if key in values_of:
            if value not in values_of[key]:
                remedy = "; use the weights before quantization" if "quant" in key else ""
                raise UserError(
                    f"{key}={shown(value)} is not implemented for {architecture};"
                    f" supported: {key}={shown(values_of[key][0])}{remedy}"
                )
        elif key == "sliding_window_size":  # of Gemma 2, next to sliding_window
            _check_window(hf, family)
        elif key == "auto_map":
            _check_code(value, architecture)
        elif key != "quantization":
            raise UserError(
                f"{key}={shown(value)} is not known for {architecture}; if the model does not need it,"
                " take it out of config.json"
            )


def _check_window(hf: dict[str, Any], family: Family) -> None:
    window = hf.get("sliding_window", family.defaults.get("sliding_window"))
    if hf["sliding_window_size"] not in (window, None):
        raise UserError(
            f"sliding_window_size={shown(hf['sliding_window_size'])} differs from"
            f" sliding_window={shown(window)}, which is read; take the wrong one out of config.json"
        )


def _check_code(auto_map: Any, architecture: str) -> None:
    """Refuse a model whose code, in its own folder, is a class of another name than the architecture."""
    code = auto_map.get("AutoModelForCausalLM") if isinstance(auto_map, dict) else None
    if isinstance(code, str) and code.rpartition(".")[2] != architecture:
        raise UserError(
            f"auto_map: the model is code of its own folder, {shown(code)}, and not {architecture}; it is not"
            " implemented"
        )
