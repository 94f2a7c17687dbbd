"""The config groups of `configs/` and their options, from the names of the files."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# A wheel carries the configs inside the package; a checkout has them beside it.
CONFIG_FOLDER = next(f for f in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if f.is_dir())


def groups() -> list[str]:
    """Names of the config groups, such as loss and student."""
    return sorted(f.name for f in CONFIG_FOLDER.iterdir() if f.is_dir())


def options_of(group: str) -> list[str]:
    """The names that a config group offers."""
    return sorted(f.stem for f in (CONFIG_FOLDER / group).glob("*.yaml"))
