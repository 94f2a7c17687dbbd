"""Events that two vocabularies have in common, as pytrees; built by `projection.prefixes` (jax only)."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np

from xtoken_jax.projection.readable import readable, size_of

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Components:
    """Which event each token of one vocabulary belongs to: "the text goes on with one of these".

    Event c < len(single) is one token; the others have several, on this side or on the other.

    Attributes:
        single: int32 [C_1], the token of each event that has one token on both sides.
        tokens: int32 [M], the tokens of the other events, event by event.
        events: int32 [M], their events less C_1, rising.
        event_of: int32 [V], each token's event; C for a token of none, which takes no part.
        count: C, the events.
    """

    single: Array
    tokens: Array
    events: Array
    event_of: Array
    count: int = field(metadata={"static": True})

    def __repr__(self) -> str:
        return readable(self, f"{self.count:,} events of {size_of(self.event_of)} tokens")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Continuations:
    """The tokens of one vocabulary, sorted by their pieces in the other: a prefix of pieces is one run.

    Attributes:
        order: int32 [R], tokens with pieces, in the order of their pieces.
        pieces: int32 [V, D + 1], the first pieces of each token in the other vocabulary, -1 past the end.
        following: int32 [V, D + 1], at [i, d] how token i goes on after d pieces: with its next piece, or
            -1 where that is no sign against the token having ended there, as it has at its own end.
        begin, size: int32 [V, D]: at [i, d - 1] the run of `order` that shares the first d pieces of
            token i; size 0 where i has fewer pieces, or all of the run go on in the same way.
        longest: the largest size.
    """

    order: Array
    pieces: Array
    following: Array
    begin: Array
    size: Array
    longest: int = field(metadata={"static": True})

    def __repr__(self) -> str:
        return readable(self, f"{size_of(self.order)} of {size_of(self.pieces)} tokens with pieces")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefixTables:
    """All that `losses.prefix_kl` reads of a tokenizer pair.

    Attributes:
        student, teacher: the events at a common boundary, on each side.
        student_pieces: student tokens by their teacher pieces; teacher_pieces: the reverse.
    """

    student: Components
    teacher: Components
    student_pieces: Continuations
    teacher_pieces: Continuations

    def __repr__(self) -> str:
        sides = ("student", self.student, self.student_pieces), ("teacher", self.teacher, self.teacher_pieces)
        lines = [
            f"  {name}: {size_of(getattr(events, 'event_of', None))} tokens, "
            f"{size_of(getattr(pieces, 'order', None))} of them by pieces of the other side"
            for name, events, pieces in sides
        ]
        return "\n".join([f"PrefixTables({getattr(self.student, 'count', '?')} events", *lines]) + ")"

    @property
    def student_size(self) -> int:
        """V_s of the student's tokenizer."""
        return self.student.event_of.shape[0]

    @property
    def teacher_size(self) -> int:
        """V_t of the teacher's tokenizer."""
        return self.teacher.event_of.shape[0]


@jax.custom_vjp
def log_masses(logits: jax.Array, components: Components) -> jax.Array:
    """log sum of exp(logits) over the tokens of each event.

    Args:
        logits: float32 [N, V].
        components: of this vocabulary.

    Returns:
        float32 [N, C].

    Example:
        >>> tables = Components(*map(np.array, ([2], [0, 1], [0, 0], [1, 1, 0])), count=2)
        >>> print(jnp.exp(log_masses(jnp.log(jnp.array([[0.25, 0.5, 0.25]])), tables)))
        [[0.25 0.75]]
    """
    return _forward(logits, components)[0]


def _forward(logits: jax.Array, components: Components) -> tuple[jax.Array, tuple]:
    single = logits[:, jnp.asarray(components.single)]
    several = components.count - components.single.shape[0]
    parts, events = logits[:, jnp.asarray(components.tokens)].T, jnp.asarray(components.events)
    highest = jax.ops.segment_max(parts, events, several, indices_are_sorted=True)
    highest = jnp.where(highest == -jnp.inf, 0.0, highest)
    sums = jax.ops.segment_sum(jnp.exp(parts - highest[events]), events, several, indices_are_sorted=True)
    masses = jnp.concatenate([single, (jnp.log(sums) + highest).T], axis=1)
    return masses, (logits, masses, components)


def _backward(residuals: tuple, gradient: jax.Array) -> tuple:
    logits, masses, components = residuals
    event_of = jnp.asarray(components.event_of)
    of_token = gradient.at[:, event_of].get(mode="fill", fill_value=0.0)
    mass = masses.at[:, event_of].get(mode="fill", fill_value=0.0)
    share = jnp.where((mass != -jnp.inf) & (of_token != 0), logits - mass, -jnp.inf)
    return of_token * jnp.exp(share), None


log_masses.defvjp(_forward, _backward)
