"""What a run is measured on: texts and problems that no training text holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from xtoken_jax.alignment.spans import Side
from xtoken_jax.data import arithmetic
from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.documents import Documents
from xtoken_jax.data.encode import Part, read_parts, student_of
from xtoken_jax.data.hold_out import hold_out
from xtoken_jax.data.sources import SourceKind, read_sources
from xtoken_jax.errors import NonFiniteOutputsError
from xtoken_jax.evaluate.accuracy import exact_match
from xtoken_jax.evaluate.bits_per_byte import bits_per_byte
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.run.experiment import Experiment
from xtoken_jax.run.teachers import group_of
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair
from xtoken_jax.train.non_finite import NonFinite, model_remedy, outputs_of

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
    skips: bool = False  # a figure is NaN where outputs are not finite, instead of an error

    def of_student(
        self, model: Model, params: Params, *, between: Callable[[], None] | None = None
    ) -> Figures:
        """Figures of a model with the student's tokenizer; what `between` raises now and then breaks off."""
        rows = {name: [student_of(part) for part in parts] for name, parts in self.parts.items()}
        return self._figures(
            model, params, self.student, rows, self.data.student_length, "the student's outputs", between
        )

    def of_teacher(self, teacher: str, model: Model, params: Params) -> Figures:
        """Figures of a model with a teacher's tokenizer."""
        rows = {name: [part[teacher].teacher for part in parts] for name, parts in self.parts.items()}
        tokenizer, length = self.pairs[teacher].teacher, self.data.length_of(teacher)
        try:
            return self._figures(model, params, tokenizer, rows, length, outputs_of(teacher))
        except NonFiniteOutputsError as error:
            raise NonFiniteOutputsError(f"{error}; {model_remedy(group_of(teacher), model)}") from error

    def _figures(
        self,
        model: Model,
        params: Params,
        tokenizer: Tokenizer,
        texts: dict[str, list[Side]],
        length: int,
        whose: str,
        between: Callable[[], None] | None = None,
    ) -> Figures:
        """Bits per byte of each text and accuracy on each set of problems; `whose` is that of the model."""
        found: Figures = {}

        def measure(figure: str, source: str, value_of: Callable[[], float]) -> None:
            try:
                found[f"{source} {figure}"] = value_of()
            except NonFiniteOutputsError as error:
                if not self.skips:
                    whose_on = f"{whose} are not finite on data.validation.{source}"
                    raise NonFiniteOutputsError(whose_on) from error
                found[f"{source} {figure}"] = math.nan

        for name, rows in texts.items():
            measure("bits/byte", name, partial(
                bits_per_byte,
                model,
                params,
                tokenizer,
                [row.ids for row in rows],
                batch_size=self.data.batch_size,
                length=length,
                targets=[row.targets for row in rows],
                between=between,
            ))  # fmt: skip
        for name, problems in self.problems.items():
            if between is not None:
                between()
            measure("accuracy", name, partial(
                exact_match, model, params, tokenizer, problems, batch_size=_PROMPTS_AT_ONCE
            ))  # fmt: skip
        return found


def read_texts(experiment: Experiment) -> tuple[dict[str, Documents], dict[str, Documents]]:
    """The training sources, and the held-out text: the validation sources or documents held out of training.

    Validation sources of arithmetic are problems, and not read here.

    Raises:
        UserError: as `read_sources` and `hold_out`.
    """
    train, sources = read_sources(experiment.data.train), experiment.data.validation
    if not sources:
        return hold_out(train, experiment.data.validation_share)
    return train, read_sources({n: s for n, s in sources.items() if s.kind is not SourceKind.arithmetic})


def describe_held_out(
    experiment: Experiment, train: Mapping[str, Documents], held_out: Mapping[str, Documents]
) -> str | None:
    """Line for the start of a run without validation sources; None for others."""
    if experiment.data.validation:
        return None
    if not held_out:
        return "nothing: data.validation=none, no held-out figures"
    counts = [
        f"{len(held_out[name]):,} of {len(held_out[name]) + len(documents):,} documents of {name}"
        if name in held_out
        else f"none of {len(documents)} of {name}"
        for name, documents in train.items()
    ]
    return f"{', '.join(counts)}; not trained on (data.validation_share={experiment.data.validation_share:g})"


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
    skips = experiment.train.non_finite is NonFinite.skip
    return HeldOut(experiment.data, student, pairs, parts, problems, skips)
