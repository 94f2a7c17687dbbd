"""The other spelling of a word, and what is left alone."""

import pytest

from xtoken_jax.cli import parser as cli
from xtoken_jax.errors import UserError
from xtoken_jax.run.config_groups import groups
from xtoken_jax.run.experiment import Experiment, load_experiment
from xtoken_jax.run.spelling import advice, as_settings
from xtoken_jax.run.words import keys

NAMES = keys(Experiment)


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        ("--student A --teacher B", "student.path=A teacher.path=B"),
        ("--student=A", "student.path=A"),
        ("--batch-size 4", "data.batch_size=4"),
        ("--data.batch_size=4", "data.batch_size=4"),
        ("--train-steps 9", "train.steps=9"),
        ("--experiment quickstart", "experiment=quickstart"),
        ("--mesh=fsdp", "mesh=fsdp"),
        ("--data a.jsonl", "data.train.text.path=a.jsonl"),
        ("--baseline", "baseline=..."),
        ("--limit 5", "data.train.NAME.limit=5"),
        ("--lr 1 train.steps=3", "optimizer.learning_rate=1"),
    ],
)
def test_options_become_settings(words, instead):
    words = words.split()
    unknown = [word for word in words if word.startswith("-")]
    line = as_settings("xtoken distill", words, unknown, NAMES, groups())
    assert line.endswith(f"; settings are key=value: write {instead}")


def test_what_other_programs_say_is_a_key_that_exists():
    from xtoken_jax.run.spelling import KEYS

    known = {*NAMES, *groups()}
    assert [key for key in KEYS.values() if key.replace(".text.", ".NAME.") not in known] == []


def test_keys_are_those_of_the_schema():
    assert {"train.steps", "student.lora.rank", "data.train.NAME.path", "teachers.NAME.loss.kind"} <= set(
        NAMES
    )
    assert NAMES.index("teacher.weight") < NAMES.index("teachers.NAME.weight")


PAIR = ["student.path=s", "teacher.path=t", "data.train.text.path=a", "data.validation.text.path=b"]


@pytest.mark.parametrize(
    "word",
    [
        "name='a,b'",  # quoted: one value
        "data.train.text.path=a,b.jsonl",  # a path may hold a comma
        "student.lora.targets=query,down",  # a list
        "run_dir=runs/a,b",
    ],
)
def test_a_comma_that_makes_no_sweep(word):
    load_experiment([*PAIR, "student.lora.rank=2", word])


def test_paths_that_are_there_make_a_sweep(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    several = f"teacher.path={tmp_path}/a,{tmp_path}/b"
    with pytest.raises(UserError, match="add -m for a run with each"):
        load_experiment([*PAIR, several])
    (tmp_path / f"a,{tmp_path.name}").mkdir()
    load_experiment([*PAIR, f"teacher.path={tmp_path}/a,{tmp_path.name}"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--source kind=lines field=a", None),
        ("--source kind=lines --path x", "--path: xtoken evaluate takes DIR as a word by itself"),
        ("data.batch_size=2 length=5", "data.batch_size=2 length=5: xtoken evaluate takes options"),
        ("x=1", "unknown argument 'x=1'; see xtoken evaluate --help"),
    ],
)
def test_values_of_an_option_that_takes_several_are_not_advised_on(words, line):
    options = ["--source", "--json", "--length", "--batch-size"]
    found = advice("xtoken evaluate", words.split(), options, ["DIR"], several=["--source"])
    assert (found or "").startswith(line or "")
    assert (found is None) == (line is None)


@pytest.mark.parametrize("words", ["--text student.path=x", "--text --foo"])
def test_the_value_of_an_option_is_not_looked_at(words, pair_folders, capsys):
    """A text may look like a setting; one that looks like an option is argparse's to refuse."""
    student, teacher = map(str, pair_folders)
    words = ["align", "--student", student, "--teacher", teacher, *words.split(), "--json"]
    if "--foo" in words:
        with pytest.raises(SystemExit):
            cli.main(words)
        assert "--foo" in capsys.readouterr().err
    else:
        assert cli.main(words) == 0
