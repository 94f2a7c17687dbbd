"""The walk over blocks: values, and gradients by hidden states, unembedding and a learnable W."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from xtoken_jax.alignment.batch import Alignment, StoredRows
from xtoken_jax.losses.blockwise.plan import (
    Block,
    Groups,
    Side,
    add_outer,
    logits_of,
    pull_to_hidden,
    rows_at,
)
from xtoken_jax.losses.blockwise.teacher import HiddenStates, Stored, TeacherRows
from xtoken_jax.losses.blockwise.terms import (
    Term,
    TermSetting,
    make_term,
    merges_of,
    temperature_of,
)
from xtoken_jax.losses.math.chunks import next_tokens
from xtoken_jax.losses.math.softmax import centred, soft_capped
from xtoken_jax.losses.total import PARTS


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Inputs:
    """All that gets no gradient; the first seven are split over devices as the batch is.

    `labelled`: bool [B, T_s], positions whose next token counts in cross-entropy, None for none. The
    others as in `blockwise_loss`; without a distillation term all of the teacher's are None.
    """

    teacher_hidden: jax.Array | None
    teacher_stored: StoredRows | None
    alignment: Alignment | None
    student_ids: jax.Array
    labelled: jax.Array | None
    teacher_ids: jax.Array | None
    teacher_mask: jax.Array | None
    teacher_unembedding: jax.Array | None
    tables: Any
    ce_count: jax.Array
    kd_count: jax.Array


class Setting(NamedTuple):
    """What is static, and hashable.

    Attributes:
        term: of the distillation term, None for cross-entropy alone.
        student_softcap, teacher_softcap: of the logits, None for none.
        block, teacher_block: positions at a time.
        axes: mesh axes that split the batch.
        mesh: where `jax.shard_map` is to run; None for one device, or inside of one already.
    """

    term: TermSetting | None
    student_softcap: float | None
    teacher_softcap: float | None
    block: int
    teacher_block: int
    axes: tuple[str, ...]
    mesh: Mesh | AbstractMesh | None


class Gradient(NamedTuple):
    """float32 [B, T_s, D_s], [V_s, D_s], and that by W's learnt weights [R, K], or None."""

    hidden: jax.Array
    unembedding: jax.Array
    learnt: jax.Array | None


Slopes = tuple[jax.Array | float, jax.Array | float]


class Means(NamedTuple):
    """CE and KD, float32 scalars, and the means of the term's `PARTS`, float32 [P]."""

    ce: jax.Array
    kd: jax.Array
    parts: jax.Array


def walk(
    setting: Setting,
    slopes: Slopes | None,
    hidden: jax.Array,
    unembedding: jax.Array,
    learnt: jax.Array | None,
    inputs: Inputs,
) -> tuple[Means, Gradient | None]:
    """The means, and the gradient of slopes . (CE, KD); without slopes, none."""
    by_mean = None
    if slopes is not None:
        by_mean = jnp.asarray(slopes[0], jnp.float32), jnp.asarray(slopes[1], jnp.float32)
    arguments = hidden, unembedding, learnt, inputs, by_mean
    if setting.mesh is None:
        return _local(setting, *arguments)
    rows, whole = PartitionSpec(setting.axes), PartitionSpec()
    by_input = Inputs(*[rows] * 7, *[whole] * 4)  # type: ignore[arg-type]
    return jax.shard_map(
        lambda *args: _local(setting, *args),
        mesh=setting.mesh,
        in_specs=(rows, whole, whole, by_input, whole),
        out_specs=(Means(whole, whole, whole), None if slopes is None else Gradient(rows, whole, whole)),  # type: ignore[arg-type]
        axis_names=set(setting.axes),
        check_vma=False,  # nothing is differentiated through it
    )(*arguments)


class _Sums(NamedTuple):
    ce: jax.Array
    kd: jax.Array
    parts: jax.Array
    gradient: Gradient | None


def _local(
    setting: Setting,
    hidden: jax.Array,
    unembedding: jax.Array,
    learnt: jax.Array | None,
    inputs: Inputs,
    slopes: tuple[jax.Array, jax.Array] | None,
) -> tuple[Means, Gradient | None]:
    flat = hidden.reshape(-1, hidden.shape[-1])
    student = _Student(setting, flat, unembedding, next_tokens(inputs.student_ids), inputs, slopes)
    nothing = Gradient(
        jnp.zeros(flat.shape, jnp.float32),
        jnp.zeros(unembedding.shape, jnp.float32),
        None if learnt is None else jnp.zeros(learnt.shape, jnp.float32),
    )
    number = 0 if setting.term is None else len(PARTS.get(setting.term.kind, ()))
    parts = jnp.zeros(number, jnp.float32)
    sums = _Sums(jnp.float32(0), jnp.float32(0), parts, None if slopes is None else nothing)
    place = jnp.int32(0)
    term, also = None, inputs.labelled
    if setting.term is None or inputs.alignment is None or inputs.alignment.valid.shape[1] == 0:
        side = Side.of(
            jnp.full_like(inputs.student_ids, -1),
            jnp.zeros((len(inputs.student_ids), 1), bool),
            inputs.labelled,
            "mean",
        )
    else:
        term = make_term(
            setting.term, inputs.tables, _teacher_rows(setting, inputs), inputs.alignment, inputs.student_ids,
            inputs.teacher_ids,
        )  # fmt: skip
        if term.positions is not None:
            more = term.positions.reshape(inputs.student_ids.shape)
            also = more if also is None else also | more
        merge = merges_of(setting.term)
        groups = Groups.of(inputs.alignment, also, merge, merge)
        place, sums = _over_groups(student, groups, term, learnt, sums)
        side = groups.student
    if also is not None:
        sums = _over_rest(student, side, term, place, sums)
    if setting.axes:
        ce, kd, parts = jax.lax.psum(sums[:3], setting.axes)
        sums = _Sums(ce, kd, parts, sums.gradient)
    gradient = sums.gradient
    if gradient is not None:
        of_parameters = gradient.unembedding, gradient.learnt
        if setting.axes:
            of_parameters = jax.lax.psum(of_parameters, setting.axes)
        gradient = Gradient(gradient.hidden.reshape(hidden.shape), *of_parameters)
    return Means(*sums[:3]), gradient


def _teacher_rows(setting: Setting, inputs: Inputs) -> TeacherRows:
    source: HiddenStates | Stored
    if inputs.teacher_stored is not None:
        source = Stored.of(inputs.teacher_stored)
    else:
        assert inputs.teacher_hidden is not None and inputs.teacher_unembedding is not None  # noqa: PT018
        hidden = inputs.teacher_hidden.reshape(-1, inputs.teacher_hidden.shape[-1])
        source = HiddenStates(hidden, inputs.teacher_unembedding, setting.teacher_softcap)
    return TeacherRows(
        source,
        None if inputs.teacher_ids is None else next_tokens(inputs.teacher_ids),
        None if inputs.teacher_mask is None else jnp.asarray(inputs.teacher_mask, bool).reshape(-1),
        setting.block,
        setting.axes,
    )


class _Student(NamedTuple):
    """The student's rows, positions flattened, and how much each mean counts."""

    setting: Setting
    hidden: jax.Array
    unembedding: jax.Array
    next_ids: jax.Array
    inputs: Inputs
    slopes: tuple[jax.Array, jax.Array] | None

    def block(
        self, positions: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array, Callable[[jax.Array], tuple[jax.Array]]]:
        """Hidden states [n, D], logits float32 [n, V_s], next ids [n]; a slope's way back below the cap."""
        rows = rows_at(self.hidden, positions)
        raw = logits_of(rows, self.unembedding)
        # The losses see capped logits, hidden states and unembedding get the slope by the raw ones.
        logits, pull = _vjp(
            self.slopes is not None, lambda z: soft_capped(z, self.setting.student_softcap), raw
        )
        return rows, logits, self.next_ids.at[positions].get(mode="clip"), pull

    def by_position(
        self,
        term: Term | None,
        logits: jax.Array,
        next_ids: jax.Array,
        positions: jax.Array,
        counts: jax.Array | bool,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What positions are worth by themselves: their shares of CE and KD, and the slope of both.

        All is 0 unless `counts`. The slope is by logits, float32 [n, V_s]; 0 where no gradient is wanted.
        """
        ce = kd = slope = jnp.float32(0)
        if self.inputs.labelled is not None:
            labelled = self.inputs.labelled.reshape(-1).at[positions].get(mode="fill", fill_value=False)
            labelled, count = labelled & counts, jnp.maximum(self.inputs.ce_count, 1.0)
            z = centred(logits)
            normalizer = jax.nn.logsumexp(z, axis=-1)
            values = normalizer - jnp.take_along_axis(z, next_ids[:, None], axis=-1)[:, 0]
            ce = jnp.where(labelled, values, 0.0).sum() / count
            if self.slopes is not None:
                label = jax.lax.broadcasted_iota(jnp.int32, z.shape, 1) == next_ids[:, None]
                weights = (self.slopes[0] * (labelled / count))[:, None]
                by_label = jnp.exp(z - normalizer[:, None]) - label.astype(jnp.float32)
                slope = jnp.where(weights != 0, weights * by_label, 0.0)
        if term is not None and term.at_positions is not None and self.setting.term is not None:
            at_positions, tau = term.at_positions, temperature_of(self.setting.term)
            value, pull = _vjp(
                self.slopes is not None, lambda z: at_positions(z / tau, positions).sum(), logits
            )
            count = jnp.maximum(self.inputs.kd_count, 1.0)
            kd = jnp.where(counts, value / count, 0.0)
            if self.slopes is not None:
                slope = slope + jnp.where(counts, pull(self.slopes[1] / count)[0], 0.0)
        return ce, kd, slope

    def add(self, gradient: Gradient, slope: jax.Array, rows: jax.Array, positions: jax.Array) -> Gradient:
        """With a block's share, from its slope by the raw logits [n, V_s]."""
        by_rows = gradient.hidden.at[positions].set(pull_to_hidden(slope, self.unembedding), mode="drop")
        return Gradient(by_rows, add_outer(gradient.unembedding, slope, rows), gradient.learnt)


def _over_rest(student: _Student, side: Side, term: Term | None, place: jax.Array, sums: _Sums) -> _Sums:
    """Cross-entropy, and what the term has by position, of those from `place` on, which have no chunk."""
    size = student.setting.block

    def one(carry: tuple[jax.Array, _Sums]) -> tuple[jax.Array, _Sums]:
        place, sums = carry
        positions = side.block(place, side.wanted, size, jnp.int32(0), 1).positions
        rows, logits, next_ids, below_cap = student.block(positions)
        ce, kd, slope = student.by_position(term, logits, next_ids, positions, True)
        gradient = sums.gradient
        if gradient is not None:
            gradient = student.add(gradient, *below_cap(slope), rows, positions)
        parts = _with_last(sums.parts, kd, term)
        return place + size, _Sums(sums.ce + ce, sums.kd + kd, parts, gradient)

    return jax.lax.while_loop(lambda carry: carry[0] < side.wanted, one, (place, sums))[1]


class _State(NamedTuple):
    """Where the walk over groups is.

    Attributes:
        chunk: the number of the next chunk.
        place: the next ordered position.
        again: whether a chunk longer than a block is gone through for the second time.
        part: float32 [m_s], what the parts of such a chunk add up to.
    """

    chunk: jax.Array
    place: jax.Array
    again: jax.Array
    part: jax.Array
    sums: _Sums


def _over_groups(
    student: _Student, groups: Groups, term: Term, learnt: jax.Array | None, sums: _Sums
) -> tuple[jax.Array, _Sums]:
    """Both means over the positions of chunks, and their gradients; where the positions without begin."""
    setting, slopes = student.setting, student.slopes
    size = setting.block
    chunks = min(size, setting.teacher_block) if term.whole_rows else size
    kd_count = jnp.maximum(student.inputs.kd_count, 1.0)
    side = groups.student

    def one(state: _State) -> _State:
        chunk, begin = state.chunk, side.begin(state.chunk)
        last = jnp.minimum(side.last(chunk, size), groups.number)
        if term.whole_rows:
            last = jnp.minimum(last, groups.teacher.last(chunk, setting.teacher_block))
        last = jnp.maximum(last, chunk + 1)
        end = side.ends[last - 1]
        long = end - begin > size  # one chunk then, of which this is a part
        # The last group is filled up with positions that have no chunk.
        stop = jnp.minimum(state.place + size, jnp.where(~long & (last == groups.number), side.wanted, end))
        complete = stop >= end
        block = side.block(state.place, stop, size, chunk, chunks)
        target = term.target(_teacher(groups.teacher, term, setting.teacher_block, chunk, last, chunks))

        rows, logits, next_ids, below_cap = student.block(block.positions)
        tau = temperature_of(setting.term) if setting.term is not None else 1.0

        def merge(logits: jax.Array, learnt: jax.Array | None) -> jax.Array:
            return term.student(logits / tau, next_ids, block, learnt)

        merged, pull = _vjp(slopes is not None, merge, logits, learnt)
        part = merged[0] + jnp.where(state.place == begin, 0.0, state.part)
        part = jnp.where(state.again, state.part, part)
        merged = merged.at[0].set(jnp.where(state.again, part, merged[0]))
        # The first time through a long chunk nothing counts but its sum.
        counts = ~long | state.again
        compared = (jnp.arange(chunks, dtype=jnp.int32) < last - chunk) & counts
        (values, by_part), pull_values = _vjp(slopes is not None, lambda m: term.values(m, target), merged)
        finished = compared & complete
        kd, parts = (jnp.where(finished, x, 0.0).sum(-1) / kd_count for x in (values, by_part))
        ce, more, slope = student.by_position(term, logits, next_ids, block.positions, counts)
        kd, parts = kd + more, _with_last(parts, more, term)

        gradient = state.sums.gradient
        if gradient is not None and slopes is not None:
            by_value = jnp.where(compared, slopes[1] / kd_count, 0.0)
            kd_slope, by_learnt = pull(*pull_values((by_value, jnp.zeros_like(by_part))))
            slope = slope + jnp.where(counts, kd_slope, 0.0)
            gradient = student.add(gradient, *below_cap(slope), rows, block.positions)
            if gradient.learnt is not None:
                learnt_slope = gradient.learnt + jnp.where(counts, by_learnt, 0.0)
                gradient = gradient._replace(learnt=learnt_slope)

        done = ~long | (state.again & complete)
        turn = long & ~state.again & complete
        return _State(
            jnp.where(done, last, chunk),
            jnp.where(turn, begin, stop),
            jnp.where(long, state.again ^ complete, False),
            part,
            _Sums(state.sums.ce + ce, state.sums.kd + kd, state.sums.parts + parts, gradient),
        )

    part = jax.eval_shape(
        lambda z, i, b, w: term.student(z, i, b, w)[0],
        jax.ShapeDtypeStruct((size, len(student.unembedding)), jnp.float32),
        jax.ShapeDtypeStruct((size,), jnp.int32),
        side.block(jnp.int32(0), jnp.int32(0), size, jnp.int32(0), chunks),
        learnt,
    )
    start = _State(jnp.int32(0), jnp.int32(0), jnp.zeros((), bool), jnp.zeros(part.shape, part.dtype), sums)
    state = jax.lax.while_loop(lambda state: state.chunk < groups.number, one, start)
    return state.place, state.sums


def _with_last(parts: jax.Array, more: jax.Array, term: Term | None) -> jax.Array:
    """The parts of a term, with what positions are worth by themselves."""
    return parts if term is None or term.at_positions is None else parts.at[-1].add(more)


def _vjp(needed: bool, function: Callable, *arguments: Any) -> tuple[Any, Callable]:
    """Value and pull-back; without a gradient to compute, the value alone."""
    if needed:
        return jax.vjp(function, *arguments)
    return function(*arguments), lambda _: ()


def _teacher(side: Side, term: Term, size: int, chunk: jax.Array, last: jax.Array, chunks: int) -> jax.Array:
    """The teacher's side of chunks `chunk` to `last`, as many blocks as it takes; mostly one."""
    begin, end = side.begin(chunk), side.ends[last - 1]

    def block(place: jax.Array) -> Block:
        return side.block(place, end, size, chunk, chunks)

    def more(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        place, merged = carry
        return place + size, merged + term.teacher(block(place))

    first = (begin + size, term.teacher(block(begin)))
    return jax.lax.while_loop(lambda carry: carry[0] < end, more, first)[1]
