"""The parts of a `config.json`: architecture, activation and windows in their spellings.

A setting that the decoder does not implement is refused by name: a checkpoint that loads and
computes something else is worse than one that does not load.
"""

from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.files.fields import shown
from xtoken_jax.models.hf.families import FAMILIES, MULTIMODAL, Family
from xtoken_jax.models.hf.types import check_settings

FULL, SLIDING = "full_attention", "sliding_attention"
# what config.json calls it -> what it is
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


# what a multimodal config.json tells of its language model, where text_config does not
_FROM_OUTSIDE = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "initializer_range")


def architecture_of(hf: dict[str, Any]) -> str:
    """The name in `FAMILIES` or `MULTIMODAL` of what a config.json describes."""
    types = {name: entry.model_type for table in (FAMILIES, MULTIMODAL) for name, entry in table.items()}
    supported = f"supported: {', '.join(types)}"
    names = hf.get("architectures") or []
    model_type = hf.get("model_type")
    if names:
        name = names[0] if isinstance(names, list) else names
        if name not in types:
            raise UserError(f"architecture {shown(name)} is not implemented; {supported}")
        if model_type not in (None, types[name]):
            raise UserError(f"model_type {shown(model_type)} does not belong to {name}; {supported}")
        return name
    for name in types:
        if model_type == types[name]:
            return name
    raise UserError(f"model_type {shown(model_type)} is not implemented; {supported}")


def language_model(hf: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Split the config.json of a multimodal checkpoint.

    Returns:
        What it says outside its language model, less the keys that concern pictures; the content of a
        config.json for the language model; the language model's architecture.
    """
    whole = MULTIMODAL[name]
    if not isinstance(inner := hf.get("text_config"), dict):
        raise UserError("config.json lacks text_config, the settings of the language model")
    check_settings(inner, "text_config")
    text = inner.get("model_type") or next(iter(whole.texts))
    if text not in whole.texts:
        raise UserError(
            f"text_config has model_type {shown(text)}, which is not implemented within {name}; supported:"
            f" {', '.join(whole.texts)}"
        )
    family = FAMILIES[whole.texts[text]]
    outer = {key: value for key, value in hf.items() if key not in {*whole.keys, "text_config"}}
    inner = {key: value for key, value in inner.items() if key not in ("architectures", "model_type")}
    inner = {**family.sizes, **{key: outer[key] for key in _FROM_OUTSIDE if key in outer}, **inner}
    if outer.get("tie_word_embeddings"):
        inner.setdefault("tie_word_embeddings", True)
    return outer, inner, whole.texts[text]


def read_activation(hf: dict[str, Any], family: Family) -> str:
    name = value_of(hf, family.activation, "silu")
    known = {**ACTIVATIONS, **family.activations}
    if name not in known:
        raise UserError(
            f"{family.activation}={shown(name)} is not implemented; supported: {', '.join(known)}"
        )
    return known[name]


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
    elif family.windows == "all" and kinds and set(kinds) != {FULL if window is None else SLIDING}:
        raise UserError(
            f"layer_types={shown(kinds)} is not implemented for model_type {family.model_type}, all of whose"
            f" layers have sliding_window={shown(window)}; supported with model_type ministral"
        )
    elif not kinds and family.windows == "first":
        kinds = [SLIDING if layer % family.pattern else FULL for layer in range(count)]
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
