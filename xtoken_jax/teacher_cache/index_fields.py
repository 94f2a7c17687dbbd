"""Types, ranges and agreement of what the index of a teacher cache says, checked before shards are opened."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

from xtoken_jax.errors import UserError
from xtoken_jax.files.fields import (
    FLAG,
    OBJECT,
    TEXT,
    Check,
    check_fields,
    listing,
    mapping,
    number,
    one_of,
    optional,
    shown,
    whole,
)
from xtoken_jax.teacher_cache.shards import DTYPES

_REMEDY = "make the cache again with xtoken cache-teacher"
_MAX_TOKENS = 2**23  # of a vocabulary
_MAX_SHARDS = 100_000
_BYTES = whole(0, 2**50)
_CHECKSUM = whole(0, 2**32 - 1)
_PLACE = listing(whole(0, 2**40), 2, least=2)

_INDEX: dict[str, Check] = {
    "format": whole(1, 1),
    "made_of": mapping(TEXT),
    "keep": OBJECT,
    "size": whole(1, _MAX_TOKENS),
    "sources": listing(TEXT, 100_000),
    "width": whole(0, _MAX_TOKENS),
    "shards": listing(OBJECT, _MAX_SHARDS),
    "complete": FLAG,
    "figures": mapping(optional(number(-1e30, 1e30))),
    "held_out": mapping(TEXT),
    "names": mapping(TEXT),
}
_KEEP = {
    "top_k": optional(whole(1, _MAX_TOKENS)),
    "top_p": number(0, 1),
    "dtype": one_of(*DTYPES),
    "temperatures": listing(number(1e-6, 1e6), 100, least=1),
}
_SHARD = {
    "file": Check(
        "a name such as shard-00000.safetensors",
        lambda v: isinstance(v, str) and re.fullmatch(r"shard-\d{5,9}\.safetensors", v) is not None,
    ),
    "bytes": _BYTES,
    "crc32": _CHECKSUM,
    "tables_crc32": _CHECKSUM,
    "first": _PLACE,
    "next": _PLACE,
    "parts": _BYTES,
    "tokens": _BYTES,
    "raw_bytes": _BYTES,
    "lost": OBJECT,
}
_LOST = {
    "tokens": _BYTES,
    "labels": whole(-_MAX_SHARDS, 2**50),
    "found": _BYTES,
    "label": number(-1e30, 1e30),
    "mass": OBJECT,
    "divergence": OBJECT,
}
_BINS = {
    "sum": number(0, 1e30),
    "bins": Check(
        "an object of counts by number",
        lambda v: (
            isinstance(v, dict)
            and all(re.fullmatch(r"-?\d{1,6}", k) and _BYTES.holds(n) for k, n in v.items())
        ),
    ),
}


def check_index(content: dict[str, Any], path: Path) -> None:
    """Raise UserError for an index with other fields, or with values that do not fit each other.

    Args:
        content: of the index, `format` included.
        path: of the index.
    """
    where = f"{path}: not the index of a teacher cache"

    def check(part: Any, table: dict[str, Check], name: str = "") -> None:
        check_fields(part, table, f"{where}: {name}" if name else where, remedy=_REMEDY, complete=True)

    check(content, _INDEX)
    check(content["keep"], _KEEP, "keep")
    for place, shard in enumerate(content["shards"]):
        check(shard, _SHARD, f"shards[{place}]")
        if shard["lost"]:
            check(shard["lost"], _LOST, f"shards[{place}].lost")
            for name in ("mass", "divergence"):
                check(shard["lost"][name], _BINS, f"shards[{place}].lost.{name}")
    if fault := _disagreement(content):
        raise UserError(f"{where} ({fault}); {_REMEDY}")


def _disagreement(content: dict[str, Any]) -> str | None:
    """Return how two values of an index contradict each other, None if none do."""
    keep, shards, size, width = (content[name] for name in ("keep", "shards", "size", "width"))
    everything = keep["top_k"] is None and keep["top_p"] == 1
    # The token that comes is kept as well, where it is not among the likeliest.
    most = size if keep["top_k"] is None else min(keep["top_k"] + 1, size)
    if width > most:
        return f"width={width:,} is more than the {most:,} tokens that are kept"
    if content["complete"] and width == 0 and not everything and any(shard["tokens"] for shard in shards):
        return "width=0, but it holds tokens"
    if len({shard["file"] for shard in shards}) < len(shards):
        return "two shards have the same file"
    for one, other in itertools.pairwise(shards):
        if not one["first"] < one["next"] <= other["first"]:
            return f"{one['file']} and {other['file']} overlap or are not in order"
    for shard in shards:
        if shard["first"][0] >= len(content["sources"]):
            return (
                f"{shard['file']} begins with source {shown(shard['first'][0])} of {len(content['sources'])}"
            )
    return None
