"""`xtoken project`: what it writes and what it says about it."""

import json

import numpy as np
import pytest

from xtoken_jax.cli.parser import main
from xtoken_jax.projection.build import ProjectionOptions, build_projection
from xtoken_jax.projection.files import load_projection
from xtoken_jax.tokens.tokenizer import TokenizerPair


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], {}),
        (["--entries", "2", "--reverse"], {"entries": 2, "reverse": True}),
        (["--scale-trick", "--similar-special"], {"scale_trick": True, "similar_special": True}),
    ],
)
def test_flags_reach_the_file(capsys, pair_folders, tmp_path, flags, options):
    student, teacher = map(str, pair_folders)
    out = tmp_path / "w.safetensors"
    command = ["project", "--student", student, "--teacher", teacher, "--out", str(out), *flags]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    pair = TokenizerPair.load(student, teacher)
    built, loaded = (
        build_projection(pair, **options),
        load_projection(out, pair, ProjectionOptions(**options)),
    )
    np.testing.assert_array_equal(loaded.indices, built.indices)
    np.testing.assert_array_equal(loaded.weights, built.weights)
    kinds = ("bytes", "role", "similar", "repeated", "several", "empty")
    assert sum(said[kind] for kind in kinds) == said["rows"] == pair.student.size
    assert said["repeated"] > 0  # 11, 22, ...: not counted as equals
    assert said["seconds"] >= 0

    assert main(command) == 0
    shown = capsys.readouterr()
    assert f"{said['repeated']:,}" in shown.out
    assert "such as 222" in shown.out
    assert str(out) in shown.err


def test_no_entries_is_told_before_anything_is_loaded(capsys, tmp_path):
    command = ["project", "--student", "/none", "--teacher", "/none", "--out", str(tmp_path / "w")]
    assert main([*command, "--entries", "0"]) == 2
    assert "entries=0" in capsys.readouterr().err
