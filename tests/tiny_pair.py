"""A student and a teacher of a few thousand parameters with tokenizers that split numbers differently."""

import json
from pathlib import Path

import jax
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as token_models

from xtoken_jax.models.config import read_config
from xtoken_jax.models.decoder import Model
from xtoken_jax.models.hf.saving import save_weights

TEXT = "The sum of the numbers is written behind the sign of equality, as in 12+30=42 or 7+5=12.\n"


def tokenizer(digits: str, *, bos: bool, numerals: bool) -> Tokenizer:
    made = Tokenizer(token_models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digits), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    special = ["<bos>", "<eos>"] if bos else ["<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=460 if numerals else 320,
        special_tokens=[AddedToken(t, special=True) for t in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = [" ".join(f"{n:02d}" for n in range(100))] * 50 if numerals else []
    made.train_from_iterator([TEXT * 20, *numbers], trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return made


def write_model(folder: Path, made: Tokenizer, *, layers: int, bos: bool) -> None:
    """config.json, random weights, tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"))
    roles = {"bos_token": "<bos>", "eos_token": "<eos>"} if bos else {"eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": made.get_vocab_size() + 4,  # lm_heads are often wider than their tokenizer
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 128,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = Model(read_config(folder))
    rng = np.random.default_rng(layers)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            np.float32("norm" in jax.tree_util.keystr(path))
            + rng.normal(0, 0.1, leaf.shape).astype(np.float32)
        ),
        model.abstract(),
    )
    save_weights(folder, model, params)


def write_pair(root: Path) -> tuple[Path, Path]:
    """Folders of the student and of the teacher."""
    write_model(root / "student", tokenizer(r"\d{1,3}", bos=True, numerals=True), layers=1, bos=True)
    write_model(root / "teacher", tokenizer(r"\d", bos=False, numerals=False), layers=2, bos=False)
    return root / "student", root / "teacher"
