"""A linear layer whose weight is pruned by a selection of scores, with straight-through score gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import library, register_autocast, register_fallback
from ._checks import check_device, check_floating, check_shape
from .keep_threshold import KeepThreshold, threshold_mask


def masked_linear(
    x: Tensor, weight: Tensor, scores: Tensor, threshold: KeepThreshold | float, bias: Tensor | None = None
) -> Tensor:
    """x (weight * mask)^T + bias with mask = threshold.mask(scores), computed in the dtype of ``x``.

    Backward, with G = dy^T x computed once: d weight = mask * G and d scores = weight * G, pruned entries
    included (the straight-through estimator of movement pruning). Neither the mask nor weight * mask is kept
    for it.

    Args:
        x: [..., in], float32, float16, bfloat16 or float64.
        weight: [out, in], any of these dtypes; cast to that of ``x`` together with the mask, in one pass.
        scores: [out, in], any of these dtypes; compared as they are, under autocast too.
        threshold: the result of :func:`keep_threshold`, or a number t that means scores >= t.
        bias: [out], cast to the dtype of ``x``. Default: none.

    Returns:
        [..., out] in the dtype of ``x`` (under autocast, in the autocast dtype).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; a NaN threshold.
    """
    check_floating("x", x)
    check_floating("weight", weight)
    check_floating("scores", scores)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [out, in], got {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected last dimension {weight.shape[1]} (that of weight), got shape {list(x.shape)}")
    check_shape("scores", scores, *weight.shape, because="that of weight")
    check_device("weight", weight, x)
    check_device("scores", scores, x)
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, weight.shape[0], because="the rows of weight")
        check_device("bias", bias, x)
    value, tie_index = _threshold(threshold, scores)
    return torch.ops.lpaf_kernels.masked_linear(x, weight, scores, value, tie_index, bias)


def masked_linear_reference(
    x: Tensor, weight: Tensor, scores: Tensor, threshold: KeepThreshold | float, bias: Tensor | None = None
) -> Tensor:
    """The same in plain torch, differentiable: the gradient of the mask is passed straight to the scores."""
    mask = scores >= threshold if isinstance(threshold, (int, float)) else threshold.mask(scores)
    gate = mask.to(scores.dtype)
    if scores.requires_grad:
        gate = gate + (scores - scores.detach())
    return F.linear(x, (weight * gate).to(x.dtype), bias)


def _threshold(threshold: KeepThreshold | float, scores: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if isinstance(threshold, (int, float)) and not isinstance(threshold, bool):
        if math.isnan(threshold):
            raise ValueError("threshold: expected a number, got nan")
        value = torch.full((), threshold, dtype=dtype, device=scores.device)
        return value, torch.full((), scores.numel(), dtype=torch.int64, device=scores.device)
    if not isinstance(threshold, KeepThreshold):
        raise TypeError(f"threshold: expected a KeepThreshold or a number, got {type(threshold).__name__}")
    check_device("threshold", threshold.value, scores, "scores")
    return threshold.value.to(dtype), threshold.tie_index


def _masked_weight(weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor, dtype: torch.dtype) -> Tensor:
    # where, not a product: a pruned entry is +0.0 whatever the sign (or NaN) of its weight.
    return torch.where(threshold_mask(scores, value, tie_index), weight.to(dtype), 0.0)


def _masked_weight_fake(weight, scores, value, tie_index, dtype):
    return weight.new_empty(weight.shape, dtype=dtype)


def _grads(
    grad_weight: Tensor, weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor
) -> tuple[Tensor, Tensor]:
    mask = threshold_mask(scores, value, tie_index)
    d_weight = torch.where(mask, grad_weight.to(weight.dtype), 0.0)
    wide = torch.promote_types(torch.promote_types(weight.dtype, grad_weight.dtype), torch.float32)
    return d_weight, (weight.to(wide) * grad_weight.to(wide)).to(scores.dtype)


def _grads_fake(grad_weight, weight, scores, value, tie_index):
    return torch.empty_like(weight, memory_format=torch.contiguous_format), torch.empty_like(
        scores, memory_format=torch.contiguous_format
    )


def _is_native(*dtypes: torch.dtype) -> bool:
    """Native kernels serve float64 only unmixed."""
    return torch.float64 not in dtypes or set(dtypes) == {torch.float64}


def _effective_weight(weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor, dtype: torch.dtype) -> Tensor:
    if _is_native(weight.dtype, scores.dtype, dtype):
        return torch.ops.lpaf_kernels.masked_linear_weight(weight, scores, value, tie_index, dtype)
    return _masked_weight(weight, scores, value, tie_index, dtype)


def _masked_linear(
    x: Tensor, weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor, bias: Tensor | None
) -> Tensor:
    masked = _effective_weight(weight, scores, value, tie_index, x.dtype)
    return F.linear(x, masked, None if bias is None else bias.to(x.dtype))


def _masked_linear_fake(x, weight, scores, value, tie_index, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _masked_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    value: Tensor,
    tie_index: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = grad.reshape(-1, weight.shape[0])
    d_x, d_weight, d_scores, d_bias = (grad.new_empty(0) for _ in range(4))
    if needs[0]:
        masked = _effective_weight(weight, scores, value, tie_index, x.dtype)
        d_x = (rows @ masked).view(x.shape)
    if needs[1] or needs[2]:
        grad_weight = rows.t() @ x.reshape(-1, weight.shape[1])
        if _is_native(grad_weight.dtype, weight.dtype, scores.dtype):
            both = torch.ops.lpaf_kernels.masked_linear_grads(grad_weight, weight, scores, value, tie_index)
        else:
            both = _grads(grad_weight, weight, scores, value, tie_index)
        d_weight, d_scores = both
    if needs[3]:
        d_bias = rows.sum(0)
    return d_x, d_weight, d_scores, d_bias


def _masked_linear_backward_fake(grad, x, weight, scores, value, tie_index, needs):
    both = needs[1] or needs[2]
    return (
        x.new_empty(x.shape if needs[0] else 0),
        weight.new_empty(weight.shape if both else 0, dtype=weight.dtype if both else grad.dtype),
        scores.new_empty(scores.shape if both else 0, dtype=scores.dtype if both else grad.dtype),
        grad.new_empty(weight.shape[0] if needs[3] else 0),
    )


def _setup_context(ctx, inputs, output) -> None:
    x, weight, scores, value, tie_index, _ = inputs
    ctx.save_for_backward(x, weight, scores, value, tie_index)


def _backward(ctx, grad):
    x, weight, scores, value, tie_index = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
    grads = torch.ops.lpaf_kernels.masked_linear_backward(grad, x, weight, scores, value, tie_index, needs)
    d_x, d_weight, d_scores, d_bias = (d if need else None for d, need in zip(grads, needs, strict=True))
    return d_x, d_weight, d_scores, None, None, d_bias


def _cast(dtype, x, weight, scores, value, tie_index, bias):
    """Only x and the bias: the weight is cast with the mask; rounded scores would select other entries."""
    if x.dtype == torch.float64:
        return x, weight, scores, value, tie_index, bias
    return x.to(dtype), weight, scores, value, tie_index, None if bias is None else bias.to(dtype)


for _name, _kernel, _fake in (
    ("masked_linear", _masked_linear, _masked_linear_fake),
    ("masked_linear_backward", _masked_linear_backward, _masked_linear_backward_fake),
    ("masked_linear_weight", _masked_weight, _masked_weight_fake),
    ("masked_linear_grads", _grads, _grads_fake),
):
    register_fallback(_name, _kernel)
    torch.library.register_fake(f"lpaf_kernels::{_name}", _fake, lib=library)
torch.library.register_autograd("lpaf_kernels::masked_linear", _backward, setup_context=_setup_context, lib=library)
register_autocast("masked_linear", _cast)
