"""Random Llamas against `transformers` on torch, in both directions; run by `make test-parity`."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from xtoken_jax.distributed.mesh import MeshConfig, make_mesh  # noqa: E402
from xtoken_jax.models import DecoderConfig, Llama3Scaling, Model, load_model, logits  # noqa: E402
from xtoken_jax.models.hf.export import export_hf  # noqa: E402

LENGTH = 40


def random_config(seed: int) -> DecoderConfig:
    """Sizes, grouping, head width, tying and rope settings drawn at random."""
    rng = np.random.default_rng(seed)
    kv_heads, groups, head_dim = rng.integers(1, 4), rng.integers(1, 4), 2 * rng.integers(2, 9)
    heads = int(kv_heads * groups)
    own_head_dim = rng.random() < 0.5
    scaling = Llama3Scaling(float(rng.choice([4, 8, 32])), 1.0, 4.0, int(rng.choice([16, 64, 256])))
    return DecoderConfig(
        vocab_size=int(rng.integers(50, 200)),
        hidden_size=int(heads * (rng.integers(5, 12) if own_head_dim else head_dim)),
        intermediate_size=int(rng.integers(20, 90)),
        num_layers=int(rng.integers(1, 5)),
        num_heads=heads,
        num_kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        norm_eps=float(rng.choice([1e-5, 1e-6])),
        rope_theta=float(rng.choice([1e2, 1e4, 5e5])),
        rope_scaling=scaling if rng.random() < 0.5 else None,
        tie_embeddings=bool(rng.random() < 0.5),
        initializer_range=0.15,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=None,
    )


def batch(config: DecoderConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens and mask [4, LENGTH]: one text whole, one padded on each side, one on both."""
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, (4, LENGTH)).astype(np.int32)
    mask = np.ones((4, LENGTH), bool)
    mask[1, 30:] = mask[2, :7] = mask[3, :3] = mask[3, 35:] = False
    return tokens, mask


def torch_logits(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        attend = torch.tensor(mask, dtype=torch.long)
        return model(torch.tensor(tokens, dtype=torch.long), attention_mask=attend).logits.numpy()


def jax_logits(model, params, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda *args: logits(*model(*args, mask=mask)))(params, tokens))


def randomize_norms(state: dict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, value in state.items():
        if "norm" in name:
            value.copy_(0.5 + torch.rand(value.shape, generator=generator))


def greedy(model, params, prompt: np.ndarray, count: int) -> list[int]:
    """The next `count` tokens, by a whole forward each."""
    forward = jax.jit(lambda params, tokens: logits(*model(params, tokens)))
    tokens = np.zeros((1, len(prompt) + count), np.int32)
    tokens[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + count):
        tokens[0, at] = int(jnp.argmax(forward(params, tokens)[0, at - 1]))  # later tokens are not seen
    return tokens[0].tolist()


def check_same(ours: Model, params, theirs, seed: int) -> None:
    tokens, mask = batch(ours.config, seed)
    expected = torch_logits(theirs, tokens, mask)[mask]
    error = float(np.abs(jax_logits(ours, params, tokens, mask)[mask] - expected).max())
    assert np.abs(expected).max() > 0.1  # there is something to compare
    assert error < 1e-4
    prompt = tokens[0, :8]
    written = theirs.generate(
        torch.tensor(prompt[None], dtype=torch.long),
        attention_mask=torch.ones(1, 8, dtype=torch.long),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
    )
    assert written[0].tolist() == greedy(ours, params, prompt, 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seed", range(4))
def test_a_transformers_folder_gives_the_same_logits(seed, dtype, tmp_path):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**random_config(seed).to_hf())
    written = transformers.LlamaForCausalLM(config)
    randomize_norms(written.state_dict(), seed)
    written.to(getattr(torch, dtype)).save_pretrained(tmp_path, max_shard_size="50KB" if seed % 2 else "5GB")
    ours, params = load_model(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    check_same(ours, params, theirs, seed)


@pytest.mark.parametrize("seed", range(4, 8))
def test_transformers_loads_an_export_with_the_same_logits(seed, tmp_path):
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    ours = Model(random_config(seed))
    with jax.set_mesh(mesh):
        params = jax.jit(ours.init, out_shardings=ours.param_shardings(mesh))(jax.random.key(seed))
    (tmp_path / "student").mkdir()
    size = "20KB" if seed % 2 else "5GB"
    out = export_hf(tmp_path / "out", ours, params, tmp_path / "student", max_shard_size=size)
    assert (out / "model.safetensors.index.json").is_file() == (size == "20KB")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert {key: list(value) for key, value in report.items() if value} == {}
    assert theirs.dtype == torch.float32
    check_same(ours, params, theirs.eval(), seed)


def test_transformers_saves_an_export_back_to_the_bit(tmp_path):
    data = Path(__file__).parents[1] / "fixtures" / "tiny_llama" / "llama3"
    model, params = load_model(data)
    out = export_hf(tmp_path / "out", model, params, data, dtype="bfloat16")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert theirs.dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "back")
    back, same = load_model(tmp_path / "back")
    assert back.config == load_model(out)[0].config
    assert json.loads((tmp_path / "back" / "config.json").read_text())["rope_parameters"]["factor"] == 8.0
    jax.tree.map(np.testing.assert_array_equal, same, load_model(out)[1])


def test_long_positions_keep_their_angles(tmp_path):
    """At 8,000 positions a float32 angle is off by 5e-4 radians, in torch as here: the same rounding."""
    config = random_config(1)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_hf())).eval()
    theirs.save_pretrained(tmp_path)
    ours, params = load_model(tmp_path)
    tokens, _ = batch(config, 0)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32)[None, :] * 200, tokens.shape)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), position_ids=torch.tensor(positions)).logits.numpy()
    hidden, unembedding = ours(params, tokens, positions=positions)
    error = float(np.abs(logits(hidden, unembedding) - expected).max())
    assert error < 1e-3
