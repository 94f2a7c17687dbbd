"""Likelihood matching in Python floats; arguments as in `losses`."""

import math

from reference.losses import each_chunk

FLOOR = 1e-30  # least 1 - p^(1/tau)


def log_of_next(logits, token):
    """log softmax(logits)[token], exact also where it is near 0."""
    own, top = logits[token], max(logits)
    others = [z for i, z in enumerate(logits) if i != token]
    if own == top:
        return -math.log1p(sum(math.exp(z - own) for z in others))
    return own - top - math.log(sum(math.exp(z - top) for z in logits))


def binary_kl(log_b, log_a):
    """KL of (a, 1 - a) from (b, 1 - b)."""
    log_a, log_b = min(log_a, -FLOOR), min(log_b, -FLOOR)
    a, other_a, other_b = math.exp(log_a), -math.expm1(log_a), -math.expm1(log_b)
    first = a * (log_a - log_b) if a > 0 else 0.0
    return first + other_a * math.log(other_a / other_b)


def likelihood_matching(
    student_logits, teacher_logits, student_chunks, teacher_chunks, valid, student_ids, teacher_ids,
    student_size, teacher_size, *, likelihood_temperature,
):  # fmt: skip
    """ALM of every chunk."""

    def value(b, student_positions, teacher_positions):
        logs = []
        for logits, ids, positions, size in (
            (student_logits, student_ids, student_positions, student_size),
            (teacher_logits, teacher_ids, teacher_positions, teacher_size),
        ):
            total = sum(log_of_next(logits[b][p][:size], ids[b][p + 1]) for p in positions)
            logs.append(total / likelihood_temperature)
        return binary_kl(*logs)

    return each_chunk(student_chunks, teacher_chunks, valid, value)
