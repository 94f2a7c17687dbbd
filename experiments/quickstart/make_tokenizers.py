"""The two tokenizers of the quickstart: byte-level BPE, trained on Python's own documentation.

The teacher's splits numbers into single digits, as Qwen's does; the student's keeps numbers of
up to three digits whole, as Llama 3's does. Everything else is alike in kind and size.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from xtoken_jax.data.python_docs import split_of, topics

STUDENT_SIZE, TEACHER_SIZE = 2304, 1280
NUMBERS = 1110  # 10 + 100 + 1000 numerals of one to three digits, leading zeros included
BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


def numerals() -> list[str]:
    """Every numeral of one to three digits."""
    return [f"{n:0{digits}d}" for digits in (1, 2, 3) for n in range(10**digits)]


def train_tokenizer(*, digits: str, size: int, special: list[str], whole_numerals: bool) -> Tokenizer:
    """A byte-level BPE tokenizer.

    Args:
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
    texts = split_of(topics(), "train")
    if whole_numerals:
        # Far more often than the last words to be merged, so that each becomes a token.
        texts = texts + [" ".join(numerals())] * 1_000
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != size:
        raise SystemExit(f"wanted {size} tokens, training gave {tokenizer.get_vocab_size()}")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, config: dict[str, object]) -> None:
    """tokenizer.json and tokenizer_config.json, as transformers writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **config}, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n")


def make_tokenizers(student_folder: Path, teacher_folder: Path) -> None:
    """Train and write both; the student opens a text with BOS, the teacher has none."""
    student = train_tokenizer(
        digits=r"\p{N}{1,3}", size=STUDENT_SIZE, special=[BEGIN, END], whole_numerals=True
    )
    missing = [n for n in numerals() if student.token_to_id(n) is None]
    if missing:
        raise SystemExit(f"{len(missing)} numerals did not become tokens, among them {missing[:5]}")
    student.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, student.token_to_id(BEGIN))]
    )
    save(student, student_folder, {"bos_token": BEGIN, "eos_token": END, "add_bos_token": True})
    teacher = train_tokenizer(digits=r"\p{N}", size=TEACHER_SIZE, special=[END], whole_numerals=False)
    save(teacher, teacher_folder, {"eos_token": END})
