"""Outputs that are not finite: a run, a cache, an evaluation and a generation say whose they are."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from xtoken_jax.cli.parser import main
from xtoken_jax.tokens.tokenizer import Tokenizer
from xtoken_jax.train.metrics import read_metrics

TEXTS = [f"{a}+{b}={a + b}, as everybody knows.\n" * 4 for a in range(4) for b in range(6, 10)]


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def changed(folder, out, change):
    """A copy of a model with weights that `change` made others, untied from its unembedding."""
    shutil.copytree(folder, out)
    weights = load_file(out / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()
    change(weights)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((out / "config.json").read_text()) | {"tie_word_embeddings": False}
    (out / "config.json").write_text(json.dumps(config))
    return out


def too_large(weights):
    """Every logit overflows."""
    weights["model.norm.weight"] = np.full_like(weights["model.norm.weight"], 3e38)


def large_mlp(weights):
    """Hidden states overflow, and inf - inf is NaN."""
    for name, tensor in weights.items():
        if "mlp" in name:
            tensor *= np.float32(1e25)


def at_token(folder, text):
    """A change that makes the outputs NaN from one token on, and nothing else."""
    (token,) = Tokenizer.load(str(folder)).encode(text)

    def change(weights):
        weights["model.embed_tokens.weight"][token] = np.nan

    return change


@pytest.fixture
def unchecked(monkeypatch):
    """NaN in the weights is not noticed on loading: a stand-in for outputs that overflow at some token."""
    monkeypatch.setattr("xtoken_jax.models.hf.loading._Reader._check_finite", lambda *_: None)


@pytest.fixture
def run(pair_folders, tmp_path):
    """Runs the command with a student and a teacher; returns the exit code."""
    text = write_texts(tmp_path / "text.jsonl", TEXTS)
    held_out = write_texts(tmp_path / "held_out.jsonl", ["1+1=2, as everybody knows.\n" * 4])
    lengths = ["data.student_length=32", "data.teacher_length=48", "data.batch_size=8"]

    def go(command, *words, student=pair_folders[0], teacher=pair_folders[1]):
        data = [f"data.train.text.path={text}", f"data.validation.text.path={held_out}"]
        return main([
            command, f"student.path={student}", f"teacher.path={teacher}", *data, *lengths,
            "train.log_every=1", "train.steps=12", "loss=p_kl", "optimizer.warmup_steps=0",
            f"run_dir={tmp_path / 'run'}", *words,
        ])  # fmt: skip

    return go


def error_of(capsys):
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("xtoken: ")]
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


@pytest.mark.parametrize("policy", ["stop", "skip"])
@pytest.mark.parametrize("change", [too_large, large_mlp])
def test_a_teacher_that_is_never_finite_ends_the_run(policy, change, run, pair_folders, tmp_path, capsys):
    teacher = changed(pair_folders[1], tmp_path / "teacher", change)
    words = [f"train.non_finite={policy}", "train.max_skips=1000", "teacher.compute_dtype=bfloat16"]
    assert run("distill", *words, teacher=teacher) == 2
    error = error_of(capsys)
    assert "the outputs of the teacher are not finite" in error
    assert "try teacher.compute_dtype=float32 or another checkpoint in teacher.path" in error
    if policy == "skip":
        assert "step 3: " in error
        assert "as in the 2 steps before, and skipping cannot mend it" in error


@pytest.mark.usefixtures("unchecked")
def test_a_teacher_that_is_not_finite_from_one_token_on(run, pair_folders, tmp_path, capsys):
    """Held-out text without the token says nothing; the step does, of the teacher that is meant."""
    second = tmp_path / "second"
    changed(pair_folders[1], second, at_token(pair_folders[1], "9"))
    words = [f"teachers.second.path={second}", "teachers.second.loss.kind=uld"]
    assert run("distill", *words) == 2
    error = error_of(capsys)
    assert "the outputs of teacher 'second' are not finite in " in error
    assert "put another checkpoint in teachers.second.path, or train.non_finite=skip" in error
    (row,) = read_metrics(tmp_path / "run" / "non_finite.jsonl")
    count = row["bad_rows"]["teachers"]["second"]
    assert 0 < count < 8
    assert row["bad_rows"] == {"student": 0, "teachers": {"teacher": 0, "second": count}}
    assert f"in {count} of 8 rows" in error


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.usefixtures("unchecked")
def test_a_student_before_any_training(held_out, run, pair_folders, tmp_path, capsys):
    change = too_large if held_out else at_token(pair_folders[0], ",")
    student = changed(pair_folders[0], tmp_path / "student", change)
    words = [] if held_out else [f"data.validation.text.path={write_texts(tmp_path / 'v.jsonl', ['1+1=2'])}"]
    assert run("distill", *words, student=student) == 2
    error = error_of(capsys)
    assert "before any training" in error
    assert "the student's outputs are not finite" in error
    assert "put another checkpoint in student.path" in error
    assert "teacher" not in error


@pytest.mark.parametrize(
    ("rate", "what"),
    [("1e39", "the student's outputs are not finite after 1 updates"),
     ("1e30", "all outputs are finite, the gradient is not")],
)  # fmt: skip
def test_a_student_after_updates(rate, what, run, capsys, tmp_path):
    words = [f"optimizer.learning_rate={rate}", "train.evaluate_every=0", "train.save_every=1"]
    assert run("distill", *words) == 2
    error = error_of(capsys)
    assert what in error
    assert "try a lower optimizer.learning_rate or more optimizer.warmup_steps" in error
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints'}" in error


@pytest.mark.usefixtures("unchecked")
def test_held_out_text_that_a_trained_student_fails_on(run, pair_folders, tmp_path, capsys):
    """Rows of training are fine, the token stands in the held-out text alone."""
    student = changed(pair_folders[0], tmp_path / "student", at_token(pair_folders[0], "?"))
    other = write_texts(tmp_path / "other.jsonl", ["Is 1+1=2?\n" * 4])
    words = [f"data.validation.other.path={other}", "train.steps=2"]
    assert run("distill", *words, student=student) == 2
    assert "the student's outputs are not finite on data.validation.other" in error_of(capsys)
    assert run("distill", *words, "train.non_finite=skip", student=student) == 0
    figures = json.loads((tmp_path / "run" / "result.json").read_text())["figures"]["distilled"]
    assert figures["other bits/byte"] is None
    assert figures["text bits/byte"] > 0


@pytest.mark.usefixtures("unchecked")
def test_a_cache_of_such_a_teacher(run, pair_folders, tmp_path, capsys):
    teacher = changed(pair_folders[1], tmp_path / "teacher", at_token(pair_folders[1], "9"))
    assert run("cache-teacher", "--out", str(tmp_path / "cache"), teacher=teacher) == 2
    assert "the outputs of the teacher are not finite" in error_of(capsys)


def test_a_cache_that_holds_nan(run, tmp_path, capsys, monkeypatch):
    from xtoken_jax.teacher_cache import writer as cache_run

    assert run("cache-teacher", "--out", str(tmp_path / "cache")) == 0
    capsys.readouterr()
    made = cache_run._made

    def broken(kept, costs, form):
        kept.log_probabilities.setflags(write=True)
        kept.log_probabilities[3, 0] = np.nan
        return made(kept, costs, form)

    monkeypatch.setattr(cache_run, "_made", broken)
    assert run("cache-teacher", "--out", str(tmp_path / "bad")) == 0
    capsys.readouterr()
    words = ["train.steps=2", "train.non_finite=skip"]
    assert run("distill", f"teacher.cache={tmp_path / 'bad'}", *words) == 2
    assert f"teacher.cache={tmp_path / 'bad'}: the teacher's outputs are not finite in text" in error_of(
        capsys
    )


@pytest.mark.parametrize("change", [too_large, large_mlp])
def test_evaluate_and_generate_refuse_such_a_model(change, pair_folders, tmp_path, capsys):
    folder = changed(pair_folders[0], tmp_path / "model", change)
    text = write_texts(tmp_path / "text.jsonl", TEXTS)
    for words in (
        ["evaluate", folder, "--data", text, "--length", "64", "--json"],
        ["generate", folder, "--prompt", "1+1="],
        ["generate", folder, "--prompt", "1+1=", "--temperature", "1", "--json"],
    ):
        assert main(list(map(str, words))) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert f"{folder}: the model's outputs are not finite" in printed.err
        assert printed.err.count("xtoken: ") == 1
