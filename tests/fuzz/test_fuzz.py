"""A small budget of every fuzzer, and the frame itself: each verdict is seen to be given."""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xtoken_jax.errors import UserError

RUN = Path(__file__).with_name("run.py")
CASES = 25  # of each parser

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def test_no_case_of_a_small_budget_is_bad():
    """In another process, where no test has started threads of XLA before the forks."""
    command = [sys.executable, str(RUN), "--cases", str(CASES), "--seed", "2026", "--json"]
    command += ["--modules", "model_files", "tokenizer_files", "cache_files"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode in (0, 1), run.stderr
    found = json.loads(run.stdout)
    assert all(sum(counts.values()) == CASES for counts in found["counts"].values())
    assert not any(found["bad"].values()), json.dumps(found["bad"], indent=1)


def _refused():
    raise UserError("a/b.json: not a model; get it again")


def _turned_text():
    raise UserError("a\u202eb")


def _fault():
    raise KeyError("x")


def _panic():
    raise BaseException("panic")


def _noise():
    os.write(2, b"thread '<unnamed>' panicked at src/x.rs:1:\n")


READERS = [
    ("ok", lambda: None),
    ("refused", _refused),
    ("message", _turned_text),
    ("traceback", _fault),
    ("traceback", _panic),
    ("hang", lambda: time.sleep(60)),
    ("hang", lambda: all(iter(lambda: 1, 0))),
    ("memory", lambda: bytearray(1 << 30)),
    ("crash", os.abort),
    ("crash", lambda: ctypes.string_at(0)),
    ("noise", _noise),
]


def test_each_verdict_is_given(tmp_path):
    # Forks belong into a process without the threads of XLA.
    code = (
        f"import sys; sys.path.insert(0, {str(RUN.parents[1])!r})\n"
        "from pathlib import Path\n"
        "from fuzz.frame import run_child\n"
        "from fuzz.test_fuzz import READERS\n"
        "for number, (verdict, read) in enumerate(READERS):\n"
        f"    output = Path({str(tmp_path)!r}) / str(number)\n"
        "    outcome = run_child(read, output, seconds=1, memory=1 << 29)\n"
        "    assert outcome.verdict == verdict, (number, outcome)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
