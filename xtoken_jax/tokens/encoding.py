"""Encoding as at inference: no dropout, no padding, and no control token out of plain text."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import tokenizers
from tokenizers import Regex, pre_tokenizers

# Settings of a model that its other fields hold, or that do not change an inference encoding.
_NOT_OPTIONS = ("type", "vocab", "merges", "dropout")
# Of an added token that a text can spell: how it is matched.
_MATCHING = ("single_word", "lstrip", "rstrip", "normalized")


def prepare(backend: tokenizers.Tokenizer, control: Iterable[int]) -> bool:
    """Set a tokenizer up to read text as data, in place.

    Special tokens are not matched in a text, nothing is padded or cut, and the post-processor is removed:
    it places special tokens, which is done elsewhere, and may trim blanks off the offsets, which would
    leave a blank token without any text.

    A control token can be in the model's own vocabulary as well (Unigram, WordPiece, BPE without word
    splitting), where a text that spells it would still give its id. A last pre-tokenizer then parts the
    first character of such a spelling from the rest, and the model has to spell it in other pieces. Other
    texts keep their encodings, and all ids their names. A control token of one character cannot be parted.

    Args:
        backend: the tokenizer as it was read.
        control: ids that no text may give.

    Returns:
        Whether a pre-tokenizer was added.
    """
    backend.encode_special_tokens = True
    backend.no_padding()
    backend.no_truncation()
    backend.post_processor = None
    spellings = sorted(filter(None, map(backend.id_to_token, control)))
    reachable = [spelling for spelling in spellings if len(spelling) > 1 and _gives(backend.model, spelling)]
    if not reachable:
        return False
    rests: dict[str, list[str]] = defaultdict(list)
    for spelling in reachable:
        rests[spelling[0]].append(re.escape(spelling[1:]))
    pattern = "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in sorted(rests.items()))
    parting = pre_tokenizers.Split(Regex(pattern), "isolated")
    before = [] if backend.pre_tokenizer is None else [backend.pre_tokenizer]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, parting])
    return True


def _gives(model: tokenizers.models.Model, piece: str) -> bool:
    """Whether the model, without its pre-tokenizer, writes a piece of its vocabulary as this one piece.

    What surrounds a piece can only prevent it: merges across its border, or a longer piece. A suffix that
    marks the end of a word is the exception.
    """
    token_id = model.token_to_id(piece)
    if token_id is None:
        return False
    return bool(getattr(model, "end_of_word_suffix", None)) or any(
        token.id == token_id for token in model.tokenize(piece)
    )


def text_fingerprint(definition: dict[str, Any], backend: tokenizers.Tokenizer, kind: str) -> str:
    """SHA-256 of what a tokenizer does to text: which ids it gives, and which bytes they stand for.

    Two files of one tokenizer have the same, whatever their layout, the version of `tokenizers` that
    wrote them, their post-processor, padding, truncation or dropout, and the roles that
    `tokenizer_config.json` gives to special tokens. A further added token, or another id or name of a
    special one, makes another tokenizer: its logits have another column.

    Args:
        definition: the content of `tokenizer.json`.
        backend: what it makes, before `prepare`.
        kind: as in `TokenBytes`.
    """
    model = definition["model"]
    vocab = model["vocab"]
    pieces = vocab if isinstance(vocab, list) else sorted(vocab.items(), key=lambda item: item[1])
    merges = [
        pair.split(" ") if isinstance(pair, str) else pair
        for pair in model.get("merges") or []
        if not (isinstance(pair, str) and pair.startswith("#version"))
    ]
    options = {key: value for key, value in model.items() if key not in _NOT_OPTIONS and value}
    if model.get("unk_token") is None:
        options.pop("fuse_unk", None)  # there is no unknown token to fuse
    added = [
        [token["id"], token["content"], *(bool(token.get(key)) for key in _MATCHING if not token["special"])]
        for token in sorted(definition.get("added_tokens") or [], key=lambda token: token["id"])
    ]
    steps = [_steps(part) for part in (backend.normalizer, backend.pre_tokenizer)]
    content = [kind, model.get("type"), options, pieces, model.get("unk_id"), merges, added, steps]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _steps(part: Any) -> list[dict[str, Any]]:
    """A normalizer or pre-tokenizer as the library itself writes it, all settings spelled out, in steps."""
    return [] if part is None else _flat(json.loads(part.__getstate__()))


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    children = step.get("normalizers", step.get("pretokenizers"))
    if children is not None:
        return [inner for child in children for inner in _flat(child)]
    step.pop("trim_offsets", None)  # changes no id
    return [step]
