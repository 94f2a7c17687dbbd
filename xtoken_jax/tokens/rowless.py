"""Special tokens past the end of a model's embedding, which no text and no chat template can give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_NEEDED = ("bos", "eos", "unk")


def drop_rowless(
    definition: dict[str, Any],
    model_config: Mapping[str, Any],
    token_configs: Sequence[Mapping[str, Any]],
    template: str | None,
) -> list[str]:
    """Remove the special tokens that have no row in the model's embedding from a parsed `tokenizer.json`.

    In Gemma 3 1B, for example, `<image_soft_token>` is id 262,144 and the embedding has 262,144 rows. A
    processor of images inserts such a token; text never gives it.

    Nothing is removed where an id without a row can occur: a piece of the vocabulary, an added token that is
    matched in plain text, a token that the chat template writes, or BOS, EOS or UNK. Such a tokenizer does
    not belong to the model, and loading the model says so.

    Args:
        definition: the content of `tokenizer.json`; changed in place.
        model_config: the content of the folder's config.json, {} where there is none.
        token_configs: the contents of `special_tokens_map.json` and `tokenizer_config.json`.
        template: the chat template.

    Returns:
        The spellings that were removed.
    """
    rows = model_config.get("vocab_size")
    if rows is None and isinstance(text_config := model_config.get("text_config"), Mapping):
        rows = text_config.get("vocab_size")
    added = definition.get("added_tokens") or []
    if not isinstance(rows, int) or rows <= 0:
        return []
    past = [token for token in added if token["id"] >= rows]
    vocabulary = definition["model"].get("vocab") or {}
    pieces = {piece for piece, _ in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)
    size = len(vocabulary) if isinstance(vocabulary, list) else max(vocabulary.values(), default=-1) + 1
    if not past or size > rows:
        return []
    configured = [config.get(f"{role}_token") for config in token_configs for role in _NEEDED]
    needed = {token.get("content") if isinstance(token, Mapping) else token for token in configured}
    for token in past:
        spelling = token["content"]
        if not token["special"] or spelling in pieces or spelling in needed or spelling in (template or ""):
            return []
    definition["added_tokens"] = [token for token in added if token["id"] < rows]
    return [token["content"] for token in past]
