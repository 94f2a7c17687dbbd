"""Share of prompts that a model completes with the right answer."""

from __future__ import annotations

from collections.abc import Sequence

from xtoken_jax.data.arithmetic import Problem
from xtoken_jax.evaluate.completions import complete
from xtoken_jax.models.decoder import Model, Params
from xtoken_jax.tokens.tokenizer import Tokenizer


def exact_match(
    model: Model, params: Params, tokenizer: Tokenizer, problems: Sequence[Problem], *, batch_size: int
) -> float:
    """Greedy completion up to the end of the line, equal to the answer.

    Args:
        problems: prompts and right answers; a prompt opens a document.
        batch_size: prompts completed together.

    Returns:
        Share in [0, 1].
    """
    found = complete(
        model,
        params,
        tokenizer,
        [p.prompt for p in problems],
        # one token more than the longest answer has, for the line's end
        max_new_tokens=1 + max(len(tokenizer.encode(p.answer)) for p in problems),
        stop=["\n"],
        batch_size=batch_size,
        length_multiple=8,
    )
    return sum(c.text == p.answer for c, p in zip(found, problems, strict=True)) / len(problems)
