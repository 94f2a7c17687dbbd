"""What `xtoken align` prints."""

import io
import itertools
import json

import pytest
from rich.console import Console
from tokens import trained

from xtoken_jax.alignment.rows import with_document_marks
from xtoken_jax.alignment.spans import align_texts
from xtoken_jax.cli.parser import main
from xtoken_jax.display.alignment_table import columns, show_alignment


def folders(tmp_path, student=trained.three_digits, teacher=trained.single_digits):
    for name, make in (("student", student), ("teacher", teacher)):
        trained.save(tmp_path / name, *make())
    return ["--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher")]


def test_columns_follow_the_text():
    pair = trained.pair(trained.three_digits, trained.composing)
    (spans,) = align_texts(pair, ["201 e\u0301!"])
    marked = with_document_marks(pair, spans)
    found = columns(pair, marked)
    assert [c.kind for c in found] == ["gap", "several", "one", "differs", "gap", "one", "one"]
    assert found[0].student == ("<|begin|>",)
    assert found[0].teacher == ()
    assert (found[1].student, found[1].teacher) == (("201",), ("2", "0", "1"))
    assert [c.chunk for c in found] == [None, 0, 1, 2, None, 3, 4]
    for side, tokens in (("student", marked.student), ("teacher", marked.teacher)):
        assert sum(len(getattr(c, side)) for c in found) == len(tokens)


def test_gaps_of_either_side_are_shown():
    pair = trained.pair(trained.single_digits, trained.three_digits)
    (spans,) = align_texts(pair, ["201"])
    found = columns(pair, with_document_marks(pair, spans))
    assert [(c.kind, c.student, c.teacher) for c in found] == [
        ("gap", (), ("<|begin|>",)),
        ("several", ("2", "0", "1"), ("201",)),
        ("one", ("<|end|>",), ("<|end|>",)),
    ]


@pytest.mark.parametrize("width", [30, 60, 200])
def test_both_lines_of_a_row_are_as_wide(width):
    pair = trained.pair(trained.three_digits, trained.single_digits)
    (spans,) = align_texts(pair, ["12 + 189 = 201: 日本語のテキスト, the cat\n\tsat"])
    console = Console(width=width, record=True, highlight=False, file=io.StringIO())
    show_alignment(pair, spans, console)
    lines = console.export_text().splitlines()
    pairs = [(a, b) for a, b in itertools.pairwise(lines) if a.startswith("student ")]
    assert (len(pairs) > 1) == (width < 200)
    for student, teacher in pairs:
        assert teacher.startswith("teacher ")
        assert student.count("┃") == teacher.count("┃")
    assert "2┊0┊1" in " ".join(lines)
    assert "tokens in none" in lines[-1] or "in none" in " ".join(lines[-2:])


def test_align_command(tmp_path, capsys):
    pair = folders(tmp_path)
    assert main(["align", *pair, "--text", "12+30=42", "--marks"]) == 0
    output = capsys.readouterr()
    assert "<|begin|>┃12 ┃+┃30 ┃=┃42 ┃<|end|>┃" in output.out
    assert "1 tokens in none" in output.out
    assert "byte-level BPE" in output.err
    assert main(["align", *pair, "--text", "12+30", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows[0] == {"chunk": 0, "student": ["12"], "teacher": ["1", "2"], "exact": True}


def test_align_command_on_a_conversation(tmp_path, capsys):
    def chatting(make):
        def made():
            tokenizer, config = make()
            template = "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}{% endfor %}"
            return tokenizer, {**config, "chat_template": template}

        return made

    pair = folders(tmp_path, chatting(trained.three_digits), chatting(trained.single_digits))
    file = tmp_path / "chat.json"
    messages = [{"role": "user", "content": "12+30"}, {"role": "assistant", "content": "42"}]
    for content in (messages, {"messages": messages}):
        file.write_text(json.dumps(content))
        assert main(["align", *pair, "--chat", str(file), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert {"chunk": 3, "student": ["42"], "teacher": ["4", "2"], "exact": True} in rows
        assert rows[0]["chunk"] is None
    for content, message in (
        ("[", "not valid JSON"),
        ('{"role": "user"}', "neither a list"),
        ("3", "neither a list"),
    ):
        file.write_text(content)
        assert main(["align", *pair, "--chat", str(file)]) == 2
        assert message in capsys.readouterr().err
