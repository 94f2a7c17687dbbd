"""The pictures of the documentation are what the package's code gives now."""

import re

import numpy as np
import pytest
from doc_scripts import DOCS, load
from reference import prefix as reference


@pytest.fixture(scope="module")
def draw():
    return load("draw")


def test_the_pictures_are_up_to_date(draw):
    for name, svg in draw.pictures().items():
        there = (DOCS / "pictures" / name).read_text(encoding="utf-8")
        assert there == svg, f"{name} is old: run `python docs/draw.py`"


def test_the_value_in_the_picture_of_prefix_kl_is_that_of_the_loss(draw):
    by_teacher = {0: [0], 1: [1], 2: [2], 3: [5]}
    tables = draw.PIECES, by_teacher, {}, (6, 4)
    logits = np.log(draw.STUDENT_ROWS).tolist(), np.log(draw.TEACHER_ROWS).tolist()
    ids, chunks = ([5, 4], [3, 2, 0, 1]), [(0, (1, 2), (1, 4))]
    values = reference.row_values(*logits, ids, chunks, tables, 8, 1.0)
    assert values[0] == pytest.approx(0.0790875, abs=1e-7)  # docs/prefix_kl.md, section 4
    (shown,) = re.findall(r"= (\d\.\d+)</text>", draw.prefix_kl_picture().svg())
    assert float(shown) == pytest.approx(values[0], abs=1e-4)
