"""What pruners share: where scores are ranked, and the cubic sparsity schedule (LPAF Eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lpaf_kernels import KeepThreshold, keep_threshold

from ..errors import TrainingDivergedError


def check_keep(keep: float) -> None:
    """ValueError unless ``keep`` is a share of weights that leaves some."""
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep: must be in (0, 1], got {keep}")


def check_scope(scope: str) -> None:
    """ValueError unless ``scope`` says where scores are ranked."""
    if scope not in ("matrix", "global"):
        raise ValueError(f"scope: expected 'matrix' or 'global', got {scope!r}")


NOT_NUMBERS = "prune: the scores are not numbers any more; pass smaller learning rates, or check the data"


def select(
    scores: Sequence[torch.Tensor], keep: float, scope: str, weights: Sequence[torch.Tensor] | None = None
) -> list[KeepThreshold]:
    """The thresholds of :func:`keep_threshold`; NaN scores are a TrainingDivergedError where a CPU finds them."""
    try:
        return keep_threshold(scores, keep, scope=scope, weights=weights)
    except ValueError as error:
        if "holds NaN" in str(error):
            raise TrainingDivergedError(NOT_NUMBERS) from error
        raise


def refuse_nan(states: Sequence[torch.Tensor]) -> None:
    """TrainingDivergedError if one of ``states`` holds NaN.

    For when a run logs or ends: on a GPU NaN scores make a NaN threshold, which keeps nothing and waits for nobody.
    """
    if states and bool(torch.stack([state.isnan().any() for state in states]).any()):
        raise TrainingDivergedError(NOT_NUMBERS)


@dataclass(frozen=True)
class CubicSchedule:
    """Share of weights kept at each training step, from 1 down to ``keep`` (or another value that moves this way).

    v_t = v_i for t < t_i; v_f + (v_i - v_f) ((T - t_f - t) / (T - t_f - t_i))^3 for t_i <= t < T - t_f; v_f afterwards.

    Args:
        keep: final share v_f in [0, 1].
        steps: total steps T.
        warmup: share of the steps before pruning starts (t_i / T).
        cooldown: share of the steps at the final share (t_f / T).
        start: first value v_i. Default: 1.

    Raises:
        ValueError: shares outside [0, 1), or warm-up and cool-down that leave no step to prune in.
    """

    keep: float
    steps: int
    warmup: float = 0.1
    cooldown: float = 0.3
    start: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.keep <= 1.0:
            raise ValueError(f"keep: must be in [0, 1], got {self.keep}")
        if self.steps < 1:
            raise ValueError(f"steps: must be at least 1, got {self.steps}")
        for name in ("warmup", "cooldown"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: must be in [0, 1), got {getattr(self, name)}")
        if self.warmup + self.cooldown >= 1.0:
            raise ValueError(
                f"warmup + cooldown: {self.warmup} + {self.cooldown} leaves no step to prune in (T - t_f <= t_i); "
                "their sum must be below 1"
            )

    def __call__(self, step: int) -> float:
        first = self.warmup * self.steps
        end = self.steps - self.cooldown * self.steps
        if step < first:
            return self.start
        if step >= end:
            return self.keep
        return self.keep + (self.start - self.keep) * ((end - step) / (end - first)) ** 3
