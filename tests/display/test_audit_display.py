"""An audit on the terminal and as pictures, and the command that makes both."""

import io
import json
import warnings

import pytest
from matplotlib.image import imread
from matplotlib.text import Text
from rich.console import Console
from tokens import trained

import xtoken_jax
from xtoken_jax.cli.parser import main
from xtoken_jax.display.audit_pictures import draw_audit, draw_row
from xtoken_jax.display.audit_table import show_audit
from xtoken_jax.errors import UserError
from xtoken_jax.projection.build import build_projection


@pytest.fixture(scope="module")
def pair():
    return trained.pair(trained.three_digits, trained.single_digits)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pair")
    for make in (trained.three_digits, trained.single_digits):
        trained.save(root / make.__name__, *make())
    return ["--student", str(root / "three_digits"), "--teacher", str(root / "single_digits")]


def printed(audit, width=80):
    console = Console(file=io.StringIO(), width=width, highlight=False, soft_wrap=True)
    show_audit(audit, console)
    return console.file.getvalue()


def texts(figure):
    return [t.get_text() for t in figure.findobj(Text)]


def test_the_table(pair):
    text = printed(xtoken_jax.audit(pair, text="12 + 189 = 201 [bold]"))
    lines = [line.split() for line in text.splitlines()]
    assert ["●", "2-digit", "numerals", "100", "0", "0.0%", "0", "0"] in lines
    assert ["1-digit", "numerals", "10", "10", "100.0%", "10", "0"] in lines
    joined = [" ".join(line) for line in lines]
    assert any(t.startswith("● 3-digit numerals 123 → 1 0.90 + 2 0.09 + 3 0.01 ") for t in joined)
    assert "special: bos <|begin|> → nothing" in joined
    assert "the text: " in text
    assert "tokens that W sends nowhere: 1\n" in text
    assert "most often outside: 12 (1)   189 (1)   201 (1)" in text
    assert "recommended loss: p_kl; 2-digit numerals (0 of 100 common, " in text
    assert "Hangul" not in text  # no token, no row
    assert max(map(len, text.splitlines()[:-1])) <= 80


def test_a_critical_class_without_tokens_is_shown():
    text = printed(xtoken_jax.audit(trained.pair(trained.single_digits, trained.three_digits)))
    assert ["●", "3-digit", "numerals", "0"] in [line.split() for line in text.splitlines()]


def test_the_picture_of_an_audit(pair, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing glyph is one
        figure = draw_audit(xtoken_jax.audit(pair, critical_tokens=[" the"]), tmp_path / "new" / "a.png")
    height, width, _ = imread(tmp_path / "new" / "a.png").shape
    assert width == 1140
    assert height > 600
    shown = texts(figure)
    assert any(t.endswith("use P-KL") for t in shown)
    assert {"● 2-digit numerals", "0 of 100", "● ASCII punctuation", "words", "● named by you"} <= set(shown)
    assert "special, with a role" in shown


def test_the_picture_of_rows(pair, tmp_path):
    projection = build_projection(pair)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = draw_row(pair, projection, ["201", " the", "本", 0], tmp_path / "rows.png")
    shown = texts(figure)
    assert imread(tmp_path / "rows.png").shape[1] == 900
    assert {"201", "2", "0", "1", "0.901", "0.090", "0.009", "·the", "1.000"} <= set(shown)
    assert "nothing" in shown  # the student's BOS
    assert "本" in shown or "\\u672c" in shown  # as the fonts here allow
    # An arc is as wide as its weight.
    arcs = [patch.get_linewidth() for patch in figure.axes[0].patches]
    assert len(arcs) == 3 + 1 + 1
    assert arcs[0] > arcs[1] > arcs[2]


def test_rows_drawn_by_default(pair, tmp_path):
    shown = texts(draw_row(pair, build_projection(pair), None, tmp_path / "rows.png"))
    boxes = [t for t in shown if t.isdigit() and len(t) > 1]
    assert sorted(map(len, boxes)) == [2, 3]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("nine", "'nine' is no single token"),
        ([99999], "token 99999: the student has ids 0 to"),
        ([], "no token"),
    ],
)
def test_rows_that_cannot_be_drawn(pair, tmp_path, tokens, message):
    with pytest.raises(UserError, match=message):
        draw_row(pair, build_projection(pair), tokens, tmp_path / "rows.png")


def test_a_picture_that_cannot_be_written(pair, tmp_path):
    (tmp_path / "file").write_text("")
    audit = xtoken_jax.audit(pair)
    for path in (tmp_path / "file" / "a.png", tmp_path / "a.nonsense"):
        with pytest.raises(UserError, match="the picture cannot be written"):
            draw_audit(audit, path)


def test_the_command(folders, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "12 + 189 = 201"}) + "\n")
    (tmp_path / "critical.txt").write_text("the cat")
    words = ["audit", *folders, "--text-file", str(text), "--critical", " the", "201"]
    words += ["--critical-file", str(tmp_path / "critical.txt"), "--picture", str(tmp_path / "a.png")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert "● named by you" in out
    assert "the text: " in out
    assert (tmp_path / "a.png").is_file()
    assert (tmp_path / "a-rows.png").is_file()
    assert "a-rows.png" in err
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sample"][0]["outside_strict"] == 3
    assert found["named"]["size"] >= 3


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [
        ("--text-file", None, "no such file"),
        ("--text-file", b"\xff\xfe", "its encoding is UTF-16, and only UTF-8 is read"),
        ("--text-file", b"\xe9t\xe9", "not UTF-8"),
        ("--text-file", b" \n", "holds no text"),
        ("--critical-file", b"", "holds no text"),
    ],
)
def test_a_wrong_file_is_one_line(folders, tmp_path, capsys, option, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert main(["audit", *folders, option, str(path)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert str(path) in err
    assert len(err.strip().splitlines()) == 1


def test_a_critical_token_that_is_none_is_one_line(folders, capsys):
    assert main(["audit", *folders, "--critical", "12345"]) == 2
    err = capsys.readouterr().err
    assert "critical token '12345'" in err
    assert "it reads '123' + '45'" in err


@pytest.mark.parametrize(
    ("name", "content", "source"),
    [
        ("a.csv", 'id,body\n1,"100 and\n20"\n', ["field=body"]),
        ("a.json", '{"data": [{"body": "100 and\\n20"}]}', ["records=data", "field=body"]),
        ("a.txt", "100 and\n20\n", ["kind=text"]),
    ],
)
def test_text_of_every_format(folders, tmp_path, capsys, name, content, source):
    (tmp_path / "plain.txt").write_text("100 and\n20" + "\n" * (name == "a.txt"))
    (tmp_path / name).write_text(content)
    assert main(["audit", *folders, "--json", "--text-file", str(tmp_path / "plain.txt")]) == 0
    expected = capsys.readouterr().out
    assert main(["audit", *folders, "--json", "--text-file", str(tmp_path / name), "--source", *source]) == 0
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "field=body"], "--source: sets how --text-file is read, and there is none"),
        (["--text-file", "FILE", "--source", "fild=body"], "--source fild=body: "),
        (["--text-file", "FILE", "--source", "limit=few"], "--source limit=few: "),
        (["--text-file", "FILE", "--source", "delimiter=ab"], "--source.delimiter='ab': must be one ASCII"),
        (["--text-file", "FILE"], "which has 'body'; name the one to read with field="),
    ],
)
def test_settings_of_the_text_that_make_no_sense(folders, tmp_path, capsys, words, message):
    (tmp_path / "a.csv").write_text("body\nx\n")
    words = [str(tmp_path / "a.csv") if word == "FILE" else word for word in words]
    assert main(["audit", *folders, *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
