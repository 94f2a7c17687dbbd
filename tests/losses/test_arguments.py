"""Every public loss refuses, when it is traced, each argument that does not fit, and names it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from projection.random_w import random_w

from xtoken_jax import losses
from xtoken_jax.alignment.batch import Alignment, StoredRows
from xtoken_jax.distributed.mesh import MeshConfig, make_mesh
from xtoken_jax.losses import LossConfig, LossKind
from xtoken_jax.losses.config import Direction, Merge
from xtoken_jax.losses.total import VocabularySizes
from xtoken_jax.projection.matrix import Partition, Projection
from xtoken_jax.projection.prefixes import tables_of_pieces

B, T_S, T_T, V_S, V_T, D = 2, 6, 7, 13, 17, 4
C = T_S
RNG = np.random.default_rng(3)
W, SWAPPED = random_w(1, V_S, V_T), random_w(1, V_T, V_S)
SIZES = VocabularySizes(V_S, V_T)


def logits(length, size):
    return RNG.normal(size=(B, length, size)).astype(np.float32)


def pieces(one, other):
    """Every token of `one` is one or two tokens of `other`."""
    return {i: [i] if i < 5 else [i % 5, i % 3] for i in range(one)}


TABLES = tables_of_pieces(pieces(V_S, V_T), pieces(V_T, V_S), {}, V_S, V_T)
SWAPPED_TABLES = tables_of_pieces(pieces(V_T, V_S), pieces(V_S, V_T), {}, V_T, V_S)
ALIGNMENT = Alignment(
    np.tile(np.arange(T_S, dtype=np.int32), (B, 1)),
    np.tile(np.array([0, 1, 1, 2, 3, 4, 5], np.int32), (B, 1)),
    np.ones((B, C), bool),
)
LOGITS = {"student_logits": logits(T_S, V_S), "teacher_logits": logits(T_T, V_T)}
IDS = {
    "student_ids": RNG.integers(0, V_S, (B, T_S)).astype(np.int32),
    "teacher_ids": RNG.integers(0, V_T, (B, T_T)).astype(np.int32),
}
MASK = {"teacher_mask": np.ones((B, T_T), bool)}
SIDES = LOGITS | {"alignment": ALIGNMENT}
TEMPERATURE = {"temperature": 2.0}
KL = TEMPERATURE | {"direction": "jsd", "beta": 0.3}
P_KL = SIDES | IDS | MASK | KL | {"projection": W, "top_k": 5, "merge": "first"}
HYBRID = SIDES | IDS | KL | {"partition": Partition.strict(W), "uncommon_top_k": 5, "merge": "last"}
WEIGHTS = {"common_weight": 1.0, "uncommon_weight": None}
ALM = SIDES | IDS | {"likelihood_temperature": 3.0, "student_size": V_S, "teacher_size": V_T}
PREFIX = SIDES | IDS | KL | {"tables": TABLES}
LABELS = {
    "logits": logits(T_S, V_S),
    "token_ids": IDS["student_ids"],
    "token_mask": np.ones((B, T_S), bool),
}
SAME = {"student_logits": logits(T_S, V_S), "teacher_logits": logits(T_S, V_S)} | KL
SAME |= {"teacher_mask": LABELS["token_mask"], "top_k": 5, "size": V_S}
SAME_CHUNKS = dataclasses.replace(ALIGNMENT, teacher_chunks=ALIGNMENT.student_chunks)
MEANS = {"ce": np.float32(2.0), "kd": np.float32(0.5), "max_scale": 10.0}


@functools.cache
def mesh():
    return make_mesh(MeshConfig(data=2, tensor=4))


def over_mesh(function):
    """The loss on a mesh that splits the batch and the vocabulary."""
    return lambda **arguments: function(**arguments, mesh=mesh())


SPLIT = {"axis": "tensor", "data_axes": ("data",)}
# The arguments that the kind of a loss reads in `distillation_loss` and `blockwise_loss`.
CONFIGS = {
    LossKind.p_kl: (W.split(), {"merge": Merge.first, "top_k": 5}),
    LossKind.gold: (Partition.strict(W), {"merge": Merge.last}),
    LossKind.h_kl: (Partition.relaxed(W), {}),
    LossKind.uld: (SIZES, {}),
    LossKind.alm: (SIZES, {}),
    LossKind.prefix_kl: (TABLES, {}),
    LossKind.same_vocabulary: (VocabularySizes(V_S, V_S), {}),
}


def of_kind(kind):
    """Config and arrays of a term; both sides have one vocabulary for same_vocabulary."""
    tables, settings = CONFIGS[kind]
    arrays = SIDES | IDS | MASK | {"tables": tables, "config": LossConfig(kind=kind, **settings)}
    if kind is LossKind.same_vocabulary:
        arrays |= {"teacher_logits": logits(T_T, V_S), "teacher_ids": IDS["teacher_ids"] % V_S}
    return arrays


def blockwise_of(kind, stored=False):
    arrays = of_kind(kind)
    size = arrays.pop("teacher_logits").shape[-1]
    del arrays["student_logits"]
    arrays |= {
        "student_hidden": logits(T_S, D),
        "student_unembedding": RNG.normal(size=(V_S, D)).astype(np.float32),
        "student_targets": LABELS["token_mask"],
        "teacher_hidden": logits(T_T, D),
        "teacher_unembedding": RNG.normal(size=(size, D)).astype(np.float32),
        "block": 3,
        "teacher_block": 4,
        "student_size": V_S,
    }
    if stored:
        rows = np.zeros((B, T_T), np.float32)
        ids = np.tile(np.arange(3, dtype=np.int32), (B, T_T, 1))
        arrays["teacher_stored"] = StoredRows(ids, logits(T_T, 3), rows, rows, size, 1.0)
        arrays |= {"teacher_hidden": None, "teacher_unembedding": None}
    return arrays


def term(config, **arrays):
    return losses.distillation_loss(config)(**arrays)


def terms(teachers, **settings):
    made = [losses.TeacherTerm(kd, 0.5, vocabulary_size=V_T) for kd in teachers]
    return losses.combine_teachers(made, **settings)


CALLS = {
    "projection_kl": (losses.projection_kl, P_KL),
    "projection_kl, split": (losses.projection_kl, P_KL | {"projection": W.split()}),
    "projection_kl, learnable": (losses.projection_kl, P_KL | {"projection": W.learnable()}),
    "hybrid_kl": (losses.hybrid_kl, HYBRID | WEIGHTS),
    "hybrid_terms": (losses.hybrid_terms, HYBRID),
    "likelihood_matching": (losses.likelihood_matching, ALM),
    "rank_l1": (losses.rank_l1, SIDES | TEMPERATURE | {"student_size": V_S, "teacher_size": V_T}),
    "prefix_kl": (losses.prefix_kl, PREFIX),
    "next_token_cross_entropy": (losses.next_token_cross_entropy, LABELS),
    "same_vocabulary_kl": (losses.same_vocabulary_kl, SAME | {"token_mask": LABELS["token_mask"]}),
    "same_vocabulary_kl_by_chunk": (losses.same_vocabulary_kl_by_chunk, SAME | {"alignment": SAME_CHUNKS}),
    "teacher_scores": (losses.teacher_scores, LABELS | {"size": V_S, "count": 5.0}),
    "average_logits": (losses.average_logits, {"teacher_logits": [logits(3, 5)] * 2, "weights": [1.0, 2.0]}),
    "combine_teachers": (terms, {"teachers": [np.float32(1.0)] * 2, "sharpness": 1.0, "combine": "sum"}),
    "masked_mean": (losses.masked_mean, {"values": np.ones((B, C)), "mask": ALIGNMENT.valid, "count": 3.0}),
    "valid_chunks": (losses.valid_chunks, {"alignment": ALIGNMENT}),
    "total_loss": (losses.total_loss, MEANS | {"kd_weight": 1.0, "ce_weight": 0.1}),
    "dynamic_scale": (losses.dynamic_scale, MEANS),
    "kd_scale_capped": (losses.kd_scale_capped, MEANS),
    "vocab_parallel_projection_kl": (
        over_mesh(losses.vocab_parallel_projection_kl), P_KL | SPLIT | {"block": 3},
    ),
    "vocab_parallel_hybrid_kl": (
        over_mesh(losses.vocab_parallel_hybrid_kl), HYBRID | WEIGHTS | SPLIT | {"block": 3},
    ),
    "vocab_parallel_hybrid_terms": (over_mesh(losses.vocab_parallel_hybrid_terms), HYBRID | SPLIT),
    "vocab_parallel_likelihood_matching": (over_mesh(losses.vocab_parallel_likelihood_matching), ALM | SPLIT),
    "vocab_parallel_prefix_kl": (over_mesh(losses.vocab_parallel_prefix_kl), PREFIX | SPLIT | {"block": 3}),
    "vocab_parallel_cross_entropy": (
        over_mesh(losses.vocab_parallel_cross_entropy), LABELS | SPLIT | {"size": V_S},
    ),
}  # fmt: skip
CALLS |= {f"distillation_loss, {kind.value}": (term, of_kind(kind)) for kind in CONFIGS}
CALLS |= {f"blockwise_loss, {kind.value}": (losses.blockwise_loss, blockwise_of(kind)) for kind in CONFIGS}
CALLS["blockwise_loss, stored"] = (losses.blockwise_loss, blockwise_of(LossKind.h_kl, stored=True))
WITHOUT_A_ROW = {"distillation_loss", "loss_tables", "blockwise_teacher_scores"}  # tests of their own


def test_every_public_loss_is_called():
    public = {name for name in losses.__all__ if callable(getattr(losses, name)) and name[0].islower()}
    assert public - WITHOUT_A_ROW <= {name.split(",")[0] for name in CALLS}


FLOATS = (
    "student_logits", "teacher_logits", "logits", "student_hidden", "student_unembedding", "teacher_hidden",
    "teacher_unembedding",
)  # fmt: skip
COLUMNS = ("student_logits", "teacher_logits", "logits", "student_unembedding", "teacher_unembedding")
INTEGERS = ("student_ids", "teacher_ids", "token_ids")
MASKS = ("teacher_mask", "token_mask", "student_targets", "mask")
TABLE_NAMES = ("projection", "partition", "tables")
NUMBERS = {
    "temperature": [0, 0.0, -1.0, np.nan, np.inf, "1", None, np.ones(2)],
    "likelihood_temperature": [0.0, -100, np.nan, None, "100"],
    "beta": [-0.1, 1.5, np.nan, None, "0.5"],
    "top_k": [0, -1, 2.5, "all"],
    "uncommon_top_k": [0, -8, 1.5, None],
    "direction": ["foward", "", None, Direction.forward],
    "merge": ["middle", None, Merge.mean],
    "common_weight": [-1.0, np.nan, "1"],
    "uncommon_weight": [-1.0, np.inf],
    "student_size": [0, -1, 6.5, V_S + 1],
    "teacher_size": [0, V_T + 1],
    "size": [0, V_S + 1, "13"],
    "block": [0, -3, 2.5, None],
    "teacher_block": [0, -3, 2.5],
    "axis": ["tensr", None],
    "data_axes": [("dat",), "data"],
    "count": [-1.0, np.nan, np.ones(2)],
    "ce": [np.ones(2), None, "1"],
    "kd": [np.ones((B, C))],
    "max_scale": [0.0, -1.0, np.nan],
    "kd_weight": [-1.0, None],
    "ce_weight": [np.inf],
    "combine": ["average", None],
    "sharpness": [np.ones(2), None],
}
CONFIG_MISTAKES = [
    *((name, value) for name in ("temperature", "likelihood_temperature") for value in (0.0, -1.0, np.nan)),
    *((name, value) for name in ("top_k", "uncommon_top_k", "block") for value in (0, -2, 1.5)),
    ("beta", -0.5), ("common_weight", -1.0), ("kind", "p_kl"), ("direction", "forward"), ("merge", "first"),
]  # fmt: skip


def spoilt_arrays(name, value):
    """(what is wrong, value) of an array argument."""
    if name in FLOATS:
        yield "integer", value.astype(np.int32)
        yield "a list", value.tolist()
        yield "missing", None
        yield "rank lower", value[0]
        yield "rank higher", value[None]
    if name in COLUMNS:
        axis = -1 if "logits" in name else 0
        yield "too few columns", np.delete(value, [0, 1, 2], axis=axis)
        yield "too many columns", np.repeat(value, 3, axis=axis)
    if name in INTEGERS:
        yield "floats", value.astype(np.float32)
        yield "rank higher", value[..., None]
    if name in MASKS:
        yield "integers", value.astype(np.int32)
        yield "rank lower", value[0]
    if name in (*INTEGERS, *MASKS, *FLOATS) and value.ndim > 1:
        if "unembedding" not in name:
            yield "another batch", np.repeat(value, 2, axis=0)
        if name != "student_hidden":
            yield "another length", value[:, :-1]


def spoilt_alignment(alignment):
    for side in ("student_chunks", "teacher_chunks"):
        chunks = getattr(alignment, side)
        for what, other in (
            ("shorter", chunks[:, :-1]), ("fewer rows", chunks[:1]), ("floats", chunks.astype(float)),
            ("flat", chunks.reshape(-1)),
        ):  # fmt: skip
            yield f"{side} {what}", dataclasses.replace(alignment, **{side: other})
    for what, valid in (("flat", alignment.valid[0]), ("integers", alignment.valid.astype(int))):
        yield f"valid {what}", dataclasses.replace(alignment, valid=valid)
    yield "half of the rows", jax.tree.map(lambda x: x[:1], alignment)
    yield "a tuple", (alignment.student_chunks, alignment.teacher_chunks, alignment.valid)
    yield "missing", None


def spoilt_tables(tables):
    """Tables of other kinds, and of the pair with its sides changed."""
    others = [W, Partition.strict(W), TABLES, SIZES, None, {"W": W}, np.zeros((V_S, V_T), np.float32)]
    related = (Projection, type(W.split()), type(W.learnable()))
    for other in others:
        if not isinstance(other, type(tables)) and not (
            isinstance(other, related) and isinstance(tables, related)
        ):
            yield f"{type(other).__name__}", other
    if isinstance(tables, related):
        made = {related[0]: SWAPPED, related[1]: SWAPPED.split(), related[2]: SWAPPED.learnable()}
        yield "swapped", made[type(tables)]
    elif isinstance(tables, Partition):
        yield "swapped", Partition.strict(SWAPPED)
    elif isinstance(tables, VocabularySizes) and tables.student != tables.teacher:
        yield "swapped", VocabularySizes(V_T, V_S)
    elif tables is TABLES:
        yield "swapped", SWAPPED_TABLES


def mistakes():
    """(loss, argument, what is wrong, value, a word of the message)."""
    for call, (_, arguments) in CALLS.items():
        for name, value in arguments.items():
            changes = []
            if name in TABLE_NAMES:
                changes = [(what, other, name) for what, other in spoilt_tables(value)]
            elif name == "alignment":
                changes = [(what, other, name) for what, other in spoilt_alignment(value)]
            elif name == "config":
                changes = [
                    (f"{field}={wrong}", dataclasses.replace(value, **{field: wrong}), field)
                    for field, wrong in CONFIG_MISTAKES
                ]
                changes.append(("a word", "p_kl", name))
            elif name in NUMBERS:
                changes = [(repr(wrong), wrong, name) for wrong in NUMBERS[name]]
            elif isinstance(value, np.ndarray):
                changes = [(what, other, name) for what, other in spoilt_arrays(name, value)]
            for what, other, word in changes:
                if fits(call, name, what):
                    continue
                yield pytest.param(call, name, other, word, id=f"{call}, {name}: {what}")


def fits(call, name, what):
    """What is no mistake in this loss."""
    if name == "logits" and call == "next_token_cross_entropy":
        return "columns" in what  # its size is that of the logits
    if call == "valid_chunks":
        return "shorter" in what or what == "half of the rows"  # there are no logits to compare with
    # A missing array of the student's is a missing argument; without a mask or targets nothing is masked.
    return what == "missing" and name in MASKS


def trace(call, arguments):
    """The shapes of the result, with all arrays as tracers."""
    arrays, fixed = {}, {}
    for name, value in arguments.items():
        leaves = jax.tree.leaves(value)
        is_array = leaves and all(isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves)
        (arrays if is_array and name not in NUMBERS else fixed)[name] = value
    return jax.eval_shape(lambda arrays: CALLS[call][0](**arrays, **fixed), arrays)


@pytest.mark.parametrize("call", CALLS)
def test_the_arguments_of_the_table_are_accepted(call):
    assert jax.tree.leaves(trace(call, CALLS[call][1]))


@pytest.mark.parametrize(("call", "name", "value", "word"), list(mistakes()))
def test_a_mistake_is_named(call, name, value, word):
    with pytest.raises(ValueError, match=word) as error:
        trace(call, CALLS[call][1] | {name: value})
    if isinstance(value, np.ndarray) and name not in NUMBERS:
        assert str(list(value.shape)) in str(error.value)


@pytest.mark.parametrize("call", [c for c, (_, a) in CALLS.items() if set(INTEGERS) & set(a)])
@pytest.mark.parametrize("wrong", [-1, -100, V_T, 10**6])
def test_an_id_out_of_range_is_named_where_it_is_known(call, wrong):
    function, arguments = CALLS[call]
    for name in set(INTEGERS) & set(arguments):
        ids = arguments[name].copy()
        ids[1, 2] = wrong
        for known in (ids, jnp.asarray(ids)):
            with pytest.raises(ValueError, match=rf"{name}: int32 \[2, \d\] has {wrong} at \[1, 2\]"):
                function(**arguments | {name: known})


def test_a_projection_that_does_not_agree_with_itself():
    with pytest.raises(ValueError, match=r"projection.indices: .* has teacher id 16, but .*_size is 13"):
        losses.projection_kl(**P_KL | {"projection": dataclasses.replace(W, teacher_size=V_S)})
    unsized = dataclasses.replace(W, teacher_size=None)
    with pytest.raises(ValueError, match=r"teacher_logits: float32 .* projection is for 17 tokens"):
        losses.projection_kl(**P_KL | {"projection": unsized, "teacher_logits": logits(T_T, V_S)})
    cut = dataclasses.replace(W, weights=np.asarray(W.weights)[:, :3])
    with pytest.raises(ValueError, match=r"projection.weights: float32 \[13, 3\]"):
        losses.projection_kl(**P_KL | {"projection": cut})


@pytest.mark.parametrize("kind", ["p_kl", None, LossKind.auto, LossKind.none])
def test_a_kind_that_names_no_term_has_no_tables(kind):
    with pytest.raises(ValueError, match="kind"):
        losses.loss_tables(kind, W)


@pytest.mark.parametrize("value", [Partition.strict(W), TABLES, None])
def test_tables_are_made_of_w(value):
    with pytest.raises(ValueError, match=r"projection: .* but Projection or LearnableProjection is needed"):
        losses.loss_tables(LossKind.h_kl, value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"teacher": logits(T_T, D)}, "teacher: float32"),
        ({"teacher": (logits(T_T, D), np.ones((V_T, D + 1)))}, r"teacher\[1\]: float64 \[17, 5\]"),
        ({"teacher": (logits(T_T, D), np.ones((V_S, D)))}, r"teacher\[1\]: .* size is for 17 tokens"),
        ({"teacher": (logits(T_S, D), np.ones((V_T, D)))}, r"teacher\[0\]: .* same B and T"),
        ({"teacher": (logits(T_T, D).astype(int), np.ones((V_T, D)))}, r"teacher\[0\]: int64"),
        ({"token_ids": IDS["teacher_ids"] + 9}, "token_ids: int32"),
        ({"token_mask": IDS["teacher_ids"]}, "token_mask: int32"),
        ({"token_mask": MASK["teacher_mask"][:, 1:]}, r"token_mask: bool \[2, 6\]"),
        ({"size": 0}, "size=0"), ({"size": V_S}, "token_ids: .*"), ({"block": 0}, "block=0"),
    ],
)  # fmt: skip
def test_scores_from_hidden_states(changes, word):
    good = {"teacher": (logits(T_T, D), np.ones((V_T, D))), "token_ids": np.full((B, T_T), V_T - 1, np.int32)}
    good |= {"token_mask": MASK["teacher_mask"], "size": V_T}
    with pytest.raises(ValueError, match=word):
        losses.blockwise_teacher_scores(**good | changes)


def test_mistakes_are_seen_under_every_transformation():
    def loss(student_logits, **changes):
        return losses.hybrid_kl(**HYBRID | {"student_logits": student_logits} | changes).sum()

    narrow = LOGITS["student_logits"][..., :-1]
    by_row = PartitionSpec("data")

    def over_rows(student_logits):
        rows = {name: value[:1] for name, value in (LOGITS | IDS).items()}
        alignment = jax.tree.map(lambda x: x[:1], ALIGNMENT)
        return losses.hybrid_kl(**HYBRID | rows | {"student_logits": student_logits, "alignment": alignment})

    split = jax.shard_map(over_rows, mesh=mesh(), in_specs=by_row, out_specs=by_row)
    for transformed, student in (
        (jax.jit(loss), narrow), (jax.grad(loss), narrow), (jax.vmap(loss), narrow[None]), (split, narrow),
        (jax.checkpoint(loss), narrow),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"student_logits: float32 \[\d, 6, 12\], .* for 13"):
            transformed(student)


def test_a_wider_vocabulary_of_a_padded_model_is_accepted():
    wide = {name: np.pad(value, ((0, 0), (0, 0), (0, 5))) for name, value in LOGITS.items()}
    assert trace("projection_kl", P_KL | wide).shape == (B, C)
