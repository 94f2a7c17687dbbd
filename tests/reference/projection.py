"""The two-pass W as a list of {teacher id: weight}, and the partitions read from it."""


def two_pass(student_table, teacher_table, student_roles, teacher_roles, retokenize, entries=4):
    """Rows of W.

    Args:
        student_table, teacher_table: the bytes of every id, None for special tokens.
        student_roles, teacher_roles: role -> id.
        retokenize: bytes -> teacher ids.
    """
    rows = []
    for content in student_table:
        row = {}
        if content:
            same = [j for j, other in enumerate(teacher_table) if other == content]
            if same:
                row[min(same)] = 1.0
            else:
                for place, piece in enumerate(retokenize(content)[:entries]):
                    row[piece] = row.get(piece, 0.0) + 0.9 * 0.1**place
                total = sum(row.values())
                row = {piece: weight / total for piece, weight in row.items()}
        rows.append(row)
    for role, i in student_roles.items():
        if role in teacher_roles:
            rows[i] = {teacher_roles[role]: 1.0}
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
