"""Decoders: read from and written to Hugging Face folders, run as pure functions."""

from xtoken_jax.models.config import DecoderConfig, RopeScaling, read_config
from xtoken_jax.models.decoder import Model, logits
from xtoken_jax.models.hf_weights import init_model, load_model, save_weights

__all__ = [
    "DecoderConfig",
    "Model",
    "RopeScaling",
    "init_model",
    "load_model",
    "logits",
    "read_config",
    "save_weights",
]
