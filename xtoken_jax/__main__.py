"""The `xtoken` command, also as `python -m xtoken_jax`."""

import signal
import sys

_RESUMES = ("distill", "cache-teacher")  # commands that SIGTERM ends with exit code 0


def main() -> int:
    """Run the command; a signal that comes before or after its own handlers ends it at once."""
    if sys.argv[1:2] and sys.argv[1] in _RESUMES:
        from xtoken_jax.train.signals import end_at_once

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end_at_once)
    from xtoken_jax.cli.parser import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
