"""Cross-tokenizer knowledge distillation for JAX.

Names are loaded when they are first used, so that importing the losses into another code
base needs jax alone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from xtoken_jax import losses
    from xtoken_jax.alignment.align import align
    from xtoken_jax.alignment.batch import Alignment
    from xtoken_jax.coverage.audit import Audit, audit
    from xtoken_jax.errors import UserError
    from xtoken_jax.projection.build import ProjectionOptions, build_projection
    from xtoken_jax.projection.cache import cached_projection
    from xtoken_jax.projection.files import load_projection, save_projection
    from xtoken_jax.projection.matrix import LearnableProjection, Partition, Projection
    from xtoken_jax.projection.sharded import shard_projection
    from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

_MODULES = {
    "Alignment": "alignment.batch",
    "Audit": "coverage.audit",
    "LearnableProjection": "projection.matrix",
    "Partition": "projection.matrix",
    "Projection": "projection.matrix",
    "ProjectionOptions": "projection.build",
    "Tokenizer": "tokens.tokenizer",
    "TokenizerPair": "tokens.tokenizer",
    "UserError": "errors",
    "align": "alignment.align",
    "audit": "coverage.audit",
    "build_projection": "projection.build",
    "cached_projection": "projection.cache",
    "load_projection": "projection.files",
    "losses": "losses",
    "save_projection": "projection.files",
    "shard_projection": "projection.sharded",
}

__all__ = [
    "Alignment",
    "Audit",
    "LearnableProjection",
    "Partition",
    "Projection",
    "ProjectionOptions",
    "Tokenizer",
    "TokenizerPair",
    "UserError",
    "align",
    "audit",
    "build_projection",
    "cached_projection",
    "load_projection",
    "losses",
    "save_projection",
    "shard_projection",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'xtoken_jax' has no attribute {name!r}")
    module = importlib.import_module(f"xtoken_jax.{_MODULES[name]}")
    return module if name == "losses" else getattr(module, name)
