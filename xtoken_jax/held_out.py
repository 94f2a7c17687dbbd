"""What a run is measured on: texts and problems that no training text holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from xtoken_jax.alignment.spans import Side
from xtoken_jax.config import Experiment
from xtoken_jax.data import arithmetic
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.documents import Documents
from xtoken_jax.data.encode import Part, read_parts, student_of
from xtoken_jax.data.sources import SourceKind, read_sources
from xtoken_jax.evaluate.accuracy import exact_match
from xtoken_jax.evaluate.bits_per_byte import bits_per_byte
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

_PROMPTS_AT_ONCE = 256

Figures = dict[str, float]


@dataclass(frozen=True)
class HeldOut:
    """The validation sources, ready for models of either side."""

    data: DataConfig
    student: Tokenizer
    pairs: Mapping[str, TokenizerPair]
    parts: dict[str, list[Part]]
    problems: dict[str, list[arithmetic.Problem]]

    def of_student(
        self, model: Model, params: Params, *, between: Callable[[], None] | None = None
    ) -> Figures:
        """Figures of a model with the student's tokenizer; what `between` raises now and then breaks off."""
        rows = {name: [student_of(part) for part in parts] for name, parts in self.parts.items()}
        return self._figures(model, params, self.student, rows, self.data.student_length, between)

    def of_teacher(self, teacher: str, model: Model, params: Params) -> Figures:
        """Figures of a model with a teacher's tokenizer."""
        rows = {name: [part[teacher].teacher for part in parts] for name, parts in self.parts.items()}
        return self._figures(model, params, self.pairs[teacher].teacher, rows, self.data.length_of(teacher))

    def _figures(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        texts: dict[str, list[Side]],
        length: int,
        between: Callable[[], None] | None = None,
    ) -> Figures:
        """Bits per byte of each text and accuracy on each set of problems."""
        found = {
            f"{name} bits/byte": bits_per_byte(
                model,
                params,
                tokenizer,
                [row.ids for row in rows],
                batch_size=self.data.batch_size,
                length=length,
                targets=[row.targets for row in rows],
                between=between,
            )
            for name, rows in texts.items()
        }
        for name, problems in self.problems.items():
            if between is not None:
                between()
            accuracy = exact_match(model, params, tokenizer, problems, batch_size=_PROMPTS_AT_ONCE)
            found[f"{name} accuracy"] = accuracy
        return found


def read_held_out(experiment: Experiment) -> dict[str, Documents]:
    """The validation sources that are text; the others are problems."""
    texts = {n: s for n, s in experiment.data.validation.items() if s.kind is not SourceKind.arithmetic}
    return read_sources(texts)


def held_out_parts(
    experiment: Experiment,
    student: Tokenizer,
    pairs: Mapping[str, TokenizerPair],
    texts: Mapping[str, Documents],
) -> HeldOut:
    """Of an experiment whose validation texts have been read."""
    problems = {
        name: arithmetic.problems(s.documents, split=s.split, seed=s.seed)
        for name, s in experiment.data.validation.items()
        if s.kind is SourceKind.arithmetic
    }
    parts = read_parts(pairs, texts, experiment.data)
    return HeldOut(experiment.data, student, pairs, parts, problems)
