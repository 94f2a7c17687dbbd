"""W as lists, built, multiplied with and read from in loops of Python floats."""

import math


def build(
    student_table,
    teacher_table,
    roles,
    to_teacher,
    to_student=None,
    *,
    entries=4,
    reverse=False,
    scale_trick=False,
    similar=(),
):
    """Rows of W, as lists of (teacher id, weight) by falling weight.

    Args:
        student_table, teacher_table: the bytes of every id, None for those that are no text.
        roles: student id -> teacher id of the same role.
        to_teacher, to_student: bytes -> ids.
        similar: (student id, teacher id, weight) of special tokens spelled alike.
    """
    rows, fixed = [{} for _ in student_table], set(roles)
    for i, j in roles.items():
        rows[i] = {j: 1.0}
    for i, content in enumerate(student_table):
        if i in fixed or not content:
            continue
        same = [j for j, other in enumerate(teacher_table) if other == content]
        if same:
            rows[i] = {min(same): 1.0}
            fixed.add(i)
        else:
            for j, weight in pieces(to_teacher(content), entries):
                rows[i][j] = rows[i].get(j, 0.0) + weight
    if reverse:
        for j, content in enumerate(teacher_table):
            for i, weight in pieces(to_student(content), entries) if content else ():
                if i not in fixed:
                    rows[i][j] = rows[i].get(j, 0.0) + weight
    for i, j, weight in similar:
        if i not in fixed:
            rows[i][j] = rows[i].get(j, 0.0) + weight
    return [
        list(row.items()) if i in fixed else finish(row, entries, scale_trick) for i, row in enumerate(rows)
    ]


def pieces(ids, entries):
    """The first pieces and their weights 0.9, 0.09, ..., which sum to 1."""
    ids = ids[:entries]
    total = sum(0.9 * 0.1**place for place in range(len(ids)))
    return [(j, 0.9 * 0.1**place / total) for place, j in enumerate(ids)]


def finish(row, entries, scale_trick):
    """The heaviest entries, normalized; of equal ones the lowest id."""
    kept = sorted(row.items(), key=lambda item: (-round(item[1], 12), item[0]))[:entries]
    if scale_trick and len(kept) == entries:
        kept[-1] = (kept[-1][0], 0.2)
        kept.sort(key=lambda item: -round(item[1], 12))
    total = sum(weight for _, weight in kept)
    return [(j, weight / total) for j, weight in kept]


def project(vector, rows, columns):
    """A vector over the student's tokens times W, at some columns; rows as `build` gives them."""
    whole = {}
    for mass, row in zip(vector, rows, strict=True):
        for j, weight in row:
            whole[j] = whole.get(j, 0.0) + float(mass) * weight
    return [whole.get(j, 0.0) for j in columns]


def project_back(vector, rows):
    """A vector over the teacher's tokens times the transposed W."""
    return [sum(float(vector[j]) * weight for j, weight in row if j < len(vector)) for row in rows]


def softmax_rows(logits, indices):
    """Rows of W from log-weights, over the entries that have an index."""
    rows = []
    for row, ids in zip(logits, indices, strict=True):
        kept = [(int(j), float(logit)) for j, logit in zip(ids, row, strict=True) if j >= 0]
        top = max((logit for _, logit in kept), default=0.0)
        raw = [(j, math.exp(logit - top)) for j, logit in kept]
        total = sum(weight for _, weight in raw)
        rows.append([(j, weight / total) for j, weight in raw])
    return rows


def characters(content):
    """A byte string in characters; bytes that belong to none stand alone."""
    parts, place = [], 0
    while place < len(content):
        for length in (1, 2, 3, 4):
            try:
                content[place : place + length].decode()
            except UnicodeDecodeError:
                continue
            break
        else:
            length = 1
        parts.append(content[place : place + length])
        place += length
    return parts


def merge(parts, merges):
    """Byte-pair merges: the earliest merge that applies, leftmost first, until none does."""
    parts = list(parts)
    while True:
        for left, right in merges:
            hits = [i for i in range(len(parts) - 1) if parts[i] == left and parts[i + 1] == right]
            if hits:
                parts[hits[0] : hits[0] + 2] = [left + right]
                break
        else:
            return parts


def strict_pairs(rows):
    """{teacher id: student id}: rows of one entry of weight 1, the lowest student id first."""
    pairs = {}
    for i, row in enumerate(rows):
        if len(row) == 1 and next(iter(row.values())) == 1.0:
            pairs.setdefault(next(iter(row)), i)
    return pairs


def relaxed_pairs(rows, threshold=0.6):
    """{teacher id: student id}: the top entry of a row, if it reaches the threshold; the heaviest wins."""
    pairs = {}
    for i, row in enumerate(rows):
        if not row:
            continue
        weight = max(row.values())
        j = min(j for j in row if row[j] == weight)
        if weight >= threshold and (j not in pairs or weight > max(rows[pairs[j]].values())):
            pairs[j] = i
    return pairs
