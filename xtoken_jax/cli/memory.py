"""Too little memory, as one line that says what to make smaller."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from xtoken_jax.errors import UserError, first_line

# What decides the memory of a command.
_REMEDIES = {
    "distill": "take a smaller data.batch_size or data.student_length, a larger train.accumulate, or "
    "student.remat=full",
    "cache-teacher": "take a smaller data.batch_size or data.teacher_length",
    "evaluate": "take a smaller --batch-size or --length",
    "generate": "take a smaller --batch-size or --max-new-tokens, or shorter prompts",
}


@contextlib.contextmanager
def memory_errors(command: str) -> Iterator[None]:
    """Turn errors about memory, of the host or of a device, into a UserError.

    Args:
        command: such as evaluate.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        remedy = _REMEDIES.get(command, "use a machine with more, or smaller input")
        raise UserError(f"out of memory ({first_line(error)}); {remedy}") from error
