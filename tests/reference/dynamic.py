"""The paper's dynamic program over token strings, cell by cell."""


def align(student, teacher, longest):
    """(student chunks, teacher chunks, exact, score) of the best path, by the same order on ties."""
    rows, columns = len(student), len(teacher)
    best, step = {}, {}
    for i in range(rows + 1):
        for j in range(columns + 1):
            # In the order of preference: the first of the best is taken.
            ways = list(steps(student[:i], teacher[:j], longest))
            scored = [(best[i - up, j - left] + gain, (up, left, exact)) for up, left, gain, exact in ways]
            best[i, j] = max((s for s, _ in scored), default=0.0)
            step[i, j] = next((way for s, way in scored if s == best[i, j]), None)
    path, i, j = [], rows, columns
    while (i, j) != (0, 0):
        up, left, exact = step[i, j]
        path.append((i - up, i, j - left, j, exact))
        i, j = i - up, j - left
    student_chunks, teacher_chunks, flags = [-1] * rows, [-1] * columns, []
    for i, end_i, j, end_j, exact in reversed(path):
        if end_i > i and end_j > j:
            student_chunks[i:end_i] = [len(flags)] * (end_i - i)
            teacher_chunks[j:end_j] = [len(flags)] * (end_j - j)
            flags.append(exact)
    return student_chunks, teacher_chunks, flags, best[rows, columns]


def steps(student, teacher, longest):
    """(student tokens, teacher tokens, score, exact) of all that can come last."""
    if student and teacher and student[-1] and teacher[-1]:
        if student[-1] == teacher[-1]:
            yield 1, 1, 3.0, True
        for k in range(2, longest + 1):
            if joined(teacher, k) == student[-1]:
                yield 1, k, 1.5 * k, True
            if joined(student, k) == teacher[-1]:
                yield k, 1, 1.5 * k, True
        if student[-1] != teacher[-1]:
            yield 1, 1, -3.0, False
    if student:
        yield 1, 0, -1.5, False
    if teacher:
        yield 0, 1, -1.5, False


def joined(pieces, k):
    """The bytes of the last k pieces; None if there are fewer or one of them has none."""
    return b"".join(pieces[-k:]) if len(pieces) >= k and all(pieces[-k:]) else None


def score(student, teacher, student_chunks, teacher_chunks, count):
    """What a given alignment scores."""
    total = 0.0
    for chunk in range(count):
        sides = [
            [piece for piece, c in zip(pieces, chunks, strict=True) if c == chunk]
            for pieces, chunks in ((student, student_chunks), (teacher, teacher_chunks))
        ]
        longer = max(map(len, sides))
        assert min(map(len, sides)) == 1
        equal = b"".join(sides[0]) == b"".join(sides[1])
        assert equal or longer == 1
        total += (3.0 if longer == 1 else 1.5 * longer) if equal else -3.0
    return total - 1.5 * (list(student_chunks).count(-1) + list(teacher_chunks).count(-1))
