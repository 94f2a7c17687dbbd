"""Tests on the tokenizers that `make tokenizers` fetches; without them they are skipped in one line.

XTOKEN_REQUIRE_REAL=1 makes a missing tokenizer a failure.
"""

import os
from pathlib import Path

import pytest
from real_tokenizers import FOLDER, absent

HERE = Path(__file__).resolve().parent
REQUIRED = os.environ.get("XTOKEN_REQUIRE_REAL", "") not in ("", "0")
MISSING = pytest.StashKey[list]()


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if HERE in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.real)
    names = absent() if ours else []
    config.stash[MISSING] = names
    if names and not REQUIRED:
        for item in ours:
            item.add_marker(pytest.mark.skip(reason="real tokenizers: run `make tokenizers`"))


@pytest.fixture(autouse=True)
def _present(request):
    names = request.config.stash[MISSING]
    if names:
        pytest.fail(f"{', '.join(names)} not in {FOLDER}: run `make tokenizers`", pytrace=False)


def pytest_terminal_summary(terminalreporter, config):
    names = config.stash.get(MISSING, [])
    if names:
        terminalreporter.write_line(
            f"tests/real: {', '.join(names)} not in {FOLDER}; run `make tokenizers` to test with them"
        )
