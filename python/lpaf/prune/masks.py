"""Encoder linears under masks: put in, read, taken out."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lpaf_kernels import MaskedLinear

from ..models.targets import encoder_linears
from .schedule import refuse_nan


def masked_linears(model: nn.Module) -> Iterator[tuple[str, MaskedLinear]]:
    """(name, module) of every MaskedLinear of ``model``."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MaskedLinear))


def add_masks(model: nn.Module, score_init: float = 0.0, learned: bool = True, rows: bool = False) -> None:
    """Replace every encoder linear of ``model`` by a MaskedLinear that keeps everything.

    Args:
        score_init: scores start at this multiple of |W| / mean(|W|) of their matrix; 0 starts them at zero.
        learned: whether the scores get gradients.
        rows: one score per row, a neuron, instead of one per weight; they start at zero.
    """
    for name, linear in encoder_linears(model).items():
        masked = MaskedLinear.from_linear(linear, block=(1, linear.in_features) if rows else (1, 1))
        if score_init:
            magnitude = linear.weight.detach().abs()
            mean = magnitude.mean().clamp(min=torch.finfo(magnitude.dtype).tiny)  # of a matrix of zeros: 0
            masked.scores.data.copy_(score_init * magnitude / mean)
        masked.scores.requires_grad_(learned)
        model.set_submodule(name, masked)


def remove_masks(model: nn.Module) -> None:
    """Zero the masked weights for good and put plain linears back; NaN thresholds are a TrainingDivergedError."""
    refuse_nan_thresholds(model)
    for name, module in list(masked_linears(model)):
        model.set_submodule(name, module.to_linear())


def refuse_nan_thresholds(model: nn.Module) -> None:
    """TrainingDivergedError where a selection met NaN scores."""
    refuse_nan([module.threshold_value for _, module in masked_linears(model)])


@torch.no_grad()
def kept_share(model: nn.Module) -> float:
    """Share of the masked weights of ``model`` that are kept (synchronises the device)."""
    modules = [module for _, module in masked_linears(model)]
    kept = torch.stack([module.mask().sum() for module in modules]).sum()
    return int(kept) / sum(module.weight.numel() for module in modules)
