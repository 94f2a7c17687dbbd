"""What is kept of data files in the cache folder, and what of it goes."""

import fcntl
import gzip
import json
import os
import signal
import subprocess
import sys

import pytest

from xtoken_jax.cli.parser import main
from xtoken_jax.data.formats import record_files
from xtoken_jax.data.formats.data_file import DataFile
from xtoken_jax.data.formats.derived_files import clear, copies, keep
from xtoken_jax.data.sources import SourceConfig, read_documents

LINES = b'{"text": "one"}\n{"text": "two"}\n'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(record_files, "_KEPT", 0)  # the offsets of the lines, too
    return tmp_path / "cache" / "data"


def read(path, content=None):
    if content is not None:
        path.write_bytes(gzip.compress(content))
    return list(read_documents(SourceConfig(path=str(path))))


def states():
    return sorted((copy.state.name, copy.source.name.split("-")[0]) for copy in copies())


def current(*names):
    """The states of the texts, and of the offsets made of them."""
    return sorted(("current", source) for name in names for source in (name, f"{name}.jsonl.gz"))


def test_copies_go_with_their_files_and_those_in_use_stay(cache, tmp_path):
    for name in ("kept", "changed", "gone"):
        read(tmp_path / f"{name}.jsonl.gz", LINES)
    there = {path: path.read_bytes() for path in cache.iterdir()}
    assert states() == current("kept", "changed", "gone")
    assert clear() == []
    assert {path: path.read_bytes() for path in cache.iterdir()} == there
    read(tmp_path / "changed.jsonl.gz", LINES + LINES)
    (tmp_path / "gone.jsonl.gz").unlink()
    gone = clear()
    # of both the text and, made of it, the offsets
    assert sorted(copy.path.name.split("-")[0] for copy in gone) == ["changed", "changed", "gone", "gone"]
    assert states() == current("kept", "changed")
    assert len(list(cache.iterdir())) == 8  # each with its note
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    assert len(read(tmp_path / "kept.jsonl.gz")) == 2
    assert len(read(tmp_path / "changed.jsonl.gz")) == 4
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before


def test_nothing_else_is_touched(cache, tmp_path):
    """Other files, copies of which it is not known what they were made of, and what may be being written."""
    read(tmp_path / "a.jsonl.gz", LINES)
    (copy,) = cache.glob("a-*.jsonl")
    read(tmp_path / "a.jsonl.gz", LINES + LINES)
    copy.with_name(copy.name + ".source").unlink()
    others = [cache / "thesis.jsonl", cache / ".bashrc", cache / f".{copy.name}.abcd1234"]
    for path in others:
        path.write_text("precious")
    (cache / f"{copy.name}.folder").mkdir()
    assert [found.path for found in copies() if found.state.name == "unknown"] == [copy]
    with others[-1].open() as writing:
        fcntl.flock(writing, fcntl.LOCK_EX)
        os.utime(others[-1], (0, 0))  # slow, and not killed
        clear()
        assert all(path.exists() for path in [copy, *others, cache / f"{copy.name}.folder"])
    assert [found.path for found in clear()] == [others[-1]]  # its lock ended with the process
    assert others[0].exists()
    assert others[1].exists()


def test_what_a_killed_process_left_goes_when_the_next_copy_is_made(cache, tmp_path):
    """As the kernel does it: the lock of a process ends with it, whatever ends it."""
    program = (
        "import os, signal, sys; from pathlib import Path\n"
        "from xtoken_jax.data.formats.derived_files import keep\n"
        "from xtoken_jax.data.formats.data_file import DataFile\n"
        "def write(out):\n"
        "    out.write(b'half'); out.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
        "keep(DataFile(Path(sys.argv[1])), '.jsonl', write)"
    )
    (tmp_path / "a.txt").write_text("a")
    file = DataFile(tmp_path / "a.txt")
    killed = subprocess.run([sys.executable, "-c", program, str(file.path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = cache.iterdir()
    assert left.read_bytes() == b"half"
    assert [(copy.path, copy.state.name) for copy in copies()] == [(left, "unfinished")]
    path = keep(file, ".jsonl", lambda out: out.write(b"whole"))
    assert not left.exists()
    assert path.read_bytes() == b"whole"


def test_a_copy_that_is_being_written_is_no_leftover(cache, tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    first, second = (DataFile(tmp_path / f"{name}.txt") for name in "ab")

    def write(out):
        keep(second, ".jsonl", lambda other: other.write(b"b"))
        assert not any(copy.useless for copy in copies())
        out.write(b"a")

    assert keep(first, ".jsonl", write).read_bytes() == b"a"


def test_offsets_of_an_earlier_version_go(cache, tmp_path):
    cache.mkdir(parents=True)
    old = cache / f"a-{'0' * 16}.lines.npy"
    old.write_bytes(b"x")
    assert [(copy.path, copy.state.name) for copy in clear()] == [(old, "outdated")]
    assert not old.exists()


def test_long_names_have_copies(cache, tmp_path):
    name = "文" * 70 + ".jsonl.gz"
    assert len(read(tmp_path / name, LINES)) == 2
    assert len(copies()) == 2


def test_a_copy_gets_its_note_when_it_is_used_again(cache, tmp_path):
    read(tmp_path / "a.jsonl.gz", LINES)
    before = {path: path.read_bytes() for path in cache.iterdir()}
    for note in cache.glob("*.source"):
        note.unlink()
    read(tmp_path / "a.jsonl.gz")
    assert {path: path.read_bytes() for path in cache.iterdir()} == before


def test_a_copy_that_cannot_get_a_note_is_read_all_the_same(cache, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    file = DataFile(tmp_path / "a.txt")
    path = keep(file, ".jsonl", lambda out: out.write(b"x"))
    note = path.with_name(path.name + ".source")
    note.unlink()
    note.mkdir()
    assert keep(file, ".jsonl", pytest.fail) == path


def test_the_command(cache, tmp_path, capsys):
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"kept in {cache.parent}: 0 files, 0.0 MB\n"
    read(tmp_path / "a.jsonl.gz", LINES)
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "a.jsonl.gz") in out
    assert "--clean" not in out
    (tmp_path / "a.jsonl.gz").unlink()
    assert main(["cache"]) == 0
    assert "xtoken cache --clean removes 1 of them" in capsys.readouterr().out
    assert main(["cache", "--json"]) == 0
    assert sorted(found["state"] for found in json.loads(capsys.readouterr().out)) == ["current", "gone"]
    assert main(["cache", "--clean"]) == 0
    assert "2 files" in capsys.readouterr().out
    assert list(cache.iterdir()) == []
