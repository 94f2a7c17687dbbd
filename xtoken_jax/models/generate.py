"""Text from a model: batches of prompts, a cache of keys and values, greedy or sampled.

The host keeps what is short, the prompts and the new tokens; the device keeps the cache. Prompts are padded
on the left, so that all rows of a batch write the same slot of the cache, and their last token is left to
the loop, so that one program chooses every new token. The loop runs in blocks; between two the host looks
for stop strings and for rows that have ended.

Shape letters: B row of a batch, T position, S cached position, V vocabulary, E token that ends a text.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.distributed.mesh import BATCH, constrain, whole
from xtoken_jax.errors import NonFiniteOutputsError, UserError
from xtoken_jax.models.decoder import Model, Params, logits
from xtoken_jax.models.network import Cache
from xtoken_jax.models.rope import LongRope
from xtoken_jax.models.sampling import Random, Sampling, choose

if TYPE_CHECKING:
    from rich.console import Console

_BLOCK = 32  # new tokens between two looks of the host
_PIECE = 256  # positions of a prompt at a time: the scores of attention are [B, N, piece, S]


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
    size: int | None = None,
    batch_size: int = 8,
    stop: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    length_multiple: int = 64,
    console: Console | None = None,
) -> list[list[int]]:
    """New tokens for each prompt.

    What a prompt gets depends neither on the others nor on the batch it is in, but for the last bits of its
    logits. A call compiles only for lengths and batches that it meets for the first time; under
    `jax.set_mesh` the rows are split over `data` and `fsdp`. Nothing is cut: a text longer than the model
    was trained for is computed all the same. With LongRoPE a text that passes the pretrained length goes
    through the model again, as a whole, with the factors for long texts.

    Args:
        model, params: as in `Model.__call__`.
        prompts: ids of each, at least one.
        max_new_tokens: at most so many for each prompt.
        eos_ids: tokens that end a text; they are not in the result.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that together have this probability (nucleus sampling,
            arXiv 1904.09751); 1: from all.
        key: of sampling, split by the prompt's place in `prompts` and the new token's place behind it.
        size: V of the tokenizer; ids from here on are never chosen. None: all rows of the unembedding.
        batch_size: prompts at a time; a mesh rounds it up to a multiple of its data devices.
        stop: strings that end a text, looked for in the decoded new tokens. The tokens end with the one that
            completes the first of them; `cut_at_stop` of their text is the text in front.
        decode: new tokens -> text, wanted for `stop`.
        length_multiple: lengths of prompts and of new tokens are rounded up to it.
        console: shows a bar where there are several batches.

    Returns:
        A list of new ids for each prompt, in the order of the prompts. One that is shorter than
        `max_new_tokens` ended by itself, or with a stop string.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, a setting out of its range, sampling
            without a key, stop strings without `decode`.
        NonFiniteOutputsError: logits that are NaN or +inf, or all of them -inf, where a token is chosen.
    """
    check_settings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, stop=stop,
        batch_size=batch_size, length_multiple=length_multiple,
    )  # fmt: skip
    vocabulary = model.config.vocab_size
    if size is not None and not 1 <= size <= vocabulary:
        raise UserError(f"size={size}: the model's vocabulary has {vocabulary} ids")
    if temperature > 0 and key is None:
        raise UserError(f"temperature={temperature}: sampling needs a key, such as jax.random.key(0)")
    if stop and decode is None:
        raise UserError("stop strings need decode, which turns ids into text")
    rows = [_Row(place, [int(token) for token in prompt]) for place, prompt in enumerate(prompts)]
    for row in rows:
        if not row.prompt:
            raise UserError(f"prompts[{row.place}] is empty; open it with the tokenizer's BOS")
        if wrong := [token for token in row.prompt if not 0 <= token < vocabulary]:
            raise UserError(
                f"prompts[{row.place}] has id {wrong[0]}; the model's vocabulary has {vocabulary}"
            )

    sampling = Sampling(vocabulary if size is None else size, temperature > 0, temperature > 0 and top_p < 1)
    random = Random(
        jax.random.key(0) if key is None else key,
        jnp.float32(max(temperature, 1e-30)),  # above 0 in float32 too
        jnp.float32(top_p),
    )
    ends = jnp.asarray(eos_ids, jnp.int32).reshape(-1)
    runs = _Run(model, params, sampling, random, ends, tuple(stop), decode, length_multiple)
    at_once = min(batch_size, 2 ** math.ceil(math.log2(max(len(rows), 1))))
    with _bar(console, rows, at_once, max_new_tokens) as advance:
        for long, reach in _passes(model):
            for row in rows:
                room = max(0, reach - len(row.prompt))
                row.limit = 0 if row.ended else min(max_new_tokens, room)
            waiting = [row for row in rows if row.limit > len(row.new)]
            waiting.sort(key=lambda row: -len(row.text))  # like lengths together, the largest batch first
            capacity = max((row.limit - len(row.new) for row in waiting), default=0)
            # one row of a batch of long texts is left free, see `_Run.batch`
            count = max(at_once, 2) - 1 if long else at_once
            for first in range(0, len(waiting), count):
                runs.batch(
                    waiting[first : first + count], _rounded(count + long, _data_devices()), capacity, long
                )
                advance()
    return [row.new for row in rows]


def check_settings(
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Sequence[str] = (),
    batch_size: int = 1,
    length_multiple: int = 1,
) -> None:
    """Refuses what `generate` would, before there is a model.

    Raises:
        UserError: names the setting and its value.
    """
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 0")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature}: must be a number from 0 on; 0 takes the likeliest token")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: must be above 0 and at most 1")
    for name, value in (("batch_size", batch_size), ("length_multiple", length_multiple)):
        if value < 1:
            raise UserError(f"{name}={value}: must be at least 1")
    if isinstance(stop, str) or not all(stop):
        raise UserError(f"stop={stop!r}: must be a list of strings, none of them empty")


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text in front of the earliest stop string in it, all of it where there is none."""
    found = [place for word in stop if (place := text.find(word)) >= 0]
    return text[: min(found)] if found else text


@dataclass
class _Row:
    """A prompt on its way.

    Attributes:
        place: in the caller's list.
        new: tokens behind the prompt so far.
        limit: of `new`, in the pass at hand.
        ended: by EOS or a stop string.
    """

    place: int
    prompt: list[int]
    new: list[int] = field(default_factory=list)
    limit: int = 0
    ended: bool = False

    @property
    def text(self) -> list[int]:
        return self.prompt + self.new


class _Step(NamedTuple):
    """The rows of a batch between two steps, int32 [B] each, `done` bool.

    Attributes:
        place: of the prompt, for its random numbers.
        token: chosen last, not in the cache yet.
        position: its rotary position.
        number: of tokens chosen so far.
        limit: of that number.
        done: nothing more is wanted of the row; what it computes is not read.
    """

    place: jax.Array
    token: jax.Array
    position: jax.Array
    number: jax.Array
    limit: jax.Array
    done: jax.Array


@dataclass(frozen=True)
class _Run:
    """What is the same for all batches of a call."""

    model: Model
    params: Params
    sampling: Sampling
    random: Random
    eos_ids: jax.Array
    stop: tuple[str, ...]
    decode: Callable[[list[int]], str] | None
    multiple: int

    def batch(self, rows: list[_Row], size: int, capacity: int, long: bool) -> None:
        """Takes rows to their limits or ends, `size` rows at a time, those at the end empty.

        LongRoPE looks at the largest position of the whole batch. In a batch of texts past the pretrained
        length an empty row has a position there, so that their first tokens are turned as the last are.
        """
        longest = max(len(row.text) for row in rows)
        width = _rounded(longest - 1, self.multiple) if longest > 1 else 0
        scaling = self.model.config.rope_scaling
        beyond = scaling.original_max_position_embeddings if long and isinstance(scaling, LongRope) else 0
        tokens = np.zeros((size, width), np.int32)
        mask = np.zeros((size, width), bool)
        positions = np.full((size, width), beyond, np.int32)
        for n, row in enumerate(rows):
            known = row.text[:-1]
            start = width - len(known)
            tokens[n, start:], mask[n, start:] = known, True
            positions[n] = np.maximum(np.arange(width) - start, 0)
        cache = _empty(self.model, size, width + _rounded(capacity, self.multiple))
        begin = 0
        while begin < width:
            # the first piece takes what is left over, so that the others have one length
            end = begin + ((width - begin) % _PIECE or _PIECE)
            part = np.s_[:, begin:end]
            cache = _read(self.model, self.params, cache, tokens[part], mask[part], positions[part])
            begin = end
        while not all(row.ended or len(row.new) == row.limit for row in rows):
            step = _step(rows, size, beyond)
            written, broken, cache = _write(
                self.model, self.params, cache, step, self.eos_ids, self.random, self.sampling
            )
            if bad := [row.place for row, wrong in zip(rows, np.asarray(broken), strict=False) if wrong]:
                raise NonFiniteOutputsError(
                    f"the model's outputs are not finite after prompts[{bad[0]}]; the checkpoint is damaged "
                    f"or needs wider numbers than {self.model.compute_dtype}"
                )
            for row, ids in zip(rows, np.asarray(written).tolist(), strict=False):
                self._take(row, ids)

    def _take(self, row: _Row, ids: list[int]) -> None:
        """The tokens of a block, -1 from the row's end on."""
        if row.ended or len(row.new) == row.limit:
            return
        seen = len(row.new)
        row.new += ids[: ids.index(-1)] if -1 in ids else ids
        row.ended = len(row.new) - seen < min(len(ids), row.limit - seen)
        if not self.stop or self.decode is None or len(row.new) == seen:
            return
        if not _holds(self.decode(row.new), self.stop):
            return
        # the end is where it would be if the text were looked at after every token
        for count in range(seen + 1, len(row.new) + 1):
            if _holds(self.decode(row.new[:count]), self.stop):
                row.new, row.ended = row.new[:count], True
                return


def _step(rows: list[_Row], size: int, beyond: int) -> _Step:
    """The arrays of a batch; empty rows are done, and those that are done are at position `beyond`."""
    every = [*rows, *[_Row(0, [0])] * (size - len(rows))]
    place, token, position, number, limit = np.array(
        [(r.place, r.text[-1], len(r.text) - 1, len(r.new), r.limit) for r in every], np.int32
    ).T
    done = np.array([r.ended for r in every]) | (number >= limit)
    position = np.where(done, np.int32(beyond), position)
    return _Step(*map(jnp.asarray, (place, token, position, number, limit, done)))


@functools.partial(jax.jit, static_argnames=("model", "batch", "length"))
def _empty(model: Model, batch: int, length: int) -> Cache:
    return _laid_out(model.init_cache(batch, length))


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _read(
    model: Model, params: Params, cache: Cache, tokens: jax.Array, mask: jax.Array, positions: jax.Array
) -> Cache:
    """The cache with a piece of the prompts, each array [B, T]."""
    tokens, mask, positions = (constrain(x, "B T") for x in (tokens, mask, positions))
    return _laid_out(model.extend(params, tokens, cache, positions=positions, mask=mask)[2])


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="cache")
def _write(
    model: Model,
    params: Params,
    cache: Cache,
    step: _Step,
    eos_ids: jax.Array,
    random: Random,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, Cache]:
    """A block of new tokens, int32 [B, block] with -1 from a row's end on, and the cache without the last.

    Between them bool [B]: rows with a token that was chosen from logits which are not finite.
    """
    step = _Step(*(constrain(x, "B") for x in step))
    written = constrain(jnp.full((step.token.shape[0], _BLOCK), -1, jnp.int32), "B T")

    def wanted(carry: tuple) -> jax.Array:
        place, step, *_ = carry
        return (place < _BLOCK) & ~jnp.all(step.done)

    def one(carry: tuple) -> tuple:
        place, step, written, broken, cache = carry
        hidden, unembedding, cache = model.extend(
            params, step.token[:, None], cache, positions=step.position[:, None]
        )
        scores = logits(hidden, unembedding, softcap=model.config.logit_softcap)[:, 0]
        token = choose(scores, step.place, step.number, random, sampling)
        highest = scores[:, : sampling.size].max(axis=-1)
        broken = broken | (~jnp.isfinite(highest) & ~step.done)
        ends = jnp.any(token[:, None] == eos_ids[None, :], axis=-1)
        written = written.at[:, place].set(jnp.where(step.done | ends, -1, token))
        number = step.number + 1
        done = step.done | ends | (number >= step.limit)
        # a row that is done stays where it is: a step further LongRoPE might take the batch for a long one
        position = jnp.where(done, step.position, step.position + 1)
        step = step._replace(token=token, position=position, number=number, done=done)
        return place + 1, step, written, broken, _laid_out(cache)

    broken = jnp.zeros_like(step.done)
    start = jnp.int32(0), step, written, broken, cache
    _, _, written, broken, cache = jax.lax.while_loop(wanted, one, start)
    return whole(written), whole(broken), cache  # each process reads all of it


def _laid_out(cache: Cache) -> Cache:
    """The cache in one layout, whichever program it comes from: another one would compile the next again."""
    key, value = (constrain(x, "L B S G H") for x in (cache.key, cache.value))
    return Cache(key, value, cache.filled, constrain(cache.real, "B T"))


def _passes(model: Model) -> list[tuple[bool, int]]:
    """For each pass, whether its texts count as long, and how long they may become.

    A text of the pretrained length is the last whose next token LongRoPE's short factors give.
    """
    scaling = model.config.rope_scaling
    if not isinstance(scaling, LongRope):
        return [(False, sys.maxsize)]
    return [(False, scaling.original_max_position_embeddings + 1), (True, sys.maxsize)]


def _holds(text: str, stop: Sequence[str]) -> bool:
    return any(word in text for word in stop)


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _data_devices() -> int:
    """Devices that a batch is split over."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes.get(axis, 1) for axis in BATCH)


@contextlib.contextmanager
def _bar(console: Console | None, rows: list[_Row], at_once: int, most: int) -> Iterator[Callable[[], None]]:
    """A function that brings the bar up to date."""
    if console is None or len(rows) <= at_once:
        yield lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("generating", total=len(rows))
        yield lambda: progress.update(bar, completed=sum(r.ended or len(r.new) == most for r in rows))
