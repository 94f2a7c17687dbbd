"""P-KL and the hybrid losses with every merge and direction, in Python floats; arguments as in `losses`."""

import math

from reference.losses import (
    EPSILON,
    each_chunk,
    jsd,
    kl,
    log_softmax,
    mean_over,
    top_columns,
)


def divergence(teacher, student, direction, beta):
    """Of log-probabilities; beta 0 and 1 of "jsd" stand for the two KLs."""
    if direction == "jsd" and beta in (0, 1):
        direction = "reverse" if beta else "forward"
    return jsd(teacher, student, beta) if direction == "jsd" else kl(teacher, student, direction)


def split_chunk(positions, merge):
    """The positions whose distributions are merged, and those of which only the actual token counts."""
    if merge == "first":
        return positions[:1], positions[1:]
    if merge == "last":
        return positions[-1:], positions[:-1]
    return positions, []


def log_of_actual(logits, ids, positions):
    """log of the product of the probabilities that positions give to the tokens after them."""
    return sum(log_softmax(logits[p])[ids[p + 1]] for p in positions)


def scaled(logits, temperature, size):
    """One row's positions, without the columns past the tokenizer's."""
    return [[z / temperature for z in position[:size]] for position in logits]


def merged_logs(logits, ids, positions, merge):
    """Log-probabilities of one chunk, from the logits of its row."""
    merged, others = split_chunk(positions, merge)
    whole = mean_over([log_softmax(logits[p]) for p in merged])
    more = log_of_actual(logits, ids, others)
    return [x + more for x in whole]


def projection_kl(
    student_logits, teacher_logits, student_chunks, teacher_chunks, valid, rows, teacher_size,
    *, temperature, top_k, direction, merge, beta=0.5, mask=None, teacher_ids=None,
):  # fmt: skip
    """P-KL of every chunk; `rows` is W as {teacher id: weight} by student id."""
    columns = top_columns(teacher_logits, mask, teacher_size, top_k)

    def value(b, student_positions, teacher_positions):
        logits = scaled(teacher_logits[b], temperature, teacher_size)
        merged, others = split_chunk(teacher_positions, merge)
        teacher = mean_over([log_softmax([logits[p][v] for v in columns]) for p in merged])
        if merge == "mean_normalized":
            teacher = log_softmax(teacher)
        if others:
            # Over the whole vocabulary: an actual token need not be one of the columns.
            more = log_of_actual(logits, teacher_ids[b], others)
            teacher = [x + more for x in teacher]
        student_row = scaled(student_logits[b], temperature, len(rows))
        projected = []
        for p in split_chunk(student_positions, merge)[0]:
            mass = [0.0] * teacher_size
            for log_p, row in zip(log_softmax(student_row[p]), rows, strict=True):
                for j, weight in row.items():
                    mass[j] += math.exp(log_p) * weight
            projected.append([mass[v] for v in columns])
        student = mean_over(projected)
        total = sum(student) + EPSILON
        student = [math.log(q / total + EPSILON) for q in student]
        return temperature**2 * divergence(teacher, student, direction, beta)

    return each_chunk(student_chunks, teacher_chunks, valid, value)


def hybrid_terms(
    student_logits, teacher_logits, student_chunks, teacher_chunks, valid, pairs, student_size, teacher_size,
    *, temperature, uncommon_top_k, direction, merge, beta=0.5, student_ids=None, teacher_ids=None,
):  # fmt: skip
    """(common, uncommon) of every chunk; `pairs` is {teacher id: student id}."""
    uncommon_student = [i for i in range(student_size) if i not in pairs.values()]
    uncommon_teacher = [j for j in range(teacher_size) if j not in pairs]
    largest = min(len(uncommon_student), len(uncommon_teacher), uncommon_top_k)

    def value(b, student_positions, teacher_positions):
        student, teacher = (
            merged_logs(scaled(logits[b], temperature, size), None if ids is None else ids[b], at, merge)
            for logits, ids, at, size in (
                (student_logits, student_ids, student_positions, student_size),
                (teacher_logits, teacher_ids, teacher_positions, teacher_size),
            )
        )
        common = divergence(
            [teacher[j] for j in pairs], [student[i] for i in pairs.values()], direction, beta
        )
        left = sorted((math.exp(student[i]) for i in uncommon_student), reverse=True)[:largest]
        right = sorted((math.exp(teacher[j]) for j in uncommon_teacher), reverse=True)[:largest]
        uncommon = sum(abs(x - y) for x, y in zip(left, right, strict=True))
        return temperature**2 * common, temperature**2 * uncommon

    return each_chunk(student_chunks, teacher_chunks, valid, value)


def hybrid_weights(common_weight, uncommon_weight, pairs, teacher_size):
    """None stands for the share of the teacher's tokens that have a partner, or that have none."""
    share = len(pairs) / teacher_size
    return (
        share if common_weight is None else common_weight,
        1 - share if uncommon_weight is None else uncommon_weight,
    )
