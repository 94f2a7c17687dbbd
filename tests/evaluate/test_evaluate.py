"""Bits per byte and exact match against counts made by hand."""

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xtoken_jax.data.arithmetic import Problem
from xtoken_jax.evaluate.accuracy import exact_match
from xtoken_jax.evaluate.bits_per_byte import bits_per_byte
from xtoken_jax.evaluate.rows import in_batches
from xtoken_jax.models.config import DecoderConfig
from xtoken_jax.models.decoder import Model, logits
from xtoken_jax.models.hf.loading import load_model
from xtoken_jax.tokens.tokenizer import Tokenizer


@dataclass(frozen=True)
class Follows(Model):
    """A model that gives each token's successor in a table all the probability."""

    def extend(self, params, tokens, cache, **_):
        return jax.nn.one_hot(params[tokens], len(params)) * 50.0, jnp.eye(len(params)), cache


@pytest.fixture(scope="module")
def tokenizer(pair_folders):
    return Tokenizer.load(pair_folders[0])


@pytest.fixture(scope="module")
def follows(tokenizer):
    return Follows(DecoderConfig(tokenizer.size + 4, 2, 1, 1, 1, 1, 2))


@pytest.fixture(scope="module")
def successors(tokenizer):
    """After "=" comes 42, after 42 the end of the line, after anything else "+"."""
    equals, answer, newline, plus = (int(tokenizer.encode(t)[0]) for t in ("=", "42", "\n", "+"))
    table = np.full(tokenizer.size + 4, plus, np.int32)
    table[equals], table[answer] = answer, newline
    return jnp.asarray(table)


def test_exact_match_counts_whole_answers(tokenizer, follows, successors):
    problems = [
        Problem("40+2=", "42"),
        Problem("1+1=", "2"),  # completed with 42
        Problem("41+1=", "4"),  # 42 only begins with it
        Problem("40+2", "42"),  # completed with "+"
        Problem("12+30=", "42"),
    ]
    assert exact_match(follows, successors, tokenizer, problems, batch_size=2) == 2 / 5


def test_exact_match_wants_the_answer_to_end_the_line(tokenizer, follows, successors):
    answer, plus = (int(tokenizer.encode(t)[0]) for t in ("42", "+"))
    runs_on = successors.at[answer].set(plus)
    assert exact_match(follows, runs_on, tokenizer, [Problem("40+2=", "42")], batch_size=1) == 0


@pytest.mark.parametrize("softcap", [None, 1.0])
def test_bits_per_byte_by_hand(pair_folders, tokenizer, softcap):
    model, params = load_model(pair_folders[0])
    model = replace(model, config=replace(model.config, logit_softcap=softcap))
    texts = ["12+30=42\n", "The sum of the numbers", "é"]
    rows = [np.concatenate([[0], tokenizer.encode(t), [1]]).astype(np.int32) for t in texts]
    bits = 0.0
    for row in rows:
        scores = np.asarray(logits(*model(params, jnp.asarray(row[None]))), np.float64)[
            0, :, : tokenizer.size
        ]
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        shifted = scores - scores.max(-1, keepdims=True)
        log_probabilities = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        bits -= sum(log_probabilities[p, row[p + 1]] for p in range(len(row) - 1)) / math.log(2)
    expected = bits / sum(len(t.encode()) for t in texts)
    for batch_size, length in ((1, 32), (2, 16), (8, 24)):
        found = bits_per_byte(model, params, tokenizer, rows, batch_size=batch_size, length=length)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_bits_per_byte_of_what_is_to_be_learnt(pair_folders, tokenizer):
    """Of a completion: as much as the whole costs more than the prompt, over its own bytes."""
    model, params = load_model(pair_folders[0])
    prompt, completion = "12+30=", "42\n"
    rows = [
        np.concatenate([[0], tokenizer.encode(text)]).astype(np.int32)
        for text in (prompt, prompt + completion)
    ]
    bits = [
        bits_per_byte(model, params, tokenizer, [row], batch_size=1, length=16) * len(text)
        for row, text in zip(rows, (prompt, prompt + completion), strict=True)
    ]
    targets = np.arange(len(rows[1])) >= len(rows[0])
    found = bits_per_byte(
        model,
        params,
        tokenizer,
        rows,
        batch_size=2,
        length=16,
        targets=[np.zeros(len(rows[0]), bool), targets],
    )
    np.testing.assert_allclose(found, (bits[1] - bits[0]) / len(completion), rtol=1e-4)


def test_rows_fill_the_last_batch():
    rows = [np.array([i]) for i in range(5)]
    batches = list(in_batches(rows, 2))
    assert [len(b) for b in batches] == [2, 2, 2]
    assert [r.tolist() for b in batches for r in b] == [[0], [1], [2], [3], [4], []]
