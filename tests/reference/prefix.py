"""Prefix KL as loops over dicts of probabilities, in float64; nothing is shared with the package."""

import math

END = None


def events(by_student, by_teacher, roles):
    """Groups of ("s", id) and ("t", id) that are joined, as a list of sets."""
    groups = []
    edges = [(s, pieces[0]) for s, pieces in by_student.items()]
    edges += [(pieces[0], x) for x, pieces in by_teacher.items()]
    for s, x in [*edges, *roles.items()]:
        ends = {("s", s), ("t", x)}
        touching = [group for group in groups if group & ends]
        groups = [group for group in groups if not group & ends] + [ends.union(*touching)]
    return groups


def softmax(row):
    highest = max(row)
    weights = [math.exp(z - highest) for z in row]
    return [w / sum(weights) for w in weights]


def kl(teacher, student):
    """Of two dicts with the same keys, normalized over those that both sides can have."""
    both = [key for key, mass in teacher.items() if mass > 0 and student[key] > 0]
    total_t, total_s = (sum(masses[key] for key in both) for masses in (teacher, student))
    pairs = [(teacher[key] / total_t, student[key] / total_s) for key in both]
    return sum(t * math.log(t / s) for t, s in pairs)


def masses(groups, probabilities, side):
    return {i: sum(probabilities[n] for s, n in group if s == side) for i, group in enumerate(groups)}


def step(prefix, pieces_of, one, several, open_ends=()):
    """(one's, several's) events after a prefix of pieces; None where there is nothing to tell apart.

    one, several: probabilities of tokens, of the side with one token where the chunk begins and of the
    side with several after the prefix.
    """
    d = len(prefix)
    of_one = {}
    for token, pieces in pieces_of.items():
        if list(pieces[:d]) == list(prefix):
            following = pieces[d] if len(pieces) > d else END
            if any(list(pieces_of[e]) == list(prefix) and y == following for e, y in open_ends):
                following = END
            of_one[following] = of_one.get(following, 0.0) + one[token]
    if len(of_one) < 2:
        return None
    of_several = {piece: several[piece] for piece in of_one if piece is not END}
    if END in of_one:
        of_several[END] = sum(p for i, p in enumerate(several) if i not in of_several)
    return of_one, of_several


def steps(one, several, pieces_of, depth):
    """The prefixes of `several` that are prefixes of the pieces of the token `one`."""
    for d in range(1, len(several) + 1):
        if d > depth or list(pieces_of.get(one, []))[:d] != list(several[:d]):
            return
        yield list(several[:d])


def row_values(student_logits, teacher_logits, ids, chunks, tables, depth, tau, open_ends=((), ())):
    """The value of each chunk of a row.

    chunks: (number, (first, past the last) of the student's tokens, the same of the teacher's), those
    that count, in order.
    """
    by_student, by_teacher, roles, sizes = tables
    p = [softmax([z / tau for z in row[: sizes[0]]]) for row in student_logits]
    q = [softmax([z / tau for z in row[: sizes[1]]]) for row in teacher_logits]
    groups = events(by_student, by_teacher, roles)
    values = {}
    out_s, out_t = {}, {}  # place -> tokens that would have continued the chunk before it
    for number, (s0, s1), (t0, t1) in chunks:
        if s0 == 0 or t0 == 0:
            continue
        now_t = [0.0 if i in out_t.get(t0 - 1, ()) else x for i, x in enumerate(q[t0 - 1])]
        now_s = [0.0 if i in out_s.get(s0 - 1, ()) else x for i, x in enumerate(p[s0 - 1])]
        value = kl(masses(groups, now_t, "t"), masses(groups, now_s, "s"))
        student, teacher = list(ids[0][s0:s1]), list(ids[1][t0:t1])
        if len(student) == 1:
            for prefix in steps(student[0], teacher, by_student, depth):
                place = t0 + len(prefix) - 1
                found = step(prefix, by_student, p[s0 - 1], q[place], open_ends[0])
                if found:
                    value += kl(found[1], found[0])
                    out_t[place] = [piece for piece in found[0] if piece is not END]
        if len(teacher) == 1:
            for prefix in steps(teacher[0], student, by_teacher, depth):
                place = s0 + len(prefix) - 1
                found = step(prefix, by_teacher, q[t0 - 1], p[place], open_ends[1])
                if found:
                    value += kl(found[0], found[1])
                    out_s[place] = [piece for piece in found[0] if piece is not END]
        values[number] = value * tau**2
    return values
