"""Random models of every family against `transformers` on torch, both ways; run by `make test-parity`."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from xtoken_jax.models import load_model, logits  # noqa: E402
from xtoken_jax.models.generate import generate  # noqa: E402
from xtoken_jax.models.hf.export import export_hf  # noqa: E402

MAKE = Path(__file__).parents[1] / "fixtures" / "tiny_families" / "make.py"
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


LINEAR, YARN = {"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}
PRETRAINED = {"original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **PRETRAINED}
PLAIN = {"rope_type": "default", "rope_theta": 50.0}
FACTORS = {key: make.LONGROPE[key] for key in ("short_factor", "long_factor")}
# family, rope keys of its config.json
ROPES = [
    ("qwen3", {"rope_scaling": LINEAR, "rope_parameters": PLAIN}),
    ("qwen3", {"rope_scaling": LINEAR, "rope_parameters": PLAIN, "rope_theta": 90.0}),
    ("qwen3", {"rope_scaling": {**LINEAR, "rope_theta": 70.0}, "rope_parameters": PLAIN, "rope_theta": 90.0}),
    ("qwen3", {"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 70.0}, "rope_theta": 90.0}),
    ("qwen3", {"rope_scaling": None, "rope_parameters": LINEAR, "rope_theta": 90.0}),
    ("qwen3", {"rope_scaling": {"type": "default"}, "rope_parameters": {**LINEAR, "rope_theta": 70.0}}),
    ("qwen3", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    ("qwen3", {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}}),
    ("qwen3", {"rope_scaling": {"rope_type": "default", "factor": 4.0}, "rope_theta": 90.0}),
    ("qwen3", {"rope_parameters": {}, "rope_theta": 90.0}),
    ("mistral", {"rope_scaling": LLAMA3, "rope_parameters": PLAIN, "rope_theta": 90.0}),
    ("ministral", {"rope_scaling": LINEAR, "rope_parameters": PLAIN}),
    ("seed_oss", {"rope_scaling": LINEAR, "rope_parameters": PLAIN, "rope_theta": 90.0}),
    ("gemma", {"rope_scaling": LINEAR, "rope_parameters": PLAIN}),
    ("cwm", {"rope_scaling": LINEAR}),
    ("cwm", {"rope_theta": 90.0}),
    ("cwm", {"rope_parameters": {}, "rope_theta": 90.0}),
    ("cwm", {"rope_scaling": None, "rope_parameters": None}),
    ("llama_biases", {"rope_scaling": {**YARN, **PRETRAINED}, "rope_theta": 90.0}),
    ("llama_biases", {"rope_scaling": YARN, "rope_theta": 90.0}),
    ("llama_biases", {"rope_scaling": {**YARN, **PRETRAINED}, "original_max_position_embeddings": 99}),
    ("llama_biases", {"rope_scaling": {**YARN, **PRETRAINED, "factor": None}, "rope_theta": 90.0}),
    ("llama_biases", {"rope_scaling": {**YARN, **PRETRAINED, "attn_factor": 0.8}}),
    ("llama_biases", {"rope_scaling": {**YARN, **PRETRAINED, "attention_factor": 0.7}}),
    ("llama_biases", {"rope_scaling": {**YARN, **PRETRAINED, "mscale": 2.0, "mscale_all_dim": 0.5}}),
    ("llama_biases", {"rope_scaling": {**YARN, **PRETRAINED, "mscale": 2.0}}),
    ("llama_biases", {"rope_scaling": {**YARN, **PRETRAINED, "beta_fast": 3, "beta_slow": 0.2}}),
    ("llama_biases", {"rope_scaling": {**YARN, **PRETRAINED, "truncate": False}, "rope_theta": 30.0}),
    ("llama_biases", {"rope_scaling": {"type": "yarn", "finetuned": True, "factor": 0.5, **PRETRAINED}}),
    ("gemma3", {"rope_theta": 900.0, "rope_local_base_freq": 40.0}),
    ("gemma3", {"rope_scaling": LINEAR, "rope_theta": 900.0, "rope_local_base_freq": 40.0}),
    ("gemma3", {"rope_scaling": LINEAR, "rope_theta": 900.0, "rope_parameters": make.GEMMA3_ROPE}),
    ("gemma3", {"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_theta": 40.0}}}),
    ("gemma3", {"rope_parameters": {"full_attention": {**YARN, **PRETRAINED}, "sliding_attention": None}}),
    ("phi4", {"rope_scaling": {"type": "su", **FACTORS, **PRETRAINED}, "rope_parameters": PLAIN,
              "original_max_position_embeddings": 40, "rope_theta": 90.0, "partial_rotary_factor": 0.75}),
    ("phi4", {"rope_scaling": {"type": "yarn", **FACTORS, **PRETRAINED}, "partial_rotary_factor": 0.75}),
    ("phi4", {"rope_parameters": {**make.LONGROPE, "original_max_position_embeddings": 99}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "keys"), ROPES)
def test_every_spelling_of_rope_is_read_as_transformers_does(name, keys, tmp_path):
    """The file as it stands, and our own config.json of it, which is written in full."""
    make.build(name, seed=7).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    hf = json.loads(path.read_text())
    hf = {key: value for key, value in hf.items() if key not in ("rope_parameters", "rope_theta")} | keys
    path.write_text(json.dumps(hf))
    ours, params = load_model(tmp_path)
    written = dataclasses.replace(ours.config, source=None).to_hf()
    for config in (hf, json.loads(json.dumps(written))):
        path.write_text(json.dumps(config))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, attn_implementation="eager"
        ).eval()
        assert largest_errors(ours, params, theirs, seed=5).max() < 1e-4


# text_config's own kind, and whether LLaVA's config.json ties the embeddings
@pytest.mark.parametrize(
    ("name", "tied"),
    [("llama_biases", False), ("llama_linear", True), ("mistral", False), ("qwen2_window", True)],
)
def test_the_language_model_of_llava(name, tied, tmp_path):
    text = make.build(name, seed=9).config
    text.tie_word_embeddings = tied
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
        patch_size=14,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=60, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    theirs = transformers.LlavaForConditionalGeneration(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "theirs", attn_implementation="eager"
    )
    ours, params = load_model(tmp_path / "theirs")
    assert ours.config.tie_embeddings == tied
    tokens, mask = make.batches(3)["left"]
    tokens = np.where(tokens == 60, 59, tokens)  # 60 stands for pictures
    with torch.no_grad():
        want = theirs(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
        ).logits.numpy()
    values = np.asarray(logits(*ours(params, tokens, mask=mask)))
    error = np.abs(values - want)[mask].max()
    print(f"llava with {name}: logits {error:.1e}")
    assert error < 1e-4
    out = export_hf(tmp_path / "out", ours, params, tmp_path / "theirs")
    back = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert type(back).__name__ == type(make.build(name)).__name__
    assert largest_errors(ours, params, back, seed=4).max() < 1e-4


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
