"""DecoderConfig: what a `config.json` says about a decoder, read from and written to an HF folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.files import read_json
from xtoken_jax.files.fields import shown
from xtoken_jax.files.foreign import foreign_format
from xtoken_jax.models.hf import settings as hf_settings
from xtoken_jax.models.hf import types as hf_types
from xtoken_jax.models.hf.families import FAMILIES, MULTIMODAL
from xtoken_jax.models.hf.keys import refuse_unknown
from xtoken_jax.models.hf.rope import read_rope, written_rope
from xtoken_jax.models.hf.settings import FULL, SLIDING
from xtoken_jax.models.rope import LongRope, RopeScaling

LORA_TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """W + alpha / rank * A B, with A and B trained and W frozen.

    Args:
        rank: R, columns of A.
        alpha: strength.
        targets: kernels that get an adapter.

    Raises:
        UserError: a rank or alpha that is not above zero, no target or an unknown one.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(f"lora rank={self.rank} and alpha={self.alpha} must be above zero")
        unknown = [name for name in self.targets if name not in LORA_TARGETS]
        if unknown or not self.targets:
            raise UserError(f"lora targets={list(self.targets)}; choose among {', '.join(LORA_TARGETS)}")


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The sizes and settings of one decoder; hashable, so that it can be static under `jax.jit`.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_dim: V, D, F,
            L, N, G and H.
        norm_eps: of the RMS norms.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are scaled.
        partial_rotary_factor: the share of a head that is rotated, its first part.
        sliding_rope_theta: base in layers with a sliding window, which are not scaled; None: as the others.
        sliding_window: how many positions such a layer sees, the token's own included; None: no window.
        layer_types: "sliding_attention" or "full_attention" of each layer; None: all alike, sliding where
            there is a window.
        qkv_bias, output_bias, mlp_bias: whether these products have a bias.
        qk_norm: RMS norms of each query and key head.
        unit_offset_norms: norms scale by 1 + weight.
        post_norms: norms also behind attention and feed-forward, before they are added.
        scale_embedding: embeddings times the root of the width.
        query_pre_attn_scalar: scores are divided by its root; None: by that of the head width.
        attention_softcap, logit_softcap: c of c tanh(x / c), of scores and of logits.
        activation: "silu" or "gelu_tanh".
        tie_embeddings: whether unembedding and embedding are one.
        initializer_range: of a random start.

    The others do not change what is computed: they are kept for the exported config.json; `source` is
    the whole one that was read, as JSON, and `multimodal` names the architecture of the checkpoint around
    a language model, which is not exported.
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
    partial_rotary_factor: float = 1.0
    sliding_rope_theta: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    unit_offset_norms: bool = False
    post_norms: bool = False
    scale_embedding: bool = False
    query_pre_attn_scalar: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    activation: str = "silu"
    tie_embeddings: bool = False
    initializer_range: float = 0.02

    architecture: str = "LlamaForCausalLM"
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    dtype: str | None = None
    multimodal: str | None = dataclasses.field(default=None, compare=False)
    source: str | None = dataclasses.field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads"):
            hf_settings.check_positive(name, getattr(self, name))
        hf_settings.check_positive("num_kv_heads", self.num_kv_heads)
        hf_settings.check_positive("head_dim", self.head_dim)
        for name in ("norm_eps", "rope_theta", "initializer_range", "partial_rotary_factor"):
            hf_settings.check_number(name, getattr(self, name))
        for name in ("sliding_rope_theta", "query_pre_attn_scalar", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None and hf_settings.check_number(name, getattr(self, name)) == 0:
                raise UserError(f"{name}=0 must be above zero, or absent")
        if self.sliding_window is not None:
            hf_settings.check_positive("sliding_window", self.sliding_window)
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_attention_heads={self.num_heads} is not a multiple of"
                f" num_key_value_heads={self.num_kv_heads}"
            )
        if self.activation not in hf_settings.ACTIVATIONS.values():
            raise UserError(f"activation={self.activation!r}; supported: silu, gelu_tanh")
        self._check_rope()
        self._check_layers()

    def _check_rope(self) -> None:
        if self.partial_rotary_factor > 1 or self.rotary_dim % 2 or not self.rotary_dim:
            raise UserError(
                f"head_dim={self.head_dim} with partial_rotary_factor={self.partial_rotary_factor} rotates"
                f" {self.rotary_dim} dimensions; it must be an even number, two or above"
            )
        if isinstance(self.rope_scaling, LongRope):
            for name in ("short_factor", "long_factor"):
                count = len(getattr(self.rope_scaling, name))
                if count != self.rotary_dim // 2:
                    raise UserError(
                        f"the longrope setting {name} has {count} numbers; half of the {self.rotary_dim}"
                        " rotated dimensions is wanted"
                    )

    def _check_layers(self) -> None:
        if self.layer_types is None:
            return
        if odd := [kind for kind in self.layer_types if kind not in (FULL, SLIDING)]:
            raise UserError(f"layer_types has {shown(odd[0])}; supported: {FULL}, {SLIDING}")
        if len(self.layer_types) != self.num_layers:
            raise UserError(f"layer_types has {len(self.layer_types)} entries for {self.num_layers} layers")
        if SLIDING in self.layer_types and self.sliding_window is None:
            raise UserError(f"layer_types has {SLIDING}, but there is no sliding_window")

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of a head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def sliding(self) -> tuple[bool, ...]:
        """Of each layer, whether it has the sliding window."""
        if self.layer_types is None:
            return (self.sliding_window is not None,) * self.num_layers
        return tuple(kind == SLIDING for kind in self.layer_types)

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "DecoderConfig":
        """Reads the content of a `config.json`, rope settings in either spelling.

        Raises:
            UserError: an architecture or a setting that is not implemented, or a missing key.
        """
        hf_types.check_settings(hf)
        source = json.dumps(hf)
        architecture, multimodal = hf_settings.architecture_of(hf), None
        if architecture in MULTIMODAL:
            multimodal = architecture
            outer, hf, architecture = hf_settings.language_model(hf, multimodal)
            refuse_unknown(outer, FAMILIES[architecture], multimodal)
        family = FAMILIES[architecture]
        refuse_unknown(hf, family, architecture)
        hf = {**family.defaults, **hf}
        if missing := [key for key in hf_settings.REQUIRED if hf.get(key) is None]:
            raise UserError(f"config.json lacks {', '.join(missing)}")
        heads = hf_settings.check_positive("num_attention_heads", hf["num_attention_heads"])
        hf_settings.check_positive("num_hidden_layers", hf["num_hidden_layers"])
        # transformers refuses such a model even where head_dim is given, so an export would not load
        if hf_settings.check_positive("hidden_size", hf["hidden_size"]) % heads:
            raise UserError(
                f"hidden_size={hf['hidden_size']} is not a multiple of num_attention_heads={heads}"
            )
        layers = hf["num_hidden_layers"] * (4 * hf["hidden_size"] + 3 * hf["intermediate_size"])
        hf_types.check_parameters(hf["hidden_size"] * (hf["vocab_size"] + layers))
        window, layer_types = hf_settings.read_windows(hf, family)
        theta, scaling, partial, sliding_theta = read_rope(hf, family)
        eos = hf.get("eos_token_id")
        fields = {
            field: hf[key] for key, names in family.keys.items() if hf.get(key) is not None for field in names
        }
        return cls(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf_settings.value_of(hf, "num_key_value_heads", heads),
            head_dim=hf_settings.value_of(hf, "head_dim", hf["hidden_size"] // heads),
            norm_eps=hf_settings.value_of(hf, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            partial_rotary_factor=partial,
            sliding_rope_theta=sliding_theta,
            sliding_window=window,
            layer_types=layer_types,
            activation=hf_settings.read_activation(hf, family),
            tie_embeddings=bool(hf_settings.value_of(hf, "tie_word_embeddings", False)),
            initializer_range=hf_settings.value_of(hf, "initializer_range", 0.02),
            architecture=architecture,
            max_position_embeddings=hf_settings.value_of(hf, "max_position_embeddings", 2048),
            bos_token_id=hf.get("bos_token_id"),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=hf.get("pad_token_id"),
            dtype=hf_settings.value_of(hf, "dtype", hf.get("torch_dtype")),
            multimodal=multimodal,
            source=source if multimodal is None else None,
            **family.settings,
            **fields,
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a `config.json` that `transformers` 4 and 5 load as `architecture`.

        What was read from a file goes back as it was, keys that the decoder has no use for included.
        """
        if self.source is not None and DecoderConfig.from_hf(json.loads(self.source)) == self:
            return json.loads(self.source)
        family = FAMILIES[self.architecture]
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        hf = {
            "architectures": [self.architecture],
            "model_type": family.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            family.activation: {v: k for k, v in reversed(hf_settings.ACTIVATIONS.items())}[self.activation],
            **{key: getattr(self, names[0]) for key, names in family.keys.items()},
            "rms_norm_eps": self.norm_eps,
            **hf_settings.written_windows(self, family),
            **written_rope(self, family),
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
        }
        hf = hf if self.dtype is None else {**hf, "torch_dtype": self.dtype}
        if DecoderConfig.from_hf(hf) != self:
            raise UserError(
                f"a config.json of {self.architecture} cannot say all that this model's config says"
            )
        return hf


def read_config(folder: str | Path) -> DecoderConfig:
    """The DecoderConfig of an HF folder.

    Raises:
        UserError: no such folder, no config.json in it, unreadable JSON, or what `from_hf` refuses.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"no such model folder: {folder}")
    if (known := foreign_format(folder, weights=not path.is_file())) is not None:
        raise UserError(f"{folder}: {known}")
    if not path.is_file():
        raise UserError(f"no config.json in {folder}; give a Hugging Face model folder")
    hf = read_json(path, what="the settings of a model", remedy="get the model's files again")
    try:
        return DecoderConfig.from_hf(hf)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
