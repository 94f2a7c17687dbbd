"""One vocabulary, two ends of a text: the start warns, with the names and ids."""

import json

from tokens import trained

from xtoken_jax.run.teachers import different_ends
from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair


def load(folder, **settings):
    """The tokenizer with `<|begin|>` 0 and `<|end|>` 1."""
    tokenizer, config = trained.three_digits()
    trained.save(folder, tokenizer, config)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **settings}))
    return Tokenizer.load(folder, compare_auto=False)


def test_two_ends_of_one_vocabulary_are_named(tmp_path):
    student, teacher = load(tmp_path / "student"), load(tmp_path / "teacher", eos_token="<|begin|>")
    assert student.fingerprint == teacher.fingerprint
    warning = different_ends(TokenizerPair(student, teacher))
    assert "the student ends a text with <|end|> (id 1), the teacher with <|begin|> (id 0)" in warning
    assert "set the student's eos_token in tokenizer_config.json to <|begin|>" in warning
    assert "\n" not in warning
    assert different_ends(TokenizerPair(student, load(tmp_path / "same"))) is None
    assert different_ends(TokenizerPair(student, load(tmp_path / "none", eos_token=None))) is None
