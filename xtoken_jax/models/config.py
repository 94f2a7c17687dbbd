"""DecoderConfig: what a `config.json` says about a decoder, read from and written to an HF folder.

A setting that the decoder does not implement is refused here, by name: a checkpoint that loads and
computes something else is worse than one that does not load.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from xtoken_jax.errors import UserError

# architecture -> model_type
ARCHITECTURES = {"LlamaForCausalLM": "llama"}

# key -> the values under which the decoder computes what the checkpoint means; absent is one of them
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "layer_types": (None,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies (`rope_type` "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and settings of one decoder; hashable, so that it can be static under `jax.jit`.

    The last block does not change what is computed: it is kept for the exported config.json.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    initializer_range: float = 0.02
    logit_softcap: float | None = None

    architecture: str = "LlamaForCausalLM"
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            _positive(name, getattr(self, name))
        _positive("num_kv_heads", self.num_kv_heads)
        _positive("head_dim", self.head_dim)
        for name in ("norm_eps", "rope_theta", "initializer_range"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                raise UserError(f"{name}={_short(value)} must be a number, zero or above")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_attention_heads={self.num_heads} is not a multiple of"
                f" num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; rotary embeddings need an even one")

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "DecoderConfig":
        """Reads the content of a `config.json`, rope settings in either spelling.

        Raises:
            UserError: an architecture or a setting that is not implemented, or a missing key.
        """
        architecture = _architecture(hf)
        for key, values in _IMPLEMENTED.items():
            if key in hf and hf[key] not in values and not _all_full_attention(key, hf[key]):
                raise UserError(
                    f"{key}={_short(hf[key])} is not implemented for {architecture};"
                    f" supported: {key}={_short(values[0])}"
                )
        missing = [key for key in _REQUIRED if hf.get(key) is None]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}")
        heads = hf["num_attention_heads"]
        _positive("num_attention_heads", heads)
        # transformers refuses such a Llama even where head_dim is given, so an export would not load
        if _positive("hidden_size", hf["hidden_size"]) % heads:
            raise UserError(
                f"hidden_size={hf['hidden_size']} is not a multiple of num_attention_heads={heads}"
            )
        theta, scaling = _rope(hf)
        eos = hf.get("eos_token_id")
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=_value(hf, "num_key_value_heads", heads),
            head_dim=_value(hf, "head_dim", hf["hidden_size"] // heads),
            norm_eps=_value(hf, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_embeddings=bool(_value(hf, "tie_word_embeddings", False)),
            initializer_range=_value(hf, "initializer_range", 0.02),
            architecture=architecture,
            max_position_embeddings=_value(hf, "max_position_embeddings", 2048),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=hf.get("pad_token_id"),
            dtype=_value(hf, "dtype", hf.get("torch_dtype")),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `transformers` 4 and 5 load as `architecture`."""
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            rope = {"rope_type": "llama3", **dataclasses.asdict(self.rope_scaling)}
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        hf = {
            "architectures": [self.architecture],
            "model_type": ARCHITECTURES[self.architecture],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rms_norm_eps": self.norm_eps,
            # transformers 4 and most other readers know the first two, transformers 5 the third
            "rope_theta": self.rope_theta,
            "rope_scaling": rope if self.rope_scaling is not None else None,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
        }
        return hf if self.dtype is None else {**hf, "torch_dtype": self.dtype}


def read_config(folder: str | Path) -> DecoderConfig:
    """The DecoderConfig of an HF folder.

    Raises:
        UserError: no such folder, no config.json in it, unreadable JSON, or what `from_hf` refuses.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"no such model folder: {folder}")
    if not path.is_file():
        raise UserError(f"no config.json in {folder}; give a Hugging Face model folder")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(hf, dict):
        raise UserError(f"cannot read {path}: it holds a {type(hf).__name__}, not an object")
    try:
        return DecoderConfig.from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _architecture(hf: dict[str, Any]) -> str:
    supported = f"supported: {', '.join(ARCHITECTURES)}"
    names = hf.get("architectures") or []
    model_type = hf.get("model_type")
    if names:
        name = str(names[0] if isinstance(names, list) else names)
        if name not in ARCHITECTURES:
            raise UserError(f"architecture {_short(name)} is not implemented; {supported}")
        if model_type not in (None, ARCHITECTURES[name]):
            raise UserError(f"model_type {_short(model_type)} does not belong to {name}; {supported}")
        return name
    for name, known in ARCHITECTURES.items():
        if model_type == known:
            return name
    raise UserError(f"model_type {_short(model_type)} is not implemented; {supported}")


def _rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, from `rope_parameters` (transformers 5) or the older two keys."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope settings must be an object, not {_short(rope)}")
    theta = rope.get("rope_theta", _value(hf, "rope_theta", 10000.0))
    if (partial := rope.get("partial_rotary_factor", 1)) != 1:
        raise UserError(f"partial_rotary_factor={_short(partial)} is not implemented; supported: 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise UserError(f"rope type {_short(kind)} is not implemented; supported: default, llama3")
    values = {"original_max_position_embeddings": hf.get("original_max_position_embeddings"), **rope}
    names = [field.name for field in dataclasses.fields(RopeScaling)]
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise UserError(f"the llama3 rope settings lack {', '.join(missing)}")
    return theta, RopeScaling(**{name: values[name] for name in names})


def _all_full_attention(key: str, value: Any) -> bool:
    return key == "layer_types" and isinstance(value, list) and set(value) <= {"full_attention"}


def _value(hf: dict[str, Any], key: str, default: Any) -> Any:
    """`hf[key]`, or the default where it is absent or null."""
    value = hf.get(key)
    return default if value is None else value


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}={_short(value)} must be a positive whole number")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
