"""A small budget of the fuzzers of data."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
CASES = 8  # of each of 16 parsers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_no_case_of_a_small_budget_is_bad():
    """In another process, where no test has started threads before the forks."""
    command = [sys.executable, str(RUN), "--modules", "data_files", "--cases", str(CASES), "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode in (0, 1), run.stderr
    found = json.loads(run.stdout.splitlines()[-1])  # TFDS prints lines of its own
    assert [sum(counts.values()) for counts in found["counts"].values()] == [CASES] * 16
    assert not any(found["bad"].values()), json.dumps(found["bad"], indent=1)
