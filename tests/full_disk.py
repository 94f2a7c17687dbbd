"""A disk without room."""

import contextlib
import resource


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk, for the threads that write as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
