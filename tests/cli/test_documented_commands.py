"""Every command that the documentation shows, run at a small size in the order of its block.

What cannot run here is named below with the reason: its settings are composed, its arguments parsed. A block
of a kind that is not known fails, and so does a command that nothing here runs.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import zstandard
from documented import blocks

from xtoken_jax.cli.parser import main
from xtoken_jax.distributed.mesh import single_device_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.run.sweep import run_sweep

ROOT = Path(__file__).parents[2]
FILES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
FILES += sorted(ROOT.glob("experiments/*/README.md"))
BLOCKS = [block for file in FILES for block in blocks(file) if block.is_shell]
# Blocks that show what a command prints, and the tree of files, by their first words.
OUTPUTS = ("student", "pyproject.toml")
PUBLISHED = (
    "meta-llama/Llama-3.2-1B",
    "Qwen/Qwen3-4B",
)  # a student and a teacher; the tiny pair stands for them
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Words of a command -> why only its settings are composed (--cfg job).
COMPOSED = {
    "hosts=auto": "needs a TPU slice or Slurm",
    "hosts.coordinator=HOST0:8476": "needs two hosts",
    "mesh=fsdp": "needs several devices; tests/models and tests/train have them",
    "microsoft/Phi-4-mini-instruct": "its weights are on a hub",
    "experiment=smollm2": "prepare.py downloads its files",
    "hydra/launcher=submitit_slurm": "needs Slurm",
    "hydra/sweeper=optuna": "searches for hours; tests/run/test_sweep.py searches where Optuna is installed",
}
# Words of a command -> the extra that they need, and its package.
PLUGINS = {
    "hydra/launcher=submitit_slurm": ("submitit", "hydra-submitit-launcher"),
    "hydra/sweeper=optuna": ("optuna", "hydra-optuna-sweeper"),
}
# Words that make a command of some seconds of one that takes longer.
SMALL = ["train.steps=2", "baseline=false"]
SIZES = ["data.student_length=32", "data.teacher_length=48", "data.batch_size=4", "loss.block=null"]
QUICKSTART = [
    "data.train.english.limit=20", "data.train.arithmetic.documents=8", "data.validation.english.limit=2",
    "data.validation.arithmetic.documents=2", "data.batch_size=2",
]  # fmt: skip
# Option and value -> what the small run and the tiny tokenizers have instead.
SMALLER = {("--step", "500"): "2", ("--critical", " €"): " the"}

# Scripts -> words that make them small, or why they are not run: their arguments are parsed all the same.
SCRIPTS = {
    "experiments/benchmarks/losses.py": "tests/experiments/test_benchmarks.py runs it",
    "experiments/benchmarks/blockwise.py": [
        "--student=31", "--teacher=23", "--width=8", "--length=8", "--kinds=p_kl", "--ways=1", "--rounds=1",
    ],
    "experiments/benchmarks/lora.py": "compiles models of a billion parameters",
    "experiments/benchmarks/models.py": "measures for minutes, and needs torch",
    "experiments/benchmarks/step.py": "measures for minutes",
    "experiments/benchmarks/alignment.py": "needs the real tokenizers, and minutes",
    "experiments/benchmarks/data.py": "measures for minutes",
    "experiments/benchmarks/projection.py": "needs the real tokenizers, and minutes",
    "experiments/benchmarks/teacher_cache.py": "measures for minutes",
    "experiments/benchmarks/loading.py": "writes 2 GB",
    "experiments/miniature/run.py": "trains for hours; tests/experiments/test_miniature.py trains less",
    "experiments/prefixes/measure.py": "needs the real tokenizers; test_prefixes_measure.py runs its parts",
    "experiments/quickstart/make.py": "trains for an hour; test_quickstart.py runs its parts",
    "experiments/reuse/plain_jax.py": "tests/experiments/test_reuse.py runs it",
    "experiments/reuse/equinox_student.py": "tests/experiments/test_reuse.py runs it",
    "experiments/smollm2/prepare.py": "downloads; tests/experiments/test_smollm2_prepare.py runs it without",
    "experiments/smollm2/beside_torch.py": "needs torch and what prepare.py makes",
    "experiments/survival/kill.py": "kills for an hour; tests/experiments/test_survival.py runs its parts",
    "experiments/tokenizers/all_pairs.py": "needs the real tokenizers; tests/real runs it",
    "experiments/tokenizers/fetch.py": "downloads; test_tokenizers_fetch.py runs it without",
}  # fmt: skip
TRAINED: list[list[str]] = []  # experiments that several files show are trained once
WITHOUT_ARGUMENTS = ("experiments/reuse/plain_jax.py", "experiments/reuse/equinox_student.py")


@pytest.fixture
def folder(tmp_path, monkeypatch, pair_folders):
    """The working folder of a block, with the data that commands name; runs use one device."""
    for name in ("train", "valid"):
        texts = [f"{a}+{b}={a + b}, as everybody € knows.\n" * 4 for a in range(8) for b in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    shutil.copyfile(tmp_path / "train.jsonl", tmp_path / "more.jsonl")
    shutil.copyfile(tmp_path / "valid.jsonl", tmp_path / "held_out.jsonl")
    for name in ("books", "web", "code"):
        (tmp_path / name).mkdir()
        for number in range(4):
            (tmp_path / name / f"{number}.txt").write_text(
                f"{name} {number}: 1+1=2, as everybody knows.\n" * 40
            )
    compressed = zstandard.compress((tmp_path / "train.jsonl").read_bytes())
    (tmp_path / "chats.jsonl.zst").write_bytes(compressed)
    monkeypatch.chdir(tmp_path)
    for module in ("distill", "cache_teacher"):
        monkeypatch.setattr(f"xtoken_jax.run.{module}.make_mesh", lambda config: single_device_mesh())
    return tmp_path


def executed(words, pair, monkeypatch):
    """Run one command of the documentation, or as much of it as can run here."""
    program, *rest = words
    if program.endswith("/pre-commit"):
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    elif program in ("cd", ".") or words[:3] == ["python3", "-m", "venv"]:
        return
    elif program in ("gcloud", "srun"):
        executed_inside(words, pair, monkeypatch)
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in rest if "=" not in word):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}: no such target"
    elif program == "pip":
        assert rest[0] == "install"
        for extra in re.findall(r"\[([\w,]+)\]", " ".join(rest)):
            assert set(extra.split(",")) <= set(PROJECT["optional-dependencies"]), words
    elif program.rpartition("/")[2] == "python":
        run_script(rest, monkeypatch)
    elif program.rpartition("/")[2] == "xtoken":
        run_xtoken(rest, pair, monkeypatch)
    else:
        pytest.fail(f"{shlex.join(words)}: nothing here runs {program}")


def executed_inside(words, pair, monkeypatch):
    """The command that is given to a cluster's own."""
    inner = next((w.partition("=")[2] for w in words if w.startswith("--command=")), None)
    if inner is None:
        executed(words[words.index("xtoken") :], pair, monkeypatch)
        return
    for part in inner.split("&&"):
        executed(shlex.split(part), pair, monkeypatch)


def run_script(words, monkeypatch):
    script, *arguments = words
    assert (ROOT / script).is_file(), script
    small = SCRIPTS[script]
    if script in WITHOUT_ARGUMENTS:
        assert not arguments
        return
    if script.endswith("beside_torch.py") and importlib.util.find_spec("torch") is None:
        warnings.warn(f"{script}: not even parsed, torch is not installed", stacklevel=1)
        return

    class ParsedError(Exception):
        """The arguments are right; nothing more is to run."""

    def parse(parser, words=None, namespace=None):
        parsed(parser, words, namespace)
        raise ParsedError

    parsed = argparse.ArgumentParser.parse_args
    with without_modules_of_scripts(), monkeypatch.context() as patch:
        patch.setattr(sys, "argv", [script, *arguments, *(small if isinstance(small, list) else [])])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        if isinstance(small, str):
            patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except ParsedError:
            return
        except SystemExit as end:
            if end.code:
                pytest.fail(f"{shlex.join(words)}: {end.code}")


@contextlib.contextmanager
def without_modules_of_scripts():
    """Hide packages of the tests that have the name of a module next to a script."""
    stems = {path.stem for path in ROOT.glob("experiments/*/*.py")}

    def taken():
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] in stems}

    hidden = taken()
    try:
        yield
    finally:
        taken()
        sys.modules.update(hidden)


def run_xtoken(words, pair, monkeypatch):
    command = words[0]
    words = [part for word in words for part in (placeholder(words, pair) if word == "..." else [word])]
    for side, hub_id, path in zip(("student", "teacher"), PUBLISHED, pair, strict=True):
        words = [word.replace(hub_id, str(path)) for word in words]
        words = [f"{side}.path={path}" if word == f"{side}.path=DIR" else word for word in words]
        words = [
            str(path) if word == "DIR" and before == f"--{side}" else word
            for before, word in zip(["", *words], words, strict=False)
        ]
    words = [SMALLER.get((before, w), w) for before, w in zip(["", *words], words, strict=False)]
    if command in ("distill", "cache-teacher"):
        plain = not any(word.startswith("experiment=quickstart") for word in words)
        words += [*SMALL, *(SIZES if plain else QUICKSTART)]
    if any(what in word for what in COMPOSED for word in words):
        assert main([*words, "--cfg", "job"]) == 0
        for extra, package in (needed for word, needed in PLUGINS.items() if word in words):
            if package not in {d.name for d in importlib.metadata.distributions()}:
                warnings.warn(f"composed only: the extra {extra} is not installed", stacklevel=1)
                with pytest.raises(UserError, match=rf"not installed; pip install 'xtoken-jax\[{extra}\]'$"):
                    run_sweep([word for word in words if "=" in word])
        return
    with monkeypatch.context() as patch:
        if "-m" in words:  # each job is a run, as the plain command's; its training is not repeated here
            patch.setattr("xtoken_jax.run.distill.distill", leave_result)
        if words not in TRAINED:
            assert main(words) == 0, shlex.join(words)
    if any(word.startswith("experiment=") for word in words):
        TRAINED.append(words)


def placeholder(words, pair):
    """What "..." stands for."""
    student, teacher = pair
    if words[0] in ("distill", "cache-teacher"):
        data = ["data.validation.text.path=valid.jsonl"]
        if not any(word.startswith("data.train.") for word in words):
            data.append("data.train.text.path=train.jsonl")
        return [f"student.path={student}", f"teacher.path={teacher}", *data]
    return ["--student", str(student), "--teacher", str(teacher)]


def leave_result(experiment, console, stop):
    """Leave what a run leaves, without training."""
    from xtoken_jax.run.folder import claim

    run = Path(experiment.run_dir)
    claim(run, experiment, {})
    figures = {"text bits/byte": experiment.optimizer.learning_rate}
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "validation": figures}) + "\n")
    (run / "result.json").write_text(json.dumps({"loss": "p_kl", "figures": {"distilled": figures}}))


def shown(block):
    """Whether a block shows commands."""
    return block.first_word not in OUTPUTS


@pytest.mark.parametrize(
    "block", [*filter(shown, BLOCKS)], ids=lambda b: f"{b.file.relative_to(ROOT)}:{b.line}"
)
def test_the_commands_of_a_block_run(block, folder, pair_folders, monkeypatch, capsys):
    commands = block.commands()
    assert commands
    for words in commands:
        executed(words, pair_folders, monkeypatch)
        capsys.readouterr()


def test_every_reason_is_of_a_command_that_is_shown():
    text = "\n".join(block.text for block in filter(shown, BLOCKS))
    assert [what for what in (*COMPOSED, *SCRIPTS) if what not in text] == []


def test_other_blocks_name_their_language():
    """Else they would pass for commands, or not be looked at."""
    languages = {block.language for file in FILES for block in blocks(file)}
    assert languages <= {"", "sh", "bash", "shell", "console", "python", "yaml", "json", "toml", "text"}


def test_inline_commands_exist():
    """Of commands in running text, the first words: `xtoken report`, `make test`."""
    makefile = (ROOT / "Makefile").read_text()
    for file in FILES:
        text = re.sub(r"^ *```.*?^ *```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`([^`\n]+)`", text):
            if found := re.match(r"xtoken ([a-z][a-z-]*)(?= |$)", code):
                with pytest.raises(SystemExit) as stop:
                    main([found[1], "--help"])
                assert not stop.value.code, f"{file}: {code}"
            if found := re.match(r"make ([a-z-]+)", code):
                assert re.search(rf"^{found[1]}:", makefile, re.MULTILINE), f"{file}: {code}"
            for extras in re.findall(r"pip install .*\[([\w,]+)\]", code):
                assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), f"{file}: {code}"


def test_a_block_is_read_as_a_shell_reads_it(tmp_path):
    (tmp_path / "a.md").write_text(
        "text\n```\n# a comment\nxtoken a \\\n  --b 'c d'  # why\n$ make x && python y.py\n\n"
        "  # more\n```\n```python\nx = 1\n```\n"
    )
    first, second = blocks(tmp_path / "a.md")
    assert first.commands() == [["xtoken", "a", "--b", "c d"], ["make", "x"], ["python", "y.py"]]
    assert (first.line, first.first_word, first.is_shell, second.is_shell) == (3, "xtoken", True, False)
