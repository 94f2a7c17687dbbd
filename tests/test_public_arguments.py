"""Functions of texts name an argument of another kind; batches, short reprs and types for a user."""

import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import xtoken_jax
from xtoken_jax.projection.prefixes import tables_of_pieces

TEXTS = ["12+30=42\n", "The sum is 7.\n", ""]
LENGTHS = {"student_length": 16, "teacher_length": 24}
CHAT = [[{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "5"}]]


@pytest.fixture(scope="module")
def pair(pair_folders):
    return xtoken_jax.TokenizerPair.load(*pair_folders)


@pytest.fixture(scope="module")
def rows(pair):
    return xtoken_jax.align_completions(pair, ["12+30=", "1+1="], ["42", "2"])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("texts", {"texts": "12+30=42"}), ("texts", {"texts": b"12"}), ("texts", {"texts": [1, 2]}),
        ("texts", {"texts": ["a", None]}), ("texts", {"texts": None}), ("texts", {"texts": {"a": 1}}),
        ("texts", {"texts": {"a"}}), ("texts", {"texts": [["a"]]}), ("pair", {"pair": "student"}),
        ("student_length", {"student_length": 0}), ("teacher_length", {"teacher_length": 2.5}),
        ("teacher_length", {"teacher_length": -1}), ("student_length", {"student_length": None}),
        ("padding_side", {"padding_side": "Left"}), ("padding_side", {"padding_side": None}),
        ("truncation_side", {"truncation_side": "middle"}),
    ],
)  # fmt: skip
def test_align(pair, name, changes):
    arguments = {"pair": pair, "texts": TEXTS, **LENGTHS} | changes
    with pytest.raises(xtoken_jax.UserError, match=rf"^{name}\b"):
        xtoken_jax.align(**arguments)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("prompts", {"prompts": "12"}), ("completions", {"completions": "42"}), ("prompts", {"prompts": [1]}),
        ("completions", {"completions": [None]}),
        ("2 prompts", {"prompts": ["a", "b"]}), ("pair", {"pair": 1}),
    ],
)  # fmt: skip
def test_align_completions(pair, name, changes):
    arguments = {"pair": pair, "prompts": ["12+30="], "completions": ["42"]} | changes
    with pytest.raises(xtoken_jax.UserError, match=rf"^{name}\b"):
        xtoken_jax.align_completions(**arguments)


@pytest.mark.parametrize(
    ("word", "changes"),
    [
        ("conversations", {"conversations": "hello"}), ("conversations", {"conversations": CHAT[0]}),
        ("conversations", {"conversations": [7]}), ("conversation 0, message 0", {"conversations": [["hi"]]}),
        ("targets", {"targets": "user"}), ("targets", {"targets": None}), ("pair", {"pair": None}),
    ],
)  # fmt: skip
def test_align_chats(pair, word, changes):
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    arguments = {"pair": pair, "conversations": CHAT}
    arguments |= {"student_template": template, "teacher_template": template} | changes
    with pytest.raises(ValueError, match=word):
        xtoken_jax.align_chats(**arguments)


def test_rows_and_batches(pair, rows):
    sides = [row.student for row in rows]
    for call, word in (
        (lambda: xtoken_jax.pack(TEXTS, 8, 8), r"documents\[0\]: str"),
        (lambda: xtoken_jax.pack(rows[0], 8, 8), "documents"),
        (lambda: xtoken_jax.pack(rows, 0, 8), "student_length=0"),
        (lambda: xtoken_jax.pack(rows, 8, "8"), "teacher_length='8'"),
        (lambda: xtoken_jax.token_rows(rows, 16, 0), r"sides\[0\]: Spans"),
        (lambda: xtoken_jax.token_rows(sides, 2, 0), r"sides\[0\]: \d+ tokens, but the length is 2"),
        (lambda: xtoken_jax.token_rows(sides, 16, 0, padding_side="top"), "padding_side='top'"),
        (lambda: xtoken_jax.collate(sides, 16, 16), r"rows\[0\]: Side"),
        (lambda: xtoken_jax.collate(rows, 2, 16), "student.* tokens, but the length is 2"),
        (lambda: xtoken_jax.collate(rows, 16, 16, padding_side=""), "padding_side=''"),
        (lambda: xtoken_jax.to_batch(pair, "rows", **LENGTHS), "rows='rows'"),
        (lambda: xtoken_jax.to_batch(pair, TEXTS, **LENGTHS), r"rows\[0\]: str"),
    ):
        with pytest.raises(xtoken_jax.UserError, match=word):
            call()


def test_audit_and_projection(pair):
    w = xtoken_jax.build_projection(pair)
    for options, word in (
        ({"critical_tokens": "12"}, "critical_tokens='12'"),
        ({"critical_tokens": [12]}, r"critical_tokens\[0\]: int"),
        ({"critical_text": [b"12"]}, r"critical_text\[0\]: bytes"),
        ({"text": 12}, "text=12"),
        ({"minimum_coverage": "0.9"}, "minimum_coverage='0.9'"),
        ({"minimum_coverage": 90}, "minimum_coverage=90"),
        ({"projection": xtoken_jax.Partition.strict(w)}, "projection: Partition"),
    ):
        with pytest.raises(xtoken_jax.UserError, match=word):
            xtoken_jax.audit(pair, **options)
    for options, word in (
        ({"entries": 0}, "entries=0"), ({"entries": 2.0}, "entries=2.0"), ({"reverse": "no"}, "reverse='no'"),
        ({"scale_trick": 1}, "scale_trick=1"), ({"similar_special": None}, "similar_special=None"),
    ):  # fmt: skip
        with pytest.raises(xtoken_jax.UserError, match=word):
            xtoken_jax.build_projection(pair, **options)
    with pytest.raises(TypeError, match="pair: list"):
        xtoken_jax.build_projection([pair.student, pair.teacher])


def test_a_batch_has_what_a_loss_needs(pair):
    """The masks differ from `ids != pad_id` where a text contains the padding token."""
    batch = xtoken_jax.align(pair, TEXTS, **LENGTHS)
    student_ids, teacher_ids, alignment = batch
    assert len(batch) == 3
    for side, ids, tokenizer in (
        (batch.student, student_ids, pair.student), (batch.teacher, teacher_ids, pair.teacher)
    ):  # fmt: skip
        assert side.ids is ids
        lengths = side.mask.sum(axis=1)
        encoded = [len(tokenizer.encode(text)) for text in TEXTS]
        assert (lengths >= encoded).all()
        for row, length in enumerate(lengths):
            assert side.mask[row, :length].all()
            assert (ids[row, length:] == tokenizer.pad_id).all()
        assert not side.targets[:, 0].any()
        assert (side.targets == side.mask & (np.arange(ids.shape[1]) > 0)).all()
    again = jax.tree.map(jnp.asarray, batch)
    assert type(again) is xtoken_jax.AlignedBatch
    assert jax.jit(lambda b: (b.student.targets.sum(), b[0].sum(), b[2].valid))(again)[2].shape == (3, 16)
    np.testing.assert_array_equal(again[1], teacher_ids)
    np.testing.assert_array_equal(again.alignment.valid, alignment.valid)
    left = xtoken_jax.align(pair, TEXTS, padding_side="left", **LENGTHS)
    assert left.student.mask[0, -1]
    assert not left.student.mask[0, 0]


def test_completions_become_a_batch(pair, rows):
    batch = xtoken_jax.to_batch(pair, rows, **LENGTHS, document_marks=True)
    plain = xtoken_jax.to_batch(pair, rows, **LENGTHS)
    for row, prompt in enumerate(["12+30=", "1+1="]):
        begins = np.flatnonzero(plain.student.targets[row])[0]
        assert pair.student.decode(plain.student.ids[row, :begins]) in (prompt, prompt[:-1])
    assert batch.student.targets.sum() > plain.student.targets.sum()  # EOS too
    for ours, theirs in zip(plain.alignment.valid, batch.alignment.valid, strict=True):
        assert 0 < ours.sum() <= theirs.sum()


def public(module):
    return {name for name in dir(module) if not name.startswith("__")}


def test_dir_lists_the_public_names():
    assert public(xtoken_jax) == set(xtoken_jax.__all__)
    assert public(xtoken_jax.losses) == set(xtoken_jax.losses.__all__)


def traced(value):
    """Its repr with tracers and with abstract shapes for arrays."""
    texts = []
    jax.eval_shape(lambda x: texts.append(repr(x)) or 0, value)
    texts.append(repr(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, value))))
    texts.append(repr(jax.tree.map(lambda _: object(), value)))
    return texts


def test_reprs_are_short_and_say_what_it_is(pair):
    w = xtoken_jax.build_projection(pair)
    sizes = f"{pair.student.size:,} student and {pair.teacher.size:,} teacher tokens"
    batch = xtoken_jax.align(pair, TEXTS, **LENGTHS)
    prefixes = tables_of_pieces({0: [0], 1: [1], 2: [0, 1]}, {0: [0], 1: [1]}, {}, 3, 2)
    holders = [
        (w, sizes), (w.split(), sizes), (w.learnable(), sizes), (w.T, sizes),
        (xtoken_jax.Partition.strict(w), "common pairs"), (prefixes, "3 tokens"),
        (prefixes.student, "events"),
        (prefixes.student_pieces, "with pieces"), (batch.alignment, "(3, 16)"), (batch.student, "(3, 16)"),
        (batch, "(3, 24)"),
    ]  # fmt: skip
    for holder, word in holders:
        assert word in repr(holder)
        for text in (repr(holder), *traced(holder)):
            assert len(text) < 700, text
            assert text.count("\n") < 8
            assert "array(" not in text
    assert "rows of one entry" in repr(w)
    for text, words in (
        (repr(pair), [pair.student.name, f"{pair.teacher.size:,} ids"]),
        (repr(pair.student), [pair.student.name]),
        (repr(xtoken_jax.audit(pair)), ["p_kl", "numerals", "common"]),
    ):
        assert all(word in text for word in words), text
        assert len(text) < 1500
        assert text.count("\n") < 12


PROGRAM = """
import jax
import numpy as np

import xtoken_jax
from xtoken_jax import losses

pair = xtoken_jax.TokenizerPair.load("student", "teacher")
w = xtoken_jax.build_projection(pair)
batch = xtoken_jax.align(pair, ["1 + 201"], student_length=8, teacher_length=8)
student_ids, teacher_ids, alignment = batch
mask: np.ndarray | jax.Array = batch.student.mask
logits: jax.Array = jax.numpy.zeros((1, 8, pair.student.size))
kd: jax.Array = losses.projection_kl(logits, logits, alignment, w, top_k=None)
report: xtoken_jax.Audit = xtoken_jax.audit(pair)
losses.projection_kl(logits, logits, alignment, w, temperature="1")  # error
xtoken_jax.align(pair, [1], student_length=8, teacher_length=8)  # error
xtoken_jax.aling  # error
"""


def test_types_are_seen_by_a_users_program(tmp_path):
    pytest.importorskip("mypy")
    assert (Path(xtoken_jax.__file__).parent / "py.typed").is_file()
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(xtoken_jax.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "program.py", "--no-error-summary", "--ignore-missing-imports"]
    command += ["--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}"]
    run = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={"MYPYPATH": str(root)}
    )
    wrong = [int(line.split(":")[1]) for line in run.stdout.splitlines() if ": error:" in line]
    expected = [n for n, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# error")]
    assert sorted(set(wrong)) == expected, run.stdout + run.stderr


@pytest.mark.slow
def test_the_wheel_says_that_it_is_typed(tmp_path):
    root = Path(__file__).parents[1]
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        str(tmp_path),
        str(root),
    ]
    subprocess.run(command, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert "xtoken_jax/py.typed" in zipfile.ZipFile(wheel).namelist()
