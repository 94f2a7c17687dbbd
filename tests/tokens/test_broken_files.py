"""Tokenizer files from anywhere: wrong types, absurd sizes and panics of the library are one line each."""

import json

import pytest

from xtoken_jax.errors import UserError
from xtoken_jax.tokens.backend import MAX_ID
from xtoken_jax.tokens.tokenizer import Tokenizer

from . import trained


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """Content of the two files of a small byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("intact")
    trained.save(folder, *trained.single_digits())
    return {
        name: json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")
    }


def refused(folder, intact, name, change):
    """The one line for a folder of which one file is changed."""
    for file, content in intact.items():
        content = json.loads(json.dumps(content))
        if file == name:
            change(content)
        (folder / file).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        Tokenizer.load(folder, compare_auto=False)
    message = str(error.value)
    assert message.startswith(f"{folder / name}: ")
    assert "\n" not in message
    assert "get the tokenizer's files again" in message
    return message


def put(*path):
    """A change that puts the last of the arguments at the path of the others."""
    *outer, last, value = path

    def change(content):
        for key in outer:
            content = content[key]
        content[last] = value

    return change


def added(**changes):
    token = {
        "id": 520, "content": "<x>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False,
    }  # fmt: skip
    return lambda content: content["added_tokens"].append({**token, **changes})


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
SHORT_CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "//////////8="}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
DEFINITIONS = {
    "no model": (lambda c: c.pop("model"), "it lacks a model with a vocabulary"),
    "no vocabulary": (lambda c: c["model"].pop("vocab"), "it lacks a model with a vocabulary"),
    "list of a model": (put("model", []), "it lacks a model"),
    "id of 10^8": (put("model", "vocab", "a", 10**8), "id 100000000, which must be a whole number"),
    "negative id": (put("model", "vocab", "a", -1), '"a" has the id -1, which must be'),
    "text as id": (put("model", "vocab", "a", "5"), '"a" has the id "5", which must be'),
    "id twice": (lambda c: c["model"]["vocab"].update(a=7, b=7), "have the same id 7"),
    "vocabulary of numbers": (put("model", "vocab", [1, 2]), "model: vocab="),
    "merges of three": (put("model", "merges", [["a", "b", "c"]]), "model: merges="),
    "merges of numbers": (put("model", "merges", [1]), "model: merges="),
    "list of a name": (put("model", "unk_token", ["<unk>"]), "model: unk_token="),
    "added id of 10^8": (added(id=10**8), "added_tokens[1]: id=100000000 must be a whole number"),
    "added id past the last": (added(id=MAX_ID + 1), "added_tokens[1]: id="),
    "added name of a list": (added(content=["<x>"]), 'added_tokens[1]: content=["<x>"] must be a string'),
    "added name empty": (added(content=""), 'added_tokens[1]: content="" must be a string that is not empty'),
    "added special": (added(special="yes"), 'added_tokens[1]: special="yes" must be true or false'),
    "added without content": (lambda c: c["added_tokens"].append({"id": 9}), "added_tokens[1] lacks content"),
    "added tokens of names": (put("added_tokens", ["<x>"]), "added_tokens="),
    "added tokens as object": (put("added_tokens", {"<x>": 1}), "added_tokens="),
    "normalizer of a list": (put("normalizer", []), "normalizer=[] must be an object, or null"),
    "unknown normalizer": (put("normalizer", {"type": "Rot13"}), "not a tokenizer that can be read"),
    # The library panics on these.
    "charsmap": (put("normalizer", CHARSMAP), "library fails on it"),
    "short charsmap": (put("normalizer", SHORT_CHARSMAP), "8 bytes and says"),
    "template": (put("post_processor", TEMPLATE), "library fails on it"),
    "prefix": (put("model", "continuing_subword_prefix", "##"), "("),
}  # fmt: skip


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_broken_definition_is_one_line(tmp_path, intact, name, capfd):
    change, words = DEFINITIONS[name]
    assert words in refused(tmp_path, intact, "tokenizer.json", change)
    assert capfd.readouterr().err == ""


SETTINGS = {
    "bos_token": (
        ["<s>"],
        'bos_token=["<s>"] must be a string or an object with a string as content, or null',
    ),
    "eos_token": ({"content": None}, "eos_token="),
    "add_bos_token": ("true", 'add_bos_token="true" must be true or false, or null'),
    "chat_template": (3, "chat_template=3 must be"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_of_another_type_is_one_line(tmp_path, intact, name):
    value, words = SETTINGS[name]
    assert words in refused(tmp_path, intact, "tokenizer_config.json", put(name, value))


def test_padding_and_truncation_of_the_file_are_not_used(tmp_path):
    """Rows of 10^9 tokens would take all memory."""
    tokenizer, config = trained.three_digits()
    tokenizer.enable_truncation(2)
    trained.save(tmp_path, tokenizer, config)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    padding = {
        "strategy": {"Fixed": 10**9},
        "direction": "Left",
        "pad_id": 1,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    path.write_text(json.dumps({**content, "padding": {**padding, "pad_to_multiple_of": None}}))
    loaded, plain = Tokenizer.load(tmp_path, compare_auto=False), trained.load(trained.three_digits)
    assert loaded.adds_bos
    assert loaded.encode("The cat sat on the mat").tolist() == plain.encode("The cat sat on the mat").tolist()


def test_a_setting_that_decides_on_bos_is_in_the_fingerprint(tmp_path):
    """`add_bos_token`, where it differs from tokenizer.json; `add_eos_token` decides nothing here."""

    def fingerprints(**settings):
        tokenizer, config = trained.three_digits()
        trained.save(tmp_path, tokenizer, {**config, **settings})
        loaded = Tokenizer.load(tmp_path, compare_auto=False)
        return loaded.adds_bos, loaded.file_fingerprint, loaded.fingerprint

    by_itself = fingerprints()
    assert by_itself[0]
    assert fingerprints(add_bos_token=True) == fingerprints(add_eos_token=True) == by_itself
    without = fingerprints(add_bos_token=False)
    assert not without[0]
    assert without[1] != by_itself[1]
    assert without[2] == by_itself[2]  # the same vocabulary


@pytest.mark.parametrize(
    "settings", [{"num_hidden_layers": 10**8}, {"text_config": {"n_layers": 10**30}}, "["]
)
def test_a_config_out_of_proportion_is_not_given_to_transformers(tmp_path, monkeypatch, settings):
    """It makes a list with an entry for each layer."""

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr("xtoken_jax.tokens.auto_tokenizer._difference", fail)
    trained.save(tmp_path, *trained.single_digits())
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "qwen2", "num_hidden_layers": 2}))
    with pytest.raises(AssertionError):
        Tokenizer.load(tmp_path)
    path.write_text(
        settings if isinstance(settings, str) else json.dumps({"model_type": "qwen2", **settings})
    )
    assert Tokenizer.load(tmp_path).warning is None


def test_a_normalizer_whose_type_the_library_infers_is_read(tmp_path):
    """The library reads a step without a type by its fields; it proves nothing about lengths of texts."""
    trained.save(tmp_path, trained.single_digits()[0], {"eos_token": "<|end|>"})
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text())
    path.write_text(json.dumps(definition | {"normalizer": {"prepend": "x"}}))
    assert Tokenizer.load(tmp_path).token_bytes.length_proves == "none"
