"""Makes the three models that the package ships for `xtoken distill experiment=quickstart` and
`experiment=quickstart_two_teachers`, those that are not there.

    python experiments/quickstart/make.py

For each its tokenizer (make_tokenizers.py), then trainings without a teacher through the package's
own loop. The teacher reads English and arithmetic in which every result is right. The student reads
English and the same kind of lines with results drawn at random, so that it starts with the form and
without the results. So does the second teacher, at the end, after English alone. Half an hour on
2 cores; interrupted, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from make_tokenizers import (
    ENGLISH_SIZE,
    STUDENT_SIZE,
    TEACHER_SIZE,
    make_english,
    make_student,
    make_teacher,
)
from rich.console import Console

from xtoken_jax.run.distill import distill
from xtoken_jax.run.experiment import PACKAGE, load_experiment

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
}
TOKENIZERS = {"student": make_student, "teacher": make_teacher, "teacher_english": make_english}
CONFIGS = {
    "student": {"vocab_size": STUDENT_SIZE, "num_hidden_layers": 2, "bos_token_id": 0, "eos_token_id": 1},
    "teacher": {"vocab_size": TEACHER_SIZE, "num_hidden_layers": 4, "bos_token_id": None, "eos_token_id": 0},
    "teacher_english": {
        "vocab_size": ENGLISH_SIZE,
        "num_hidden_layers": 3,
        "bos_token_id": None,
        "eos_token_id": 0,
    },
}

COMMON = [
    "loss=none",
    "export_dtype=bfloat16",
    "student.init=random",
    "data.train.english.kind=python_docstrings",
    "data.validation.english.kind=python_docs",
    "data.validation.english.split=validation",
    "data.validation.arithmetic.kind=arithmetic",
    "data.validation.arithmetic.split=validation",
    "optimizer.warmup_steps=100",
    "optimizer.beta2=0.98",
    "train.evaluate_every=250",
    "train.save_every=250",
]
# By model the trainings that follow one another. The seeds are the default, 0, and those written here.
TRAININGS = {
    "teacher": [
        [
            "data.train.arithmetic.kind=arithmetic",
            "data.train.arithmetic.documents=2000",
            "data.train.arithmetic.seed=11",
            "data.train.topics.kind=python_docs",
            "data.student_length=160",
            "data.teacher_length=160",
            "data.batch_size=12",
            "optimizer.learning_rate=3e-3",
            "train.steps=1800",
        ]
    ],
    "student": [
        [
            "data.train.arithmetic.kind=arithmetic",
            "data.train.arithmetic.documents=1000",
            "data.train.arithmetic.seed=21",
            "data.train.arithmetic.wrong_share=0.9",  # 9 of 10 digits: no trace of the right one
            "data.student_length=128",
            "data.teacher_length=128",
            "data.batch_size=16",
            "optimizer.learning_rate=2e-3",
            "train.steps=600",
        ]
    ],
    "teacher_english": [
        [
            "data.train.english.weight=0.6",
            "data.train.topics.kind=python_docs",
            "data.train.topics.weight=0.4",
            "data.student_length=160",
            "data.teacher_length=160",
            "data.batch_size=8",
            "optimizer.learning_rate=3e-3",
            "optimizer.weight_decay=0.1",
            "train.steps=2200",
        ],
        [
            "student.init=weights",
            "data.train.english.weight=0.5",
            "data.train.topics.kind=python_docs",
            "data.train.topics.weight=0.35",
            "data.train.arithmetic.kind=arithmetic",
            "data.train.arithmetic.documents=1000",
            "data.train.arithmetic.seed=31",
            "data.train.arithmetic.wrong_share=0.9",  # the form alone, as of the student
            "data.train.arithmetic.weight=0.15",
            "data.student_length=160",
            "data.teacher_length=160",
            "data.batch_size=8",
            "optimizer.learning_rate=1e-3",
            "optimizer.warmup_steps=20",
            "optimizer.weight_decay=0.1",
            "train.steps=300",
        ],
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=PACKAGE / "assets" / "quickstart")
    parser.add_argument("--work", type=Path, default=Path("runs/quickstart-make"), help="for the trainings")
    options = parser.parse_args()
    console = Console(highlight=False)
    for side, trainings in TRAININGS.items():
        if (options.out / side / "model.safetensors").is_file():
            console.print(f"{options.out / side} is there; to make it anew, remove it or take another --out")
            continue
        folder = options.work / f"{side}-start"
        if not (folder / "config.json").is_file():
            TOKENIZERS[side](folder)
            (folder / "config.json").write_text(json.dumps({**LLAMA, **CONFIGS[side]}, indent=2) + "\n")
        for number, overrides in enumerate(trainings, 1):
            run = options.work / (side if number == 1 else f"{side}-{number}")
            where = [f"name={side}", f"run_dir={run}", f"student.path={folder}"]
            result = distill(load_experiment([*COMMON, *overrides, *where]), console)
            for row, figures in result.figures.items():
                console.print(side, row, {name: round(value, 3) for name, value in figures.items()})
            folder = result.student
        shutil.copytree(folder, options.out / side, dirs_exist_ok=True)
    total = sum(f.stat().st_size for f in options.out.rglob("*") if f.is_file())
    console.print(f"{options.out}: {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
