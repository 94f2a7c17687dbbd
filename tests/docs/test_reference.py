"""The generated pages are complete and up to date; every public name is on the API page."""

import dataclasses
import re

import pytest
from doc_scripts import DOCS, load

import xtoken_jax
from xtoken_jax.cli.parser import make_parser
from xtoken_jax.run.experiment import Experiment


@pytest.fixture(scope="module")
def generate():
    return load("generate")


@pytest.mark.parametrize("name", ["configuration.md", "commands.md", "api.md"])
def test_a_generated_page_is_up_to_date(generate, name):
    there = (DOCS / "reference" / name).read_text(encoding="utf-8")
    assert there == generate.PAGES[name](), f"{name} is old: run `python docs/generate.py`"


def test_every_key_is_listed_with_a_meaning(generate):
    page = generate.configuration()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `")]
    listed = {row[0].strip("|` "): row[-1].strip("| ") for row in rows}
    assert all(listed.values()), [key for key, meaning in listed.items() if not meaning]
    for key in (
        "name",
        "student.lora.rank",
        "teacher.cache",
        "loss.block",
        "mesh.tensor",
        "data.train.NAME.path",
    ):
        assert key in listed
    # What is linked instead of repeated.
    for key in ("teacher.*", "teachers.NAME.*", "teachers.NAME.loss.*", "data.validation.NAME.*"):
        assert "(#" in listed[key]
    assert "data.validation.NAME.path" not in listed
    for field in dataclasses.fields(Experiment):
        assert any(key.split(".")[0] == field.name for key in listed), field.name


def test_a_key_without_a_meaning_is_an_error(generate):
    @dataclasses.dataclass
    class Settings:
        """Settings.

        Attributes:
            known: has a meaning.
        """

        known: int = 1
        forgotten: int = 2

    with pytest.raises(ValueError, match=r"train\.forgotten: no meaning in the `Attributes:` of .*Settings"):
        list(generate.Keys().of(Settings, "train."))


def test_every_command_and_option_is_listed(generate):
    page = generate.commands()
    sections = dict(re.findall(r"## `xtoken ([\w-]+)`\n(.*?)(?=\n## |\Z)", page, re.DOTALL))
    _, parsers = make_parser()
    assert set(sections) == set(parsers)
    for command, parser in parsers.items():
        for action in generate.arguments(parser):
            for option in action.option_strings:
                assert f"`{option}`" in sections[command], (command, option)


def test_every_public_name_is_on_the_api_page_and_exists(generate):
    shown = re.findall(r"^::: xtoken_jax\.(\S+)$", generate.api(), re.MULTILINE)
    assert sorted(shown) == sorted(generate.public_names())
    for name in shown:
        module, _, last = name.rpartition(".")
        assert getattr(xtoken_jax.losses if module else xtoken_jax, last).__doc__, name


def test_a_public_name_without_a_topic_is_an_error(generate, monkeypatch):
    monkeypatch.setattr(generate, "public_names", lambda: ["align", "losses.new_loss"])
    with pytest.raises(ValueError, match=r"name a topic in API for the public names losses\.new_loss"):
        generate.api()
