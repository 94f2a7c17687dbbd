"""W on disk, and the files that are refused."""

import json

import numpy as np
import pytest
from tokens import trained

from xtoken_jax.errors import UserError
from xtoken_jax.projection.build import build_projection
from xtoken_jax.projection.files import load_projection, save_projection

PAIR = (trained.three_digits, trained.single_digits)


@pytest.fixture
def saved(tmp_path):
    pair = trained.pair(*PAIR)
    path = tmp_path / "folder" / "W.safetensors"
    save_projection(path, build_projection(pair), pair)
    return path


def test_a_round_trip(saved):
    pair = trained.pair(*PAIR)
    built, loaded = build_projection(pair), load_projection(saved, pair)
    np.testing.assert_array_equal(loaded.indices, built.indices)
    np.testing.assert_array_equal(loaded.weights, built.weights)
    assert (loaded.indices.dtype, loaded.weights.dtype) == (np.int32, np.float32)
    assert loaded.teacher_size == pair.teacher.size
    assert [p.name for p in saved.parent.iterdir()] == ["W.safetensors"]


def test_two_builds_are_one_file(saved, tmp_path):
    pair = trained.pair(*PAIR)
    save_projection(tmp_path / "again.safetensors", build_projection(pair), pair)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


@pytest.mark.parametrize(
    ("makes", "side"),
    [
        ((trained.composing, trained.single_digits), "student"),
        ((trained.three_digits, trained.composing), "teacher"),
    ],
)
def test_another_pair_is_refused_by_both_names(saved, makes, side):
    other = trained.pair(*makes)
    with pytest.raises(UserError) as error:
        load_projection(saved, other)
    built = trained.pair(*PAIR)
    for name in (getattr(built, side).name, getattr(other, side).name, str(saved), side):
        assert name in str(error.value)


def test_the_reverse_pair_is_refused(saved):
    with pytest.raises(UserError, match="built for the student tokenizer"):
        load_projection(saved, trained.pair(*reversed(PAIR)))


def test_an_altered_byte_is_refused_wherever_it_is(saved):
    content = saved.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in (start, (start + len(content)) // 2, len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 1
        saved.write_bytes(changed)
        with pytest.raises(UserError, match="checksum"):
            load_projection(saved, trained.pair(*PAIR))


def test_a_damaged_header_is_refused(saved):
    """Any byte of the header: refused as unreadable, or as what it then says, never with a traceback."""
    content = saved.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    built = build_projection(trained.pair(*PAIR))
    refused = 0
    for place in range(0, start, 7):
        changed = bytearray(content)
        changed[place] ^= 4
        saved.write_bytes(changed)
        try:
            loaded = load_projection(saved, trained.pair(*PAIR))
        except UserError:
            refused += 1
        else:  # a name or a size that is only told, not relied upon
            np.testing.assert_array_equal(loaded.indices, built.indices)
            np.testing.assert_array_equal(loaded.weights, built.weights)
    assert refused > start // 7 // 2


@pytest.mark.parametrize("left", [0, 7, 100, -1, -1000])
def test_a_truncated_file_is_refused(saved, left):
    saved.write_bytes(saved.read_bytes()[:left])
    with pytest.raises(UserError, match="not a readable projection file"):
        load_projection(saved, trained.pair(*PAIR))


def test_other_files_are_refused(saved, tmp_path):
    pair = trained.pair(*PAIR)
    with pytest.raises(UserError, match="no such projection file"):
        load_projection(tmp_path / "none.safetensors", pair)
    with pytest.raises(UserError, match="no such projection file"):
        load_projection(saved.parent, pair)
    (tmp_path / "text").write_text(json.dumps({"indices": []}))
    with pytest.raises(UserError, match="not a readable projection file"):
        load_projection(tmp_path / "text", pair)

    from safetensors.numpy import save_file

    save_file({"indices": np.zeros(1), "weights": np.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(UserError, match="not a projection file of this version"):
        load_projection(tmp_path / "foreign.safetensors", pair)
    save_file({"other": np.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="projection file"):
        load_projection(tmp_path / "weights.safetensors", pair)
