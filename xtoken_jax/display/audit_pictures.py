"""Pictures of an audit: coverage by class, and rows of W as arcs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve

from xtoken_jax.coverage.audit import Audit, ClassCoverage
from xtoken_jax.coverage.token_classes import SCRIPTS, class_names
from xtoken_jax.coverage.token_rows import TokenRow, find_token, row_of, short_name, token_text, visible
from xtoken_jax.errors import UserError
from xtoken_jax.files import write_whole
from xtoken_jax.projection.matrix import Partition, Projection
from xtoken_jax.tokens.tokenizer import TokenizerPair

# matplotlib's own font has no Han, Kana, Hangul, Thai or Devanagari; one of these is taken where installed.
_FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "PingFang SC",
    "Hiragino Sans", "Microsoft YaHei", "Noto Sans Thai", "Noto Sans Devanagari", "Arial Unicode MS",
)  # fmt: skip
_KEPT, _LOST, _RELAXED, _CRITICAL = "#2a78b5", "#d9dde1", "#8fc1e3", "#c0392b"
_LONGEST = 18
_DEFAULT_CLASSES = ("2-digit numerals", "3-digit numerals", "words with leading space")
_BEYOND_ASCII = "beyond ASCII"


def draw_audit(audit: Audit, path: str | Path) -> Figure:
    """Draw coverage by class as horizontal bars, critical classes marked, and write a PNG.

    Returns:
        The figure.

    Raises:
        UserError: the file cannot be written.
    """
    rows = _grouped(audit.rows)
    figure = Figure(
        figsize=(9.5, 1.9 + 0.3 * len(rows)), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1), dpi=120
    )
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [float(c.size > 0) for c in rows], 0.7, color=_LOST, label="falls out")
    axes.barh(places, [c.relaxed / max(c.size, 1) for c in rows], 0.7, color=_RELAXED, label="relaxed (H-KL)")
    axes.barh(places, [c.common / max(c.size, 1) for c in rows], 0.7, color=_KEPT, label="strict, one to one")
    for place, c in zip(places, rows, strict=True):
        relaxed = f"  (+{c.relaxed - c.common:,} relaxed)" if c.relaxed > c.common else ""
        counts = f"{c.common:,} of {c.size:,}{relaxed}" if c.size else "the student has none"
        axes.text(1.015, place, counts, va="center", fontsize=8, color="black" if c.size else "gray")
    names = [f"● {c.name}" if c.critical else c.name for c in rows]
    axes.set_yticks(places, names, fontsize=9)
    for label, c in zip(axes.get_yticklabels(), rows, strict=True):
        if c.critical:
            label.set(color=_CRITICAL, fontweight="bold")
    axes.set(xlim=(0, 1.0), ylim=(len(rows) - 0.4, -0.6), xticks=np.linspace(0, 1, 5))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("share of the class that the teacher has too   (● critical)", fontsize=9)
    loss = {"p_kl": "P-KL", "h_kl": "H-KL"}[audit.recommended_loss]
    title = f"{short_name(audit.student)} → {short_name(audit.teacher)}: use {loss}"
    figure.suptitle(_drawable(title), fontsize=13, fontweight="bold", parse_math=False)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        ncols=3,
        fontsize=8,
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    _save(figure, path)
    return figure


def _grouped(rows: Sequence[ClassCoverage]) -> list[ClassCoverage]:
    """The classes with those of single special tokens as one."""
    special = [c for c in rows if c.name.startswith("special: ")]
    if len(special) < 2:
        return list(rows)
    counts = zip(*((c.size, c.common, c.relaxed, c.empty) for c in special), strict=True)
    size, common, relaxed, empty = map(sum, counts)
    whole = ClassCoverage("special, with a role", False, size, common, relaxed, empty, ())
    at = rows.index(special[0])
    return [*rows[:at], whole, *(c for c in rows[at:] if c not in special)]


def draw_row(
    pair: TokenizerPair,
    projection: Projection,
    tokens: Sequence[int | str] | int | str | None,
    path: str | Path,
) -> Figure:
    """Draw rows of W as arcs from student tokens to their teacher pieces, and write a PNG.

    An arc is as wide as its weight, which is written at the piece.

    Args:
        pair: the tokenizers of the projection.
        projection: W.
        tokens: student ids, or strings that are each one student token; None for two numerals, a word
            and a token beyond ASCII that fall out of the common vocabulary, where there are such.
        path: the file to write.

    Returns:
        The figure.

    Raises:
        UserError: a string that is no student token, an id past the vocabulary, a file that cannot be
            written.
    """
    if tokens is None:
        ids = _telling_rows(pair, projection)
    else:
        ids = [_id_of(pair, t) for t in ([tokens] if isinstance(tokens, int | str) else tokens)]
    if not ids:
        raise UserError("no token to draw")
    rows = [row_of(pair, projection, i) for i in ids]
    heights = [max(len(row.pieces), 1) for row in rows]
    top = sum(heights) + 0.6 * len(rows)
    figure = Figure(
        figsize=(7.5, 1.0 + 0.45 * top), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1), dpi=120
    )
    axes = figure.subplots()
    for row, height, end in zip(rows, heights, np.cumsum(np.add(heights, 0.6)), strict=True):
        _draw_arcs(axes, row, end - height - 0.6, height)
    axes.set(xlim=(-0.42, 1.55), ylim=(top - 0.95, -0.75))
    axes.axis("off")
    heading: dict[str, Any] = {"fontsize": 9, "color": "gray", "va": "bottom", "parse_math": False}
    axes.text(0, -0.55, _drawable(short_name(pair.student.name)), ha="right", **heading)
    axes.text(1, -0.55, _drawable(short_name(pair.teacher.name)), ha="left", **heading)
    figure.suptitle("where W sends a student token", fontsize=12, fontweight="bold")
    _save(figure, path)
    return figure


def _draw_arcs(axes: Axes, row: TokenRow, top: float, height: int) -> None:
    middle = top + (height - 1) / 2
    boxed: dict[str, Any] = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "#888888"}
    text: dict[str, Any] = {
        "va": "center",
        "fontsize": 11,
        "parse_math": False,
        "bbox": boxed,
        "family": _families(),
    }
    axes.text(-0.02, middle, _label(row.text), ha="right", **text)
    if not row.pieces:
        axes.text(
            1.02, middle, "nothing", ha="left", va="center", fontsize=10, color=_CRITICAL, style="italic"
        )
    for k, (piece, weight) in enumerate(row.pieces):
        end = top + k
        curve = Curve([(0, middle), (0.5, middle), (0.45, end), (1, end)], [1, 4, 4, 4])
        width = 0.8 + 9 * weight
        axes.add_patch(
            PathPatch(curve, facecolor="none", edgecolor=_KEPT, linewidth=width, alpha=0.65, capstyle="butt")
        )
        axes.text(0.86, end - 0.12, f"{weight:.3f}", ha="center", va="bottom", fontsize=8, color="#333333")
        axes.text(1.02, end, _label(piece), ha="left", **text)


def _telling_rows(pair: TokenizerPair, projection: Projection) -> list[int]:
    """A numeral of two digits, one of three, a word and a token beyond ASCII, in fonts there are.

    Of the first hundred of each that fall out of the common vocabulary, or that stay if none does,
    the one with the most pieces.
    """
    size = pair.teacher.size
    common = set(np.asarray(Partition.strict(projection, teacher_size=size).common_student).tolist())
    pieces = (np.asarray(projection.indices) >= 0).sum(1)
    fallen: dict[str, list[int]] = {name: [] for name in (*_DEFAULT_CLASSES, _BEYOND_ASCII)}
    kept: dict[str, list[int]] = {name: [] for name in fallen}
    for token_id, name in enumerate(class_names(pair.student)):
        if name in SCRIPTS:
            text = token_text(pair.student, token_id)
            name = _BEYOND_ASCII if _drawable(text) == text else name
        if name in fallen and pieces[token_id]:
            (kept if token_id in common else fallen)[name].append(token_id)
    groups = [(fallen[name] or kept[name])[:100] for name in fallen]
    telling = [max(ids, key=pieces.__getitem__) for ids in groups if ids]
    return telling or np.flatnonzero(pieces)[:4].tolist()


def _id_of(pair: TokenizerPair, token: int | str) -> int:
    if isinstance(token, str):
        found = find_token(pair.student, token)
        if found is None:
            raise UserError(f"{token!r} is no single token of the student ({pair.student.name})")
        return found
    if not 0 <= token < pair.student.size:
        raise UserError(f"token {token}: the student has ids 0 to {pair.student.size - 1}")
    return token


@cache
def _families() -> list[str]:
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return [name for name in _FONTS if name in installed]


@cache
def _glyphs() -> frozenset[int]:
    """Code points that some font of `_families` has."""
    fonts = (font_manager.get_font(font_manager.findfont(name)) for name in _families())
    return frozenset(code for font in fonts for code in font.get_charmap())


def _drawable(text: str) -> str:
    """A text with escapes for the characters that no font here has."""
    known = _glyphs()
    return "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)


def _label(text: str) -> str:
    """A token as it is drawn, cut where it is long."""
    shown = _drawable(visible(text))
    return shown if len(shown) <= _LONGEST else shown[: _LONGEST - 1] + "…"


def _save(figure: Figure, path: str | Path) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture = io.BytesIO()
        figure.savefig(picture, format=Path(path).suffix[1:] or "png")
        write_whole(Path(path), picture.getvalue())
    except (OSError, ValueError) as error:  # ValueError: an ending that is no picture's
        raise UserError(f"{path}: the picture cannot be written ({error})") from error
