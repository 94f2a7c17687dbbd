"""Prefix KL over a split vocabulary: what each device computes and sends, forward and backward.

An event's tokens are on several devices as a rule, and so are the two sides of one. Three ways to bring
them together, in numbers that a device receives for a chunk, with Llama 3.1 and Qwen3 over 8 devices:
- partial masses of all C events, summed by reduce-scatter, and the slope gathered: 288,000, as C is
  nearly V;
- partial masses only where there are tokens, sent to the device that owns the event by tables made from
  the pair: 16,000 at most, or 123,000 if all pairs of devices exchange as much as the largest one;
- make columns into rows, all of both vocabularies for 1/n of the chunks, and send the slope back: 45,000.
The last one, taken here, needs no tables, every device has the same to do, and an event's mass is summed
once, as in the plain loss. Only chunks that have a value are exchanged.

The steps inside chunks read few logits, L at most on each side. Each is on one device, so that a sum over
devices only moves it; by reduce-scatter, a device gets the steps that it compares, 1/n of them, and the
slope is gathered: as many numbers as if all were summed everywhere and each device compared all of them.
What remains to be summed is the rest of a row, after which the token has ended: one number a step.

In the comments n is the number of devices on the vocabulary's axis, and lower-case letters are a
device's own share: b rows, v columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from xtoken_jax.alignment.batch import Alignment
from xtoken_jax.losses.math.softmax import centred
from xtoken_jax.losses.terms.prefix_kl import divergence
from xtoken_jax.losses.terms.prefix_steps import PrefixPlan, Slots, Steps
from xtoken_jax.losses.vocab_parallel.shards import Layout, scaled
from xtoken_jax.projection.events import Components, PrefixTables, log_masses


@dataclass(frozen=True)
class PrefixSetting:
    """All that is static; `block` chunks, or tokens with a step, are exchanged at once."""

    layout: Layout
    direction: str
    beta: float
    temperature: float
    block: int


class PrefixRows(NamedTuple):
    """Rows over the data axes: chunks of tokens, and int32 ids [B, T_s] and [B, T_t]."""

    alignment: Alignment
    student_ids: jax.Array
    teacher_ids: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def prefix(
    setting: PrefixSetting, student: jax.Array, teacher: jax.Array, rows: PrefixRows, tables: PrefixTables
) -> jax.Array:
    """float32 [B, C], not times tau^2, of logits [B, T, V]; 0 for chunks without a value."""
    return _program(setting, student, teacher, rows, tables, with_slope=False)[0]


def _forward(
    setting: PrefixSetting, student: jax.Array, teacher: jax.Array, rows: PrefixRows, tables: PrefixTables
) -> tuple[jax.Array, tuple]:
    return _program(setting, student, teacher, rows, tables, with_slope=True)


class _Side(NamedTuple):
    """A device's columns of one side's logits."""

    layout: Layout
    temperature: float
    size: int
    logits: jax.Array  # [b T, v], as they came
    highest: jax.Array  # float32 [b T], of the whole row, over the temperature; NaN if it is not finite

    @classmethod
    def of(cls, setting: PrefixSetting, logits: jax.Array, size: int) -> _Side:
        layout, logits = setting.layout, logits.reshape(-1, logits.shape[-1])
        highest = layout.highest(layout.flat(logits, size, setting.temperature))
        return cls(layout, setting.temperature, size, logits, highest)

    def rows(self, positions: jax.Array) -> jax.Array:
        """[m, v], centred; -inf past the tokenizer's size; anything finite for positions past the end.

        A row that is not finite on any device is NaN on all.
        """
        own = self.logits.at[positions].get(mode="fill", fill_value=0)
        own = self.layout.flat(own, self.size, self.temperature)
        return centred(own, self.highest.at[positions].get(mode="fill", fill_value=0.0))

    def rest(self, positions: jax.Array, slots: Slots) -> jax.Array:
        """`Slots.rest` of a device's columns, [m, v]."""
        places = self.layout.places(slots.pieces, self.logits.shape[-1])
        own = slots._replace(pieces=jnp.where(slots.pieces < 0, -1, places))
        return own.rest(self.rows(positions))

    def at(self, positions: jax.Array, ids: jax.Array) -> jax.Array:
        """The centred logits of ids [m, L], 0 for those of other devices: a sum over devices has them all."""
        width = self.logits.shape[-1]
        places = self.layout.places(ids, width)
        own = self.logits.at[positions[:, None], places].get(mode="fill", fill_value=0)
        own = jnp.asarray(own, jnp.float32) / self.temperature
        own = centred(own, self.highest.at[positions].get(mode="fill", fill_value=0.0))
        return jnp.where(places < width, own, 0.0)


class _Blocks(NamedTuple):
    """The wanted ones of N places, `size` at a time."""

    layout: Layout
    order: jax.Array  # int32 [>= N], the places; N past the last
    size: int
    busy: jax.Array  # int32 [], blocks with any

    @classmethod
    def of(cls, layout: Layout, wanted: jax.Array, block: int) -> _Blocks:
        # A multiple of n, and not many more than there are.
        size = -(-min(block, len(wanted)) // layout.parts) * layout.parts
        (order,) = jnp.nonzero(wanted, size=-(-len(wanted) // size) * size, fill_value=len(wanted))
        busy = -(-wanted.sum(dtype=jnp.int32) // size)
        # All devices take the same turns, whatever their rows have to do.
        busy = jax.lax.pmax(busy, layout.data) if layout.data else busy
        return cls(layout, order.astype(jnp.int32), size, busy)

    def places(self, turn: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(self.order, turn * self.size, self.size)

    def collect(self, step: Callable[[jax.Array], Any]) -> Any:
        """step(places [size]) -> arrays [r, ...]; those of all blocks, one after another, and then 0."""
        turns = len(self.order) // self.size
        axes = (*self.layout.data, self.layout.axis)

        def nothing(part: jax.ShapeDtypeStruct) -> jax.Array:
            zeros = jnp.zeros((turns * part.shape[0], *part.shape[1:]), part.dtype)
            return jax.lax.pcast(zeros, axes, to="varying")

        def put(turn: jax.Array, whole: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(whole, part, turn * len(part), 0)

        def more(turn: jax.Array, found: Any) -> Any:
            return jax.tree.map(partial(put, turn), found, step(self.places(turn)))

        empty = jax.tree.map(nothing, jax.eval_shape(step, self.order[: self.size]))
        return jax.lax.fori_loop(0, self.busy, more, empty)

    def fold(self, step: Callable, total: jax.Array, kept: jax.Array) -> jax.Array:
        """total = step(total, places [size], rows of `kept`) for every block of `collect`."""
        rows = len(kept) // (len(self.order) // self.size)

        def more(turn: jax.Array, total: jax.Array) -> jax.Array:
            return step(total, self.places(turn), jax.lax.dynamic_slice_in_dim(kept, turn * rows, rows))

        return jax.lax.fori_loop(0, self.busy, more, total)

    def by_place(self, values: jax.Array, count: int) -> jax.Array:
        """float32 [count] of values in the order of the blocks, which only their own device has."""
        return jnp.zeros(count, jnp.float32).at[self.order].set(self.layout.sum(values), mode="drop")


class _Work(NamedTuple):
    """What there is to compare in a device's rows."""

    plan: PrefixPlan
    chunks: _Blocks
    by_teacher: _Blocks
    by_student: _Blocks

    @classmethod
    def of(cls, setting: PrefixSetting, rows: PrefixRows, tables: PrefixTables) -> _Work:
        plan = PrefixPlan.of(rows.alignment, tables, rows.student_ids, rows.teacher_ids)
        wanted = (plan.counted.reshape(-1), plan.by_teacher.size > 0, plan.by_student.size > 0)
        return cls(plan, *(_Blocks.of(setting.layout, w, setting.block) for w in wanted))


def _program(
    setting: PrefixSetting,
    student: jax.Array,
    teacher: jax.Array,
    rows: PrefixRows,
    tables: PrefixTables,
    *,
    with_slope: bool,
) -> tuple[jax.Array, tuple]:
    layout = setting.layout

    def local(
        student: jax.Array, teacher: jax.Array, rows: PrefixRows, tables: PrefixTables
    ) -> tuple[jax.Array, tuple | None]:
        work = _Work.of(setting, rows, tables)
        plan = work.plan
        of_student = _Side.of(setting, student, tables.student_size)
        of_teacher = _Side.of(setting, teacher, tables.teacher_size)

        def compare(teacher: jax.Array, student: jax.Array) -> jax.Array:
            return divergence(teacher, student, setting.direction, setting.beta)

        def result(value: Callable, *own: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...] | None]:
            if not with_slope:
                return layout.in_its_place(value(*own)), None
            values, pull = jax.vjp(value, *own)
            return layout.in_its_place(values), pull(jnp.ones_like(values))

        def events(chunks: jax.Array) -> tuple:
            at_s, at_t = _starts(plan.student_start, chunks), _starts(plan.teacher_start, chunks)
            own = of_student.rest(at_s, Slots.of(plan.by_student.at(at_s), tables.teacher_pieces))
            other = of_teacher.rest(at_t, Slots.of(plan.by_teacher.at(at_t), tables.student_pieces))
            # [m, v] of all devices into [m / n, n v] of each, in the order of the columns.
            width = own.shape[-1]
            own = layout.to_rows(own)[:, : tables.student_size]
            wanted = _masses(layout.to_rows(other), tables.teacher)
            values, slope = result(lambda z: compare(wanted, _masses(z, tables.student)), own)
            if slope is None:
                return values, None
            missing = width * layout.parts - tables.student_size
            return values, layout.to_columns(jnp.pad(slope[0], ((0, 0), (0, missing))))

        def along_teacher(positions: jax.Array) -> tuple:
            steps = plan.by_teacher.at(positions)
            slots = Slots.of(steps, tables.student_pieces)
            inside = of_student.at(steps.start, slots.tokens)
            slots, inside, following, end = _exchange(of_teacher, positions, slots, inside)
            wanted = _after(slots, following, end)
            values, slope = result(lambda z: compare(wanted, _within(slots, z)), inside)
            return values, None if slope is None else slope[0]

        def along_student(positions: jax.Array) -> tuple:
            steps = plan.by_student.at(positions)
            slots = Slots.of(steps, tables.teacher_pieces)
            inside = of_teacher.at(steps.start, slots.tokens)
            slots, inside, following, end = _exchange(of_student, positions, slots, inside)
            wanted = _within(slots, inside)
            values, slope = result(lambda z, e: compare(wanted, _after(slots, z, e)), following, end)
            if slope is None:
                return values, None
            return values, jnp.concatenate([slope[0], slope[1][:, None], end[:, None]], axis=1)

        at_start, by_event = work.chunks.collect(events)
        after_teacher, by_inside = work.by_teacher.collect(along_teacher)
        after_student, by_following = work.by_student.collect(along_student)
        values = work.chunks.by_place(at_start, plan.counted.size).reshape(plan.counted.shape)
        for steps, blocks, found in (
            (plan.by_teacher, work.by_teacher, after_teacher),
            (plan.by_student, work.by_student, after_student),
        ):
            values = values + steps.by_chunk(blocks.by_place(found, steps.size.size))
        return values, (of_student.highest, by_event, by_inside, by_following) if with_slope else None

    by_row, kept_rows = layout.by_row, PartitionSpec((*layout.data, layout.axis))
    values, kept = layout.run(
        local,
        (layout.of_logits, layout.of_logits, by_row, PartitionSpec()),
        (by_row, (by_row, layout.of_chunks, kept_rows, kept_rows) if with_slope else None),
    )(student, teacher, rows, tables)
    return values, (student, rows, tables, kept)


def _backward(setting: PrefixSetting, residuals: tuple, gradient: jax.Array) -> tuple:
    layout = setting.layout

    def local(
        student: jax.Array, rows: PrefixRows, tables: PrefixTables, kept: tuple, gradient: jax.Array
    ) -> jax.Array:
        highest, by_event, by_inside, by_following = kept
        work = _Work.of(setting, rows, tables)
        plan, width = work.plan, student.shape[-1]
        flat = student.reshape(-1, width)
        side = _Side(layout, setting.temperature, tables.student_size, flat, highest)

        def events(total: jax.Array, chunks: jax.Array, slope: jax.Array) -> jax.Array:
            by_chunk = gradient.reshape(-1).at[chunks].get(mode="fill", fill_value=0.0)
            at = _starts(plan.student_start, chunks)
            return total.at[at].add(scaled(slope, by_chunk[:, None]), mode="drop")

        def everywhere(slope: jax.Array, steps: Steps, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
            by_chunk = jnp.take_along_axis(jnp.pad(gradient, ((0, 0), (0, 1))), steps.chunks, axis=1)
            by_step = by_chunk.reshape(-1).at[positions].get(mode="fill", fill_value=0.0)
            return jax.lax.all_gather(slope, layout.axis, tiled=True), by_step[:, None]

        def along_teacher(total: jax.Array, positions: jax.Array, slope: jax.Array) -> jax.Array:
            slope, by_step = everywhere(slope, plan.by_teacher, positions)
            steps = plan.by_teacher.at(positions)
            slots = Slots.of(steps, tables.student_pieces)
            columns = layout.places(slots.tokens, width)
            return total.at[steps.start[:, None], columns].add(scaled(slope, by_step), mode="drop")

        def along_student(total: jax.Array, positions: jax.Array, slope: jax.Array) -> jax.Array:
            found, by_step = everywhere(slope, plan.by_student, positions)
            slope, by_end, end = found[:, :-2], found[:, -2:-1], found[:, -1:]
            slots = Slots.of(plan.by_student.at(positions), tables.teacher_pieces)
            # The end is worth the logarithm of a sum over all that is left.
            rest = side.rest(positions, slots)
            share = jnp.exp(jnp.where(end > -jnp.inf, rest - end, -jnp.inf))
            total = total.at[positions].add(scaled(by_end * share, by_step), mode="drop")
            columns = layout.places(slots.pieces, width)
            return total.at[positions[:, None], columns].add(scaled(slope, by_step), mode="drop")

        total = jnp.zeros_like(flat, dtype=jnp.float32)
        total = work.chunks.fold(events, total, by_event)
        total = work.by_teacher.fold(along_teacher, total, by_inside)
        total = work.by_student.fold(along_student, total, by_following)
        return (total / setting.temperature).reshape(student.shape).astype(student.dtype)

    by_row, kept_rows = layout.by_row, PartitionSpec((*layout.data, layout.axis))
    by_student = layout.run(
        local,
        (
            layout.of_logits, by_row, PartitionSpec(), (by_row, layout.of_chunks, kept_rows, kept_rows),
            by_row,
        ),
        layout.of_logits,
    )(*residuals, gradient)  # fmt: skip
    return by_student, None, None, None


def _starts(positions: jax.Array, chunks: jax.Array) -> jax.Array:
    """Where the chunks [m] begin; a position past the end for those past the end."""
    return positions.at[chunks].get(mode="fill", fill_value=jnp.iinfo(jnp.int32).max)


def _masses(rows: jax.Array, components: Components) -> jax.Array:
    """`log_masses` of rows with columns past the tokenizer's."""
    return log_masses(rows[:, : components.event_of.shape[0]], components)


def _exchange(
    several: _Side, positions: jax.Array, slots: Slots, inside: jax.Array
) -> tuple[Slots, jax.Array, jax.Array, jax.Array]:
    """Of steps [m], those that this device compares: [m / n] of everything.

    Args:
        several: the side with several tokens; positions [m] in it.
        slots: of the steps.
        inside: [m, L], what this device has of the other side's logits of `slots.tokens`, 0 elsewhere.

    Returns:
        The slots; `inside`, whole; the logits of `slots.pieces`; and log sum exp of the rest.
    """
    layout = several.layout
    own = jnp.concatenate([inside, several.at(positions, slots.pieces)], axis=1)
    # -inf and zeros sum to -inf.
    whole = jax.lax.psum_scatter(own, layout.axis, scatter_dimension=0, tiled=True)
    end = layout.log_normalizer(several.rest(positions, slots))
    count = len(whole)

    def mine(values: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(values, layout.start(count), count)

    inside, following = jnp.split(whole, 2, axis=1)
    return Slots(*map(mine, slots)), inside, following, mine(end)


def _within(slots: Slots, values: jax.Array) -> jax.Array:
    """`Slots.within` of the tokens' logits [m, L]."""
    places = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return slots._replace(tokens=places).within(values, jnp.arange(len(values), dtype=jnp.int32))


def _after(slots: Slots, values: jax.Array, end: jax.Array) -> jax.Array:
    """The first result of `Slots.after`, of the pieces' logits [m, L] and what the end is worth [m]."""
    values = jnp.where(slots.pieces < 0, end[:, None], values)
    return jnp.where(slots.leads, values, -jnp.inf)


prefix.defvjp(_forward, _backward)
