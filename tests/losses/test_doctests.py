"""The examples in the docstrings of the losses are right, and every loss has one."""

import doctest
import functools
import importlib
import pkgutil

import jax
import pytest

import xtoken_jax.losses

PACKAGE = xtoken_jax.losses
MODULES = [
    PACKAGE.__name__,
    *(module.name for module in pkgutil.walk_packages(PACKAGE.__path__, f"{PACKAGE.__name__}.")),
]

LOSSES = (
    "projection_kl",
    "hybrid_kl",
    "hybrid_terms",
    "likelihood_matching",
    "rank_l1",
    "same_vocabulary_kl",
    "valid_chunks",
)


COMPILED = (*LOSSES, "prefix_kl", "teacher_scores")


def compiled(function):
    """The function as one program, as users call it; otherwise jax compiles each operation by itself."""

    def call(*arrays, **options):
        fixed = {
            name: value for name, value in options.items() if isinstance(value, str | int | float | None)
        }
        others = {k: v for k, v in options.items() if k not in fixed}
        return jax.jit(functools.partial(function, **fixed))(*arrays, **others)

    return call


def examples_of(name):
    """Docstrings with examples of a module's own names, not of those that it imports."""
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module(name):
    runner, printed = doctest.DocTestRunner(), []
    for test in examples_of(name):
        test.globs |= {loss: compiled(getattr(PACKAGE, loss)) for loss in COMPILED if loss in test.globs}
        runner.run(test, out=printed.append, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0, "".join(printed)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_an_example(name):
    found = doctest.DocTestFinder(recurse=False).find(getattr(PACKAGE, name), name)
    assert any(test.examples for test in found)
