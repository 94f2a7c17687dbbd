"""Low-rank adapters (LoRA, arXiv 2106.09685) on a decoder's kernels."""

import dataclasses

from xtoken_jax.errors import UserError

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """W + alpha / rank * A B, with A and B trained and W frozen.

    Args:
        rank: R, columns of A.
        alpha: strength.
        targets: kernels that get an adapter.

    Raises:
        UserError: a rank or alpha that is not above zero, no target or an unknown one.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(f"lora rank={self.rank} and alpha={self.alpha} must be above zero")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise UserError(f"lora targets={list(self.targets)}; choose among {', '.join(TARGETS)}")
