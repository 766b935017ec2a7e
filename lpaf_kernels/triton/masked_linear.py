"""Kernels of masked_linear with one score per weight: products with W * mask, and the gradients of W and the scores.

`_masked_product` applies the mask while a tile of the weight is loaded and cast: W * mask is never written, and made
anew for every tile of rows. `_masked_grads` keeps G = dy^T x in registers and ends by writing d W = mask * G and
d scores = W * G: G is never written either. The selection stays in device memory, nothing waits for it, and every sum
has one fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, start
from .lowrank_sparse_linear import _cast, _common, _finish, _load, _mma


class Selection(NamedTuple):
    """scores [out, in], and the value and tie_index (0-d) that they are compared with."""

    scores: Tensor
    value: Tensor
    tie_index: Tensor


@triton.jit
def _tied_columns(tie_index_ptr, row, width):
    """The columns of each row that come before tie_index: where a score equal to the value is kept."""
    before = tl.load(tie_index_ptr) - row.to(tl.int64) * width
    return tl.minimum(tl.maximum(before, 0), width).to(tl.int32)


@triton.jit
def _kept(scores_ptr, value_ptr, offsets, inside, column, tied):
    """A tile of the mask; a NaN keeps nothing."""
    score = _load(scores_ptr + offsets, inside).to(tl.float32)
    value = tl.load(value_ptr)
    return (score > value) | ((score == value) & (column < tied))


@triton.jit
def _masked_tile(
    weight_ptr, scores_ptr, value_ptr, row, column, width, tied, inside, DTYPE: tl.constexpr, UPCAST: tl.constexpr
):
    """W * mask at rows and columns that span a tile, in either order, as DTYPE; pruned entries are 0."""
    offsets = row.to(tl.int64) * width + column
    weight = _cast(_load(weight_ptr + offsets, inside).to(tl.float32), DTYPE, UPCAST)
    kept = _kept(scores_ptr, value_ptr, offsets, inside, column, tied)
    return tl.where(kept, weight, tl.zeros_like(weight))


@triton.jit
def _masked_product(
    a_ptr, weight_ptr, scores_ptr, value_ptr, tie_index_ptr, bias_ptr, y_ptr, rows, depth, cols, a_stride,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y = a (W * mask) for W [depth, cols], or y = a (W * mask)^T + bias for W [cols, depth] if TRANSPOSED.

    Program axis 0: row tiles times column tiles, the row tile slowest, so that neighbours share a; W stays in L2.
    """
    tiles = tl.cdiv(cols, BLOCK_N)
    m = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    a_rows = tl.minimum(m, rows - 1).to(tl.int64)[:, None] * a_stride
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TRANSPOSED:
        row = tl.minimum(n, cols - 1)  # rows beyond the last repeat it (never stored)
        tied = _tied_columns(tie_index_ptr, row, depth)[None, :]
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = _load(a_ptr + a_rows + k[None, :], None if EVEN_K else (k < depth)[None, :])
        if TRANSPOSED:
            inside = None if EVEN_K else (k < depth)[:, None]
            b = _masked_tile(
                weight_ptr, scores_ptr, value_ptr, row[None, :], k[:, None], depth, tied, inside, dtype, UPCAST
            )
        else:
            inside = (k < depth)[:, None] & (n < cols)[None, :]
            tied = _tied_columns(tie_index_ptr, k, cols)[:, None]
            b = _masked_tile(
                weight_ptr, scores_ptr, value_ptr, k[:, None], n[None, :], cols, tied, inside, dtype, UPCAST
            )
        acc = _mma(a, b, acc, PRECISION, UPCAST)
    _finish(acc, bias_ptr, y_ptr, y_ptr, m, n, rows, cols, "none", HAS_BIAS, False, UPCAST)


@triton.jit
def _masked_grads(
    grad_ptr, x_ptr, weight_ptr, scores_ptr, value_ptr, tie_index_ptr, d_weight_ptr, d_scores_ptr,
    rows, height, width, grad_stride, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d W = mask * G and d scores = W * G with G = grad^T x, grad [rows, height], x [rows, width], W [height, width].

    Program axis 0: tiles of G, those of a row of tiles neighbours, so that they share grad.
    """
    tiles = tl.cdiv(width, BLOCK_N)
    row0, column0 = (tl.program_id(0) // tiles) * BLOCK_M, (tl.program_id(0) % tiles) * BLOCK_N
    row, column = row0 + tl.arange(0, BLOCK_M), column0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m0 in range(0, rows, BLOCK_K):
        m = (m0 + tl.arange(0, BLOCK_K))[:, None]
        at = m.to(tl.int64)
        grad = _load(grad_ptr + at * grad_stride + row[None, :], (m < rows) & (row < height)[None, :])
        x = _load(x_ptr + at * x_stride + column[None, :], (m < rows) & (column < width)[None, :])
        acc = _mma(tl.trans(grad), x, acc, PRECISION, UPCAST)
    inside = (row < height)[:, None] & (column < width)[None, :]
    tied = _tied_columns(tie_index_ptr, row, width)[:, None]
    # From the tile's corner 4 bytes reach: offsets of 8 would take twice the registers.
    corner = row0.to(tl.int64) * width + column0
    offsets = tl.arange(0, BLOCK_M)[:, None] * width + tl.arange(0, BLOCK_N)[None, :]
    weight = _load(weight_ptr + corner + offsets, inside).to(tl.float32)
    d_scores = _cast(weight * acc, d_scores_ptr.dtype.element_ty, UPCAST)
    tl.store(d_scores_ptr + corner + offsets, d_scores, mask=inside)
    kept = _kept(scores_ptr + corner, value_ptr, offsets, inside, column[None, :], tied)
    d_weight = _cast(tl.where(kept, acc, 0.0), d_weight_ptr.dtype.element_ty, UPCAST)
    tl.store(d_weight_ptr + corner + offsets, d_weight, mask=inside)


def product(
    a: Tensor,
    weight: Tensor,
    selection: Selection,
    launch: Launch,
    transposed: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """a (W * mask) [rows, in] of a [rows, out]; transposed: a (W * mask)^T + bias [rows, out] of a [rows, in]."""
    rows, depth = a.shape
    cols = weight.shape[0 if transposed else 1]
    y = a.new_empty((rows, cols))
    if rows and cols:
        start(
            _masked_product, (-(-rows // launch.block_m) * -(-cols // launch.block_n),),
            a, weight, *selection, bias if bias is not None else a, y, rows, depth, cols, a.stride(0),
            TRANSPOSED=transposed, HAS_BIAS=bias is not None,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, EVEN_K=depth % launch.block_k == 0,
            **_common(a.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return y


def weight_grads(
    grad: Tensor, x: Tensor, weight: Tensor, selection: Selection, launch: Launch
) -> tuple[Tensor, Tensor]:
    """(d weight, d scores), each [out, in] in its tensor's dtype, from grad [rows, out] and x [rows, in]."""
    height, width = weight.shape
    d_weight, d_scores = weight.new_empty(weight.shape), weight.new_empty(weight.shape, dtype=selection.scores.dtype)
    if weight.numel():
        start(
            _masked_grads, (-(-height // launch.block_m) * -(-width // launch.block_n),),
            grad, x, weight, *selection, d_weight, d_scores,
            grad.shape[0], height, width, grad.stride(0), x.stride(0),
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
            **_common(grad.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return d_weight, d_scores
