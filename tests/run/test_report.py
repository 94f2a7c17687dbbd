"""Pictures of a run and of a sweep: which lines they hold."""

import json

import pytest
from matplotlib.figure import Figure

from xtoken_jax.cli.parser import main
from xtoken_jax.errors import UserError
from xtoken_jax.files import to_json
from xtoken_jax.run.ranking import Job, read_jobs, write_ranking
from xtoken_jax.run.report import draw_curves, draw_sweep, runs_and_sweeps


@pytest.fixture
def drawn(monkeypatch):
    """The last figure that was saved, as {title: {label: values}}."""
    figures, save = [], Figure.savefig

    def keep(figure, *args, **options):
        figures.append(figure)
        return save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)

    def read():
        return {
            axes.get_title(): {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
            for axes in figures[-1].axes
            if axes.get_title()
        }

    return read


def write(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_of_one_teacher_the_parts_of_its_term_and_the_shares(drawn, tmp_path):
    row = {
        "ce": 3.0, "kd": 0.5, "kd/teacher": 0.5, "kd/teacher/common": 0.3, "kd/teacher/uncommon": 0.2,
        "agreement/teacher": 0.4, "lost_mass/teacher": None,
    }  # fmt: skip
    write(
        tmp_path, [{"step": 1, **row}, {"step": 2, **row, "ce": 2.0}, {"step": 2, "validation": {"x": 1.5}}]
    )
    write(tmp_path / "no_teacher", [{"step": 2, "ce": 2.5}])
    result = {"figures": {"teacher": {"x": 1.0}, "distilled": {"x": 1.5}}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert draw_curves(tmp_path) == tmp_path / "curves.png"
    assert drawn() == {
        "cross-entropy (nats per token)": {"distilled": [3.0, 2.0], "without a teacher": [2.5]},
        "distillation term (nats per chunk)": {"sum": [0.5] * 2, "common": [0.3] * 2, "uncommon": [0.2] * 2},
        "shares": {"same top token": [0.4, 0.4]},
        "held-out x": {"distilled": [1.5], "teacher": [1.0, 1.0]},
    }


def test_a_folder_of_runs_and_sweeps_stands_for_all_of_them(tmp_path):
    runs = tmp_path / "runs"
    write(runs / "b", [{"step": 1, "ce": 3.0}])
    write(runs / "b" / "no_teacher", [{"step": 1, "ce": 3.0}])
    for sweep in (runs / "a" / "sweep", runs / "b" / "sweep", runs / "c"):
        write(sweep / "loss=p_kl", [{"step": 1, "ce": 3.0}])
        (sweep / "loss=p_kl.job.json").write_text("{}")
    (runs / "notes").mkdir()
    assert runs_and_sweeps(runs / "c") == [runs / "c"]
    assert runs_and_sweeps(runs / "a") == [runs / "a" / "sweep"]
    assert runs_and_sweeps(runs / "b") == [runs / "b", runs / "b" / "sweep"]
    assert runs_and_sweeps(runs) == [runs / "a" / "sweep", runs / "b", runs / "b" / "sweep", runs / "c"]
    with pytest.raises(UserError, match="notes: not a run or a sweep, and none in it"):
        runs_and_sweeps(runs / "notes")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        runs_and_sweeps(runs / "nowhere")
    with pytest.raises(UserError, match=r"metrics\.jsonl: a file; name a folder"):
        runs_and_sweeps(runs / "b" / "metrics.jsonl")


def test_several_teachers_have_a_line_each_by_name(drawn, tmp_path):
    row = {"ce": 3.0, "kd": 0.5, "kd/teacher": 0.3, "kd/twin": 0.7, "kd/teacher/start": 0.3}
    row |= {"agreement/teacher": 0.4, "agreement/twin": 0.5, "lost_mass/twin": 0.1}
    write(tmp_path, [{"step": 1, **row}])
    draw_curves(tmp_path)
    assert drawn()["distillation term (nats per chunk)"] == {
        "weighted sum": [0.5], "teacher": [0.3], "twin": [0.7],
    }  # fmt: skip
    assert drawn()["shares"] == {
        "same top token, teacher": [0.4], "same top token, twin": [0.5], "lost by W, twin": [0.1],
    }  # fmt: skip


def test_a_teacher_has_one_colour_in_all_panels(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    # As jit orders them, by name; and a teacher without held-out figures, as from a cache of other text.
    row = {"ce": 3.0, "kd": 0.5, "kd/english": 0.3, "kd/sums": 0.1, "kd/teacher": 0.7}
    row |= {f"agreement/{name}": 0.4 for name in ("english", "sums", "teacher")}
    write(tmp_path, [{"step": 1, **row}, {"step": 1, "validation": {"x": 1.5}}])
    result = {"figures": {"teacher": {"x": 1.0}, "teacher sums": {"x": 2.0}, "distilled": {"x": 1.5}}}
    (tmp_path / "result.json").write_text(json.dumps(result))
    draw_curves(tmp_path)
    colors = [
        {line.get_label(): line.get_color() for line in axes.get_lines()}
        for axes in figures[0].axes
        if axes.lines
    ]
    _, terms, shares, held_out = colors
    names = ["teacher", "english", "sums"]
    assert [*terms] == ["weighted sum", *names]
    assert len({terms[name] for name in terms}) == 4
    assert [shares[f"same top token, {name}"] for name in names] == [terms[name] for name in names]
    assert [held_out["teacher"], held_out["teacher sums"]] == [terms["teacher"], terms["sums"]]


def test_without_a_teacher_there_is_no_empty_panel(drawn, tmp_path):
    write(tmp_path, [{"step": 1, "ce": 3.0}])
    draw_curves(tmp_path)
    assert [*drawn()] == ["cross-entropy (nats per token)"]
    with pytest.raises(UserError, match="not a run"):
        draw_curves(tmp_path / "none")


def test_a_sweep_is_its_runs_in_one_panel_for_each_figure(drawn, tmp_path):
    jobs = []
    for place in range(12):
        write(tmp_path / f"job{place}", [{"step": s, "validation": {"x": place + s}} for s in (0, 1)])
        jobs.append(Job(tmp_path / f"job{place}", [f"a={place}"], "1", "finished", figures={"x": 1.0}))
    jobs.append(Job(tmp_path / "none", ["a=99"], "1", "failed"))
    draw_sweep(tmp_path, jobs)
    lines = drawn()["held-out x"]
    assert sorted(lines.values()) == [[place, place + 1] for place in range(12)]
    assert draw_sweep(tmp_path, jobs[-1:]) is None


def test_figures_that_are_not_finite_are_null_and_left_out_of_pictures(drawn, tmp_path):
    nan, row = float("nan"), {"step": 1, "ce": 2.0, "validation": {"english bits/byte": 1.5}}
    write(tmp_path, [row])
    result = {
        "figures": {"teacher": {"english bits/byte": nan}, "distilled": {"english bits/byte": [1.0, nan]}}
    }
    text = to_json(result)
    (tmp_path / "result.json").write_text(text)

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(text, parse_constant=refuse)["figures"]
    assert read == {"teacher": {"english bits/byte": None}, "distilled": {"english bits/byte": [1.0, None]}}
    draw_curves(tmp_path)
    assert drawn()["held-out english bits/byte"] == {"distilled": [1.5]}


def test_a_job_without_a_finite_figure_is_ranked_last(tmp_path):
    for name, figure in (("a", float("nan")), ("b", 1.5), ("c", 1.4)):
        job = Job(tmp_path / name, [f"x={name}"], "1", "finished", "p_kl", {"bits/byte": figure}, "bits/byte")
        (tmp_path / f"{name}.job.json").write_text(to_json(job.to_dict()))
    jobs = read_jobs(tmp_path)
    assert [job.folder.name for job in jobs] == ["c", "b", "a"]
    write_ranking(tmp_path, jobs)
    assert [line.split(",")[3] for line in (tmp_path / "sweep.csv").read_text().splitlines()[1:]] == [
        "1.4",
        "1.5",
        "",
    ]


SPOILED = {
    "half a line": b'{"step": 2, "ce": 2.0, "validation": {"x": 1.',
    "not JSON": b"step 2\n",
    "binary": bytes(range(11, 256)) + b"\n",
    "a list": b"[1, 2]\n",
    "NaN": b'{"step": 2, "ce": NaN}\n',
    "no step": b'{"ce": 2.0}\n',
    "a step that is text": b'{"step": "2", "ce": 2.0}\n',
    "a step that is true": b'{"step": true, "ce": 2.0}\n',
    "an enormous step": b'{"step": 1e300, "ce": 2.0}\n',
    "a digit too many": b'{"step": ' + b"9" * 5000 + b"}\n",
    "deep": b'{"step": 2, "x": ' + b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("line", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_line_of_metrics_is_left_out_with_a_word(line, drawn, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "ce": 3.0}\n' + line + (b"" if line.endswith(b".") else b'{"step": 3, "ce": 1.0}\n')
    )
    said = []
    draw_curves(tmp_path, said.append)
    expected = [3.0] if line.endswith(b".") else [3.0, 1.0]
    assert drawn()["cross-entropy (nats per token)"] == {"distilled": expected}
    words = "metrics.jsonl: 1 lines hold no metrics and are left out; line 2 is the first"
    assert said == ([] if line.endswith(b".") else [f"{tmp_path}/{words}"])


@pytest.mark.parametrize(
    "values",
    [
        {"ce": None}, {"ce": "low"}, {"ce": [1.0]}, {"ce": True}, {"ce": 1e200},
        {"ce": {"x": 1}}, {"validation": None}, {"validation": 5}, {"validation": [1]},
        {"validation": {"x": "y", "z": None}},
    ],
)  # fmt: skip
def test_values_that_are_no_figures_are_not_drawn(values, drawn, tmp_path):
    write(tmp_path, [{"step": 1, "ce": 3.0, "validation": {"x": 1.5}}, {"step": 2, **values}])
    draw_curves(tmp_path)
    assert drawn() == {
        "cross-entropy (nats per token)": {"distilled": [3.0]}, "held-out x": {"distilled": [1.5]}
    }  # fmt: skip


@pytest.mark.parametrize(
    "content",
    [
        '{"figures": {"teacher": {"x": 1.0}', "", "[]", "null", '{"figures": null}', '{"figures": [1]}',
        '{"figures": {"teacher": 3}}', '{"other": 1}', "\x80", '{"figures": {"teacher": {"x": Infinity}}}',
    ],
)  # fmt: skip
def test_a_broken_result_costs_the_levels_of_the_teachers(content, drawn, tmp_path):
    write(tmp_path, [{"step": 1, "ce": 3.0, "validation": {"x": 1.5}}])
    (tmp_path / "result.json").write_text(content)
    said = []
    draw_curves(tmp_path, said.append)
    assert drawn()["held-out x"] == {"distilled": [1.5]}
    (line,) = said
    assert line.startswith(f"{tmp_path}/result.json: ")
    assert line.endswith("; the teachers' figures are left out")
    assert "\n" not in line


ODD_NAMES = (
    r"$\frac{", "$x$ $", "[red]", "[/]", "_hidden", "\x1b[31mred", "a\nb", "\u202eabc", "", " ",
    "x" * 5000, "{0}", "%s", "\\", "\x00", "😀", "日本",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.filterwarnings("ignore:.*legend")
@pytest.mark.parametrize("name", ODD_NAMES)
def test_any_name_is_drawn_and_printed(name, tmp_path, capsys):
    row = {"step": 1, "kd": 1.0, f"kd/{name}": 1.0, f"kd/{name}/part": 1.0, f"agreement/{name}": 0.5}
    row = {key: value for key, value in row.items() if key != "kd/"}
    write(tmp_path, [row, {"step": 1, "validation": {name: 1.5}}])
    (tmp_path / "result.json").write_text(json.dumps({"figures": {f"teacher {name}": {name: 1.0}}}))
    assert main(["report", str(tmp_path)]) == 0
    sweep = tmp_path / "sweep"
    write(sweep / "job", [{"step": 1, "validation": {name: 1.5}}])
    job = Job(sweep / "job", [f"a={name}"], "1", "failed", name, {name: 1.5}, name, f"{name} failed")
    (sweep / "job.job.json").write_text(json.dumps(job.to_dict()))
    assert main(["report", str(sweep)]) == 0
    out = "".join(capsys.readouterr())
    assert not set(out) & set("\x1b\x00\u202e")
    if name in ("[red]", "[/]", r"$\frac{"):
        assert f"{name} failed" in out


def test_hundreds_of_names_are_cut_with_a_word(tmp_path, capsys):
    names = [f"name {number}" for number in range(500)]
    row = {"kd": 1.0} | {f"kd/{name}": 1.0 for name in names}
    write(tmp_path, [{"step": 1, **row}, {"step": 1, "validation": dict.fromkeys(names, 1.5)}])
    said = []
    draw_curves(tmp_path, said.append)
    assert [line.removeprefix(f"{tmp_path}: ") for line in said] == [
        "501 panels are too many for a picture; it has the first 24",
        "more than 16 lines under 'distillation term (nats per chunk)'; it has the first 16",
    ]
    sweep = tmp_path / "sweep"
    write(sweep / "job", [{"step": 1, "validation": dict.fromkeys(names, 1.5)}])
    job = Job(sweep / "job", ["a=1"], "1", "finished", "p_kl", dict.fromkeys(names, 1.5), "name 0")
    (sweep / "job.job.json").write_text(json.dumps(job.to_dict()))
    assert main(["report", str(sweep)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "492 more figures: see sweep.csv" in out
    assert "500 held-out figures are too many for a picture; it has the first 24" in out
    assert (sweep / "sweep.csv").read_text().count("name 499") == 1


SPOILED_JOBS = {
    "half": lambda job: json.dumps(job)[:40],
    "a list": lambda job: "[]",
    "nothing": lambda job: "",
    "another folder": lambda job: json.dumps(job | {"folder": "../../elsewhere"}),
    "an absolute folder": lambda job: json.dumps(job | {"folder": "/etc"}),
    "a key too many": lambda job: json.dumps(job | {"x": 1}),
    "a key too few": lambda job: json.dumps({k: v for k, v in job.items() if k != "overrides"}),
    "overrides of numbers": lambda job: json.dumps(job | {"overrides": [1]}),
    "an override without a value": lambda job: json.dumps(job | {"overrides": ["a"]}),
    "a figure that is text": lambda job: json.dumps(job | {"figures": {"x": "low"}}),
    "figures that are a list": lambda job: json.dumps(job | {"figures": [1]}),
    "NaN": lambda job: json.dumps(job | {"figures": {"x": float("nan")}}),
    "another status": lambda job: json.dumps(job | {"status": "hacked"}),
}


@pytest.mark.parametrize("spoil", SPOILED_JOBS.values(), ids=SPOILED_JOBS)
def test_a_spoiled_job_is_left_out_of_a_sweep_with_a_word(spoil, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    for name in ("good", "spoiled"):
        write(sweep / name, [{"step": 1, "validation": {"x": 1.5}}])
        job = Job(sweep / name, [f"a={name}"], "1", "finished", "p_kl", {"x": 1.5}, "x").to_dict()
        text = spoil(job) if name == "spoiled" else json.dumps(job)
        (sweep / f"{name}.job.json").write_text(text)
    assert main(["report", str(sweep)]) == 0
    out = capsys.readouterr().out
    assert "1 jobs in" in out
    (line,) = [line for line in out.splitlines() if line.startswith("warning")]
    assert line.startswith(f"warning  {sweep}/spoiled.job.json: ")
    assert line.endswith("; it is left out")
    assert [job["folder"] for job in json.loads((sweep / "sweep.json").read_text())] == ["good"]
    (sweep / "good.job.json").unlink()
    assert main(["report", str(sweep)]) == 2


def test_a_sweep_with_a_job_of_spoiled_metrics_is_still_drawn(drawn, tmp_path):
    jobs = []
    for place, content in enumerate(('{"step": 1, "validation": {"x": 1.5}}\n', "\x00\n", "")):
        folder = tmp_path / f"job{place}"
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(content)
        jobs.append(Job(folder, [f"a={place}"], "1", "finished", figures={"x": 1.0}))
    said = []
    draw_sweep(tmp_path, jobs, said.append)
    assert drawn() == {"held-out x": {"_child0": [1.5]}}
    assert len(said) == 1
