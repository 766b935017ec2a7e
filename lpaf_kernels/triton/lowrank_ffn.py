"""Kernels of lowrank_ffn: a whole feed-forward block from packed low-rank factors, in one pass.

With z1 = x [u1 | s1] of one row tile as the query, the block is what attention is: tiles of the hidden dimension
h = act(z1 v1 + kept columns + b1) are made, multiplied into z2 += h [u2 | s2] and forgotten. The result
y = norm(z2 v2 + kept columns + b2 + residual) is made from z2, which stays on chip; a norm takes a first sweep over the
result's columns for its statistics, a second one makes them again and writes.

Where row tiles do not fill the device the hidden dimension is split over programs, each with its own float32 part of
z2, and `_finish` adds the parts in a fixed order. Nothing uses atomics. Packing, kept columns and parts of ranks are
those of :mod:`.lowrank_sparse_linear`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops.lowrank_ffn import Norm
from .activations import activate, derivative
from .launch import Launch, multiprocessors, pitch, split_width, start
from .lowrank_sparse_linear import (
    _block_k,
    _cast,
    _common,
    _load,
    _mma,
    _store_columns,
    expand,
    outer,
    project,
)

# Rows of one program of `_finish`: few, because it is used where row tiles are few.
FINISH_ROWS = 16


class Factors(NamedTuple):
    """One factored linear: down [rank + kept, in], up [rank, out], kept sorted positions, bias [out]."""

    down: Tensor
    up: Tensor
    kept: Tensor | None = None
    bias: Tensor | None = None

    @property
    def width(self) -> int:
        return self.down.shape[0]

    @property
    def rank(self) -> int:
        return self.up.shape[0]

    @property
    def cols(self) -> int:
        return self.up.shape[1]


class BackwardLaunches(NamedTuple):
    """The launches of :func:`backward`: three kernels of lowrank_sparse_linear and two of this module."""

    project: Launch
    expand: Launch
    outer: Launch
    rows: Launch
    weights: Launch


class Gradients(NamedTuple):
    """What :func:`backward` returns; a bias's gradient is None where there is no bias."""

    x: Tensor
    down1: Tensor
    up1: Tensor
    bias1: Tensor | None
    down2: Tensor
    up2: Tensor
    bias2: Tensor | None


@triton.jit
def _inner(
    x_ptr, down_ptr, m_in, width, depth, x_stride, DTYPE: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x down^T of one row tile in up to three parts, rounded to DTYPE."""
    acc0 = tl.zeros((BLOCK_M, P0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, P1 if P1 > 0 else 16), tl.float32)
    acc2 = tl.zeros((BLOCK_M, P2 if P2 > 0 else 16), tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _load(x_ptr + (m_in[:, None] * x_stride + k[None, :]), None if EVEN_K else (k < depth)[None, :])
        acc0 = _mma(x, _down_tile(down_ptr, width, depth, k0, 0, P0, BLOCK_K, EVEN_K), acc0, PRECISION, UPCAST)
        if P1 > 0:
            acc1 = _mma(x, _down_tile(down_ptr, width, depth, k0, P0, P1, BLOCK_K, EVEN_K), acc1, PRECISION, UPCAST)
        if P2 > 0:
            acc2 = _mma(
                x, _down_tile(down_ptr, width, depth, k0, P0 + P1, P2, BLOCK_K, EVEN_K), acc2, PRECISION, UPCAST
            )
    return _cast(acc0, DTYPE, UPCAST), _cast(acc1, DTYPE, UPCAST), _cast(acc2, DTYPE, UPCAST)


@triton.jit
def _down_tile(
    down_ptr, width, depth, k0, FIRST: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Rows FIRST.. of down [width, depth] at k0.. as a [BLOCK, PART] tile; rows beyond the last repeat it."""
    n = tl.minimum(FIRST + tl.arange(0, PART), width - 1)
    k = tl.arange(0, BLOCK)
    return _load(down_ptr + k0 + (n[None, :] * depth + k[:, None]), None if EVEN else (k < depth - k0)[:, None])


@triton.jit
def _up_tile(
    up_ptr, kept_ptr, rank, kept, cols, n0,
    FIRST: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr, HAS_KEPT: tl.constexpr,
    LEAD: tl.constexpr = 0,
):  # fmt: skip
    """Rows FIRST.. of up [rank, cols], continued by one 0/1 row per kept column, at n0.. as a [PART, BLOCK] tile.

    With a LEAD that many rows of 0 come first, and ``rank`` counts them.
    """
    k = FIRST + tl.arange(0, PART)
    n = tl.arange(0, BLOCK)
    inside = (k < rank)[:, None]
    if LEAD > 0:
        inside = inside & (k >= LEAD)[:, None]
    if not EVEN:
        inside = inside & (n < cols - n0)[None, :]
    tile = tl.load(up_ptr + n0 + ((k - LEAD)[:, None] * cols + n[None, :]), mask=inside, other=0.0)
    if HAS_KEPT:
        position = tl.load(kept_ptr + (k - rank), mask=(k >= rank) & (k < rank + kept), other=-1).to(tl.int32) - n0
        tile = tl.where(position[:, None] == n[None, :], 1.0, tile.to(tl.float32)).to(up_ptr.dtype.element_ty)
    return tile


@triton.jit
def _store_z(z_ptr, m, rows, z_stride, z, FIRST: tl.constexpr, PART: tl.constexpr, UPCAST: tl.constexpr):
    n = FIRST + tl.arange(0, PART)
    tl.store(
        z_ptr + (m[:, None] * z_stride + n[None, :]),
        _cast(z, z_ptr.dtype.element_ty, UPCAST),
        mask=(m < rows)[:, None] & (n < z_stride)[None, :],
    )


@triton.jit
def _store_parts(
    z_ptr, m, rows, z_stride, z0, z1, z2, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """All parts of z, the padding of its rows included."""
    _store_z(z_ptr, m, rows, z_stride, z0, 0, P0, UPCAST)
    if P1 > 0:
        _store_z(z_ptr, m, rows, z_stride, z1, P0, P1, UPCAST)
    if P2 > 0:
        _store_z(z_ptr, m, rows, z_stride, z2, P0 + P1, P2, UPCAST)


@triton.jit
def _outer_tile(
    z0, z1, z2, up_ptr, kept_ptr, bias_ptr, n0, rank, kept, cols, HAS_BIAS: tl.constexpr, KEPT_FROM: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, LEAD: tl.constexpr = 0,
):  # fmt: skip
    """z up + scatter(z, kept) + bias in float32 for the columns n0..; parts before KEPT_FROM hold no kept columns.

    Columns beyond the last are 0.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    w0 = _up_tile(up_ptr, kept_ptr, rank, kept, cols, n0, 0, P0, BLOCK_N, EVEN, KEPT_FROM <= 0, LEAD)
    acc = _mma(z0, w0, acc, PRECISION, UPCAST)
    if P1 > 0:
        w1 = _up_tile(up_ptr, kept_ptr, rank, kept, cols, n0, P0, P1, BLOCK_N, EVEN, KEPT_FROM <= 1, LEAD)
        acc = _mma(z1, w1, acc, PRECISION, UPCAST)
    if P2 > 0:
        w2 = _up_tile(up_ptr, kept_ptr, rank, kept, cols, n0, P0 + P1, P2, BLOCK_N, EVEN, KEPT_FROM <= 2, LEAD)
        acc = _mma(z2, w2, acc, PRECISION, UPCAST)
    if HAS_BIAS:
        n = n0 + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _result_tile(
    z0, z1, z2, up_ptr, kept_ptr, bias_ptr, residual_ptr, m, n0, rows, rank, kept, cols, residual_stride,
    HAS_BIAS: tl.constexpr, KEPT_FROM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What the norm reads, in float32."""
    acc = _outer_tile(
        z0, z1, z2, up_ptr, kept_ptr, bias_ptr, n0, rank, kept, cols, HAS_BIAS, KEPT_FROM,
        P0, P1, P2, BLOCK_M, BLOCK_N, EVEN, PRECISION, UPCAST,
    )  # fmt: skip
    if HAS_RESIDUAL:
        n = n0 + tl.arange(0, BLOCK_N)
        offsets = m[:, None] * residual_stride + n[None, :]
        acc += _load(residual_ptr + offsets, (m < rows)[:, None] & (n < cols)[None, :]).to(tl.float32)
    return acc


@triton.jit
def _result(
    z0, z1, z2, up_ptr, kept_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, m, first, last,
    rows, rank, kept, cols, residual_stride,
    HAS_BIAS: tl.constexpr, KEPT_FROM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Columns first..last of y for one row tile from z2."""
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    if NORM != "none":
        for n0 in range(0, cols, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            tile = _result_tile(
                z0, z1, z2, up_ptr, kept_ptr, bias_ptr, residual_ptr, m, n0, rows, rank, kept, cols, residual_stride,
                HAS_BIAS, KEPT_FROM, HAS_RESIDUAL, P0, P1, P2, BLOCK_M, BLOCK_N, EVEN, PRECISION, UPCAST,
            )  # fmt: skip
            if NORM == "layer":
                # The tile's own mean and squares join those before it: nothing cancels.
                count = tl.minimum(cols - n0, BLOCK_N).to(tl.float32)
                share = count / (n0 + count)
                tile_mean = tl.sum(tile, 1) / count
                apart = tl.where((n < cols)[None, :], tile - tile_mean[:, None], 0.0)
                shift = tile_mean - mean
                squares += tl.sum(apart * apart, 1) + shift * shift * (n0 * share)
                mean += shift * share
            else:
                squares += tl.sum(tile * tile, 1)
        scale = tl.rsqrt(squares / cols + EPS)
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        tile = _result_tile(
            z0, z1, z2, up_ptr, kept_ptr, bias_ptr, residual_ptr, m, n0, rows, rank, kept, cols, residual_stride,
            HAS_BIAS, KEPT_FROM, HAS_RESIDUAL, P0, P1, P2, BLOCK_M, BLOCK_N, EVEN, PRECISION, UPCAST,
        )  # fmt: skip
        if NORM != "none":
            tile = (tile - mean[:, None]) * scale[:, None]
            if NORM_WEIGHT:
                tile *= tl.load(norm_weight_ptr + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
            if NORM_BIAS:
                tile += tl.load(norm_bias_ptr + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
        offsets = m[:, None] * cols + n[None, :]
        inside = (m < rows)[:, None] & (n < cols)[None, :]
        tl.store(y_ptr + offsets, _cast(tile, y_ptr.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def _ffn(
    x_ptr, down1_ptr, up1_ptr, kept1_ptr, bias1_ptr, down_g_ptr, up_g_ptr, kept_g_ptr, bias_g_ptr,
    down2_ptr, up2_ptr, kept2_ptr, bias2_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,
    parts_ptr, z1_ptr, z2_ptr,
    rows, depth, hidden, cols, rank1, kept1, rank_g, kept_g, rank2, kept2,
    x_stride, residual_stride, z1_stride, parts_stride, split_stride, hidden_per_split,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, SPLIT: tl.constexpr, SAVE_Z: tl.constexpr,
    HAS_BIAS1: tl.constexpr, KEPT1_FROM: tl.constexpr, HAS_BIAS_G: tl.constexpr, KEPT_G_FROM: tl.constexpr,
    HAS_BIAS2: tl.constexpr, KEPT2_FROM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The whole block for one row tile, or, if SPLIT, its part of z2 from `hidden_per_split` hidden columns.

    Program axis 0: row tiles. Axis 1: splits of the hidden dimension, each of which computes z1 anew.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    # From here on this tile's rows: offsets of 32 bits from one pointer take half the registers that pointers take.
    before = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows -= tl.program_id(0) * BLOCK_M
    m_in = tl.minimum(m, rows - 1)
    x_ptr += before * x_stride
    residual_ptr += before * residual_stride
    y_ptr += before * cols
    parts_ptr += before * parts_stride
    z1_ptr += before * z1_stride
    z2_ptr += before * parts_stride
    z0, z1, z2 = _inner(
        x_ptr, down1_ptr, m_in, rank1 + kept1, depth, x_stride, dtype,
        P0, P1, P2, BLOCK_M, BLOCK_K, EVEN_K, PRECISION, UPCAST,
    )  # fmt: skip
    if SAVE_Z:
        if tl.program_id(1) == 0:
            _store_parts(z1_ptr, m, rows, z1_stride, z0, z1, z2, P0, P1, P2, UPCAST)
    if GATE:
        g0, g1, g2 = _inner(
            x_ptr, down_g_ptr, m_in, rank_g + kept_g, depth, x_stride, dtype,
            G0, G1, G2, BLOCK_M, BLOCK_K, EVEN_K, PRECISION, UPCAST,
        )  # fmt: skip
    width2 = rank2 + kept2
    acc0 = tl.zeros((BLOCK_M, Q0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, Q1 if Q1 > 0 else 16), tl.float32)
    acc2 = tl.zeros((BLOCK_M, Q2 if Q2 > 0 else 16), tl.float32)
    first = tl.program_id(1) * hidden_per_split
    for n0 in range(first, tl.minimum(first + hidden_per_split, hidden), BLOCK_N):
        h = _outer_tile(
            z0, z1, z2, up1_ptr, kept1_ptr, bias1_ptr, n0, rank1, kept1, hidden, HAS_BIAS1, KEPT1_FROM,
            P0, P1, P2, BLOCK_M, BLOCK_N, EVEN_N, PRECISION, UPCAST,
        )  # fmt: skip
        if GATE:
            g = _outer_tile(
                g0, g1, g2, up_g_ptr, kept_g_ptr, bias_g_ptr, n0, rank_g, kept_g, hidden, HAS_BIAS_G, KEPT_G_FROM,
                G0, G1, G2, BLOCK_M, BLOCK_N, EVEN_N, PRECISION, UPCAST,
            )  # fmt: skip
            h *= activate(g, ACTIVATION)
        else:
            h = activate(h, ACTIVATION)
        h = _cast(h, dtype, UPCAST)
        acc0 = _mma(h, _down_tile(down2_ptr, width2, hidden, n0, 0, Q0, BLOCK_N, EVEN_N), acc0, PRECISION, UPCAST)
        if Q1 > 0:
            acc1 = _mma(h, _down_tile(down2_ptr, width2, hidden, n0, Q0, Q1, BLOCK_N, EVEN_N), acc1, PRECISION, UPCAST)
        if Q2 > 0:
            acc2 = _mma(
                h, _down_tile(down2_ptr, width2, hidden, n0, Q0 + Q1, Q2, BLOCK_N, EVEN_N), acc2, PRECISION, UPCAST
            )
    if SPLIT:
        parts_ptr += tl.program_id(1).to(tl.int64) * split_stride
        _store_parts(parts_ptr, m, rows, parts_stride, acc0, acc1, acc2, Q0, Q1, Q2, UPCAST)
    else:
        acc0 = _cast(acc0, dtype, UPCAST)
        acc1 = _cast(acc1, dtype, UPCAST)
        acc2 = _cast(acc2, dtype, UPCAST)
        if SAVE_Z:
            _store_parts(z2_ptr, m, rows, parts_stride, acc0, acc1, acc2, Q0, Q1, Q2, UPCAST)
        _result(
            acc0, acc1, acc2, up2_ptr, kept2_ptr, bias2_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,
            m, 0, cols, rows, rank2, kept2, cols, residual_stride,
            HAS_BIAS2, KEPT2_FROM, HAS_RESIDUAL, NORM, NORM_WEIGHT, NORM_BIAS, EPS,
            Q0, Q1, Q2, BLOCK_M, BLOCK_N, EVEN_C, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def _add_parts(
    parts_ptr, m_in, splits, parts_stride, split_stride, FIRST: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr,
    BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Columns FIRST.. of z2: the parts added in order, as DTYPE."""
    n = FIRST + tl.arange(0, PART)
    pointers = parts_ptr + (m_in[:, None] * parts_stride + n[None, :])
    total = tl.zeros((BLOCK_M, PART), tl.float32)
    for _ in range(splits):
        total += tl.load(pointers, mask=(n < parts_stride)[None, :], other=0.0)
        pointers += split_stride
    return _cast(total, DTYPE, UPCAST)


@triton.jit
def _finish(
    parts_ptr, up2_ptr, kept2_ptr, bias2_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr, z2_ptr,
    rows, cols, rank2, kept2, splits, parts_stride, split_stride, residual_stride, cols_per_program,
    SAVE_Z: tl.constexpr, HAS_BIAS2: tl.constexpr, KEPT2_FROM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr, NORM_WEIGHT: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y from the parts of z2. Program axis 0: row tiles. Axis 1: `cols_per_program` columns each."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    before = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows -= tl.program_id(0) * BLOCK_M
    m_in = tl.minimum(m, rows - 1)
    parts_ptr += before * parts_stride
    residual_ptr += before * residual_stride
    y_ptr += before * cols
    z2_ptr += before * parts_stride
    z0 = _add_parts(parts_ptr, m_in, splits, parts_stride, split_stride, 0, dtype, Q0, BLOCK_M, UPCAST)
    z1 = z0
    z2 = z0
    if Q1 > 0:
        z1 = _add_parts(parts_ptr, m_in, splits, parts_stride, split_stride, Q0, dtype, Q1, BLOCK_M, UPCAST)
    if Q2 > 0:
        z2 = _add_parts(parts_ptr, m_in, splits, parts_stride, split_stride, Q0 + Q1, dtype, Q2, BLOCK_M, UPCAST)
    if SAVE_Z:
        if tl.program_id(1) == 0:
            _store_parts(z2_ptr, m, rows, parts_stride, z0, z1, z2, Q0, Q1, Q2, UPCAST)
    first = tl.program_id(1) * cols_per_program
    _result(
        z0, z1, z2, up2_ptr, kept2_ptr, bias2_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,
        m, first, tl.minimum(first + cols_per_program, cols), rows, rank2, kept2, cols, residual_stride,
        HAS_BIAS2, KEPT2_FROM, HAS_RESIDUAL, NORM, NORM_WEIGHT, NORM_BIAS, EPS,
        Q0, Q1, Q2, BLOCK_M, BLOCK_N, EVEN_C, PRECISION, UPCAST,
    )  # fmt: skip


@triton.jit
def _z_tile(
    z_ptr, rows, z_stride, FIRST: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """Columns FIRST.. of BLOCK rows of z, of which there are `rows`; [PART, BLOCK] if TRANSPOSED.

    Loaded to the end of the padded row, in whole 16-byte pieces: the weights have 0 where z has padding.
    """
    m = tl.arange(0, BLOCK)
    n = FIRST + tl.arange(0, PART)
    if TRANSPOSED:
        return tl.load(
            z_ptr + (m[None, :] * z_stride + n[:, None]), mask=(m < rows)[None, :] & (n < z_stride)[:, None], other=0.0
        )
    else:
        return tl.load(
            z_ptr + (m[:, None] * z_stride + n[None, :]), mask=(m < rows)[:, None] & (n < z_stride)[None, :], other=0.0
        )


@triton.jit
def _down_rows(
    down_ptr, width, depth, k0, FIRST: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):  # fmt: skip
    """Rows FIRST.. of down [width, depth] at k0.. as a [PART, BLOCK] tile; 0 beyond the last row and column."""
    n = FIRST + tl.arange(0, PART)
    k = tl.arange(0, BLOCK)
    inside = (n < width)[:, None]
    if not EVEN:
        inside = inside & (k < depth - k0)[None, :]
    return tl.load(down_ptr + k0 + (n[:, None] * depth + k[None, :]), mask=inside, other=0.0)


@triton.jit
def _hidden_gradient(pre, d_h, ACTIVATION: tl.constexpr):
    """h and d pre, in float32, from the activation's input."""
    h = activate(pre, ACTIVATION)
    if ACTIVATION == "none":
        d = d_h
    elif ACTIVATION == "tanh":
        d = d_h * derivative(h, ACTIVATION)
    else:
        d = d_h * derivative(pre, ACTIVATION)
    return h, d


@triton.jit
def _ffn_rows(
    z1_ptr, d_z2_ptr, up1_ptr, kept1_ptr, bias1_ptr, down2_ptr, d_z1_ptr,
    rows, hidden, rank1, kept1, width2, z1_stride, d_z2_stride, split_stride, hidden_per_split,
    ACTIVATION: tl.constexpr, HAS_BIAS1: tl.constexpr, KEPT1_FROM: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d z1 of one row tile from z1 and d z2, its part from `hidden_per_split` hidden columns.

    Program axis 0: row tiles. Axis 1: splits of the hidden dimension, each with its own d z1.
    """
    dtype: tl.constexpr = up1_ptr.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    before = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows -= tl.program_id(0) * BLOCK_M
    z1_ptr += before * z1_stride
    d_z2_ptr += before * d_z2_stride
    d_z1_ptr += before * z1_stride
    z0 = _z_tile(z1_ptr, rows, z1_stride, 0, P0, BLOCK_M, False)
    d0 = _z_tile(d_z2_ptr, rows, d_z2_stride, 0, Q0, BLOCK_M, False)
    if P1 > 0:
        z1 = _z_tile(z1_ptr, rows, z1_stride, P0, P1, BLOCK_M, False)
    if P2 > 0:
        z2 = _z_tile(z1_ptr, rows, z1_stride, P0 + P1, P2, BLOCK_M, False)
    if Q1 > 0:
        d1 = _z_tile(d_z2_ptr, rows, d_z2_stride, Q0, Q1, BLOCK_M, False)
    if Q2 > 0:
        d2 = _z_tile(d_z2_ptr, rows, d_z2_stride, Q0 + Q1, Q2, BLOCK_M, False)
    acc0 = tl.zeros((BLOCK_M, P0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, P1 if P1 > 0 else 16), tl.float32)
    acc2 = tl.zeros((BLOCK_M, P2 if P2 > 0 else 16), tl.float32)
    first = tl.program_id(1) * hidden_per_split
    for n0 in range(first, tl.minimum(first + hidden_per_split, hidden), BLOCK_N):
        pre = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        d_h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        w0 = _up_tile(up1_ptr, kept1_ptr, rank1, kept1, hidden, n0, 0, P0, BLOCK_N, EVEN_N, KEPT1_FROM <= 0)
        pre = _mma(z0, w0, pre, PRECISION, UPCAST)
        if P1 > 0:
            w1 = _up_tile(up1_ptr, kept1_ptr, rank1, kept1, hidden, n0, P0, P1, BLOCK_N, EVEN_N, KEPT1_FROM <= 1)
            pre = _mma(z1, w1, pre, PRECISION, UPCAST)
        if P2 > 0:
            w2 = _up_tile(up1_ptr, kept1_ptr, rank1, kept1, hidden, n0, P0 + P1, P2, BLOCK_N, EVEN_N, KEPT1_FROM <= 2)
            pre = _mma(z2, w2, pre, PRECISION, UPCAST)
        if HAS_BIAS1:
            n = n0 + tl.arange(0, BLOCK_N)
            pre += tl.load(bias1_ptr + n, mask=n < hidden, other=0.0).to(tl.float32)[None, :]
        v0 = _down_rows(down2_ptr, width2, hidden, n0, 0, Q0, BLOCK_N, EVEN_N)
        d_h = _mma(d0, v0, d_h, PRECISION, UPCAST)
        if Q1 > 0:
            v1 = _down_rows(down2_ptr, width2, hidden, n0, Q0, Q1, BLOCK_N, EVEN_N)
            d_h = _mma(d1, v1, d_h, PRECISION, UPCAST)
        if Q2 > 0:
            v2 = _down_rows(down2_ptr, width2, hidden, n0, Q0 + Q1, Q2, BLOCK_N, EVEN_N)
            d_h = _mma(d2, v2, d_h, PRECISION, UPCAST)
        _, d_pre = _hidden_gradient(pre, d_h, ACTIVATION)
        d_pre = _cast(d_pre, dtype, UPCAST)
        acc0 = _mma(d_pre, tl.trans(w0), acc0, PRECISION, UPCAST)
        if P1 > 0:
            acc1 = _mma(d_pre, tl.trans(w1), acc1, PRECISION, UPCAST)
        if P2 > 0:
            acc2 = _mma(d_pre, tl.trans(w2), acc2, PRECISION, UPCAST)
    d_z1_ptr += tl.program_id(1).to(tl.int64) * split_stride
    _store_parts(d_z1_ptr, m, rows, z1_stride, acc0, acc1, acc2, P0, P1, P2, UPCAST)


@triton.jit
def _ffn_weights(
    z1_ptr, d_z2_ptr, up1_ptr, kept1_ptr, bias1_ptr, down2_ptr, d_up1_ptr, d_bias1_ptr, d_down2_ptr,
    rows, hidden, rank1, kept1, width2, z1_stride, d_z2_stride, rows_per_split,
    ACTIVATION: tl.constexpr, HAS_BIAS1: tl.constexpr, KEPT1_FROM: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr,
    OF_UP1: tl.constexpr, OF_DOWN2: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d up1 = z1^T d pre and d bias1 (if OF_UP1), d down2 = d z2^T h (if OF_DOWN2) for one tile of the hidden columns.

    Everything is held transposed: the hidden tile is the wide first side of every product. Program axis 0: tiles of
    the hidden columns. Axis 1: splits of rows, each with its own results.
    """
    dtype: tl.constexpr = up1_ptr.dtype.element_ty
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if HAS_BIAS1:
        bias = tl.load(bias1_ptr + n, mask=n < hidden, other=0.0).to(tl.float32)
    u_acc0 = tl.zeros((BLOCK_N, P0), tl.float32)
    u_acc1 = tl.zeros((BLOCK_N, P1 if P1 > 0 else 16), tl.float32)
    u_acc2 = tl.zeros((BLOCK_N, P2 if P2 > 0 else 16), tl.float32)
    v_acc0 = tl.zeros((BLOCK_N, Q0), tl.float32)
    v_acc1 = tl.zeros((BLOCK_N, Q1 if Q1 > 0 else 16), tl.float32)
    v_acc2 = tl.zeros((BLOCK_N, Q2 if Q2 > 0 else 16), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    u0 = tl.trans(_up_tile(up1_ptr, kept1_ptr, rank1, kept1, hidden, n0, 0, P0, BLOCK_N, EVEN_N, KEPT1_FROM <= 0))
    if P1 > 0:
        u1 = _up_tile(up1_ptr, kept1_ptr, rank1, kept1, hidden, n0, P0, P1, BLOCK_N, EVEN_N, KEPT1_FROM <= 1)
        u1 = tl.trans(u1)
    if P2 > 0:
        u2 = _up_tile(up1_ptr, kept1_ptr, rank1, kept1, hidden, n0, P0 + P1, P2, BLOCK_N, EVEN_N, KEPT1_FROM <= 2)
        u2 = tl.trans(u2)
    if OF_UP1:
        v0 = tl.trans(_down_rows(down2_ptr, width2, hidden, n0, 0, Q0, BLOCK_N, EVEN_N))
        if Q1 > 0:
            v1 = tl.trans(_down_rows(down2_ptr, width2, hidden, n0, Q0, Q1, BLOCK_N, EVEN_N))
        if Q2 > 0:
            v2 = tl.trans(_down_rows(down2_ptr, width2, hidden, n0, Q0 + Q1, Q2, BLOCK_N, EVEN_N))
    first = tl.program_id(1) * rows_per_split
    z1_ptr += first.to(tl.int64) * z1_stride
    d_z2_ptr += first.to(tl.int64) * d_z2_stride
    for m0 in range(first, tl.minimum(first + rows_per_split, rows), BLOCK_K):
        left = rows - m0
        pre = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        d_h = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        z0 = _z_tile(z1_ptr, left, z1_stride, 0, P0, BLOCK_K, True)
        pre = _mma(u0, z0, pre, PRECISION, UPCAST)
        if P1 > 0:
            z1 = _z_tile(z1_ptr, left, z1_stride, P0, P1, BLOCK_K, True)
            pre = _mma(u1, z1, pre, PRECISION, UPCAST)
        if P2 > 0:
            z2 = _z_tile(z1_ptr, left, z1_stride, P0 + P1, P2, BLOCK_K, True)
            pre = _mma(u2, z2, pre, PRECISION, UPCAST)
        pre += bias[:, None]
        d0 = _z_tile(d_z2_ptr, left, d_z2_stride, 0, Q0, BLOCK_K, True)
        if Q1 > 0:
            d1 = _z_tile(d_z2_ptr, left, d_z2_stride, Q0, Q1, BLOCK_K, True)
        if Q2 > 0:
            d2 = _z_tile(d_z2_ptr, left, d_z2_stride, Q0 + Q1, Q2, BLOCK_K, True)
        if OF_UP1:
            d_h = _mma(v0, d0, d_h, PRECISION, UPCAST)
            if Q1 > 0:
                d_h = _mma(v1, d1, d_h, PRECISION, UPCAST)
            if Q2 > 0:
                d_h = _mma(v2, d2, d_h, PRECISION, UPCAST)
        h, d_pre = _hidden_gradient(pre, d_h, ACTIVATION)
        if OF_UP1:
            sums += tl.sum(d_pre, 1)
            d_pre = _cast(d_pre, dtype, UPCAST)
            u_acc0 = _mma(d_pre, tl.trans(z0), u_acc0, PRECISION, UPCAST)
            if P1 > 0:
                u_acc1 = _mma(d_pre, tl.trans(z1), u_acc1, PRECISION, UPCAST)
            if P2 > 0:
                u_acc2 = _mma(d_pre, tl.trans(z2), u_acc2, PRECISION, UPCAST)
        if OF_DOWN2:
            h = _cast(h, dtype, UPCAST)
            v_acc0 = _mma(h, tl.trans(d0), v_acc0, PRECISION, UPCAST)
            if Q1 > 0:
                v_acc1 = _mma(h, tl.trans(d1), v_acc1, PRECISION, UPCAST)
            if Q2 > 0:
                v_acc2 = _mma(h, tl.trans(d2), v_acc2, PRECISION, UPCAST)
        z1_ptr += BLOCK_K * z1_stride
        d_z2_ptr += BLOCK_K * d_z2_stride
    split = tl.program_id(1).to(tl.int64)
    if OF_UP1:
        d_up1_ptr += split * rank1 * hidden
        _store_columns(d_up1_ptr, n, hidden, u_acc0, 0, rank1, P0, UPCAST)
        if P1 > 0:
            _store_columns(d_up1_ptr, n, hidden, u_acc1, P0, rank1, P1, UPCAST)
        if P2 > 0:
            _store_columns(d_up1_ptr, n, hidden, u_acc2, P0 + P1, rank1, P2, UPCAST)
        tl.store(d_bias1_ptr + split * hidden + n, sums, mask=n < hidden)
    if OF_DOWN2:
        d_down2_ptr += split * width2 * hidden
        _store_columns(d_down2_ptr, n, hidden, v_acc0, 0, width2, Q0, UPCAST)
        if Q1 > 0:
            _store_columns(d_down2_ptr, n, hidden, v_acc1, Q0, width2, Q1, UPCAST)
        if Q2 > 0:
            _store_columns(d_down2_ptr, n, hidden, v_acc2, Q0 + Q1, width2, Q2, UPCAST)


def _cut(name: str, factors: Factors, launch: Launch) -> tuple[int, int, int]:
    """The parts of ``factors``'s columns, which one program must hold."""
    if factors.width > launch.max_width:
        raise ValueError(f"{name}: expected at most {launch.max_width} rows for {launch.name}, got {factors.width}")
    return split_width(factors.width, launch.max_width)[0]


def _kept_from(factors: Factors, parts: tuple[int, int, int]) -> int:
    """The first part that holds kept columns, 3 if none does."""
    ends = (parts[0], parts[0] + parts[1], sum(parts))
    return 3 if factors.kept is None else next(index for index, end in enumerate(ends) if end > factors.rank)


def _spread(launch: Launch, row_tiles: int, hidden: int, tensor: Tensor) -> tuple[int, int]:
    """(splits, hidden columns in each): as many splits as asked for, or as fill the device."""
    tiles = max(-(-hidden // launch.block_n), 1)
    splits = launch.splits or max(multiprocessors(tensor) // max(row_tiles, 1), 1)
    per_split = -(-tiles // min(splits, tiles)) * launch.block_n
    return max(-(-hidden // per_split), 1), per_split


def forward(
    x: Tensor,
    first: Factors,
    second: Factors,
    launch: Launch,
    *,
    gate: Factors | None = None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """y [rows, out] of x [rows, in]; see the module's notation.

    Raises:
        ValueError: more columns (rank + kept) than ``launch`` holds in a factor, or in ``first`` and ``gate`` together.
    """
    return forward_with_z(
        x, first, second, launch, gate=gate, activation=activation, residual=residual, norm=norm, save_z=False
    )[0]


def forward_with_z(
    x: Tensor,
    first: Factors,
    second: Factors,
    launch: Launch,
    *,
    gate: Factors | None = None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    norm: Norm | None = None,
    save_z: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and with ``save_z`` what :func:`backward` needs: z1 and z2, each [rows, pitch].

    Raises:
        ValueError: a factor with more columns (rank + kept) than ``launch`` holds.
    """
    rows, depth = x.shape
    hidden, cols = first.cols, second.cols
    parts1, parts2 = _cut("down1", first, launch), _cut("down2", second, launch)
    parts_g = (0, 0, 0) if gate is None else _cut("gate", gate, launch)
    if gate is not None and first.width + gate.width > launch.max_width:
        widths = f"{first.width} + {gate.width}"
        raise ValueError(f"down1, gate: expected at most {launch.max_width} rows for {launch.name}, got {widths}")
    gated = first if gate is None else gate
    block_k = _block_k(launch, x.dtype)
    y = x.new_empty((rows, cols))
    row_tiles = -(-rows // launch.block_m)
    splits, per_split = _spread(launch, row_tiles, hidden, x)
    length = pitch(second.width)
    parts = x.new_empty((splits, rows, length) if splits > 1 else 0, dtype=torch.float32)
    length1 = pitch(first.width)
    z1, z2 = (x.new_empty((rows, stride) if save_z else 0) for stride in (length1, length))
    kind = "none" if norm is None else norm.kind
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)

    def pointer(tensor: Tensor | None) -> Tensor:
        return x if tensor is None else tensor

    result = {
        "SAVE_Z": save_z, "HAS_BIAS2": second.bias is not None, "KEPT2_FROM": _kept_from(second, parts2),
        "HAS_RESIDUAL": residual is not None, "NORM": kind, "NORM_WEIGHT": weight is not None,
        "NORM_BIAS": bias is not None, "EPS": 0.0 if norm is None else norm.eps,
        "Q0": parts2[0], "Q1": parts2[1], "Q2": parts2[2], "EVEN_C": cols % launch.block_n == 0, **_common(x.dtype),
    }  # fmt: skip
    tail = (second.up, pointer(second.kept), pointer(second.bias), pointer(residual), pointer(weight), pointer(bias))
    residual_stride = 0 if residual is None else residual.stride(0)
    if rows and cols:
        start(
            _ffn, (row_tiles, splits),
            x, first.down, first.up, pointer(first.kept), pointer(first.bias),
            gated.down, gated.up, pointer(gated.kept), pointer(gated.bias), second.down, *tail, y, parts, z1, z2,
            rows, depth, hidden, cols, first.rank, first.width - first.rank, gated.rank, gated.width - gated.rank,
            second.rank, second.width - second.rank, x.stride(0), residual_stride,
            length1, length, rows * length, per_split,
            ACTIVATION=activation, GATE=gate is not None, SPLIT=splits > 1,
            HAS_BIAS1=first.bias is not None, KEPT1_FROM=_kept_from(first, parts1),
            HAS_BIAS_G=gated.bias is not None, KEPT_G_FROM=3 if gate is None else _kept_from(gate, parts_g),
            P0=parts1[0], P1=parts1[1], P2=parts1[2], G0=parts_g[0], G1=parts_g[1], G2=parts_g[2],
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=block_k,
            EVEN_K=depth % block_k == 0, EVEN_N=hidden % launch.block_n == 0,
            **result, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    if rows and cols and splits > 1:
        finish_rows = min(FINISH_ROWS, launch.block_m)
        # Without a norm, columns are independent of each other.
        column_tiles = -(-cols // launch.block_n)
        programs = max(multiprocessors(x) // -(-rows // finish_rows), 1) if kind == "none" else 1
        per_program = -(-column_tiles // min(programs, column_tiles)) * launch.block_n
        start(
            _finish, (-(-rows // finish_rows), -(-cols // per_program)),
            parts, *tail, y, z2,
            rows, cols, second.rank, second.width - second.rank, splits, length, rows * length,
            residual_stride, per_program,
            **result, BLOCK_M=finish_rows, BLOCK_N=launch.block_n,
            num_warps=min(launch.num_warps, 4), num_stages=launch.num_stages,
        )  # fmt: skip
    return y, z1, z2


def hidden_rows(
    z1: Tensor, d_z2: Tensor, first: Factors, second: Factors, launch: Launch, activation: str = "gelu"
) -> Tensor:
    """d z1 [rows, pitch] from z1 and d z2 [rows, pitch]: the hidden gradient is made in tiles and never written."""
    rows, length = z1.shape
    hidden = first.cols
    parts1, parts2 = _cut("down1", first, launch), _cut("down2", second, launch)
    row_tiles = -(-rows // launch.block_m)
    splits, per_split = _spread(launch, row_tiles, hidden, z1)
    d_z1 = z1.new_empty((splits, rows, length), dtype=z1.dtype if splits == 1 else torch.float32)
    if rows:
        start(
            _ffn_rows, (row_tiles, splits),
            z1, d_z2, first.up, z1 if first.kept is None else first.kept, z1 if first.bias is None else first.bias,
            second.down, d_z1,
            rows, hidden, first.rank, first.width - first.rank, second.width, length, d_z2.shape[1], rows * length,
            per_split,
            ACTIVATION=activation, HAS_BIAS1=first.bias is not None, KEPT1_FROM=_kept_from(first, parts1),
            P0=parts1[0], P1=parts1[1], P2=parts1[2], Q0=parts2[0], Q1=parts2[1], Q2=parts2[2],
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, EVEN_N=hidden % launch.block_n == 0,
            **_common(z1.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return d_z1[0] if splits == 1 else d_z1.sum(0).to(z1.dtype)


def hidden_weights(
    z1: Tensor, d_z2: Tensor, first: Factors, second: Factors, launch: Launch, activation: str = "gelu"
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of up1, bias1 and down2, the three that read the hidden activation or its gradient."""
    rows, hidden = z1.shape[0], first.cols
    parts1, parts2 = _cut("down1", first, launch), _cut("down2", second, launch)
    tiles = -(-hidden // launch.block_n)
    steps = max(-(-rows // launch.block_k), 1)
    # Each split costs a write and a read of the results: at least 4 steps in each.
    splits = launch.splits or max(multiprocessors(z1) // max(tiles, 1), 1)
    per_split = -(-steps // max(min(splits, steps // 4), 1)) * launch.block_k
    splits = max(-(-rows // per_split), 1)
    sizes = (first.rank, hidden), (hidden,), (second.width, hidden)
    if rows == 0:
        d_up1, d_bias1, d_down2 = (z1.new_zeros(size) for size in sizes)
        return d_up1, d_bias1, d_down2
    dtype = z1.dtype if splits == 1 else torch.float32
    d_up1, d_bias1, d_down2 = (
        z1.new_empty((splits, *size), dtype=torch.float32 if len(size) == 1 else dtype) for size in sizes
    )
    # Where both results do not fit into the registers at once the hidden tile is made twice.
    both = first.width + second.width <= launch.max_width
    for of_up1, of_down2 in [(True, True)] if both else [(True, False), (False, True)]:
        start(
            _ffn_weights, (tiles, splits),
            z1, d_z2, first.up, z1 if first.kept is None else first.kept, z1 if first.bias is None else first.bias,
            second.down, d_up1, d_bias1, d_down2,
            rows, hidden, first.rank, first.width - first.rank, second.width, z1.shape[1], d_z2.shape[1], per_split,
            ACTIVATION=activation, HAS_BIAS1=first.bias is not None, KEPT1_FROM=_kept_from(first, parts1),
            P0=parts1[0], P1=parts1[1], P2=parts1[2], Q0=parts2[0], Q1=parts2[1], Q2=parts2[2],
            BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, EVEN_N=hidden % launch.block_n == 0,
            OF_UP1=of_up1, OF_DOWN2=of_down2,
            **_common(z1.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    d_up1, d_bias1, d_down2 = (part[0] if splits == 1 else part.sum(0) for part in (d_up1, d_bias1, d_down2))
    return d_up1.to(z1.dtype), d_bias1.to(z1.dtype), d_down2.to(z1.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    z1: Tensor,
    z2: Tensor,
    first: Factors,
    second: Factors,
    launches: BackwardLaunches,
    *,
    activation: str = "gelu",
) -> Gradients:
    """Gradients from ``grad`` [rows, out], that of F2(h), and what :func:`forward_with_z` saved. Without a gate.

    Raises:
        ValueError: a factor with more columns (rank + kept) than a launch holds.
    """
    d_z2, _, _ = project(grad, second.up, launches.project, second.kept, keep_splits=False)
    if second.kept is not None and d_z2.shape[1] > second.width:
        d_z2[:, second.width :].zero_()  # gathered columns come without padding, and 0 times NaN is NaN
    d_z1 = hidden_rows(z1, d_z2, first, second, launches.rows, activation)
    d_up1, d_bias1, d_down2 = hidden_weights(z1, d_z2, first, second, launches.weights, activation)
    d_up2, d_bias2 = outer(z2, second.rank, grad, launches.outer, second.bias is not None)
    d_down1, _ = outer(d_z1, first.width, x, launches.outer)
    d_x, _ = expand(d_z1, 1, first.down, x.dtype, launches.expand)
    return Gradients(
        d_x, d_down1, d_up1, d_bias1 if first.bias is not None else None,
        d_down2, d_up2, d_bias2 if second.bias is not None else None,
    )  # fmt: skip
