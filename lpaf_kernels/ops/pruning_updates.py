"""What a pruning step does to every matrix of a model, in place: one call, and one launch, for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import library, register_fallback, register_mutation
from ._checks import check_device, check_floating, check_fraction, check_shape
from .keep_threshold import KeepThreshold, threshold_mask


@torch.no_grad()
def accumulate_movement_(
    scores: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor], lr: float = 1.0
) -> None:
    """S <- S - lr * W * dL/dW for every matrix: movement scores (LPAF, Eq. 4) without an optimizer.

    Args:
        scores: list of [out, in], float32 (float64 with float64 weights); updated in place.
        weights: list of [out, in] of one dtype and device: float32, float16, bfloat16 or float64.
        grads: dL/dW, list of [out, in] in the dtype of ``weights``.
        lr: a finite number. Default: 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, a gradient that is
            None, or one tensor that stands for two matrices of ``scores``.
    """
    _check_weights(weights)
    _check_like("scores", scores, weights, _state_dtype(weights[0]))
    _check_like("grads", grads, weights, weights[0].dtype)
    _check_distinct(scores=scores)
    lr = _check_finite("lr", lr)
    torch.ops.lpaf_kernels.accumulate_movement(list(scores), list(weights), list(grads), lr)


@torch.no_grad()
def update_importance_(
    importance: Sequence[Tensor], weights: Sequence[Tensor], grads: Sequence[Tensor], beta: float = 0.85
) -> None:
    """I <- beta I + (1 - beta) mean over ``in`` of |W * dL/dW|: the importance of LoSparse's neurons (Eq. 3, 4).

    The paper averages |w * dL/dw| of each weight over the steps, and then over a neuron's weights. Both
    averages are linear, so the mean may as well come first: no state per weight is needed. A row without
    entries has mean 0.

    Args:
        importance: list of [out], float32 (float64 with float64 weights); updated in place. It starts at 0.
        weights: list of [out, in] of one dtype and device: float32, float16, bfloat16 or float64.
        grads: dL/dW of the same step, list of [out, in] in the dtype of ``weights``.
        beta: what the average keeps of its past, in [0, 1]. Default: 0.85.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, a gradient that is
            None, or one tensor that stands for two matrices of ``importance``.
    """
    _check_weights(weights)
    _check_like("importance", importance, weights, _state_dtype(weights[0]), rows=True)
    _check_like("grads", grads, weights, weights[0].dtype)
    _check_distinct(importance=importance)
    beta = check_fraction("beta", beta)
    torch.ops.lpaf_kernels.update_importance(list(importance), list(weights), list(grads), beta)


@torch.no_grad()
def update_sensitivity_(
    sensitivity: Sequence[Tensor],
    uncertainty: Sequence[Tensor],
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    beta1: float = 0.85,
    beta2: float = 0.95,
) -> list[Tensor]:
    """PLATON's importance (Zhang et al. 2022): with i = |W * dL/dW|, first the average I <- beta1 I + (1 - beta1) i,
    then, with that new I, U <- beta2 U + (1 - beta2) |i - I|; a weight scores I * U.

    I * U is not linear in i, so both averages are kept per weight. A row without entries has mean 0.

    Args:
        sensitivity: I, list of [out, in], float32 (float64 with float64 weights); updated in place. It starts at 0.
        uncertainty: U, as ``sensitivity``.
        weights: list of [out, in] of one dtype and device: float32, float16, bfloat16 or float64.
        grads: dL/dW of the same step, list of [out, in] in the dtype of ``weights``.
        beta1: what I keeps of its past, in [0, 1]. Default: 0.85.
        beta2: what U keeps of its past, in [0, 1]. Default: 0.95.

    Returns:
        list of [out] in the dtype of ``sensitivity``: the mean over ``in`` of I * U, a score per row.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, a gradient that is
            None, or one tensor that stands for two matrices of ``sensitivity`` and ``uncertainty``.
    """
    _check_weights(weights)
    _check_like("sensitivity", sensitivity, weights, _state_dtype(weights[0]))
    _check_like("uncertainty", uncertainty, weights, _state_dtype(weights[0]))
    _check_like("grads", grads, weights, weights[0].dtype)
    _check_distinct(sensitivity=sensitivity, uncertainty=uncertainty)
    beta1, beta2 = check_fraction("beta1", beta1), check_fraction("beta2", beta2)
    scores = torch.ops.lpaf_kernels.update_sensitivity(
        list(sensitivity), list(uncertainty), list(weights), list(grads), beta1, beta2
    )
    return list(scores.split([weight.shape[0] for weight in weights]))


@torch.no_grad()
def zero_pruned_(weights: Sequence[Tensor], thresholds: Sequence[KeepThreshold], scores: Sequence[Tensor]) -> None:
    """W <- where(threshold.mask(scores), W, 0) for every matrix: hard zeroing, without a host synchronisation.

    Args:
        weights: list of [out, in] of one dtype and device: float32, float16, bfloat16 or float64; updated in place.
        thresholds: one result of :func:`keep_threshold` per matrix.
        scores: list of [out, in] (one per entry) or [out] (one per row), float32 (float64 with float64 weights).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or one tensor that stands for
            two matrices of ``weights``.
    """
    _check_weights(weights)
    _check_scores(scores, weights)
    _check_thresholds(thresholds, weights)
    _check_distinct(weights=weights)
    values = [threshold.value.to(scores[0].dtype) for threshold in thresholds]
    tie_indices = [threshold.tie_index for threshold in thresholds]
    torch.ops.lpaf_kernels.zero_pruned(list(weights), list(scores), values, tie_indices)


@torch.no_grad()
def sparsity_statistics(weights: Sequence[Tensor]) -> Tensor:
    """Count what pruning left, without a host synchronisation. -0.0 is zero, NaN is not.

    Args:
        weights: list of [out, in] of one dtype and device: float32, float16, bfloat16 or float64.

    Returns:
        [len(weights), 3] int64: of every matrix the nonzero entries, the rows and the columns that hold one.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
    """
    _check_weights(weights)
    return torch.ops.lpaf_kernels.sparsity_statistics(list(weights))


def accumulate_movement_reference(score: Tensor, weight: Tensor, grad: Tensor, lr: float) -> Tensor:
    """The new scores of one matrix in plain torch."""
    return score - lr * (weight.to(score.dtype) * grad.to(score.dtype))


def update_importance_reference(importance: Tensor, weight: Tensor, grad: Tensor, beta: float) -> Tensor:
    """The new importance of one matrix in plain torch."""
    change = (weight.to(importance.dtype) * grad.to(importance.dtype)).abs()
    return beta * importance + (1 - beta) * _row_means(change)


def update_sensitivity_reference(
    sensitivity: Tensor, uncertainty: Tensor, weight: Tensor, grad: Tensor, beta1: float, beta2: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The new sensitivity and uncertainty of one matrix and its row scores in plain torch."""
    change = (weight.to(sensitivity.dtype) * grad.to(sensitivity.dtype)).abs()
    sensitivity = beta1 * sensitivity + (1 - beta1) * change
    uncertainty = beta2 * uncertainty + (1 - beta2) * (change - sensitivity).abs()
    return sensitivity, uncertainty, _row_means(sensitivity * uncertainty)


def zero_pruned_reference(weight: Tensor, scores: Tensor, value: Tensor, tie_index: Tensor) -> Tensor:
    """The new weights of one matrix in plain torch."""
    mask = threshold_mask(scores, value, tie_index)
    return torch.where(mask if scores.dim() == 2 else mask[:, None], weight, 0.0)


def sparsity_statistics_reference(weight: Tensor) -> Tensor:
    """[3] int64 of one matrix in plain torch."""
    nonzero = weight != 0
    return torch.stack([nonzero.sum(), nonzero.any(1).sum(), nonzero.any(0).sum()])


def _row_means(terms: Tensor) -> Tensor:
    return terms.sum(1) / max(terms.shape[1], 1)


def _state_dtype(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _check_list(name: str, value: Sequence[Tensor]) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list of tensors, got {type(value).__name__}")


def _check_weights(weights: Sequence[Tensor]) -> None:
    _check_list("weights", weights)
    if len(weights) == 0:
        raise ValueError("weights: expected at least one tensor, got an empty sequence")
    for i, weight in enumerate(weights):
        name = f"weights[{i}]"
        check_floating(name, weight)
        if weight.dim() != 2:
            raise ValueError(f"{name}: expected shape [out, in], got {list(weight.shape)}")
        if weight.dtype != weights[0].dtype:
            raise TypeError(f"{name}: expected {weights[0].dtype} (that of weights[0]), got {weight.dtype}")
        check_device(name, weight, weights[0], "weights[0]")


def _check_length(name: str, value: Sequence, weights: Sequence[Tensor]) -> None:
    _check_list(name, value)
    if len(value) != len(weights):
        raise ValueError(f"{name}: expected {len(weights)} tensors (one per matrix of weights), got {len(value)}")


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, i: int, weights: Sequence[Tensor]) -> None:
    check_floating(name, tensor)
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype} (weights[{i}] is {weights[i].dtype}), got {tensor.dtype}")
    check_device(name, tensor, weights[i], f"weights[{i}]")


def _check_like(
    name: str, tensors: Sequence[Tensor], weights: Sequence[Tensor], dtype: torch.dtype, rows: bool = False
) -> None:
    """Raise unless ``tensors`` has one tensor per matrix, of its shape or, with ``rows``, one entry per row."""
    _check_length(name, tensors, weights)
    for i, (tensor, weight) in enumerate(zip(tensors, weights)):
        _check_tensor(f"{name}[{i}]", tensor, dtype, i, weights)
        if rows:
            check_shape(f"{name}[{i}]", tensor, weight.shape[0], because=f"the rows of weights[{i}]")
        else:
            check_shape(f"{name}[{i}]", tensor, *weight.shape, because=f"that of weights[{i}]")


def _check_scores(scores: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    _check_length("scores", scores, weights)
    for i, (score, weight) in enumerate(zip(scores, weights)):
        _check_tensor(f"scores[{i}]", score, _state_dtype(weight), i, weights)
        if score.shape not in (weight.shape, weight.shape[:1]):
            raise ValueError(
                f"scores[{i}]: expected shape {list(weight.shape)} or {list(weight.shape[:1])}"
                f" (the entries or the rows of weights[{i}]), got {list(score.shape)}"
            )


def _check_thresholds(thresholds: Sequence[KeepThreshold], weights: Sequence[Tensor]) -> None:
    _check_length("thresholds", thresholds, weights)
    for i, threshold in enumerate(thresholds):
        if not isinstance(threshold, KeepThreshold):
            raise TypeError(f"thresholds[{i}]: expected a KeepThreshold, got {type(threshold).__name__}")
        check_device(f"thresholds[{i}]", threshold.value, weights[i], f"weights[{i}]")


def _check_distinct(**lists: Sequence[Tensor]) -> None:
    """Raise where one tensor would be updated twice at once. The compiler's tracer has no identities."""
    if torch.compiler.is_compiling():
        return
    names: dict[int, str] = {}
    for name, tensors in lists.items():
        for i, tensor in enumerate(tensors):
            other = names.setdefault(id(tensor), f"{name}[{i}]")
            if other != f"{name}[{i}]":
                raise ValueError(f"{name}[{i}]: expected a tensor of its own, got that of {other}")


def _check_finite(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _accumulate_movement(scores: list[Tensor], weights: list[Tensor], grads: list[Tensor], lr: float) -> None:
    for score, weight, grad in zip(scores, weights, grads):
        score.copy_(accumulate_movement_reference(score, weight, grad, lr))


def _update_importance(importance: list[Tensor], weights: list[Tensor], grads: list[Tensor], beta: float) -> None:
    for rows, weight, grad in zip(importance, weights, grads):
        rows.copy_(update_importance_reference(rows, weight, grad, beta))


def _update_sensitivity(
    sensitivity: list[Tensor],
    uncertainty: list[Tensor],
    weights: list[Tensor],
    grads: list[Tensor],
    beta1: float,
    beta2: float,
) -> Tensor:
    scores = []
    for i, u, weight, grad in zip(sensitivity, uncertainty, weights, grads):
        new_i, new_u, rows = update_sensitivity_reference(i, u, weight, grad, beta1, beta2)
        i.copy_(new_i)
        u.copy_(new_u)
        scores.append(rows)
    return torch.cat(scores)


def _zero_pruned(weights: list[Tensor], scores: list[Tensor], values: list[Tensor], tie_indices: list[Tensor]) -> None:
    for weight, score, value, tie_index in zip(weights, scores, values, tie_indices):
        weight.copy_(zero_pruned_reference(weight, score, value, tie_index))


def _sparsity_statistics(weights: list[Tensor]) -> Tensor:
    return torch.stack([sparsity_statistics_reference(weight) for weight in weights])


def _changes_only(*arguments) -> None:
    """The fake of an operator that returns nothing."""


def _update_sensitivity_fake(sensitivity, uncertainty, weights, grads, beta1, beta2):
    return sensitivity[0].new_empty(sum(weight.shape[0] for weight in weights))


def _sparsity_statistics_fake(weights):
    return weights[0].new_empty(len(weights), 3, dtype=torch.int64)


for _name, _kernel, _fake, _mutated in (
    ("accumulate_movement", _accumulate_movement, _changes_only, 1),
    ("update_importance", _update_importance, _changes_only, 1),
    ("update_sensitivity", _update_sensitivity, _update_sensitivity_fake, 2),
    ("zero_pruned", _zero_pruned, _changes_only, 1),
    ("sparsity_statistics", _sparsity_statistics, _sparsity_statistics_fake, 0),
):
    register_fallback(_name, _kernel)
    torch.library.register_fake(f"lpaf_kernels::{_name}", _fake, lib=library)
    if _mutated:
        register_mutation(_name, _mutated)
