"""Training from a teacher cache: the same as with the teacher, without it; and what is refused."""

import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from full_disk import files_of_at_most
from kills import killed
from rich.console import Console

from xtoken_jax.alignment.batch import StoredRows
from xtoken_jax.cli.parser import main
from xtoken_jax.errors import UserError
from xtoken_jax.files.folders import locked
from xtoken_jax.losses.blockwise.teacher import stored_likeliest
from xtoken_jax.models.load import open_model
from xtoken_jax.run import distill as distill_module
from xtoken_jax.run.cache_teacher import cache_teacher
from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.teacher_cache.distributions import Keep, _of_logits
from xtoken_jax.teacher_cache.reader import INDEX_FILE, read_index
from xtoken_jax.train.metrics import read_metrics

ALL = Keep(None, 1.0, "float32", (1.0,))
SOME = Keep(24, 1.0, "float16", (1.0, 2.0))


def quiet():
    return Console(file=io.StringIO(), width=300)


def cached(words, out, keep=ALL, **options):
    return cache_teacher(load_experiment(words), "teacher", keep, out, quiet(), **options)


def run(words, folder, *more):
    """Figures, and the metrics of the steps."""
    steps = ["train.steps=2", "train.log_every=1", "train.save_every=0", f"run_dir={folder}"]
    result = distill(load_experiment([*words, *steps, *more]), quiet())
    return result.figures, [row for row in read_metrics(result.metrics) if "loss" in row]


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_run_without_the_teacher_is_the_run_with_it(words, tmp_path, monkeypatch):
    words = [*words, "loss.block=16", "loss.top_k=100", "data.batch_size=16", "train.accumulate=2"]
    summary = cached(words, tmp_path / "cache")
    assert summary.lost["mean_mass"] == 0
    assert summary.lost["p99_divergence"] < 1e-5
    figures, live = run(words, tmp_path / "live")
    loaded = []

    def opened(config, *arguments, **options):
        loaded.append(config.path)
        return open_model(config, *arguments, **options)

    monkeypatch.setattr(distill_module, "open_model", opened)
    found, rows = run(words, tmp_path / "run", f"teacher.cache={tmp_path / 'cache'}")
    assert loaded == [load_experiment(words).student.path]
    assert found["teacher"] == figures["teacher"]
    assert live[0]["kd"] > 0.01
    for ours, theirs in zip(rows, live, strict=True):
        for name in ("loss", "ce", "kd", "kd_scale", "gradient_norm", "chunks", "aligned_share/teacher"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=2e-6, err_msg=name)
        assert ours["agreement/teacher"] == theirs["agreement/teacher"]
    known = json.loads((tmp_path / "run" / "run.json").read_text())["contents"]
    assert known["teacher.cache"] == summary.index.checksum
    assert "teacher.weights" not in known


def test_rounding_leaves_the_likeliest_token_the_likeliest():
    """In 16 bits thousands of probabilities come out alike; of those that are, the first counts."""
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 0.01, (64, 4000)).astype(np.float32)
    logits[:, 7] = logits[:, 9] = 0.1 + logits.max(-1)  # equal in every format
    logits[32:, 9] = np.nextafter(logits[32:, 7], np.float32(1))
    labels = jnp.asarray(rng.integers(0, 4000, 64), jnp.int32)
    for dtype in ("float16", "bfloat16", "float32"):
        for top_k, top_p in ((None, 1.0), (5, 1.0), (100, 0.5)):
            keep = Keep(top_k, top_p, dtype, (1.0,))
            kept, _ = jax.jit(_of_logits, static_argnums=2)(jnp.asarray(logits), labels, keep)
            stored = StoredRows(kept.ids, kept.log_probabilities, kept.tails, kept.normalizers, 4000, 1.0)
            found = stored_likeliest(jax.tree.map(lambda x: x[None], stored))[0]
            np.testing.assert_array_equal(found, np.where(np.arange(64) < 32, 7, 9))


def test_an_interrupted_cache_comes_out_the_same_to_the_byte(words, tmp_path):
    options = {"keep": SOME, "shard_bytes": 24 * 4 * 700}
    summary = cached(words, tmp_path / "whole", **options)
    assert len(summary.index.shards) >= 3
    whole = contents(tmp_path / "whole")
    out = tmp_path / "cache"
    for moment in (2, 5, 9):  # the folder, then two changes a file and two of the index
        assert killed(moment, lambda: cached(words, out, **options))
        assert not (out / INDEX_FILE).is_file() or not read_index(out).complete
        with pytest.raises(UserError, match=r"no teacher cache there|an unfinished teacher cache"):
            distill(load_experiment([*words, f"teacher.cache={out}", f"run_dir={tmp_path / 'run'}"]), quiet())
    again = cached(words, out, **options)
    assert contents(out) == whole
    assert again.tokens == summary.tokens
    assert cached(words, out, **options).tokens_per_second is None  # nothing was left to do

    name = read_index(out).shards[1].file
    content = bytearray((out / name).read_bytes())
    content[-40] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}: damaged"):
        run([*words, f"teacher.cache={out}"], tmp_path / "run", "train.steps=40")
    cached(words, out, **options)
    assert contents(out) == whole


def test_what_does_not_belong_together_is_refused(words, pair_folders, tmp_path):
    out = tmp_path / "cache"
    cached(words, out, SOME)
    student, teacher = pair_folders
    other = shutil.copytree(teacher, tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[len(weights) // 2 :] = bytes(len(weights) - len(weights) // 2)
    (other / "model.safetensors").write_bytes(weights)
    text = tmp_path / "other.jsonl"
    text.write_text(json.dumps({"text": "7+5=12, and more of it. " * 40}) + "\n")
    assert read_index(out).names == {
        "teacher": str(teacher), "student": str(student), "data.train.text": words[2].partition("=")[2],
    }  # fmt: skip
    for change, differs in (
        ([f"teacher.path={other}"], "teacher.weights"),
        ([f"teacher.path={student}"], "teacher.config"),
        (["data.student_length=24"], "data.student_length"),
        (["data.teacher_length=40"], "data.teacher_length"),
        (["teacher.compute_dtype=bfloat16"], "teacher.compute_dtype"),
        ([f"data.train.text.path={text}"], "data.train.text"),
    ):
        with pytest.raises(UserError, match=rf"teacher\.cache=.*made of another {differs} "):
            run([*words, f"teacher.cache={out}"], tmp_path / "run", *change)
        if differs != "teacher.weights":
            with pytest.raises(UserError, match=rf"holds another teacher cache \({differs}="):
                cached([*words, *change], out, SOME)
    with pytest.raises(UserError, match=r"holds another teacher cache \(keep\.top_k=24 there, 25 here\)"):
        cached(words, out, SOME._replace(top_k=25))
    with pytest.raises(UserError, match="made for temperature 1, 2, the loss has 3; take one"):
        run([*words, f"teacher.cache={out}"], tmp_path / "run", "loss.temperature=3")
    with pytest.raises(UserError, match="no teacher cache there"):
        run([*words, f"teacher.cache={tmp_path / 'nothing'}"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_not_finite_is_not_cached(words, pair_folders, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(pair_folders[1], tmp_path / "broken")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"the tensor model\.norm\.weight holds NaN or infinite values"):
        cached([*words, f"teacher.path={folder}"], tmp_path / "cache", SOME)


def test_the_command(words, tmp_path, capsys):
    out = tmp_path / "cache"
    arguments = ["cache-teacher", *words, "--out", str(out), "--top-p", "0.9", "--dtype", "bfloat16"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.01 < found["mean_mass"] < 0.12
    assert found["mean_mass"] < found["p99_mass"] <= 0.11
    assert (
        found["bytes_per_token"] * found["tokens"]
        == found["bytes"]
        == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    )
    assert found["bytes"] < found["raw_bytes"]
    index = read_index(out)
    assert index.keep == {"top_k": None, "top_p": 0.9, "dtype": "bfloat16", "temperatures": [1.0]}
    assert 24 < index.width <= index.size
    assert list(found["teacher"]) == ["text bits/byte"]
    assert main(arguments) == 0
    shown = capsys.readouterr().err
    assert "all logits in float32" in shown
    assert f"teacher.cache={out}" in shown
    for words_, message in (
        (["--top-k", "0"], "--top-k 0: must be a number from 1 on, or all"),
        (["--top-p", "1.5"], "--top-p 1.5: must be above 0, and at most 1"),
        (["--temperatures", "0"], "--temperatures 0.0: must be above 0"),
        (["--teacher", "big"], "--teacher big: no such teacher; there is teacher"),
    ):
        assert main(["cache-teacher", *words, "--out", str(tmp_path / "new"), *words_]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_second_process_in_the_folder_is_refused(words, tmp_path):
    out = tmp_path / "cache"
    with (
        locked(out, "--out"),
        pytest.raises(UserError, match=rf"^{out}: (another )?process.* is writing there; .* another --out$"),
    ):
        cached(words, out)
    assert contents(out) == {}
    cached(words, out)


def test_a_full_disk_names_the_place_and_the_same_command_resumes(words, tmp_path):
    options = {"keep": SOME, "shard_bytes": 24 * 4 * 700}
    cached(words, tmp_path / "whole", **options)
    whole = contents(tmp_path / "whole")
    out = tmp_path / "cache"
    for size, name in ((10, INDEX_FILE), (2000, "shard-00000.safetensors")):
        words_of = rf"^{out}/{name}: cannot be written \(File too large\)"
        with files_of_at_most(size), pytest.raises(UserError, match=words_of):
            cached(words, out, **options)
    assert list(contents(out)) == [INDEX_FILE]
    cached(words, out, **options)
    assert contents(out) == whole
