"""Old import paths of moved modules: they work for one release, with a DeprecationWarning."""

from __future__ import annotations

import importlib
import warnings
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Old name -> new name, both below `xtoken_jax`.
MOVED = {
    "cache_contents": "run.fingerprints",
    "cache_run": "teacher_cache.writer",
    "cache_teacher": "run.cache_teacher",
    "checksum": "distributed.checksum",
    "cli_cache": "cli.cache_teacher",
    "cli_copies": "cli.cache",
    "cli_generate": "cli.generate",
    "cli_tokenizers": "cli.tokenizers",
    "config": "run.experiment",
    "data.array_record": "data.formats.array_record",
    "data.cache_shards": "teacher_cache.shards",
    "data.compressed": "data.formats.compressed",
    "data.copies": "data.formats.derived_files",
    "data.data_file": "data.formats.data_file",
    "data.find_shape": "data.detect",
    "data.hugging_face": "data.formats.hugging_face",
    "data.jsonl": "data.formats.jsonl",
    "data.lanes": "data.row_streams",
    "data.parquet": "data.formats.parquet",
    "data.python_docs": "data.formats.python_docs",
    "data.shapes": "data.records",
    "data.teacher_cache": "teacher_cache.reader",
    "data.text_files": "data.formats.text",
    "data.tfds": "data.formats.tfds",
    "distill": "run.distill",
    "evaluate.distributions": "teacher_cache.distributions",
    "export": "models.hf.export",
    "held_out": "run.held_out",
    "hosts": "distributed.processes",
    "lifeline": "distributed.heartbeat",
    "losses.blockwise_plan": "losses.blockwise.plan",
    "losses.blockwise_prefix": "losses.blockwise.prefix",
    "losses.blockwise_teacher": "losses.blockwise.teacher",
    "losses.blockwise_terms": "losses.blockwise.terms",
    "losses.blockwise_walk": "losses.blockwise.walk",
    "losses.chunks": "losses.math.chunks",
    "losses.divergence": "losses.math.divergence",
    "losses.likelihood": "losses.terms.alm",
    "losses.objective": "losses.total",
    "losses.rank": "losses.terms.uld",
    "losses.reduce": "losses.math.reduce",
    "losses.same_vocabulary": "losses.terms.same_vocabulary",
    "losses.softmax": "losses.math.softmax",
    "losses.sorting": "losses.math.sorting",
    "losses.vocab_hybrid_kl": "losses.vocab_parallel.hybrid_kl",
    "losses.vocab_likelihood": "losses.vocab_parallel.alm",
    "losses.vocab_prefix_kl": "losses.vocab_parallel.prefix_kl",
    "losses.vocab_projection_kl": "losses.vocab_parallel.projection_kl",
    "losses.vocab_shards": "losses.vocab_parallel.shards",
    "mesh": "distributed.mesh",
    "models.families": "models.hf.families",
    "models.hf_files": "models.hf.files",
    "models.hf_keys": "models.hf.keys",
    "models.hf_layout": "models.hf.layout",
    "models.hf_rope": "models.hf.rope",
    "models.hf_saving": "models.hf.saving",
    "models.hf_settings": "models.hf.settings",
    "models.hf_side_files": "models.hf.side_files",
    "models.hf_weights": "models.hf.loading",
    "models.loading_bar": "models.hf.loading_bar",
    "ranking": "run.ranking",
    "report": "run.report",
    "resume": "run.resume",
    "runs": "run.folder",
    "sweep": "run.sweep",
    "teachers": "run.teachers",
    "train.accumulate": "train.gradient",
    "train.learnt": "train.trained_projection",
    "train.objective": "train.batch_loss",
    "train.quiet": "train.orbax_logging",
}


class OldPaths(MetaPathFinder):
    """Finds a moved module by its old name; placed after Python's own finders."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        new = MOVED.get(fullname.removeprefix("xtoken_jax."))
        if new is None or not fullname.startswith("xtoken_jax."):
            return None
        return ModuleSpec(fullname, _Alias(f"xtoken_jax.{new}"))


class _Alias(Loader):
    """Loads the moved module itself, so both names give the same objects."""

    def __init__(self, name: str):
        self._name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        warnings.warn(f"{spec.name} is now {self._name}", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(self._name)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import system has put the old name there
