"""The best rank-k product of a matrix under row weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import library, register_fallback
from ._checks import check_device, check_floating, check_shape

#: Row weights below this share of the largest are raised to it, so that weightless rows still choose among
#: the directions that the others leave free.
ROW_WEIGHT_FLOOR = 1e-6


def weighted_svd(
    weights: Tensor | Sequence[Tensor], rank: int, row_weights: Tensor | Sequence[Tensor] | None = None
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """The A [n, k], B [k, m] that minimise ||D (W - A B)||_F with D = diag(row_weights): LPAF's
    sparsity-aware SVD.

    With D W = U S V^T truncated to k: A = D^-1 U S = W V and B = V^T. Rows of B are orthonormal, by falling
    singular value, and signed so that the entry of largest magnitude is positive. V comes from the
    eigenvectors of the Gram matrix on the short side, in float64: with err* the optimum, err - err* <= 1e-4
    err* + 10 eps_float32 ||D W||_F. A zero row of W gives an exactly zero row of A.

    Args:
        weights: W [n, m], a batch [..., n, m], or a list of [n, m] (equal shapes are solved as one batch);
            float32, float16, bfloat16 or float64.
        rank: k in 1..min(n, m).
        row_weights: d >= 0, shape [..., n], or a list of [n]. Raised to at least ``ROW_WEIGHT_FLOOR`` times
            the matrix's largest; all zero counts as all one. Default: all one.

    Returns:
        (A, B) of the dtype of ``weights``, or two lists. Differentiable where the leading k singular values
        are separated from the rest.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; non-finite
            values.
    """
    if isinstance(weights, Tensor):
        _check("weights", weights, rank, "row_weights", row_weights)
        return tuple(torch.ops.lpaf_kernels.weighted_svd(weights, rank, row_weights))
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights: expected a tensor or a list of tensors, got {type(weights).__name__}")
    if len(weights) == 0:
        raise ValueError("weights: expected at least one matrix, got an empty sequence")
    if row_weights is not None and (isinstance(row_weights, Tensor) or len(row_weights) != len(weights)):
        raise ValueError(f"row_weights: expected a list of {len(weights)} vectors (one per matrix)")
    groups: dict[tuple, list[int]] = {}
    for i, weight in enumerate(weights):
        _check(
            f"weights[{i}]",
            weight,
            rank,
            f"row_weights[{i}]",
            None if row_weights is None else row_weights[i],
        )
        if weight.dim() != 2:
            raise ValueError(f"weights[{i}]: expected shape [n, m], got {list(weight.shape)}")
        groups.setdefault((weight.shape, weight.dtype, weight.device), []).append(i)
    a: list = [None] * len(weights)
    b: list = [None] * len(weights)
    for members in groups.values():
        batch = torch.stack([weights[i] for i in members])
        rows = None if row_weights is None else torch.stack([row_weights[i] for i in members])
        batch_a, batch_b = torch.ops.lpaf_kernels.weighted_svd(batch, rank, rows)
        for j, i in enumerate(members):
            a[i], b[i] = batch_a[j], batch_b[j]
    return a, b


def weighted_svd_reference(weight: Tensor, rank: int, row_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same through LAPACK's SVD of D W in float64; the public truth (signs of the factors may differ)."""
    d = _floored(weight, row_weights)
    u, s, vh = torch.linalg.svd(d * weight.double(), full_matrices=False)
    a = (u[..., :rank] * s[..., None, :rank]) / d
    return a, vh[..., :rank, :]


def _check(name: str, weight: Tensor, rank: int, rows_name: str, rows: Tensor | None) -> None:
    check_floating(name, weight)
    if weight.dim() < 2:
        raise ValueError(f"{name}: expected shape [..., n, m], got {list(weight.shape)}")
    if isinstance(rank, bool) or not isinstance(rank, (int, torch.SymInt)):
        raise TypeError(f"rank: expected an integer, got {rank!r}")
    shape = list(weight.shape)
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(f"rank: expected 1 to {min(shape[-2:])} for {name} of shape {shape}, got {rank}")
    if rows is not None:
        check_floating(rows_name, rows)
        check_shape(rows_name, rows, *weight.shape[:-1], because=f"the rows of {name}")
        check_device(rows_name, rows, weight, name)


def _floored(weight: Tensor, row_weights: Tensor | None) -> Tensor:
    """The row weights as a float64 column [..., n, 1], floored."""
    if row_weights is None:
        return weight.new_ones((*weight.shape[:-1], 1), dtype=torch.float64)
    d = row_weights.double().unsqueeze(-1)
    largest = d.amax(-2, keepdim=True)
    return torch.where(largest > 0, torch.maximum(d, ROW_WEIGHT_FLOOR * largest), 1.0)


def _weighted_svd(weight: Tensor, rank: int, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    if not weight.isfinite().all():
        raise ValueError("weights: expected finite values, got NaN or infinity")
    if row_weights is not None and not (row_weights.isfinite() & (row_weights >= 0)).all():
        raise ValueError("row_weights: expected finite values >= 0, got negative or non-finite ones")
    n, m = weight.shape[-2:]
    w = weight.double()
    dw = w * _floored(weight, row_weights)
    # Scaled to 1 so that squares neither overflow nor vanish.
    largest = dw.abs().amax((-2, -1), keepdim=True)
    dw = dw / torch.where(largest > 0, largest, 1.0)
    if m <= n:
        v = torch.linalg.eigh(dw.mT @ dw).eigenvectors.flip(-1)[..., :rank]
    else:
        u = torch.linalg.eigh(dw @ dw.mT).eigenvectors.flip(-1)[..., :rank]
        # (D W)^T U = V S has orthogonal columns; QR normalises them, and completes the basis where S is zero.
        v = torch.linalg.qr(dw.mT @ u).Q
    peak = v.gather(-2, v.abs().argmax(-2, keepdim=True))
    v = v * torch.where(peak < 0, -1.0, 1.0)
    return (w @ v).to(weight.dtype), v.mT.to(weight.dtype).contiguous()


def _weighted_svd_fake(weight, rank, row_weights):
    *batch, n, m = weight.shape
    return weight.new_empty((*batch, n, rank)), weight.new_empty((*batch, rank, m))


def _setup_context(ctx, inputs, output) -> None:
    weight, _, row_weights = inputs
    ctx.save_for_backward(weight, row_weights, output[1])


def _backward(ctx, grad_a, grad_b):
    """Through A = W V, B = V^T and dv_j = sum_i v_i (v_i^T dG v_j) / (lambda_j - lambda_i) with G = W^T D^2
    W.

    Pairs of equal eigenvalues contribute nothing: exact for every function of the product A B as long as the
    k-th and the next singular value differ.
    """
    weight, row_weights, b = ctx.saved_tensors
    w, kept = weight.double(), b.double().mT
    d = _floored(weight, row_weights)
    gram = (d * w).mT @ (d * w)
    eigenvalues, basis = torch.linalg.eigh(gram)
    kept_values = (kept * (gram @ kept)).sum(-2)
    gaps = kept_values.unsqueeze(-2) - eigenvalues.unsqueeze(-1)
    noise = 8 * w.shape[-1] * torch.finfo(torch.float64).eps * eigenvalues[..., -1, None, None]
    inverse_gaps = torch.where(gaps.abs() > noise, 1.0 / gaps, 0.0)
    grad_v = grad_b.double().mT + w.mT @ grad_a.double()
    half = basis @ (inverse_gaps * (basis.mT @ grad_v)) @ kept.mT
    grad_gram = half + half.mT
    wg = w @ grad_gram
    d_weight = (d.square() * wg + grad_a.double() @ kept.mT).to(weight.dtype)
    if row_weights is None:
        return d_weight, None, None
    d_rows = torch.where(row_weights.double() == d.squeeze(-1), d.squeeze(-1) * (wg * w).sum(-1), 0.0)
    return d_weight, None, d_rows.to(row_weights.dtype)


register_fallback("weighted_svd", _weighted_svd)
torch.library.register_fake("lpaf_kernels::weighted_svd", _weighted_svd_fake, lib=library)
torch.library.register_autograd("lpaf_kernels::weighted_svd", _backward, setup_context=_setup_context, lib=library)
