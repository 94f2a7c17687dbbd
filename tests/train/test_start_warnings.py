"""Warnings at the start of a run: settings and models that do not fit together, with numbers."""

import io
import itertools
import json
import shutil

import pytest
from rich.console import Console

from xtoken_jax.data.sources import SourceConfig, read_sources
from xtoken_jax.run import distill as distill_module
from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import load_experiment


class ReachedError(Exception):
    """The run got as far as training."""


@pytest.fixture
def warned(words, tmp_path, monkeypatch):
    """Starts a run with further words; returns its warnings."""

    def reached(*_, **__):
        raise ReachedError

    monkeypatch.setattr(distill_module, "train", reached)
    monkeypatch.setattr("xtoken_jax.run.held_out.HeldOut.of_teacher", lambda *_: {})

    runs = itertools.count()

    def start(*more):
        console = Console(file=io.StringIO(), soft_wrap=True)
        fitting = ["optimizer.warmup_steps=2", "train.steps=9", f"run_dir={tmp_path}/run{next(runs)}"]
        with pytest.raises(ReachedError):
            distill(load_experiment([*words, *fitting, *more]), console)
        lines = console.file.getvalue().splitlines()
        return [line.removeprefix("warning  ") for line in lines if line.startswith("warning")]

    return start


def copied(folder, out, **config):
    """A copy of a model with other settings."""
    shutil.copytree(folder, out)
    content = json.loads((out / "config.json").read_text()) | config
    (out / "config.json").write_text(json.dumps(content))
    return out


def test_a_run_that_fits_has_none(warned):
    assert warned() == []


@pytest.mark.parametrize(("warmup", "said"), [(8, False), (9, True), (250, True)])
def test_a_warm_up_that_never_ends(warmup, said, warned):
    lines = warned(f"optimizer.warmup_steps={warmup}")
    assert len(lines) == said
    if said:
        assert lines[0].startswith(f"optimizer.warmup_steps={warmup} is not below train.steps=9: ")
        assert lines[0].endswith("take optimizer.warmup_steps=0")


def test_rows_longer_than_a_model_was_made_for(warned, pair_folders, tmp_path):
    """The student's 40 positions and 48 of a row; the teacher has 128."""
    student = copied(pair_folders[0], tmp_path / "student", max_position_embeddings=40)
    (line,) = warned(f"student.path={student}", "data.student_length=48", "data.teacher_length=64")
    assert line.startswith(
        "data.student_length=48: rows of 48 tokens, and the model in student.path was made for"
    )
    assert "up to 40 (max_position_embeddings in config.json); take data.student_length=40" in line
    teacher = copied(pair_folders[1], tmp_path / "teacher", max_position_embeddings=40)
    (line,) = warned(f"teacher.path={teacher}", "data.teacher_lengths.teacher=44")
    assert line.startswith(
        "data.teacher_lengths.teacher=44: rows of 44 tokens, and the model in teacher.path"
    )
    assert warned(f"student.path={student}", "data.student_length=40") == []


@pytest.mark.parametrize(("length", "side"), [(12, "the student's"), (128, "the teacher's")])
def test_lengths_that_do_not_fit_the_text(length, side, warned, words, pair_folders):
    """The share of tokens is counted here by the tokenizers themselves; document marks are left out of it."""
    from xtoken_jax.tokens.tokenizer import TokenizerPair

    pair = TokenizerPair.load(*pair_folders)
    path = next(word.split("=")[1] for word in words if word.startswith("data.train.text.path"))
    texts = [*read_sources({"text": SourceConfig(path=path)})["text"]]
    marks = 2 * len(texts), len(texts)  # BOS and EOS of the student, EOS of the teacher
    student, teacher = (
        sum(map(len, side.encode_batch(texts))) + extra
        for side, extra in zip((pair.student, pair.teacher), marks, strict=True)
    )
    ratio = teacher / student
    (line,) = warned(f"data.teacher_length={length}")
    assert line.startswith(
        f"data.teacher_length={length} is {length / 32:.2f} times data.student_length=32, "
    )
    assert f"the teacher has {ratio:.2f} tokens for one of the student's (sample: 32 documents)" in line
    filled = min(ratio * 32 / length, length / (ratio * 32))
    assert f"{side} rows fill up to {filled:.0%}" in line
    fitting = int(line.rpartition("take data.teacher_length=")[2])
    assert 0 <= fitting - ratio * 32 < 8.5
    assert warned(f"data.teacher_length={fitting}") == []


def test_a_tokenizer_of_another_model(warned, pair_folders, tmp_path):
    """A larger vocabulary is refused by loading."""
    foreign = tmp_path / "foreign"
    shutil.copytree(pair_folders[0], foreign)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pair_folders[1] / name, foreign / name)
    (line,) = warned(f"student.path={foreign}")
    assert line.startswith(
        "student.path: the tokenizer may be another model's: it has 300 ids, and the embedding"
    )
    assert "405 rows; put the tokenizer that the model was trained with into its folder" in line


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"bos_token_id": 0, "eos_token_id": [7, 1]}, None),
        ({"eos_token_id": 1}, None),
        ({"eos_token_id": 9}, "eos_token_id is 9 ("),
        ({"eos_token_id": [9, 404]}, "404 (no token) in config.json, 1 (<eos>) in the tokenizer"),
        ({"bos_token_id": 1}, "bos_token_id is 1 (<eos>) in config.json, 0 (<bos>) in the tokenizer"),
    ],
)
def test_special_tokens_of_another_tokenizer(config, said, warned, pair_folders, tmp_path):
    lines = warned(f"student.path={copied(pair_folders[0], tmp_path / 'student', **config)}")
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


def test_a_teacher_s_tokenizer_is_looked_at_too(warned, pair_folders, tmp_path):
    teacher = copied(pair_folders[1], tmp_path / "teacher", eos_token_id=5)
    (line,) = warned(f"teachers.second.path={teacher}", "teachers.second.loss.kind=uld")
    assert line.startswith("teachers.second.path: the tokenizer may be another model's: eos_token_id is 5 (")
