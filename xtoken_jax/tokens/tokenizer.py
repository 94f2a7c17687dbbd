"""Load a Hugging Face tokenizer as it stands in its `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from xtoken_jax.errors import UserError
from xtoken_jax.hub import resolve_folder
from xtoken_jax.tokens.token_bytes import TokenBytes, read_token_bytes

ROLES = ("bos", "eos", "pad", "unk")


@dataclass(frozen=True)
class Tokenizer:
    """One tokenizer: its ids, their bytes and the roles of its special tokens.

    Attributes:
        name: the folder or hub id it was loaded from.
        size: V, the number of ids, added tokens included.
        token_bytes: the byte string of each id.
        roles: "bos", "eos", "pad", "unk" -> id, those that it has.
        adds_bos: whether its own post-processor opens a text with BOS.
        fingerprint: SHA-256 of tokenizer.json's content and of the roles.
        backend: the `tokenizers.Tokenizer` behind it.
    """

    name: str
    size: int
    token_bytes: TokenBytes
    roles: dict[str, int]
    adds_bos: bool
    fingerprint: str
    backend: tokenizers.Tokenizer
    definition: dict[str, Any]

    @classmethod
    def load(cls, path_or_id: str | Path) -> Tokenizer:
        """Read `tokenizer.json`, and the roles from `tokenizer_config.json` beside it.

        `transformers.AutoTokenizer` is not used: it can rebuild the pre-tokenizer of a
        folder from a class name and then give other ids than the file does.

        Raises:
            UserError: no folder, no tokenizer.json, a file that cannot be read or whose ids do not
                hold, or a kind of tokenizer whose tokens are not bytes.
        """
        folder = resolve_folder(path_or_id)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{folder}: no tokenizer.json; save the tokenizer in its fast form "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
            )
        try:
            text = path.read_text(encoding="utf-8")
            definition = json.loads(text)
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the Rust side raises plain Exception
            raise UserError(f"{path}: not a tokenizer that can be read ({error})") from error
        for token in definition.get("added_tokens") or []:
            given = backend.token_to_id(token["content"])
            if given != token["id"]:
                raise UserError(
                    f"{path}: the token {token['content']!r} has id {token['id']} in the file but "
                    f"{given} once loaded; give every id below it a token"
                )
        # Text is data: a "<|eot|>" spelled out in it must not become a control token.
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        table = read_token_bytes(definition, where=str(path))
        roles = _roles(folder, backend)
        opening = backend.encode("", add_special_tokens=True).ids
        # It places special tokens, which is done here, and may trim blanks off the offsets, which
        # would leave a blank token without any text.
        backend.post_processor = None
        content = json.dumps([definition, roles], sort_keys=True, ensure_ascii=False)
        return cls(
            name=str(path_or_id),
            size=len(table.table),
            token_bytes=table,
            roles=roles,
            adds_bos=bool(opening) and opening[0] == roles.get("bos"),
            fingerprint=hashlib.sha256(content.encode()).hexdigest(),
            backend=backend,
            definition=definition,
        )

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of one id; None for special tokens and ids without a token."""
        return self.token_bytes.table[token_id]

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [T], without any special token."""
        return np.asarray(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: list[str]) -> list[tokenizers.Encoding]:
        """Encodings (ids and character offsets) of several texts, without special tokens."""
        return self.backend.encode_batch(texts, add_special_tokens=False)

    def decode(self, ids: np.ndarray) -> str:
        """The text of a run of ids; bytes that are not UTF-8 show as U+FFFD."""
        return self.token_bytes.join(np.asarray(ids)).decode("utf-8", errors="replace")

    @property
    def pad_id(self) -> int:
        """An id to fill rows with; it is masked wherever it is read."""
        return next((self.roles[r] for r in ("pad", "eos", "bos") if r in self.roles), 0)


def _roles(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, int]:
    roles: dict[str, int] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from error
        if not isinstance(config, dict):
            raise UserError(f"{path}: not a JSON object")
        for role in ROLES:
            token = config.get(f"{role}_token")
            content = token.get("content") if isinstance(token, dict) else token
            token_id = backend.token_to_id(content) if isinstance(content, str) else None
            if token_id is not None:
                roles[role] = token_id
    return roles


@dataclass(frozen=True)
class TokenizerPair:
    """The student's and the teacher's tokenizer, in this order."""

    student: Tokenizer
    teacher: Tokenizer

    @classmethod
    def load(cls, student: str | Path, teacher: str | Path) -> TokenizerPair:
        """Load both from HF folders or hub ids; raises as `Tokenizer.load` does."""
        return cls(Tokenizer.load(student), Tokenizer.load(teacher))
