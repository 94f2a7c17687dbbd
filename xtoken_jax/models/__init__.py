"""Decoders: read from and written to Hugging Face folders, run as pure functions."""

from xtoken_jax.models.config import DecoderConfig, LoraConfig, read_config
from xtoken_jax.models.decoder import Model, logits
from xtoken_jax.models.hf.loading import init_model, load_model
from xtoken_jax.models.hf.saving import save_weights
from xtoken_jax.models.lora import add_lora, join_lora, merge_lora, split_lora
from xtoken_jax.models.rope import LinearScaling, Llama3Scaling, LongRope, Yarn

__all__ = [
    "DecoderConfig",
    "LinearScaling",
    "Llama3Scaling",
    "LongRope",
    "LoraConfig",
    "Model",
    "Yarn",
    "add_lora",
    "init_model",
    "join_lora",
    "load_model",
    "logits",
    "merge_lora",
    "read_config",
    "save_weights",
    "split_lora",
]
