"""Run the `xtoken` command as `python -m xtoken_jax`."""

import sys

from xtoken_jax.cli import main

sys.exit(main())
