"""Singular values and numerical rank of weight matrices."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tqdm.auto import tqdm

from lpaf_kernels import weighted_singular_values

#: Matrices of one call: they are shared out among threads.
CHUNK = 12


def singular_values(weights: Mapping[str, torch.Tensor], description: str = "spectra") -> dict[str, torch.Tensor]:
    """Singular values of every [n, m] matrix, largest first, float32 [min(n, m)].

    They come from the Gram matrix in float64: exact to 1e-8 of the largest, far below what counts as rank.
    """
    names, found = list(weights), {}
    with tqdm(total=len(names), desc=description, unit="matrix", delay=2, leave=False) as bar:
        for begin in range(0, len(names), CHUNK):
            chunk = names[begin : begin + CHUNK]
            values = weighted_singular_values([weights[name].detach().float() for name in chunk])
            found |= {name: value.float().cpu() for name, value in zip(chunk, values, strict=True)}
            bar.update(len(chunk))
    return found


def numerical_rank(values: torch.Tensor, shape: tuple[int, int]) -> int:
    """Singular values above max(n, m) * eps(float32) * sigma_max, the rule of numpy's ``matrix_rank``."""
    if not values.numel():
        return 0
    return int((values > max(shape) * torch.finfo(torch.float32).eps * values.max()).sum())
