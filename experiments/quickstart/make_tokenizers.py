"""The three tokenizers of the quickstart: byte-level BPE, trained on Python's own documentation.

The teacher's splits numbers into single digits, as Qwen's does; the student's keeps numbers of
up to three digits whole, as Llama 3's does. So does that of the second teacher, which has more
merges and made them from other text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from xtoken_jax.data.formats.python_docs import docstrings, split_of, topics

STUDENT_SIZE, TEACHER_SIZE, ENGLISH_SIZE = 2304, 1280, 2560
NUMBERS = 1110  # 10 + 100 + 1000 numerals of one to three digits, leading zeros included
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
ENGLISH_END = "<|endoftext|>"


def numerals() -> list[str]:
    """Every numeral of one to three digits."""
    return [f"{n:0{digits}d}" for digits in (1, 2, 3) for n in range(10**digits)]


def train_tokenizer(
    texts: Sequence[str], *, digits: str, size: int, special: list[str], whole_numerals: bool
) -> Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
        texts: what the merges are made from.
        digits: the pattern that a run of digits is split by before merges.
        size: ids, special ones included.
        special: special tokens, which take the first ids.
        whole_numerals: show it every numeral often enough that each becomes a token.
    """
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(
        Regex(r"\r?\n|[^\r\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"), behavior="isolated"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digits), behavior="isolated"),
            words,
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Far more often than the last words to be merged.
    repeated = [" ".join(numerals())] * 1_000 if whole_numerals else []
    tokenizer.train_from_iterator([*texts, *repeated], trainer)
    if tokenizer.get_vocab_size() != size:
        raise SystemExit(f"wanted {size} tokens, training gave {tokenizer.get_vocab_size()}")
    missing = [n for n in numerals() if tokenizer.token_to_id(n) is None] if whole_numerals else []
    if missing:
        raise SystemExit(f"{len(missing)} numerals did not become tokens, among them {missing[:5]}")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, config: dict[str, object]) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n")


def make_student(folder: Path) -> None:
    """It opens a text with BOS; the teachers have none."""
    tokenizer = train_tokenizer(
        split_of(topics(), "train"),
        digits=r"\p{N}{1,3}",
        size=STUDENT_SIZE,
        special=[BEGIN, END],
        whole_numerals=True,
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    save(tokenizer, folder, {"bos_token": BEGIN, "eos_token": END, "add_bos_token": True})


def make_teacher(folder: Path) -> None:
    """Digits one by one."""
    tokenizer = train_tokenizer(
        split_of(topics(), "train"), digits=r"\p{N}", size=TEACHER_SIZE, special=[END], whole_numerals=False
    )
    save(tokenizer, folder, {"eos_token": END})


def make_english(folder: Path) -> None:
    """The second teacher's, from docstrings too: most of its merges are others than the student's."""
    tokenizer = train_tokenizer(
        split_of(topics(), "train") * 3 + split_of(docstrings(), "train"),  # about as much of each
        digits=r"\p{N}{1,3}",
        size=ENGLISH_SIZE,
        special=[ENGLISH_END],
        whole_numerals=True,
    )
    save(tokenizer, folder, {"eos_token": ENGLISH_END})
