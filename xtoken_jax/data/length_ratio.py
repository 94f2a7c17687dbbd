"""How many tokens the teachers have for one of the student's, and lengths of rows that do not fit that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from xtoken_jax.data.config import DataConfig
from xtoken_jax.data.encode import Document, Part, encode, student_of
from xtoken_jax.tokens.tokenizer import TokenizerPair

_SAMPLE = 32  # documents of each source
_TOKENS = 2**17  # student tokens, after which the sample is large enough
_FAR = 1.6  # factor between the lengths' ratio and the tokens'
_MULTIPLE = 8  # of a length that is proposed


def length_warnings(
    pairs: Mapping[str, TokenizerPair], sources: Mapping[str, Sequence[Document]], config: DataConfig
) -> list[str]:
    """One line for each teacher whose rows are far too long or too short for the student's.

    Args:
        pairs: by teacher.
        sources: the training documents by source; a sample spread over each is tokenized.
        config: lengths of rows.
    """
    rows: list[Part] = []
    for document in _sample(sources):
        rows += encode(pairs, [document])
        if sum(len(student_of(row)) for row in rows) > _TOKENS:
            break
    lines = []
    for name in pairs:
        student = sum(len(row[name].student) for row in rows)
        teacher = sum(len(row[name].teacher) for row in rows)
        if not student or not teacher:
            continue
        tokens, length = teacher / student, config.length_of(name)
        asked = length / config.student_length
        if 1 / _FAR <= asked / tokens <= _FAR:
            continue
        key = f"teacher_lengths.{name}" if name in config.teacher_lengths else "teacher_length"
        fitting = _rounded(tokens * config.student_length)
        side = "the student's" if asked < tokens else "the teacher's"
        filled = min(asked / tokens, tokens / asked)
        lines.append(
            f"data.{key}={length} is {asked:.2f} times data.student_length={config.student_length}, but the "
            f"teacher has {tokens:.2f} tokens for one of the student's (sample: {len(rows)} documents): "
            f"{side} rows fill up to {filled:.0%}; take data.{key}={fitting}"
        )
    return lines


def _sample(sources: Mapping[str, Sequence[Document]]) -> Iterator[Document]:
    """At most `_SAMPLE` documents of each source, spread over it, the sources in turn."""
    for number in range(_SAMPLE):
        for texts in sources.values():
            if number < len(texts):
                yield texts[number * max(1, len(texts) // _SAMPLE)]


def _rounded(length: float) -> int:
    return max(_MULTIPLE, -(-round(length) // _MULTIPLE) * _MULTIPLE)
