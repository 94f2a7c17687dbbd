"""Types and ranges of what is read from a `config.json`, checked before anything is computed from it.

The upper limits are well above the sizes of published models. They keep a broken file from taking all time or
memory before its sizes are compared with the weights.
"""

from __future__ import annotations

from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.files.fields import (
    FLAG,
    TEXT,
    Check,
    check_fields,
    either,
    listing,
    number,
    optional,
    whole,
)

MAX_PARAMETERS = 10**13
_MAX_LAYERS = 2048

_POSITIONS = whole(1, 2**40)
_ID = whole(-1, 2**31 - 1)  # -1: conversions of the first Llama have it as PAD, for none
_ENDS = either(_ID, listing(_ID, 1000))
_SOFTCAP = number(0, 1e9)
_FACTORS = either(number(0, 1e9), listing(number(0, 1e9), 2**16))

_SETTINGS: dict[str, Check] = {
    "architectures": either(TEXT, listing(TEXT, 100)),
    "model_type": TEXT,
    "vocab_size": whole(1, 2**27),
    "hidden_size": whole(1, 2**20),
    "intermediate_size": whole(1, 2**22),
    "num_hidden_layers": whole(1, _MAX_LAYERS),
    "num_attention_heads": whole(1, 2**16),
    "num_key_value_heads": whole(1, 2**16),
    "head_dim": whole(1, 2**16),
    "rms_norm_eps": number(0, 1),
    "rope_theta": number(0, 1e15),
    "rope_local_base_freq": number(0, 1e15),
    "partial_rotary_factor": number(0, 1),
    "original_max_position_embeddings": _POSITIONS,
    "max_position_embeddings": _POSITIONS,
    "sliding_window": _POSITIONS,
    "sliding_window_pattern": whole(1, 2**31),
    "_sliding_window_pattern": whole(1, 2**31),
    "max_window_layers": whole(0, 2**31),
    "layer_types": listing(TEXT, _MAX_LAYERS),
    "use_sliding_window": FLAG,
    "tie_word_embeddings": FLAG,
    "attention_bias": FLAG,
    "attention_out_bias": FLAG,
    "mlp_bias": FLAG,
    "initializer_range": number(0, 1e6),
    "query_pre_attn_scalar": number(0, 1e9),
    "attn_logit_softcapping": _SOFTCAP,
    "final_logit_softcapping": _SOFTCAP,
    "bos_token_id": _ID,
    "eos_token_id": _ENDS,
    "pad_token_id": _ID,
    "dtype": TEXT,
    "torch_dtype": TEXT,
    "hidden_act": TEXT,
    "hidden_activation": TEXT,
}
_ROPE: dict[str, Check] = {
    "rope_type": TEXT,
    "type": TEXT,
    "rope_theta": number(0, 1e15),
    "partial_rotary_factor": number(0, 1),
    "original_max_position_embeddings": _POSITIONS,
    "factor": number(0, 1e9),
    "attention_factor": number(0, 1e9),
    "beta_fast": number(0, 1e9),
    "beta_slow": number(0, 1e9),
    "mscale": number(0, 1e9),
    "mscale_all_dim": number(0, 1e9),
    "low_freq_factor": number(0, 1e9),
    "high_freq_factor": number(0, 1e9),
    "short_factor": _FACTORS,
    "long_factor": _FACTORS,
    "truncate": FLAG,
}


def check_settings(hf: dict[str, Any], where: str = "") -> None:
    """Raise UserError for a setting of another type, or out of proportion.

    Args:
        hf: content of config.json, or an object within it.
        where: begins the message; "" for config.json itself.
    """
    check_fields(hf, _or_null(_SETTINGS), where)


def check_rope(rope: dict[str, Any]) -> None:
    """Raise UserError for a rope setting of another type, or out of proportion.

    Args:
        rope: the settings of one kind of layer.
    """
    check_fields(rope, _or_null(_ROPE), "rope settings")


def check_generation(content: dict[str, Any], where: str) -> None:
    """Raise UserError for an `eos_token_id` that is neither an id nor a list of ids.

    Args:
        content: of generation_config.json.
        where: the file's name.
    """
    check_fields(content, {"eos_token_id": optional(_ENDS)}, where)


def _or_null(table: dict[str, Check]) -> dict[str, Check]:
    return {key: optional(check) for key, check in table.items()}


def check_parameters(count: int) -> None:
    """Raise UserError for more parameters than any machine holds.

    Args:
        count: of the model.
    """
    if count > MAX_PARAMETERS:
        raise UserError(f"the sizes make {count:.1e} parameters, more than any machine holds; correct them")
