"""Generated remainders: the stated share wrong, never by accident right, nothing held out in training."""

import re

import numpy as np

from xtoken_jax.data import arithmetic

LINE = re.compile(r"(\d{3})%(2|5|10)=(\d)")


def lines(**options):
    found = []
    for document in arithmetic.documents(400, **{"split": "train", "seed": 5, "wrong_share": 0.0} | options):
        assert document.endswith("\n")
        for line in document.splitlines():
            found.append(tuple(map(int, LINE.fullmatch(line).groups())))
    return found


def test_all_right_without_a_wrong_share():
    found = lines()
    assert len(found) == 400 * arithmetic.LINES
    assert all(a % b == c for a, b, c in found)


def test_the_stated_share_is_wrong_and_spread_over_all_other_digits():
    found = lines(wrong_share=0.7)
    wrong = [(c - a % b) % 10 for a, b, c in found if a % b != c]
    share = len(wrong) / len(found)
    assert abs(share - 0.7) < 4 * np.sqrt(0.7 * 0.3 / len(found))
    counts = np.bincount(wrong, minlength=10)[1:]
    assert np.all(np.abs(counts - len(wrong) / 9) < 5 * np.sqrt(len(wrong) / 9))
    assert not any(a % b == c for a, b, c in lines(wrong_share=1.0))


def test_splits_share_no_problem_and_cover_all():
    train, validation = (
        {tuple(p) for p in arithmetic.operand_pairs(s).tolist()} for s in ("train", "validation")
    )
    assert not train & validation
    assert len(train | validation) == 900 * 3
    assert 0.08 < len(validation) / 2700 < 0.12
    assert {(a, b) for a, b, _ in lines()} <= train
    assert {(a, b) for a, b, _ in lines(split="validation")} <= validation


def test_problems_are_right_distinct_and_deterministic():
    found = arithmetic.problems(200, split="validation", seed=3)
    assert found == arithmetic.problems(200, split="validation", seed=3)
    assert found != arithmetic.problems(200, split="validation", seed=4)
    assert len({p.prompt for p in found}) == 200
    for problem in found:
        a, b = map(int, re.fullmatch(r"(\d+)%(\d+)=", problem.prompt).groups())
        assert problem.answer == str(a % b)


def test_documents_depend_on_the_seed_alone():
    options = {"split": "train", "wrong_share": 0.5}
    assert arithmetic.documents(5, seed=1, **options) == arithmetic.documents(5, seed=1, **options)
    assert arithmetic.documents(5, seed=1, **options) != arithmetic.documents(5, seed=2, **options)
