"""W in the user's cache folder: built once, never wrong, and never in the way."""

import multiprocessing
import os
import stat

import numpy as np
import pytest
from tokens import trained

from xtoken_jax.errors import UserError
from xtoken_jax.files.trust import UntrustedFileWarning
from xtoken_jax.projection import cache
from xtoken_jax.projection.build import ProjectionOptions, build_projection
from xtoken_jax.projection.cache import cache_path, cached_projection
from xtoken_jax.tokens.tokenizer import TokenizerPair

PAIR = (trained.three_digits, trained.single_digits)


@pytest.fixture
def builds(monkeypatch, tmp_path):
    """Counts the builds; the cache is a folder of the test."""
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "cache"))
    done = []

    def build(pair, **options):
        done.append(options)
        return build_projection(pair, **options)

    monkeypatch.setattr(cache, "build_projection", build)
    return done


def same(one, other):
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_array_equal(one.weights, other.weights)
    assert one.teacher_size == other.teacher_size


def test_built_once(builds, tmp_path):
    pair = trained.pair(*PAIR)
    for _ in range(3):
        same(cached_projection(pair), build_projection(pair))
    assert len(builds) == 1
    (file,) = (tmp_path / "cache" / "projections").iterdir()
    assert file == cache_path(pair, ProjectionOptions())


def test_every_option_pair_and_algorithm_has_a_file_of_its_own(builds, monkeypatch):
    pair = trained.pair(*PAIR)
    options = [{}, {"entries": 2}, {"reverse": True}, {"scale_trick": True}, {"similar_special": True}]
    for named in options * 2:
        same(cached_projection(pair, **named), build_projection(pair, **named))
    assert len(builds) == len(options)
    other = trained.pair(*reversed(PAIR))
    same(cached_projection(other), build_projection(other))
    monkeypatch.setattr(cache, "ALGORITHM", cache.ALGORITHM + 1)
    cached_projection(pair)
    assert len(builds) == len(options) + 2


@pytest.mark.parametrize(
    "damage", [lambda c: b"", lambda c: c[:-9], lambda c: c[:-1] + b"x", lambda c: b"x" * 99]
)
def test_a_damaged_file_is_built_again(builds, damage):
    pair = trained.pair(*PAIR)
    cached_projection(pair)
    path = cache_path(pair, ProjectionOptions())
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    same(cached_projection(pair), build_projection(pair))
    assert len(builds) == 2
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_no_error(builds, monkeypatch, tmp_path):
    pair = trained.pair(*PAIR)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path / "file" / "below"))
    for _ in range(2):
        same(cached_projection(pair), build_projection(pair))
    assert len(builds) == 2
    assert (tmp_path / "file").read_text() == "not a folder"


def test_where_it_is(monkeypatch, tmp_path):
    pair = trained.pair(*PAIR)
    monkeypatch.delenv("XTOKEN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path(pair, ProjectionOptions()).parent == tmp_path / "xtoken-jax" / "projections"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_path(pair, ProjectionOptions()).parent == tmp_path / ".cache" / "xtoken-jax" / "projections"


def test_a_mistake_in_the_options_is_told(builds):
    with pytest.raises(UserError, match="entries=0"):
        cached_projection(trained.pair(*PAIR), entries=0)


def build_in_a_process(folders, folder, queue):
    os.environ["XTOKEN_CACHE"] = folder
    queue.put(cached_projection(TokenizerPair.load(*folders)).weights.tobytes())


def test_two_processes_at_once(builds, tmp_path):
    folders = [str(tmp_path / make.__name__) for make in PAIR]
    for folder, make in zip(folders, PAIR, strict=True):
        trained.save(folder, *make())
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (folders, str(tmp_path / "cache"), queue)
    processes = [context.Process(target=build_in_a_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    pair = TokenizerPair.load(*folders)
    assert found == {build_projection(pair).weights.tobytes()}
    same(cached_projection(pair), build_projection(pair))
    assert builds == []  # what they left is whole
    assert len(list((tmp_path / "cache" / "projections").iterdir())) == 1


def test_files_of_others_are_built_again_with_a_word(builds, tmp_path):
    pair = trained.pair(*PAIR)
    cached_projection(pair)
    path = cache_path(pair, ProjectionOptions())
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o666)
    with pytest.warns(UntrustedFileWarning, match="can be written by other users; it is not read"):
        same(cached_projection(pair), build_projection(pair))
    assert len(builds) == 2
    cached_projection(pair)  # now it is the user's
    assert len(builds) == 2
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.warns(UntrustedFileWarning, match="is a link to"):
        cached_projection(pair)
    assert len(builds) == 3
    assert not path.is_symlink()
