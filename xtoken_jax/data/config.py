"""What is trained on and measured on, and the shape of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from xtoken_jax.data.sources import SourceConfig
from xtoken_jax.errors import UserError


@dataclass
class DataConfig:
    """Training and validation data, and the shape of a batch.

    Attributes:
        train, validation: sources by name. Without a validation source, documents of the training sources are
            held out.
        validation_share: share of each training source's documents that are held out in that case, evenly
            spread, at most 200 of each; 0, or data.validation=none, for no held-out figures.
        student_length, teacher_length: T_s and T_t, tokens per row.
        teacher_lengths: T_t of single teachers, by name, such as a shorter one where its tokens are longer.
        batch_size: B, rows of the global batch.
        pack: put several documents into a row where they fit; each is read as if it were the only one. false
            puts one document into each row.
        seed: seed of the order of the documents.
    """

    train: dict[str, SourceConfig] = field(default_factory=dict)
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    validation_share: float = 0.02
    student_length: int = 1024
    teacher_length: int = 1024
    teacher_lengths: dict[str, int] = field(default_factory=dict)
    batch_size: int = 8
    pack: bool = True
    seed: int = 0

    def validate(self) -> None:
        """Raise UserError for values that make no sense."""
        lengths = {name: getattr(self, name) for name in ("student_length", "teacher_length")}
        lengths |= {f"teacher_lengths.{name}": length for name, length in self.teacher_lengths.items()}
        for name, length in lengths.items():
            if length < 2:
                raise UserError(f"data.{name}={length}: must be at least 2; the default is 1024")
        if self.batch_size < 1:
            raise UserError(f"data.batch_size={self.batch_size}: must be at least 1; the default is 8")
        if not self.train:
            raise UserError(
                "data.train: name at least one source of text, such as data.train.text.path=FILE.jsonl"
            )
        for part in ("train", "validation"):
            for name, source in getattr(self, part).items():
                source.validate(f"data.{part}.{name}")
        if not 0 <= self.validation_share <= 0.5:
            raise UserError(
                f"data.validation_share={self.validation_share}: must be between 0, for no held-out figures, "
                "and 0.5"
            )
        self._validate_weights()

    def _validate_weights(self) -> None:
        for name, source in self.validation.items():
            if source.weight is not None:
                raise UserError(
                    f"data.validation.{name}.weight={source.weight}: weights are for data.train; each "
                    "validation source is measured alone; leave it out"
                )
        given = {name: source.weight for name, source in self.train.items() if source.weight is not None}
        for name, weight in given.items():
            if not 0 < weight < math.inf:
                raise UserError(f"data.train.{name}.weight={weight}: must be above 0; leave it out instead")
        if missing := [name for name in self.train if given and name not in given]:
            raise UserError(
                f"data.train.{missing[0]}.weight: not given, but others have one; give every source a weight "
                "or none"
            )

    def weights(self) -> dict[str, float] | None:
        """Name of a training source -> its share of the tokens, adding up to 1; None: as much as it has."""
        given = {name: source.weight for name, source in self.train.items() if source.weight is not None}
        total = sum(given.values())
        return {name: weight / total for name, weight in given.items()} if given else None

    @property
    def measured(self) -> bool:
        """Whether there are held-out figures."""
        return bool(self.validation) or self.validation_share > 0

    def length_of(self, teacher: str) -> int:
        """T_t of a teacher."""
        return self.teacher_lengths.get(teacher, self.teacher_length)
