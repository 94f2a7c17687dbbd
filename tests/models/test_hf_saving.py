"""Weights out: one file or several, each tensor in its dtype, and what a kill leaves at every moment."""

import functools
import itertools
import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from kills import killed
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from models import tiny
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models import load_model, save_weights
from xtoken_jax.models.hf import saving as hf_saving
from xtoken_jax.models.hf.saving import stored_dtypes

INDEX = "model.safetensors.index.json"


def whole(folder):
    """All tensors of a folder, read by the safetensors library."""
    index = folder / INDEX
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    files = json.loads(index.read_text())["weight_map"]
    tensors = {}
    for file in sorted(set(files.values())):
        here = load_file(folder / file)
        assert set(here) == {name for name, where in files.items() if where == file}
        tensors |= here
    assert set(tensors) == set(files)
    return tensors


def files_of(path):
    """What a save has written, by the path that it gives."""
    if path.name != INDEX:
        return {path.name}
    return {INDEX, *json.loads(path.read_text())["weight_map"].values()}


def same_bits(a, b):
    assert {n: (t.dtype, t.shape) for n, t in a.items()} == {n: (t.dtype, t.shape) for n, t in b.items()}
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []


def test_several_files_with_an_index(tmp_path):
    model, params = load_model(tiny.DATA / "llama3")
    path = save_weights(tmp_path, model, params, dtype="float16", max_shard_size=10_000)
    assert path == tmp_path / INDEX
    index = json.loads(path.read_text())
    tensors = tiny.tensors("llama3")
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in tensors.values())}
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert count == 5
    assert files == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert sorted(os.listdir(tmp_path)) == sorted([*files, INDEX])
    same_bits(whole(tmp_path), tensors)
    for file in files:
        with safe_open(tmp_path / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
        assert sum(t.nbytes for t in load_file(tmp_path / file).values()) <= 10_000
    (tmp_path / "config.json").write_text((tiny.DATA / "llama3" / "config.json").read_text())
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path)[1], params)


def test_a_tensor_larger_than_a_file_may_be_has_one_of_its_own(tmp_path):
    model, params = load_model(tiny.DATA / "tied")
    save_weights(tmp_path, model, params, max_shard_size="1KB")
    files = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert list(files.values()).count(files["model.embed_tokens.weight"]) == 1
    assert "lm_head.weight" not in files
    same_bits(whole(tmp_path), tiny.tensors("tied"))


@pytest.mark.parametrize(
    ("size", "count"),
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("5 gb", 5 * 10**9), ("1.5MB", 1_500_000), ("2KiB", 2048),
     ("0", None), (0, None), ("-1GB", None), ("GB", None), ("5 apples", None), ("", None)],
)  # fmt: skip
def test_sizes_are_read_as_the_ecosystem_writes_them(size, count, tmp_path):
    if count is not None:
        assert hf_saving._bytes_of(size) == count
        return
    model, params = load_model(tiny.DATA / "tied")
    with pytest.raises(UserError, match=r"max_shard_size=.*such as 5GB"):
        save_weights(tmp_path / "out", model, params, max_shard_size=size)
    assert not (tmp_path / "out").exists()


def test_each_tensor_keeps_the_dtype_it_had(tmp_path):
    folder = tiny.copy("untied", tmp_path / "model")
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16)
    mixed = {n: t.astype(dtypes[i % 3]) for i, (n, t) in enumerate(tiny.tensors("untied").items())}
    save_file(mixed, folder / "model.safetensors", metadata={"format": "pt"})
    model, params = load_model(folder)
    save_weights(tmp_path / "out", model, params, dtype=stored_dtypes(folder, model), max_shard_size="9KB")
    same_bits(whole(tmp_path / "out"), mixed)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights in"):
        stored_dtypes(folder, model)
    other = tiny.copy("tied", tmp_path / "tied")
    with pytest.raises(UserError, match=r"lack lm_head\.weight, whose dtype is asked for"):
        stored_dtypes(other, model)


def test_split_parameters_are_gathered_a_few_rows_at_a_time(tmp_path, monkeypatch):
    gathered = []
    asarray = np.asarray

    def counted(value, *args, **options):
        if isinstance(value, jax.Array):
            gathered.append(value.nbytes)
        return asarray(value, *args, **options)

    model, params = load_model(
        tiny.DATA / "untied", mesh=make_mesh(MeshConfig(data=1, fsdp=4, tensor=2)), dtype="bfloat16"
    )
    monkeypatch.setattr(hf_saving, "_ROWS_BYTES", 1000)
    monkeypatch.setattr(hf_saving.np, "asarray", counted)
    save_weights(tmp_path, model, params, dtype="bfloat16")
    monkeypatch.undo()
    same_bits(whole(tmp_path), tiny.tensors("untied"))
    assert max(gathered) <= 32 * 48 * 2  # a layer's query


@pytest.mark.parametrize(
    ("before", "after"),
    [("5GB", "5GB"), ("5GB", "20KB"), ("20KB", "5GB"), ("20KB", "20KB"), ("20KB", "12KB")],
)
def test_a_kill_at_any_moment_leaves_the_old_weights_or_the_new_ones(before, after, tmp_path):
    model, params = load_model(tiny.DATA / "tied")
    old = tiny.copy("tied", tmp_path / "old")
    (old / "model.safetensors").unlink()
    (old / "notes-of-mine.txt").write_text("precious")
    save_weights(old, model, params, max_shard_size=before)
    params = jax.tree.map(lambda x: x + 1, params)
    new = shutil.copytree(old, tmp_path / "new")
    save_weights(new, model, params, max_shard_size=after)
    tensors, changed = whole(old), whole(new)
    seen = []
    for moment in itertools.count():
        folder = shutil.copytree(old, tmp_path / f"{moment}")
        save = functools.partial(save_weights, folder, model, params, max_shard_size=after)
        ended = killed(moment, save)
        is_old = np.array_equal(whole(folder)["model.norm.weight"], tensors["model.norm.weight"])
        seen.append("old" if is_old else "new")
        same_bits(whole(folder), tensors if is_old else changed)
        path = save()  # removes what the killed one left behind
        same_bits(whole(folder), changed)
        assert set(os.listdir(folder)) == {
            "config.json",
            "expected.npz",
            "notes-of-mine.txt",
            *files_of(path),
        }
        if not ended:
            break
    assert seen == sorted(seen, reverse=True)
    assert (seen[0], seen[-1]) == ("old", "new")


def test_files_in_use_are_not_written_over(tmp_path):
    model, params = load_model(tiny.DATA / "tied")
    named = [files_of(save_weights(tmp_path, model, params, max_shard_size="20KB")) for _ in range(3)]
    assert named[0] == {INDEX, *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))}
    assert named[1] == {INDEX, *(f"model-2-0000{i}-of-00003.safetensors" for i in (1, 2, 3))}
    assert named[2] == named[0] == set(os.listdir(tmp_path))


def test_a_failed_save_leaves_the_old_file_and_no_rubbish(tmp_path):
    model, params = load_model(tiny.DATA / "tied")
    path = save_weights(tmp_path, model, params)
    before = path.read_bytes()
    large = {**params, "final_norm": params["final_norm"] * 1e6}
    for size in ("5GB", "2KB"):
        with pytest.raises(UserError, match=r"model\.norm\.weight holds values that float16 cannot"):
            save_weights(tmp_path, model, large, dtype="float16", max_shard_size=size)
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["model.safetensors"]


def test_saving_rounds_to_the_nearest_bfloat16(tmp_path):
    model, params = load_model(tiny.DATA / "tied")
    saved = load_file(save_weights(tmp_path, model, params, dtype="bfloat16"))
    expected = tiny.tensors("tied")["model.norm.weight"].astype(ml_dtypes.bfloat16)
    assert saved["model.norm.weight"].tobytes() == expected.tobytes()


def test_parameters_of_another_model_are_not_saved(tmp_path):
    model, _ = load_model(tiny.DATA / "tied")
    _, other = load_model(tiny.DATA / "untied")
    with pytest.raises(ValueError, match="names and shapes"):
        save_weights(tmp_path, model, other)
    assert os.listdir(tmp_path) == []


def test_other_dtypes_are_refused(tmp_path):
    model, params = load_model(tiny.DATA / "tied")
    with pytest.raises(UserError, match="dtype='float64'; supported: float32, bfloat16, float16"):
        save_weights(tmp_path, model, params, dtype="float64")
