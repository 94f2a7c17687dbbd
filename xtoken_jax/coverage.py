"""Which kinds of student tokens survive in the common vocabulary, and so which loss to use."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.matrix import Partition, Projection
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

_DIGITS = frozenset(string.digits.encode())
_PUNCTUATION = frozenset(string.punctuation.encode())
_LETTERS = frozenset(string.ascii_letters.encode())


def _made_of(characters: frozenset[int], length: int | None = None) -> Callable[[bytes], bool]:
    return lambda b: bool(b) and characters.issuperset(b) and (length is None or len(b) == length)


# Name -> test of a token's bytes. The first that holds is the token's class. Of punctuation only single
# marks are critical: runs of a dozen slashes differ between any two vocabularies.
CLASSES: dict[str, Callable[[bytes], bool]] = {
    "1-digit numerals": _made_of(_DIGITS, 1),
    "2-digit numerals": _made_of(_DIGITS, 2),
    "3-digit numerals": _made_of(_DIGITS, 3),
    "longer numerals": _made_of(_DIGITS),
    "ASCII punctuation": lambda b: _made_of(_PUNCTUATION, 1)(b.removeprefix(b" ")),
    "punctuation runs": lambda b: _made_of(_PUNCTUATION)(b.removeprefix(b" ")),
    "words with leading space": lambda b: b[:1] == b" " and _made_of(_LETTERS)(b[1:]),
    "words": _made_of(_LETTERS),
    "whitespace": lambda b: not b.strip(),
    "multi-byte text": lambda b: any(c >= 0x80 for c in b),
    "other": lambda b: True,
}
CRITICAL = ("2-digit numerals", "3-digit numerals", "ASCII punctuation")


@dataclass(frozen=True)
class ClassCoverage:
    """One class of student tokens: how many there are, how many are common, some that are not."""

    name: str
    critical: bool
    size: int
    common: int
    missing_examples: tuple[str, ...]

    @property
    def coverage(self) -> float:
        """Share of the class that is in the strict common set; 1 for an empty class."""
        return self.common / self.size if self.size else 1.0


@dataclass(frozen=True)
class Audit:
    """The coverage of a tokenizer pair and the loss that follows from it."""

    classes: tuple[ClassCoverage, ...]
    empty_rows: int
    recommended_loss: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists and numbers, for JSON."""
        return asdict(self)


def audit(
    pair: TokenizerPair, projection: Projection | None = None, *, minimum_coverage: float = 0.9
) -> Audit:
    """Count, class by class, the student tokens that the teacher has too, and choose the loss.

    A critical class falls out when less than `minimum_coverage` of it is common: then H-KL
    would never compare those tokens one to one, and P-KL is recommended (X-Token, section 5).

    Args:
        pair: student's and teacher's tokenizer.
        projection: its W, built here if not given.
        minimum_coverage: share in [0, 1].
    """
    projection = build_projection(pair) if projection is None else projection
    common = set(np.asarray(Partition.strict(projection).common_student).tolist())
    members: dict[str, list[int]] = {name: [] for name in (*CLASSES, "special")}
    for token_id, content in enumerate(pair.student.token_bytes.table):
        if token_id in pair.student.token_bytes.shadowed:
            continue
        if content is not None:
            members[next(name for name, test in CLASSES.items() if test(content))].append(token_id)
        elif token_id in pair.student.token_bytes.special:
            members["special"].append(token_id)
    classes = []
    for name, ids in members.items():
        missing = [i for i in ids if i not in common]
        examples = tuple(_text(pair.student, i) for i in missing[:5])
        classes.append(ClassCoverage(name, name in CRITICAL, len(ids), len(ids) - len(missing), examples))
    fallen = [c for c in classes if c.critical and c.coverage < minimum_coverage]
    if fallen:
        listed = ", ".join(f"{c.name} ({c.common} of {c.size} common)" for c in fallen)
        loss, reason = "p_kl", f"{listed}: a critical class falls out of the common vocabulary, so project it"
    else:
        loss, reason = "h_kl", "every critical class stays in the common vocabulary, so compare it directly"
    empty = int((np.asarray(projection.indices)[:, 0] < 0).sum())
    return Audit(tuple(classes), empty, loss, reason)


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    content = tokenizer.bytes_of(token_id)
    if content is None:
        return str(tokenizer.backend.id_to_token(token_id))
    return content.decode("utf-8", errors="backslashreplace")
