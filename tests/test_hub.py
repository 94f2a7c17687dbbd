"""Which names reach the hub, and what a user reads when nothing is there."""

import sys
from pathlib import Path

import pytest

from xtoken_jax.errors import UserError
from xtoken_jax.hub import resolve_folder


@pytest.fixture
def hub(monkeypatch):
    """Records what was asked of the hub and answers with a folder."""
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return "/cache/snapshot"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_a_folder_is_itself(tmp_path, monkeypatch, hub):
    assert resolve_folder(tmp_path) == tmp_path
    assert resolve_folder(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("~/org") == tmp_path / "org"
    assert hub == []


@pytest.mark.parametrize(
    "text", ["/no/such", "./no/such", "../no", "~/no-such", "no-such", "a/b/c", "a/b/", "a/", "a/.b", "a b/c"]
)
def test_what_looks_like_a_path_never_reaches_the_hub(text, hub):
    with pytest.raises(UserError, match="no such folder") as caught:
        resolve_folder(text)
    assert text in str(caught.value)
    assert hub == []


def test_a_path_object_never_reaches_the_hub(hub):
    with pytest.raises(UserError, match="no such folder: org/name"):
        resolve_folder(Path("org/name"))
    assert hub == []


def test_a_file_or_nothing_is_refused(tmp_path, hub):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        resolve_folder(tmp_path / "file")
    with pytest.raises(UserError, match="empty"):
        resolve_folder("")
    assert hub == []


def test_a_hub_id_is_fetched_without_pickles(hub):
    assert resolve_folder("some-org/Model-1.5B") == Path("/cache/snapshot")
    [(name, patterns)] = hub
    assert name == "some-org/Model-1.5B"
    assert "*.safetensors" in patterns
    assert not any(pattern.endswith((".bin", ".pt", ".py")) or pattern == "*" for pattern in patterns)


def test_offline_is_one_line(monkeypatch):
    def offline(name, allow_patterns):
        raise ConnectionError("cannot reach the host\nwith a long tail")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match=r"org/name.*cannot reach the host") as caught:
        resolve_folder("org/name")
    assert "\n" not in str(caught.value)


def test_the_client_is_not_imported_for_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it now fails
    assert resolve_folder(tmp_path) == tmp_path
