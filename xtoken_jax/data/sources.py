"""Where text comes from: files, datasets, bundled documentation of Python, generated arithmetic."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from xtoken_jax.data import arithmetic
from xtoken_jax.data.detect import find_shape
from xtoken_jax.data.documents import Documents, Records
from xtoken_jax.data.formats import python_docs
from xtoken_jax.data.formats.array_record import ArrayRecords
from xtoken_jax.data.formats.compressed import ENDINGS
from xtoken_jax.data.formats.csv_files import CsvRows
from xtoken_jax.data.formats.hugging_face import HubRows, is_saved
from xtoken_jax.data.formats.jsonl import JsonObjects
from xtoken_jax.data.formats.limits import MAX_RATIO, MAX_RECORD, Limits
from xtoken_jax.data.formats.parquet import ParquetFiles
from xtoken_jax.data.formats.text import TextFiles, TextLines
from xtoken_jax.data.formats.tfds import TfdsExamples, is_prepared
from xtoken_jax.data.records import Shape, Targets
from xtoken_jax.errors import UserError
from xtoken_jax.hub import how_to_prepare


class Markers(Enum):
    """What a special token is that a text spells, such as <|im_start|>."""

    text = "text"
    tokens = "tokens"


class SourceKind(Enum):
    """What a source reads."""

    auto = "auto"
    jsonl = "jsonl"
    text = "text"
    lines = "lines"
    csv = "csv"
    parquet = "parquet"
    array_record = "array_record"
    tfds = "tfds"
    hub = "hub"
    python_docs = "python_docs"
    python_docstrings = "python_docstrings"
    arithmetic = "arithmetic"


_FILE_ENDINGS = {
    SourceKind.jsonl: [f"{name}{packed}" for name in (".jsonl", ".ndjson", ".json") for packed in ENDINGS],
    SourceKind.text: [f".txt{packed}" for packed in ENDINGS],
    SourceKind.lines: [f".txt{packed}" for packed in ENDINGS],
    SourceKind.csv: [f"{name}{packed}" for name in (".csv", ".tsv") for packed in ENDINGS],
    SourceKind.parquet: [".parquet"],
    SourceKind.array_record: [".array_record", ".arrayrecord"],
}
_TABS = {"tab": "\t", r"\t": "\t"}
_GENERATED = (SourceKind.python_docs, SourceKind.python_docstrings, SourceKind.arithmetic)


@dataclass
class SourceConfig:
    """One source of documents.

    Attributes:
        kind: jsonl (one JSON object per line, or a list of objects), csv, text (one document per file), lines
            (one document per line), parquet, array_record (JSON objects or texts), tfds (TensorFlow Datasets,
            without TensorFlow), hub (Hugging Face datasets), python_docs (bundled: the topics of Python
            3.11's `help()`), python_docstrings (bundled: its standard library), arithmetic (generated
            remainders). auto infers the kind of files from their endings, and that of tfds and hub folders
            from what is in them. jsonl, csv, text and lines may be compressed: .gz, .zst, .bz2, .xz.
        path: a file, a folder, or a pattern such as data/**/*.jsonl.zst; files are read in the order of their
            names. For tfds a name such as wikipedia/20230601.en, or the folder of a prepared dataset. For hub
            org/name or org/name@revision, or a folder that `save_to_disk` wrote.
        subset: configuration of a hub dataset that has several.
        data_dir: folder of the TFDS datasets; null for the default of TFDS.
        split: split of a tfds or hub dataset, in their syntax, such as train[:10%]; train or validation of
            generated data. Files have no splits.
        records: key of the list of records, for a JSON file that is one object with that list.
        delimiter: character between the fields of a csv file, or "tab"; null for a comma, or a tab in .tsv
            files.
        field: key or column of a text.
        prompt, completion: keys of a prompt and its completion. If only one is given, the other has its
            default name. Texts are joined without anything in between. Lists of messages are a conversation
            whose targets are in the completion.
        input: key of a second part of the prompt, which may be missing in records. Blank lines separate the
            prompt, this part and the completion.
        system: key of a system prompt, which may be missing in records; null for "system".
        chat: read a prompt and its completion as turns of a conversation, in each side's chat template.
        messages: key of the messages of a conversation: objects with role and content, or with from and value
            (ShareGPT). Where no key is given, a record with "messages", "conversations" or "conversation" is
            a conversation; with "prompt" and "completion", a prompt with its completion; with "instruction"
            and "output" (Alpaca, with "input") or "response" (Dolly, with "context"), the same in parts; with
            "text", a text.
        targets: what the loss is on: completion, assistant or all. auto takes completions, the turns of the
            assistant, and all of a text.
        markers: tokens reads special tokens that a text spells, such as <|im_start|>, as these tokens: for
            conversations that are already rendered in the chat template of both sides. text, the default,
            reads them as ordinary characters.
        limit: number of records to read, from the first one; null for all.
        documents: for arithmetic: number of documents to generate, each of 18 lines; for validation, the
            number of problems that accuracy is measured on.
        wrong_share: for arithmetic: share of wrong results, in [0, 1].
        seed: for arithmetic: seed of the generated problems.
        weight: share of the training tokens from this source, relative to the weights of the others; each
            source then repeats at its own pace. null: all documents of all sources equally often.
        max_record: size in MiB of the largest record that is accepted; a larger one ends the run.
        max_ratio: largest accepted ratio of decompressed to compressed bytes of a file, after a first
            max_record; protects against files made to fill memory or disk.
    """

    kind: SourceKind = SourceKind.auto
    path: str | None = None
    subset: str | None = None
    data_dir: str | None = None
    split: str = "train"
    records: str | None = None
    delimiter: str | None = None
    field: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    input: str | None = None
    system: str | None = None
    chat: bool = False
    targets: Targets = Targets.auto
    markers: Markers = Markers.text
    limit: int | None = None
    documents: int = 1000
    wrong_share: float = 0.0
    seed: int = 0
    weight: float | None = None
    max_record: int = MAX_RECORD
    max_ratio: float = MAX_RATIO

    def validate(self, where: str) -> None:
        """Raise UserError for values that make no sense; `where` names the config key."""
        if self.kind not in _GENERATED and not self.path:
            raise UserError(f"{where}.path: a source of kind {self.kind.value} needs {_wanted(self.kind)}")
        if self.kind in _GENERATED:
            if self.split not in ("train", "validation"):
                raise UserError(f"{where}.split={self.split!r}: choose train or validation")
            for key in ("path", "field", "prompt", "completion", "messages", "input", "system", "chat"):
                if getattr(self, key):
                    raise UserError(
                        f"{where}.{key}: a source of kind {self.kind.value} reads none; leave it out"
                    )
        if not self.split.strip():
            raise UserError(f"{where}.split: name a split, such as train")
        for key, kind in (("subset", SourceKind.hub), ("data_dir", SourceKind.tfds)):
            if getattr(self, key) is not None and self.kind is not kind:
                raise UserError(
                    f"{where}.{key}: only for kind={kind.value}, here it is {self.kind.value}; leave it out, "
                    f"or set kind={kind.value}"
                )
        for key, kind in (("records", SourceKind.jsonl), ("delimiter", SourceKind.csv)):
            if getattr(self, key) is not None and self.kind not in (SourceKind.auto, kind):
                raise UserError(
                    f"{where}.{key}: only for files of kind {kind.value}, here it is {self.kind.value}; "
                    "leave it out"
                )
        if self.delimiter is not None and (
            len(_TABS.get(self.delimiter, self.delimiter)) != 1
            or not self.delimiter.isascii()
            or self.delimiter in '"\r\n'
        ):
            raise UserError(
                f"{where}.delimiter={self.delimiter!r}: must be one ASCII character, such as ';', or tab"
            )
        if self.max_record < 1:
            raise UserError(f"{where}.max_record={self.max_record}: must be at least 1 (MiB)")
        if not self.max_ratio >= 1:
            raise UserError(f"{where}.max_ratio={self.max_ratio:g}: must be at least 1")
        shapes = [bool(self.field), bool(self.prompt or self.completion), bool(self.messages)]
        if sum(shapes) > 1:
            raise UserError(
                f"{where}: names keys of several layouts; keep field, or prompt and completion, or messages"
            )
        if not 0 <= self.wrong_share <= 1:
            raise UserError(f"{where}.wrong_share={self.wrong_share}: must be between 0 and 1")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{where}.limit={self.limit}: must be at least 1, or null for all")
        if self.documents < 1:
            raise UserError(f"{where}.documents={self.documents}: must be at least 1")


def _wanted(kind: SourceKind) -> str:
    if kind is SourceKind.tfds:
        return "a name or a prepared folder"
    return "a hub id" if kind is SourceKind.hub else "a file, a folder or a pattern"


def read_documents(config: SourceConfig) -> Documents:
    """The documents of a source, in a fixed order, up to its limit.

    The first 10,000 are read at once, so that most mistakes in them show before a run begins; the others
    when they are asked for.

    Raises:
        UserError: what is missing or unreadable, records without the keys, no text at all.
    """
    name = config.path or config.kind.value
    records = _records(config)
    if not len(records):
        raise UserError(f"{name}: holds no text; name other data, or leave the source out")
    asked = Shape(
        config.field,
        config.prompt,
        config.completion,
        config.messages,
        input=config.input,
        system=config.system,
        chat=config.chat,
    )
    shape = find_shape(records.keys(), asked, config.targets, name)
    marked = config.markers is Markers.tokens
    if marked and (shape.messages or shape.prompt):
        what = "conversations" if shape.messages else "prompts and completions"
        raise UserError(f"{name}: markers=tokens is for texts, but it holds {what}; leave it out")
    documents = Documents(records, shape, name=name, limit=config.limit, marked=marked)
    documents.look_ahead()
    return documents


def read_sources(sources: Mapping[str, SourceConfig]) -> dict[str, Documents]:
    """`read_documents` of each source, by its name."""
    return {name: read_documents(source) for name, source in sources.items()}


def _records(config: SourceConfig) -> Records:
    if config.kind is SourceKind.arithmetic:
        return _Generated(config.kind, arithmetic.documents(
            config.documents, split=config.split, seed=config.seed, wrong_share=config.wrong_share
        ))  # fmt: skip
    if config.kind in _GENERATED:
        works = python_docs.topics() if config.kind is SourceKind.python_docs else python_docs.docstrings()
        return _Generated(config.kind, python_docs.split_of(works, config.split))
    path, kind = config.path or "", _settled(config)
    if kind is SourceKind.tfds:
        return TfdsExamples(path, split=config.split, data_dir=config.data_dir)
    if kind is SourceKind.hub:
        return HubRows(path, subset=config.subset, split=config.split)
    if config.split != "train":
        raise UserError(f"{path}: files have no splits, and split={config.split}; leave it out")
    paths, kind = _files(path, kind)
    return _read_files(paths, kind, config)


def _read_files(paths: Sequence[Path], kind: SourceKind, config: SourceConfig) -> Records:
    limits = Limits(config.max_record, config.max_ratio)
    for key, fitting in (("records", SourceKind.jsonl), ("delimiter", SourceKind.csv)):
        if getattr(config, key) is not None and kind is not fitting:
            raise UserError(
                f"{config.path}: {key}={getattr(config, key)} is for files of kind {fitting.value}, and it "
                f"holds {kind.value}; leave it out"
            )
    if kind is SourceKind.jsonl:
        return JsonObjects(paths, limits, records=config.records)
    if kind is SourceKind.csv:
        delimiter = config.delimiter
        return CsvRows(paths, limits, delimiter=delimiter and _TABS.get(delimiter, delimiter))
    if kind is SourceKind.array_record:
        return ArrayRecords(paths)
    if kind is SourceKind.parquet:
        return ParquetFiles(paths, limits)
    return TextLines(paths, limits) if kind is SourceKind.lines else TextFiles(paths, limits)


def _settled(config: SourceConfig) -> SourceKind:
    """The kind, where a folder says it."""
    folder = Path(config.path or "").expanduser()
    if config.kind is SourceKind.auto and folder.is_dir():
        if is_prepared(folder):
            return SourceKind.tfds
        if is_saved(folder):
            return SourceKind.hub
    return config.kind


class _Generated:
    """Texts that are made here."""

    def __init__(self, kind: SourceKind, texts: Sequence[str]) -> None:
        self._kind, self._texts = kind, texts

    def __len__(self) -> int:
        return len(self._texts)

    def keys(self) -> None:
        """A text has none."""

    def read(self, number: int, keys: Sequence[str], optional: Sequence[str] = ()) -> str:
        """One of them."""
        return self._texts[number]

    def where(self, number: int) -> str:
        """What makes them, and the number."""
        return f"{self._kind.value}, document {number}"

    def fingerprint(self, keys: Sequence[str]) -> str:
        """Of all of them and their borders."""
        found = hashlib.sha256()
        for text in self._texts:
            content = text.encode()
            found.update(len(content).to_bytes(8) + content)
        return found.hexdigest()


def _files(path: str, kind: SourceKind) -> tuple[list[Path], SourceKind]:
    """The files that a path names, in the order of their names, and what they hold.

    One file, or a pattern with a kind, may end in anything; of a folder it is the files with known endings,
    but for hidden ones.
    """
    place = Path(path).expanduser()
    if place.is_file():
        files = [place]
    elif place.is_dir():
        found = sorted(f for f in place.rglob("*") if f.is_file())
        files = [f for f in found if not any(p.startswith(".") for p in f.relative_to(place).parts)]
        known = [k for k in _FILE_ENDINGS if kind in (k, SourceKind.auto)]
        files = [f for f in files if any(_ends_as(f, k) for k in known)]
        if not files:
            endings = dict.fromkeys(e for k in known for e in _FILE_ENDINGS[k] if not e.endswith(ENDINGS[1:]))
            raise UserError(
                f"{path}: holds no file that ends in {', '.join(endings)}; name files of another ending by a "
                "pattern, with kind="
            )
    elif glob.has_magic(path):
        files = sorted(Path(f) for f in glob.glob(str(place), recursive=True) if Path(f).is_file())
        if not files:
            raise UserError(f"{path}: no file matches this pattern; ** stands for folders of any depth")
    else:
        what = "data" if kind is SourceKind.auto else f"{kind.value} data"
        hint = (
            "; a dataset of the hub or of TFDS needs kind=hub or kind=tfds" if kind is SourceKind.auto else ""
        )
        hint = how_to_prepare(path) or f"; correct the path{hint}"
        raise UserError(f"{path}: no such file or folder of {what}{hint}")
    if kind is not SourceKind.auto:
        return files, kind
    kinds = dict.fromkeys(kind_of(f) for f in files)
    if None in kinds:
        odd = next(f for f in files if kind_of(f) is None)
        raise UserError(
            f"{odd}: its ending does not say what it holds; name kind=, one of "
            f"{', '.join(k.value for k in _FILE_ENDINGS)}"
        )
    if len(kinds) > 1:
        names = " and ".join(k.value for k in kinds if k)
        raise UserError(f"{path}: holds files of several kinds, {names}; name one with kind=")
    return files, next(k for k in kinds if k)


def kind_of(path: Path) -> SourceKind | None:
    """What a file holds by its ending, behind which TFDS puts the number of a shard; None for others."""
    return next((kind for kind in _FILE_ENDINGS if _ends_as(path, kind)), None)


def _ends_as(path: Path, kind: SourceKind) -> bool:
    endings = _FILE_ENDINGS[kind]
    shard = kind is SourceKind.array_record and f"{endings[0]}-" in path.name
    return shard or path.name.lower().endswith(tuple(endings))
