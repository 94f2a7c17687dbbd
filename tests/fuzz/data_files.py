"""Fuzzers of data: JSON, CSV, lines and texts, compressed files, Parquet, ArrayRecord, TFDS and the hub."""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import os
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter

from fuzz.frame import Parser
from fuzz.mutations import odd_document, spoil_json, spoil_presence, spoiled_bytes, spoiled_value
from xtoken_jax.data.formats import record_files
from xtoken_jax.data.formats.jsonl import JsonObjects
from xtoken_jax.data.formats.limits import Limits
from xtoken_jax.data.sources import SourceConfig, SourceKind, read_documents

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2, {"c": None}]}}}
MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "1 + 2, \u2028 é"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 1},
    {"role": "assistant", "content": "3\n", "weight": 0},
]
RECORDS = [{"messages": MESSAGES, "tools": [CALL], "system": None, "n": 1.5, "images": []} for _ in range(3)]
PLAIN = [
    {"role": "user", "content": "1 + 2, \u2028 é"},
    {"role": "assistant", "content": "3"},
]
TEXT = "one\r\n\n two é\u2028\nthree".encode()
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
VARIANTS = 40  # of Parquet and ArrayRecord files
PACKS = {"gz": gzip.compress, "zst": zstandard.compress, "bz2": bz2.compress, "xz": lzma.compress}


def _read(folder: Path, name: str, **options: object) -> None:
    """The first and the last documents of a source, their places, and the digest."""
    os.environ["XTOKEN_CACHE"] = str(folder / "cache")
    os.environ["HF_HUB_OFFLINE"] = "1"
    documents = read_documents(SourceConfig(path=str(folder / name), **options))  # type: ignore[arg-type]
    for number in {*range(len(documents))[:20], *range(len(documents))[-20:]}:
        repr(documents[number])
        documents.where(number)
    repr(documents.digest)


def _write(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _csv(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text", "more"])
    writer.writerows([[n, f'a "quoted"{delimiter}\r\nfield {n}', "é\u2028"] for n in range(4)])
    return out.getvalue().encode()


def _spoil_text(rng: random.Random, content: bytes) -> bytes:
    """Spoil bytes one to three times, mostly at characters that mean something; or put in another text."""
    if rng.random() < 0.1:
        return odd_document(rng, content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        if rng.random() < 0.5:
            content = spoiled_bytes(rng, content)
        else:
            where = rng.randrange(len(content) + 1)
            odd = rng.choice(
                (
                    b'"', b'""', b"\n", b"\r", b"\r\n", b",", b"\t", b"\0", b"\\", b"{", b"]", b"\xff",
                    b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"NaN", rb"\ud800", b" " * 3000, b"\n" * 300,
                )
            )  # fmt: skip
            content = content[:where] + odd + content[where:]
    return content


def _spoil_records(rng: random.Random, content: bytes) -> bytes:
    """Change values of one record in JSON Lines, or its bytes."""
    lines = content.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    if rng.random() < 0.3:
        return _spoil_text(rng, content)
    lines[number] = json.dumps(spoiled_value(rng, json.loads(lines[number]))).encode() + b"\n"
    return b"".join(lines)


def _parser(
    name: str,
    file: str,
    content: bytes,
    spoil: Callable[[random.Random, bytes], bytes] = _spoil_text,
    **options: object,
) -> Parser:
    """A fuzzer of one file."""

    def change(rng: random.Random, folder: Path) -> None:
        path = folder / file
        if rng.random() < 0.02:
            spoil_presence(rng, path)
        else:
            path.write_bytes(spoil(rng, path.read_bytes()))

    return Parser(name, partial(_write, {file: content}), change, partial(_read, name=file, **options))


def _packed(ending: str) -> Parser:
    pack = PACKS[ending]

    def spoil(rng: random.Random, content: bytes) -> bytes:
        kind = rng.random()
        if kind < 0.4:
            return spoiled_bytes(rng, content)
        if kind < 0.6:  # small, and large when it is decompressed
            inner = rng.choice((b" ", b"\n", b"\0", b"[", b'{"text": "x"}\n', b'"')) * (1 << 20)
            return pack(rng.choice((b"", b'{"text": "', b"[")) + inner) * rng.choice((1, 70))
        if kind < 0.7:
            return rng.choice(
                (content * 2, content + b"\0" * 99, content + b"x", b"\0" * 64, content[:5] * 300)
            )
        return pack(_spoil_records(rng, LINES.encode()))

    return _parser(f"data_{ending}", f"a.jsonl.{ending}", pack(LINES.encode()), spoil)


def _spoil_document(rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.5:
        spoil_json(rng, folder / "a.json")
    else:
        path = folder / "a.json"
        path.write_bytes(_spoil_text(rng, path.read_bytes()))


def _json_list(key: str | None) -> Parser:
    content = {"version": 1, "notes": {"x": ["]", "\\"]}, "data": RECORDS} if key else RECORDS
    name = "data_json_object" if key else "data_json_list"
    written = {"a.json": json.dumps(content, indent=1).encode()}
    return Parser(name, partial(_write, written), _spoil_document, partial(_read, name="a.json", records=key))


def _columns(rng: random.Random) -> dict[str, pa.Array]:
    """Columns of other types, or of strings that are not UTF-8."""
    raw = pa.array([rng.randbytes(rng.randrange(6)) for _ in range(9)], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    messages = pa.StructArray.from_arrays([pa.array(["user"] * 9), strings], ["role", "content"])
    others = [None] * 9, [1.5] * 9, [[1]] * 9, [{"a": 1}] * 9, [b"x"] * 9
    return rng.choice(
        (
            {"text": strings}, {"text": pa.DictionaryArray.from_arrays(pa.array(range(9)), strings)}, {},
            {"messages": pa.ListArray.from_arrays(range(10), messages)},
            {"text": strings, "messages": strings},
            {"text": pa.array(rng.choice(others))},
        )
    )  # fmt: skip


def _write_parquet(folder: Path) -> None:
    table = pa.table({"messages": [PLAIN] * 9, "system": ["x"] * 9, "n": [1] * 9})
    pq.write_table(table, folder / "a.parquet", row_group_size=4)
    rng = random.Random(0)
    for number in range(VARIANTS):
        pq.write_table(
            pa.table(_columns(rng)), folder / f"{number}.variant", use_dictionary=rng.random() < 0.5
        )


def _write_array_record(folder: Path) -> None:
    rng = random.Random(0)
    for number in range(-1, VARIANTS):
        content = LINES.encode() if number < 0 else _spoil_records(rng, LINES.encode())
        name = "a.array_record" if number < 0 else f"{number}.variant"
        writer = ArrayRecordWriter(str(folder / name), "group_size:1")
        for record in content.splitlines():
            writer.write(record)
        writer.close()


def _spoil_or_replace(rng: random.Random, folder: Path, name: str) -> None:
    """Change some bytes of a file, or take one of its variants. Writers start threads, which no fork "
    "survives."""
    if rng.random() < 0.6:
        (folder / name).write_bytes(spoiled_bytes(rng, (folder / name).read_bytes()))
    else:
        (folder / f"{rng.randrange(VARIANTS)}.variant").rename(folder / name)


def _write_tfds(folder: Path) -> None:
    logging.getLogger("absl").setLevel(logging.ERROR)

    class Notes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        url_infos = None  # else TFDS looks for them next to this module

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for number in range(3):
                yield number, {"text": f"text {number}"}

    tfds.disable_progress_bar()
    Notes(data_dir=folder, file_format="array_record").download_and_prepare()


def _spoil_tfds(rng: random.Random, folder: Path) -> None:
    version = folder / "notes" / "1.0.0"
    path = rng.choice(sorted(version.glob("*.json")) * 2 + sorted(version.glob("*.array_record*")))
    if path.suffix == ".json":
        spoil_json(rng, path)
    else:
        path.write_bytes(spoiled_bytes(rng, path.read_bytes()))


def _write_hub(folder: Path) -> None:
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "messages": [PLAIN] * 2})
    rows.save_to_disk(folder / "saved")


def _spoil_hub(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted((folder / "saved").glob("*.json")))
    spoil_json(rng, path)


def _offsets(folder: Path) -> JsonObjects:
    os.environ["XTOKEN_CACHE"] = str(folder / "cache")
    record_files._KEPT = 0
    return JsonObjects([folder / "a.jsonl"], Limits())


def _write_offsets(folder: Path) -> None:
    (folder / "a.jsonl").write_text(LINES)


def _spoil_offsets(rng: random.Random, folder: Path) -> None:
    (folder / "seed").write_text(str(rng.random()))


def _read_offsets(folder: Path) -> None:
    """Objects through offsets that were kept and then changed; the name of their file differs by case."""
    _offsets(folder)
    rng = random.Random((folder / "seed").read_text())
    (kept,) = (folder / "cache" / "data").glob("*.npy")
    kept.write_bytes(spoiled_bytes(rng, kept.read_bytes()))
    objects = _offsets(folder)
    for number in range(min(len(objects), 10)):
        objects.read(number, ())


PARSERS = [
    _parser("data_jsonl", "a.jsonl", LINES.encode(), _spoil_records),
    _json_list(None),
    _json_list("data"),
    _parser("data_csv", "a.csv", _csv(",")),
    _parser("data_tsv", "a.tsv", _csv("\t")),
    _parser("data_lines", "a.txt", TEXT, kind=SourceKind.lines),
    _parser("data_text", "a.txt", TEXT),
    *map(_packed, PACKS),
    *(
        Parser(f"data_{name}", write, partial(_spoil_or_replace, name=file), partial(_read, name=file))
        for name, file, write in (
            ("parquet", "a.parquet", _write_parquet),
            ("array_record", "a.array_record", _write_array_record),
        )
    ),
    Parser("data_tfds", _write_tfds, _spoil_tfds, partial(_read, name="notes/1.0.0")),
    Parser("data_hub", _write_hub, _spoil_hub, partial(_read, name="saved", field="text")),
    Parser("data_offsets", _write_offsets, _spoil_offsets, _read_offsets),
]
