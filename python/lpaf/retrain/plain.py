"""Plain retraining: the factors alone."""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback


class PlainRetraining:
    """Retrain the factorised model as it is."""

    def attach(self, model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
        """Nothing to add."""

    def callbacks(self, steps: int, passes: int) -> list[TrainerCallback]:
        """No schedule."""
        return []

    def detach(self, model: nn.Module) -> None:
        """Nothing to remove."""
