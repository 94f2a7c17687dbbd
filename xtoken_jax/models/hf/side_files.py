"""Files of an exported folder besides its weights: tokenizer, chat template, generation settings."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.files import parse_json
from xtoken_jax.models.hf.types import check_generation

TOKENIZER_CONFIG, TEMPLATE, GENERATION = (
    "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
_OLD_TEMPLATE = "chat_template.json"  # of processors; it holds the template as JSON
COPIED = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION,
    TEMPLATE,
    _OLD_TEMPLATE,
    # vocabularies in the form that converters (llama.cpp) and slow tokenizers read
    "tokenizer.model",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
_EOS = "eos_token_id"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def side_files(
    source: Path, config: dict[str, Any], ends: Sequence[int] = (), chat_template: str | None = None
) -> tuple[dict[str, bytes], list[int]]:
    """Files to write next to the weights, and the ends of a text that the source folder does not name.

    Args:
        source: the student's folder; its `COPIED` files are taken as they are, except as follows.
        config: content of the exported config.json. Its `eos_token_id` is extended in place.
        ends: ids that the model was trained to end a text or a turn with. Those that are missing from
            `eos_token_id` are added to config.json and generation_config.json, after the ones there.
        chat_template: a Jinja file that replaces the source's template, wherever that is stored.

    Returns:
        File name -> content, and the ids that were added.

    Raises:
        UserError: a JSON file or a template that cannot be read.
    """
    files = {name: (source / name).read_bytes() for name in COPIED if (source / name).is_file()}
    if chat_template is not None:
        files.pop(_OLD_TEMPLATE, None)
        if "chat_template" in (settings := _object(files, TOKENIZER_CONFIG, source)):
            del settings["chat_template"]  # some readers prefer it to the file
            files[TOKENIZER_CONFIG] = _json(settings)
        try:
            files[TEMPLATE] = Path(chat_template).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"{chat_template}: cannot be read as a chat template ({error})") from error
    if TEMPLATE in files:
        files[TEMPLATE] = files[TEMPLATE].removeprefix(_BYTE_ORDER_MARK)
    if not ends:
        return files, []
    generation = _object(files, GENERATION, source)
    check_generation(generation, str(source / GENERATION))
    # Readers of generation_config.json do not look into config.json.
    begun = generation if generation.get(_EOS) is not None else config
    both, added = _extended(begun.get(_EOS), ends)
    config[_EOS], added_to_config = _extended(config.get(_EOS), ends)
    if GENERATION in files and (added or begun is config):
        files[GENERATION] = _json(generation | {_EOS: both})
    return files, list(dict.fromkeys([*added, *added_to_config]))


def refuse_links(source: Path) -> None:
    """Refuse a folder in which a file that exports copy is a link to a file outside.

    Links into the cache of huggingface_hub are accepted.

    Raises:
        UserError: names the link and its target.
    """
    inside = Path(os.path.realpath(source))
    for path in (source / name for name in COPIED):
        target = Path(os.path.realpath(path))
        blob = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
        if path.is_symlink() and not (target.is_relative_to(inside) or blob):
            raise UserError(
                f"{path}: is a link to {os.readlink(path)}, outside of the model's folder, which exports "
                "would copy; put a copy in its place, or delete the link"
            )


def _extended(ids: int | list[int] | None, ends: Sequence[int]) -> tuple[int | list[int], list[int]]:
    """An `eos_token_id` with further ids, and those that it did not have."""
    known = [ids] if isinstance(ids, int) else list(ids or ())
    added = [end for end in ends if end not in known]
    if not added and ids is not None:
        return ids, []
    every = [*known, *added]
    return every[0] if len(every) == 1 else every, added


def _object(files: dict[str, bytes], name: str, source: Path) -> dict[str, Any]:
    """The JSON object in a copied file, {} where there is no such file."""
    if name not in files:
        return {}
    return parse_json(
        files[name], source / name, what="the settings of a model", remedy="get the model's files again"
    )


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
