"""Load a Hugging Face tokenizer as it stands in its `tokenizer.json`."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from xtoken_jax.errors import UserError
from xtoken_jax.files.foreign import foreign_format
from xtoken_jax.hub import resolve_folder
from xtoken_jax.tokens.auto_tokenizer import compare_auto_tokenizer
from xtoken_jax.tokens.backend import check_settings, make_backend, panics_are_errors, read_definition
from xtoken_jax.tokens.encoding import prepare, text_fingerprint
from xtoken_jax.tokens.roles import CONFIGURED, find_roles, read_json_object
from xtoken_jax.tokens.rowless import drop_rowless
from xtoken_jax.tokens.token_bytes import KINDS, TokenBytes, read_token_bytes


@dataclass(frozen=True)
class Tokenizer:
    """One tokenizer: its ids, their bytes and the roles of its special tokens.

    Attributes:
        name: the folder or hub id it was loaded from.
        size: V, the number of ids, added tokens included, without special ones that have no row in the
            embedding of the model in the same folder (`xtoken_jax.tokens.rowless`).
        token_bytes: the byte string of each id.
        roles: "bos", "eos", "pad", "unk" and markers such as "turn_end", "think_open" -> id, those
            that it has (`xtoken_jax.tokens.roles`).
        adds_bos: whether it opens a text with BOS by itself.
        fingerprint: SHA-256 of what it does to text: equal for two files of one tokenizer, whatever their
            layout and the roles of their special tokens (`same_vocabulary` needs no more).
        file_fingerprint: SHA-256 of tokenizer.json and of the roles, which decide encoded rows and W.
        backend: the `tokenizers.Tokenizer` behind it.
        chat_template: Jinja source that renders a conversation, None where the folder has none.
        warning: one line where dropout was switched off, or `AutoTokenizer` gives other ids than
            tokenizer.json does.
        day: the date that a chat template writes where it asks for today's (`strftime_now`).
        template_file: where `chat_template` was read, for errors.
    """

    name: str
    size: int
    token_bytes: TokenBytes
    roles: dict[str, int]
    adds_bos: bool
    fingerprint: str
    file_fingerprint: str
    backend: tokenizers.Tokenizer
    chat_template: str | None = None
    warning: str | None = None
    day: datetime.date = field(default_factory=datetime.date.today)
    template_file: str | None = None

    @classmethod
    def load(
        cls, path_or_id: str | Path, *, compare_auto: bool = True, chat_template: str | None = None
    ) -> Tokenizer:
        """Read `tokenizer.json`, and the roles from `tokenizer_config.json` beside it.

        `transformers.AutoTokenizer` is not used: it can rebuild the pre-tokenizer of a
        folder from a class name and then give other ids than the file does.

        Args:
            path_or_id: a Hugging Face folder or a hub id, such as `org/name` or `org/name@revision`.
            compare_auto: also encode hard texts with `AutoTokenizer`, where transformers is
                installed, and keep a `warning` if its ids differ. A tokenizer is compared once;
                the answer is kept in the user's cache folder.
            chat_template: a Jinja file, in place of what the folder has.

        Raises:
            UserError: no folder, no tokenizer.json, a file that cannot be read or whose ids do not
                hold, or a kind of tokenizer whose tokens are not bytes.
        """
        folder = resolve_folder(path_or_id, weights=False)
        path = folder / "tokenizer.json"
        if not path.is_file():
            if (known := foreign_format(folder)) is not None:
                raise UserError(f"{folder}: no tokenizer.json; it is {known}")
            raise UserError(
                f"{folder}: no tokenizer.json; save the tokenizer in its fast form "
                "(AutoTokenizer.from_pretrained(...).save_pretrained(folder))"
            )
        special, config = (
            _settings(folder / name) for name in ("special_tokens_map.json", "tokenizer_config.json")
        )
        model_config: dict[str, Any] = {}
        with contextlib.suppress(UserError):  # loading the model says what is wrong with its config.json
            model_config = read_json_object(folder / "config.json")
        template = _chat_template(folder, config) if chat_template is None else _read(chat_template)
        text, definition = read_definition(path)
        dropout = _switch_dropout_off(definition)
        rowless = drop_rowless(definition, model_config, (special, config), template)
        backend = make_backend(json.dumps(definition) if dropout or rowless else text, path)
        for token in definition.get("added_tokens") or []:
            given = backend.token_to_id(token["content"])
            if given != token["id"]:
                raise UserError(
                    f"{path}: the token {token['content']!r} has id {token['id']} in the file but "
                    f"{given} once loaded; give every id below it a token"
                )
        roles = find_roles(definition, (special, config), backend.token_to_id)
        table = read_token_bytes(definition, where=str(path), unknown=roles.get("unk"))
        opening = backend.encode("", add_special_tokens=True).ids
        by_itself = bool(opening) and opening[0] == roles.get("bos")
        # DeepSeek's post-processor adds nothing; its configuration says that BOS belongs there.
        adds_bos = by_itself if config.get("add_bos_token") is None else config["add_bos_token"]
        fingerprint = text_fingerprint(definition, backend, table.kind)
        # Text is data: a "<|eot|>" spelled out in it must not become a control token.
        parted = prepare(backend, table.special | table.byte_fallback)
        content = text.encode() + json.dumps(roles, sort_keys=True).encode()
        # Versions that did not part spellings or switch dropout off encoded other rows.
        content += b" parted" * parted + b" no dropout" * bool(dropout)
        if (
            adds_bos != by_itself and "bos" in roles
        ):  # else tokenizer.json decides it, which is in the content
            content += b" add_bos_token" if adds_bos else b" no add_bos_token"
        file_fingerprint = hashlib.sha256(content)
        warning = None
        if dropout:  # AutoTokenizer keeps it, and gives other ids each time
            warning = (
                f"{path}: model.dropout={dropout} draws another encoding of a text each time; it is switched "
                "off here: set it to null in the file, which transformers reads as it is"
            )
        elif compare_auto:
            warning = compare_auto_tokenizer(folder, config, backend, file_fingerprint.hexdigest())
        return cls(
            name=str(path_or_id),
            size=len(table.table),
            token_bytes=table,
            roles=roles,
            adds_bos=adds_bos and "bos" in roles,
            fingerprint=fingerprint,
            file_fingerprint=file_fingerprint.hexdigest(),
            backend=backend,
            chat_template=template,
            warning=warning,
            template_file=str(_template_file(folder) if chat_template is None else chat_template),
        )

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}: {self.describe()})"

    def describe(self) -> str:
        """One line: kind, size, roles, and how many ids have no bytes."""
        table = self.token_bytes
        configured = ", ".join(f"{r.upper()} {self.roles[r]}" for r in CONFIGURED[::-1] if r in self.roles)
        markers = sorted(set(self.roles) - set(CONFIGURED))
        without = sum(content is None for content in table.table)
        return (
            f"{KINDS[table.kind]}, {self.size:,} ids; {configured or 'no BOS, EOS, PAD or UNK'}; "
            f"markers: {', '.join(markers) or 'none'}; {without:,} ids without bytes, "
            f"{len(table.special):,} special, {len(table.unused):,} reserved"
        )

    def bytes_of(self, token_id: int) -> bytes | None:
        """The bytes of one id; None for special tokens and ids without a token."""
        return self.token_bytes.table[token_id]

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [T], without any special token."""
        with panics_are_errors(self.name):
            return np.asarray(self.backend.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [T], without any special token."""
        with panics_are_errors(self.name):
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    @cached_property
    def markup_backend(self) -> tokenizers.Tokenizer:
        """A second backend, to which a special token spelled out is that token: for rendered templates."""
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    def decode(self, ids: np.ndarray) -> str:
        """The text of a run of ids; bytes that are not UTF-8 show as U+FFFD."""
        return self.token_bytes.join(np.asarray(ids)).decode("utf-8", errors="replace")

    @property
    def pad_id(self) -> int:
        """An id to fill rows with; it is masked wherever it is read."""
        return next((self.roles[r] for r in ("pad", "eos", "bos") if r in self.roles), 0)


def _switch_dropout_off(definition: dict[str, Any]) -> float | None:
    """Remove BPE dropout, a training setting, from a parsed `tokenizer.json` and return its value."""
    return definition["model"].pop("dropout", None)


def _settings(path: Path) -> dict[str, Any]:
    content = read_json_object(path)
    check_settings(content, path)
    return content


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The folder's default chat template, from its own file or from `tokenizer_config.json`."""
    path = _template_file(folder)
    if path.suffix == ".jinja":
        return _read(path)
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}.get("default")
    return template.removeprefix("\ufeff") if isinstance(template, str) else None


def _template_file(folder: Path) -> Path:
    path = folder / "chat_template.jinja"
    return path if path.is_file() else folder / "tokenizer_config.json"


def _read(path: str | Path) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a chat template ({error})") from error


@dataclass(frozen=True)
class TokenizerPair:
    """The student's and the teacher's tokenizer, in this order."""

    student: Tokenizer
    teacher: Tokenizer

    def __repr__(self) -> str:
        return f"TokenizerPair(\n  student: {self.student!r}\n  teacher: {self.teacher!r})"

    @classmethod
    def load(cls, student: str | Path, teacher: str | Path) -> TokenizerPair:
        """Load both from HF folders or hub ids; raises as `Tokenizer.load` does."""
        return cls(Tokenizer.load(student), Tokenizer.load(teacher))
