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

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..ops._blocks import Norm
from .activations import activate, derivative
from .launch import Launch, multiprocessors, pitch, split_width, start
from .lowrank_sparse_linear import (
    _block_k,
    _cast,
    _common,
    _load,
    _mma,
    _store_columns,
    _store_part,
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


class WideLaunches(NamedTuple):
    """The launches of :func:`forward_wide`: two kernels of lowrank_sparse_linear around one of this module."""

    project: Launch
    wide: Launch
    expand: Launch


class Gradients(NamedTuple):
    """What :func:`backward` returns, in the order of the operator's arguments."""

    x: Tensor | None
    down1: Tensor | None
    up1: Tensor | None
    bias1: Tensor | None
    down2: Tensor | None
    up2: Tensor | None
    bias2: Tensor | None
    down_gate: Tensor | None
    up_gate: Tensor | None
    bias_gate: Tensor | None


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
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr,
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
    parts_ptr, z1_ptr, z_g_ptr, z2_ptr,
    rows, depth, hidden, cols, rank1, kept1, rank_g, kept_g, rank2, kept2,
    x_stride, residual_stride, z1_stride, z_g_stride, parts_stride, split_stride, hidden_per_split,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, SPLIT: tl.constexpr, SAVE_Z: tl.constexpr,
    HAS_BIAS1: tl.constexpr, KEPT1_FROM: tl.constexpr, HAS_BIAS_G: tl.constexpr, KEPT_G_FROM: tl.constexpr,
    HAS_BIAS2: tl.constexpr, KEPT2_FROM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr,
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
        if SAVE_Z:
            if tl.program_id(1) == 0:
                _store_parts(
                    z_g_ptr + before * z_g_stride, m, rows, z_g_stride, g0, g1, g2, G0, G1, G2, UPCAST
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
            HAS_BIAS2, KEPT2_FROM, HAS_RESIDUAL, NORM, NORM_BIAS, EPS,
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
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr,
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
        HAS_BIAS2, KEPT2_FROM, HAS_RESIDUAL, NORM, NORM_BIAS, EPS,
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
def _hidden_gradient(pre, gate, d_h, ACTIVATION: tl.constexpr, GATE: tl.constexpr):
    """h, d pre and d gate, in float32, from F1's result and the gate's (``gate`` is not read without a GATE).

    h is act(pre), or act(gate) pre.
    """
    at = gate if GATE else pre
    h = activate(at, ACTIVATION)
    if ACTIVATION == "none":
        d = d_h
    elif ACTIVATION == "tanh":
        d = d_h * derivative(h, ACTIVATION)
    else:
        d = d_h * derivative(at, ACTIVATION)
    if GATE:
        return h * pre, d_h * h, d * pre
    else:
        return h, d, d


@triton.jit
def _z_parts(
    z_ptr, rows, z_stride, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """:func:`_z_tile` of each part; one that is not there repeats the first, here and below."""
    z0 = _z_tile(z_ptr, rows, z_stride, 0, P0, BLOCK, TRANSPOSED)
    z1 = z0
    z2 = z0
    if P1 > 0:
        z1 = _z_tile(z_ptr, rows, z_stride, P0, P1, BLOCK, TRANSPOSED)
    if P2 > 0:
        z2 = _z_tile(z_ptr, rows, z_stride, P0 + P1, P2, BLOCK, TRANSPOSED)
    return z0, z1, z2


@triton.jit
def _up_parts(
    up_ptr, kept_ptr, rank, kept, cols, n0, KEPT_FROM: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    w0 = _up_tile(up_ptr, kept_ptr, rank, kept, cols, n0, 0, P0, BLOCK, EVEN, KEPT_FROM <= 0)
    w1 = w0
    w2 = w0
    if P1 > 0:
        w1 = _up_tile(up_ptr, kept_ptr, rank, kept, cols, n0, P0, P1, BLOCK, EVEN, KEPT_FROM <= 1)
    if P2 > 0:
        w2 = _up_tile(up_ptr, kept_ptr, rank, kept, cols, n0, P0 + P1, P2, BLOCK, EVEN, KEPT_FROM <= 2)
    return w0, w1, w2


@triton.jit
def _down_parts(
    down_ptr, width, depth, k0, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    v0 = _down_rows(down_ptr, width, depth, k0, 0, P0, BLOCK, EVEN)
    v1 = v0
    v2 = v0
    if P1 > 0:
        v1 = _down_rows(down_ptr, width, depth, k0, P0, P1, BLOCK, EVEN)
    if P2 > 0:
        v2 = _down_rows(down_ptr, width, depth, k0, P0 + P1, P2, BLOCK, EVEN)
    return v0, v1, v2


@triton.jit
def _contract(
    a0, a1, a2, b0, b1, b2, P1: tl.constexpr, P2: tl.constexpr, SIDE: tl.constexpr, OTHER: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """a0 b0 + a1 b1 + a2 b2 [SIDE, OTHER]: a product over the rank columns."""
    acc = tl.zeros((SIDE, OTHER), tl.float32)
    acc = _mma(a0, b0, acc, PRECISION, UPCAST)
    if P1 > 0:
        acc = _mma(a1, b1, acc, PRECISION, UPCAST)
    if P2 > 0:
        acc = _mma(a2, b2, acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _accumulate(
    a, b0, b1, b2, acc0, acc1, acc2, P1: tl.constexpr, P2: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Each part of acc + a b^T."""
    acc0 = _mma(a, tl.trans(b0), acc0, PRECISION, UPCAST)
    if P1 > 0:
        acc1 = _mma(a, tl.trans(b1), acc1, PRECISION, UPCAST)
    if P2 > 0:
        acc2 = _mma(a, tl.trans(b2), acc2, PRECISION, UPCAST)
    return acc0, acc1, acc2


@triton.jit
def _zeros(BLOCK: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr):
    acc0 = tl.zeros((BLOCK, P0 if P0 > 0 else 16), tl.float32)
    acc1 = tl.zeros((BLOCK, P1 if P1 > 0 else 16), tl.float32)
    acc2 = tl.zeros((BLOCK, P2 if P2 > 0 else 16), tl.float32)
    return acc0, acc1, acc2


@triton.jit
def _bias_tile(bias_ptr, n, cols, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    bias = tl.zeros((BLOCK,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < cols, other=0.0).to(tl.float32)
    return bias


@triton.jit
def _ffn_rows(
    z1_ptr, z_g_ptr, d_z2_ptr, up1_ptr, kept1_ptr, bias1_ptr, up_g_ptr, kept_g_ptr, bias_g_ptr, down2_ptr,
    d_z1_ptr, d_z_g_ptr,
    rows, hidden, rank1, kept1, rank_g, kept_g, width2, z1_stride, z_g_stride, d_z2_stride, split_stride,
    split_stride_g, hidden_per_split,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, HAS_BIAS1: tl.constexpr, KEPT1_FROM: tl.constexpr,
    HAS_BIAS_G: tl.constexpr, KEPT_G_FROM: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d z1 and, if GATE, d z_g of one row tile from z1, z_g and d z2: their parts from `hidden_per_split` columns.

    Program axis 0: row tiles. Axis 1: splits of the hidden dimension, each with its own results.
    """
    dtype: tl.constexpr = up1_ptr.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    before = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows -= tl.program_id(0) * BLOCK_M
    z0, z1, z2 = _z_parts(z1_ptr + before * z1_stride, rows, z1_stride, P0, P1, P2, BLOCK_M, False)
    d0, d1, d2 = _z_parts(d_z2_ptr + before * d_z2_stride, rows, d_z2_stride, Q0, Q1, Q2, BLOCK_M, False)
    acc0, acc1, acc2 = _zeros(BLOCK_M, P0, P1, P2)
    if GATE:
        g0, g1, g2 = _z_parts(z_g_ptr + before * z_g_stride, rows, z_g_stride, G0, G1, G2, BLOCK_M, False)
        g_acc0, g_acc1, g_acc2 = _zeros(BLOCK_M, G0, G1, G2)
    first = tl.program_id(1) * hidden_per_split
    for n0 in range(first, tl.minimum(first + hidden_per_split, hidden), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        w0, w1, w2 = _up_parts(up1_ptr, kept1_ptr, rank1, kept1, hidden, n0, KEPT1_FROM, P0, P1, P2, BLOCK_N, EVEN_N)
        pre = _contract(z0, z1, z2, w0, w1, w2, P1, P2, BLOCK_M, BLOCK_N, PRECISION, UPCAST)
        if HAS_BIAS1:
            pre += _bias_tile(bias1_ptr, n, hidden, True, BLOCK_N)[None, :]
        gate = pre
        if GATE:
            u0, u1, u2 = _up_parts(
                up_g_ptr, kept_g_ptr, rank_g, kept_g, hidden, n0, KEPT_G_FROM, G0, G1, G2, BLOCK_N, EVEN_N
            )  # fmt: skip
            gate = _contract(g0, g1, g2, u0, u1, u2, G1, G2, BLOCK_M, BLOCK_N, PRECISION, UPCAST)
            if HAS_BIAS_G:
                gate += _bias_tile(bias_g_ptr, n, hidden, True, BLOCK_N)[None, :]
        v0, v1, v2 = _down_parts(down2_ptr, width2, hidden, n0, Q0, Q1, Q2, BLOCK_N, EVEN_N)
        d_h = _contract(d0, d1, d2, v0, v1, v2, Q1, Q2, BLOCK_M, BLOCK_N, PRECISION, UPCAST)
        _, d_pre, d_gate = _hidden_gradient(pre, gate, d_h, ACTIVATION, GATE)
        d_pre = _cast(d_pre, dtype, UPCAST)
        acc0, acc1, acc2 = _accumulate(d_pre, w0, w1, w2, acc0, acc1, acc2, P1, P2, PRECISION, UPCAST)
        if GATE:
            d_gate = _cast(d_gate, dtype, UPCAST)
            g_acc0, g_acc1, g_acc2 = _accumulate(
                d_gate, u0, u1, u2, g_acc0, g_acc1, g_acc2, G1, G2, PRECISION, UPCAST
            )  # fmt: skip
    split = tl.program_id(1).to(tl.int64)
    d_z1_ptr += before * z1_stride + split * split_stride
    _store_parts(d_z1_ptr, m, rows, z1_stride, acc0, acc1, acc2, P0, P1, P2, UPCAST)
    if GATE:
        d_z_g_ptr += before * z_g_stride + split * split_stride_g
        _store_parts(d_z_g_ptr, m, rows, z_g_stride, g_acc0, g_acc1, g_acc2, G0, G1, G2, UPCAST)


@triton.jit
def _store_gradient(
    d_ptr, n, cols, acc0, acc1, acc2, width, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """All parts of a weight's gradient [width, cols], which is held transposed."""
    _store_columns(d_ptr, n, cols, acc0, 0, width, P0, UPCAST)
    if P1 > 0:
        _store_columns(d_ptr, n, cols, acc1, P0, width, P1, UPCAST)
    if P2 > 0:
        _store_columns(d_ptr, n, cols, acc2, P0 + P1, width, P2, UPCAST)


@triton.jit
def _ffn_weights(
    z1_ptr, z_g_ptr, d_z2_ptr, up1_ptr, kept1_ptr, bias1_ptr, up_g_ptr, kept_g_ptr, bias_g_ptr, down2_ptr,
    d_up1_ptr, d_bias1_ptr, d_up_g_ptr, d_bias_g_ptr, d_down2_ptr,
    rows, hidden, rank1, kept1, rank_g, kept_g, width2, z1_stride, z_g_stride, d_z2_stride, rows_per_split,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, HAS_BIAS1: tl.constexpr, KEPT1_FROM: tl.constexpr,
    HAS_BIAS_G: tl.constexpr, KEPT_G_FROM: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, G0: tl.constexpr, G1: tl.constexpr, G2: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr,
    OF_UP1: tl.constexpr, OF_UP_G: tl.constexpr, OF_DOWN2: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """d up1 = z1^T d pre and d bias1 (if OF_UP1), the gate's (if OF_UP_G), d down2 = d z2^T h (if OF_DOWN2).

    Everything is held transposed: the hidden tile is the wide first side of every product. Program axis 0: tiles of
    the hidden columns. Axis 1: splits of rows, each with its own results.
    """
    dtype: tl.constexpr = up1_ptr.dtype.element_ty
    n0 = tl.program_id(0) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    bias = _bias_tile(bias1_ptr, n, hidden, HAS_BIAS1, BLOCK_N)
    w0, w1, w2 = _up_parts(up1_ptr, kept1_ptr, rank1, kept1, hidden, n0, KEPT1_FROM, P0, P1, P2, BLOCK_N, EVEN_N)
    w0, w1, w2 = tl.trans(w0), tl.trans(w1), tl.trans(w2)
    if OF_UP1:
        acc0, acc1, acc2 = _zeros(BLOCK_N, P0, P1, P2)
        sums = tl.zeros((BLOCK_N,), tl.float32)
    if GATE:
        bias_g = _bias_tile(bias_g_ptr, n, hidden, HAS_BIAS_G, BLOCK_N)
        u0, u1, u2 = _up_parts(
            up_g_ptr, kept_g_ptr, rank_g, kept_g, hidden, n0, KEPT_G_FROM, G0, G1, G2, BLOCK_N, EVEN_N
        )  # fmt: skip
        u0, u1, u2 = tl.trans(u0), tl.trans(u1), tl.trans(u2)
        z_g_ptr += (tl.program_id(1) * rows_per_split).to(tl.int64) * z_g_stride
    if OF_UP_G:
        g_acc0, g_acc1, g_acc2 = _zeros(BLOCK_N, G0, G1, G2)
        sums_g = tl.zeros((BLOCK_N,), tl.float32)
    if OF_UP1 or OF_UP_G:
        v0, v1, v2 = _down_parts(down2_ptr, width2, hidden, n0, Q0, Q1, Q2, BLOCK_N, EVEN_N)
        v0, v1, v2 = tl.trans(v0), tl.trans(v1), tl.trans(v2)
    if OF_DOWN2:
        v_acc0, v_acc1, v_acc2 = _zeros(BLOCK_N, Q0, Q1, Q2)
    first = tl.program_id(1) * rows_per_split
    z1_ptr += first.to(tl.int64) * z1_stride
    d_z2_ptr += first.to(tl.int64) * d_z2_stride
    for m0 in range(first, tl.minimum(first + rows_per_split, rows), BLOCK_K):
        left = rows - m0
        # What a launch does not need of the following, the compiler leaves out.
        z0, z1, z2 = _z_parts(z1_ptr, left, z1_stride, P0, P1, P2, BLOCK_K, True)
        pre = _contract(w0, w1, w2, z0, z1, z2, P1, P2, BLOCK_N, BLOCK_K, PRECISION, UPCAST) + bias[:, None]
        gate = pre
        if GATE:
            g0, g1, g2 = _z_parts(z_g_ptr, left, z_g_stride, G0, G1, G2, BLOCK_K, True)
            gate = _contract(u0, u1, u2, g0, g1, g2, G1, G2, BLOCK_N, BLOCK_K, PRECISION, UPCAST) + bias_g[:, None]
            z_g_ptr += BLOCK_K * z_g_stride
        d0, d1, d2 = _z_parts(d_z2_ptr, left, d_z2_stride, Q0, Q1, Q2, BLOCK_K, True)
        d_h = pre
        if OF_UP1 or OF_UP_G:
            d_h = _contract(v0, v1, v2, d0, d1, d2, Q1, Q2, BLOCK_N, BLOCK_K, PRECISION, UPCAST)
        h, d_pre, d_gate = _hidden_gradient(pre, gate, d_h, ACTIVATION, GATE)
        if OF_UP1:
            sums += tl.sum(d_pre, 1)
            d_pre = _cast(d_pre, dtype, UPCAST)
            acc0, acc1, acc2 = _accumulate(d_pre, z0, z1, z2, acc0, acc1, acc2, P1, P2, PRECISION, UPCAST)
        if OF_UP_G:
            sums_g += tl.sum(d_gate, 1)
            d_gate = _cast(d_gate, dtype, UPCAST)
            g_acc0, g_acc1, g_acc2 = _accumulate(
                d_gate, g0, g1, g2, g_acc0, g_acc1, g_acc2, G1, G2, PRECISION, UPCAST
            )  # fmt: skip
        if OF_DOWN2:
            h = _cast(h, dtype, UPCAST)
            v_acc0, v_acc1, v_acc2 = _accumulate(h, d0, d1, d2, v_acc0, v_acc1, v_acc2, Q1, Q2, PRECISION, UPCAST)
        z1_ptr += BLOCK_K * z1_stride
        d_z2_ptr += BLOCK_K * d_z2_stride
    split = tl.program_id(1).to(tl.int64)
    if OF_UP1:
        _store_gradient(d_up1_ptr + split * rank1 * hidden, n, hidden, acc0, acc1, acc2, rank1, P0, P1, P2, UPCAST)
        tl.store(d_bias1_ptr + split * hidden + n, sums, mask=n < hidden)
    if OF_UP_G:
        d_up_g_ptr += split * rank_g * hidden
        _store_gradient(d_up_g_ptr, n, hidden, g_acc0, g_acc1, g_acc2, rank_g, G0, G1, G2, UPCAST)
        tl.store(d_bias_g_ptr + split * hidden + n, sums_g, mask=n < hidden)
    if OF_DOWN2:
        d_down2_ptr += split * width2 * hidden
        _store_gradient(d_down2_ptr, n, hidden, v_acc0, v_acc1, v_acc2, width2, Q0, Q1, Q2, UPCAST)


@triton.jit
def _wide_tile(
    z_ptr, m_in, z_stride, up_ptr, kept_ptr, bias_ptr, n0, rank, kept, cols,
    HAS_BIAS: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """:func:`_outer_tile` of a z that lies in memory, BLOCK_K of its columns at a time."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, rank + kept, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        z = tl.load(z_ptr + (m_in[:, None] * z_stride + k[None, :]), mask=(k < z_stride)[None, :], other=0.0)
        w = _up_tile(
            up_ptr + k0 * cols, kept_ptr, rank - k0, kept, cols, n0, 0, BLOCK_K, BLOCK_N, EVEN, HAS_KEPT
        )  # fmt: skip
        acc = _mma(z, w, acc, PRECISION, UPCAST)
    if HAS_BIAS:
        acc += _bias_tile(bias_ptr, n0 + tl.arange(0, BLOCK_N), cols, True, BLOCK_N)[None, :]
    return acc


@triton.jit
def _ffn_wide(
    z1_ptr, z_g_ptr, up1_ptr, kept1_ptr, bias1_ptr, up_g_ptr, kept_g_ptr, bias_g_ptr, down2_ptr, z2_ptr,
    rows, hidden, rank1, kept1, rank_g, kept_g, width2, z1_stride, z_g_stride, z2_stride, split_stride,
    hidden_per_split, passes,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_KEPT1: tl.constexpr,
    HAS_BIAS_G: tl.constexpr, HAS_KEPT_G: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Q0 + Q1 + Q2 columns of z2 of one row tile, their part from `hidden_per_split` hidden columns, from z1 and z_g.

    Program axis 0: row tiles times `passes` over z2's columns, each of which makes the hidden tile anew; the row tile
    slowest, so that neighbours share z1. Axis 1: splits of the hidden dimension, each with its own z2.
    """
    dtype: tl.constexpr = up1_ptr.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    row_tile = tl.program_id(0) // passes
    column = (tl.program_id(0) % passes) * (Q0 + Q1 + Q2)
    before = row_tile.to(tl.int64) * BLOCK_M
    rows -= row_tile * BLOCK_M
    m_in = tl.minimum(m, rows - 1)
    z1_ptr += before * z1_stride
    z_g_ptr += before * z_g_stride
    z2_ptr += before * z2_stride + tl.program_id(1).to(tl.int64) * split_stride
    down2_ptr += column.to(tl.int64) * hidden
    left = width2 - column
    acc0, acc1, acc2 = _zeros(BLOCK_M, Q0, Q1, Q2)
    first = tl.program_id(1) * hidden_per_split
    for n0 in range(first, tl.minimum(first + hidden_per_split, hidden), BLOCK_N):
        h = _wide_tile(
            z1_ptr, m_in, z1_stride, up1_ptr, kept1_ptr, bias1_ptr, n0, rank1, kept1, hidden,
            HAS_BIAS1, HAS_KEPT1, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, PRECISION, UPCAST,
        )  # fmt: skip
        if GATE:
            g = _wide_tile(
                z_g_ptr, m_in, z_g_stride, up_g_ptr, kept_g_ptr, bias_g_ptr, n0, rank_g, kept_g, hidden,
                HAS_BIAS_G, HAS_KEPT_G, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, PRECISION, UPCAST,
            )  # fmt: skip
            h *= activate(g, ACTIVATION)
        else:
            h = activate(h, ACTIVATION)
        h = _cast(h, dtype, UPCAST)
        acc0 = _mma(h, _down_tile(down2_ptr, left, hidden, n0, 0, Q0, BLOCK_N, EVEN_N), acc0, PRECISION, UPCAST)
        if Q1 > 0:
            acc1 = _mma(h, _down_tile(down2_ptr, left, hidden, n0, Q0, Q1, BLOCK_N, EVEN_N), acc1, PRECISION, UPCAST)
        if Q2 > 0:
            v2 = _down_tile(down2_ptr, left, hidden, n0, Q0 + Q1, Q2, BLOCK_N, EVEN_N)
            acc2 = _mma(h, v2, acc2, PRECISION, UPCAST)
    _store_part(z2_ptr, m, rows, z2_stride, acc0, column, z2_stride, Q0, UPCAST)
    if Q1 > 0:
        _store_part(z2_ptr, m, rows, z2_stride, acc1, column + Q0, z2_stride, Q1, UPCAST)
    if Q2 > 0:
        _store_part(z2_ptr, m, rows, z2_stride, acc2, column + Q0 + Q1, z2_stride, Q2, UPCAST)


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


def _held(
    first: Factors, second: Factors, gate: Factors | None, launch: Launch
) -> tuple[dict[str, int], tuple[int, int, int]]:
    """The constants that say how the rank columns of all factors are cut, and the parts of ``second``."""
    parts1, parts2 = _cut("down1", first, launch), _cut("down2", second, launch)
    parts_g = (0, 0, 0) if gate is None else _cut("gate", gate, launch)
    if gate is not None and first.width + gate.width > launch.max_width:
        widths = f"{first.width} + {gate.width}"
        raise ValueError(f"down1, gate: expected at most {launch.max_width} rows for {launch.name}, got {widths}")
    names = ("P0", "P1", "P2", "G0", "G1", "G2", "Q0", "Q1", "Q2")
    constants = dict(zip(names, (*parts1, *parts_g, *parts2)))
    constants["KEPT1_FROM"] = _kept_from(first, parts1)
    constants["KEPT_G_FROM"] = 3 if gate is None else _kept_from(gate, parts_g)
    return constants, parts2


def _pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    """``tensor``, or for an argument that the kernel does not read ``other``."""
    return other if tensor is None else tensor


def _outer_factors(factors: Factors, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """up, kept and bias as kernels take them."""
    return factors.up, _pointer(factors.kept, other), _pointer(factors.bias, other)


def _sizes(*all_factors: Factors) -> tuple[int, ...]:
    """(rank, kept) of each."""
    return tuple(size for factors in all_factors for size in (factors.rank, factors.width - factors.rank))


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
    return _forward(x, first, second, launch, gate, activation, residual, norm, second.cols, False)[0]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, and what :func:`backward` needs: z1, z_g (empty without a gate) and z2, each [rows, pitch].

    Raises:
        ValueError: as for :func:`forward`.
    """
    return _forward(x, first, second, launch, gate, activation, residual, norm, second.cols, True)


def intermediates(
    x: Tensor, first: Factors, second: Factors, launch: Launch, *, gate: Factors | None = None, activation: str = "gelu"
) -> tuple[Tensor, Tensor, Tensor]:
    """z1, z_g and z2 of :func:`forward_with_z` alone: no column of y is made."""
    return _forward(x, first, second, launch, gate, activation, None, None, 0, True)[1:]


def _forward(
    x: Tensor,
    first: Factors,
    second: Factors,
    launch: Launch,
    gate: Factors | None,
    activation: str,
    residual: Tensor | None,
    norm: Norm | None,
    cols: int,
    save_z: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The first ``cols`` columns of y (all or none of them), z1, z_g and z2."""
    rows, depth = x.shape
    hidden = first.cols
    held, parts2 = _held(first, second, gate, launch)
    gated = first if gate is None else gate
    block_k = _block_k(launch, x.dtype)
    y = x.new_empty((rows, cols))
    row_tiles = -(-rows // launch.block_m)
    splits, per_split = _spread(launch, row_tiles, hidden, x)
    length1, length_g, length = pitch(first.width), pitch(gated.width), pitch(second.width)
    parts = x.new_empty((splits, rows, length) if splits > 1 else 0, dtype=torch.float32)
    z1, z2 = (x.new_empty((rows, stride) if save_z else 0) for stride in (length1, length))
    z_g = x.new_empty((rows, length_g) if save_z and gate is not None else 0)
    kind = "none" if norm is None else norm.kind
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    result = {
        "SAVE_Z": save_z, "HAS_BIAS2": second.bias is not None, "KEPT2_FROM": _kept_from(second, parts2),
        "HAS_RESIDUAL": residual is not None, "NORM": kind,
        "NORM_BIAS": bias is not None, "EPS": 0.0 if norm is None else norm.eps,
        "EVEN_C": cols % launch.block_n == 0, **_common(x.dtype),
    }  # fmt: skip
    tail = (*_outer_factors(second, x), *(_pointer(tensor, x) for tensor in (residual, weight, bias)))
    residual_stride = 0 if residual is None else residual.stride(0)
    if rows:
        start(
            _ffn, (row_tiles, splits),
            x, first.down, *_outer_factors(first, x), gated.down, *_outer_factors(gated, x), second.down,
            *tail, y, parts, z1, z_g, z2,
            rows, depth, hidden, cols, *_sizes(first, gated, second), x.stride(0), residual_stride,
            length1, length_g, length, rows * length, per_split,
            ACTIVATION=activation, GATE=gate is not None, SPLIT=splits > 1,
            HAS_BIAS1=first.bias is not None, HAS_BIAS_G=gated.bias is not None, **held,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=block_k,
            EVEN_K=depth % block_k == 0, EVEN_N=hidden % launch.block_n == 0,
            **result, num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    if rows and splits > 1:
        finish_rows = min(FINISH_ROWS, launch.block_m)
        # Without a norm, columns are independent of each other.
        column_tiles = max(-(-cols // launch.block_n), 1)
        programs = max(multiprocessors(x) // -(-rows // finish_rows), 1) if kind == "none" else 1
        per_program = -(-column_tiles // min(programs, column_tiles)) * launch.block_n
        start(
            _finish, (-(-rows // finish_rows), -(-column_tiles * launch.block_n // per_program)),
            parts, *tail, y, z2,
            rows, cols, *_sizes(second), splits, length, rows * length,
            residual_stride, per_program,
            **result, Q0=parts2[0], Q1=parts2[1], Q2=parts2[2], BLOCK_M=finish_rows, BLOCK_N=launch.block_n,
            num_warps=min(launch.num_warps, 4), num_stages=launch.num_stages,
        )  # fmt: skip
    return y, z1, z_g, z2


def forward_wide(
    x: Tensor,
    first: Factors,
    second: Factors,
    launches: WideLaunches,
    *,
    gate: Factors | None = None,
    activation: str = "gelu",
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """:func:`forward` at any number of rank columns, in passes; the hidden activation is never written.

    z1 is written, and read again in steps of a rank loop inside the loop over hidden tiles; z2 is made in passes over
    its columns, each with the hidden tile made anew.
    """
    # Counted at 4,096 rows of 768/3072 in 16 bits, ranks 384 / 768 / 1024, for 800 TFLOP/s and 3 TB/s:
    # - these passes (2 / 3 / 4): 34 / 87 / 142 GFLOP, 42 / 109 / 177 us, with z1 and z2 the only intermediates.
    # - the hidden tile made once, with a float32 part of z2 in memory for every 256 hidden columns: the 30 / 60 / 81 us
    #   of the layers' products, and 151 / 302 / 403 MB of parts written and read, 50 / 101 / 134 us.
    # - the layers one by one: 30 / 60 / 81 us of products. The hidden activation's 50 MB, 17 us, hide behind them.
    # So passes are the less bad block, and the rule takes the layers one by one.
    rows, hidden = x.shape[0], first.cols
    launch, gated = launches.wide, first if gate is None else gate
    z1, _, _ = project(x, first.down, launches.project, keep_splits=False)
    z_g = z1 if gate is None else project(x, gate.down, launches.project, keep_splits=False)[0]
    parts, passes = split_width(second.width, launch.max_width)
    row_tiles = -(-rows // launch.block_m)
    splits, per_split = _spread(launch, row_tiles * passes, hidden, x)
    z2 = x.new_empty((splits, rows, pitch(second.width)), dtype=x.dtype if splits == 1 else torch.float32)
    if rows:
        start(
            _ffn_wide, (row_tiles * passes, splits),
            z1, z_g, *_outer_factors(first, x), *_outer_factors(gated, x), second.down, z2,
            rows, hidden, *_sizes(first, gated), second.width, z1.shape[1], z_g.shape[1], z2.shape[2],
            rows * z2.shape[2], per_split, passes,
            ACTIVATION=activation, GATE=gate is not None,
            HAS_BIAS1=first.bias is not None, HAS_KEPT1=first.kept is not None,
            HAS_BIAS_G=gated.bias is not None, HAS_KEPT_G=gated.kept is not None,
            Q0=parts[0], Q1=parts[1], Q2=parts[2],
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=_block_k(launch, x.dtype),
            EVEN_N=hidden % launch.block_n == 0,
            **_common(x.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    summed = z2[0] if splits == 1 else z2.sum(0).to(x.dtype)
    y, _ = expand(summed, 1, second.up, x.dtype, launches.expand, second.kept, second.bias)
    if residual is not None:
        y += residual
    if norm is None:
        return y
    if norm.kind == "layer":
        return F.layer_norm(y, (second.cols,), norm.weight, norm.bias, norm.eps)
    return F.rms_norm(y, (second.cols,), norm.weight, norm.eps)


def hidden_rows(
    z1: Tensor,
    z_g: Tensor,
    d_z2: Tensor,
    first: Factors,
    second: Factors,
    launch: Launch,
    gate: Factors | None = None,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor]:
    """d z1 and d z_g [rows, pitch] from z1, z_g and d z2 [rows, pitch]: the hidden gradient is never written."""
    rows, hidden = z1.shape[0], first.cols
    gated = first if gate is None else gate
    held, _ = _held(first, second, gate, launch)
    row_tiles = -(-rows // launch.block_m)
    splits, per_split = _spread(launch, row_tiles, hidden, z1)
    dtype = z1.dtype if splits == 1 else torch.float32
    d_z1, d_z_g = (z.new_empty((splits, *z.shape), dtype=dtype) for z in (z1, z_g))
    stride_g = 0 if gate is None else z_g.shape[1]
    if rows:
        start(
            _ffn_rows, (row_tiles, splits),
            z1, z_g, d_z2, *_outer_factors(first, z1), *_outer_factors(gated, z1), second.down, d_z1, d_z_g,
            rows, hidden, *_sizes(first, gated), second.width, z1.shape[1], stride_g, d_z2.shape[1],
            rows * z1.shape[1], rows * stride_g, per_split,
            ACTIVATION=activation, GATE=gate is not None,
            HAS_BIAS1=first.bias is not None, HAS_BIAS_G=gated.bias is not None, **held,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, EVEN_N=hidden % launch.block_n == 0,
            **_common(z1.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    d_z1, d_z_g = (part[0] if splits == 1 else part.sum(0).to(z1.dtype) for part in (d_z1, d_z_g))
    return d_z1, d_z_g


def hidden_weights(
    z1: Tensor,
    z_g: Tensor,
    d_z2: Tensor,
    first: Factors,
    second: Factors,
    launch: Launch,
    gate: Factors | None = None,
    activation: str = "gelu",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients that read the hidden activation or its gradient: of up1, bias1, the gate's up and bias, down2.

    Those of the gate are empty without one.
    """
    rows, hidden = z1.shape[0], first.cols
    gated = first if gate is None else gate
    held, _ = _held(first, second, gate, launch)
    tiles = -(-hidden // launch.block_n)
    steps = max(-(-rows // launch.block_k), 1)
    # Each split costs a write and a read of the results: at least 4 steps in each.
    splits = launch.splits or max(multiprocessors(z1) // max(tiles, 1), 1)
    per_split = -(-steps // max(min(splits, steps // 4), 1)) * launch.block_k
    splits = max(-(-rows // per_split), 1)
    sizes_g = ((0,), (0,)) if gate is None else ((gate.rank, hidden), (hidden,))
    sizes = (first.rank, hidden), (hidden,), *sizes_g, (second.width, hidden)
    if rows == 0:
        return tuple(z1.new_zeros(size) for size in sizes)
    dtype = z1.dtype if splits == 1 else torch.float32
    results = [z1.new_empty((splits, *size), dtype=torch.float32 if len(size) == 1 else dtype) for size in sizes]
    widths = {"OF_UP1": first.width, "OF_UP_G": 0 if gate is None else gate.width, "OF_DOWN2": second.width}
    wanted = [name for name, width in widths.items() if width]
    # Where the results do not fit into the registers at once the hidden tile is made once for each.
    together = [wanted] if sum(widths.values()) <= launch.max_width else [[name] for name in wanted]
    for names in together:
        start(
            _ffn_weights, (tiles, splits),
            z1, z_g, d_z2, *_outer_factors(first, z1), *_outer_factors(gated, z1), second.down, *results,
            rows, hidden, *_sizes(first, gated), second.width,
            z1.shape[1], 0 if gate is None else z_g.shape[1], d_z2.shape[1], per_split,
            ACTIVATION=activation, GATE=gate is not None,
            HAS_BIAS1=first.bias is not None, HAS_BIAS_G=gated.bias is not None, **held,
            BLOCK_N=launch.block_n, BLOCK_K=launch.block_k, EVEN_N=hidden % launch.block_n == 0,
            **{name: name in names for name in widths},
            **_common(z1.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return tuple((part[0] if splits == 1 else part.sum(0)).to(z1.dtype) for part in results)


def backward(
    grad: Tensor,
    x: Tensor,
    saved: Sequence[Tensor],
    first: Factors,
    second: Factors,
    launches: BackwardLaunches,
    *,
    gate: Factors | None = None,
    activation: str = "gelu",
    needs: Sequence[bool] = (True,) * 10,
) -> Gradients:
    """Gradients from ``grad`` [rows, out], that of F2(h), and z1, z_g and z2 as :func:`forward_with_z` saved them.

    Those that ``needs`` (as many as :class:`Gradients`) leaves out may be None.

    Raises:
        ValueError: a factor with more columns (rank + kept) than a launch holds, or ``first`` and ``gate`` together.
    """
    z1, z_g, z2 = saved
    need = dict(zip(Gradients._fields, needs))
    found: dict[str, Tensor | None] = dict.fromkeys(Gradients._fields)
    d_z2, _, _ = project(grad, second.up, launches.project, second.kept, keep_splits=False)
    if second.kept is not None and d_z2.shape[1] > second.width:
        d_z2[:, second.width :].zero_()  # gathered columns come without padding, and 0 times NaN is NaN
    if need["x"] or need["down1"] or need["down_gate"]:
        d_z1, d_z_g = hidden_rows(z1, z_g, d_z2, first, second, launches.rows, gate, activation)
        if need["x"]:
            found["x"], _ = expand(d_z1, 1, first.down, x.dtype, launches.expand)
            if gate is not None:
                found["x"] += expand(d_z_g, 1, gate.down, x.dtype, launches.expand)[0]
        if need["down1"]:
            found["down1"], _ = outer(d_z1, first.width, x, launches.outer)
        if need["down_gate"] and gate is not None:
            found["down_gate"], _ = outer(d_z_g, gate.width, x, launches.outer)
    if need["up1"] or need["bias1"] or need["up_gate"] or need["bias_gate"] or need["down2"]:
        names = ("up1", "bias1", "up_gate", "bias_gate", "down2")
        gradients = hidden_weights(z1, z_g, d_z2, first, second, launches.weights, gate, activation)
        found.update(zip(names, gradients))
    if need["up2"] or need["bias2"]:
        found["up2"], found["bias2"] = outer(z2, second.rank, grad, launches.outer, need["bias2"])
    return Gradients(**found)
