"""Which names reach the hub, and what a user reads when nothing is there."""

import logging
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects

from xtoken_jax.data.formats.hugging_face import HubRows
from xtoken_jax.data.sources import SourceConfig, read_documents
from xtoken_jax.errors import UserError
from xtoken_jax.hub import resolve_folder
from xtoken_jax.tokens.tokenizer import Tokenizer


@pytest.fixture
def hub(monkeypatch):
    """Records what was asked of the hub and answers with a folder."""
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return "/cache/snapshot"

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    return asked


def test_a_folder_is_itself(tmp_path, monkeypatch, hub):
    assert resolve_folder(tmp_path) == tmp_path
    assert resolve_folder(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_folder("~/org") == tmp_path / "org"
    assert hub == []


@pytest.mark.parametrize(
    "text",
    [
        "a/b@",
        "a@v1/b",
        "a/b@/v1",
        "@v1",
        "a@v1",
        "./a/b@v1",
        "a/b@v1@v2",
        "/no/such",
        "./no/such",
        "../no",
        "~/no-such",
        "no-such",
        "a/b/c",
        "a/b/",
        "a/",
        "a/.b",
        "a b/c",
    ],
)
def test_what_looks_like_a_path_never_reaches_the_hub(text, hub):
    with pytest.raises(UserError, match="no such folder") as caught:
        resolve_folder(text)
    assert text in str(caught.value)
    assert hub == []


def test_a_path_object_never_reaches_the_hub(hub):
    with pytest.raises(UserError, match="no such folder: org/name"):
        resolve_folder(Path("org/name"))
    assert hub == []


def test_a_file_or_nothing_is_refused(tmp_path, hub):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        resolve_folder(tmp_path / "file")
    with pytest.raises(UserError, match="empty"):
        resolve_folder("")
    assert hub == []


RESPONSE = Mock(headers={})  # the client's own errors want one
# what repositories of these models hold
REPOSITORY = {
    "config.json": "text", "generation_config.json": "text", "tokenizer.json": "text",
    "tokenizer_config.json": "text", "special_tokens_map.json": "text", "chat_template.jinja": "text",
    "model.safetensors": "weights", "model.safetensors.index.json": "weights",
    "model-00001-of-00004.safetensors": "weights", "model.safetensors-00002-of-00014.safetensors": "weights",
    "pytorch_model.bin": None, "pytorch_model-00001-of-00002.bin": None, "pytorch_model.bin.index.json": None,
    "original/consolidated.00.pth": None, "original/params.json": None, "consolidated.safetensors": None,
    "original/model.safetensors": None, "onnx/model.onnx": None, "flax_model.msgpack": None,
    "tf_model.h5": None, "model.gguf": None, "modeling_phi3.py": None, "training_args.bin": None,
    "README.md": None, "tokenizer.model": None, "preprocessor_config.json": None,
}  # fmt: skip


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_id_is_fetched_without_pickles_and_doubles(hub, weights):
    assert resolve_folder("some-org/Model-1.5B", weights=weights) == Path("/cache/snapshot")
    [(name, revision, patterns)] = hub
    assert (name, revision) == ("some-org/Model-1.5B", None)
    fetched = set(filter_repo_objects(REPOSITORY, allow_patterns=patterns))
    wanted = {"text", "weights"} if weights else {"text"}
    assert fetched == {name for name, kind in REPOSITORY.items() if kind in wanted}


@pytest.mark.parametrize("revision", ["main", "v1.0", "5c38ec7", "refs/pr/1"])
def test_a_revision_stands_behind_an_at_sign(hub, revision):
    resolve_folder(f"org/name@{revision}")
    assert hub[0][:2] == ("org/name", revision)


def test_a_folder_with_an_at_sign_is_a_folder(hub, tmp_path, monkeypatch):
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_folder("org/name@v1") == Path("org/name@v1")
    assert hub == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("cannot reach the host\nwith a long tail"), "cannot reach the host"),
        (errors.LocalEntryNotFoundError("long\nstory"), "the hub cannot be reached, and no copy"),
        (errors.RevisionNotFoundError("404\nRequest ID", response=RESPONSE), "it has no revision v1"),
        (errors.RepositoryNotFoundError("401\nRequest ID", response=RESPONSE), "private and HF_TOKEN"),
        (errors.GatedRepoError("403\nRequest ID", response=RESPONSE), "its terms must be accepted"),
        (OSError(), "OSError"),
    ],
)
def test_a_failure_is_one_line(error, words, monkeypatch):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=f"^no such folder: org/name@v1, .*{words}") as caught:
        resolve_folder("org/name@v1")
    assert "\n" not in str(caught.value)


def test_offline_is_one_line_by_the_client_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"org/name, .*the hub cannot be reached, and no copy is in the cache; check"
    ):
        resolve_folder("org/name")


@pytest.fixture
def retries(monkeypatch):
    """Both libraries warn before they give up, as without a network."""

    def give_up(*args, **options):
        for name in ("huggingface_hub.utils._http", "datasets.load"):
            logging.getLogger(name).warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach 'org/name' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr("huggingface_hub.snapshot_download", give_up)
    monkeypatch.setattr("datasets.load_dataset", give_up)


def test_retries_are_not_announced_line_by_line(retries, caplog):
    with pytest.raises(UserError, match="org/name, and it could not be fetched"):
        resolve_folder("org/name")
    with pytest.raises(UserError, match=r"^org/name: the hub cannot be reached, and no") as caught:
        HubRows("org/name", subset=None, split="train")
    assert "\n" not in str(caught.value)
    assert caplog.records == []
    logging.getLogger("huggingface_hub.utils._http").warning("audible again")
    assert [record.message for record in caplog.records] == ["audible again"]


@pytest.mark.parametrize("path", ["student", "teacher/config.json"])
def test_files_of_an_experiment_that_are_missing_name_the_script(hub, path):
    with pytest.raises(UserError, match=r"run python experiments/smollm2/prepare\.py, which makes it$"):
        resolve_folder(f"experiments/smollm2/files/{path}")
    with pytest.raises(UserError, match=r"no such file .* run python experiments/smollm2/prepare\.py"):
        read_documents(SourceConfig(path=f"experiments/smollm2/files/{path}"))
    assert hub == []


def test_the_token_is_left_to_the_client(monkeypatch):
    """It takes HF_TOKEN, or that of a login, where it is given none."""
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_environment")
    sent = []

    def repo_info(self, repo_id, **options):
        sent.append((options.get("token"), self._build_hf_headers(token=options.get("token"))))
        raise errors.RepositoryNotFoundError("401", response=RESPONSE)

    monkeypatch.setattr("huggingface_hub.hf_api.HfApi.repo_info", repo_info)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="HF_TOKEN"):
        resolve_folder("org/name")
    [(token, headers)] = sent
    assert token is None
    assert headers["authorization"] == "Bearer hf_of_the_environment"


def test_a_tokenizer_does_not_fetch_weights(hub):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        Tokenizer.load("org/name")
    [(_, _, patterns)] = hub
    assert not any("safetensors" in pattern for pattern in patterns)


def test_the_client_is_not_imported_for_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it now fails
    assert resolve_folder(tmp_path) == tmp_path
