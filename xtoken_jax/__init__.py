"""Cross-tokenizer knowledge distillation for JAX.

Names are loaded when they are first used, so that importing the losses into another code
base needs jax alone.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from xtoken_jax._moved import OldPaths

__version__ = "0.1.0"
sys.meta_path.append(OldPaths())

if TYPE_CHECKING:
    from xtoken_jax import losses
    from xtoken_jax.alignment.align import align, collate, to_batch, token_rows
    from xtoken_jax.alignment.batch import AlignedBatch, Alignment, TokenRows
    from xtoken_jax.alignment.chat import align_chats
    from xtoken_jax.alignment.dynamic import TokenAlignment, align_tokens, chunks_of_ids
    from xtoken_jax.alignment.prompts import align_completions
    from xtoken_jax.alignment.rows import pack
    from xtoken_jax.coverage.audit import Audit, audit
    from xtoken_jax.errors import UserError
    from xtoken_jax.projection.build import ProjectionOptions, build_projection
    from xtoken_jax.projection.cache import cached_projection
    from xtoken_jax.projection.files import load_projection, save_projection
    from xtoken_jax.projection.matrix import LearnableProjection, Partition, Projection
    from xtoken_jax.projection.prefixes import prefix_tables
    from xtoken_jax.projection.sharded import shard_projection
    from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

_MODULES = {
    "AlignedBatch": "alignment.batch",
    "Alignment": "alignment.batch",
    "Audit": "coverage.audit",
    "LearnableProjection": "projection.matrix",
    "Partition": "projection.matrix",
    "Projection": "projection.matrix",
    "ProjectionOptions": "projection.build",
    "TokenAlignment": "alignment.dynamic",
    "TokenRows": "alignment.batch",
    "Tokenizer": "tokens.tokenizer",
    "TokenizerPair": "tokens.tokenizer",
    "UserError": "errors",
    "align": "alignment.align",
    "align_chats": "alignment.chat",
    "align_completions": "alignment.prompts",
    "align_tokens": "alignment.dynamic",
    "audit": "coverage.audit",
    "build_projection": "projection.build",
    "cached_projection": "projection.cache",
    "chunks_of_ids": "alignment.dynamic",
    "collate": "alignment.align",
    "load_projection": "projection.files",
    "losses": "losses",
    "pack": "alignment.rows",
    "prefix_tables": "projection.prefixes",
    "save_projection": "projection.files",
    "shard_projection": "projection.sharded",
    "to_batch": "alignment.align",
    "token_rows": "alignment.align",
}

__all__ = [
    "AlignedBatch",
    "Alignment",
    "Audit",
    "LearnableProjection",
    "Partition",
    "Projection",
    "ProjectionOptions",
    "TokenAlignment",
    "TokenRows",
    "Tokenizer",
    "TokenizerPair",
    "UserError",
    "align",
    "align_chats",
    "align_completions",
    "align_tokens",
    "audit",
    "build_projection",
    "cached_projection",
    "chunks_of_ids",
    "collate",
    "load_projection",
    "losses",
    "pack",
    "prefix_tables",
    "save_projection",
    "shard_projection",
    "to_batch",
    "token_rows",
]


if not TYPE_CHECKING:  # a type checker reports a name that does not exist

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'xtoken_jax' has no attribute {name!r}")
        module = importlib.import_module(f"xtoken_jax.{_MODULES[name]}")
        return module if name == "losses" else getattr(module, name)


def __dir__() -> list[str]:
    """The public names, for `dir` and completion."""
    return sorted([*__all__, "__version__"])
