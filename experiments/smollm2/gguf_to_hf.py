"""A Llama-architecture GGUF file as the parts of an ordinary Hugging Face folder: config, weights, tokenizer.

The functions take plain dicts and numpy arrays, so that nothing here needs the `gguf` package; only
`read_gguf` imports it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NORMAL, CONTROL = 1, 3  # the GGUF token types that a byte-level BPE vocabulary may hold


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and dequantized tensors of a GGUF file.

    Returns:
        metadata: key -> Python value.
        tensors: GGUF name -> float32 [out, in] or [D].
    """
    import gguf
    from gguf.quants import dequantize

    reader = gguf.GGUFReader(str(path))
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {t.name: np.asarray(dequantize(t.data, t.tensor_type), np.float32) for t in reader.tensors}
    return metadata, tensors


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor.

    `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`.

    Raises:
        ValueError: a tensor that the plain Llama architecture does not have (a bias, an expert).
    """
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if match is None or match[2] not in LAYER_NAMES:
        raise ValueError(f"tensor {name!r} has no place in a plain Llama model")
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.weight"


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undoes GGUF's reordering of the rows of a q or k projection.

    GGUF interleaves the two halves of each head (its RoPE rotates neighbours), Hugging Face keeps them
    apart (its RoPE rotates row i with row i + head_dim / 2).

    Args:
        weight: [heads * head_dim, D].
        heads: query heads for q, key-value heads for k.

    Returns:
        [heads * head_dim, D], the same rows in Hugging Face's order.
    """
    rows, width = weight.shape
    paired = weight.reshape(heads, rows // heads // 2, 2, width)
    return paired.swapaxes(1, 2).reshape(rows, width)


def convert_tensors(tensors: Mapping[str, np.ndarray], *, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """All tensors under their Hugging Face names, q and k un-permuted."""
    converted = {}
    for name, value in tensors.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            value = unpermute(value, heads if "attn_q" in name else kv_heads)
        converted[hf_name(name)] = np.ascontiguousarray(value)
    return converted


def _shortest(value: float) -> float:
    """The shortest decimal that is this float32: 9.999999747378752e-06 was 1e-05 before it was stored."""
    return float(str(np.float32(value)))


def llama_config(metadata: Mapping[str, Any], tensor_names: set[str]) -> dict[str, Any]:
    """`config.json` from the GGUF metadata; only what GGUF does not store is a constant here.

    Raises:
        ValueError: not a Llama file, or one with a RoPE scaling that this conversion does not carry over.
    """
    if metadata["general.architecture"] != "llama":
        raise ValueError(f"architecture is {metadata['general.architecture']!r}, not 'llama'")
    scaling = sorted(key for key in metadata if key.startswith("llama.rope.scaling"))
    if scaling:
        raise ValueError(f"RoPE scaling is not supported: {scaling[0]}")
    heads = metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": metadata["llama.embedding_length"],
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": metadata["llama.rope.dimension_count"],
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": _shortest(metadata["llama.rope.freq_base"]),
        "rms_norm_eps": _shortest(metadata["llama.attention.layer_norm_rms_epsilon"]),
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
    }


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a Llama model with this config has; D width, F feed-forward."""
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (D,),
        "post_attention_layernorm": (D,),
        "self_attn.q_proj": (q, D),
        "self_attn.k_proj": (kv, D),
        "self_attn.v_proj": (kv, D),
        "self_attn.o_proj": (D, q),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    return shapes


def shape_problem(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> str | None:
    """The first tensor that is missing, superfluous or of another shape than the config says, in words."""
    expected = expected_shapes(config)
    for name in sorted(expected.keys() | shapes.keys()):
        if name not in shapes:
            return f"tensor {name} is missing"
        if name not in expected:
            return f"tensor {name} is not in the architecture"
        if tuple(shapes[name]) != expected[name]:
            return f"tensor {name} is {tuple(shapes[name])}, the config says {expected[name]}"
    return None


def tokenizer_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer.json` from the vocabulary, merges and token types of the GGUF metadata.

    GGUF stores the pre-tokenizer as a name only. `smollm` means: every digit alone, then GPT-2's byte-level
    pattern without a prefix space; no normalizer, and nothing is added around a text.

    Raises:
        ValueError: another pre-tokenizer, a token type that byte-level BPE does not have, a merge whose
            parts or result are not in the vocabulary.
    """
    kind = (metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer is {kind}, not ('gpt2', 'smollm')")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise ValueError("the vocabulary repeats a token or lacks token types")
    unknown = sorted(set(types) - {NORMAL, CONTROL})
    if unknown:
        raise ValueError(f"token type {unknown[0]} does not belong in a byte-level vocabulary")
    # Byte-level symbols hold no space, so the one space of a merge is its separator.
    merges = [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]]
    for parts in merges:
        if len(parts) != 2 or not {*parts, "".join(parts)} <= vocab.keys():
            raise ValueError(f"merge {parts} is not over the vocabulary")
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **special} for i, token in enumerate(tokens) if types[i] == CONTROL
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`tokenizer_config.json`: special tokens by id, the chat template, and a class that trusts the file.

    The class is `PreTrainedTokenizerFast`, which takes `tokenizer.json` as it stands; for a class of its own,
    such as `GPT2Tokenizer`, transformers may build another pre-tokenizer.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[metadata["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[metadata["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[metadata["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[metadata["tokenizer.ggml.padding_token_id"]],
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
