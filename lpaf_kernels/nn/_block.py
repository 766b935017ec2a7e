"""What the modules of whole blocks share: their layers, normalisation and dropout as the operators take them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._blocks import Norm
from .lowrank_sparse_linear import LowRankSparseLinear


def check_layer(name: str, layer: nn.Module, inputs: int | None = None, outputs: int | None = None) -> None:
    """Raise unless ``layer`` is a LowRankSparseLinear of these sizes that does nothing after its bias."""
    if not isinstance(layer, LowRankSparseLinear):
        raise TypeError(f"{name}: expected a LowRankSparseLinear, got {type(layer).__name__}")
    if layer.activation is not None:
        raise ValueError(f"{name}: expected a layer without activation, got {layer.activation!r}")
    for what, actual, wanted in (
        ("inputs", layer.in_features, inputs),
        ("outputs", layer.out_features, outputs),
    ):
        if wanted is not None and actual != wanted:
            raise ValueError(f"{name}: expected {wanted} {what}, got {actual}")


def check_norm(norm: nn.Module | None, size: int) -> None:
    """Raise unless ``norm`` is None or normalises rows of ``size`` numbers with a weight."""
    if norm is None:
        return
    if not isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        raise TypeError(f"norm: expected an nn.LayerNorm or nn.RMSNorm, got {type(norm).__name__}")
    if tuple(norm.normalized_shape) != (size,) or norm.weight is None:
        raise ValueError(f"norm: expected weights for {size} columns, got {norm}")


def norm_arguments(norm: nn.Module | None) -> Norm | None:
    """The operators' ``norm`` for an nn.LayerNorm, an nn.RMSNorm or DeBERTa's own LayerNorm."""
    if norm is None:
        return None
    if isinstance(norm, nn.RMSNorm):
        eps = torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps
        return Norm("rms", norm.weight, None, eps)
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    return Norm("layer", norm.weight, norm.bias, eps)


def dropout_p(dropout: nn.Dropout | None) -> float:
    """The chance of a zero, now."""
    return dropout.p if dropout is not None and dropout.training else 0.0


def kept_columns(layer: LowRankSparseLinear) -> Tensor | None:
    """The positions of the kept columns, or None where there are none."""
    return layer.kept if layer.kept.shape[0] else None


def finish_apart(x: Tensor) -> bool:
    """Whether residual and normalisation are left to torch: under autocast they stay in the residual's dtype."""
    return torch.is_autocast_enabled(x.device.type)


def finish(y: Tensor, residual: Tensor | None, norm: nn.Module | None) -> Tensor:
    """norm(y + residual)."""
    if residual is not None:
        y = y + residual
    return y if norm is None else norm(y)
