"""Whose a run's folder is: settings and content, compared by key."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file, save_file

from xtoken_jax.data.sources import read_sources
from xtoken_jax.distributed.mesh import single_device_mesh
from xtoken_jax.errors import UserError
from xtoken_jax.models import load_model
from xtoken_jax.models.load import open_model
from xtoken_jax.projection.build import build_projection
from xtoken_jax.run.experiment import load_experiment
from xtoken_jax.run.folder import claim, contents, finished
from xtoken_jax.run.report import draw_curves
from xtoken_jax.run.student import export_checkpoint, export_student
from xtoken_jax.tokens.tokenizer import TokenizerPair

WEIGHTS = "model.safetensors"


@pytest.fixture
def words(words, pair_folders, tmp_path):
    """As everywhere, with folders of the test's own."""
    for side, folder in zip(("student", "teacher"), pair_folders, strict=True):
        shutil.copytree(folder, tmp_path / side)
    paths = [f"student.path={tmp_path / 'student'}", f"teacher.path={tmp_path / 'teacher'}"]
    return [*words, *paths, f"run_dir={tmp_path / 'run'}"]


def claimed(words):
    """Claim the run's folder as `distill` does."""
    experiment = load_experiment(words)
    mesh = single_device_mesh()
    pair = TokenizerPair.load(experiment.student.path, experiment.teacher.path)
    sides = {"student": (experiment.student, pair.student), "teacher": (experiment.teacher, pair.teacher)}
    models = {
        name: (*open_model(config, tokenizer.size, mesh=mesh, key=jax.random.key(0)), tokenizer)
        for name, (config, tokenizer) in sides.items()
    }
    texts = {
        part: {name: documents.digest for name, documents in read_sources(sources).items()}
        for part, sources in (("train", experiment.data.train), ("validation", experiment.data.validation))
    }
    return claim(
        Path(experiment.run_dir), experiment, contents(models, {"projection": build_projection(pair)}, texts)
    )


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_a_weight(folder):
    tensors = load_file(folder / WEIGHTS)
    last = sorted(tensors)[-1]
    tensors[last].reshape(-1)[-1] += 1e-6
    save_file(tensors, folder / WEIGHTS)


def append_a_document(folder):
    with (folder / "text.jsonl").open("a") as file:
        file.write('{"text": "1+1=2, as nobody doubts.\\n"}\n')


def change_a_role(folder):
    edit_json(folder / "tokenizer_config.json", bos_token="<eos>")


CHANGES = {
    "student.weights": lambda root: change_a_weight(root / "student"),
    "teacher.weights": lambda root: change_a_weight(root / "teacher"),
    "student.config": lambda root: edit_json(root / "student" / "config.json", rope_theta=20000.0),
    "student.tokenizer": lambda root: change_a_role(root / "student"),
    "data.train.text": append_a_document,
}


def test_the_same_run_is_accepted_on_any_mesh_and_wherever_its_weights_are_cut(words, tmp_path):
    assert claimed(words) == []
    first = (tmp_path / "run" / "run.json").read_bytes()
    assert claimed(words) == []
    tensors = load_file(tmp_path / "student" / WEIGHTS)
    save_file(dict(sorted(tensors.items(), reverse=True)), tmp_path / "student" / WEIGHTS, {"format": "pt"})
    free = [
        "mesh.fsdp=2",
        "mesh.data=4",
        "train.save_every=7",
        "train.keep=9",
        "train.non_finite=skip",
        "train.max_skips=3",
    ]
    assert claimed([*words, *free]) == []
    assert (tmp_path / "run" / "run.json").read_bytes() == first


@pytest.mark.parametrize("key", CHANGES)
def test_changed_content_is_refused_by_name_and_accepted_by_key(key, words, tmp_path):
    claimed(words)
    first = (tmp_path / "run" / "run.json").read_bytes()
    CHANGES[key](tmp_path)
    with pytest.raises(UserError, match=rf"holds another run \({key}=.* there, .* here") as refusal:
        claimed(words)
    message = str(refusal.value)
    assert "\n" not in message
    keys = message.rpartition("resume.allow=[")[2].removesuffix("]").split(",")
    expected = {key, "data.validation.text"} if key.startswith("data") else {key}
    assert set(keys) == expected
    assert (tmp_path / "run" / "run.json").read_bytes() == first

    with pytest.raises(UserError, match="holds another run"):
        claimed([*words, "resume.allow=[loss,optimizer,teacher.path]"])
    for allow in (",".join(keys), key.split(".")[0]):
        (tmp_path / "run" / "run.json").write_bytes(first)
        assert {d.key for d in claimed([*words, f"resume.allow=[{allow}]"])} == expected
        assert claimed(words) == []  # from now on this is what the folder holds
    written = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [line.partition("=")[0] for line in written["changes"]] == keys


def test_changed_settings_are_refused_by_name_and_accepted_by_key(words, tmp_path):
    claimed(words)
    changed = [*words, "loss.temperature=2", "optimizer.learning_rate=1", "train.steps=7", "loss.top_k=9"]
    with pytest.raises(UserError, match=r"loss.temperature=1.0 there, 2.0 here.*\[loss,optimizer,train\]$"):
        claimed(changed)
    accepted = claimed([*changed, "resume.allow=[loss,optimizer.learning_rate,train]"])
    assert len(accepted) == 4
    assert claimed(changed) == []
    with pytest.raises(UserError, match="did you mean loss"):
        load_experiment([*words, "resume.allow=[los]"])


def test_another_w_is_refused(words, tmp_path):
    experiment = load_experiment(words)
    pair = TokenizerPair.load(experiment.student.path, experiment.teacher.path)
    others = [contents({}, {"projection": build_projection(pair, entries=k)}, {}) for k in (1, 4)]
    claim(tmp_path / "run", experiment, others[0])
    with pytest.raises(UserError, match=r"holds another run \(projection="):
        claim(tmp_path / "run", experiment, others[1])


def test_a_w_that_trained_is_neither_left_out_nor_put_on_other_entries(words, tmp_path):
    """Whatever is allowed; before the first checkpoint there is none yet."""
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "2"
    words = [*words, "loss=p_kl", "resume.allow=[loss,projection,teachers]"]
    trained = [*words, "loss.learn_projection=true"]
    other = ["teachers.other.path=there", "data.teacher_lengths.other=8", "teachers.other.loss.kind=p_kl"]
    learns = "teachers.other.loss.learn_projection=true"
    content = {"projection": "1", "teachers.other.projection": "1"}

    def claims(words, **changed):
        return {d.key for d in claim(run, load_experiment(words), content | changed)}

    assert claims(trained) == set()
    assert claims(words) == {"loss.learn_projection"}
    checkpoint.mkdir(parents=True)
    assert claims(trained) == {"loss.learn_projection"}
    first = (run / "run.json").read_bytes()
    for changes, message in (
        (lambda: claims(words), "for which loss.learn_projection=false has no place"),
        (lambda: claims(trained, projection="2"), "which do not fit another projection; put"),
    ):
        with pytest.raises(UserError, match=message) as refusal:
            changes()
        assert str(refusal.value).startswith(f"{run}: its checkpoints hold a trained W and its moments, ")
        assert "\n" not in str(refusal.value)
        assert (run / "run.json").read_bytes() == first
    assert claims(trained) == set()
    # another teacher's W may begin to train, but not end
    more = [*trained, *other, "resume.allow=[teachers,data.teacher_lengths]"]
    assert {key.split(".")[0] for key in claims([*more, learns])} == {"teachers", "data"}
    for left in (more, [*trained, "resume.allow=[teachers,data]"]):
        with pytest.raises(
            UserError, match=r"which teachers\.other\.loss\.learn_projection=false has no place"
        ):
            claims(left)


def test_what_earlier_versions_wrote_is_taken_over(words, tmp_path):
    claimed(words)
    path = tmp_path / "run" / "run.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "contents"}))
    assert claimed(words) == []
    assert json.loads(path.read_text()) == settings


def test_settings_that_came_up_since_are_as_by_default(words, tmp_path):
    claimed(words)
    path = tmp_path / "run" / "run.json"
    settings = json.loads(path.read_text())
    assert settings.pop("teachers") == {}
    path.write_text(json.dumps(settings))
    assert claimed(words) == []
    path.write_text(json.dumps(settings | {"teacher_force": 1}))
    with pytest.raises(UserError, match=r"run.json: teacher_force is no setting of this version"):
        claimed(words)


def test_a_start_that_was_killed_leaves_a_folder_that_can_be_taken(words, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.json.0123456789abcdef.partial").write_text('{"name"')
    assert claimed(words) == []
    (tmp_path / "run" / "run.json").write_text('{"name"')
    with pytest.raises(UserError, match=r"run.json: not the file of a run"):
        claimed(words)


def test_a_folder_that_cannot_be_written_is_one_line(words, tmp_path, monkeypatch):
    def read_only(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    experiment = load_experiment(words)
    monkeypatch.setattr("xtoken_jax.files.os.replace", read_only)
    with pytest.raises(UserError, match=r"run: cannot be written \(Read-only file system\); choose another"):
        claim(tmp_path / "run", experiment, {})
    assert list((tmp_path / "run").iterdir()) == []  # nothing half-written is left
    monkeypatch.undo()
    assert claim(tmp_path / "run", experiment, {}) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student.path", "${oc.env:SOME_SECRET}"),
        ("data.train.text.path", "x${oc.decode:${oc.env:SOME_SECRET}}"),
        ("name", "${embedded:x}"),
        ("changes", ["${oc.env:SOME_SECRET}"]),
        ("contents.${oc.env:SOME_SECRET}", "1"),
    ],
)
def test_nothing_in_a_run_file_is_looked_up(key, value, words, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "do not print me")
    claimed(words)
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    *groups, last = re.split(r"\.(?![^{]*\})", key)
    part = content
    for group in groups:
        part = part[group]
    part[last] = value
    path.write_text(json.dumps(content))
    for read in (lambda: claimed(words), lambda: export_checkpoint(tmp_path / "run", None, tmp_path / "out")):
        with pytest.raises(UserError, match=r"run\.json: .* holds \$\{\.\.\.\}") as refusal:
            read()
        assert "do not print me" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "checkpoints", "no_teacher", "tensorboard"])
def test_a_run_with_a_link_that_leads_out_is_refused(name, words, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    claimed(words)
    link = tmp_path / "run" / name
    link.unlink(missing_ok=True)
    link.symlink_to(precious / "file" if "." in name else precious)
    expected = rf"run/{name}: is a link to {precious}.*, outside of"
    for act in (
        lambda: claimed(words),
        lambda: export_checkpoint(tmp_path / "run", None, tmp_path / "out"),
        lambda: draw_curves(tmp_path / "run"),
    ):
        with pytest.raises(UserError, match=expected):
            act()
    assert [path.name for path in precious.iterdir()] == ["file"]
    assert (precious / "file").read_text() == "mine"


def test_a_run_below_a_link_is_the_same_run(words, tmp_path):
    claimed(words)
    (tmp_path / "scratch").mkdir()
    (tmp_path / "run").rename(tmp_path / "scratch" / "run")
    (tmp_path / "run").symlink_to(tmp_path / "scratch" / "run")
    assert claimed(words) == []


def test_the_exported_template_is_the_run_s_copy(words, tmp_path):
    """A path in a stranger's run.json could name any file of the user's."""
    template, secret = tmp_path / "t.jinja", tmp_path / "id_rsa"
    template.write_text("{{ messages }}")
    secret.write_text("private")
    words = [*words, f"student.chat_template={template}"]
    claimed(words)
    copy = tmp_path / "run" / "chat_template.jinja"
    assert copy.read_text() == "{{ messages }}"
    edit_json(
        tmp_path / "run" / "run.json",
        student=json.loads((tmp_path / "run" / "run.json").read_text())["student"]
        | {"chat_template": str(secret)},
    )
    model, params = load_model(tmp_path / "student")
    export_student(tmp_path / "run", tmp_path / "out", model, params)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    copy.unlink()
    with pytest.raises(UserError, match=r"has no chat_template\.jinja, the copy of "):
        export_student(tmp_path / "run", tmp_path / "other", model, params)


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"figures": 3}', '{"figures": {}}', '{"figures"', "\x80", '{"figures": {"x": NaN}}'],
)
def test_a_run_with_a_broken_result_is_not_finished(content, words, tmp_path):
    experiment = load_experiment(words)
    claim(tmp_path / "run", experiment, {})
    (tmp_path / "run" / "result.json").write_text(json.dumps({"figures": {"distilled": {"x": 1.0}}}))
    assert finished(tmp_path / "run", experiment) is not None
    (tmp_path / "run" / "result.json").write_text(content)
    assert finished(tmp_path / "run", experiment) is None


def test_a_secret_in_a_setting_is_refused_without_its_value(words, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "sk-0123456789abcdef")
    for value in ("${oc.env:MY_API_KEY}", "s3://${oc.env:MY_API_KEY}@here", "sk-0123456789abcdef"):
        with pytest.raises(
            UserError, match=r"^data\.train\.text\.path: holds the value of MY_API_KEY"
        ) as error:
            load_experiment([*words, f"data.train.text.path={value}"])
        assert "sk-0123456789abcdef" not in str(error.value)
    monkeypatch.setenv("HERE", "text.jsonl")
    assert load_experiment([*words, "name=${oc.env:HERE}"]).name == "text.jsonl"
