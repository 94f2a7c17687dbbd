"""`python -m xtoken_jax.cli`, which is `xtoken`."""

import sys

from xtoken_jax.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
