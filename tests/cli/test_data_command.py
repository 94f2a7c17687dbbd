"""Data in the commands: conversations trained on and measured, and data that fails under way."""

import json
import re

import pytest

from xtoken_jax.cli.parser import main
from xtoken_jax.data import documents, encode

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"


def fails(capsys, words, *expected):
    """The command ends with one line and code 2."""
    capsys.readouterr()
    assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert [e for e in expected if e not in line] == []
    return line


@pytest.fixture
def run(words, tmp_path):
    common = ["loss=p_kl", "train.steps=2", "mesh.data=8", f"run_dir={tmp_path / 'run'}"]
    return ["distill", *words, *common]


def conversations(path, count=24):
    lines = []
    for n in range(count):
        asked = {"role": "user", "content": f"{n}+{n}?"}
        lines.append(json.dumps({"messages": [asked, {"role": "assistant", "content": f"{n}+{n}={2 * n}"}]}))
    path.write_text("\n".join(lines) + "\n")


def test_conversations_are_trained_on_and_measured(capsys, run, pair_folders, tmp_path):
    data = tmp_path / "chats.jsonl"
    conversations(data)
    words = [*run, f"data.train.text.path={data}", f"data.validation.text.path={data}"]
    fails(capsys, words, "no chat template for conversations", "student.chat_template", str(pair_folders[0]))
    template, other = tmp_path / "mine.jinja", tmp_path / "other.jinja"
    template.write_text(TEMPLATE)
    other.write_text(TEMPLATE.replace("[", "<|").replace("]", "|>"))
    words += [f"student.chat_template={template}", f"teacher.chat_template={other}"]
    assert main(words) == 0
    student = tmp_path / "run" / "student"
    assert (student / "chat_template.jinja").read_text() == TEMPLATE
    figures = json.loads((tmp_path / "run" / "result.json").read_text())["figures"]
    capsys.readouterr()
    assert main(["evaluate", str(student), "--data", str(data), "--length", "32", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert measured == pytest.approx(figures["distilled"]["text bits/byte"], rel=1e-4)
    other.write_text(TEMPLATE)
    fails(capsys, words, "teacher.chat_template", "resume.allow=")
    fails(capsys, [*words, f"student.chat_template={tmp_path}"], "cannot be read as a chat template")


def test_a_record_that_is_reached_late_ends_the_run_with_its_line(capsys, monkeypatch, run, tmp_path):
    monkeypatch.setattr(documents, "_READ_AHEAD", 4)
    monkeypatch.setattr(encode, "LITTLE", 0)
    data = tmp_path / "text.jsonl"  # that of `words`
    lines = data.read_text().splitlines()
    lines += lines[:5]  # the start of a run samples every few records, the middle one too
    data.write_text("\n".join([*lines, '{"text": 3}', *lines]) + "\n")
    valid = tmp_path / "valid.jsonl"
    valid.write_text(lines[0] + "\n")
    words = [*run, f"data.validation.text.path={valid}", "train.steps=60", "train.save_every=2"]
    line = fails(capsys, words, f"{data}:{len(lines) + 1}: 'text' holds int, not text")
    assert "Traceback" not in line
    steps = [int(n) for n in re.findall(r'"step": (\d+)', (tmp_path / "run" / "metrics.jsonl").read_text())]
    assert steps == sorted(steps)


def test_data_that_changes_while_it_is_read(capsys, monkeypatch, run, tmp_path):
    data = tmp_path / "text.jsonl"
    valid = tmp_path / "valid.jsonl"
    valid.write_text(data.read_text().splitlines()[0] + "\n")
    look_ahead = documents.Documents.look_ahead

    def and_then_it_grows(self):
        look_ahead(self)
        if len(self) > 1:
            data.write_text(data.read_text() + '{"text": "one more"}\n')

    monkeypatch.setattr(documents.Documents, "look_ahead", and_then_it_grows)
    line = fails(capsys, [*run, f"data.validation.text.path={valid}"], f"{data}: changed since it was opened")
    assert "put it back as it was" in line
