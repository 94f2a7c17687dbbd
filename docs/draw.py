"""Draw the pictures of docs/concepts.md as SVG files, from the package's own code.

Run `python docs/draw.py` after a change; `tests/docs/test_pictures.py` compares the committed files with it.
The alignment, the rows of W and the audit are those of the quickstart's bundled tokenizers. The three losses
are computed on the small vocabularies of docs/prefix_kl.md, section 4, where every number can be checked by
hand.

The pictures are 480 units wide with letters of at least 13, so they can be read on a phone.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.alignment.spans import align_texts
from xtoken_jax.coverage.audit import ClassCoverage, audit
from xtoken_jax.coverage.token_rows import TokenRow, find_token, row_of, visible
from xtoken_jax.display.alignment_table import columns
from xtoken_jax.losses.terms.hybrid_kl import hybrid_terms
from xtoken_jax.losses.terms.projection_kl import projection_kl
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.matrix import Partition, Projection
from xtoken_jax.run.experiment import PACKAGE
from xtoken_jax.tokens.tokenizer import TokenizerPair

PICTURES = Path(__file__).parent / "pictures"
WIDTH = 480
STUDENT, TEACHER, GRAY, INK, GROUND = "#2a78b5", "#c26a00", "#9aa1a8", "#1f2328", "#fbfbfc"

# The example of docs/prefix_kl.md: distributions of the next token. Row 0 predicts the chunk `201`.
STUDENT_TOKENS, TEACHER_TOKENS = ("0", "1", "2", "20", "201", "."), ("0", "1", "2", ".")
STUDENT_ROWS = np.array([[0.1, 0.1, 0.1, 0.1, 0.4, 0.2], [1 / 6] * 6])
TEACHER_ROWS = np.array([[0.1, 0.1, 0.7, 0.1], [0.8, 0.05, 0.05, 0.1], [0.03, 0.9, 0.03, 0.04], [0.25] * 4])
CHUNK = Alignment(np.array([[-1, 0]]), np.array([[-1, 0, 0, 0]]), np.ones((1, 1), bool))
PIECES = {0: [0], 1: [1], 2: [2], 3: [2, 0], 4: [2, 0, 1], 5: [3]}


@dataclass
class Picture:
    """An SVG under construction."""

    height: float
    title: str
    parts: list[str] = field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        content: str,
        *,
        size: float = 14,
        color: str = INK,
        anchor: str = "middle",
        bold: bool = False,
        code: bool = False,
    ) -> None:
        family = "ui-monospace, Menlo, Consolas, monospace" if code else "system-ui, sans-serif"
        weight = ' font-weight="600"' if bold else ""
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}" text-anchor="{anchor}"'
            f' font-family="{family}"{weight}>{html.escape(content)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", rx: float = 3
    ) -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="{rx}" fill="{fill}"'
            f' stroke="{stroke}"/>'
        )

    def arc(self, x0: float, y0: float, x1: float, y1: float, width: float, color: str) -> None:
        middle = (x0 + x1) / 2
        self.parts.append(
            f'<path d="M{x0:.1f} {y0:.1f}C{middle:.1f} {y0:.1f} {middle:.1f} {y1:.1f} {x1:.1f} {y1:.1f}"'
            f' fill="none" stroke="{color}" stroke-width="{width:.2f}" stroke-opacity="0.6"/>'
        )

    def svg(self) -> str:
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height:g}" width="600"'
                f' role="img" aria-label="{html.escape(self.title)}">',
                f"<title>{html.escape(self.title)}</title>",
                f'<rect width="{WIDTH}" height="{self.height:g}" rx="6" fill="{GROUND}" stroke="#d5d9de"/>',
                *self.parts,
                "</svg>\n",
            ]
        )


@dataclass(frozen=True)
class Bars:
    """Pairs of bars: what each side gives to some events, in [0, 1]; None where a side is not compared."""

    title: str
    labels: tuple[str, ...]
    student: tuple[float | None, ...]
    teacher: tuple[float | None, ...]


def quickstart_pair() -> TokenizerPair:
    folder = PACKAGE / "assets" / "quickstart"
    return TokenizerPair.load(folder / "student", folder / "teacher")


def chunk_picture(pair: TokenizerPair, text: str = "12 + 189 = 201") -> Picture:
    """Both tokenizations of a text, one above the other, cut into chunks."""
    (spans,) = align_texts(pair, [text])
    found = columns(pair, spans)
    picture = Picture(150, f"The chunks of the text {text}")
    gap, letter = 5.0, (WIDTH - 108 - 5 * len(found)) / len(text)
    x = 92.0
    picture.text(84, 62, "student", anchor="end", color=STUDENT, bold=True)
    picture.text(84, 102, "teacher", anchor="end", color=TEACHER, bold=True)
    picture.text(84, 28, "chunk", anchor="end", size=13, color=INK)
    for number, column in enumerate(found):
        width = letter * sum(map(len, column.student))
        picture.box(x - 1, 36, width + 2, 82, "#e6ebf0")
        picture.text(x + width / 2, 28, str(number), size=13)
        for y, tokens, color in ((42, column.student, STUDENT), (82, column.teacher, TEACHER)):
            left = x
            for token in tokens:
                wide = width * len(token) / sum(map(len, tokens))
                picture.box(left + 1, y, wide - 2, 30, "white", color)
                picture.text(left + wide / 2, y + 20, token, code=True)
                left += wide
        x += width + gap
    several = sum(column.kind == "several" for column in found)
    picture.text(
        WIDTH / 2,
        139,
        f"{len(spans.student)} student tokens, {len(spans.teacher)} teacher tokens, {len(found)} chunks, "
        f"{several} of several tokens",
        size=13,
    )
    return picture


def row_picture(pair: TokenizerPair, tokens: tuple[str, ...] = ("201", "12", " and")) -> Picture:
    """Rows of W: student tokens on the left, the teacher tokens that they map to on the right."""
    projection = build_projection(pair)
    rows: list[TokenRow] = []
    for token in tokens:
        found = find_token(pair.student, token)
        assert found is not None, token
        rows.append(row_of(pair, projection, found))
    step = 38
    height = 44 + step * sum(len(row.pieces) for row in rows) + 14 * len(rows)
    picture = Picture(height, "Rows of W: " + ", ".join(visible(token) for token in tokens))
    picture.text(96, 26, "student token", color=STUDENT, bold=True)
    picture.text(372, 26, "teacher tokens, weights", color=TEACHER, bold=True)
    top = 44.0
    for row in rows:
        middle = top + step * len(row.pieces) / 2
        picture.box(58, middle - 15, 76, 30, "white", STUDENT)
        picture.text(96, middle + 5, visible(row.text), code=True, size=15)
        for number, (piece, weight) in enumerate(row.pieces):
            y = top + step * (number + 0.5)
            picture.arc(134, middle, 310, y, 1 + 16 * weight, STUDENT)
            picture.box(310, y - 15, 62, 30, "white", TEACHER)
            picture.text(341, y + 5, visible(piece), code=True, size=15)
            picture.text(382, y + 5, f"{weight:.4f}", anchor="start")
        top += step * len(row.pieces) + 14
    return picture


def bars_picture(title: str, groups: list[Bars], notes: list[str]) -> Picture:
    """Groups of paired bars, one below the other, with what they add up to."""
    tall = 104
    height = 38 + len(groups) * (tall + 62) + 24 * len(notes)
    picture = Picture(height, title)
    for x, name, color in ((150, "student", STUDENT), (300, "teacher", TEACHER)):
        picture.box(x - 20, 14, 14, 14, color)
        picture.text(x, 26, name, anchor="start", bold=True, color=color)
    top = 38.0
    for group in groups:
        picture.text(16, top + 18, group.title, anchor="start", bold=True)
        base, wide = top + 34 + tall, (WIDTH - 32) / len(group.labels)
        for number, label in enumerate(group.labels):
            middle = 16 + wide * (number + 0.5)
            for side, (value, color) in enumerate(
                ((group.student[number], STUDENT), (group.teacher[number], TEACHER))
            ):
                left = middle - 30 + 31 * side
                if value is None:
                    if any(one is not None for one in group.teacher):
                        picture.text(left + 14, base - 4, "-", color=GRAY)
                    continue
                picture.box(left, base - 86 * value, 28, max(86 * value, 1), color, rx=1)
                picture.text(left + 14, base - 86 * value - 4, f"{value:.2f}", size=13)
            picture.text(middle, base + 18, label, code=True, size=14)
        picture.box(16, base, WIDTH - 32, 1, GRAY, rx=0)
        top += tall + 62
    for number, note in enumerate(notes):
        picture.text(16, top + 14 + 24 * number, note, anchor="start")
    return picture


def example_w() -> Projection:
    """W of the small vocabularies: weights 0.9 times 0.1^i over a token's pieces, normalized."""
    indices = np.full((6, 3), -1, np.int32)
    weights = np.zeros((6, 3), np.float32)
    for token, pieces in PIECES.items():
        indices[token, : len(pieces)] = pieces
        share = 0.1 ** np.arange(len(pieces))
        weights[token, : len(pieces)] = share / share.sum()
    return Projection(indices, weights, len(TEACHER_TOKENS))


def merged_teacher() -> np.ndarray:
    """The teacher's side of the chunk `201` under merge=mean: exp of the mean of its log-distributions."""
    return np.exp(np.log(TEACHER_ROWS[:3]).mean(0))


def p_kl_picture() -> Picture:
    w, teacher = example_w(), merged_teacher()
    projected = np.asarray(jax.jit(w.project)(STUDENT_ROWS[:1].astype(np.float32)))[0]
    value = float(
        jax.jit(projection_kl)(np.log(STUDENT_ROWS)[None], np.log(TEACHER_ROWS)[None], CHUNK, w)[0, 0]
    )
    assert abs(value - float((teacher * np.log(teacher / projected)).sum())) < 1e-5
    groups = [
        Bars("1. The student's next token", STUDENT_TOKENS, tuple(STUDENT_ROWS[0]), (None,) * 6),
        Bars(
            "2. Times W, and the teacher (mean of 3 positions)",
            TEACHER_TOKENS,
            tuple(projected.tolist()),
            tuple(teacher.tolist()),
        ),
    ]
    return bars_picture("P-KL on the number 201", groups, [f"P-KL of this chunk (merge=mean): {value:.3f}"])


def h_kl_picture() -> Picture:
    w, teacher = example_w(), merged_teacher()
    partition = Partition.relaxed(w)
    pairs = dict(zip(partition.common_student.tolist(), partition.common_teacher.tolist(), strict=True))
    terms = jax.jit(hybrid_terms)(np.log(STUDENT_ROWS)[None], np.log(TEACHER_ROWS)[None], CHUNK, partition)
    value = float(terms.common[0, 0])
    direct = sum(teacher[t] * np.log(teacher[t] / STUDENT_ROWS[0, s]) for s, t in pairs.items())
    assert abs(value - direct) < 1e-5
    group = Bars(
        "Pairs of tokens; 20 and 201 are in no pair",
        STUDENT_TOKENS,
        tuple(STUDENT_ROWS[0]),
        tuple(float(teacher[pairs[s]]) if s in pairs else None for s in range(6)),
    )
    return bars_picture(
        "H-KL on the number 201", [group], [f"H-KL of this chunk, paired tokens: {value:.3f}"]
    )


def prefix_kl_picture() -> Picture:
    # Sums of probabilities, since compiling `prefix_kl` takes longer than all the rest; the tests compare the
    # result with the loss's float64 version.
    student = STUDENT_ROWS[0]
    number = student[[2, 3, 4]].sum()
    after_2, after_20 = student[[3, 4]].sum() / number, student[4] / student[[3, 4]].sum()
    groups = [
        Bars(
            "1. Which event comes",
            ("0", "1", "2 20 201", "."),
            (student[0], student[1], number, student[5]),
            tuple(TEACHER_ROWS[0]),
        ),
        Bars("2. After 2: a 0, or none", ("0", "no 0"), *_two(after_2, TEACHER_ROWS[1, 0])),
        Bars("3. After 2 0: a 1, or none", ("1", "no 1"), *_two(after_20, TEACHER_ROWS[2, 1])),
    ]
    values = [_kl(group) for group in groups]
    note = "Prefix KL: " + " + ".join(f"{v:.4f}" for v in values) + f" = {sum(values):.4f}"
    return bars_picture("Prefix KL on the number 201", groups, [note])


def _two(student: float, teacher: float) -> tuple[tuple[float, float], tuple[float, float]]:
    return (student, 1 - student), (teacher, 1 - teacher)


def _kl(group: Bars) -> float:
    p, q = np.array(group.student, float), np.array(group.teacher, float)
    return float((q * np.log(q / p)).sum())


def audit_picture(pair: TokenizerPair) -> Picture:
    """Classes of the student's tokens, and the share of each that the teacher has, too."""
    report = audit(pair)
    rows: list[ClassCoverage] = [c for c in report.rows if not c.name.startswith("special")]
    picture = Picture(76 + 27 * len(rows) + 30, "Audit of the quickstart's tokenizers")
    picture.text(16, 26, "class of student tokens", anchor="start", bold=True)
    picture.text(464, 26, "in both vocabularies", anchor="end", bold=True)
    for number, row in enumerate(rows):
        y = 40 + 27 * number
        color = "#b3261e" if row.critical else INK
        name = f"● {row.name}" if row.critical else row.name
        picture.text(16, y + 16, name, anchor="start", color=color, bold=row.critical)
        picture.box(226, y + 2, 120, 18, "#dde2e7", rx=1)
        if row.coverage:
            picture.box(226, y + 2, 120 * row.coverage, 18, STUDENT, rx=1)
        picture.text(464, y + 16, f"{row.common:,} of {row.size:,}", anchor="end")
    loss = {"p_kl": "P-KL", "h_kl": "H-KL"}[report.recommended_loss]
    bottom = 40 + 27 * len(rows)
    picture.text(
        16, bottom + 26, "● critical: below 90%, H-KL cannot teach it", anchor="start", color="#b3261e"
    )
    picture.text(16, bottom + 52, f"recommended: {loss}", anchor="start", bold=True)
    return picture


def pictures() -> dict[str, str]:
    """Map each file name to its SVG."""
    pair = quickstart_pair()
    drawn = {
        "chunk.svg": chunk_picture(pair),
        "row-of-w.svg": row_picture(pair),
        "p-kl.svg": p_kl_picture(),
        "h-kl.svg": h_kl_picture(),
        "prefix-kl.svg": prefix_kl_picture(),
        "audit.svg": audit_picture(pair),
    }
    return {name: picture.svg() for name, picture in drawn.items()}


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for file_name, content in pictures().items():
        (PICTURES / file_name).write_text(content, encoding="utf-8")
