"""`xtoken cache`: its arguments and what it does."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

TEXT = "what is kept of data files for access to any record, and what of it can go"
HELP = """\
Compressed files are kept decompressed, Parquet files in small row groups, and of large files where their
lines begin, in the folder that $XTOKEN_CACHE names (else ~/.cache/xtoken-jax). A file that changes is kept
anew and its earlier copy stays, until --clean removes what belongs to files that are gone or changed, and
what a run that was killed left unfinished. A disk that is not mounted is gone, too; where hosts share the
folder, the files are those that this host sees. A run that needs a copy makes it again, so that all of the
folder may be deleted, too, while none reads from it.

example:
  xtoken cache
  xtoken cache --clean
"""


def add_arguments(sub: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    sub.add_argument("--clean", action="store_true", help="remove what no run will read again")
    sub.add_argument("--json", action="store_true", help="print a list of {path, bytes, days, source, state}")


def run(options: argparse.Namespace, _: Console) -> None:
    """Prints what is there or, with --clean, what has been removed."""
    from xtoken_jax.cli.tokenizers import print_json
    from xtoken_jax.data.formats.derived_files import clear, copies
    from xtoken_jax.errors import printable
    from xtoken_jax.hub import cache_folder

    found = clear() if options.clean else copies()
    if options.json:
        print_json(
            [
                {
                    "path": str(copy.path),
                    "bytes": copy.size,
                    "days": round(copy.age / 86400, 2),
                    "source": None if copy.source is None else str(copy.source),
                    "state": copy.state.name,
                }
                for copy in found
            ]
        )
        return
    done = "removed from" if options.clean else "kept in"
    for copy in found:
        source = printable(str(copy.path if copy.source is None else copy.source))
        print(f"{copy.size / 1e6:10,.1f} MB  {copy.age / 86400:6,.1f} days  {source}: {copy.state.value}")
    print(f"{done} {cache_folder()}: {len(found)} files, {sum(copy.size for copy in found) / 1e6:,.1f} MB")
    useless = [copy for copy in found if copy.useless]
    if useless and not options.clean:
        size = sum(copy.size for copy in useless) / 1e6
        print(f"xtoken cache --clean removes {len(useless)} of them, {size:,.1f} MB")
