"""Which kinds of student tokens survive in the common vocabulary, and so which loss to use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from xtoken_jax.coverage.token_classes import CRITICAL, class_names, sort_key
from xtoken_jax.coverage.token_rows import TokenRow, describe_row, find_token, row_of, token_text
from xtoken_jax.errors import KindError, UserError
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.matrix import Partition, Projection
from xtoken_jax.tokens.arguments import check_pair, check_texts
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

NAMED = "named by you"
EXAMPLES = 5  # tokens shown of a class


@dataclass(frozen=True)
class ClassCoverage:
    """One class of student tokens.

    Attributes:
        name: the class, see `token_classes.text_class`.
        critical: whether the choice of the loss depends on it.
        size: how many ids of the student are in it.
        common: how many of them the strict common set has (`Partition.strict`).
        relaxed: the same for H-KL's (`Partition.relaxed`).
        empty: how many have no row in W.
        missing: the first few, by id, that the strict common set does not have.
    """

    name: str
    critical: bool
    size: int
    common: int
    relaxed: int
    empty: int
    missing: tuple[TokenRow, ...]

    @property
    def coverage(self) -> float:
        """Share of the class that is in the strict common set; 1 for an empty class."""
        return self.common / self.size if self.size else 1.0


@dataclass(frozen=True)
class TextShare:
    """How much of a text is in a class, and how much of that falls out; each in tokens and in bytes.

    Attributes:
        name: the class, or "all".
        tokens, bytes: what the text has of the class.
        outside_strict, outside_strict_bytes: of them, in tokens outside the strict common set.
        outside_relaxed, outside_relaxed_bytes: the same for the relaxed set.
        empty, empty_bytes: the same for tokens with an empty row of W.
        frequent: (text, occurrences) of the tokens that fall out of the strict set most often.
    """

    name: str
    tokens: int
    bytes: int
    outside_strict: int
    outside_strict_bytes: int
    outside_relaxed: int
    outside_relaxed_bytes: int
    empty: int
    empty_bytes: int
    frequent: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Audit:
    """The coverage of a tokenizer pair and the loss that follows from it.

    Attributes:
        student, teacher: the tokenizers' names.
        classes: each id of the student is in exactly one; the critical ones are there even if empty.
        named: the tokens that the user called critical; they are members of `classes` too.
        empty_rows: student ids with no row in W, those kept in reserve included.
        sample: what a text loses, the whole first and then by class; None without a text.
        recommended_loss: "p_kl" or "h_kl".
        reason: why, in one sentence.
    """

    student: str
    teacher: str
    classes: tuple[ClassCoverage, ...]
    named: ClassCoverage | None
    empty_rows: int
    sample: tuple[TextShare, ...] | None
    recommended_loss: str
    reason: str

    def __repr__(self) -> str:
        lines = [
            f"  {c.name}: {c.common:,} of {c.size:,} common, {c.relaxed:,} in the relaxed set"
            for c in self.rows
            if c.critical
        ]
        head = f"Audit({self.student} <- {self.teacher}: {self.recommended_loss}; {self.reason}"
        return "\n".join([head, *lines]) + ")"

    @property
    def rows(self) -> tuple[ClassCoverage, ...]:
        """What there is to show: classes with tokens, critical ones in any case, and the named tokens."""
        shown = tuple(c for c in self.classes if c.size or c.critical)
        return shown if self.named is None else (*shown, self.named)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain lists and numbers, for JSON; classes have their `coverage` too."""
        found = asdict(self)
        for entry, c in zip(found["classes"], self.classes, strict=True):
            entry["coverage"] = c.coverage
        if self.named is not None:
            found["named"]["coverage"] = self.named.coverage
        return found


def audit(
    pair: TokenizerPair,
    projection: Projection | None = None,
    *,
    minimum_coverage: float = 0.9,
    critical_tokens: Sequence[str] = (),
    critical_text: str | Sequence[str] | None = None,
    text: str | Sequence[str] | None = None,
) -> Audit:
    """Count, class by class, the student tokens that the teacher has too, and choose the loss.

    A critical class falls out when less than `minimum_coverage` of it is common: then H-KL
    would never compare those tokens one to one, and P-KL is recommended (X-Token, section 5
    and Table 8). Critical are numerals of two and three digits, single ASCII punctuation marks
    and the tokens that the caller names.

    Args:
        pair: student's and teacher's tokenizer.
        projection: its W, built here if not given.
        minimum_coverage: share in [0, 1].
        critical_tokens: strings that are each one student token.
        critical_text: a text, or several, all of whose student tokens are critical.
        text: a text, or several documents, to measure how much of it falls out.

    Raises:
        UserError: a critical token that the student splits, a text without tokens, a share outside
            [0, 1], a W of another size.
    """
    check_pair(pair)
    if isinstance(minimum_coverage, bool) or not isinstance(minimum_coverage, int | float):
        raise KindError(f"minimum_coverage={minimum_coverage!r}: a number between 0 and 1 is needed")
    critical_tokens = check_texts("critical_tokens", critical_tokens)
    for name, value in (("critical_text", critical_text), ("text", text)):
        if value is not None and not isinstance(value, str):
            check_texts(name, value)
    if projection is not None and not isinstance(projection, Projection):
        raise KindError(f"projection: {type(projection).__name__}, but a Projection is needed")
    if not 0 <= minimum_coverage <= 1:
        raise UserError(f"minimum_coverage={minimum_coverage}: must be between 0 and 1")
    student = pair.student
    projection = build_projection(pair) if projection is None else projection
    if projection.student_size != student.size:
        raise UserError(
            f"the projection has {projection.student_size:,} rows, the student {student.size:,} tokens; "
            "build it for this pair"
        )
    rows = _Rows(pair, projection)
    named_ids = {_critical_id(student, token) for token in critical_tokens}
    if critical_text is not None:
        named_ids.update(_encode(student, critical_text, "critical_text").tolist())
    named_ids -= student.token_bytes.unused  # a text may spell one, no model was trained on it
    names = class_names(student)
    members: dict[str, list[int]] = {name: [] for name in CRITICAL}
    for token_id, name in enumerate(names):
        members.setdefault(name, []).append(token_id)
    classes = tuple(
        rows.coverage(name, name in CRITICAL, members[name]) for name in sorted(members, key=sort_key)
    )
    named = rows.coverage(NAMED, True, sorted(named_ids)) if named_ids else None
    sample = None
    if text is not None:
        sample = _sample(rows, names, named_ids, _encode(student, text, "text"))
    loss, reason = _recommend([c for c in (*classes, named) if c and c.critical], minimum_coverage, sample)
    return Audit(student.name, pair.teacher.name, classes, named, int(rows.empty.sum()), sample, loss, reason)


class _Rows:
    """What becomes of each student token, as bool [V_s] arrays."""

    def __init__(self, pair: TokenizerPair, projection: Projection) -> None:
        self.pair, self.projection = pair, projection
        self.strict, self.relaxed = np.zeros((2, projection.student_size), bool)
        size = pair.teacher.size
        self.strict[np.asarray(Partition.strict(projection, teacher_size=size).common_student)] = True
        self.relaxed[np.asarray(Partition.relaxed(projection, teacher_size=size).common_student)] = True
        self.empty = np.asarray(projection.indices)[:, 0] < 0

    def coverage(self, name: str, critical: bool, ids: list[int]) -> ClassCoverage:
        at = np.asarray(ids, np.int64)
        missing = at[~self.strict[at]][:EXAMPLES].tolist()
        return ClassCoverage(
            name,
            critical,
            len(ids),
            int(self.strict[at].sum()),
            int(self.relaxed[at].sum()),
            int(self.empty[at].sum()),
            tuple(row_of(self.pair, self.projection, i) for i in missing),
        )


def _recommend(
    critical: list[ClassCoverage], minimum: float, sample: tuple[TextShare, ...] | None
) -> tuple[str, str]:
    """The loss, and why."""
    shares = {s.name: s.tokens / sample[0].tokens for s in sample} if sample else None

    def counted(c: ClassCoverage) -> str:
        share = f", {shares.get(c.name, 0.0):.1%} of the text" if shares is not None else ""
        return f"{c.name} ({c.common} of {c.size} common{share})"

    none = [c.name for c in critical if not c.size]
    absent = f"; the student has no {_listed(none, 'or')}, so nothing is lost there" if none else ""
    fallen = [c for c in critical if c.coverage < minimum]
    if fallen:
        missing = [row for c in fallen for row in c.missing if row.pieces]
        example = f", such as {describe_row(max(missing, key=lambda r: len(r.pieces)))}" if missing else ""
        nowhere = sum(c.empty for c in fallen)
        lost = f" ({nowhere} of them have none, and no loss teaches these)" if nowhere else ""
        return "p_kl", (
            f"{_listed([counted(c) for c in fallen], 'and')} fall out of the common vocabulary, and H-KL "
            "would push them down at every step; P-KL sends each to the teacher's pieces"
            f"{example}{lost}{absent}"
        )
    kept = _listed([counted(c) for c in critical if c.size], "and")
    start = f"{kept} stay in the common vocabulary" if kept else "no critical token falls out"
    return "h_kl", f"{start}, so that H-KL can compare each with the teacher's own{absent}"


def _listed(parts: Sequence[str], word: str) -> str:
    return f" {word} ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:])))


def _sample(rows: _Rows, names: list[str], named: set[int], ids: np.ndarray) -> tuple[TextShare, ...]:
    """The share of "all" and of each class that the text has, then of the named tokens."""
    lengths = rows.pair.student.token_bytes.lengths

    def share(name: str, at: np.ndarray) -> TextShare:
        masks = (np.ones_like(at, bool), ~rows.strict[at], ~rows.relaxed[at], rows.empty[at])
        tokens, strict, relaxed, empty = (int(mask.sum()) for mask in masks)
        whole, strict_bytes, relaxed_bytes, empty_bytes = (int(lengths[at[mask]].sum()) for mask in masks)
        fallen = Counter(at[masks[1]].tolist()).most_common(EXAMPLES)
        frequent = tuple((token_text(rows.pair.student, i), n) for i, n in fallen)
        return TextShare(
            name, tokens, whole, strict, strict_bytes, relaxed, relaxed_bytes, empty, empty_bytes, frequent
        )

    by_class: dict[str, set[int]] = {}
    for token_id in set(ids.tolist()):
        by_class.setdefault(names[token_id], set()).add(token_id)
    if named:
        by_class[NAMED] = named
    order = sorted(by_class.keys() - {NAMED}, key=sort_key) + [NAMED] * bool(named)
    parts = [share(name, ids[np.isin(ids, list(by_class[name]))]) for name in order]
    return share("all", ids), *parts


def _encode(student: Tokenizer, text: str | Sequence[str], what: str) -> np.ndarray:
    texts = [text] if isinstance(text, str) else list(text)
    ids = np.concatenate([np.zeros(0, np.int32), *student.encode_batch(texts)])
    if not len(ids):
        raise UserError(f"{what}: holds no text")
    return ids.astype(np.int64)


def _critical_id(student: Tokenizer, token: str) -> int:
    found = find_token(student, token)
    if found is None:
        pieces = " + ".join(f"{token_text(student, i)!r}" for i in student.encode(token).tolist())
        raise UserError(
            f"critical token {token!r}: the student ({student.name}) has no single token for it, it reads "
            f"{pieces or 'nothing'}; name those pieces, or give the text as a critical text"
        )
    return found
