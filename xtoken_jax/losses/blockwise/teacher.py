"""The teacher's rows of logits for a block of positions: from its hidden states, or from what was stored."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from xtoken_jax.alignment.batch import StoredRows
from xtoken_jax.losses.blockwise.plan import logits_of, rows_at
from xtoken_jax.losses.math.softmax import soft_capped


@dataclass(frozen=True)
class HiddenStates:
    """A teacher that has just been run.

    Attributes:
        hidden: [N_t, D_t].
        unembedding: [V_t, D_t].
        softcap: of the logits, None for none.
    """

    hidden: jax.Array
    unembedding: jax.Array
    softcap: float | None

    @property
    def length(self) -> int:
        """N_t."""
        return len(self.hidden)

    @property
    def size(self) -> int:
        """V_t."""
        return len(self.unembedding)

    def logits(self, positions: jax.Array, temperature: float) -> jax.Array:
        """float32 [n, V_t], divided by the temperature."""
        logits = logits_of(rows_at(self.hidden, positions), self.unembedding)
        return soft_capped(logits, self.softcap) / temperature

    def at_columns(self, columns: jax.Array) -> HiddenStates:
        """That of some tokens alone, int32 [m]."""
        return replace(self, unembedding=rows_at(self.unembedding, columns))


@dataclass(frozen=True)
class Stored:
    """A teacher whose distributions were stored, positions flattened.

    Attributes:
        ids, log_probabilities, others, normalizers, temperature: as in `StoredRows`.
        size: V_t, or how many columns there are.
        columns: int32 [size], those of rows without ids; None for all.
    """

    ids: jax.Array | None
    log_probabilities: jax.Array
    others: jax.Array
    normalizers: jax.Array
    temperature: float
    size: int
    columns: jax.Array | None = None

    @classmethod
    def of(cls, rows: StoredRows) -> Stored:
        """Those of a batch."""
        width = rows.log_probabilities.shape[-1]
        return cls(
            None if rows.ids is None else jnp.asarray(rows.ids).reshape(-1, width),
            jnp.asarray(rows.log_probabilities).reshape(-1, width),
            jnp.asarray(rows.others).reshape(-1),
            jnp.asarray(rows.normalizers).reshape(-1),
            rows.temperature,
            rows.size,
        )

    @property
    def length(self) -> int:
        """N_t."""
        return len(self.log_probabilities)

    def logits(self, positions: jax.Array, temperature: float) -> jax.Array:
        """float32 [n, size]: log-probabilities over the temperature, which as logits say the same.

        Raises:
            ValueError: another temperature than what is not kept was summed up for.
        """
        if self.ids is not None and temperature != self.temperature:
            raise ValueError(f"temperature={temperature}, but the rows are for {self.temperature}")
        kept = rows_at(self.log_probabilities, positions).astype(jnp.float32) / temperature
        if self.ids is None:
            return kept if self.columns is None else kept[:, self.columns]
        ids = self.ids.at[positions].get(mode="fill", fill_value=self.size)
        others = self.others.at[positions].get(mode="fill", fill_value=0.0)
        rows = jnp.broadcast_to(others[:, None], (len(positions), self.size))
        places = jnp.arange(len(positions), dtype=jnp.int32)[:, None]
        return rows.at[places, ids].set(kept, mode="drop")

    def at_columns(self, columns: jax.Array) -> Stored:
        """That of some tokens alone, int32 [m]."""
        count = len(columns)
        if self.ids is None:
            return replace(self, columns=columns, size=count)
        places = jnp.full(self.size, count, jnp.int32).at[columns].set(jnp.arange(count, dtype=jnp.int32))
        return replace(self, ids=places.at[self.ids].get(mode="fill", fill_value=count), size=count)


@dataclass(frozen=True)
class TeacherRows:
    """The teacher of a batch, positions flattened.

    Attributes:
        source: what its logits are made from.
        next_ids: int32 [N_t], the token that each position predicts; None where no merge needs it.
        real: bool [N_t], positions that choose columns; None for all.
        block: positions at a time.
        axes: mesh axes that the batch is split over, inside `jax.shard_map`.
    """

    source: HiddenStates | Stored
    next_ids: jax.Array | None
    real: jax.Array | None
    block: int
    axes: tuple[str, ...]

    @property
    def length(self) -> int:
        """N_t."""
        return self.source.length

    @property
    def size(self) -> int:
        """V_t."""
        return self.source.size

    def logits(self, positions: jax.Array, temperature: float) -> jax.Array:
        """float32 [n, V_t], but for `offsets`; position N_t, an empty one, has the same for all tokens."""
        return self.source.logits(positions, temperature)

    def offsets(self, positions: jax.Array, temperature: float) -> jax.Array:
        """float32 [n], what rows of logits lack to be those of the model; no softmax depends on it."""
        if isinstance(self.source, HiddenStates):
            return jnp.zeros(len(positions), jnp.float32)
        return self.source.normalizers.at[positions].get(mode="fill", fill_value=0.0) / temperature

    def at_columns(self, columns: jax.Array) -> TeacherRows:
        """With the logits of some tokens alone, int32 [m]."""
        return replace(self, source=self.source.at_columns(columns), next_ids=None)

    def next(self, positions: jax.Array) -> jax.Array | None:
        """int32 [n]."""
        return None if self.next_ids is None else self.next_ids.at[positions].get(mode="clip")


def stored_likeliest(rows: StoredRows) -> jax.Array:
    """int32 [B, T], the teacher's likeliest token at each position of a batch; V_t where nothing is kept."""
    values = jnp.asarray(rows.log_probabilities)
    if rows.ids is None:
        return values.argmax(axis=-1).astype(jnp.int32)
    ids = jnp.asarray(rows.ids)
    place = jnp.where(ids < rows.size, values, -jnp.inf).argmax(axis=-1, keepdims=True)
    return jnp.take_along_axis(ids, place, axis=-1)[..., 0]


def stored_logits(rows: StoredRows, temperature: float) -> jax.Array:
    """float32 [B, T, V_t] of all positions of a batch, to be divided by the temperature."""
    stored = Stored.of(rows)
    positions = jnp.arange(stored.length, dtype=jnp.int32)
    logits = stored.logits(positions, temperature) * temperature + stored.normalizers[:, None]
    return logits.reshape(*rows.normalizers.shape, rows.size)
