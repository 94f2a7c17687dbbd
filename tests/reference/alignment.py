"""Chunks of two encodings, by their end offsets."""


def chunks(student_pieces, teacher_pieces):
    """Chunk ids of the tokens on both sides, from the byte string of each token.

    Both sides spell the same text. Where their end offsets meet, a chunk ends.
    """
    student_ends, teacher_ends = ends(student_pieces), ends(teacher_pieces)
    meeting = [e for e in student_ends if e in set(teacher_ends)]
    sides = []
    for side in (student_ends, teacher_ends):
        ids = []
        for end in side:
            chunk = 0
            while meeting[chunk] < end:
                chunk += 1
            ids.append(chunk)
        sides.append(ids)
    return sides[0], sides[1], len(meeting)


def ends(pieces):
    total, out = 0, []
    for piece in pieces:
        total += len(piece)
        out.append(total)
    return out
