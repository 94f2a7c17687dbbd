"""The shipped models and a distilled student, as transformers on torch sees them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from xtoken_jax.models.decoder import logits
from xtoken_jax.models.hf.loading import load_model
from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import PACKAGE, load_experiment
from xtoken_jax.tokens.tokenizer import Tokenizer

pytestmark = pytest.mark.parity
ASSETS = PACKAGE / "assets" / "quickstart"
TEXT = "The remainder of a division, as in\n347%5=2\n128%10=8\nis smaller than the divisor."


def assert_equal_in_torch(folder):
    """Tokenizer ids and logits of a folder, here and in transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode(TEXT)
    assert AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"] == ids.tolist()
    model, params = load_model(folder)
    ours = logits(*model(params, jnp.asarray(ids[None])))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = reference(torch.tensor(ids[None], dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=1e-4)


@pytest.mark.parametrize("side", ["student", "teacher", "teacher_english"])
def test_the_shipped_models(side):
    assert_equal_in_torch(ASSETS / side)


def test_a_distilled_student(tmp_path):
    words = ["experiment=quickstart", "baseline=false", "train.steps=3", "train.evaluate_every=0"]
    experiment = load_experiment([*words, "data.batch_size=8", f"run_dir={tmp_path / 'run'}"])
    result = distill(experiment, Console(quiet=True))
    assert_equal_in_torch(result.student)
    before, _ = load_model(ASSETS / "student")
    config = json.loads((result.student / "config.json").read_text())
    assert config["vocab_size"] == before.config.vocab_size
    _, start = load_model(ASSETS / "student")
    _, end = load_model(result.student)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), start, end)))
