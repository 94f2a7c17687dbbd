"""The command as a user meets it: what it prints, and one line and exit code 2 for a mistake."""

import json
import shutil
import signal
import sys

import pytest
from full_disk import files_of_at_most
from rich.table import Table
from rich.text import Text

from xtoken_jax.cli.parser import main
from xtoken_jax.display.terminal import Terminal
from xtoken_jax.errors import printable
from xtoken_jax.evaluate.completions import chat_prompt
from xtoken_jax.tokens.tokenizer import Tokenizer

COMMANDS = ("distill", "audit", "project", "align", "evaluate", "generate", "export", "report", "cache")


@pytest.fixture
def run(words, tmp_path):
    """Arguments of a run of two steps."""
    return ["distill", *words, "train.steps=2", f"run_dir={tmp_path / 'run'}"]


def fails(capsys, arguments, *expected):
    """The command exits with 2 and says this in one line, without a traceback."""
    assert main([str(a) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("xtoken: ")
    assert error.count("\n") == 1, error
    for part in expected:
        assert part in error


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_says_what_to_type_next(capsys, name):
    with pytest.raises(SystemExit) as stop:  # argparse leaves by itself
        main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert any(word in out for word in ("example:", "next:", "experiment=quickstart"))


def test_the_bare_command_lists_all_commands_and_a_first_one(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert [name for name in COMMANDS if name not in out] == []
    assert "first: xtoken distill experiment=quickstart" in out


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("experiment=quickstrat", "did you mean quickstart?"),
        ("loss=pkl", "did you mean p_kl?"),
        ("train.stpes=3", "did you mean train.steps?"),
        ("+train.stpes=3", "did you mean train.steps?"),
        ("optimiser.learning_rate=1", "did you mean optimizer?"),
        ("data.train.mine.pth=x", "did you mean data.train.mine.path?"),
        ("train.steps.more=3", "is a single value"),
        ("train.steps=many", "train.steps: Value 'many'"),
        ("train.steps=0", "train.steps=0: must be at least 1"),
        ("loss.kind=pkl", "loss.kind: Invalid value 'pkl'"),
        ("loss.temperature=0", "loss.temperature=0.0: must be above 0"),
        ("student.dtype=bfloat16", "student.compute_dtype=bfloat16"),
        ("data.train.sums.wrong_share=2", "must be between 0 and 1"),
        ("quickstart", "not of the form key=value"),
        ("--fast", "unknown option --fast"),
        ("mesh.data=3", "do not multiply to the device count"),
        ("data.batch_size=3", "not a multiple of the 8 devices"),
    ],
)
def test_a_mistake_in_the_words(capsys, word, expected, run):
    fails(capsys, [*run, "data.train.sums.kind=arithmetic", word], expected)


def test_nothing_named(capsys):
    fails(capsys, ["distill"], "student.path: not given", "quickstart")


def test_a_further_teacher_that_is_not_there(capsys, run, tmp_path):
    expected = f"teachers.second: no such folder: {tmp_path / 'none'}"
    fails(capsys, [*run, "teachers.second.path=" + str(tmp_path / "none")], expected)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_mistake_in_a_folder(capsys, side, run, pair_folders, tmp_path):
    copy = tmp_path / "copy"

    def fresh():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(pair_folders[side == "teacher"], copy)
        return [*run, f"{side}.path={copy}"]

    fails(capsys, [*run, f"{side}.path={copy}"], f"{side}: no such folder: {copy}")
    for name, expected in (
        ("config.json", "config.json"),
        ("model.safetensors", "weights"),
        ("tokenizer.json", f"{side}: {copy}: no tokenizer.json"),
    ):
        words = fresh()
        (copy / name).unlink()
        fails(capsys, words, str(copy), expected)
    words = fresh()
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    fails(capsys, words, "MambaForCausalLM", "LlamaForCausalLM")
    words = fresh()
    (copy / "model.safetensors").write_bytes((copy / "model.safetensors").read_bytes()[:-100])
    fails(capsys, words, str(copy))


def test_a_tokenizer_larger_than_its_model(capsys, run, pair_folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(pair_folders[1], copy)
    shutil.copy(pair_folders[0] / "tokenizer.json", copy / "tokenizer.json")
    for side in ("teacher", "teachers.twin"):
        words = [*run, f"{side}.path={copy}"]
        fails(capsys, words, str(copy), "its tokenizer has 401 tokens but the model only 304")


def test_a_mistake_in_the_text(capsys, run, tmp_path):
    file = tmp_path / "bad.jsonl"
    words = [*run, f"data.train.text.path={file}"]
    fails(capsys, words, "no such file or folder", str(file))
    file.write_text("")
    fails(capsys, words, "holds no text")
    file.write_text('{"text": "1+1=2"}\n{"txet": "1+1=2"}\n')
    fails(capsys, words, f"{file}:2")
    file.write_text('{"text": "1+1=2"}\n')
    fails(capsys, words, "fills 1 rows", "data.batch_size=8")
    assert not (tmp_path / "run").exists()  # nothing was begun


def test_what_stands_in_the_way_of_a_runs_last_files_is_named(capsys, run, tmp_path):
    run = [*run, "loss=p_kl", "loss.learn_projection=true"]
    assert main(run) == 0
    capsys.readouterr()
    for name in ("projection.safetensors", "result.json"):
        path = tmp_path / "run" / name
        path.unlink()
        path.mkdir()
        fails(capsys, run, f"{path}: cannot be written (Is a directory)", "give the same command again")
        path.rmdir()
    assert (tmp_path / "run" / "projection.safetensors").is_file()  # by the second, which got that far


def test_a_run_ends_with_a_table_and_refuses_another_run_in_its_folder(capsys, run, tmp_path):
    folder = tmp_path / "run"
    assert main([*run, "baseline=true"]) == 0
    out = capsys.readouterr().out
    for part in (
        "teacher",
        "untouched",
        "without a teacher",
        "distilled",
        "bits/byte",
        "metrics.jsonl",
        "curves.png",
    ):
        assert part in out
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {"step", "loss", "ce", "kd", "kd_scale", "chunks"} <= set(rows[1])
    assert (folder / "curves.png").stat().st_size > 1000

    assert main(["evaluate", str(folder / "student"), "--json", "--length", "32"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] > 0
    (tmp_path / "a.txt").write_text("100 and 20")
    (tmp_path / "a.json").write_text('{"data": [{"body": "100 and 20"}]}')
    (tmp_path / "a.csv").write_text('n,body\n1,"100 and 20"\n')
    found = []
    for words in (
        ["a.txt"],
        ["a.json", "--source", "records=data", "field=body"],
        ["a.csv", "--source", "field=body"],
    ):
        data = ["--data", str(tmp_path / words[0]), *words[1:]]
        assert main(["evaluate", str(folder / "student"), "--json", "--length", "32", *data]) == 0
        found.append(json.loads(capsys.readouterr().out)["bits_per_byte"])
    assert found[1:] == found[:1] * 2
    fails(
        capsys,
        ["evaluate", folder / "student", "--source", "field=body"],
        "--source: sets how --data is read",
    )
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    ours, theirs = (tmp_path / "out" / "model.safetensors", folder / "student" / "model.safetensors")
    assert ours.read_bytes() == theirs.read_bytes()
    small = tmp_path / "small"
    words = ["--dtype", "bfloat16", "--max-shard-size", "20KB"]
    assert main(["export", str(folder), "--out", str(small), *words]) == 0
    assert (small / "model.safetensors.index.json").is_file()
    assert 0.4 < sum(p.stat().st_size for p in small.glob("model-*")) / ours.stat().st_size < 0.6
    capsys.readouterr()
    fails(capsys, ["export", folder, "--out", small, "--max-shard-size", "much"], "max_shard_size='much'")
    assert main(["report", str(folder)]) == 0
    capsys.readouterr()

    full = tmp_path / "full"
    with files_of_at_most(10_000):
        fails(capsys, ["export", folder, "--out", full], f"{full}: cannot be written (File too large)")
        fails(capsys, ["report", folder], "curves.png: cannot be written (File too large)")

    assert main(run) == 2
    assert "baseline=True there, False here" in capsys.readouterr().err
    fails(capsys, [*run, "train.steps=3", "baseline=true"], "train.steps=2 there, 3 here", "run_dir=")
    fails(
        capsys,
        ["export", folder, "--step", "7", "--out", tmp_path / "x"],
        "no checkpoint of step 7",
        "it has 2",
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    fails(capsys, [*run, f"run_dir={other}"], "not a run's folder")
    fails(capsys, ["report", other], "not a run")
    fails(capsys, ["export", folder, "--out", other / "thesis.txt" / "x"], "thesis.txt")
    fails(capsys, ["export", other, "--out", tmp_path / "x"], "not a run's folder")


def test_a_loss_that_is_not_finite_names_the_step_and_the_checkpoint(capsys, run, tmp_path):
    words = [*run, "train.steps=30", "train.save_every=1", "optimizer.learning_rate=1e30"]
    words += ["optimizer.warmup_steps=0", "train.evaluate_every=0"]
    fails(capsys, words, "the loss is", "last good checkpoint is", str(tmp_path / "run" / "checkpoints"))


def test_generate(capsys, pair_folders):
    words = ["generate", str(pair_folders[0]), "--prompt", "12+30="]
    assert main([*words, "--max-new-tokens", "5"]) == 0
    out, notes = capsys.readouterr()
    assert out.startswith("12+30=")
    assert "5 tokens, cut at --max-new-tokens" in notes
    more = ["--prompt", "The sum", "--max-new-tokens", "5", "--json"]
    assert main([*words, *more]) == 0
    greedy = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in greedy] == ["12+30=", "The sum"]
    assert greedy[0]["prompt"] + greedy[0]["text"] + "\n" == out
    assert [(len(row["tokens"]), row["finish"]) for row in greedy] == [(5, "length")] * 2
    end = next(letter for letter in greedy[1]["text"] if letter not in "\ufffd")
    assert main([*words, *more, "--stop", end]) == 0
    stopped = json.loads(capsys.readouterr().out)[1]
    assert stopped["finish"] == "stop"
    assert stopped["text"] == greedy[1]["text"].split(end)[0]
    sampled = []
    for seed in ("1", "1", "2"):
        assert main([*words, *more, "--temperature", "1.5", "--top-p", "0.9", "--seed", seed]) == 0
        sampled.append(json.loads(capsys.readouterr().out))
    assert sampled[0] == sampled[1] != sampled[2]
    assert main([*words, "--max-new-tokens", "200"]) == 0
    assert "the model was made for 128" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--temperature", "-1"], "temperature=-1.0"),
        (["--top-p", "0"], "top_p=0.0"),
        (["--max-new-tokens", "-3"], "max_new_tokens=-3"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
        (["--top-p", "0.9"], "--top-p 0.9: only read when tokens are sampled; add --temperature 1"),
        (["--batch-size", "0"], "batch_size=0"),
        (["--stop", ""], "none of them empty"),
    ],
)
def test_a_mistake_in_generate(capsys, pair_folders, words, expected):
    fails(capsys, ["generate", "nowhere", "--prompt", "x", *words], expected)  # before anything is loaded


def test_generate_answers_in_the_chat_template(capsys, pair_folders, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(pair_folders[0], folder)
    words = ["generate", folder, "--chat", "--prompt", "12+30=", "--max-new-tokens", "5", "--json"]
    fails(capsys, words, "no chat template")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<eos>{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<eos>answer:{% endif %}"
    )
    assert main(list(map(str, words))) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    # by hand: the same ids go in
    tokenizer = Tokenizer.load(str(folder))
    text, (eos,) = "user: 12+30=", tokenizer.markup_backend.encode("<eos>", add_special_tokens=False).ids
    between = [tokenizer.encode_batch([part])[0].tolist() for part in (text, "answer:")]
    assert chat_prompt(tokenizer, "12+30=") == [eos, *between[0], eos, *between[1]]
    assert answer["prompt"] == "12+30="
    assert len(answer["tokens"]) <= 5
    fails(capsys, [*words, "--prompt", "a <eos>"], "the prompt spells <eos>")


def test_generate_names_what_is_missing(capsys, pair_folders, tmp_path):
    fails(capsys, ["generate", tmp_path / "none", "--prompt", "x"], "no such folder")
    fails(capsys, ["generate", pair_folders[1], "--prompt", ""], "prompts[0] is empty")  # it has no BOS
    with pytest.raises(SystemExit) as stop:
        main(["generate", str(pair_folders[0])])
    assert stop.value.code == 2
    assert "--prompt" in capsys.readouterr().err


def test_audit_project_align(capsys, pair_folders, tmp_path):
    pair = ["--student", str(pair_folders[0]), "--teacher", str(pair_folders[1])]
    assert main(["audit", *pair]) == 0
    assert "recommended loss: p_kl" in capsys.readouterr().out
    assert main(["audit", *pair, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert next(c for c in found["classes"] if c["name"] == "2-digit numerals")["common"] == 0
    out = tmp_path / "w.safetensors"
    assert main(["project", *pair, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 401
    assert out.is_file()
    assert main(["align", *pair, "--text", "12+30=42", "--json"]) == 0
    chunks = json.loads(capsys.readouterr().out)
    assert chunks[0] == {"chunk": 0, "student": ["12"], "teacher": ["1", "2"], "exact": True}
    fails(capsys, ["align", *pair, "--file", tmp_path / "none.txt"], "cannot be read")
    fails(capsys, ["audit", "--student", tmp_path / "none", *pair[2:]], "no such folder")


@pytest.mark.parametrize(("kind", "name", "code"), [("SIGTERM", "SIGTERM", 0), ("SIGINT", "Ctrl-C", 130)])
def test_a_signal_outside_of_training_is_a_word_and_no_traceback(capsys, monkeypatch, run, kind, name, code):
    monkeypatch.setattr(
        "xtoken_jax.run.distill.distill", lambda *_: signal.raise_signal(getattr(signal, kind))
    )
    before = signal.getsignal(signal.SIGINT)
    assert main(run) == code
    assert capsys.readouterr().err == (
        f"xtoken: stopped by {name}: the same command goes on from the last checkpoint\n"
    )
    assert signal.getsignal(signal.SIGINT) is before


def test_a_panic_of_the_tokenizers_library_is_one_line(monkeypatch, capsys):
    class PanicException(BaseException):
        """As pyo3 raises it."""

    def fail(*_):
        raise PanicException("index out of bounds\nat line 3")

    monkeypatch.setattr("xtoken_jax.cli.report.run", fail)
    assert main(["report", "runs/x"]) == 2
    assert capsys.readouterr().err == (
        "xtoken: a tokenizer fails on this text (index out of bounds); use another\n"
    )


SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOp",
    "OPENAI_API_KEY": "sk-proj-1234567890-abcdefghijklmnop",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
    "PGPASSWORD": "hunter2hunter2",
    "GITHUB_TOKEN": "first-line-1234\nsecond-line-5678",
    "SIGNING_SECRET": "[/red]\x1b[2J secret",
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_of_the_environment_is_not_printed(name, capsys, monkeypatch, run, tmp_path):
    for one, value in SECRETS.items():
        monkeypatch.setenv(one, value)
    value = SECRETS[name]
    pieces = [value, *value.splitlines()] if "\n" in value else [value, value[:16]]
    for word in (f"train.steps=${{oc.env:{name}}}", f"teacher.path=${{oc.env:{name}}}"):
        assert main([*run, word]) == 2
        said = "".join(capsys.readouterr())
        assert said.startswith("xtoken: ")
        assert not any(piece in said for piece in pieces)
    assert main(["report", value]) == 2
    assert not any(piece in "".join(capsys.readouterr()) for piece in pieces)
    assert not (tmp_path / "run").exists()


def test_a_traceback_hides_secrets(monkeypatch, capsys, run):
    monkeypatch.setenv("HF_TOKEN", "hf_AbCdEfGhIjKlMnOp")
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # put back at the end

    def fail(*_):
        raise RuntimeError("401 for hf_AbCdEfGhIjKlMnOp/x \x1b[31m")

    monkeypatch.setattr("xtoken_jax.run.report.runs_and_sweeps", fail)
    with pytest.raises(RuntimeError) as error:
        main(["report", "x"])
    sys.excepthook(error.type, error.value, error.tb)
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == r"RuntimeError: 401 for [HF_TOKEN] \x1b[31m"
    assert "Traceback" in said


def test_ordinary_variables_are_not_hidden(monkeypatch):
    monkeypatch.setenv("XTOKEN_CACHE", "/scratch/cache")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", "/var/run/token")
    monkeypatch.setenv("HF_TOKEN", "none")
    text = "/scratch/cache disabled /var/run/token none\n\tx"
    assert printable(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x08\x7f", r"\x08\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("a\u202eb\u2066", r"a\u202eb\u2066"),
        ("[red]:smile:[/] \u200f日本", "[red]:smile:[/] \u200f日本"),
    ],
)
def test_control_characters_are_printed_as_escapes(text, expected, capsys, tmp_path):
    assert printable(text) == expected
    Terminal().print(text)
    table = Table()
    table.add_column(text)
    table.add_row(text)
    Terminal().print(table)
    out = capsys.readouterr().out
    assert out.count(expected) == 3
    Terminal().print(Text(text))
    assert printable(out := capsys.readouterr().out) == out
    fails(capsys, ["report", tmp_path / text.replace("/", "")], expected.replace("/", ""))


def test_a_planted_link_is_named_by_report_and_export(capsys, tmp_path):
    run, precious = tmp_path / "run", tmp_path / "bashrc"
    run.mkdir()
    precious.write_text("mine")
    (run / "metrics.jsonl").write_text('{"step": 1, "ce": 1.0}\n')
    (run / ".curves.png.partial").symlink_to("../bashrc")
    said = f"{run / '.curves.png.partial'}: is a link to ../bashrc, outside of {run}"
    fails(capsys, ["report", run], said)
    (run / "run.json").write_text("{}")
    fails(capsys, ["export", run, "--out", tmp_path / "out"], said)
    (run / ".curves.png.partial").unlink()
    assert main(["report", str(run)]) == 0
    assert precious.read_text() == "mine"
