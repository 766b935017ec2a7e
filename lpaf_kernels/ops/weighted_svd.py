"""The best rank-k product of a matrix under row weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from .._library import library, register_fallback
from ._checks import check_device, check_floating, check_shape

#: Row weights below this share of the largest are raised to it, so that weightless rows still choose among
#: the directions that the others leave free.
ROW_WEIGHT_FLOOR = 1e-6
#: What a float32 solution may lose of the squared error, a tenth of what (1e-4 err) allows; and the least share of
#: ||D W||_F^2 that must be left over for float32 to tell the directions apart.
EXCESS = 2e-5
LEAST_ERROR = 1e-4


def weighted_svd(
    weights: Tensor | Sequence[Tensor],
    rank: int | Sequence[int],
    row_weights: Tensor | Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """The A [n, k], B [k, m] that minimise ||D (W - A B)||_F with D = diag(row_weights): LPAF's
    sparsity-aware SVD.

    With D W = U S V^T truncated to k: A = D^-1 U S = W V and B = V^T. Rows of B are orthonormal, by falling
    singular value, and signed so that the entry of largest magnitude is positive. V comes from the
    eigenvectors of the Gram matrix on the short side: in float32 first, again in float64 where the residual of
    the eigenvectors cannot exclude that float32 lost something (and for float64 weights). With err* the
    optimum, err - err* <= 1e-4 err* + 10 eps_float32 ||D W||_F. A zero row of W gives an exactly zero row of A.

    On the CPU the matrices of a list or batch are shared out among torch's threads, one matrix per thread, and
    torch's number of threads is 1 for the whole process meanwhile; on other devices those of one shape and rank
    are solved as a batch (and the residual check waits for them).

    Args:
        weights: W [n, m], a batch [..., n, m], or a list of [n, m]; float32, float16, bfloat16 or float64.
        rank: k in 1..min(n, m); for a list of matrices also one k per matrix.
        row_weights: d >= 0, shape [..., n], or a list with one [n] (or None) per matrix. Raised to at least
            ``ROW_WEIGHT_FLOOR`` times the matrix's largest; all zero counts as all one. Default: all one.

    Returns:
        (A, B) of the dtype of ``weights``, or two lists. Differentiable where the leading k singular values
        are separated from the rest.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; non-finite
            values.
    """
    if isinstance(weights, Tensor):
        _check("weights", weights, "row_weights", row_weights)
        _check_rank("rank", rank, "weights", weights)
        return tuple(torch.ops.lpaf_kernels.weighted_svd(weights, rank, row_weights))
    rows = _check_list(weights, row_weights)
    ranks = list(rank) if isinstance(rank, (list, tuple)) else [rank] * len(weights)
    if len(ranks) != len(weights):
        raise ValueError(f"rank: expected {len(weights)} ranks (one per matrix), got {len(ranks)}")
    for i, (weight, k) in enumerate(zip(weights, ranks, strict=True)):
        name = f"rank[{i}]" if isinstance(rank, (list, tuple)) else "rank"
        _check_rank(name, k, f"weights[{i}]", weight)
    operator = torch.ops.lpaf_kernels.weighted_svd
    if not torch.compiler.is_compiling() and all(weight.device.type == "cpu" for weight in weights):
        with _full_precision(weights[0].device):  # here, because the setting is the process's, not a thread's
            factors = _on_all_threads(operator, weights, ranks, rows)
        return [a for a, _ in factors], [b for _, b in factors]
    a: list = [None] * len(weights)
    b: list = [None] * len(weights)
    for members in _alike(weights, ranks, rows):
        first = members[0]
        batch_a, batch_b = operator(_stack(weights, members), ranks[first], _stack(rows, members))
        for j, i in enumerate(members):
            a[i], b[i] = batch_a[j], batch_b[j]
    return a, b


@torch.no_grad()
def weighted_singular_values(
    weights: Tensor | Sequence[Tensor], row_weights: Tensor | Sequence[Tensor | None] | None = None
) -> Tensor | list[Tensor]:
    """The singular values of D W, falling: what :func:`weighted_svd` leaves over at rank k is the root of the sum of
    the squares from the k-th (from 0) on.

    From the eigenvalues of the Gram matrix in float64: accurate to about 1e-8 of the largest. Not differentiated.
    Lists use threads as :func:`weighted_svd` does.

    Args:
        weights, row_weights: as for :func:`weighted_svd`.

    Returns:
        float64 [..., min(n, m)], or a list of them.

    Raises:
        TypeError, ValueError: as :func:`weighted_svd`.
    """
    if isinstance(weights, Tensor):
        _check("weights", weights, "row_weights", row_weights)
        return _singular_values(weights, row_weights)
    rows = _check_list(weights, row_weights)
    if all(weight.device.type == "cpu" for weight in weights):
        return _on_all_threads(_singular_values, weights, rows)
    values: list = [None] * len(weights)
    for members in _alike(weights, [0] * len(weights), rows):
        batch = _singular_values(_stack(weights, members), _stack(rows, members))
        for j, i in enumerate(members):
            values[i] = batch[j]
    return values


def weighted_svd_reference(weight: Tensor, rank: int, row_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same through LAPACK's SVD of D W in float64; the public truth (signs of the factors may differ)."""
    d = weight.new_ones(1, dtype=torch.float64) if row_weights is None else _floored(row_weights)
    u, s, vh = torch.linalg.svd(d * weight.double(), full_matrices=False)
    a = (u[..., :rank] * s[..., None, :rank]) / d
    return a, vh[..., :rank, :]


def _check(name: str, weight: Tensor, rows_name: str, rows: Tensor | None) -> None:
    check_floating(name, weight)
    if weight.dim() < 2:
        raise ValueError(f"{name}: expected shape [..., n, m], got {list(weight.shape)}")
    if rows is not None:
        check_floating(rows_name, rows)
        check_shape(rows_name, rows, *weight.shape[:-1], because=f"the rows of {name}")
        check_device(rows_name, rows, weight, name)


def _check_rank(name: str, rank: int, weight_name: str, weight: Tensor) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an integer, got {rank!r}")
    shape = list(weight.shape)
    if not 1 <= rank <= min(shape[-2:]):
        raise ValueError(f"{name}: expected 1 to {min(shape[-2:])} for {weight_name} of shape {shape}, got {rank}")


def _check_list(
    weights: Sequence[Tensor], row_weights: Tensor | Sequence[Tensor | None] | None
) -> Sequence[Tensor | None]:
    """The row weights as a list."""
    if not isinstance(weights, (list, tuple)):
        raise TypeError(f"weights: expected a tensor or a list of tensors, got {type(weights).__name__}")
    if len(weights) == 0:
        raise ValueError("weights: expected at least one matrix, got an empty sequence")
    if row_weights is not None and (isinstance(row_weights, Tensor) or len(row_weights) != len(weights)):
        raise ValueError(f"row_weights: expected a list of {len(weights)} vectors (one per matrix)")
    rows = [None] * len(weights) if row_weights is None else row_weights
    for i, weight in enumerate(weights):
        _check(f"weights[{i}]", weight, f"row_weights[{i}]", rows[i])
        if weight.dim() != 2:
            raise ValueError(f"weights[{i}]: expected shape [n, m], got {list(weight.shape)}")
    return rows


def _alike(weights: Sequence[Tensor], ranks: Sequence[int], rows: Sequence[Tensor | None]) -> Iterator[list[int]]:
    """Positions of the matrices that one batch can solve."""
    groups: dict[tuple, list[int]] = {}
    for i, (weight, rank, row) in enumerate(zip(weights, ranks, rows, strict=True)):
        kind = None if row is None else row.dtype
        groups.setdefault((weight.shape, weight.dtype, weight.device, rank, kind), []).append(i)
    yield from groups.values()


def _stack(tensors: Sequence[Tensor | None], members: list[int]) -> Tensor | None:
    return None if tensors[members[0]] is None else torch.stack([tensors[i] for i in members])


def _on_all_threads(function: Callable, *arguments: Sequence) -> list:
    """``function`` of every matrix: one matrix per thread beats all threads on one matrix.

    torch's number of threads is 1 meanwhile.
    """
    threads = min(torch.get_num_threads(), len(arguments[0]))
    if threads <= 1:
        return list(map(function, *arguments))
    gradients = torch.is_grad_enabled()

    def alone(*problem):
        with torch.set_grad_enabled(gradients):  # a thread's own setting
            return function(*problem)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(alone, *arguments))
    finally:
        torch.set_num_threads(before)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """float32 products as such: no autocast, no TF32 or bfloat16 in their place."""
    before = torch.get_float32_matmul_precision()
    try:
        if before != "highest":
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if before != "highest":
            torch.set_float32_matmul_precision(before)


def _floored(row_weights: Tensor | None) -> Tensor | None:
    """The row weights as a float64 column [..., n, 1], floored."""
    if row_weights is None:
        return None
    d = row_weights.double().unsqueeze(-1)
    largest = d.amax(-2, keepdim=True)
    return torch.where(largest > 0, torch.maximum(d, ROW_WEIGHT_FLOOR * largest), 1.0)


def _check_rows(row_weights: Tensor | None) -> None:
    if row_weights is not None and not (row_weights.isfinite() & (row_weights >= 0)).all():
        raise ValueError("row_weights: expected finite values >= 0, got negative or non-finite ones")


def _gram(x: Tensor, halvings: int = 2) -> Tensor:
    """x^T x [..., m, m] of x [..., n, m]; what lies below the diagonal blocks is copied from above, not computed."""
    m = x.shape[-1]
    if halvings == 0 or m < 256:
        return x.mT @ x
    half = m // 2
    left, right = x[..., :half], x[..., half:]
    gram = x.new_empty(*x.shape[:-2], m, m)
    gram[..., :half, :half] = _gram(left, halvings - 1)
    gram[..., half:, half:] = _gram(right, halvings - 1)
    gram[..., :half, half:] = left.mT @ right
    gram[..., half:, :half] = gram[..., :half, half:].mT
    return gram


def _scaled(weight: Tensor, d: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """D W at a scale where squares neither overflow nor vanish, and what it was divided by."""
    dw = weight.to(dtype) if d is None else weight.double() * d
    if dw.numel() == 0:
        return dw.to(dtype), dw.new_ones(1)
    largest = torch.maximum(dw.amax((-2, -1), keepdim=True), -dw.amin((-2, -1), keepdim=True))
    if not largest.isfinite().all():  # a maximum is as finite as its entries are
        raise ValueError("weights: expected finite values, got NaN or infinity")
    if ((largest > 1e-4) & (largest < 1e4)).all():
        return dw.to(dtype), torch.ones_like(largest)
    largest = torch.where(largest > 0, largest, 1.0)
    return (dw / largest).to(dtype), largest


def _singular_values(weight: Tensor, row_weights: Tensor | None) -> Tensor:
    _check_rows(row_weights)
    dw, largest = _scaled(weight, _floored(row_weights), torch.float64)
    squares = torch.linalg.eigvalsh(_gram(dw if weight.shape[-1] <= weight.shape[-2] else dw.mT))
    return squares.flip(-1).clamp(min=0.0).sqrt() * largest.squeeze(-1)


def _weighted_svd(weight: Tensor, rank: int, row_weights: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_rows(row_weights)
    batch, (n, m) = weight.shape[:-2], weight.shape[-2:]
    # Detached: the operator stands below autograd, but the threads it starts do not.
    matrices = weight.detach().reshape(batch.numel(), n, m)
    d = _floored(None if row_weights is None else row_weights.detach().reshape(batch.numel(), n))
    with _full_precision(weight.device):
        if weight.device.type == "cpu" and batch.numel() > 1:
            columns = [None] * len(matrices) if d is None else d.split(1)
            pairs = _on_all_threads(_factors, matrices.split(1), [rank] * len(matrices), columns)
            a, b = (torch.cat(factors) for factors in zip(*pairs, strict=True))
        else:
            a, b = _factors(matrices, rank, d)
    return a.view(*batch, n, rank), b.view(*batch, rank, m)


def _factors(weight: Tensor, rank: int, d: Tensor | None) -> tuple[Tensor, Tensor]:
    """A [batch, n, rank] and B [batch, rank, m] of one batch under the row weights ``d`` [batch, n, 1]."""
    exact = weight.dtype == torch.float64
    dw, largest = _scaled(weight, d, torch.float64 if exact else torch.float32)
    v, projected, trusted = _leading(dw, rank)
    if not exact and not trusted.all():
        again = (~trusted).nonzero().squeeze(-1)
        exact_dw, _ = _scaled(weight[again], None if d is None else d[again], torch.float64)
        exact_v, exact_projected, _ = _leading(exact_dw, rank)
        v = v.double().index_copy(0, again, exact_v)
        projected = projected.double().index_copy(0, again, exact_projected)
    peak = v.gather(-2, v.abs().argmax(-2, keepdim=True))
    sign = torch.where(peak < 0, -1.0, 1.0).to(v.dtype)
    a = projected * (largest if d is None else largest / d) * sign
    return a.to(weight.dtype), (v * sign).mT.to(weight.dtype).contiguous()


def _leading(dw: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading right singular vectors V [batch, m, rank] of ``dw``, ``dw`` V, and for which of the batch they are as
    good as float64's."""
    n, m = dw.shape[-2:]
    gram = _gram(dw if m <= n else dw.mT)
    values, vectors = torch.linalg.eigh(gram)
    basis = vectors[..., -rank:].flip(-1)
    exact = dw.dtype == torch.float64
    v = basis if m <= n else _orthonormal(dw.mT @ basis, complete=exact)
    projected = dw @ v
    if exact or rank == min(n, m):  # nothing may be left over of full rank: beyond float32
        return v, projected, torch.full(dw.shape[:-2], exact, device=dw.device)
    total, captured = (
        torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64).square() for matrix in (dw, projected)
    )
    left = total - captured
    gain = _possible_gain(gram, basis, values[..., -rank - 1], total)
    return v, projected, (left > LEAST_ERROR * total) & (gain <= EXCESS * left)


def _orthonormal(y: Tensor, complete: bool) -> Tensor:
    """An orthonormal basis of the columns of ``y``, which are orthogonal but for rounding. Where some are zero, QR
    completes the basis, and the quicker Cholesky factor gives NaN."""
    if complete:
        return torch.linalg.qr(y).Q
    y = y / torch.linalg.vector_norm(y, dim=-2, keepdim=True)
    factor = torch.linalg.cholesky_ex(y.mT @ y, upper=True).L
    return torch.linalg.solve_triangular(factor, y, upper=True, left=False)


def _possible_gain(gram: Tensor, basis: Tensor, next_value: Tensor, total: Tensor) -> Tensor:
    """By how much the captured part of ``total`` = ||D W||_F^2 could still rise.

    With G the Gram matrix, Q the basis, H = Q^T G Q and R = G Q - Q H, each column j of Q can gain at most
    ||r_j||^2 / max(h_jj - lambda, ||r_j||) by turning towards the rest, whose largest eigenvalue is lambda
    (perturbation of an invariant subspace; Parlett, The Symmetric Eigenvalue Problem, 11.7). To ||r_j|| comes what
    forming G in float32 may have lost.
    """
    product = gram @ basis
    small = basis.mT @ product
    residual = torch.linalg.vector_norm(product - basis @ small, dim=-2, dtype=torch.float64)
    residual = residual + torch.finfo(torch.float32).eps * total.unsqueeze(-1)
    gap = small.diagonal(dim1=-2, dim2=-1).double() - next_value.double().unsqueeze(-1)
    return (residual.square() / torch.maximum(gap, residual).clamp(min=torch.finfo(torch.float64).tiny)).sum(-1)


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
    d = w.new_ones(1) if row_weights is None else _floored(row_weights)
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
