"""The two regimes: tokenizers, text, and teachers, made once and kept in a work folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from xtoken_jax import TokenizerPair, align
from xtoken_jax.data.formats.python_docs import docstrings, split_of, topics
from xtoken_jax.losses import masked_mean, next_token_cross_entropy
from xtoken_jax.models.config import DecoderConfig
from xtoken_jax.models.decoder import Model, Params, logits

# Tokenizers and teachers of the results in results.jsonl; those of a work folder come before them.
ASSETS = Path(__file__).resolve().parent / "assets"
REGIMES = ("digits", "whole")
BOS, EOS = "<bos>", "<eos>"
NUMERALS = [f"{n:0{digits}d}" for digits in (1, 2, 3) for n in range(10**digits)]

SUMS, SUM_ROWS, ENGLISH_ROWS = 4, 16, 6  # sums in a row, and rows of a batch
STUDENT_LENGTH, TEACHER_LENGTH = 28, 52  # tokens of a row
BATCHES = 1000  # different ones; a run goes through them again, in its own order
HELD_OUT = 1000  # sums that no text has
ENGLISH_CHARACTERS = 84  # a row's


@dataclass(frozen=True)
class TeacherSetting:
    """How a regime's teacher is made: what a run of digits is split by, ids, and its training."""

    digits: str
    size: int
    layers: int
    steps: int
    rows: int


TEACHERS = {
    "digits": TeacherSetting(r"\p{N}", 640, 3, 2500, 24),
    "whole": TeacherSetting(r"\p{N}{1,3}", 1700, 2, 5000, 32),
}
STUDENT_SIZE, WIDTH = 1500, 128


def make_tokenizer(folder: Path, digits: str, size: int, texts: list[str]) -> None:
    """A byte-level BPE tokenizer that splits runs of digits by a pattern, as a Hugging Face folder."""
    made = Tokenizer(models.BPE())
    words = Regex(r"\n|[^\n\p{L}\p{N}]?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digits), behavior="isolated"),
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = [" ".join(NUMERALS)] * 2000 if digits != r"\p{N}" else []
    made.train_from_iterator(texts + numbers, trainer)
    missing = [n for n in NUMERALS if numbers and made.token_to_id(n) is None]
    if made.get_vocab_size() != size or missing:
        raise SystemExit(
            f"{folder}: {made.get_vocab_size()} of {size} tokens, {len(missing)} numerals missing"
        )
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, made.token_to_id(BOS))]
    )
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def pair_of(work: Path, regime: str) -> TokenizerPair:
    """The student's and the regime's tokenizer; written first where they are not there."""
    made = [ASSETS / name for name in ("student", f"teacher-{regime}")]
    folders = work / "student", work / f"teacher-{regime}"
    if not any(folder.is_dir() for folder in folders) and all(folder.is_dir() for folder in made):
        return TokenizerPair.load(*made)
    if not (folders[0] / "tokenizer_config.json").is_file():
        make_tokenizer(folders[0], r"\p{N}{1,3}", STUDENT_SIZE, split_of(topics(), "train"))
    if not (folders[1] / "tokenizer_config.json").is_file():
        teacher = TEACHERS[regime]
        make_tokenizer(folders[1], teacher.digits, teacher.size, split_of(docstrings(), "train"))
    return TokenizerPair.load(*folders)


def model_of(size: int, layers: int) -> Model:
    """A decoder of the study's width."""
    return Model(
        DecoderConfig(
            vocab_size=size, hidden_size=WIDTH, intermediate_size=3 * WIDTH, num_layers=layers, num_heads=4,
            num_kv_heads=4, head_dim=WIDTH // 4, tie_embeddings=True, initializer_range=0.05,
        )
    )  # fmt: skip


def sums(rng: np.random.Generator, count: int) -> np.ndarray:
    """int [count, 2]: operands of three digits whose sum has three; none is held out."""
    held = held_out()
    found = np.zeros((0, 2), np.int64)
    while len(found) < count:
        a, b = rng.integers(100, 900, (2, 2 * count))
        keep = (a + b < 1000) & ~np.isin(1000 * a + b, held)
        found = np.concatenate([found, np.stack([a, b], 1)[keep]])
    return found[:count]


def held_out() -> np.ndarray:
    """1000 a + b of the sums to be asked, rising."""
    a, b = np.random.default_rng(99).integers(100, 900, (2, 4 * HELD_OUT))
    keys = (1000 * a + b)[a + b < 1000]
    _, first = np.unique(keys, return_index=True)
    return np.sort(keys[np.sort(first)[:HELD_OUT]])


def lines(operands: np.ndarray, results: np.ndarray) -> list[str]:
    """Rows of `SUMS` lines such as "123+456=579"."""
    single = [f"{a}+{b}={c}\n" for (a, b), c in zip(operands.tolist(), results.tolist(), strict=True)]
    return ["".join(single[i : i + SUMS]) for i in range(0, len(single), SUMS)]


def english(split: str) -> list[str]:
    """Pieces of documentation, cut at blanks."""
    pieces = []
    for text in split_of(topics(), split):
        words = text.split(" ")
        piece = ""
        for word in words:
            if piece and len(piece) + len(word) > ENGLISH_CHARACTERS:
                pieces.append(piece)
                piece = ""
            piece += word + " "
    return pieces


def texts(wrong_share: float) -> list[str]:
    """The rows of all batches, sums before English in each."""
    rng = np.random.default_rng(5)
    rows = BATCHES * SUM_ROWS
    operands = sums(rng, rows * SUMS)
    results = operands.sum(1)
    # Of the wrong results none is right by chance.
    other = 200 + (results - 200 + rng.integers(1, 799, len(results))) % 799
    results = np.where(rng.random(len(results)) < wrong_share, other, results)
    of_sums = lines(operands, results)
    pieces = english("train")
    chosen = [pieces[i] for i in rng.permutation(len(pieces) * 9)[: BATCHES * ENGLISH_ROWS] % len(pieces)]
    return [
        row
        for batch in range(BATCHES)
        for row in (
            *of_sums[batch * SUM_ROWS : (batch + 1) * SUM_ROWS],
            *chosen[batch * ENGLISH_ROWS : (batch + 1) * ENGLISH_ROWS],
        )
    ]


def targets_of(ids: np.ndarray, eos: int) -> np.ndarray:
    """bool, real tokens up to the first EOS; the rest of a row is padding, which has its id."""
    is_end = ids == eos
    return np.cumsum(is_end, axis=1) - is_end == 0


def numeral_ids(tokenizer) -> np.ndarray:
    """int [900]: the tokens of 100 to 999."""
    return np.concatenate(tokenizer.encode_batch([str(n) for n in range(100, 1000)]))


def waves() -> np.ndarray:
    """float32 [900, WIDTH]: 100 to 999 as cosines and sines, in which sums are easy to learn.

    From random vectors a model of this size takes hours to learn to add numbers that are whole tokens.
    """
    periods = np.concatenate(
        [[10, 100, 1000, 20, 50, 200, 500, 5, 2000], 10 ** np.linspace(0.5, 3, WIDTH // 2 - 9)]
    )
    angles = 2 * np.pi * np.arange(100, 1000)[:, None] / periods
    size = np.tile(np.where(periods <= 20, 0.2, 0.08), 2)
    return size * np.concatenate([np.cos(angles), np.sin(angles)], axis=1, dtype=np.float32)


def train_teacher(work: Path, regime: str, report) -> tuple[Model, Params]:
    """The regime's teacher, on right sums and English; trained once."""
    setting, pair = TEACHERS[regime], pair_of(work, regime)
    model = model_of(setting.size, setting.layers)
    path = work / f"teacher-{regime}.npz"
    struct = jax.tree.structure(model.abstract())
    found = next((p for p in (path, ASSETS / path.name) if p.is_file()), None)
    if found is not None:
        with np.load(found) as file:
            return model, jax.tree.unflatten(struct, [file[f"a{i}"] for i in range(len(file.files))])
    rng = np.random.default_rng(1)
    pieces, tokenizer = english("train"), pair.teacher
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, setting.steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.05))
    params = model.init(jax.random.key(7))
    if regime == "whole":
        params["embedding"] = params["embedding"].at[numeral_ids(tokenizer)].set(waves())
    state = optimizer.init(params)
    eos = tokenizer.roles["eos"]

    @jax.jit
    def step(params, state, ids, targets):
        def loss(params):
            z = logits(*model(params, ids))
            return masked_mean(*next_token_cross_entropy(z, ids, targets))

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    bos = tokenizer.roles["bos"]
    for number in range(setting.steps):
        operands = sums(rng, setting.rows * SUMS)
        rows = lines(operands, operands.sum(1))
        rows += [pieces[i] for i in rng.integers(len(pieces), size=setting.rows // 8)]
        ids = np.full((len(rows), TEACHER_LENGTH), eos, np.int32)
        for place, encoded in enumerate(tokenizer.encode_batch(rows)):
            marked = np.concatenate([[bos], encoded, [eos]])[:TEACHER_LENGTH]
            ids[place, : len(marked)] = marked
        if regime == "whole":
            ids = ids[:, :STUDENT_LENGTH]
        params, state, value = step(params, state, ids, targets_of(ids, eos))
        if number % 250 == 249:
            report(f"teacher {regime}: step {number + 1}, cross-entropy {float(value):.3f}")
    np.savez(
        path.with_suffix(".tmp.npz"),
        **{f"a{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(params))},
    )
    path.with_suffix(".tmp.npz").replace(path)
    return model, params


def answers(model: Model, params: Params, tokenizer, operands: np.ndarray) -> list[str]:
    """What a model writes behind "a+b=", greedily, up to the end of the line."""
    prompts = tokenizer.encode_batch([f"{a}+{b}=" for a, b in operands.tolist()])
    ids = np.array([[tokenizer.roles["bos"], *p] for p in prompts], np.int32)

    @jax.jit
    def following(params, ids):
        return logits(*model(params, ids))[:, -1, : tokenizer.size].argmax(-1)

    for _ in range(4):
        ids = np.concatenate([ids, np.asarray(following(params, ids), np.int32)[:, None]], axis=1)
    start = 1 + len(prompts[0])
    written = [tokenizer.token_bytes.join(row[start:]).decode("utf-8", "replace") for row in ids]
    return [text.split("\n")[0] for text in written]


def accuracy(model: Model, params: Params, tokenizer) -> dict[str, float]:
    """Share of the held-out sums that are right, and of their first, second and third digits."""
    keys = held_out()
    operands = np.stack([keys // 1000, keys % 1000], 1)
    wanted = [str(a + b) for a, b in operands.tolist()]
    written = answers(model, params, tokenizer, operands)
    figures = {"sum": np.mean([w == x for w, x in zip(written, wanted, strict=True)])}
    for place in range(3):
        same = [w[place : place + 1] == x[place] for w, x in zip(written, wanted, strict=True)]
        figures[f"digit{place + 1}"] = np.mean(same)
    return {name: float(value) for name, value in figures.items()}


def bits_per_byte(model: Model, params: Params, tokenizer) -> float:
    """Of held-out English, in rows as in training."""
    rows = english("validation")[:400]
    bos, eos = tokenizer.roles["bos"], tokenizer.roles["eos"]
    ids = np.full((len(rows), TEACHER_LENGTH), eos, np.int32)
    count = 0
    for place, encoded in enumerate(tokenizer.encode_batch(rows)):
        kept = encoded[: STUDENT_LENGTH - 1]
        ids[place, : len(kept) + 1] = [bos, *kept]
        count += len(tokenizer.token_bytes.join(kept))
    lengths = np.cumsum(np.cumsum(ids == eos, axis=1) == 0, axis=1).max(1)
    mask = np.arange(TEACHER_LENGTH) < lengths[:, None]

    @jax.jit
    def nats(params, ids, mask):
        values, counted = next_token_cross_entropy(logits(*model(params, ids)), ids, mask)
        return jnp.where(counted, values, 0.0).sum()

    return float(nats(params, ids, mask) / np.log(2) / count)


def cached_batches(work: Path, regime: str, wrong_share: float, report) -> dict[str, np.ndarray]:
    """All batches of one text with the teacher's hidden states, float16; made once, then mapped."""
    folder = work / f"batches-{regime}-{round(100 * wrong_share)}"
    names = ("student_ids", "teacher_ids", "student_chunks", "teacher_chunks", "valid", "targets", "hidden")
    if not (folder / "done").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        model, params = train_teacher(work, regime, report)
        pair = pair_of(work, regime)
        length = TEACHER_LENGTH if regime == "digits" else STUDENT_LENGTH
        rows = texts(wrong_share)
        student, teacher, alignment = align(pair, rows, student_length=STUDENT_LENGTH, teacher_length=length)
        batch = SUM_ROWS + ENGLISH_ROWS

        def stacked(x):
            return np.asarray(x).reshape(BATCHES, batch, -1)

        arrays = {
            "student_ids": student, "teacher_ids": teacher, "student_chunks": alignment.student_chunks,
            "teacher_chunks": alignment.teacher_chunks, "valid": alignment.valid,
            "targets": targets_of(student, pair.student.roles["eos"]),
        }  # fmt: skip
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", stacked(array))
        run = jax.jit(lambda params, ids: model(params, ids)[0].astype(jnp.float16))
        hidden = [np.asarray(run(params, ids)) for ids in stacked(teacher)]
        np.save(folder / "hidden.npy", np.stack(hidden))
        report(f"{folder.name}: {len(rows)} rows, {alignment.valid.shape[1]} chunks at most")
        (folder / "done").touch()
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
