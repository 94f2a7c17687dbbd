"""What special and added tokens are for: roles that two tokenizers can share, and ids kept in reserve."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xtoken_jax.files import read_json

# The roles that a folder's own configuration names.
CONFIGURED = ("unk", "pad", "bos", "eos")

# Role -> spellings of markers, over the model families. Only added tokens are looked up here, so that a
# vocabulary's ordinary text never takes a role.
_SPELLINGS: dict[str, tuple[str, ...]] = {
    "document_start": ("<|begin_of_text|>", "<bos>", "<s>", "<｜begin▁of▁sentence｜>", "<|startoftext|>"),
    "document_end": ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>"),
    "turn_start": ("<|start_header_id|>", "<|im_start|>", "<start_of_turn>", "<|start|>"),
    "turn_header_end": ("<|end_header_id|>", "<|message|>"),
    "turn_end": ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>", "<|EOT|>"),
    "system": ("<|system|>", "[SYSTEM_PROMPT]"),
    "user": ("<|user|>", "<｜User｜>", "[INST]"),
    "assistant": ("<|assistant|>", "<｜Assistant｜>", "[/INST]"),
    "think_open": ("<think>", "[THINK]"),
    "think_close": ("</think>", "[/THINK]"),
    "tool_calls_open": ("<｜tool▁calls▁begin｜>", "[TOOL_CALLS]"),
    "tool_calls_close": ("<｜tool▁calls▁end｜>",),
    "tool_call_open": ("<tool_call>", "<｜tool▁call▁begin｜>", "<|tool_call|>"),
    "tool_call_close": ("</tool_call>", "<｜tool▁call▁end｜>", "<|/tool_call|>"),
    "tool_response_open": (
        "<tool_response>",
        "<｜tool▁output▁begin｜>",
        "<|tool_response|>",
        "[TOOL_RESULTS]",
    ),
    "tool_response_close": ("</tool_response>", "<｜tool▁output▁end｜>"),
    "tool_responses_open": ("[TOOL_RESULTS]", "<｜tool▁outputs▁begin｜>"),
    "tool_responses_close": ("[/TOOL_RESULTS]", "<｜tool▁outputs▁end｜>"),
    # DeepSeek's order is begin, prefix, hole, suffix, end: the hole opens the suffix, the end the middle.
    "fim_prefix": ("<|fim_prefix|>", "<fim_prefix>", "<｜fim▁begin｜>", "[PREFIX]"),
    "fim_suffix": ("<|fim_suffix|>", "<fim_suffix>", "<｜fim▁hole｜>", "[SUFFIX]"),
    "fim_middle": ("<|fim_middle|>", "<fim_middle>", "<｜fim▁end｜>", "[MIDDLE]"),
    "fim_pad": ("<|fim_pad|>", "<fim_pad>"),
    "repository_name": ("<|repo_name|>", "<repo_name>", "<reponame>"),
    "file_separator": ("<|file_sep|>", "<file_sep>"),
    "image_start": ("<|vision_start|>", "<start_of_image>"),
    "image_end": ("<|vision_end|>", "<end_of_image>"),
    "image": ("<|image_pad|>", "<image_soft_token>"),
    "mask": ("<mask>", "[MASK]"),
}
_ROLE_OF = {spelling: role for role, spellings in _SPELLINGS.items() for spelling in spellings}

# Markers of a conversation's turns, whichever tokenizer has them. Plain text does not hold them by chance.
TURN_MARKERS = tuple(
    spelling
    for role in ("turn_start", "turn_header_end", "turn_end", "system", "user", "assistant")
    for spelling in _SPELLINGS[role]
)

TURN_ENDS = _SPELLINGS["turn_end"]

_RESERVED = re.compile(
    r"<\|reserved_(special_token_)?\d+\|>|<\|(extra|dummy|placeholder|unused)_?\d+\|>"
    r"|<unused_?\d+>|\[unused_?\d+\]|<｜place▁holder▁no▁\d+｜>|<SPECIAL_\d+>"
)


def is_reserved(spelling: str) -> bool:
    """Whether a token only keeps an id free for later, such as `<unused7>`."""
    return _RESERVED.fullmatch(spelling) is not None


def find_roles(
    definition: dict[str, Any], configs: Sequence[dict[str, Any]], id_of: Callable[[str], int | None]
) -> dict[str, int]:
    """Role -> id: markers by their spelling, then "bos", "eos", "pad", "unk" as the folder configures them.

    Args:
        definition: the content of `tokenizer.json`.
        configs: those of `special_tokens_map.json` and `tokenizer_config.json`; the last one decides.
        id_of: spelling -> id.
    """
    roles: dict[str, int] = {}
    for token in definition.get("added_tokens") or []:
        if role := _ROLE_OF.get(token["content"]):
            roles.setdefault(role, token["id"])
    for config in configs:
        for role in CONFIGURED:
            token = config.get(f"{role}_token")
            content = token.get("content") if isinstance(token, dict) else token
            token_id = id_of(content) if isinstance(content, str) else None
            if token_id is not None:
                roles[role] = token_id
    return roles


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file of a model's folder, {} where there is no file.

    Raises:
        UserError: the file holds anything else.
    """
    return (
        read_json(path, what="the settings of a model", remedy="get the model's files again")
        if path.is_file()
        else {}
    )
