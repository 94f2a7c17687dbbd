"""Chat templates in a run: the day they write stays the same, and the end of a turn is exported."""

import datetime
import io
import json

import pytest
from rich.console import Console

from xtoken_jax.cli.parser import main
from xtoken_jax.errors import UserError
from xtoken_jax.run.cache_teacher import cache_teacher
from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.teacher_cache.distributions import Keep
from xtoken_jax.teacher_cache.reader import INDEX_FILE
from xtoken_jax.tokens.tokenizer import Tokenizer

# The year alone: tests may then write another day of it into a cache.
TURNS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
TEMPLATE = "{{ strftime_now('%Y') }}" + TURNS
TODAY = datetime.date.today().isoformat()
EARLIER = datetime.date.today().replace(month=1 + datetime.date.today().month % 12, day=3).isoformat()


@pytest.fixture
def chats(words, tmp_path):
    """Words of a short run on conversations, with a template that writes the date."""
    data, template = tmp_path / "chats.jsonl", tmp_path / "dated.jinja"
    template.write_text(TEMPLATE)
    rows = [
        [{"role": "user", "content": f"{n}+{n}?"}, {"role": "assistant", "content": f"{2 * n}"}]
        for n in range(24)
    ]
    data.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    paths = [f"{side}.chat_template={template}" for side in ("student", "teacher")]
    sources = [f"data.{part}.text.path={data}" for part in ("train", "validation")]
    steps = ["train.steps=2", "train.save_every=1", "loss.kind=p_kl"]
    return [*words, *paths, *sources, *steps, f"run_dir={tmp_path / 'run'}"]


def output(words):
    console = Console(file=io.StringIO(), width=300)
    distill(load_experiment(words), console)
    return console.file.getvalue()


def edit(path, part, **values):
    content = json.loads(path.read_text())
    content[part] |= {key.replace("_", "."): value for key, value in values.items()}
    path.write_text(json.dumps(content))


def cached(words, out):
    keep = Keep(None, 1.0, "float32", (1.0,))
    cache_teacher(load_experiment(words), "teacher", keep, out, Console(file=io.StringIO()))


def test_a_run_resumes_with_the_day_it_began_with(chats, tmp_path):
    assert f"day      {TODAY}: " in output(chats)
    path = tmp_path / "run" / "run.json"
    assert json.loads(path.read_text())["contents"]["data.day"] == TODAY
    edit(path, "contents", data_day=EARLIER)
    assert f"day      {EARLIER}: " in output(chats)
    assert json.loads(path.read_text())["contents"]["data.day"] == EARLIER


def test_the_exported_student_ends_as_it_learnt_to(chats, tmp_path):
    assert "ends     <eos> (" in output(chats)
    student = tmp_path / "run" / "student"
    ends = json.loads((student / "config.json").read_text())["eos_token_id"]
    assert ends == Tokenizer.load(student, compare_auto=False).roles["eos"]
    begun = json.loads((tmp_path / "run" / "run.json").read_text())
    assert begun["ends"] == [ends]
    assert json.loads((student / "xtoken.json").read_text())["run"] == begun["id"]
    words = ["export", str(tmp_path / "run"), "--out"]
    assert main([*words, str(student), "--step", "1"]) == 0
    (student / "xtoken.json").unlink()
    assert main([*words, str(student)]) == 2
    assert main([*words, str(student), "--overwrite"]) == 0
    assert main([*words, str(tmp_path / "run"), "--overwrite"]) == 2


def test_the_start_counts_targets_and_what_was_skipped(chats, tmp_path):
    path, user = tmp_path / "chats.jsonl", {"role": "user", "content": "1+1"}
    with path.open("a") as file:
        file.write((json.dumps({"messages": [user]}) + "\n") * 3)
    words = [*chats, "train.steps=1", "data.student_length=64", "data.teacher_length=64"]
    text = output(words)
    line = next(line for line in text.splitlines() if line.startswith("targets"))
    counts = json.loads((tmp_path / "run" / "result.json").read_text())["text"]["text"]
    answer = 2  # a number below 100, and EOS
    assert counts["targets"] == 24 * answer
    assert counts["records"] == 27
    assert sum(counts["skipped"].values()) == 3
    assert line.startswith(
        f"targets  source 'text': {24 * answer:,} of {counts['tokens']:,} tokens are targets"
    )
    assert "skipped 3 of 27 records: 3 with nothing to learn" in line


def test_a_run_has_the_day_of_its_cache(chats, tmp_path):
    cached(chats, tmp_path / "cache")
    index = tmp_path / "cache" / INDEX_FILE
    assert json.loads(index.read_text())["made_of"]["data.day"] == TODAY
    edit(index, "made_of", data_day=EARLIER)
    cached(chats, tmp_path / "cache")  # the same cache on a later day
    words = [*chats, f"teacher.cache={tmp_path / 'cache'}"]
    assert f"day      {EARLIER}: " in output(words)
    edit(index, "made_of", data_day=TODAY)
    with pytest.raises(UserError, match=f"made of another data.day .{TODAY} there, {EARLIER} here"):
        output(words)


def test_a_template_that_writes_no_date_keeps_none(chats, tmp_path):
    (tmp_path / "dated.jinja").write_text(TURNS)
    assert "\nday " not in output(chats)
    path = tmp_path / "run" / "run.json"
    assert "data.day" not in json.loads(path.read_text())["contents"]
    (tmp_path / "dated.jinja").write_text(TEMPLATE)
    with pytest.raises(UserError, match=r"student\.chat_template=.*data\.day=None there"):
        output(chats)
