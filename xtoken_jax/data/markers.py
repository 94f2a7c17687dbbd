"""Conversations that are already rendered, given as texts: their markers are read as plain text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from xtoken_jax.data.records import Document, Exchange, Marked, text_of
from xtoken_jax.tokens.roles import TURN_MARKERS, is_reserved
from xtoken_jax.tokens.tokenizer import Tokenizer

SAMPLE = 1000  # documents
_ALSO_HTML = re.compile(r"</?\w{1,4}>")  # <s> is struck text as well; it counts at the ends of a text only


def spelled_markers(
    name: str,
    documents: Sequence[Document],
    tokenizers: Sequence[Tokenizer],
    *,
    option: str | None = None,
    sample: int = SAMPLE,
) -> str | None:
    """A line that counts the texts which spell a control token; None where none does.

    Prompts and completions count as texts. With `markers=tokens`, a
    control token counts only if one of the tokenizers does not have it.

    Args:
        name: what the line calls the source.
        documents: its records.
        tokenizers: whose special tokens to look for, besides the turn markers of common chat templates.
        option: the setting that reads markers as tokens, if there is one.
        sample: the number of records to read, the first ones.
    """
    texts = [d for d in documents[:sample] if isinstance(d, (str, Exchange))]
    marked = any(isinstance(text, Marked) for text in texts)
    special = [{str(t.backend.id_to_token(i)) for i in t.token_bytes.special} for t in tokenizers]
    wanted = {token for token in set(TURN_MARKERS).union(*special) if not is_reserved(token)}
    if marked:
        wanted = {token for token in wanted if not all(token in tokens for tokens in special)}
    html = tuple(token for token in wanted if _ALSO_HTML.fullmatch(token))
    # Literals in one group: the search then skips to characters that begin one of them.
    longest_first = sorted(wanted - set(html), key=len, reverse=True)
    anywhere = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    spelled: Counter[str] = Counter()
    for text in map(text_of, texts):
        if (match := anywhere.search(text)) is not None:
            spelled[match[0]] += 1
        elif text.lstrip().startswith(html) or text.rstrip().endswith(html):
            spelled[next(token for token in html if token in text)] += 1
    if not spelled:
        return None
    part = "" if len(documents) <= sample else "first "
    token = spelled.most_common(1)[0][0]
    line = f"source {name!r}: {spelled.total():,} of the {part}{len(texts):,} texts spell {token}, which "
    if marked:
        owner = next(t.name for t, tokens in zip(tokenizers, special, strict=True) if token not in tokens)
        return f"{line}{owner} does not have as a special token; for conversations give messages"
    insist = "" if option is None else f", or {option}=tokens to read markers as tokens"
    return f"{line}is read as plain text; for conversations give messages{insist}"
