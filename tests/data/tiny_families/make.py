"""Makes tiny random models of every family beside this file, with the outputs of `transformers` on torch.

    python tests/data/tiny_families/make.py     # needs torch==2.13.0 and transformers>=5

Each folder holds config.json, model.safetensors and expected.npz: three batches of two texts, whole, padded
on the right and padded on the left; logits [B, T, V], hidden states [L + 1, B, T, D] (embeddings, each layer,
the last one behind the final norm), and 64 tokens written greedily behind a prompt. Texts are longer than
every sliding window; "phi4_long" is past the switch of its LongRoPE, "phi4" writes its way across it.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # large enough for attention and rotary positions to matter
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LENGTH, PAD, PROMPT, WRITTEN = 24, 6, 6, 64
SLIDING, FULL = "sliding_attention", "full_attention"
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.5],
    "long_factor": [1.2, 2.5, 6.0],
}
GEMMA3_ROPE = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 50.0},
}

# name -> class of transformers without "ForCausalLM", settings
CASES: dict[str, tuple[str, dict]] = {
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_linear": (
        "Llama",
        {
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0},
            "tie_word_embeddings": True,
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 12}),
    "mistral_whole": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3_biases": ("Qwen3", {"head_dim": 8, "attention_bias": True}),
    "phi3": ("Phi3", {"sliding_window": 9, "original_max_position_embeddings": 512}),
    "phi4": (
        "Phi3",
        {
            "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 40},
            "original_max_position_embeddings": 40,
            "tie_word_embeddings": True,
        },
    ),
    "phi4_long": (
        "Phi3",
        {
            "rope_parameters": {**LONGROPE, "original_max_position_embeddings": 16},
            "original_max_position_embeddings": 16,
        },
    ),
    "qwen3_yarn": (
        "Qwen3",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 50.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 2.0,
                "beta_slow": 0.5,
                "truncate": False,
            },
        },
    ),
    "ministral": (
        "Ministral",
        {"sliding_window": 7, "head_dim": 12, "layer_types": [FULL, SLIDING, SLIDING]},
    ),
    "cwm": (
        "Cwm",
        {
            "sliding_window": 5,
            "head_dim": 12,
            "mlp_bias": True,
            "layer_types": [FULL, SLIDING, SLIDING],
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "seed_oss": ("SeedOss", {"head_dim": 12, "attention_out_bias": True, "mlp_bias": True}),
    "gemma": ("Gemma", {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 10,
            "sliding_window": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 10,
            "sliding_window": 5,
            "layer_types": [SLIDING, SLIDING, FULL],
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
}


def build(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """A random model; its norms and biases are away from their start, too."""
    kind, settings = CASES[name]
    torch.manual_seed(100 * seed + sorted(CASES).index(name))
    config_class = (
        transformers.Gemma3TextConfig if kind == "Gemma3" else getattr(transformers, f"{kind}Config")
    )
    config = config_class(**{**SIZES, **settings})
    config._attn_implementation = "eager"  # the one that has soft caps
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            middle = 0.0 if kind.startswith("Gemma") else 1.0
            torch.nn.init.uniform_(parameter, middle - 0.5, middle + 0.5)
        elif parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batches(seed: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tokens and masks [2, LENGTH]; the second text is shorter where it is padded."""
    tokens = np.random.default_rng(seed).integers(3, SIZES["vocab_size"], (2, LENGTH)).astype(np.int32)
    found = {}
    for side, padding in {
        "whole": slice(0, 0),
        "right": slice(LENGTH - PAD, LENGTH),
        "left": slice(0, PAD),
    }.items():
        mask = np.ones(tokens.shape, bool)
        mask[1, padding] = False
        found[side] = np.where(mask, tokens, 0), mask
    return found


@torch.no_grad()
def outputs(model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """What is kept in expected.npz."""
    arrays = {}
    for side, (tokens, mask) in batches().items():
        found = model(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            output_hidden_states=True,
        )
        arrays |= {f"{side}_tokens": tokens, f"{side}_mask": mask, f"{side}_logits": found.logits.numpy()}
        arrays[f"{side}_hidden"] = torch.stack(found.hidden_states).numpy()
    prompt = torch.tensor(batches()["whole"][0][:, :PROMPT], dtype=torch.long)
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=WRITTEN, do_sample=False
    )
    return {**arrays, "written": written.numpy().astype(np.int32)}


def main() -> None:
    for name in sys.argv[1:] or CASES:
        folder = HERE / name
        build(name).to(torch.bfloat16).save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        arrays = outputs(model.eval())
        np.savez_compressed(folder / "expected.npz", **arrays)
        print(
            name, type(model).__name__, float(np.abs(arrays["whole_logits"]).max()), arrays["written"][0, -8:]
        )


if __name__ == "__main__":
    main()
