"""Mistakes in all commands: exit code 2, one line with the wrong value and what to do, nothing written."""

import json
import shutil

import pytest

from xtoken_jax.cli.parser import main

# Words after `xtoken`, and what the line has to hold. S and T stand for the two models, BASE for the
# settings of a run of them; the other files are those of `place`.
PAIR = "--student S --teacher T"
MISTAKES = [
    # the command itself
    ("distil experiment=quickstart", "distil: no such command, did you mean xtoken distill?"),
    ("experiment=quickstart", "experiment=quickstart: settings follow a command: xtoken distill experiment"),
    ("--verison", "unknown option '--verison', did you mean --version?"),
    ("--completion tcsh", "--completion: invalid choice: 'tcsh'", "bash"),
    # words of distill that are none
    ("distill", "student.path: not given; name a Hugging Face folder"),
    ("distill quickstart", "'quickstart'", "did you mean experiment=quickstart?"),
    ("distill BASE train.steps 5", "'train.steps'", "write train.steps=VALUE"),
    ("distill BASE train.steps:5", "'train.steps:5'", "write train.steps=5"),
    ("distill BASE loss:p_kl", "'loss:p_kl'", "write loss=p_kl"),
    ("distill S", "did you mean student.path="),
    ("distill BASE ~loss", "'~loss'", "key=value"),
    ("distill BASE =3", "'=3'", "key=value"),
    # options instead of settings
    ("distill --student S --teacher T", "--student", "write student.path=", " teacher.path="),
    ("distill BASE --steps 5", "--steps 5", "write train.steps=5"),
    ("distill BASE --lr=1e-4 --loss p_kl", "--lr=1e-4", "write optimizer.learning_rate=1e-4 loss=p_kl"),
    ("distill BASE --train.steps 5", "--train.steps 5", "write train.steps=5"),
    ("distill BASE --output-dir runs/x", "--output-dir runs/x", "write run_dir=runs/x"),
    ("distill BASE --stesp 5", "--stesp", "did you mean train.steps=...?"),
    ("distill BASE --whatever", "--whatever", "see xtoken distill --help"),
    ("distill BASE --cfg all", "'all'", "choose from", "job"),
    ("cache-teacher BASE --out c --student S", "--student", "write student.path="),
    # several values without a sweep
    ("distill BASE loss=p_kl,h_kl", "loss=p_kl,h_kl", "add -m"),
    ("distill BASE optimizer.learning_rate=1e-3,1e-4", "1e-3,1e-4", "add -m"),
    ("distill BASE train.seed=range(1,3)", "train.seed=range(1,3)", "add -m"),
    ("distill BASE baseline=true,false", "baseline=true,false", "add -m"),
    ("distill BASE name=a,b", "name=a,b", "add -m"),
    ("distill BASE teacher.path=S,T", "/student,", "add -m"),
    ("distill BASE teacher.path=org/a,org/b", "org/a,org/b", "add -m"),
    ("distill BASE hydra/launcher=submitit_slurm", "hydra/launcher=submitit_slurm", "add -m"),
    ("distill BASE hydra.sweeper.n_trials=9", "hydra.sweeper.n_trials=9", "add -m"),
    ("cache-teacher BASE --out c loss=p_kl,h_kl", "loss=p_kl,h_kl", "xtoken distill -m"),
    ("distill -m BASE loss=p_kl,h_k", "loss=h_k: no such loss, did you mean h_kl?"),
    ("distill -m BASE train.sed=1,2", "train.sed: no such key, did you mean train.seed?"),
    ("distill -m BASE train.steps=0,5 --cfg job", "train.steps=0: must be at least 1"),
    # keys and options that are not there
    ("distill BASE seed=3", "seed: no such key, did you mean data.seed or train.seed?"),
    ("distill BASE lr=1", "lr: no such key, did you mean optimizer.learning_rate?"),
    ("distill BASE train.epochs=3", "train.epochs: no such key", "there is accumulate"),
    ("distill BASE train=fast", "train=fast", "there is accumulate"),
    ("distill BASE loss.kind.more=1", "loss.kind is a single value"),
    ("distill BASE mesh=ddp", "mesh=ddp: no such mesh; there is data_parallel, fsdp"),
    ("distill BASE student=qwen9", "student=qwen9: no such student", "qwen3_0_6b"),
    ("distill BASE hosts=all", "hosts=all: no such hosts; there is auto, one"),
    # values
    ("distill BASE train.steps=1000.5", "train.steps: Value '1000.5'", "Integer"),
    ("distill BASE train.steps=-1", "train.steps=-1: must be at least 1"),
    ("distill BASE train.evaluate_every=-5", "train.evaluate_every=-5", "0 evaluates at the start and"),
    ("distill BASE train.save_every=-5", "train.save_every=-5", "0 saves at the end only"),
    ("distill BASE train.log_every=0", "train.log_every=0: must be at least 1; the last step is logged"),
    ("distill BASE train.keep=0", "train.keep=0: must be at least 1"),
    ("distill BASE train.wandb.project=mine", "train.wandb.project=mine: needs wandb; pip install"),
    ("distill BASE optimizer.kind=adam", "'adam', expected one of [adamw"),
    ("distill BASE optimizer.schedule=cosin", "'cosin', expected one of [cosine"),
    ("distill BASE optimizer.learning_rate=nan", "optimizer.learning_rate=nan: must be above 0"),
    ("distill BASE optimizer.clip_norm=0", "clip_norm=0.0: must be above 0, or null for no clipping"),
    ("distill BASE loss.direction=jsd loss.beta=3", "loss.beta=3.0: must be between 0"),
    ("distill BASE loss=alm loss.temperature=2", "loss.temperature=2.0", "p_kl"),
    ("distill BASE data.student_length=1", "data.student_length=1: must be at least 2"),
    ("distill BASE data.pack=perhaps", "data.pack: Value 'perhaps' is not a valid bool"),
    ("distill BASE student.attention=flash", "'flash', expected one of [xla"),
    ("distill BASE student.lora.rank=2 student.lora.targets=[q_proj]", "q_proj; choose among query"),
    ("distill BASE export_dtype=int8", "'int8', expected one of [float32"),
    ("distill BASE resume.allow=[everything]", "everything; there is name, run_dir"),
    ("distill BASE name=", "name: empty; name the run"),
    ("distill BASE mesh.data=3", "data=3", "device count 8; sizes that can are 1, 2, 4, 8,"),
    ("distill BASE mesh.data=4 mesh.fsdp=4", "data=4, fsdp=4", "sizes that can are 1, 2, 4, 8,"),
    ("distill BASE data.batch_size=12", "data.batch_size=12", "take data.batch_size=8 or 16"),
    ("distill BASE data.batch_size=24 train.accumulate=5", "data.batch_size=40, or train.accumulate=1, 3"),
    # places
    ("distill BASE student.path=nowhere", "student: no such folder: nowhere in "),
    ("distill BASE student.path=text.jsonl", "student: not a folder: text.jsonl"),
    ("distill BASE student.path=~nobody-here/x", "~nobody-here/x: no such user"),
    ("distill experiment=smollm2 data.batch_size=8", "student: no such folder", "smollm2/prepare.py"),
    ("distill BASE student.chat_template=no.jinja", "no.jinja: cannot be read"),
    ("distill BASE data.train.text.path=no.jsonl", "no.jsonl: no such file or folder"),
    ("distill BASE data.train.text.path=no*.jsonl", "no*.jsonl: no file matches this pattern"),
    ("distill BASE data.train.text.field=body", "no 'body' in its first record, which has 'text'; name"),
    ("distill BASE teacher.cache=empty", "teacher.cache=empty: no teacher cache there; xtoken cache-teacher"),
    ("distill BASE projection=no.safetensors", "no.safetensors: no such projection", "xtoken project"),
    ("distill BASE run_dir=text.jsonl", "text.jsonl: exists and is not a run's folder; choose another"),
    # cache-teacher
    ("cache-teacher BASE", "cache-teacher needs --out; see xtoken cache-teacher --help"),
    ("cache-teacher BASE --out c --top-k many", "--top-k many: must be a number from 1 on, or all"),
    ("cache-teacher BASE --out c --top-p 2", "--top-p 2.0: must be above 0, and at most 1"),
    ("cache-teacher BASE --out c --temperatures 1 0", "--temperatures 0.0: must be above 0"),
    ("cache-teacher BASE --out c --teacher second", "--teacher second: no such teacher; there is teacher"),
    ("cache-teacher BASE --out text.jsonl", "text.jsonl: exists and is not a teacher cache"),
    # audit, project, align
    ("audit student.path=S teacher.path=T", "student.path=", "takes options, not key=value: --student "),
    ("audit --student S", "audit needs --teacher; see xtoken audit --help"),
    (f"audit {PAIR} loss=p_kl", "unknown argument 'loss=p_kl'", "see xtoken audit --help"),
    (f"audit {PAIR} --data text.jsonl", "'--data', did you mean --text-file?"),
    (f"audit {PAIR} --text-file no.jsonl", "no.jsonl: no such file or folder"),
    (f"audit {PAIR} --text-file ~nobody-here/x", "~nobody-here/x"),
    ("audit --student nowhere --teacher T", "no such folder: nowhere in "),
    (f"project {PAIR} --out w --entries 0", "entries=0"),
    (f"project {PAIR} --out w --entries many", "--entries: invalid int value: 'many'"),
    (f"project {PAIR} --output w", "'--output', did you mean --out?"),
    (f"project {PAIR} --out text.jsonl/w", "text.jsonl/w: cannot be written"),
    (f"audit {PAIR} --critical nowhere", "'nowhere': ", "has no single token for it", "name those pieces"),
    (f"align {PAIR}", "align needs one of --text, --file, --chat; see xtoken align --help"),
    (f"align {PAIR} --prompt 1+1", "'--prompt', did you mean --text?"),
    (f"align {PAIR} --file no.txt", "no.txt: cannot be read"),
    (f"align {PAIR} --chat broken.json", "broken.json: "),
    (f"align {PAIR} --chat chat.json", "no chat template"),
    (f"align {PAIR} --text a --file text.jsonl", "--file: not allowed with argument --text"),
    # evaluate
    ("evaluate", "evaluate needs DIR; see xtoken evaluate --help"),
    ("evaluate --path S", "--path: xtoken evaluate takes DIR as a word by itself: xtoken evaluate "),
    ("evaluate path=S", "path=", "takes DIR as a word by itself: xtoken evaluate "),
    ("evaluate S data.validation.text.path=v.jsonl", "takes options, not key=value: --data v.jsonl"),
    ("evaluate S --max-length 9", "'--max-length', did you mean --length?"),
    ("evaluate S --length 100000", "--length 100000: must be at least 2, and at most 128,"),
    ("evaluate S --length 1", "--length 1: must be at least 2, and at most 128"),
    ("evaluate S --length ten", "--length: invalid int value: 'ten'; see xtoken evaluate --help"),
    ("evaluate S --batch-size 0", "--batch-size 0: must be at least 1"),
    ("evaluate S --data no.jsonl", "no.jsonl: no such file or folder"),
    ("evaluate empty", "empty: no tokenizer.json; save the tokenizer"),
    ("evaluate weightless --data text.jsonl --length 32", "weightless", "weights"),
    # generate
    ("generate S", "generate needs --prompt; see xtoken generate --help"),
    ("generate S prompt=1+1", "prompt=1+1: xtoken generate takes options, not key=value: --prompt 1+1"),
    ("generate S --prompt 1+1 --max-tokens 5", "'--max-tokens', did you mean --max-new-tokens?"),
    ("generate S --prompt 1+1 --max-new-tokens 0", "--max-new-tokens 0: must be at least 1"),
    ("generate S --prompt 1+1 --top-p 0.9", "--top-p 0.9", "add --temperature 1"),
    ("generate S --prompt 1+1 --temperature hot", "--temperature: invalid float value: 'hot'"),
    ("generate S --prompt 1+1 --chat", "no chat template"),
    ("generate S --prompt 1+1 --prompt", "--prompt: expected one argument"),
    # export, report, cache
    ("export runs/x", "export needs --out; see xtoken export --help"),
    ("export run_dir=runs/x --out y", "run_dir=runs/x", "takes RUN as a word by itself: xtoken export"),
    ("export runs/x --out y", "runs/x"),
    ("export runs/x --out y --dtype int8", "'int8'", "choose from", "bfloat16"),
    ("export runs/x --out y --steps 3", "'--steps', did you mean --step?"),
    ("report nowhere", "nowhere: no such folder; name a folder that xtoken distill wrote"),
    ("report empty", "empty: not a run or a sweep, and none in it"),
    ("report text.jsonl", "text.jsonl: a file; name a folder that xtoken distill wrote"),
    ("report --run-dir runs/x", "--run-dir: xtoken report takes RUN as a word by itself: xtoken"),
    ("cache clean", "unknown argument 'clean', did you mean --clean?"),
    ("cache --clear", "'--clear', did you mean --clean?"),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory, pair_folders):
    """A folder with a text, a broken file, an empty folder and a model without weights."""
    folder = tmp_path_factory.mktemp("place")
    rows = [{"text": f"{a}+{b}={a + b}, as everybody knows.\n" * 4} for a in range(8) for b in range(8)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "broken.json").write_text('[{"role": ')
    (folder / "chat.json").write_text('[{"role": "user", "content": "1+1"}]')
    (folder / "empty").mkdir()
    shutil.copytree(pair_folders[0], folder / "weightless")
    (folder / "weightless" / "model.safetensors").unlink()
    return folder


def written_out(words, pair):
    """The words of a mistake as the shell gives them."""
    student, teacher = map(str, pair)
    base = [f"student.path={student}", f"teacher.path={teacher}", "data.train.text.path=text.jsonl"]
    base += ["data.validation.text.path=text.jsonl", "data.student_length=32", "data.teacher_length=48"]
    base += ["data.batch_size=8", "run_dir=run", "train.steps=1"]
    models = {"S": student, "T": teacher, "S,T": f"{student},{teacher}"}
    for word in words.split():
        key, equals, value = word.rpartition("=")
        yield from base if word == "BASE" else [key + equals + models.get(value, value)]


@pytest.mark.parametrize(("words", "expected"), [(w, e) for w, *e in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_one_line(words, expected, place, pair_folders, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    try:
        code = main([*written_out(words, pair_folders)])
    except SystemExit as end:  # of argparse
        code = end.code
    out, error = capsys.readouterr()
    assert code == 2, (out, error)
    assert error.startswith("xtoken: ")
    assert error.count("\n") == 1, error
    for part in expected:
        assert part in error
    assert sorted(place.rglob("*")) == before


def test_enough_is_tried():
    assert len({words for words, *_ in MISTAKES}) == len(MISTAKES) >= 120
