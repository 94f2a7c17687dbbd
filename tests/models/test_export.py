"""An exported folder: whole or not there, readable again, and never in place of something else."""

import errno
import functools
import itertools
import json
import os
import shutil

import jax
import numpy as np
import pytest
from full_disk import files_of_at_most
from kills import killed

from models import tiny
from xtoken_jax.errors import UserError
from xtoken_jax.files.new_files import new_folder
from xtoken_jax.models import load_model
from xtoken_jax.models.hf import export
from xtoken_jax.models.hf.export import check_replaceable, export_hf
from xtoken_jax.tokens.tokenizer import Tokenizer


@pytest.fixture
def student(tmp_path):
    """A student's folder with tokenizer files, and one that must not be copied."""
    folder = tiny.copy("llama3", tmp_path / "student")
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "training_args.bin").write_bytes(b"pickle")
    return folder


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_is_read_back_as_the_same_model(student, tmp_path):
    model, params = load_model(student)
    out = tmp_path / "runs" / "export"
    assert export_hf(out, model, params, student, dtype="float16") == out
    assert sorted(os.listdir(out)) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "xtoken.json",
    ]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (student / name).read_bytes()
    again, same = load_model(out)
    assert again.config == model.config
    for a, b in zip(np.asarray(same["embedding"]), np.asarray(params["embedding"]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert os.listdir(out.parent) == ["export"]


@pytest.mark.parametrize("spellings", [("dtype",), ("torch_dtype",), ("torch_dtype", "dtype"), ()])
def test_the_config_is_the_one_read_but_for_the_dtype(spellings, tmp_path):
    given = {"dtype": ..., "torch_dtype": ..., **dict.fromkeys(spellings, "float16")}
    student = tiny.copy("llama3", tmp_path / "student", **given, use_cache=False)
    model, params = load_model(student)
    before = json.loads((student / "config.json").read_text())
    out = export_hf(tmp_path / "out", model, params, student, dtype="bfloat16")
    said = dict.fromkeys(spellings or ["torch_dtype"], "bfloat16")
    assert json.loads((out / "config.json").read_text()) == {**before, **said}
    assert load_model(out)[0].config.dtype == "bfloat16"
    out = export_hf(tmp_path / "out", model, params, student, dtype="source")
    assert json.loads((out / "config.json").read_text()) == before


def test_the_dtypes_of_the_source_need_its_weights(student, tmp_path):
    model, params = load_model(student)
    (student / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights in"):
        export_hf(tmp_path / "out", model, params, student, dtype="source")
    assert sorted(os.listdir(tmp_path)) == ["student"]


def test_large_weights_are_several_files_and_replace_each_other(student, tmp_path):
    model, params = load_model(student)
    files = []
    for size in ("20KB", "50KB", "5GB", "20KB"):
        out = export_hf(tmp_path / "out", model, params, student, max_shard_size=size)
        files.append(sum(name.endswith(".safetensors") for name in os.listdir(out)))
        assert (out / "model.safetensors.index.json").is_file() == (size != "5GB")
        jax.tree.map(np.testing.assert_array_equal, load_model(out)[1], params)
    assert files == [5, 2, 1, 5]
    assert sorted(os.listdir(tmp_path)) == ["out", "student"]


def test_an_earlier_export_is_replaced_whole(student, tmp_path):
    model, params = load_model(student)
    out = export_hf(tmp_path / "out", model, params, student)
    (student / "chat_template.jinja").unlink()
    other, other_params = load_model(tiny.DATA / "tied")
    export_hf(out, other, other_params, student)
    assert load_model(out)[0].config.tie_embeddings
    assert not (out / "chat_template.jinja").exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "student"]


def test_an_empty_folder_is_filled(student, tmp_path):
    model, params = load_model(student)
    (tmp_path / "out").mkdir()
    export_hf(tmp_path / "out", model, params, student)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert sorted(os.listdir(tmp_path)) == ["out", "student"]


def test_nothing_else_is_overwritten(student, tmp_path):
    model, params = load_model(student)

    def refused(out, words):
        before = sorted(os.listdir(out)) if out.is_dir() else out.read_bytes()
        with pytest.raises(UserError, match=words):
            export_hf(out, model, params, student)
        assert (sorted(os.listdir(out)) if out.is_dir() else out.read_bytes()) == before

    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.tex").write_text("x")
    refused(work, "holds thesis.tex")
    out = export_hf(tmp_path / "out", model, params, student)
    (out / "notes.md").write_text("x")
    refused(out, "holds notes.md")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text("{}")
    refused(tmp_path / "half", "not an earlier export")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "it is a file")
    (student / "training_args.bin").unlink()
    (student / "expected.npz").unlink()
    refused(student, "student's own folder")


def refusal(out, *arguments, **options):
    """The one line of an export that is refused and leaves everything as it was."""
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        export_hf(out, *arguments, **options)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert "\n" not in str(error.value)
    return str(error.value)


def test_only_an_export_of_the_same_run_is_replaced_unless_overwrite_insists(student, tmp_path):
    read = *load_model(student), student
    teacher = tiny.copy("tied", tmp_path / "teacher")
    (teacher / "expected.npz").unlink()
    assert "a model that this run did not export; name a new folder, or replace it with --overwrite" in (
        refusal(teacher, *read, run="a")
    )
    export_hf(tmp_path / "out", *read, run="a")
    export_hf(tmp_path / "out", *read, run="a")
    for other in ("b", None):
        assert "the export of another run" in refusal(tmp_path / "out", *read, run=other)
    (tmp_path / "out" / "README.md").write_text("a card")
    assert "holds README.md" in refusal(tmp_path / "out", *read, run="a")
    for folder in (teacher, tmp_path / "out"):
        export_hf(folder, *read, run="b", overwrite=True)
        assert json.loads((folder / "xtoken.json").read_text())["run"] == "b"
        assert not (folder / "README.md").exists()


def test_what_must_be_kept_is_not_replaced_whoever_insists(student, tmp_path, monkeypatch):
    read = *load_model(student), student
    run = tmp_path / "runs" / "mine"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "elsewhere" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere" / "here")
    kept = {"keep": [run], "overwrite": True, "run": "a"}
    for out in (run, run.parent, tmp_path / "link", tmp_path, tmp_path / "elsewhere"):
        assert "which must be kept" in refusal(out, *read, **kept)
    assert "student's own folder" in refusal(student, *read, **kept)
    export_hf(run / "student", *read, **kept)


def test_what_converters_read_is_copied(student, tmp_path):
    names = ("tokenizer.model", "added_tokens.json", "vocab.json", "merges.txt", "spiece.model", "vocab.txt")
    for name in (*names, "special_tokens_map.json", "chat_template.json"):
        (student / name).write_bytes(name.encode() + b"\xff")
    out = export_hf(tmp_path / "out", *load_model(student), student)
    for name in (*names, "special_tokens_map.json", "chat_template.json"):
        assert (out / name).read_bytes() == name.encode() + b"\xff"
    assert not (out / "training_args.bin").exists()


def test_a_template_given_is_the_only_one_in_the_folder(student, tmp_path):
    (student / "tokenizer_config.json").write_bytes(
        b'\xef\xbb\xbf{"eos_token": "</s>", "chat_template": "old", "x": "\xc3\xa9"}'
    )
    (student / "chat_template.json").write_text('{"chat_template": "old"}')
    (tmp_path / "new.jinja").write_bytes(b"\xef\xbb\xbfnew")
    template = str(tmp_path / "new.jinja")
    out = export_hf(tmp_path / "out", *load_model(student), student, chat_template=template)
    assert (out / "chat_template.jinja").read_bytes() == b"new"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"eos_token": "</s>", "x": "é"}
    assert not (out / "chat_template.json").exists()


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json", "the template", "given"])
def test_a_byte_order_mark_is_not_part_of_a_template(place, pair_folders, tmp_path):
    folder, given = shutil.copytree(pair_folders[0], tmp_path / "student"), None
    mark, config = "\ufeff", json.loads((folder / "tokenizer_config.json").read_text())
    if place in ("chat_template.jinja", "given"):
        given = folder / place
        given.write_text(mark + "x")
    else:
        inside = mark if place == "the template" else ""
        text = json.dumps(config | {"chat_template": inside + "x"})
        (folder / "tokenizer_config.json").write_text(mark.removeprefix(inside) + text)
    chosen = str(given) if place == "given" else None
    tokenizer = Tokenizer.load(folder, compare_auto=False, chat_template=chosen)
    assert tokenizer.chat_template == "x"
    assert tokenizer.roles["eos"] == Tokenizer.load(pair_folders[0], compare_auto=False).roles["eos"]


@pytest.mark.parametrize(
    ("config", "generation", "config_after", "generation_after"),
    [
        (2, {"eos_token_id": 2, "top_k": 3}, [2, 5], {"eos_token_id": [2, 5], "top_k": 3}),
        ([2, 5], {"eos_token_id": [5]}, [2, 5], {"eos_token_id": [5]}),
        (2, {"top_k": 3}, [2, 5], {"eos_token_id": [2, 5], "top_k": 3}),
        (None, None, 5, None),
        (5, None, 5, None),
    ],
)
def test_the_ends_that_were_learnt_are_named(config, generation, config_after, generation_after, tmp_path):
    student = tiny.copy("llama3", tmp_path / "student", eos_token_id=config)
    if generation is not None:
        (student / "generation_config.json").write_text(json.dumps(generation))
    out = export_hf(tmp_path / "out", *load_model(student), student, ends=[5])
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == config_after
    path = out / "generation_config.json"
    assert (json.loads(path.read_text()) if path.is_file() else None) == generation_after


@pytest.mark.parametrize("step", ["save_weights", "_swap_in"])
def test_a_failure_leaves_what_was_there(step, student, tmp_path, monkeypatch):
    model, params = load_model(student)
    out = export_hf(tmp_path / "out", model, params, student)
    before = contents(out)

    def fail(*args, **kwargs):
        raise RuntimeError("disk full")

    monkeypatch.setattr(export, step, fail)
    with pytest.raises(RuntimeError, match="disk full"):
        export_hf(out, model, params, student)
    with pytest.raises(RuntimeError, match="disk full"):
        export_hf(tmp_path / "new", model, params, student)
    assert contents(out) == before
    assert sorted(os.listdir(tmp_path)) == ["out", "student"]


@pytest.mark.parametrize("size", [0, 30_000])
def test_a_full_disk_names_the_folder_which_is_as_it_was(size, student, tmp_path):
    """With no room for a byte, and with none for the weights."""
    model, params = load_model(student)
    out = export_hf(tmp_path / "out", model, params, student)
    before = contents(out)
    for folder in (out, tmp_path / "new"):
        words = rf"^{folder}: cannot be written \(File too large\).*give the same command again"
        with files_of_at_most(size), pytest.raises(UserError, match=words):
            export_hf(folder, model, params, student)
    assert contents(out) == before
    assert sorted(os.listdir(tmp_path)) == ["out", "student"]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_kill_at_any_moment_leaves_the_old_export_or_the_new_one(at_once, student, tmp_path, monkeypatch):
    """At its place; where folders cannot be exchanged, the old one may be beside it until the next export."""
    if not at_once:
        monkeypatch.setattr(export, "_exchange", lambda a, b: False)
    elif not export._exchange(student, student):
        pytest.skip("this system or disk cannot exchange folders")
    model, params = load_model(tiny.DATA / "tied")
    old = contents(export_hf(tmp_path / "old", *load_model(student), student))
    new = contents(export_hf(tmp_path / "new", model, params, student, max_shard_size="20KB"))
    work = tmp_path / "work"
    again = functools.partial(export_hf, work / "out", model, params, student, max_shard_size="20KB")
    seen = []
    for moment in itertools.count():
        shutil.copytree(tmp_path / "old", work / "out")
        ended = killed(moment, again)
        place = "out" if (work / "out").exists() else next(n for n in os.listdir(work) if n.endswith(".old"))
        found = contents(work / place)
        assert found in (old, new)
        seen.append(("new" if found == new else "old", place[-4:]))
        again()
        assert contents(work / "out") == new
        assert os.listdir(work) == ["out"]
        shutil.rmtree(work)
        if not ended:
            break
    between = [] if at_once else [("old", ".old")]
    assert [state for state, _ in itertools.groupby(seen)] == [("old", "out"), *between, ("new", "out")]


def test_an_export_behind_a_link_is_replaced_there(student, tmp_path):
    model, params = load_model(student)
    export_hf(tmp_path / "real", model, params, student)
    (tmp_path / "link").symlink_to("real")
    export_hf(tmp_path / "link", *load_model(tiny.DATA / "tied"), student)
    assert load_model(tmp_path / "real")[0].config.tie_embeddings
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["link", "real", "student"]


def test_what_a_killed_export_left_behind_is_not_mixed_in(student, tmp_path):
    model, params = load_model(student)
    left = tmp_path / ".out.0123456789abcdef.partial"
    left.mkdir()
    (left / "generation_config.json").write_text("stale")
    out = export_hf(tmp_path / "out", model, params, student)
    assert not (out / "generation_config.json").exists()
    assert not left.exists()


def test_a_missing_tokenizer_folder_is_refused_before_anything_is_written(tmp_path):
    model, params = load_model(tiny.DATA / "tied")
    with pytest.raises(UserError, match="no such tokenizer folder"):
        export_hf(tmp_path / "out", model, params, tmp_path / "nowhere")
    assert os.listdir(tmp_path) == []


def test_links_planted_next_to_the_folder_are_not_followed(student, tmp_path):
    """Under the names of working folders of earlier versions, and under names like those of today."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "config.json").write_text("mine")
    work = tmp_path / "work"
    work.mkdir()
    for name in (".out.partial", ".out.old", f".out.{'0' * 16}.partial", f".out.{'0' * 16}.old"):
        (work / name).symlink_to(precious)
    model, params = load_model(student)
    for _ in range(2):
        export_hf(work / "out", model, params, student)
        assert os.listdir(precious) == ["config.json"]
        assert (precious / "config.json").read_text() == "mine"
    assert sum(path.is_symlink() for path in work.iterdir()) == 4
    assert (work / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["vocab.txt", "chat_template.jinja", "tokenizer.model", "tokenizer.json"])
def test_a_link_out_of_the_students_folder_is_not_copied(name, student, tmp_path):
    read = *load_model(student), student
    secret = tmp_path / "id_rsa"
    secret.write_text("private")
    (student / name).unlink(missing_ok=True)
    (student / name).symlink_to("../id_rsa")
    words = rf"^{student}/{name}: is a link to \.\./id_rsa, outside of the model's folder"
    with pytest.raises(UserError, match=words):
        export_hf(tmp_path / "out", *read)
    with pytest.raises(UserError, match=words):  # before training
        check_replaceable(tmp_path / "out", student)
    assert not (tmp_path / "out").exists()


def test_links_within_the_students_folder_and_into_the_hubs_cache_are_copied(student, tmp_path):
    read = load_model(student)
    (student / "vocab.txt").symlink_to("tokenizer.json")
    (tmp_path / "link").symlink_to(student)
    export_hf(tmp_path / "out", *read, tmp_path / "link")
    assert (tmp_path / "out" / "vocab.txt").read_text() == '{"model": {}}'
    hub = tmp_path / "hub" / "models--org--name"
    snapshot = hub / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for path in list(student.iterdir()):
        if not path.is_symlink():
            path.rename(hub / "blobs" / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    export_hf(tmp_path / "other", *read, snapshot)
    assert (tmp_path / "other" / "tokenizer.json").read_text() == '{"model": {}}'
    assert not (tmp_path / "other" / "tokenizer.json").is_symlink()


def test_what_cannot_be_removed_is_an_error(student, tmp_path, monkeypatch):
    read = *load_model(student), student
    export_hf(tmp_path / "out", *read)

    def refuse(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("shutil.rmtree", refuse)
    with pytest.raises(UserError, match=r"\.out\..*: left over, and cannot be removed \(Permission denied\)"):
        export_hf(tmp_path / "out", *read)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_two_exports_at_once_do_not_take_each_other_s_files(student, tmp_path):
    read = *load_model(student), student
    with new_folder(tmp_path / "out") as other:
        (other / "config.json").write_text("being written by another process")
        export_hf(tmp_path / "out", *read)
        assert (other / "config.json").is_file()
    assert sorted(os.listdir(tmp_path)) == ["out", "student"]
