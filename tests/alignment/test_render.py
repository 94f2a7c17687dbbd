"""Chat templates render as in transformers, within limits that hostile ones meet."""

import os
import resource
import subprocess
import sys
import threading
import time

import pytest
from alignment.hostile_templates import HOSTILE
from tokens import trained

from xtoken_jax.alignment import template_process
from xtoken_jax.alignment.render import render
from xtoken_jax.alignment.template_process import TemplateError, render_in_process
from xtoken_jax.errors import UserError

CHAT = [{"role": "user", "content": "Hi"}]
VALUES = {"messages": CHAT, "tools": None, "add_generation_prompt": False}


def processor_seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="module")
def tokenizer():
    return trained.load(trained.three_digits)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_ends_with_one_line(kind, tokenizer, monkeypatch):
    # The limit itself is 4 s; what is tested is that it holds.
    monkeypatch.setattr(template_process, "SECONDS", 0.5)
    source, part = HOSTILE[kind]
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # The highest of all tests before; a new process counts with this one's memory until it runs its program.
    children = max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1.1
    before = processor_seconds()
    line = ""
    try:
        assert len(render(tokenizer, source, CHAT, lambda: "a.jsonl:7")) < 2_000_000
    except UserError as error:
        line = str(error)
    assert bool(line) or not part
    if line:
        assert line.startswith(f"a.jsonl:7: the chat template of {tokenizer.name} (")
        assert part in line
        assert "\n" not in line
        assert len(line) < 600
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - own < 50_000  # KiB
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss <= max(500_000, children)
    assert processor_seconds() - before < 10
    assert render(tokenizer, "{{ messages[0].content }}!", CHAT, str) == "Hi!"


@pytest.fixture(autouse=True)
def fresh_process(request):
    """Tests of limits start with a process of their own."""
    template_process.RENDERER.stop()
    yield
    template_process.RENDERER.stop()


def test_the_limits_grow_with_the_conversation():
    long = [{"role": "user", "content": "é\U0001f600" * 1_500_000}]
    values = {"messages": long, "eos": "."}
    text, ranges = render_in_process("{{ messages[0].content }}{{ eos }}", values, "2030-01-02")
    assert text == long[0]["content"] + "."
    assert ranges == []


def test_a_template_sees_no_environment_of_the_user(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    render_in_process("", VALUES, "2030-01-02")
    pid = template_process.RENDERER.process.pid
    with open(f"/proc/{pid}/environ", "rb") as file:
        assert b"hf_secret" not in file.read()


def test_threads_and_forks_share_nothing():
    answers = {}

    def ask(number):
        for _ in range(20):
            text, _ = render_in_process(f"{number}" * number, VALUES, "2030-01-02")
            answers.setdefault(number, set()).add(text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {number: {str(number) * number} for number in range(1, 5)}


def test_a_process_that_was_killed_is_started_again():
    render_in_process("", VALUES, "2030-01-02")
    process = template_process.RENDERER.process
    process.kill()
    process.wait()
    with pytest.raises(TemplateError, match="ends the process that renders it"):
        render_in_process("a", VALUES, "2030-01-02")
    assert render_in_process("a", VALUES, "2030-01-02") == ("a", [])


def test_the_process_ends_with_the_one_that_started_it():
    source = (
        "from xtoken_jax.alignment.template_process import render_in_process, RENDERER\n"
        "render_in_process('', {}, '2030-01-02')\nprint(RENDERER.process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    deadline = time.time() + 10
    while os.path.exists(f"/proc/{int(done.stdout)}") and time.time() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{int(done.stdout)}")
