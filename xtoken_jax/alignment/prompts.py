"""Prompts and completions: only the completion is to be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from xtoken_jax.alignment.locate import Located, locate
from xtoken_jax.alignment.spans import Spans, align_located
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.arguments import check_pair, check_texts
from xtoken_jax.tokens.tokenizer import TokenizerPair


def align_completions(pair: TokenizerPair, prompts: Sequence[str], completions: Sequence[str]) -> list[Spans]:
    """Encode and align prompts with their completions; the tokens of a prompt are no targets.

    A prompt and its completion are encoded as one text, as they stand in running text. A token
    with at least one byte of the completion is a target. A chunk over the border counts if all
    its tokens on both sides are targets.

    Args:
        pair: student's and teacher's tokenizer.
        prompts, completions: B texts each; nothing is put between them.

    Returns:
        One Spans a pair of texts, without document marks; `to_batch` makes ids, masks, targets and the
        alignment of them.

    Raises:
        UserError: as many prompts as completions are needed; a text that is not valid Unicode.

    Example:
        rows = align_completions(pair, ["12 + 189 ="], [" 201"])
        batch = to_batch(pair, rows, student_length=16, teacher_length=16, document_marks=True)
    """
    check_pair(pair)
    prompts, completions = check_texts("prompts", prompts), check_texts("completions", completions)
    return [row for (row,) in align_completions_together([pair], prompts, completions)]


def align_completions_together(
    pairs: Sequence[TokenizerPair], prompts: Sequence[str], completions: Sequence[str]
) -> list[tuple[Spans, ...]]:
    """`align_completions` with several teachers of one student, whose tokenizer encodes each text once.

    Returns:
        For each text, a Spans for every pair; the student's tokens are the same in all.
    """
    if len(prompts) != len(completions):
        raise UserError(f"{len(prompts)} prompts for {len(completions)} completions; give one each")
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    borders = np.array([len(prompt.encode()) for prompt in prompts], np.int64)
    student = locate(pairs[0].student, texts)
    learnt = _behind(student, borders)
    by_pair = []
    for pair in pairs:
        teacher = locate(pair.teacher, texts)
        taught = _behind(teacher, borders)
        by_pair.append(
            [
                replace(
                    spans,
                    student=replace(spans.student, targets=learnt[b]),
                    teacher=replace(spans.teacher, targets=taught[b]),
                )
                for b, spans in enumerate(align_located(pair, student, teacher))
            ]
        )
    return list(zip(*by_pair, strict=True))


def _behind(located: Located, borders: np.ndarray) -> list[np.ndarray]:
    """bool [T] for each text: the tokens that end after its border, or begin at it."""
    counts = np.diff(located.offsets)
    places = np.repeat(located.text_starts[:-1] + borders, counts)
    found = (located.ends > places) | (located.starts >= places)
    return np.split(found, located.offsets[1:-1]) if len(borders) else []
