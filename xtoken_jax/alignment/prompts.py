"""Prompts and completions: only the completion is to be learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from xtoken_jax.alignment.locate import locate
from xtoken_jax.alignment.spans import Spans, align_located
from xtoken_jax.errors import UserError
from xtoken_jax.tokens.tokenizer import TokenizerPair


def align_completions(pair: TokenizerPair, prompts: Sequence[str], completions: Sequence[str]) -> list[Spans]:
    """Encode and align prompts with their completions; the tokens of a prompt are no targets.

    A prompt and its completion are encoded as one text, as they stand in running text. A token
    that reaches over the border belongs to the prompt, and a chunk that does never counts.

    Args:
        pair: student's and teacher's tokenizer.
        prompts, completions: B texts each; nothing is put between them.

    Returns:
        One Spans a pair of texts, without document marks.

    Raises:
        UserError: as many prompts as completions are needed; a text that is not valid Unicode.

    Example:
        rows = align_completions(pair, ["12 + 189 ="], [" 201"])
    """
    if len(prompts) != len(completions):
        raise UserError(f"{len(prompts)} prompts for {len(completions)} completions; give one each")
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    located = [locate(tokenizer, texts) for tokenizer in (pair.student, pair.teacher)]
    rows = []
    for b, spans in enumerate(align_located(pair, *located)):
        border = len(prompts[b].encode())
        sides = []
        for side, tokens in zip(located, (spans.student, spans.teacher), strict=True):
            starts = side.starts[side.offsets[b] : side.offsets[b + 1]] - side.text_starts[b]
            sides.append(replace(tokens, targets=starts >= border))
        rows.append(replace(spans, student=sides[0], teacher=sides[1]))
    return rows
