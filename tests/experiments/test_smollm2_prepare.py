"""The pure parts of experiments/smollm2 (weights, config, tokenizer, text), without network or gguf."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "smollm2"
HEADS, KV_HEADS, HEAD_DIM, WIDTH, FEED_FORWARD, LAYERS, VOCABULARY = 4, 2, 6, 24, 10, 2, 259

SENTENCES = ("The ship left harbour at noon. ", "Nobody on the quay had seen her captain. ", "It rained. ")


def module(name):
    """A module of the experiment's folder, which is not a package."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))


gguf_to_hf, english_text, downloads, prepare = map(
    module, ("gguf_to_hf", "english_text", "downloads", "prepare")
)


def permute(weight, heads):
    """What GGUF's converter does to q and k, written as a loop: halves of each head interleaved."""
    head_dim = weight.shape[0] // heads
    rows = []
    for head in range(heads):
        for i in range(head_dim // 2):
            rows += [head * head_dim + i, head * head_dim + head_dim // 2 + i]
    return weight[rows]


@pytest.fixture
def metadata():
    tokens = ["<|end|>", *sorted(ByteLevel.alphabet()), "he", "\u0120t"]
    return {
        "general.architecture": "llama",
        "llama.vocab_size": len(tokens),
        "llama.embedding_length": WIDTH,
        "llama.feed_forward_length": FEED_FORWARD,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.context_length": 64,
        "llama.rope.freq_base": 100000.0,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer.ggml.merges": ["h e", "\u0120 t"],
    }


@pytest.fixture
def tensors():
    """A tiny model as GGUF names it, q and k permuted as GGUF stores them."""
    rng = np.random.default_rng(0)
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        layer = {
            "attn_norm": (WIDTH,),
            "attn_q": (q, WIDTH),
            "attn_k": (kv, WIDTH),
            "attn_v": (kv, WIDTH),
            "attn_output": (WIDTH, q),
            "ffn_norm": (WIDTH,),
            "ffn_gate": (FEED_FORWARD, WIDTH),
            "ffn_up": (FEED_FORWARD, WIDTH),
            "ffn_down": (WIDTH, FEED_FORWARD),
        }
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_unpermute_is_the_inverse_of_the_permutation(heads):
    weight = np.arange(heads * HEAD_DIM * 5, dtype=np.float32).reshape(-1, 5)
    assert not np.array_equal(permute(weight, heads), weight)
    np.testing.assert_array_equal(gguf_to_hf.unpermute(permute(weight, heads), heads), weight)


def test_converted_tensors_are_complete_for_the_config(metadata, tensors):
    config = gguf_to_hf.llama_config(metadata, set(tensors))
    converted = gguf_to_hf.convert_tensors(tensors, heads=HEADS, kv_heads=KV_HEADS)
    shapes = {name: value.shape for name, value in converted.items()}
    assert gguf_to_hf.shape_problem(shapes, config) is None
    assert config["tie_word_embeddings"]
    assert config["rms_norm_eps"] == 1e-5
    key = converted["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(permute(key, KV_HEADS), tensors["blk.1.attn_k.weight"])
    np.testing.assert_array_equal(
        converted["model.layers.0.mlp.down_proj.weight"], tensors["blk.0.ffn_down.weight"]
    )


def test_a_missing_or_misshapen_tensor_is_named(metadata, tensors):
    config = gguf_to_hf.llama_config(metadata, set(tensors))
    expected = gguf_to_hf.expected_shapes(config)
    missing = {k: v for k, v in expected.items() if k != "model.norm.weight"}
    assert "model.norm.weight is missing" in gguf_to_hf.shape_problem(missing, config)
    assert "the config says" in gguf_to_hf.shape_problem(expected | {"model.norm.weight": (3,)}, config)


def test_an_untied_output_is_kept_and_an_unknown_tensor_refused(metadata, tensors):
    tensors["output.weight"] = tensors["token_embd.weight"]
    config = gguf_to_hf.llama_config(metadata, set(tensors))
    assert not config["tie_word_embeddings"]
    assert gguf_to_hf.expected_shapes(config)["lm_head.weight"] == (VOCABULARY, WIDTH)
    with pytest.raises(ValueError, match="no place"):
        gguf_to_hf.hf_name("blk.0.attn_q.bias")


def test_rope_scaling_is_refused(metadata):
    with pytest.raises(ValueError, match="RoPE scaling"):
        gguf_to_hf.llama_config(metadata | {"llama.rope.scaling.type": "linear"}, set())


def test_the_tokenizer_merges_splits_digits_and_knows_its_special_token(metadata):
    tokenizer = Tokenizer.from_str(json.dumps(gguf_to_hf.tokenizer_json(metadata)))
    assert tokenizer.get_vocab_size() == VOCABULARY
    assert tokenizer.encode("he the 12<|end|>").tokens == [
        *("he", "\u0120t", "he", "\u0120", "1", "2"),
        "<|end|>",
    ]
    text = "naïve 東京\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_merge_outside_the_vocabulary_is_refused(metadata):
    with pytest.raises(ValueError, match="merge"):
        gguf_to_hf.tokenizer_json(metadata | {"tokenizer.ggml.merges": ["x y"]})


def work(seed, characters):
    rng = np.random.default_rng(seed)
    text = f"Work {seed}. "
    while len(text) < characters:
        text += (
            SENTENCES[rng.integers(3)]
            + ("\n\n" if rng.random() < 0.2 else "")
            + str(rng.integers(10**6))
            + " "
        )
    return text


@pytest.mark.parametrize("characters", [100, 600, 2300, 30_000])
def test_documents_have_the_promised_lengths_and_keep_the_text(characters):
    text = work(1, characters)
    documents = english_text.split_work(text)
    assert all(500 <= len(document) <= 4000 for document in documents)
    kept = " ".join(" ".join(documents).split())
    assert " ".join(text.split()).startswith(kept)
    assert len(kept) >= len(" ".join(text.split())) - 500


def test_a_paragraph_without_breaks_is_cut():
    documents = english_text.split_work("a" * 9000)
    assert [len(document) for document in documents] == [4000, 4000, 1000]


def test_the_split_is_deterministic_and_disjoint_by_work():
    works = {f"w{i}": work(i, 9000) for i in range(12)}
    backwards = dict(reversed(works.items()))
    train, valid = english_text.split_sources({"s": english_text.Source(works, 60_000, 10_000)})
    assert (train, valid) == english_text.split_sources({"s": english_text.Source(backwards, 60_000, 10_000)})
    origin = {document: name for name, text in works.items() for document in english_text.split_work(text)}
    assert train
    assert valid
    assert {origin[document] for document in train}.isdisjoint(origin[document] for document in valid)
    assert sum(map(len, train)) < 60_000 + 4000
    assert sum(map(len, valid)) < 10_000 + 4000


def test_a_training_document_that_repeats_validation_is_left_out():
    shared = work(99, 3000)
    works = {"a": shared, "b": shared, "c": work(3, 3000)}
    train, valid = english_text.split_sources({"s": english_text.Source(works, 10**6, 1, frozenset("c"))})
    assert valid == english_text.split_work(shared)[:1]
    assert not set(train) & set(valid)
    assert set(english_text.split_work(works["c"])) <= set(train)


def test_a_finished_part_is_recognised_and_a_changed_file_is_not(tmp_path):
    file = tmp_path / "a.json"
    prepare.write_json(file, {"é": 1})
    record = {"options": {}, "files": {"a.json": {"sha256": downloads.sha256_of(file)}}}
    assert prepare.is_whole(tmp_path, record, {})
    assert not prepare.is_whole(tmp_path, record, {"student_layers": 2})
    file.write_text("{}")
    assert not prepare.is_whole(tmp_path, record, {})


def test_missing_npm_and_bad_sizes_are_one_line_errors(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads.shutil, "which", lambda name: None)
    assert prepare.main(["--out", str(tmp_path), "--only", "student"]) == 2
    assert capsys.readouterr().err.startswith("error: npm is missing: install Node.js")
    assert prepare.main(["--out", str(tmp_path), "--only", "student", "--student-heads", "5"]) == 2
    assert "hidden 192 must be heads 5 times" in capsys.readouterr().err
    assert not (tmp_path / "student.partial").exists()


def test_missing_pip_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1))
    assert prepare.main(["--out", str(tmp_path), "--only", "text"]) == 2
    assert "python -m ensurepip" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (
            ["ERROR: Could not find a version", "ERROR: No matching distribution"],
            "ERROR: No matching distribution",
        ),
        (
            ["npm error code E1", "npm error FetchError: refused", "npm error log"],
            "npm error FetchError: refused",
        ),
        (
            ["npm error code E404", "npm error 404 Not Found", "npm error log"],
            "npm error code E404; npm error 404 Not Found",
        ),
        ([], "no message"),
    ],
)
def test_the_reason_of_a_failed_download_is_one_line(lines, reason):
    assert downloads._reason(lines) == reason
