"""Experiments from words and from the shipped configs."""

import pytest
from omegaconf import OmegaConf

from xtoken_jax.errors import UserError
from xtoken_jax.losses.total import Direction, LossKind
from xtoken_jax.models.config import LoraConfig
from xtoken_jax.models.load import Dtype, Start
from xtoken_jax.run.experiment import CONFIG_FOLDER, load_experiment, options_of

PAIR = [
    "student.path=s",
    "teacher.path=t",
    "data.train.text.path=a.jsonl",
    "data.validation.text.path=b.jsonl",
]


@pytest.mark.parametrize("name", options_of("experiment"))
def test_every_shipped_experiment_is_whole_and_opens_with_its_facts(name):
    experiment = load_experiment([f"experiment={name}"])
    assert experiment.name == name
    assert experiment.run_dir == f"runs/{name}"
    head = (CONFIG_FOLDER / "experiment" / f"{name}.yaml").read_text().split("\n\n")[0]
    for fact in ("Source:", "Command:", "Hardware:", "Expected:"):
        assert fact in head


@pytest.mark.parametrize("group", ["data", "loss", "mesh"])
def test_every_option_of_a_group_fits_the_schema(group):
    for option in options_of(group):
        load_experiment(["experiment=quickstart", f"{group}={option}"])


@pytest.mark.parametrize(
    ("group", "option"), [(group, name) for group in ("student", "teacher") for name in options_of(group)]
)
def test_every_model_of_a_group_composes(group, option):
    model = getattr(load_experiment(["experiment=quickstart", f"{group}={option}"]), group)
    assert model.path == OmegaConf.load(CONFIG_FOLDER / group / f"{option}.yaml").path
    # a student in bfloat16 would lose most of its small updates
    assert group == "teacher" or model.dtype is Dtype.float32


def test_a_file_wins_over_a_default_and_a_word_over_a_file():
    experiment = load_experiment(
        ["experiment=smollm2", "train.steps=7", "loss=gold", "loss.direction=reverse"]
    )
    assert experiment.student.init is Start.random
    assert experiment.train.steps == 7
    assert experiment.loss.kind is LossKind.gold
    assert experiment.loss.direction is Direction.reverse
    assert experiment.loss.top_k == 8192


def test_every_loss_has_a_file_of_its_name():
    for kind in LossKind:
        assert load_experiment(["experiment=quickstart", f"loss={kind.value}"]).loss.kind is kind
    alm = load_experiment(["experiment=quickstart", "loss=alm"]).loss
    assert (alm.likelihood_temperature, alm.max_scale) == (100, 1000)


def test_a_source_of_the_users_own_begins_on_the_command_line():
    experiment = load_experiment([*PAIR, "data.train.more.kind=text", "data.train.more.path=c.txt"])
    assert list(experiment.data.train) == ["text", "more"]


@pytest.mark.parametrize(
    "path", ["a b,c=d(e)'f[1].jsonl", r"C:\texts\a.jsonl", "ünï/{x}.jsonl", "null.jsonl"]
)
def test_a_path_may_hold_any_character(path):
    assert load_experiment([*PAIR, f"data.train.text.path={path}"]).data.train["text"].path == path


def test_null_is_none_and_a_name_can_be_referred_to():
    experiment = load_experiment([*PAIR, "projection=null", "loss.max_scale=null", "name=mine"])
    assert experiment.projection is None
    assert experiment.loss.max_scale is None
    assert experiment.run_dir == "runs/mine"


def test_no_teacher_is_needed_without_a_distillation_term():
    words = [word for word in PAIR if not word.startswith("teacher")]
    assert load_experiment([*words, "loss=none"]).teacher.path is None
    with pytest.raises(UserError, match=r"teacher\.path: not given"):
        load_experiment(words)


def test_plain_values_name_every_setting():
    plain = load_experiment(["experiment=quickstart"]).to_dict()
    assert plain["loss"]["kind"] == "auto"
    assert plain["data"]["train"]["arithmetic"]["wrong_share"] == 0.7


LORA = "student.lora.rank=8"


def test_adapters_of_the_student():
    assert load_experiment(PAIR).student.lora.settled() is None
    for targets in ("[query,down]", "query,down"):
        student = load_experiment([*PAIR, LORA, f"student.lora.targets={targets}"]).student
        assert student.lora.settled() == LoraConfig(8, 32.0, ("query", "down"))
    assert load_experiment([*PAIR, LORA, "student.dtype=bfloat16"]).student.lora.rank == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["student.lora.rank=-1"], r"student\.lora\.rank=-1: must be at least 1, or 0 for no adapters"),
        ([LORA, "student.lora.alpha=0"], r"student\.lora\.alpha=0\.0: must be above 0"),
        ([LORA, "student.lora.alpha=nan"], r"student\.lora\.alpha=nan: must be above 0"),
        ([LORA, "student.lora.targets=[query,qery]"], "no such kernel as qery; choose among query, key"),
        ([LORA, "student.lora.targets=[]"], r"student\.lora\.targets: no kernel; choose among"),
        (["student.lora.rnk=8"], r"did you mean student\.lora\.rank"),
        (["teacher.lora.rank=8"], r"teacher\.lora: a teacher does not train"),
        ([LORA, "student.init=random"], "random weights below the adapters would never train"),
        (["student.dtype=bfloat16"], r"student\.dtype=bfloat16: .* unless student\.lora\.rank"),
    ],
)
def test_adapters_that_make_no_sense_are_refused_in_one_line(words, message):
    with pytest.raises(UserError, match=message) as refused:
        load_experiment([*PAIR, *words])
    assert "\n" not in str(refused.value)


TWIN = "teachers.twin.path=u"


def test_further_teachers_begin_on_the_command_line():
    words = [TWIN, "teachers.twin.loss.kind=gold", "teachers.twin.weight=0.2", "teacher.weight=0.8"]
    experiment = load_experiment([*PAIR, *words, "projection=w", "loss.temperature=2"])
    first, twin = experiment.every_teacher().values()
    assert (first.path, first.weight, first.projection, first.loss) == ("t", 0.8, "w", experiment.loss)
    assert (twin.path, twin.weight, twin.projection) == ("u", 0.2, None)
    assert (twin.loss.kind, twin.loss.temperature) == (LossKind.gold, 1.0)
    assert list(load_experiment([*PAIR, TWIN, "loss=none"]).every_teacher()) == []
    data = load_experiment([*PAIR, TWIN, "data.teacher_lengths.twin=7"]).data
    assert [data.length_of(name) for name in ("teacher", "twin")] == [1024, 7]
    twice = load_experiment([*PAIR, "teachers.twin={path: t, loss: {kind: gold}}"])  # one model, two terms
    assert [teacher.path for teacher in twice.every_teacher().values()] == ["t", "t"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teachers.teacher.path=u"], r"teachers\.teacher: teacher is the name of the first one"),
        (["teachers.twin.weight=1"], r"teachers\.twin\.path: not given"),
        ([TWIN, "teachers.twin.weight=0"], r"teachers\.twin\.weight=0\.0: must be above 0"),
        ([TWIN, "teacher.weight=-1"], r"teacher\.weight=-1\.0: must be above 0"),
        (["teacher.weight=0.5"], r"teacher\.weight=0\.5: it is for several teachers"),
        ([TWIN, "teachers.twin.loss.kind=none"], r"teachers\.twin\.loss\.kind=none: .*leave it out"),
        ([TWIN, "teachers.twin.loss.top_k=0"], r"teachers\.twin\.loss\.top_k=0: must be at least 1"),
        (
            [TWIN, "teachers.twin.loss.max_scale=2"],
            r"teachers\.twin\.loss\.max_scale: .* set loss\.max_scale",
        ),
        ([TWIN, "teachers.twin.lora.rank=2"], r"teachers\.twin\.lora: a teacher does not train"),
        ([TWIN, "teachers.twin.wieght=2"], r"did you mean teachers\.twin\.weight"),
        (["teachers.twin=u"], r"teachers\.twin=u: .* mean teachers\.twin\.path=u\?; there is attention"),
        (["teachers=u"], r"teachers=u: .* did you mean teachers\.NAME\.path=u\?"),
        (
            [TWIN, "teachers.twin.loss=gold"],
            r"teachers\.twin\.loss=gold: .* did you mean teachers\.twin\.loss\.kind=gold\?",
        ),
        (["data.teacher_lengths=9"], r"data\.teacher_lengths=9: .* mean data\.teacher_lengths\.NAME=9\?$"),
        (["student.lora=8"], r"student\.lora=8: student\.lora is no single value; there is alpha, rank"),
        (["teachers.a/b.path=u"], r"teachers\.a/b\.path: the name 'a/b' may have letters"),
        ([TWIN, "teachers.twin.path=t", "teachers.twin.weight=2"], r"teachers\.twin: the same as teacher"),
        ([TWIN, "teachers.other.path=u"], r"teachers\.other: the same as twin but for its weight"),
        (["data.teacher_lengths.twin=9"], r"data\.teacher_lengths\.twin: no such teacher"),
        ([TWIN, "data.teacher_lengths.twin=1"], r"data\.teacher_lengths\.twin=1: must be at least 2"),
    ],
)
def test_teachers_that_make_no_sense_are_refused_in_one_line(words, message):
    with pytest.raises(UserError, match=message) as refused:
        load_experiment([*PAIR, *words])
    assert "\n" not in str(refused.value)
