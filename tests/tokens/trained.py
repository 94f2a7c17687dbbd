"""Small real tokenizers, trained in a moment and loaded as a user's would be."""

import functools
import json
import tempfile
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from xtoken_jax.tokens.tokenizer import Tokenizer, TokenizerPair

ENGLISH = [
    "The cat sat on the mat, and the dogs ran: 201 of them, then 222 more. It's 12:30!",
    "Hello world, hello there. In 1999 the théâtre cost 1234 euros; a café was naïve.",
    "def add(a, b):\n\treturn a + b  # sum\n\n\nfor i in range(10):\n    print(i)\r\n",
    "日本語のテキスト、日本の本。 Привет мир. 中文文本。",
] * 20
NUMERALS = [" ".join(f"{n:0{digits}d}" for digits in (1, 2, 3) for n in range(10**digits))]


def byte_level(digits, size, special, *, normalizer=None, numerals=False):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digits), behavior="isolated"),
            pre_tokenizers.Split(
                Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"),
                behavior="isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(ENGLISH + NUMERALS * (30 if numerals else 0), trainer)
    return tokenizer


def single_digits():
    """As Qwen: numbers fall into digits; EOS, no BOS."""
    return byte_level(r"\p{N}", 520, ["<|end|>"]), {"eos_token": "<|end|>"}


def three_digits():
    """As Llama 3: numerals of up to three digits are tokens; a text opens with BOS."""
    tokenizer = byte_level(r"\p{N}{1,3}", 1900, ["<|begin|>", "<|end|>"], numerals=True)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]),
        ]
    )
    return tokenizer, {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}}


def composing():
    """As Qwen 3: composes accents (NFC) before it splits."""
    return byte_level(r"\p{N}", 450, ["<|end|>"], normalizer=normalizers.NFC()), {"eos_token": "<|end|>"}


def sentencepiece():
    """As Llama 2: `▁` for a blank, one blank put in front, bytes for unknown characters, BOS and EOS."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))],
        limit_alphabet=70,
        show_progress=False,
    )
    words = [w + " " for line in ENGLISH for w in line.split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    definition = json.loads(tokenizer.to_str())
    # The trainer lists the bytes as special tokens; in real files they are ordinary pieces.
    definition["added_tokens"] = definition["added_tokens"][:3]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(definition))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def save(folder, tokenizer, config):
    """The two files that transformers writes."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@functools.cache
def load(make):
    with tempfile.TemporaryDirectory() as folder:
        save(folder, *make())
        return Tokenizer.load(folder)


def definition(tokenizer):
    """The content of its tokenizer.json."""
    return json.loads(tokenizer.backend.to_str())


def pair(student, teacher):
    return TokenizerPair(load(student), load(teacher))


def edited(make, edit):
    """The tokenizer with its tokenizer.json changed by `edit(definition)`."""
    tokenizer, config = make()
    definition = json.loads(tokenizer.to_str())
    edit(definition)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(definition))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config))
        return Tokenizer.load(folder)
