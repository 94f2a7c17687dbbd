"""What a teacher cache is made of, as fingerprints that are known without the teacher's weights in memory."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

from xtoken_jax.data.documents import Documents
from xtoken_jax.data.sources import SourceKind
from xtoken_jax.hub import resolve_folder
from xtoken_jax.models.config import read_config
from xtoken_jax.models.load import Start
from xtoken_jax.run.experiment import Experiment
from xtoken_jax.tokens.tokenizer import TokenizerPair

DAY = "data.day"  # key of the date that chat templates write, where one does

_SAMPLES, _SAMPLE = 64, 4096  # of a file of weights, and bytes of each


def of_teacher(experiment: Experiment, name: str, pairs: Mapping[str, TokenizerPair]) -> dict[str, str]:
    """Of a teacher, and of what cuts the rows that it reads: all tokenizers and lengths.

    Files of weights count by their sizes and by samples of them; where they are not here, not at all.

    Args:
        experiment: names the teacher's folder and the lengths.
        name: of the teacher.
        pairs: by teacher.
    """
    config = experiment.every_teacher()[name]
    folder = resolve_folder(str(config.path), weights=False)
    settings = json.dumps(read_config(folder).to_hf(), sort_keys=True).encode()
    data = experiment.data
    others = sorted(
        f"{pair.teacher.file_fingerprint[:16]} at {data.length_of(other)}"
        for other, pair in pairs.items()
        if other != name
    )
    found = {
        "teacher.config": hashlib.sha256(settings).hexdigest()[:16],
        "teacher.tokenizer": pairs[name].teacher.file_fingerprint[:16],
        "teacher.init": config.init.value,
        "teacher.dtype": config.dtype.value,
        "teacher.compute_dtype": config.compute_dtype.value,
        "student.tokenizer": pairs[name].student.file_fingerprint[:16],
        "data.student_length": str(data.student_length),
        "data.teacher_length": str(data.length_of(name)),
        "other teachers": ", ".join(others) or "none",
    }
    files = sorted(folder.glob("model*.safetensors"))
    if config.init is Start.weights and files:
        found["teacher.weights"] = f"{_sampled(files):08x}"
    return found


def names_of(experiment: Experiment, name: str) -> dict[str, str]:
    """What a user calls the models and texts that `of_teacher` and `of_text` take fingerprints of."""
    paths = {"teacher": experiment.every_teacher()[name].path, "student": experiment.student.path}
    paths |= {f"data.train.{n}": s.path or s.kind.value for n, s in experiment.data.train.items()}
    return {key: str(path) for key, path in paths.items()}


def of_text(texts: Mapping[str, Documents], part: str = "train") -> dict[str, str]:
    """Of sources of text."""
    return {f"data.{part}.{name}": documents.digest for name, documents in texts.items()}


def of_held_out(experiment: Experiment, texts: Mapping[str, Documents]) -> dict[str, str]:
    """Of what figures are measured on: texts that have been read, and problems."""
    problems = {
        f"data.validation.{name}": f"{s.documents} problems of {s.split}, seed {s.seed}"
        for name, s in experiment.data.validation.items()
        if s.kind is SourceKind.arithmetic
    }
    return {**of_text(texts, "validation"), **problems}


def _sampled(files: list[Path]) -> int:
    found = 0
    for path in files:
        size = path.stat().st_size
        found = zlib.crc32(str(size).encode(), found)
        with path.open("rb") as file:
            for sample in range(_SAMPLES):
                file.seek(sample * max(size - _SAMPLE, 0) // (_SAMPLES - 1))
                found = zlib.crc32(file.read(_SAMPLE), found)
    return found
