"""Texts behind prompts: what opens them, what ends them, and how that is told."""

import json
import shutil

import jax
import numpy as np
import pytest

from xtoken_jax.errors import UserError
from xtoken_jax.evaluate.completions import complete, end_tokens
from xtoken_jax.models.generate import generate
from xtoken_jax.models.hf.loading import load_model
from xtoken_jax.tokens.tokenizer import Tokenizer

PROMPTS = ["12+30=", "The sum of the numbers", "é"]


@pytest.fixture(scope="module")
def loaded(pair_folders):
    model, params = load_model(pair_folders[0])
    return model, params, Tokenizer.load(pair_folders[0])


def test_a_prompt_opens_a_document_and_its_ending_is_told(loaded):
    model, params, tokenizer = loaded
    ids = [[tokenizer.roles["bos"], *tokenizer.encode(p).tolist()] for p in PROMPTS]
    expected = generate(model, params, ids, max_new_tokens=6, size=tokenizer.size)
    found = complete(model, params, tokenizer, PROMPTS, max_new_tokens=6)
    assert [list(c.tokens) for c in found] == expected
    assert [c.text for c in found] == [tokenizer.decode(np.array(new)) for new in expected]
    assert {c.finish for c in found} == {"length"}

    # an end token in the place of the last one that was asked for
    (ended,) = complete(model, params, tokenizer, PROMPTS[:1], max_new_tokens=6, eos_ids=expected[0][5:])
    cut = expected[0][: expected[0].index(expected[0][5])]
    assert (list(ended.tokens), ended.finish) == (cut, "eos")
    # a prompt of nothing but BOS; nothing asked for
    assert len(complete(model, params, tokenizer, [""], max_new_tokens=2)[0].tokens) == 2
    assert complete(model, params, tokenizer, [""], max_new_tokens=0)[0].text == ""


def test_a_stop_string_is_not_in_the_text(loaded):
    model, params, tokenizer = loaded
    common = {"max_new_tokens": 40, "temperature": 1.0, "key": jax.random.key(0)}
    whole = complete(model, params, tokenizer, PROMPTS, **common)
    stop = [next(letter for letter in whole[1].text[2:] if letter.isalnum())]
    found = complete(model, params, tokenizer, PROMPTS, **common, stop=stop)
    assert found[1].finish == "stop"
    for before, after in zip(whole, found, strict=True):
        assert after.text == before.text.split(stop[0])[0]
        assert after.tokens == before.tokens[: len(after.tokens)]
        assert (after.finish == "stop") == (stop[0] in before.text)


def test_end_tokens_come_from_all_that_name_them(loaded, pair_folders, tmp_path):
    model, _, tokenizer = loaded
    assert end_tokens(model.config, tokenizer, pair_folders[0]) == (tokenizer.roles["eos"],)
    folder = tmp_path / "model"
    shutil.copytree(pair_folders[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [7, 9]}))
    model, _ = load_model(folder)
    for named, expected in ((3, {3}), ([3, 11], {3, 11}), (None, set())):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        assert set(end_tokens(model.config, tokenizer, folder)) == {1, 7, 9} | expected
    (folder / "generation_config.json").write_text("[")
    with pytest.raises(UserError, match=r"generation_config\.json: .*not valid JSON"):
        end_tokens(model.config, tokenizer, folder)
