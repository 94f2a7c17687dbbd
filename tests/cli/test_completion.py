"""What a shell offers at the cursor: commands, options, groups, keys and their values."""

import shutil
import subprocess
import sys

import pytest
from argcomplete import CompletionFinder

from xtoken_jax.cli import parser as cli
from xtoken_jax.cli.completion import SHELLS, of_settings
from xtoken_jax.run.experiment import Experiment


def offered(word):
    return of_settings(lambda: Experiment)(word)


@pytest.fixture
def at_cursor(monkeypatch):
    """The completions of a line, as argcomplete gives them to a shell."""

    def complete(line):
        parser, _ = cli.make_parser()
        words = line.split(" ")
        return CompletionFinder(parser)._get_completions(words[:-1], words[-1], "", None)

    return complete


def test_commands_and_options(at_cursor):
    assert {"distill ", "audit ", "cache-teacher "} <= {f"{c.strip()} " for c in at_cursor("xtoken ")}
    assert at_cursor("xtoken --vers") == ["--version "]
    assert at_cursor("xtoken evaluate DIR --len") == ["--length "]
    assert sorted(at_cursor("xtoken export RUN --dtype ")) == ["bfloat16", "float16", "float32", "source"]


def test_settings_of_distill(at_cursor):
    assert at_cursor("xtoken distill train.st") == ["train.steps="]
    assert at_cursor("xtoken distill experiment=quickstart_") == ["experiment=quickstart_two_teachers "]
    assert at_cursor("xtoken cache-teacher --out c loss=h") == ["loss=h_kl "]


def test_a_key_grows_part_by_part():
    assert {"loss=", "experiment=", "train.", "run_dir=", "teachers."} <= set(offered(""))
    assert {"train.steps=", "train.wandb."} <= set(offered("train."))
    assert offered("train.wandb.") == ["train.wandb.project="] or "train.wandb.project=" in offered(
        "train.wandb."
    )
    assert {"data.train.mine.path=", "data.train.mine.kind="} <= set(offered("data.train.mine."))
    assert offered("data.train.") == ["data.train.text."]
    assert offered("nothing.of.that") == []


def test_values_are_those_of_the_type():
    assert offered("optimizer.kind=") == [
        f"optimizer.kind={kind}" for kind in ("adamw", "lamb", "lion", "sgd")
    ]
    assert offered("baseline=") == ["baseline=true", "baseline=false"]
    assert "loss=p_kl" in offered("loss=")
    assert offered("train.steps=") == []


def test_a_group_needs_no_schema():
    """Which takes seconds to import."""
    assert of_settings(lambda: pytest.fail("imported"))("mesh=") == ["mesh=data_parallel", "mesh=fsdp"]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_of_a_shell(shell, capsys):
    assert cli.main(["--completion", shell]) == 0
    script = capsys.readouterr().out
    assert "xtoken" in script
    assert "_ARGCOMPLETE" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True, timeout=60)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_after_the_script(tmp_path):
    xtoken = tmp_path / "xtoken"
    xtoken.write_text(f'#!/bin/sh\nexec {sys.executable} -m xtoken_jax "$@"\n')
    xtoken.chmod(0o755)
    script = (
        f'PATH="{tmp_path}:$PATH"; eval "$(xtoken --completion bash)"\n'
        'COMP_LINE="xtoken distill mesh=f"; COMP_POINT=${#COMP_LINE}; COMP_TYPE=9\n'
        '_python_argcomplete xtoken; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "fsdp"  # "=" parts words in bash
