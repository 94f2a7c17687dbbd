"""A model as an experiment names it: a folder or hub id, and how to hold it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import jax
from jax.sharding import Mesh

from xtoken_jax.errors import UserError
from xtoken_jax.hub import resolve_folder
from xtoken_jax.models.attention import require_device
from xtoken_jax.models.config import LORA_TARGETS, DecoderConfig, LoraConfig
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.models.hf.loading import init_model, load_model
from xtoken_jax.models.lora import add_lora
from xtoken_jax.tokens.tokenizer import Tokenizer

# Published embeddings have rows to spare, so that devices share them evenly: at most 2.3% of them.
_SPARE_ROWS, _SPARE_SHARE = 64, 0.05


class Start(Enum):
    """Where parameters come from: the folder's weights, or a random draw by its config.json."""

    weights = "weights"
    random = "random"


class Dtype(Enum):
    """Number formats of parameters and of computation."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Remat(Enum):
    """What the backward pass computes again."""

    none = "none"
    full = "full"
    dots = "dots"


class AttentionKind(Enum):
    """Implementations of attention."""

    xla = "xla"
    cudnn = "cudnn"
    splash = "splash"
    auto = "auto"


@dataclass
class AdapterConfig:
    """Low-rank adapters on a student (LoRA, arXiv 2106.09685), which train instead of its weights.

    Attributes:
        rank: rank R of each adapter; 0 trains all weights and adds no adapters.
        alpha: strength; the output of an adapter is multiplied by alpha / rank.
        targets: kernels that get an adapter, among query, key, value, output, gate, up and down.
    """

    rank: int = 0
    alpha: float = 32.0
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))

    def validate(self, name: str) -> None:
        """Raise UserError for values that make no sense; `name` is the config's own key."""
        if self.rank < 0:
            raise UserError(f"{name}.rank={self.rank}: must be at least 1, or 0 for no adapters")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise UserError(f"{name}.alpha={self.alpha}: must be above 0")
        unknown = [target for target in self.targets if target not in LORA_TARGETS]
        if unknown or not self.targets:
            what = f"no such kernel as {unknown[0]}" if unknown else "no kernel"
            raise UserError(f"{name}.targets: {what}; choose among {', '.join(LORA_TARGETS)}")

    def settled(self) -> LoraConfig | None:
        """What a model takes."""
        return LoraConfig(self.rank, self.alpha, tuple(self.targets)) if self.rank else None


@dataclass
class ModelConfig:
    """A student or teacher.

    Attributes:
        path: a Hugging Face folder (config.json, safetensors, tokenizer.json), or a hub id: org/name or
            org/name@revision.
        init: weights loads the folder's weights; random reads only config.json and starts a student from
            random weights.
        dtype: type of the parameters. A student trains in float32; only weights that adapters keep frozen may
            be bfloat16.
        compute_dtype: type of activations and matrix products.
        remat: what the backward pass recomputes to save memory: none; full (only the input of each layer is
            kept); dots (the results of matrix products are kept as well).
        attention: xla; cudnn on NVIDIA GPUs in bfloat16; splash on TPUs; auto chooses by device.
        lora: adapters, for a student.
        chat_template: a Jinja file that replaces the folder's chat template; for conversations.
    """

    path: str | None = None
    init: Start = Start.weights
    dtype: Dtype = Dtype.float32
    compute_dtype: Dtype = Dtype.float32
    remat: Remat = Remat.none
    attention: AttentionKind = AttentionKind.auto
    lora: AdapterConfig = field(default_factory=AdapterConfig)
    chat_template: str | None = None


def foreign_tokenizer(group: str, config: DecoderConfig, tokenizer: Tokenizer) -> str | None:
    """One line where a model's tokenizer looks like another model's.

    Args:
        group: config group of the model, such as student.
        config: of the model.
        tokenizer: from the same folder.
    """
    rows, size = config.vocab_size, tokenizer.size
    reasons = []
    if rows - size > max(_SPARE_ROWS, _SPARE_SHARE * rows):
        reasons.append(f"it has {size:,} ids, and the embedding {rows:,} rows")
    eos = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id,)
    for role, ids in (("bos", (config.bos_token_id,)), ("eos", eos)):
        named = [token for token in ids if token is not None]
        if named and role in tokenizer.roles and tokenizer.roles[role] not in named:
            here = ", ".join(f"{token} ({_spelling(tokenizer, token)})" for token in named)
            own = tokenizer.roles[role]
            spelling = _spelling(tokenizer, own)
            reasons.append(f"{role}_token_id is {here} in config.json, {own} ({spelling}) in the tokenizer")
    if not reasons:
        return None
    return (
        f"{group}.path: the tokenizer may be another model's: {'; '.join(reasons)}; put the tokenizer that "
        "the model was trained with into its folder"
    )


def _spelling(tokenizer: Tokenizer, token: int) -> str:
    spelling = tokenizer.backend.id_to_token(token)
    return "no token" if spelling is None else spelling


def untrained_positions(group: str, key: str, length: int, config: DecoderConfig) -> str | None:
    """One line where rows are longer than the texts that a model was made for.

    Args:
        group: config group of the model, such as student.
        key: config key of `length`.
        length: tokens of a row.
        config: of the model.
    """
    most = config.max_position_embeddings
    if length <= most:
        return None
    return (
        f"{key}={length}: rows of {length:,} tokens, and the model in {group}.path was made for texts of up "
        f"to {most:,} (max_position_embeddings in config.json); take {key}={most}, or expect worse outputs "
        "after that"
    )


def open_model(
    config: ModelConfig, tokenizer_size: int, *, mesh: Mesh, key: jax.Array
) -> tuple[Model, Params]:
    """The model and its parameters on the mesh, with new adapters where the config asks for such.

    Args:
        config: what to load; `path` is set.
        tokenizer_size: V of the tokenizer it is used with.
        mesh: where the parameters go.
        key: of a random start, or of the adapters.

    Raises:
        UserError: what loading refuses, an attention that needs other devices, and a tokenizer with more ids
            than the model has rows.
    """
    with jax.set_mesh(mesh):
        require_device(config.attention.value)
    folder = resolve_folder(str(config.path), weights=config.init is Start.weights)
    options: dict[str, Any] = {
        "mesh": mesh,
        "dtype": config.dtype.value,
        "compute_dtype": config.compute_dtype.value,
        "remat": config.remat.value,
        "attention": config.attention.value,
    }
    if config.init is Start.random:
        model, params = init_model(folder, key, **options)
    else:
        model, params = load_model(folder, **options)
    if tokenizer_size > model.config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer_size} tokens but the model only "
            f"{model.config.vocab_size} (vocab_size in config.json); they do not belong together"
        )
    lora = config.lora.settled()
    return (model, params) if lora is None else add_lora(model, params, lora, key, mesh=mesh)
