"""Fuzzers of a model's folder: config.json, weights, the index of shards, generation_config.json."""

import json
import random
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

from fuzz.frame import Parser
from fuzz.mutations import spoil_json, spoil_presence, spoil_safetensors
from xtoken_jax.evaluate.completions import end_tokens
from xtoken_jax.models.config import read_config
from xtoken_jax.models.hf.loading import load_model
from xtoken_jax.models.hf.side_files import side_files
from xtoken_jax.tokens.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "fixtures"
CONFIGS = sorted([*(DATA / "hf_configs").glob("*.json"), *(DATA / "tiny_families").glob("*/config.json")])
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"


def _write_configs(folder: Path) -> None:
    for number, path in enumerate(CONFIGS):
        shutil.copy(path, folder / f"{number}.json")


def _spoil_config(rng: random.Random, folder: Path) -> None:
    rng.choice(sorted(folder.glob("*.json"))).rename(folder / "config.json")
    spoil_json(rng, folder / "config.json")


def _read_config(folder: Path) -> None:
    config = read_config(folder)
    assert hash(config) == hash(read_config(folder))
    repr(config)
    config.to_hf()


def _write_model(folder: Path) -> None:
    shutil.copytree(DATA / "tiny_llama" / "tied", folder, dirs_exist_ok=True)


def _write_shards(folder: Path) -> None:
    _write_model(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: SHARDS[place % 2] for place, name in enumerate(sorted(tensors))}
    for file in SHARDS:
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": files}))


def _spoil_model(rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.5:
        spoil_safetensors(rng, folder / "model.safetensors")
    else:
        spoil_json(rng, folder / "config.json")


def _spoil_shards(rng: random.Random, folder: Path) -> None:
    kind = rng.random()
    if kind < 0.7:
        spoil_json(rng, folder / INDEX)
    elif kind < 0.85:
        spoil_safetensors(rng, folder / rng.choice(SHARDS))
    else:
        spoil_presence(rng, folder / rng.choice((INDEX, *SHARDS)))


def _read_model(folder: Path) -> None:
    load_model(folder)


def _write_generation(folder: Path) -> None:
    from tiny_pair import tokenizer, write_model

    shutil.rmtree(folder)
    write_model(folder, tokenizer(r"\d", bos=True, numerals=False), layers=1, bos=True)
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 0, "eos_token_id": [1, 7], "temperature": 0.6, "do_sample": True})
    )


def _spoil_generation(rng: random.Random, folder: Path) -> None:
    spoil_json(rng, folder / "generation_config.json")


def _read_generation(folder: Path) -> None:
    ends = end_tokens(read_config(folder), Tokenizer.load(folder, compare_auto=False), folder)
    assert all(isinstance(end, int) for end in ends)
    side_files(folder, json.loads((folder / "config.json").read_text()), ends=(1, 9))


PARSERS = [
    Parser("config", _write_configs, _spoil_config, _read_config),
    Parser("weights", _write_model, _spoil_model, _read_model),
    Parser("shards", _write_shards, _spoil_shards, _read_model),
    Parser("generation_config", _write_generation, _spoil_generation, _read_generation),
]
