"""W on disk, and the files that are refused."""

import dataclasses
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from kills import killed
from tokens import trained

from xtoken_jax.errors import UserError
from xtoken_jax.projection import files
from xtoken_jax.projection.build import ProjectionOptions, build_projection
from xtoken_jax.projection.files import load_projection, save_projection
from xtoken_jax.tokens.tokenizer import TokenizerPair

PAIR = (trained.three_digits, trained.single_digits)


@pytest.fixture
def saved(tmp_path):
    pair = trained.pair(*PAIR)
    path = tmp_path / "folder" / "W.safetensors"
    save_projection(path, build_projection(pair), pair, ProjectionOptions())
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
    save_projection(tmp_path / "again.safetensors", build_projection(pair), pair, ProjectionOptions())
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


def test_a_changed_tokenizer_of_the_same_name_is_refused(saved):
    pair = trained.pair(*PAIR)
    changed = TokenizerPair(pair.student, dataclasses.replace(pair.teacher, file_fingerprint="0"))
    with pytest.raises(UserError, match=r"teacher tokenizer .* whose files have changed since"):
        load_projection(saved, changed)


def test_options_are_checked_where_they_are_named(tmp_path):
    pair, path = trained.pair(*PAIR), tmp_path / "w.safetensors"
    options = ProjectionOptions(entries=2, reverse=True)
    built = build_projection(pair, entries=2, reverse=True)
    save_projection(path, built, pair, options)
    for asked in (None, options):
        np.testing.assert_array_equal(load_projection(path, pair, asked).weights, built.weights)
    with pytest.raises(UserError, match=r"entries=2, reverse=True, .* not with entries=4, reverse=False, "):
        load_projection(path, pair, ProjectionOptions())
    save_projection(path, built, pair)
    load_projection(path, pair)
    with pytest.raises(UserError, match="built with options that it does not name"):
        load_projection(path, pair, options)


def test_an_earlier_format_is_refused_by_its_name(saved, monkeypatch):
    pair = trained.pair(*PAIR)
    monkeypatch.setattr(files, "FORMAT", "xtoken-projection-1")
    save_projection(saved, build_projection(pair), pair)
    monkeypatch.undo()
    with pytest.raises(
        UserError, match=r"of this version \(xtoken-projection-2\), but of xtoken-projection-1"
    ):
        load_projection(saved, pair)


def faulty(edit):
    """Its arrays after an edit, stored as they are with a right checksum."""
    pair = trained.pair(*PAIR)
    built = build_projection(pair)
    tensors = {"indices": built.indices.copy(), "weights": built.weights.copy()}
    return edit(tensors) or tensors


def put(name, place, value):
    def edit(tensors):
        tensors[name][place] = value

    return edit


def rows_cut(tensors):
    return {name: tensor[:-1] for name, tensor in tensors.items()}


SEVERAL = int(np.flatnonzero(build_projection(trained.pair(*PAIR)).indices[:, 1] >= 0)[0])


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda t: {**t, "weights": t["weights"].astype(np.float64)}, "int32 and float64"),
        (lambda t: {**t, "indices": t["indices"].astype(np.int64)}, "int64 and float32"),
        (lambda t: {**t, "weights": t["weights"][:, :3]}, "shapes"),
        (lambda t: {name: tensor[:, :0] for name, tensor in t.items()}, "shapes"),
        (lambda t: {name: tensor[:, 0] for name, tensor in t.items()}, "shapes"),
        (rows_cut, "rows, but"),
        (put("indices", (5, 0), 10**6), "has ids that"),
        (put("indices", (5, 3), -2), "has ids that"),
        (put("weights", (5, 0), np.nan), "negative or not finite"),
        (put("weights", (5, 0), np.inf), "negative or not finite"),
        (put("weights", (5, 0), -1.0), "negative or not finite"),
        (put("weights", (SEVERAL, 0), 0.2), "do not sum to 1"),
        (put("weights", (5, 3), 0.5), "sorted by falling weight and padded"),
        (put("weights", SEVERAL, [0.2, 0.8, 0, 0]), "sorted by falling weight and padded"),
        (put("indices", (SEVERAL, 0), -1), "sorted by falling weight and padded"),
    ],
)
def test_content_that_is_no_w_is_refused(saved, monkeypatch, edit, expected):
    pair = trained.pair(*PAIR)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in faulty(edit).items()}
    monkeypatch.setattr(files, "_stored", lambda projection: tensors)
    save_projection(saved, build_projection(pair), pair)
    with pytest.raises(UserError, match=expected):
        load_projection(saved, pair)


def test_a_trained_w_is_sorted_when_it_is_saved(tmp_path):
    """Its heaviest entry may no longer stand first, and one may have become 0."""
    pair = trained.pair(*PAIR)
    built = build_projection(pair)
    logits = np.random.default_rng(0).normal(size=built.weights.shape).astype(np.float32) * 60
    w = dataclasses.replace(built.learnable(), logits=logits).projection()
    assert (np.diff(np.asarray(w.weights), axis=1) > 0).any()
    save_projection(tmp_path / "w.safetensors", w, pair)
    loaded = load_projection(tmp_path / "w.safetensors", pair)
    eye = np.eye(8, pair.student.size, SEVERAL, dtype=np.float32)
    np.testing.assert_array_equal(loaded.project(eye), w.project(eye))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    before = saved.read_bytes()
    pair = trained.pair(*PAIR)

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        save_projection(saved, build_projection(pair, entries=2), pair)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_two_writers_at_once(tmp_path):
    """Whoever comes last wins; a reader finds a whole file at any time."""
    pair, path = trained.pair(*PAIR), tmp_path / "w.safetensors"
    built = [build_projection(pair, entries=entries) for entries in (2, 4)]
    save_projection(path, built[0], pair)

    def write(w):
        for _ in range(20):
            save_projection(path, w, pair)

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write, w) for w in built]
        while not all(writer.done() for writer in writers):
            assert load_projection(path, pair).indices.shape[1] in (2, 4)
        for writer in writers:
            writer.result()
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_save_leaves_nothing_once_it_is_given_again(saved):
    pair, before = trained.pair(*PAIR), saved.read_bytes()
    other = build_projection(pair, entries=2)
    for moment in itertools.count():
        if not killed(moment, lambda: save_projection(saved, other, pair)):
            break
        assert saved.read_bytes() in (before, reference(other, pair, saved.with_name("reference")))
        save_projection(saved, build_projection(pair), pair, ProjectionOptions())
        assert sorted(p.name for p in saved.parent.iterdir()) == [saved.name]
    assert moment >= 2


def reference(projection, pair, path):
    """The bytes of a W; leaves no file."""
    save_projection(path, projection, pair)
    content = path.read_bytes()
    path.unlink()
    return content
