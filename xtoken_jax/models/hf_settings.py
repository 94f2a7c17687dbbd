"""The parts of a `config.json`: rope settings and windows in their spellings, and what is refused.

A setting that the decoder does not implement is refused here, by name: a checkpoint that loads and
computes something else is worse than one that does not load.
"""

import dataclasses
import json
import math
from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.models.families import FAMILIES, Family
from xtoken_jax.models.rope import LinearScaling, Llama3Scaling, LongRope, RopeScaling

FULL, SLIDING = "full_attention", "sliding_attention"
# what config.json calls it -> what it is
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# key -> the values under which the decoder computes what the checkpoint means; absent is one of them
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "embd_pdrop": (0, None),
    "resid_pdrop": (0, None),
    "full_attn_mod": (1, None),
    "interpolate_factor": (1, None),
    "quantization_config": (None,),
    "use_bidirectional_attention": (False, None),
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# read for every family
_READ = {
    *REQUIRED, "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters", "rope_local_base_freq", "partial_rotary_factor", "original_max_position_embeddings",
    "tie_word_embeddings", "initializer_range", "max_position_embeddings", "bos_token_id", "eos_token_id",
    "pad_token_id", "dtype", "torch_dtype", "sliding_window", "use_sliding_window", "max_window_layers",
    "layer_types", "sliding_window_pattern", "_sliding_window_pattern", "architectures", "model_type",
}  # fmt: skip
# What a config.json may say that changes nothing in what a decoder computes.
_NO_MATTER = {
    "_attn_implementation", "_name_or_path", "attn_implementation", "auto_map", "cache_implementation",
    "chunk_size_feed_forward", "id2label", "label2id", "language", "max_new_tokens", "model_max_length",
    "output_attentions", "output_hidden_states", "pretraining_tp", "return_dict", "tokenizer_class",
    "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
    "hidden_act", "hidden_activation", "is_llama_config",
}  # fmt: skip
# The same around a language model that also sees pictures.
_NO_MATTER_OUTSIDE = {
    "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image", "vision_config",
    "text_config", "boi_token_id", "eoi_token_id", "image_token_id",
}  # fmt: skip


def architecture_of(hf: dict[str, Any]) -> str:
    supported = f"supported: {', '.join(FAMILIES)}"
    names = hf.get("architectures") or []
    model_type = hf.get("model_type")
    if names:
        name = str(names[0] if isinstance(names, list) else names)
        if name not in FAMILIES:
            raise UserError(f"architecture {shown(name)} is not implemented; {supported}")
        if model_type not in (None, FAMILIES[name].model_type):
            raise UserError(f"model_type {shown(model_type)} does not belong to {name}; {supported}")
        return name
    for name, family in FAMILIES.items():
        if model_type == family.model_type:
            return name
    raise UserError(f"model_type {shown(model_type)} is not implemented; {supported}")


def language_model(hf: dict[str, Any]) -> dict[str, Any]:
    """The settings of the language model within one that also sees pictures."""
    if not isinstance(inner := hf.get("text_config"), dict):
        raise UserError("config.json lacks text_config, the settings of the language model")
    outer = {key: value for key, value in hf.items() if key not in _NO_MATTER_OUTSIDE}
    return {**outer, **{key: value for key, value in inner.items() if key != "model_type"}}


def refuse_unknown(hf: dict[str, Any], family: Family, architecture: str) -> None:
    for key, values in _IMPLEMENTED.items():
        if key in hf and hf[key] not in values:
            raise UserError(
                f"{key}={shown(hf[key])} is not implemented for {architecture};"
                f" supported: {key}={shown(values[0])}"
            )
    known = _READ | _NO_MATTER | set(_IMPLEMENTED) | set(family.keys)
    for key, value in hf.items():
        if key not in known and value not in (None, False, 0, [], {}):  # such a one is switched off
            raise UserError(
                f"{key}={shown(value)} is not known for {architecture}; if the model does not need it,"
                " take it out of config.json"
            )


def read_activation(hf: dict[str, Any], family: Family) -> str:
    name = value_of(hf, family.activation, "silu")
    if name not in ACTIVATIONS:
        raise UserError(
            f"{family.activation}={shown(name)} is not implemented; supported: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def read_windows(hf: dict[str, Any], family: Family) -> tuple[int | None, tuple[str, ...] | None]:
    """The sliding window and the layers that have it; None for layers that are all alike."""
    window, kinds, count = hf.get("sliding_window"), hf.get("layer_types"), hf["num_hidden_layers"]
    if kinds is not None and not isinstance(kinds, list):
        raise UserError(f"layer_types must be a list, not {shown(kinds)}")
    if kinds and len(kinds) != count:
        raise UserError(f"layer_types has {len(kinds)} entries for {count} layers")
    switched = bool(hf.get("use_sliding_window"))
    if family.windows == "none" or (family.windows == "qwen" and not switched):
        if switched or SLIDING in (kinds or []) or (window is not None and family.windows == "none"):
            raise UserError(
                f"sliding_window={shown(window)} with layer_types={shown(kinds)} is not implemented for"
                f" model_type {family.model_type} without use_sliding_window"
            )
        window = None
    elif window is not None and not kinds and family.windows == "qwen":
        start = check_number("max_window_layers", hf["max_window_layers"])
        kinds = [SLIDING if layer >= start else FULL for layer in range(count)]
    elif window is not None and not kinds and family.windows == "pattern":
        pattern = value_of(hf, "sliding_window_pattern", hf.get("_sliding_window_pattern"))
        every = check_positive("sliding_window_pattern", pattern or family.pattern)
        kinds = [SLIDING if (layer + 1) % every else FULL for layer in range(count)]
    if not kinds or (window is not None and all(kind == SLIDING for kind in kinds)):
        return window, None
    if all(kind == FULL for kind in kinds):
        return None, None
    return window, tuple(kinds)


def written_windows(config: Any, family: Family) -> dict[str, Any]:
    if family.windows == "none":
        return {}
    if family.windows == "all":
        return {"sliding_window": config.sliding_window}
    kinds = [SLIDING if sliding else FULL for sliding in config.sliding]
    written: dict[str, Any] = {"sliding_window": config.sliding_window, "layer_types": kinds}
    if family.windows == "qwen":
        written["use_sliding_window"] = config.sliding_window is not None
        written["max_window_layers"] = kinds.index(SLIDING) if SLIDING in kinds else len(kinds)
    return written


def read_rope(hf: dict[str, Any], family: Family) -> tuple[float, RopeScaling | None, float, float | None]:
    """rope_theta, scaling, the rotated share, and the base of sliding layers.

    From `rope_parameters` (transformers 5, there with an entry a layer type where bases differ) or from
    the older `rope_theta`, `rope_scaling` and `rope_local_base_freq`.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope settings must be an object, not {shown(rope)}")
    local = hf.get("rope_local_base_freq")
    if FULL in rope or SLIDING in rope:
        inner, rope = rope.get(SLIDING) or {}, rope.get(FULL) or {}
        if inner.get("rope_type", "default") != "default":
            raise UserError(f"rope type {shown(inner['rope_type'])} of {SLIDING} layers is not implemented")
        local = inner.get("rope_theta", local)
    theta = rope.get("rope_theta", value_of(hf, "rope_theta", 10000.0))
    partial = value_of(rope, "partial_rotary_factor", value_of(hf, "partial_rotary_factor", 1.0))
    if partial != 1 and not family.partial_rotary:
        raise UserError(
            f"partial_rotary_factor={shown(partial)} is not implemented for model_type {family.model_type};"
            " supported: 1"
        )
    if local is not None and not family.two_ropes:
        raise UserError(
            f"rope_local_base_freq={shown(local)} is not known for model_type {family.model_type}"
        )
    return theta, _scaling(rope, hf), partial, local


def _scaling(rope: dict[str, Any], hf: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3", "longrope", "su"):
        raise UserError(
            f"rope type {shown(kind)} is not implemented; supported: default, linear, llama3, longrope"
        )
    values = {"original_max_position_embeddings": hf.get("original_max_position_embeddings"), **rope}
    if kind == "linear":
        return LinearScaling(**_wanted(("factor",), values, kind))
    if kind == "llama3":
        return Llama3Scaling(**_wanted([f.name for f in dataclasses.fields(Llama3Scaling)], values, kind))
    names = ("short_factor", "long_factor", "original_max_position_embeddings")
    wanted = _wanted(names, values, "longrope")
    pretrained = check_positive(names[2], wanted[names[2]])
    factor = value_of(rope, "factor", value_of(hf, "max_position_embeddings", pretrained) / pretrained)
    scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(pretrained))
    for name in names[:2]:
        if not isinstance(wanted[name], list):
            raise UserError(f"the longrope setting {name} must be a list, not {shown(wanted[name])}")
        wanted[name] = tuple(map(float, wanted[name]))
    scale = check_number("attention_factor", value_of(rope, "attention_factor", scale))
    return LongRope(**wanted, attention_factor=scale)


def written_rope(config: Any, family: Family) -> dict[str, Any]:
    """Both spellings: transformers 4 and most other readers know the older, transformers 5 the newer."""
    scaling = config.rope_scaling
    rope: dict[str, Any] = {"rope_type": "default"}
    written: dict[str, Any] = {"rope_theta": config.rope_theta}
    if scaling is not None:
        kinds = {Llama3Scaling: "llama3", LinearScaling: "linear", LongRope: "longrope"}
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(scaling).items()}
        rope = {"rope_type": kinds[type(scaling)], **values}
    if isinstance(scaling, LongRope):
        # transformers 4 reads it here
        written["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if config.partial_rotary_factor != 1:
        written["partial_rotary_factor"] = config.partial_rotary_factor
    written["rope_scaling"] = rope if scaling is not None else None
    newer = {**rope, **{k: v for k, v in written.items() if k in ("rope_theta", "partial_rotary_factor")}}
    written["rope_parameters"] = newer
    if family.two_ropes:
        local = config.rope_theta if config.sliding_rope_theta is None else config.sliding_rope_theta
        written["rope_local_base_freq"] = local
        written["rope_parameters"] = {FULL: newer, SLIDING: {"rope_type": "default", "rope_theta": local}}
    return written


def _wanted(names: Any, values: dict[str, Any], kind: str) -> dict[str, Any]:
    if missing := [name for name in names if values.get(name) is None]:
        raise UserError(f"the {kind} rope settings lack {', '.join(missing)}")
    wanted = {name: values[name] for name in names}
    for name, found in wanted.items():
        for one in found if isinstance(found, list) else [found]:
            check_number(f"the {kind} rope setting {name}", one)
    return wanted


def value_of(hf: dict[str, Any], key: str, default: Any) -> Any:
    """`hf[key]`, or the default where it is absent or null."""
    value = hf.get(key)
    return default if value is None else value


def check_positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={shown(value)} must be a positive whole number")
    return value


def check_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise UserError(f"{name}={shown(value)} must be a number, zero or above")
    return value


def shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
