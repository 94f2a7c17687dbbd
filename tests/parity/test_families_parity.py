"""Random models of every family against `transformers` on torch, both ways; run by `make test-parity`."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from xtoken_jax.export import export_hf  # noqa: E402
from xtoken_jax.models import load_model, logits  # noqa: E402
from xtoken_jax.models.generate import generate  # noqa: E402

MAKE = Path(__file__).parents[1] / "data" / "tiny_families" / "make.py"
spec = importlib.util.spec_from_file_location("make_families", MAKE)
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


def largest_errors(ours, params, theirs, seed):
    """Of hidden states and of logits, over whole and padded batches."""

    @jax.jit
    def run(params, tokens, mask):
        values = logits(*ours(params, tokens, mask=mask), softcap=ours.config.logit_softcap)
        return ours.hidden_states(params, tokens, mask=mask), values

    errors = np.zeros(2)
    for tokens, mask in make.batches(seed).values():
        with torch.no_grad():
            want = theirs(
                torch.tensor(tokens, dtype=torch.long),
                attention_mask=torch.tensor(mask, dtype=torch.long),
                output_hidden_states=True,
            )
        hidden, values = run(params, tokens, mask)
        states = torch.stack(want.hidden_states).numpy()
        found = np.abs(hidden - states)[:, mask].max(), np.abs(values - want.logits.numpy())[mask].max()
        errors = np.maximum(errors, found)
        assert np.abs(states).max() > 0.5
    return errors


def written_by(theirs, prompts):
    prompt = torch.tensor(prompts, dtype=torch.long)
    found = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, do_sample=False, pad_token_id=0
    )
    return found[:, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", make.CASES)
def test_a_transformers_folder_gives_the_same(name, tmp_path, record_property):
    theirs = make.build(name, seed=7)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if len(name) % 2 else "5GB")
    ours, params = load_model(tmp_path)
    errors = largest_errors(ours, params, theirs, seed=5)
    print(f"{name}: hidden {errors[0]:.1e}, logits {errors[1]:.1e}")
    assert errors.max() < 1e-4
    prompts = make.batches(5)["whole"][0][:, : make.PROMPT].tolist()
    assert generate(ours, params, prompts, max_new_tokens=64) == written_by(theirs, prompts)


@pytest.mark.parametrize("name", make.CASES)
def test_transformers_loads_an_export_with_the_same_logits(name, tmp_path):
    theirs = make.build(name, seed=8)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, params = load_model(tmp_path / "theirs")
    params = jax.tree.map(lambda x: x * 1.01, params)  # as if trained
    out = export_hf(tmp_path / "out", ours, params, tmp_path / "theirs")
    back, report = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True, attn_implementation="eager"
    )
    assert type(back) is type(theirs)
    assert {key: list(value) for key, value in report.items() if value} == {}
    assert largest_errors(ours, params, back.eval(), seed=6).max() < 1e-4


def test_the_language_model_of_one_that_sees_pictures(tmp_path):
    """Gemma 3 with pictures: its text part is read, the rest is left out, the export is the text model."""
    text = make.build("gemma3", seed=9).config.to_dict()
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = transformers.Gemma3ForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours, params = load_model(tmp_path / "theirs")
    tokens, mask = make.batches(3)["whole"]
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
        ).logits.numpy()
    found = logits(*ours(params, tokens, mask=mask))
    assert np.abs(np.asarray(found) - want).max() < 1e-4
    out = export_hf(tmp_path / "out", ours, params, tmp_path / "theirs")
    assert json.loads((out / "config.json").read_text())["architectures"] == ["Gemma3ForCausalLM"]
    back = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert largest_errors(ours, params, back, seed=4).max() < 1e-4
