"""Every family against what torch gave: hidden states, logits, written text; its files' round trip."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models import DecoderConfig, load_model, logits, read_config, save_weights
from xtoken_jax.models.generate import generate
from xtoken_jax.models.hf.families import FAMILIES

DATA = Path(__file__).parents[1] / "fixtures" / "tiny_families"
NAMES = sorted(path.name for path in DATA.iterdir() if path.is_dir())
WINDOWED = ["mistral", "ministral", "cwm", "qwen2_window", "phi3", "gemma2", "gemma3"]

load = functools.cache(lambda name: load_model(DATA / name))
expected_of = functools.cache(lambda name: dict(np.load(DATA / name / "expected.npz")))


@functools.partial(jax.jit, static_argnums=0)
def everything(model, params, tokens, mask):
    """Hidden states [L + 1, B, T, D] and logits [B, T, V]."""
    hidden, unembedding = model(params, tokens, mask=mask)
    return model.hidden_states(params, tokens, mask=mask), logits(
        hidden, unembedding, softcap=model.config.logit_softcap
    )


def test_every_family_has_a_model():
    there = {read_config(DATA / name).architecture for name in NAMES}
    assert there == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_logits_are_torchs(name):
    model, params = load(name)
    expected = expected_of(name)
    for side in ("whole", "right", "left"):
        tokens, mask = expected[f"{side}_tokens"], expected[f"{side}_mask"]
        hidden, values = everything(model, params, tokens, mask)
        real = mask[None, :, :, None]
        want, got = expected[f"{side}_hidden"] * real, hidden * real
        assert np.abs(want[1:]).max((1, 2, 3)).min() > 0.5
        np.testing.assert_allclose(got, want, atol=1e-4, err_msg=side)
        np.testing.assert_allclose(values * real[0], expected[f"{side}_logits"] * real[0], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_gives_what_whole_rows_give(name):
    """Token by token behind a prompt, padded on the left: the logits of whole rows."""
    model, params = load(name)
    if name == "phi4_long":  # the first tokens alone are on the other side of the switch: see generate
        model = dataclasses.replace(model, config=dataclasses.replace(model.config, rope_scaling=None))
    expected = expected_of(name)
    tokens, mask = expected["left_tokens"], expected["left_mask"]
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0).astype(np.int32)
    hidden, _ = jax.jit(model.__call__)(params, tokens, positions=positions, mask=mask)
    extend = jax.jit(
        lambda params, tokens, cache, positions, mask: model.extend(
            params, tokens, cache, positions=positions, mask=mask
        )
    )
    cache = model.init_cache(2, tokens.shape[1] + 3)
    found = []
    for cut in (slice(0, 8), slice(8, 9), slice(9, 16), *(slice(t, t + 1) for t in range(16, 24))):
        some, _, cache = extend(params, tokens[:, cut], cache, positions[:, cut], mask[:, cut])
        found.append(some)
    assert int(cache.filled) == 24
    found = np.concatenate(found, 1)
    np.testing.assert_allclose(found[mask], hidden[mask], atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_written_text_is_torchs(name):
    """64 tokens, greedily; with LongRoPE across the switch, behind which all is computed anew."""
    model, params = load(name)
    written = expected_of(name)["written"]
    prompts = written[:, :-64].tolist()
    found = generate(model, params, prompts, max_new_tokens=64, length_multiple=8)
    np.testing.assert_array_equal(found, written[:, -64:])


@pytest.mark.parametrize("name", WINDOWED)
def test_the_window_is_felt(name):
    model, params = load(name)
    expected = expected_of(name)
    whole = dataclasses.replace(model.config, sliding_window=100)
    arguments = (params, expected["whole_tokens"], expected["whole_mask"])
    within = everything(model, *arguments)[1]
    without = everything(dataclasses.replace(model, config=whole), *arguments)[1]
    assert np.abs(within - without).max() > 0.1
    window = model.config.sliding_window
    np.testing.assert_allclose(within[:, :window], without[:, :window], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [  # each family on one mesh; on all of them by hand
        pytest.param(name, shape, marks=() if number % 3 == place else pytest.mark.slow)
        for number, name in enumerate(NAMES)
        for place, shape in enumerate([(1, 2, 4), (8, 1, 1), (1, 1, 8)])
    ],
)
def test_any_mesh_gives_one_devices_logits(name, shape):
    model, params = load(name)
    tokens = np.tile(expected_of(name)["whole_tokens"], (4, 1))
    mask = np.arange(24)[None, :] >= np.arange(8)[:, None]
    _, alone = everything(model, params, tokens, mask)
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        _, values = everything(model, load_model(DATA / name, mesh=mesh)[1], tokens, mask)
    np.testing.assert_allclose(np.asarray(values)[mask], np.asarray(alone)[mask], atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_files_come_back_to_the_bit(name, tmp_path):
    model, params = load(name)
    save_weights(tmp_path, model, params, dtype="bfloat16")
    before, after = load_file(DATA / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    for key, value in before.items():
        np.testing.assert_array_equal(after[key].view(np.uint16), value.view(np.uint16), err_msg=key)
    assert model.config.to_hf() == json.loads((DATA / name / "config.json").read_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_config_is_written_in_full(name):
    """What no file says is put together anew, and read as the same."""
    config = dataclasses.replace(read_config(DATA / name), vocab_size=80, norm_eps=2e-6)
    hf = json.loads(json.dumps(config.to_hf()))
    assert hf["vocab_size"] == 80
    assert DecoderConfig.from_hf(hf) == config
    fresh = dataclasses.replace(config, source=None)
    assert DecoderConfig.from_hf(fresh.to_hf()) == config


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("qwen2", {"attention_bias": True}, ["attention_bias=true", "Qwen2ForCausalLM"]),
        ("gemma3", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping=50.0"]),
        ("gemma3", {"use_bidirectional_attention": True}, ["use_bidirectional_attention=true"]),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, ["chunked_attention", "sliding_attention"]),
        ("gemma3", {"layer_types": ["full_attention"] * 2}, ["2 entries for 3 layers"]),
        ("gemma3", {"layer_types": "all"}, ['layer_types="all" must be a list']),
        ("gemma3", {"sliding_window": None}, ["no sliding_window"]),
        ("gemma2", {"hidden_activation": "gelu"}, ['hidden_activation="gelu"', "gelu_pytorch_tanh"]),
        ("gemma2", {"final_logit_softcapping": 0}, ["logit_softcap=0"]),
        ("mistral", {"sliding_window": 0}, ["sliding_window=0"]),
        ("llama_biases", {"sliding_window": 8}, ["sliding_window=8"]),
        ("llama_biases", {"rope_local_base_freq": 1e4}, ["rope_local_base_freq"]),
        ("phi4", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, ["long_factor"]),
        (
            "phi4",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            ["short_factor has 1 numbers"],
        ),
        ("phi4", {"rope_parameters": {"rope_type": "yarn"}}, ["longrope", "short_factor"]),  # its old name
        ("phi4", {"rope_parameters": {"rope_type": "linear", "factor": 2}}, ['"linear"', "longrope"]),
        ("mistral", {"layer_types": ["full_attention"] * 3}, ["layer_types", "mistral", "ministral"]),
        ("gemma3", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, ["rope_parameters", "entry"]),
        ("gemma3", {"rope_scaling": {"type": "linear", "factor": 8.0}}, ["rope_type"]),
        ("gemma", {"hidden_activation": "silu"}, ['hidden_activation="silu"']),
        ("phi4", {"embd_pdrop": 0.1}, ["embd_pdrop=0.1"]),
        ("gemma2", {"num_hidden_layers": "two", "layer_types": None}, ['num_hidden_layers="two"']),
        ("qwen2_window", {"max_window_layers": "one", "layer_types": None}, ['max_window_layers="one"']),
        ("llama_linear", {"rope_parameters": {"rope_type": "linear", "factor": "4"}}, ['factor="4"']),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(name, change, words):
    hf = json.loads((DATA / name / "config.json").read_text())
    with pytest.raises(UserError) as caught:
        DecoderConfig.from_hf({**hf, **change})
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_older_spellings_are_the_same_model():
    """As the published files of Gemma 3, Phi-4-mini and Gemma 2 say it."""

    def older(name, drop, **keys):
        hf = json.loads((DATA / name / "config.json").read_text())
        config = DecoderConfig.from_hf(hf)
        assert DecoderConfig.from_hf({k: v for k, v in hf.items() if k not in drop} | keys) == config

    older(
        "gemma3", ["layer_types", "rope_parameters", "_sliding_window_pattern"], sliding_window_pattern=3,
        rope_theta=1000.0, rope_local_base_freq=50.0, rope_scaling={"rope_type": "linear", "factor": 8.0},
    )  # fmt: skip
    older(
        "phi4", ["rope_parameters"], rope_theta=100.0, partial_rotary_factor=0.75,
        rope_scaling={"type": "su", "short_factor": [1.0, 1.1, 1.5], "long_factor": [1.2, 2.5, 6.0]},
    )  # fmt: skip
    older("gemma2", ["layer_types"], cache_implementation="hybrid")
    older("qwen2_window", ["layer_types"])
