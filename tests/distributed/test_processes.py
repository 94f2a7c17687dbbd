"""Two processes on this machine as one run: equal to one process, and ending together."""

import json
import shutil
import signal
import socket
import time
from pathlib import Path

import hosts
import hosts_toy
import numpy as np
import pytest
from safetensors.numpy import load_file

from xtoken_jax.distributed.heartbeat import LOST
from xtoken_jax.distributed.processes import HostsConfig
from xtoken_jax.errors import UserError

RELATIVE = 1e-5  # of the loss: collectives of other processes add up in another order


def flat(row, prefix=""):
    """Numbers of a row of metrics, by name."""
    found = {}
    for name, value in row.items():
        found |= flat(value, f"{name}/") if isinstance(value, dict) else {prefix + name: value}
    return found


def assert_same_rows(folder, other):
    rows, others = hosts.rows_of(folder), hosts.rows_of(other)
    assert len(rows) == len(others) > 0
    for row, there in zip(rows, others, strict=True):
        assert flat(row).keys() == flat(there).keys()
        for name, value in flat(row).items():
            assert value == pytest.approx(flat(there)[name], rel=RELATIVE, abs=1e-7), (row["step"], name)


def files_of(folder):
    """What a run has written but for the checkpoints' own files."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if "state" not in path.parts and path.is_file()
    )


@pytest.fixture(scope="module")
def whole_toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, hosts_toy.run(folder, None)


def test_two_processes_give_what_one_gives(whole_toy, tmp_path):
    ends = hosts.run(hosts.toy(tmp_path / "run"), 2, tmp_path / "log")
    for code, text in ends:
        assert code == 0, text
        said = json.loads(text.splitlines()[-1])
        assert said["first"] == [0, "said"]
        assert said["all"] == [{"index": 0}, {"index": 1}]
        assert said["total"] == pytest.approx(whole_toy[1], rel=RELATIVE)
    assert_same_rows(tmp_path / "run", whole_toy[0])
    assert files_of(tmp_path / "run") == files_of(whole_toy[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"count": 2}, "hosts.index: not given"),
        ({"index": 0}, "hosts.count: not given"),
        ({"count": 2, "index": 1}, "hosts.coordinator: not given"),
        (
            {"count": 2, "index": 2, "coordinator": "a:1"},
            "hosts.index=2: must be from 0 to hosts.count - 1 = 1",
        ),
        ({"count": 2, "index": 1, "coordinator": "a"}, "hosts.coordinator=a: not of the form HOST:PORT"),
        ({"auto": True, "count": 2}, "hosts.count with hosts.auto=true"),
        ({"lost_after": 1}, "hosts.lost_after=1: must be at least 3 seconds"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(keys, message, monkeypatch):
    monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    with pytest.raises(UserError, match=message):
        HostsConfig(**keys).validate()
    HostsConfig().validate()
    HostsConfig(auto=True).validate()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "a:1")
    HostsConfig(count=2, index=1).validate()


@pytest.mark.slow
def test_a_signal_to_one_saves_in_all_and_either_number_goes_on(whole_toy, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    for count, step in ((2, 3), (1, 6), (2, 9)):
        processes = hosts.start(hosts.toy(folder, seconds=0.5), count, log)
        hosts.wait_for_step(folder, step)
        processes[-1].send_signal(signal.SIGTERM)
        ends = hosts.finish(processes, log)
        assert [code for code, _ in ends] == [0] * count, ends
        (line,) = {text.splitlines()[-1] for _, text in ends}
        saved = int(line.split("step ")[1].split()[0])
        assert step <= saved < hosts_toy.STEPS
        assert (folder / "checkpoints" / str(saved)).is_dir()
        assert hosts.rows_of(folder)[-1]["step"] == saved
    ends = hosts.run(hosts.toy(folder), 2, log)
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_rows(folder, whole_toy[0])


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_lost_process_ends_the_other_in_time(killed, whole_toy, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    processes = hosts.start(hosts.toy(folder, seconds=0.5), 2, log)
    hosts.wait_for_step(folder, 6)
    processes[killed].kill()
    begun = time.monotonic()
    (code, text) = hosts.finish(processes, log)[1 - killed]
    assert time.monotonic() - begun < 4 + 10  # seconds without a sign of life, and what the machine needs
    assert code == LOST, text
    line = text.splitlines()[-1]
    assert line.startswith(
        "xtoken: process 1 of 0..1 was lost" if killed else "xtoken: jax ended this process"
    )
    assert "goes on from the last checkpoint" in line
    ends = hosts.run(hosts.toy(folder), 2, log)
    assert [code for code, _ in ends] == [0, 0], ends
    assert "goes on from step 4" in ends[0][1]
    assert_same_rows(folder, whole_toy[0])


@pytest.mark.slow
@pytest.mark.parametrize("of_all", [False, True])
def test_a_checkpoint_that_one_cannot_read_is_passed_over_by_all(of_all, whole_toy, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert [code for code, _ in hosts.run(hosts.toy(folder), 2, log)] == [0, 0]
    for path in (folder / "checkpoints" / "12" / "state" / "d").iterdir():
        if of_all:
            path.write_bytes(path.read_bytes()[:10])
    ends = hosts.run(hosts.toy(folder, blind=None if of_all else 1), 2, log)
    assert [code for code, _ in ends] == [0, 0], ends
    assert (folder / "checkpoints-damaged" / "12").is_dir()
    assert "checkpoints/12: is damaged" in ends[0][1]
    assert "goes on from step 8" in ends[0][1]
    assert_same_rows(folder, whole_toy[0])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_all_and_names_the_rows_of_all(tmp_path):
    ends = hosts.run(hosts.toy(tmp_path / "run", bad=6), 2, tmp_path / "log")
    for code, text in ends:
        assert code == 2, text
        assert "step 6: the loss is nan" in text.splitlines()[-1]
        assert "checkpoints/4" in text.splitlines()[-1]
        assert "Traceback" not in text
    (row,) = map(json.loads, (tmp_path / "run" / "non_finite.jsonl").read_text().splitlines())
    documents = [part["document"] for (part,) in row["rows"]]
    assert documents == [6 + n for n in range(hosts_toy.ROWS)]


@pytest.fixture
def words(words):
    more = {
        "train.steps": 8, "train.log_every": 1, "train.evaluate_every": 1, "train.save_every": 3,
        "optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 2, "hosts.lost_after": 10,
        "data.validation.sums.kind": "arithmetic", "data.validation.sums.documents": 4,
    }  # fmt: skip
    return [*words, *(f"{name}={value}" for name, value in more.items())]


def assert_same_student(folder, other):
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [["mesh.data=4", "mesh.fsdp=2"], ["mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2"]]
)
def test_two_processes_distil_what_one_does(mesh, words, tmp_path):
    ends = {}
    for count in (1, 2):
        folder = tmp_path / f"run{count}"
        command = hosts.distill([*words, *mesh, "baseline=true", f"run_dir={folder}"])
        ends[count] = hosts.run(command, count, tmp_path / "log")
        assert all(code == 0 for code, _ in ends[count]), ends[count]
    one, two = tmp_path / "run1", tmp_path / "run2"
    for sub in (".", "no_teacher"):
        assert_same_rows(two / sub, one / sub)
    assert_same_student(two, one)
    assert files_of(two) == files_of(one)
    assert (two / "run.json").read_bytes() == (one / "run.json").read_bytes()
    assert ends[2][1][1] == "" or "xtoken" not in ends[2][1][1]  # process 1 has nothing to say


@pytest.mark.slow
def test_a_run_goes_on_from_kill_to_kill_on_either_number_of_processes(words, tmp_path):
    words = [*words, "mesh=fsdp"]
    whole, folder, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert hosts.run(hosts.distill([*words, f"run_dir={whole}"]), 1, log)[0][0] == 0
    command = hosts.distill([*words, f"run_dir={folder}"])

    processes = hosts.start(command, 2, log)
    hosts.wait_for_step(folder, 4)
    processes[1].kill()
    begun = time.monotonic()
    code, text = hosts.finish(processes, log)[0]
    assert time.monotonic() - begun < 10 + 15
    assert code == LOST, text
    assert text.splitlines()[-1].startswith("xtoken: process 1 of 0..1 was lost: no sign of life for 10 s")

    for count, step in ((1, 5), (2, 6)):
        processes = hosts.start(command, count, log)
        hosts.wait_for_step(folder, step)
        processes[-1].send_signal(signal.SIGTERM)
        ends = hosts.finish(processes, log)
        assert [code for code, _ in ends] == [0] * count, ends
        assert all("the same command goes on from" in text.splitlines()[-1] for _, text in ends), ends
    ends = hosts.run(command, 2, log)
    assert [code for code, _ in ends] == [0, 0], ends
    assert_same_rows(folder, whole)
    assert_same_student(folder, whole)
    assert files_of(folder) == files_of(whole)


@pytest.mark.slow
def test_a_mistake_of_one_process_ends_all_in_one_line(words, tmp_path):
    text = next(Path(word.partition("=")[2]) for word in words if word.startswith("data.train.text.path"))
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        folder.mkdir()
        shutil.copy(text, folder / "text.jsonl")
    words = [word for word in words if not word.startswith("data.train.text.path")]
    words = [*words, "data.train.text.path=text.jsonl"]

    def ended(run, devices=2, **options):
        command = hosts.distill([*words, f"run_dir={run}"])
        ends = hosts.run(command, 2, tmp_path / "log", devices=devices, **options)
        assert [code for code, _ in ends] == [2, 2], ends
        lines = [[x for x in text.splitlines() if x.startswith("xtoken: ")] for _, text in ends]
        assert [len(found) for found in lines] == [1, 1], ends
        assert not any("Traceback" in text for _, text in ends)
        return [found[0] for found in lines]

    run = tmp_path / "run"
    for line in ended(run, more=[["train.steps=8"], ["train.steps=9"]]):
        assert "train.steps: 8 for process 0, 9 for process 1; start all with the same command" in line
    for line in ended("run", folders=folders):
        assert "process 1 does not see what process 0 writes there" in line
    assert not any((folder / "run").exists() or list(folder.glob(".*")) for folder in folders)

    with (folders[1] / "text.jsonl").open("a") as file:
        file.write('{"text": "1+1=2, as nobody doubts.\\n"}\n')
    for line in ended(run, folders=folders):
        assert "data.train.text: process 1 reads other content than process 0" in line
    (folders[1] / "text.jsonl").unlink()
    first, second = ended(run, folders=folders)
    assert second.startswith("xtoken: text.jsonl")
    assert first.startswith("xtoken: process 1: text.jsonl")
    assert not run.exists()

    shutil.copy(text, folders[1])
    run.mkdir()
    (run / "of_somebody_else").write_text("")
    first, second = ended(run, folders=folders)
    assert first.startswith(f"xtoken: {run}: exists and is not a run's folder")
    assert second.startswith("xtoken: process 0: ")
    assert [path.name for path in run.iterdir()] == ["of_somebody_else"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [[], ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]])
def test_two_processes_cache_what_one_does_to_the_byte(mesh, words, tmp_path):
    words = [*words, *mesh, "--top-k", "24", "--temperatures", "1", "2"]
    for count in (1, 2):
        out = tmp_path / f"cache{count}"
        ends = hosts.run(hosts.distill([*words, f"--out={out}"], "cache-teacher"), count, tmp_path / "log")
        assert all(code == 0 for code, _ in ends), ends
    assert ends[0][1].count("xtoken distill ... teacher.cache=") == 1
    assert "xtoken" not in ends[1][1]  # process 1 has nothing to say
    one, two = (contents(tmp_path / f"cache{count}") for count in (1, 2))
    assert len(one) > 1
    assert one == two


@pytest.mark.slow
def test_a_cache_goes_on_from_kill_to_kill_on_either_number_of_processes(words, tmp_path):
    code = (
        "import sys; from xtoken_jax import cache_teacher, cli; from functools import partial\n"
        "cache_teacher.cache_teacher = partial(cache_teacher.cache_teacher, shard_bytes=24 * 4 * 700)\n"
        "add, kill = cache_teacher.add_shard, int(sys.argv.pop(1))\n"
        "def added(*words, **known):\n"
        "    add(*words, **known)\n"
        "    if words[2] == kill:\n"
        "        import os; os.kill(os.getpid(), 9)\n"
        "cache_teacher.add_shard = added\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    words = [*words, "--top-k", "24", "hosts.lost_after=10"]

    def run(out, count, kill, more=()):
        def command(*place):
            whole = hosts.distill([*words, f"--out={out}"], "cache-teacher")(*place)
            return ["-c", code, str(kill), *whole[2:]]

        return hosts.run(command, count, tmp_path / "log", more=more)

    whole, out = tmp_path / "whole", tmp_path / "cache"
    assert [code for code, _ in run(whole, 1, -1)] == [0]
    ends = run(out, 2, 0)
    assert ends[0][0] == -signal.SIGKILL, ends
    assert ends[1][0] == LOST, ends
    assert [code for code, _ in run(out, 1, 1)] == [-signal.SIGKILL]
    assert len(json.loads((out / "index.json").read_text())["shards"]) == 2
    ends = run(out, 2, -1)
    assert [code for code, _ in ends] == [0, 0], ends
    assert contents(out) == contents(whole)
    assert len(contents(out)) >= 4

    ends = run(out, 2, -1, more=[["--top-p=0.5"], ["--top-p=0.6"]])
    assert [code for code, _ in ends] == [2, 2], ends
    assert all("--top-p: 0.5 for process 0, 0.6 for process 1" in text for _, text in ends), ends
    ends = run(out, 2, -1, more=[["--top-p=0.5"]] * 2)
    assert [code for code, _ in ends] == [2, 2], ends
    assert "holds another teacher cache (keep.top_p=1.0 there, 0.5 here)" in ends[0][1]
    assert "xtoken: process 0: " in ends[1][1]


@pytest.mark.slow
def test_under_slurm_the_processes_find_one_another(tmp_path):
    code = (
        "import jax; from xtoken_jax.distributed.processes import *\n"
        "with joined(HostsConfig(auto=True, wait=60)): print(gather(jax.process_index()), jax.device_count())"
    )
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        slurm["JAX_COORDINATOR_PORT"] = str(free.getsockname()[1])
    variables = [slurm | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)]
    ends = hosts.run(lambda *_: ["-c", code], 2, tmp_path / "log", variables=variables)
    assert ends == [(0, "[0, 1] 8")] * 2
    ((code, text),) = hosts.run(lambda *_: ["-c", code], 1, tmp_path / "log")
    assert code == 1
    assert "UserError: hosts=auto: jax finds no cluster around this process" in text.splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_does_not_come_is_waited_for_only_so_long(words, tmp_path):
    words = [*words, f"run_dir={tmp_path / 'run'}", "hosts.wait=5"]
    processes = hosts.start(lambda *place: hosts.distill(words)(0, 2, place[2]), 1, tmp_path / "log")
    ((code, text),) = hosts.finish(processes, tmp_path / "log", 60)
    assert code == 2
    assert text.splitlines()[-1].startswith(
        "xtoken: hosts.wait=5: not all of the 2 processes came to 127.0.0.1:"
    )
    assert not (tmp_path / "run").exists()
