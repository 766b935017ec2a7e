"""Singular values and numerical rank of weight matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tqdm.auto import tqdm


def singular_values(weights: Mapping[str, torch.Tensor], description: str = "spectra") -> dict[str, torch.Tensor]:
    """Singular values of every [n, m] matrix, largest first, float32 [min(n, m)]."""
    bar = tqdm(weights.items(), desc=description, unit="matrix", delay=2, leave=False)
    return {name: torch.linalg.svdvals(weight.detach().float()).cpu() for name, weight in bar}


def numerical_rank(values: torch.Tensor, shape: tuple[int, int]) -> int:
    """Singular values above max(n, m) * eps(float32) * sigma_max, the rule of numpy's ``matrix_rank``."""
    if not values.numel():
        return 0
    return int((values > max(shape) * torch.finfo(torch.float32).eps * values.max()).sum())
