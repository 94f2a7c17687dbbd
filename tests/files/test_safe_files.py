"""Files that are written whole, folders that are locked, and what strangers may have planted there."""

import errno
import os
import re
import stat
import subprocess
import sys
import threading

import pytest
from full_disk import files_of_at_most

from xtoken_jax.errors import UserError
from xtoken_jax.files import write_whole
from xtoken_jax.files.folders import lock_folder, locked, refuse_links
from xtoken_jax.files.new_files import NewFile, new_folder, open_to_append, partial_of, remove_partials
from xtoken_jax.files.trust import UntrustedFileWarning, is_trusted


@pytest.fixture
def precious(tmp_path):
    """A file of the user's, which nothing may change."""
    path = tmp_path / "precious.txt"
    path.write_text("mine")
    yield path
    assert path.read_text() == "mine"


def test_a_link_is_replaced_and_never_followed(precious, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("x.json", ".x.json.partial", f".x.json.{'0' * 16}.partial"):
        (folder / name).symlink_to(precious)
    write_whole(folder / "x.json", "new")
    assert (folder / "x.json").read_text() == "new"
    assert not (folder / "x.json").is_symlink()
    with pytest.raises(OSError, match="is a link to"):
        open_to_append(folder / ".x.json.partial")


def test_names_cannot_be_guessed_and_permissions_are_those_that_are_asked_for(tmp_path):
    names = set()
    for mode in (0o600, 0o644):
        with NewFile(tmp_path / "a", mode=mode) as new:
            names.add(new.partial.name)
            assert re.fullmatch(r"\.a\.[0-9a-f]{16}\.partial", new.partial.name)
            assert partial_of(new.partial.name) == "a"
            new.write(b"x")
            new.take_place()
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    assert len(names) == 2
    assert os.listdir(tmp_path) == ["a"]


def test_leftovers_are_removed_unless_another_process_writes_them(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f".{name}.{'1' * 16}.partial").write_text("left by a process that was killed")
    (tmp_path / ".a.notes.partial").write_text("the user's")
    with NewFile(tmp_path / "a") as other:
        other.write(b"other")
        write_whole(tmp_path / "a", "mine")
        assert other.partial.exists()
        other.take_place()
    assert (tmp_path / "a").read_text() == "other"
    assert sorted(os.listdir(tmp_path)) == [".a.notes.partial", f".b.{'1' * 16}.partial", "a"]


def test_leftovers_of_killed_processes_are_removed_and_links_are_not_followed(precious, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    left = folder / f".student.{'a' * 16}.partial"
    left.mkdir()
    (left / "link").symlink_to(precious)
    (folder / f".student.{'b' * 16}.partial").symlink_to(tmp_path)
    remove_partials(folder, lambda name: name == "student")
    assert os.listdir(folder) == [f".student.{'b' * 16}.partial"]


def test_a_leftover_that_cannot_be_removed_is_an_error(tmp_path, monkeypatch):
    left = tmp_path / f".student.{'a' * 16}.partial"
    left.mkdir()

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(UserError, match=rf"^{left}: left over, and cannot be removed \(Permission denied\)"):
        remove_partials(tmp_path, lambda name: True)
    with (
        pytest.raises(UserError, match=r"left over, and cannot be removed"),
        new_folder(tmp_path / "x") as new,
    ):
        assert new.is_dir()


def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(tmp_path):
    write_whole(tmp_path / "a", "before")
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        write_whole(tmp_path / "a", "x" * 1000)
    assert (tmp_path / "a").read_text() == "before"
    assert os.listdir(tmp_path) == ["a"]


def test_many_writers_at_once_lose_nothing(tmp_path):
    """Each removes what looks left over while others write."""
    faults = []

    def write(number):
        try:
            for _ in range(30):
                write_whole(tmp_path / "a", str(number) * 10)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() in {str(n) * 10 for n in range(4)}


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("metrics.jsonl", "../precious.txt"),
        ("checkpoints", ".."),
        ("student/tokenizer.json", "/etc/hostname"),
        (".curves.png.partial", "../not/there"),
        ("a/b/c", "../../../precious.txt"),
        ("loop", "../loop/../x"),
    ],
)
def test_links_that_lead_out_are_named(link, target, precious, tmp_path):
    run = tmp_path / "run"
    path = run / link
    path.parent.mkdir(parents=True)
    path.symlink_to(target)
    with pytest.raises(UserError) as error:
        refuse_links(run)
    assert str(error.value).startswith(f"{path}: is a link to {target}, outside of {run}, ")
    assert "\n" not in str(error.value)


def test_links_within_and_above_are_accepted(tmp_path):
    real = tmp_path / "scratch" / "runs" / "one"
    (real / "checkpoints" / "40").mkdir(parents=True)
    (real / "best").symlink_to("checkpoints/40")
    (real / "itself").symlink_to("itself")
    (tmp_path / "runs").symlink_to("scratch/runs")
    (tmp_path / "mine").symlink_to(real)
    for folder in (real, tmp_path / "runs" / "one", tmp_path / "mine"):
        refuse_links(folder)


def test_one_process_writes_into_a_folder_and_the_other_names_it(tmp_path):
    folder = tmp_path / "cache"
    code = (
        "import sys, pathlib\nfrom xtoken_jax.files.folders import lock_folder\n"
        "lock_folder(pathlib.Path(sys.argv[1]), '--out')\nprint('locked', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(UserError) as error:
            lock_folder(folder, "--out")
        other.stdin.close()
        assert other.wait() == 0
    who = rf"(process {other.pid}|another process)"
    assert re.fullmatch(
        rf"{folder}: {who} is writing there; end it, or choose another --out", str(error.value)
    )
    with locked(folder, "--out"):
        pass


def test_only_files_of_the_user_are_trusted(precious, tmp_path, monkeypatch):
    path = tmp_path / "cache" / "w.safetensors"
    assert not is_trusted(path)
    path.parent.mkdir(mode=0o700)
    path.write_text("x")
    path.chmod(0o644)
    assert is_trusted(path)

    def refused(words):
        with pytest.warns(UntrustedFileWarning, match=rf"^{path}: {words}; it is not read"):
            assert not is_trusted(path)

    for mode in (0o664, 0o646):
        path.chmod(mode)
        refused("can be written by other users")
    path.chmod(0o600)
    path.parent.chmod(0o777)
    refused("is in a folder that other users can write")
    path.parent.chmod(0o1777)  # as /tmp: nobody else can replace it
    assert is_trusted(path)
    path.parent.chmod(0o700)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    if path.stat().st_uid:  # root's own files are always trusted
        refused(f"belongs to user {path.stat().st_uid}")
    monkeypatch.undo()
    path.unlink()
    path.symlink_to(precious)
    refused("is a link to .*precious.txt")


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")
def test_a_file_of_another_user_is_not_trusted(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_text("planted")
    os.chown(path, 12345, 12345)
    with pytest.warns(UntrustedFileWarning, match="belongs to user 12345"):
        assert not is_trusted(path)
    os.chown(path, 0, 0)
    os.chown(tmp_path, 12345, 12345)
    with pytest.warns(UntrustedFileWarning, match="is in a folder of user 12345"):
        assert not is_trusted(path)
