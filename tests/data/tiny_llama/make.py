"""Makes the tiny random Llamas beside this file, with the outputs that `transformers` on torch gives.

    python tests/data/tiny_llama/make.py        # needs torch==2.13.0 and transformers>=5

Each folder holds config.json, model.safetensors and expected.npz: three batches of the same two texts,
whole, padded on the right and padded on the left, with logits [B, T, V] and hidden states [B, T, D].
"""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,  # large enough for attention and rotary positions to matter
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# original length 64: of the four frequencies one is kept, one interpolated, two slowed by the factor
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LENGTH, PAD = 12, 4


def main() -> None:
    make("tied", torch.float32, num_hidden_layers=2, tie_word_embeddings=True, rms_norm_eps=1e-5)
    make("untied", torch.bfloat16, num_hidden_layers=2, head_dim=12)
    make("llama3", torch.float16, num_hidden_layers=3, rope_parameters={**LLAMA3, "rope_theta": 500.0})


def make(name: str, dtype: torch.dtype, **settings) -> None:
    torch.manual_seed(len(name))
    model = LlamaForCausalLM(LlamaConfig(**SIZES, **settings))
    for parameter_name, parameter in model.named_parameters():
        if "norm" in parameter_name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    folder = HERE / name
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.eval()

    tokens = np.random.default_rng(0).integers(3, SIZES["vocab_size"], (2, LENGTH)).astype(np.int32)
    arrays = {}
    for side, row in {
        "whole": slice(0, 0),
        "right": slice(LENGTH - PAD, LENGTH),
        "left": slice(0, PAD),
    }.items():
        mask = np.ones_like(tokens, dtype=bool)
        mask[1, row] = False
        padded = np.where(mask, tokens, 0).astype(np.int32)
        with torch.no_grad():
            out = model(
                torch.tensor(padded, dtype=torch.long),
                attention_mask=torch.tensor(mask, dtype=torch.long),
                output_hidden_states=True,
            )
        arrays |= {f"{side}_tokens": padded, f"{side}_mask": mask}
        arrays |= {f"{side}_logits": out.logits.numpy(), f"{side}_hidden": out.hidden_states[-1].numpy()}
    np.savez_compressed(folder / "expected.npz", **arrays)
    print(name, json.loads((folder / "config.json").read_text()))


if __name__ == "__main__":
    main()
