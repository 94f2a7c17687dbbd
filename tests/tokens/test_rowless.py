"""Special tokens without a row in the model's embedding, and those that must have one."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from xtoken_jax.tokens import tokenizer as under_test


def folder(path, *, rows, nested=False, eos="<end>", template=None, special=True):
    """A byte-level tokenizer with ids 0 to 255 for bytes, <end> 256, <pad> 257 and <picture> 258."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<end>", "<pad>")])
    backend.add_tokens([AddedToken("<picture>", special=special)])
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos, "pad_token": "<pad>"}))
    if rows is not None:
        config = {"vocab_size": rows}
        (path / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    if template is not None:
        (path / "chat_template.jinja").write_text(template)
    return under_test.Tokenizer.load(path, compare_auto=False)


@pytest.mark.parametrize("nested", [False, True])
def test_a_special_token_past_the_embedding_is_left_out(tmp_path, nested):
    tokenizer = folder(tmp_path, rows=258, nested=nested)
    assert tokenizer.size == 258
    assert tokenizer.roles == {"eos": 256, "pad": 257}
    for backend in (tokenizer.backend, tokenizer.markup_backend):  # spelled out, it is text everywhere
        ids = backend.encode("a <picture>", add_special_tokens=False).ids
        assert max(ids) < 258
        assert tokenizer.decode(ids) == "a <picture>"


def test_padding_past_the_embedding_is_replaced(tmp_path):
    tokenizer = folder(tmp_path, rows=257)
    assert (tokenizer.size, tokenizer.pad_id) == (257, 256)


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": None},  # a tokenizer without a model
        {"rows": 259},  # each id has its row
        {"rows": 258, "special": False},  # found in plain text
        {"rows": 258, "eos": "<picture>"},
        {"rows": 258, "template": "{{ '<picture>' }}{{ messages[0].content }}"},
        {"rows": 200},  # bytes without a row: another model's tokenizer
    ],
)
def test_tokens_that_can_occur_stay(tmp_path, changes):
    assert folder(tmp_path, **changes).size == 259
