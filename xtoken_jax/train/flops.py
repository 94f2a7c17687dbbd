"""Arithmetic of a step that its models ask for, and what devices could do at most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax

from xtoken_jax.models.config import DecoderConfig
from xtoken_jax.models.decoder import Model

# Dense bfloat16 operations a second by `jax.Device.device_kind`, as the vendors publish them (NVIDIA's tables
# for Hopper count twice, with sparsity).
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def forward_flops(config: DecoderConfig, length: int) -> int:
    """Operations a token of a forward pass over rows of `length` tokens, logits included.

    Two for each weight of a matrix product, and 4 N H S in attention over S positions, masked ones included
    (PaLM, arXiv 2204.02311, appendix B).
    """
    c = config
    heads = c.num_heads * c.head_dim
    attention = c.hidden_size * (2 * heads + 2 * c.num_kv_heads * c.head_dim)
    layers = c.num_layers * (attention + 3 * c.hidden_size * c.intermediate_size)
    window = min(length, c.sliding_window or length)
    seen = sum(window if slides else length for slides in c.sliding)
    return 2 * (layers + c.vocab_size * c.hidden_size) + 4 * heads * seen


def step_flops(student: Model, teachers: Iterable[tuple[Model, int]], batch_size: int, length: int) -> int:
    """Operations of a training step; what is computed twice to save memory counts once.

    Args:
        student: the backward pass is twice the forward pass or, under adapters, whose weights below get no
            gradient, as much.
        teachers: each with its T_t.
        batch_size, length: B and T_s.
    """
    passes = 3 if student.lora is None else 2
    of_teachers = sum(length * forward_flops(model.config, length) for model, length in teachers)
    return batch_size * (passes * length * forward_flops(student.config, length) + of_teachers)


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Operations a second of all devices together; None where one is of a kind that is not in the table."""
    peaks = [PEAK_FLOPS.get(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if known and len(known) == len(peaks) else None
