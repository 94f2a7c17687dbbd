"""Old import paths of moved modules."""

import importlib
import sys

import pytest

from xtoken_jax._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_gives_the_moved_module_and_a_warning(old, monkeypatch):
    monkeypatch.delitem(sys.modules, f"xtoken_jax.{old}", raising=False)
    with pytest.warns(DeprecationWarning, match=rf"xtoken_jax\.{old} is now xtoken_jax\.{MOVED[old]}$"):
        module = importlib.import_module(f"xtoken_jax.{old}")
    new = importlib.import_module(f"xtoken_jax.{MOVED[old]}")
    assert module is new
    assert new.__spec__.name == new.__name__ == f"xtoken_jax.{MOVED[old]}"


def test_a_name_that_never_existed_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"xtoken_jax\.hosts_of"):
        importlib.import_module("xtoken_jax.hosts_of")
