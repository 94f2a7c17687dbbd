"""Losses in Python floats. Logits are nested lists or arrays [B][T][V], chunk ids [B][T] by token."""

import math

EPSILON = 1e-10


def log_softmax(z):
    top = max(z)
    total = top + math.log(sum(math.exp(x - top) for x in z))
    return [x - total for x in z]


def positions_of(row, chunk):
    """Positions that predict a token of the chunk: the one before each of its tokens."""
    return [p for p in range(len(row) - 1) if row[p + 1] == chunk]


def mean_over(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def kl(teacher, student, direction):
    """sum exp(t) (t - s), or sum exp(s) (s - t); a leading probability of 0 adds nothing."""
    lead, other = (teacher, student) if direction == "forward" else (student, teacher)
    return sum(math.exp(a) * (a - b) for a, b in zip(lead, other, strict=True) if a > -math.inf)


def each_chunk(student_chunks, teacher_chunks, valid, value):
    """[B][C] of value(b, student positions, teacher positions), None for chunks that do not count."""
    out = []
    for b, flags in enumerate(valid):
        out.append([None] * len(flags))
        for c, flag in enumerate(flags):
            student = positions_of(student_chunks[b], c)
            teacher = positions_of(teacher_chunks[b], c)
            if flag and student and teacher:
                out[b][c] = value(b, student, teacher)
    return out


def top_columns(teacher_logits, mask, size, top_k):
    """Columns by their highest logit at any real position; ties to the lowest id."""
    if top_k >= size:
        return list(range(size))
    best = [-math.inf] * size
    for b, row in enumerate(teacher_logits):
        for p, z in enumerate(row):
            if mask is None or mask[b][p]:
                best = [max(best[v], z[v]) for v in range(size)]
    return sorted(range(size), key=lambda v: (-best[v], v))[:top_k]


def projection_kl(
    student_logits, teacher_logits, student_chunks, teacher_chunks, valid, rows, teacher_size,
    *, temperature, top_k, direction, merge, mask=None,
):  # fmt: skip
    """P-KL of every chunk; `rows` is W as {teacher id: weight} by student id."""
    columns = top_columns(teacher_logits, mask, teacher_size, top_k)

    def value(b, student_positions, teacher_positions):
        teacher = mean_over(
            [log_softmax([teacher_logits[b][p][v] / temperature for v in columns]) for p in teacher_positions]
        )
        if merge == "mean_normalized":
            teacher = log_softmax(teacher)
        projected = []
        for p in student_positions:
            mass = [0.0] * teacher_size
            log_p = log_softmax([z / temperature for z in student_logits[b][p][: len(rows)]])
            for i, row in enumerate(rows):
                for j, weight in row.items():
                    mass[j] += math.exp(log_p[i]) * weight
            projected.append([mass[v] for v in columns])
        student = mean_over(projected)
        total = sum(student) + EPSILON
        student = [math.log(q / total + EPSILON) for q in student]
        return temperature**2 * kl(teacher, student, direction)

    return each_chunk(student_chunks, teacher_chunks, valid, value)


def hybrid_terms(
    student_logits, teacher_logits, student_chunks, teacher_chunks, valid, pairs, student_size, teacher_size,
    *, temperature, uncommon_top_k, direction,
):  # fmt: skip
    """(common, uncommon) of every chunk; `pairs` is {teacher id: student id}."""
    uncommon_student = [i for i in range(student_size) if i not in pairs.values()]
    uncommon_teacher = [j for j in range(teacher_size) if j not in pairs]
    largest = min(len(uncommon_student), len(uncommon_teacher), uncommon_top_k)

    def value(b, student_positions, teacher_positions):
        sides = []
        for logits, positions, size in (
            (student_logits, student_positions, student_size),
            (teacher_logits, teacher_positions, teacher_size),
        ):
            sides.append(
                mean_over([log_softmax([z / temperature for z in logits[b][p][:size]]) for p in positions])
            )
        student, teacher = sides
        common = kl([teacher[j] for j in pairs], [student[i] for i in pairs.values()], direction)
        left = sorted((math.exp(student[i]) for i in uncommon_student), reverse=True)[:largest]
        right = sorted((math.exp(teacher[j]) for j in uncommon_teacher), reverse=True)[:largest]
        uncommon = sum(abs(x - y) for x, y in zip(left, right, strict=True))
        return temperature**2 * common, temperature**2 * uncommon

    return each_chunk(student_chunks, teacher_chunks, valid, value)


def cross_entropy(logits, ids, mask):
    """Mean of -log p(next token) over the tokens that count and have a position before them."""
    values = [
        -log_softmax(list(logits[b][p]))[ids[b][p + 1]]
        for b in range(len(ids))
        for p in range(len(ids[b]) - 1)
        if mask[b][p + 1]
    ]
    return sum(values) / len(values) if values else 0.0


def mean_of(values):
    """Over the chunks of the whole batch that count."""
    counted = [v for row in values for v in row if v is not None]
    return sum(counted) / len(counted) if counted else 0.0


def dynamic_total(ce, kd):
    """The value of sg(CE / KD) KD + CE, and the factor."""
    scale = ce / kd if kd != 0 else 1.0
    return scale * kd + ce, scale


def jsd(teacher, student, beta):
    """sum beta exp(t) (t - m) + (1 - beta) exp(s) (s - m), m the logarithm of the mixture."""
    total = 0.0
    for a, b in zip(teacher, student, strict=True):
        p, q = math.exp(a), math.exp(b)
        mixture = beta * p + (1 - beta) * q
        if p > 0:
            total += beta * p * math.log(p / mixture)
        if q > 0:
            total += (1 - beta) * q * math.log(q / mixture)
    return total


def rank_l1(
    student_logits, teacher_logits, student_chunks, teacher_chunks, valid, student_size, teacher_size,
    *, temperature,
):  # fmt: skip
    """ULD of every chunk."""

    def value(b, student_positions, teacher_positions):
        sides = []
        for logits, positions, size in (
            (student_logits, student_positions, student_size),
            (teacher_logits, teacher_positions, teacher_size),
        ):
            logs = [log_softmax([z / temperature for z in logits[b][p][:size]]) for p in positions]
            sides.append(sorted((math.exp(x) for x in mean_over(logs)), reverse=True))
        longer = max(map(len, sides))
        student, teacher = (side + [0.0] * (longer - len(side)) for side in sides)
        return temperature**2 * sum(abs(x - y) for x, y in zip(student, teacher, strict=True))

    return each_chunk(student_chunks, teacher_chunks, valid, value)


def same_vocabulary_kl(
    student_logits, teacher_logits, mask, size, *, temperature, top_k, direction, beta=0.5, teacher_mask=None
):  # fmt: skip
    """[B][T - 1] divergences by position; None where the next token does not count."""
    columns = top_columns(teacher_logits, teacher_mask, size, top_k or size)

    def value(b, p):
        sides = (teacher_logits[b][p], student_logits[b][p])
        teacher, student = (log_softmax([z[v] / temperature for v in columns]) for z in sides)
        found = jsd(teacher, student, beta) if direction == "jsd" else kl(teacher, student, direction)
        return temperature**2 * found

    return [[value(b, p) if row[p + 1] else None for p in range(len(row) - 1)] for b, row in enumerate(mask)]


def teacher_scores(logits, ids, mask, size):
    """Means of log p(next token), sum p log p and max p over the tokens that count."""
    found = []
    for b in range(len(ids)):
        for p in range(len(ids[b]) - 1):
            if mask[b][p + 1]:
                log_p = log_softmax(logits[b][p][:size])
                information = sum(math.exp(x) * x for x in log_p if x > -math.inf)
                found.append([log_p[ids[b][p + 1]], information, math.exp(max(log_p))])
    return mean_over(found) if found else [0.0, 0.0, 0.0]


def combined_teachers(kds, scores, sizes, *, weights=None, sharpness=1.0, select=False, scale=False):
    """KD of several teachers and their alphas; `scores` by teacher, unless `weights` are given."""
    if select:
        best = max(range(len(kds)), key=lambda m: scores[m])
        alphas = [1.0 if m == best else 0.0 for m in range(len(kds))]
    elif weights is None:
        raw = [math.exp(sharpness * (score - max(scores))) for score in scores]
        alphas = [x / sum(raw) for x in raw]
    else:
        alphas = weights
    factors = [math.log(size) / math.log(min(sizes)) if scale else 1.0 for size in sizes]
    return sum(a * f * kd for a, f, kd in zip(alphas, factors, kds, strict=True)), alphas
