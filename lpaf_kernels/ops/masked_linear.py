"""A linear layer whose weight is pruned by a selection of scores, with straight-through score gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import library, register_autocast, register_fallback
from ..tuning import masked_linear as plans
from ._checks import check_device, check_floating, check_shape
from .keep_threshold import KeepThreshold, PackedMask, threshold_mask

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def masked_linear(
    x: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    threshold: KeepThreshold | PackedMask | float,
    bias: Tensor | None = None,
) -> Tensor:
    """x (weight * mask)^T + bias with mask = threshold.mask(scores), computed in the dtype of ``x``.

    A score of smaller ``scores`` stands for a whole block of the weight. Backward, with G = dy^T x computed once:
    d weight = mask * G and d scores = the sum of weight * G over each score's block, in float32, pruned entries
    included (the straight-through estimator of movement pruning). Neither the mask nor weight * mask is kept for it;
    of blocks one bit each is.

    Args:
        x: [..., in], float32, float16, bfloat16 or float64.
        weight: [out, in], any of these dtypes; cast to that of ``x`` together with the mask, in one pass.
        scores: [out, in], or [out / b, in / c] with one score per block of b x c weights ([out, 1]: rows, [1, in]:
            columns), any of these dtypes; compared as they are, under autocast too. With a :class:`PackedMask` they
            only receive their gradient, and None serves where none is needed.
        threshold: the result of :func:`keep_threshold`, a number t that means scores >= t, or what
            :meth:`KeepThreshold.pack` made of either: then one bit is read in place of every score. Indices are those
            of ``scores``, flat.
        bias: [out], cast to the dtype of ``x``. Default: none.

    Returns:
        [..., out] in the dtype of ``x`` (under autocast, in the autocast dtype).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; a NaN threshold.
    """
    check_floating("x", x)
    check_floating("weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"weight: expected shape [out, in], got {list(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x: expected last dimension {weight.shape[1]} (that of weight), got shape {list(x.shape)}")
    check_device("weight", weight, x)
    if isinstance(threshold, PackedMask):
        _check_packed(threshold, weight)
        if scores is not None:
            check_floating("scores", scores)
            check_shape("scores", scores, *threshold.shape, because="that of threshold")
    else:
        check_floating("scores", scores)
        _check_blocks("scores", scores.shape, weight)
    if scores is not None:
        check_device("scores", scores, x)
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, weight.shape[0], because="the rows of weight")
        check_device("bias", bias, x)
    if isinstance(threshold, PackedMask):
        return torch.ops.lpaf_kernels.masked_linear_packed(x, weight, scores, threshold.bits, *threshold.shape, bias)
    value, tie_index = _threshold(threshold, scores)
    if scores.shape == weight.shape:
        return torch.ops.lpaf_kernels.masked_linear(x, weight, scores, value, tie_index, bias)
    bits = torch.ops.lpaf_kernels.masked_linear_pack(scores.detach(), value, tie_index)
    return torch.ops.lpaf_kernels.masked_linear_packed(x, weight, scores, bits, *scores.shape, bias)


def masked_linear_reference(
    x: Tensor,
    weight: Tensor,
    scores: Tensor | None,
    threshold: KeepThreshold | PackedMask | float,
    bias: Tensor | None = None,
) -> Tensor:
    """The same in plain torch, differentiable: the gradient of the mask is passed straight to the scores."""
    if isinstance(threshold, PackedMask):
        mask = threshold.unpack()
    else:
        mask = scores >= threshold if isinstance(threshold, (int, float)) else threshold.mask(scores)
    gate = mask.to(weight.dtype)
    if scores is not None and scores.requires_grad:
        gate = gate + (scores - scores.detach())
    return F.linear(x, (weight * expand_blocks(gate, weight)).to(x.dtype), bias)


def expand_blocks(scores: Tensor, weight: Tensor) -> Tensor:
    """[rows, cols], a number per block of ``weight``, as [out, in], one per weight."""
    (out_features, in_features), (rows, cols) = weight.shape, scores.shape
    if scores.shape == weight.shape:
        return scores
    blocks = scores[:, None, :, None].expand(rows, out_features // rows, cols, in_features // cols)
    return blocks.reshape(weight.shape)


def _check_blocks(name: str, shape: Sequence[int], weight: Tensor) -> None:
    divides = [parts == size or (0 < parts < size and size % parts == 0) for parts, size in zip(shape, weight.shape)]
    if len(shape) != 2 or not all(divides):
        out_features, in_features = weight.shape
        raise ValueError(
            f"{name}: expected shape [{out_features}, {in_features}] (that of weight), or"
            f" [{out_features} / b, {in_features} / c] with whole b and c, got {list(shape)}"
        )


def _check_packed(mask: PackedMask, weight: Tensor) -> None:
    _check_blocks("threshold.shape", mask.shape, weight)
    bits = mask.bits
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8:
        found = bits.dtype if isinstance(bits, Tensor) else type(bits).__name__
        raise TypeError(f"threshold.bits: expected a torch.Tensor of uint8, got {found}")
    check_shape("threshold.bits", bits, -(-math.prod(mask.shape) // 8), because="8 scores a byte")
    check_device("threshold.bits", bits, weight)


def _threshold(threshold: KeepThreshold | float, scores: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if isinstance(threshold, (int, float)) and not isinstance(threshold, bool):
        if math.isnan(threshold):
            raise ValueError("threshold: expected a number, got nan")
        value = torch.full((), threshold, dtype=dtype, device=scores.device)
        return value, torch.full((), scores.numel(), dtype=torch.int64, device=scores.device)
    if not isinstance(threshold, KeepThreshold):
        raise TypeError(
            f"threshold: expected a KeepThreshold, a PackedMask or a number, got {type(threshold).__name__}"
        )
    check_device("threshold", threshold.value, scores, "scores")
    return threshold.value.to(dtype), threshold.tie_index


# Kernels through torch, for what no native library serves.


def _pack(scores: Tensor, value: Tensor, tie_index: Tensor) -> Tensor:
    mask = threshold_mask(scores, value, tie_index).flatten().to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=scores.device)
    return (F.pad(mask, (0, -mask.numel() % 8)).view(-1, 8) << places).sum(1, dtype=torch.uint8)


def _pack_fake(scores, value, tie_index):
    return scores.new_empty((scores.numel() + 7) // 8, dtype=torch.uint8)


def _masked_weight(weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor, dtype: torch.dtype) -> Tensor:
    # where, not a product: a pruned entry is +0.0 whatever the sign (or NaN) of its weight.
    return torch.where(threshold_mask(scores, value, tie_index), weight.to(dtype), 0.0)


def _masked_weight_fake(weight, scores, value, tie_index, dtype):
    return weight.new_empty(weight.shape, dtype=dtype)


def _packed_weight(weight: Tensor, bits: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    mask = expand_blocks(PackedMask(bits, (rows, cols)).unpack(), weight)
    return torch.where(mask, weight.to(dtype), 0.0)


def _packed_weight_fake(weight, bits, rows, cols, dtype):
    return weight.new_empty(weight.shape, dtype=dtype)


def _grads(
    grad_weight: Tensor, weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor
) -> tuple[Tensor, Tensor]:
    d_weight = _masked_weight(grad_weight, scores, value, tie_index, weight.dtype)
    return d_weight, _scores_grad(grad_weight, weight, *scores.shape, scores.dtype)


def _grads_fake(grad_weight, weight, scores, value, tie_index):
    return weight.new_empty(weight.shape), scores.new_empty(scores.shape)


def _packed_grads(
    grad_weight: Tensor, weight: Tensor, bits: Tensor, rows: int, cols: int, scores_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    d_weight = _by_bits(grad_weight, bits, rows, cols, weight.dtype)
    return d_weight, _scores_grad(grad_weight, weight, rows, cols, scores_dtype)


def _packed_grads_fake(grad_weight, weight, bits, rows, cols, scores_dtype):
    return weight.new_empty(weight.shape), weight.new_empty((rows, cols), dtype=scores_dtype)


def _scores_grad(grad_weight: Tensor, weight: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    wide = torch.promote_types(torch.promote_types(weight.dtype, grad_weight.dtype), torch.float32)
    product = weight.to(wide) * grad_weight.to(wide)
    if (rows, cols) != weight.shape:
        product = product.reshape(rows, weight.shape[0] // rows, cols, weight.shape[1] // cols).sum((1, 3))
    return product.to(dtype)


# The operators, on top of those.


def _is_native(*dtypes: torch.dtype) -> bool:
    """Native kernels serve float64 only unmixed."""
    return torch.float64 not in dtypes or set(dtypes) == {torch.float64}


def _by_threshold(weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor, dtype: torch.dtype) -> Tensor:
    """weight * mask in ``dtype``."""
    if _is_native(weight.dtype, scores.dtype, dtype):
        return torch.ops.lpaf_kernels.masked_linear_weight(weight, scores, value, tie_index, dtype)
    return _masked_weight(weight, scores, value, tie_index, dtype)


def _by_bits(weight: Tensor, bits: Tensor, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """The same from bits."""
    if _is_native(weight.dtype, dtype):
        return torch.ops.lpaf_kernels.masked_linear_packed_weight(weight, bits, rows, cols, dtype)
    return _packed_weight(weight, bits, rows, cols, dtype)


def _linear(x: Tensor, masked: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, masked, None if bias is None else bias.to(x.dtype))


def _gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    needs: Sequence[bool],
    mask: Callable[[Tensor, torch.dtype], Tensor],
    both: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> Gradients:
    """From mask(tensor, dtype), which masks an [out, in] tensor, and both(G), the gradients of weight and scores.

    What is not needed is an empty tensor.
    """
    rows = grad.reshape(-1, weight.shape[0])
    d_x, d_weight, d_scores, d_bias = (grad.new_empty(0) for _ in range(4))
    if needs[0]:
        d_x = (rows @ mask(weight, x.dtype)).view(x.shape)
    if needs[1] or needs[2]:
        grad_weight = rows.t() @ x.reshape(-1, weight.shape[1])
        if needs[2]:
            d_weight, d_scores = both(grad_weight)
        else:
            d_weight = mask(grad_weight, weight.dtype)
    if needs[3]:
        d_bias = rows.sum(0)
    return d_x, d_weight, d_scores, d_bias


def _gradients_fake(grad, x, weight, scores_shape, scores_dtype, needs):
    d_weight = weight.new_empty(weight.shape) if needs[1] or needs[2] else grad.new_empty(0)
    return (
        x.new_empty(x.shape if needs[0] else 0),
        d_weight,
        weight.new_empty(scores_shape, dtype=scores_dtype) if needs[2] else grad.new_empty(0),
        grad.new_empty(weight.shape[0] if needs[3] else 0),
    )


def cast_forward(
    x: Tensor, weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor, bias: Tensor | None
) -> Tensor:
    """The mask is folded into the weight's cast, then torch multiplies."""
    return _linear(x, _by_threshold(weight, scores, value, tie_index, x.dtype), bias)


def _cuda_forward(*arguments) -> Tensor:
    """By the Triton kernels where the tables prefer them."""
    y = plans.cuda_forward(plans.Problem(*arguments))
    return cast_forward(*arguments) if y is None else y


def _masked_linear_fake(x, weight, scores, value, tie_index, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def cast_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor, needs: list[bool]
) -> Gradients:
    def mask(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return _by_threshold(tensor, scores, value, tie_index, dtype)

    def both(grad_weight: Tensor) -> tuple[Tensor, Tensor]:
        native = _is_native(grad_weight.dtype, weight.dtype, scores.dtype)
        function = torch.ops.lpaf_kernels.masked_linear_grads if native else _grads
        return function(grad_weight, weight, scores, value, tie_index)

    return _gradients(grad, x, weight, needs, mask, both)


def completed(
    found: tuple[Tensor | None, tuple[Tensor, Tensor] | None],
    grad: Tensor,
    problem: plans.Problem,
    needs: Sequence[bool],
) -> Gradients:
    """All needed gradients: (d x, (d weight, d scores)) as far as they were ``found``, the others by the cast."""
    d_x, both = found
    missing = [needs[0] and d_x is None, *(need and both is None for need in needs[1:3]), needs[3]]
    by_cast = cast_backward(grad, *problem[:5], missing)
    return by_cast[0] if d_x is None else d_x, *(by_cast[1:3] if both is None else both), by_cast[3]


def _cuda_backward(
    grad: Tensor, x: Tensor, weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor, needs: list[bool]
) -> Gradients:
    problem = plans.Problem(x, weight, scores, value, tie_index, None)
    return completed(plans.cuda_backward(problem, grad, needs), grad, problem, needs)


def _masked_linear_backward_fake(grad, x, weight, scores, value, tie_index, needs):
    return _gradients_fake(grad, x, weight, scores.shape, scores.dtype, needs)


def _packed(
    x: Tensor, weight: Tensor, scores: Tensor | None, bits: Tensor, rows: int, cols: int, bias: Tensor | None
) -> Tensor:
    return _linear(x, _by_bits(weight, bits, rows, cols, x.dtype), bias)


def _packed_fake(x, weight, scores, bits, rows, cols, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _packed_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bits: Tensor,
    rows: int,
    cols: int,
    scores_dtype: torch.dtype,
    needs: list[bool],
) -> Gradients:
    def mask(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return _by_bits(tensor, bits, rows, cols, dtype)

    def both(grad_weight: Tensor) -> tuple[Tensor, Tensor]:
        # On CUDA the sums over blocks are torch's.
        native = _is_native(grad_weight.dtype, weight.dtype, scores_dtype) and (
            not weight.is_cuda or (rows, cols) == weight.shape
        )
        function = torch.ops.lpaf_kernels.masked_linear_packed_grads if native else _packed_grads
        return function(grad_weight, weight, bits, rows, cols, scores_dtype)

    return _gradients(grad, x, weight, needs, mask, both)


def _packed_backward_fake(grad, x, weight, bits, rows, cols, scores_dtype, needs):
    return _gradients_fake(grad, x, weight, (rows, cols), scores_dtype, needs)


def _differentiate(backward: Callable, grad: Tensor, *arguments) -> list[Tensor | None]:
    """The gradients that the last argument says are needed, None of the others."""
    # A backward runs under whatever autocast surrounds it; these products take the forward's dtype.
    kind = grad.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():
        grads = backward(grad, *arguments)
    return [d if need else None for d, need in zip(grads, arguments[-1], strict=True)]


def _setup_context(ctx, inputs, output) -> None:
    x, weight, scores, value, tie_index, _ = inputs
    ctx.save_for_backward(x, weight, scores, value, tie_index)


def _backward(ctx, grad):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 5)]
    backward = torch.ops.lpaf_kernels.masked_linear_backward
    d_x, d_weight, d_scores, d_bias = _differentiate(backward, grad, *ctx.saved_tensors, needs)
    return d_x, d_weight, d_scores, None, None, d_bias


def _setup_packed_context(ctx, inputs, output) -> None:
    x, weight, scores, bits, rows, cols, _ = inputs
    ctx.save_for_backward(x, weight, bits)
    ctx.mask = rows, cols, weight.dtype if scores is None else scores.dtype


def _packed_backward_of(ctx, grad):
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 6)]
    backward = torch.ops.lpaf_kernels.masked_linear_packed_backward
    d_x, d_weight, d_scores, d_bias = _differentiate(backward, grad, *ctx.saved_tensors, *ctx.mask, needs)
    return d_x, d_weight, d_scores, None, None, None, d_bias


def _cast(dtype, x, *mask_and_bias):
    """Only x and the bias: the weight is cast with the mask; rounded scores would select other entries."""
    if x.dtype == torch.float64:
        return x, *mask_and_bias
    *mask, bias = mask_and_bias
    return x.to(dtype), *mask, None if bias is None else bias.to(dtype)


register_fallback("masked_linear", _cuda_forward, ("CUDA",))
register_fallback("masked_linear_backward", _cuda_backward, ("CUDA",))
for _name, _kernel, _fake in (
    ("masked_linear", cast_forward, _masked_linear_fake),
    ("masked_linear_backward", cast_backward, _masked_linear_backward_fake),
    ("masked_linear_weight", _masked_weight, _masked_weight_fake),
    ("masked_linear_grads", _grads, _grads_fake),
    ("masked_linear_pack", _pack, _pack_fake),
    ("masked_linear_packed", _packed, _packed_fake),
    ("masked_linear_packed_backward", _packed_backward, _packed_backward_fake),
    ("masked_linear_packed_weight", _packed_weight, _packed_weight_fake),
    ("masked_linear_packed_grads", _packed_grads, _packed_grads_fake),
):
    register_fallback(_name, _kernel)
    torch.library.register_fake(f"lpaf_kernels::{_name}", _fake, lib=library)
for _name, _derivative, _save in (
    ("masked_linear", _backward, _setup_context),
    ("masked_linear_packed", _packed_backward_of, _setup_packed_context),
):
    torch.library.register_autograd(f"lpaf_kernels::{_name}", _derivative, setup_context=_save, lib=library)
    register_autocast(_name, _cast)
