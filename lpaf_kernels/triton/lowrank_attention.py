"""Kernels of lowrank_attention: attention from packed low-rank factors, without Q, K or V in memory.

`project` (of :mod:`.lowrank_sparse_linear`) reads x once for z = x [u_q | s_q | u_k | s_k | u_v | s_v]. A program of
`_attend` then makes the query tile of one head, z_q v_q + kept columns + bias, and goes over the keys: each tile of K
and V is made from z when it is needed and forgotten, softmax and context are accumulated in float32 (online softmax, in
powers of 2). `_close` ends the block: y = norm(context u_o v_o + kept columns + bias + residual), z_o stays on chip.

Every query tile makes K and V of its sequence anew: tall tiles make them less often. Packing, kept columns and parts of
ranks are those of :mod:`.lowrank_sparse_linear`; the tiles of products and the norm are those of :mod:`.lowrank_ffn`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops._blocks import Norm
from .launch import ALIGNED, HEAD_DIMS, Launch, head_columns, start
from .lowrank_ffn import Factors, _cut, _inner, _kept_from, _outer_tile, _result
from .lowrank_sparse_linear import _block_k, _cast, _common, _mma

_LOG2_E = tl.constexpr(math.log2(math.e))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)
_ALIGNED = tl.constexpr(ALIGNED)


class Projection(NamedTuple):
    """One of Q, K and V: its first column in z, up [rank, heads * head_dim], sorted kept positions, bias.

    ``width`` counts the columns of z that a program holds: rank, kept and those before the first that are read with it.
    """

    first: int
    up: Tensor
    kept: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.up.shape[0]

    @property
    def columns_kept(self) -> int:
        return 0 if self.kept is None else self.kept.shape[0]

    @property
    def lead(self) -> int:
        return self.first % ALIGNED

    @property
    def width(self) -> int:
        return self.lead + self.rank + self.columns_kept


@triton.jit
def _columns(z_ptr, first, offsets, columns, FIRST: tl.constexpr, PART: tl.constexpr):
    """Columns first + FIRST.. of the rows of z at ``offsets``; a row holds ``columns``.

    Loaded in whole 16-byte pieces to the end of the row: the weights have 0 where there are other columns.
    """
    n = first + FIRST + tl.arange(0, PART)
    return tl.load(z_ptr + (offsets[:, None] + n[None, :]), mask=(n < columns)[None, :], other=0.0)


@triton.jit
def _head(
    z_ptr, first, offsets, columns, up_ptr, kept_ptr, bias_ptr, n0, rank, kept, cols,
    LEAD: tl.constexpr, HAS_BIAS: tl.constexpr, KEPT_FROM: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BLOCK: tl.constexpr, HALF: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """D0 columns from n0 and D1 (none if 0) from n0 + HALF of Q, K or V, in float32, for the rows at ``offsets``."""
    first = tl.multiple_of(first, _ALIGNED)
    z0 = _columns(z_ptr, first, offsets, columns, 0, P0)
    z1 = z0
    z2 = z0
    if P1 > 0:
        z1 = _columns(z_ptr, first, offsets, columns, P0, P1)
    if P2 > 0:
        z2 = _columns(z_ptr, first, offsets, columns, P0 + P1, P2)
    tile0 = _outer_tile(
        z0, z1, z2, up_ptr, kept_ptr, bias_ptr, n0, rank, kept, cols, HAS_BIAS, KEPT_FROM,
        P0, P1, P2, BLOCK, D0, EVEN, PRECISION, UPCAST, LEAD,
    )  # fmt: skip
    tile1 = tile0
    if D1 > 0:
        tile1 = _outer_tile(
            z0, z1, z2, up_ptr, kept_ptr, bias_ptr, n0 + HALF, rank, kept, cols, HAS_BIAS, KEPT_FROM,
            P0, P1, P2, BLOCK, D1, EVEN, PRECISION, UPCAST, LEAD,
        )  # fmt: skip
    return tile0, tile1


@triton.jit
def _turn(pointer, offsets, FIRST: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Half of a cosine or sine tile, 0 beyond: what lies there in a head's tile becomes 0 as well."""
    n = tl.arange(0, BLOCK)
    tile = tl.load(pointer + (offsets[:, None] + (FIRST + n)[None, :]), mask=(n < HALF)[None, :], other=0.0)
    return tile.to(tl.float32)


@triton.jit
def _rotate(x0, x1, cos_ptr, sin_ptr, cos_offsets, sin_offsets, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """x cos + [-x1 | x0] sin for the halves x0 and x1 of x."""
    y0 = x0 * _turn(cos_ptr, cos_offsets, 0, HALF, BLOCK) - x1 * _turn(sin_ptr, sin_offsets, 0, HALF, BLOCK)
    y1 = x1 * _turn(cos_ptr, cos_offsets, HALF, HALF, BLOCK) + x0 * _turn(sin_ptr, sin_offsets, HALF, HALF, BLOCK)
    return y0, y1


@triton.jit
def _masked(scores, mask_ptr, m0, n, row_stride, key_stride, length, MASK: tl.constexpr, MASK_ROWS: tl.constexpr):
    """Scores (in powers of 2) of rows m0.. under a mask whose rows differ if MASK_ROWS."""
    if MASK_ROWS:
        m = tl.arange(0, scores.shape[0])
        mask_ptr += m0.to(tl.int64) * row_stride
        inside = (m < length - m0)[:, None] & (n < length)[None, :]
        mask = tl.load(mask_ptr + (m[:, None] * row_stride + n[None, :] * key_stride), mask=inside, other=0)
    else:
        mask = tl.load(mask_ptr + n * key_stride, mask=n < length, other=0)[None, :]
    if MASK == "bool":
        return tl.where(mask != 0, scores, float("-inf"))
    else:
        # The lowest number stays finite: a row of nothing else is attended to evenly, as in torch.
        mask = mask.to(tl.float32)
        return scores + tl.where(mask == float("-inf"), mask, tl.maximum(mask * _LOG2_E, _LOWEST))


@triton.jit
def _attend(
    z_ptr, up_q_ptr, kept_q_ptr, bias_q_ptr, up_k_ptr, kept_k_ptr, bias_k_ptr, up_v_ptr, kept_v_ptr, bias_v_ptr,
    mask_ptr, cos_ptr, sin_ptr, bounds_ptr, y_ptr,
    length, tiles, columns, first_q, rank_q, kept_q, first_k, rank_k, kept_k, first_v, rank_v, kept_v,
    z_stride, mask_batch_stride, mask_head_stride, mask_row_stride, mask_key_stride,
    cos_stride, sin_stride, rotary_step,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, SCALE: tl.constexpr,
    MASK: tl.constexpr, MASK_ROWS: tl.constexpr, CAUSAL: tl.constexpr, VARIABLE: tl.constexpr, ROTARY: tl.constexpr,
    LEAD_Q: tl.constexpr, HAS_BIAS_Q: tl.constexpr, KEPT_Q_FROM: tl.constexpr,
    LEAD_K: tl.constexpr, HAS_BIAS_K: tl.constexpr, KEPT_K_FROM: tl.constexpr,
    LEAD_V: tl.constexpr, HAS_BIAS_V: tl.constexpr, KEPT_V_FROM: tl.constexpr,
    Q0: tl.constexpr, Q1: tl.constexpr, Q2: tl.constexpr, K0: tl.constexpr, K1: tl.constexpr, K2: tl.constexpr,
    V0: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The context of BLOCK_M query rows and one head.

    Q and K are made in D0 columns, or if ROTARY in halves of D0 and D1, V in D: HEAD and HEAD / 2 padded to powers of
    two. Program axis 0: sequences times heads times query tiles, the latter fastest, so that neighbours share z.
    """
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    half: tl.constexpr = HEAD // 2
    # Padded tiles reach beyond the last head's columns.
    even_qk: tl.constexpr = (half == D0) if ROTARY else (HEAD == D0)
    m0 = (tl.program_id(0) % tiles) * BLOCK_M
    head = tl.program_id(0) // tiles % HEADS
    sequence = tl.program_id(0) // tiles // HEADS
    before = sequence.to(tl.int64) * length
    if VARIABLE:
        before = tl.load(bounds_ptr + sequence).to(tl.int64)
        length = (tl.load(bounds_ptr + sequence + 1) - before).to(tl.int32)
        if m0 >= length:
            return
    # From here on this sequence's rows: offsets of 32 bits from one pointer take half the registers that pointers take.
    z_ptr += before * z_stride
    y_ptr += before * (HEADS * HEAD)
    cos_ptr += before * rotary_step * cos_stride
    sin_ptr += before * rotary_step * sin_stride
    mask_ptr += sequence.to(tl.int64) * mask_batch_stride + head.to(tl.int64) * mask_head_stride
    m = m0 + tl.arange(0, BLOCK_M)
    m_in = tl.minimum(m, length - 1)
    q0, q1 = _head(
        z_ptr, first_q, m_in * z_stride, columns, up_q_ptr, kept_q_ptr, bias_q_ptr, head * HEAD,
        rank_q, kept_q, HEADS * HEAD, LEAD_Q, HAS_BIAS_Q, KEPT_Q_FROM,
        Q0, Q1, Q2, BLOCK_M, half, D0, D1, even_qk, PRECISION, UPCAST,
    )  # fmt: skip
    if ROTARY:
        q0, q1 = _rotate(q0, q1, cos_ptr, sin_ptr, m_in * cos_stride, m_in * sin_stride, half, D0)
    elif HEAD < D0:
        q0 = tl.where((tl.arange(0, D0) < HEAD)[None, :], q0, 0.0)
    q0 = _cast(q0 * (SCALE * _LOG2_E), dtype, UPCAST)
    q1 = _cast(q1 * (SCALE * _LOG2_E), dtype, UPCAST)
    kv0 = head // GROUP * HEAD
    kv_cols: tl.constexpr = HEADS // GROUP * HEAD
    most = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    stop = tl.minimum(m0 + BLOCK_M, length) if CAUSAL else length
    for n0 in range(0, stop, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        n_in = n if EVEN else tl.minimum(n, length - 1)
        k0, k1 = _head(
            z_ptr, first_k, n_in * z_stride, columns, up_k_ptr, kept_k_ptr, bias_k_ptr, kv0,
            rank_k, kept_k, kv_cols, LEAD_K, HAS_BIAS_K, KEPT_K_FROM,
            K0, K1, K2, BLOCK_N, half, D0, D1, even_qk, PRECISION, UPCAST,
        )  # fmt: skip
        if ROTARY:
            k0, k1 = _rotate(k0, k1, cos_ptr, sin_ptr, n_in * cos_stride, n_in * sin_stride, half, D0)
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        scores = _mma(q0, tl.trans(_cast(k0, dtype, UPCAST)), scores, PRECISION, UPCAST)
        if ROTARY:
            scores = _mma(q1, tl.trans(_cast(k1, dtype, UPCAST)), scores, PRECISION, UPCAST)
        if MASK != "none":
            scores = _masked(scores, mask_ptr, m0, n, mask_row_stride, mask_key_stride, length, MASK, MASK_ROWS)
        if CAUSAL:
            scores = tl.where(m[:, None] >= n[None, :], scores, float("-inf"))
        if not EVEN:
            scores = tl.where((n < length)[None, :], scores, float("-inf"))
        most_before = most
        most = tl.maximum(most, tl.max(scores, 1))
        # While a row has met no key its maximum is -inf, and -inf - -inf is not a number.
        shift = tl.where(most == float("-inf"), 0.0, most)
        p = tl.exp2(scores - shift[:, None])
        shrink = tl.exp2(most_before - shift)
        total = total * shrink + tl.sum(p, 1)
        v, _ = _head(
            z_ptr, first_v, n_in * z_stride, columns, up_v_ptr, kept_v_ptr, bias_v_ptr, kv0,
            rank_v, kept_v, kv_cols, LEAD_V, HAS_BIAS_V, KEPT_V_FROM,
            V0, V1, V2, BLOCK_N, 0, D, 0, HEAD == D, PRECISION, UPCAST,
        )  # fmt: skip
        acc = acc * shrink[:, None]
        acc = _mma(_cast(p, dtype, UPCAST), _cast(v, dtype, UPCAST), acc, PRECISION, UPCAST)
    # A row without keys gives 0.
    acc /= tl.where(total == 0.0, 1.0, total)[:, None]
    d = tl.arange(0, D)
    tl.store(
        y_ptr + head * HEAD + (m[:, None] * (HEADS * HEAD) + d[None, :]),
        _cast(acc, dtype, UPCAST),
        mask=(m < length)[:, None] & (d < HEAD)[None, :],
    )


@triton.jit
def _close(
    x_ptr, down_ptr, up_ptr, kept_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,
    rows, depth, cols, rank, kept, x_stride, residual_stride,
    HAS_BIAS: tl.constexpr, KEPT_FROM: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    NORM: tl.constexpr, NORM_BIAS: tl.constexpr, EPS: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y = norm(x down^T up + kept columns + bias + residual) for one row tile. Program axis 0: row tiles."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    m = tl.arange(0, BLOCK_M)
    before = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows -= tl.program_id(0) * BLOCK_M
    x_ptr += before * x_stride
    residual_ptr += before * residual_stride
    y_ptr += before * cols
    z0, z1, z2 = _inner(
        x_ptr, down_ptr, tl.minimum(m, rows - 1), rank + kept, depth, x_stride, dtype,
        P0, P1, P2, BLOCK_M, BLOCK_K, EVEN_K, PRECISION, UPCAST,
    )  # fmt: skip
    _result(
        z0, z1, z2, up_ptr, kept_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, y_ptr,
        m, 0, cols, rows, rank, kept, cols, residual_stride,
        HAS_BIAS, KEPT_FROM, HAS_RESIDUAL, NORM, NORM_BIAS, EPS,
        P0, P1, P2, BLOCK_M, BLOCK_N, EVEN_N, PRECISION, UPCAST,
    )  # fmt: skip


def _mask_strides(mask: Tensor | None) -> tuple[int, int, int, int]:
    """Strides of a mask [B or 1, H or 1, Lq or 1, Lk], 0 where it is broadcast."""
    if mask is None:
        return 0, 0, 0, 0
    batch, head, row = (0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride()))
    return batch, head, row, mask.stride(3)


def attend(
    z: Tensor,
    q: Projection,
    k: Projection,
    v: Projection,
    launch: Launch,
    *,
    num_heads: int,
    num_kv_heads: int,
    length: int,
    scale: float,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Context [rows, num_heads * head_dim] of z [rows, pitch], :func:`project`'s of the packed down_qkv.

    Args:
        z: columns of one row side by side; finite up to its last column, padding included.
        q, k, v: where z holds the columns of each, and what makes Q, K and V of them.
        num_heads, num_kv_heads: the former divisible by the latter.
        length: of every sequence, or with ``cu_seqlens`` (int32 [sequences + 1], from 0 to rows) of the longest.
        scale: of the scores.
        mask: [B or 1, H or 1, L or 1, L], bool (True: attend) or a number to add to the scores. Not with
            ``cu_seqlens``.
        is_causal: row i attends to rows up to i of its sequence.
        rotary: cos and sin, [rows, head_dim] or, without ``cu_seqlens``, [length, head_dim] for every sequence. Q and K
            become q cos + [-q2 | q1] sin of their halves q1 and q2.

    A row that attends to nothing gives 0.

    Raises:
        ValueError: more columns (rank + kept) or a wider head than ``launch`` holds, a head of another width than 32,
            64, 96 or 128, a mask with ``cu_seqlens``.
    """
    rows = z.shape[0]
    head_dim = q.up.shape[1] // num_heads
    _check_head(head_dim, rotary is not None, launch)
    if mask is not None and cu_seqlens is not None:
        raise ValueError(f"mask: expected None with cu_seqlens, got {list(mask.shape)}")
    parts = [_cut(name, projection, launch) for name, projection in (("q", q), ("k", k), ("v", v))]
    context = q.up.new_empty((rows, num_heads * head_dim))
    sequences = rows // max(length, 1) if cu_seqlens is None else cu_seqlens.shape[0] - 1
    tiles = -(-length // launch.block_m)
    side, half = triton.next_power_of_2(head_dim), triton.next_power_of_2(head_dim // 2)
    cos, sin = (z, z) if rotary is None else rotary
    shared = rotary is not None and cu_seqlens is None and cos.shape[0] == length

    def pointers(projection: Projection) -> tuple[Tensor, Tensor, Tensor]:
        return projection.up, *(z if tensor is None else tensor for tensor in (projection.kept, projection.bias))

    if rows and sequences * tiles:
        start(
            _attend, (sequences * num_heads * tiles,),
            z, *pointers(q), *pointers(k), *pointers(v),
            z if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask, cos, sin,
            z if cu_seqlens is None else cu_seqlens, context,
            length, tiles, z.shape[1],
            *(size for one in (q, k, v) for size in (one.first - one.lead, one.lead + one.rank, one.columns_kept)),
            z.stride(0), *_mask_strides(mask), cos.stride(0), sin.stride(0), 0 if shared else 1,
            HEADS=num_heads, GROUP=num_heads // num_kv_heads, HEAD=head_dim, SCALE=scale,
            MASK="none" if mask is None else "bool" if mask.dtype == torch.bool else "float",
            MASK_ROWS=mask is not None and mask.shape[2] > 1,
            CAUSAL=is_causal, VARIABLE=cu_seqlens is not None, ROTARY=rotary is not None,
            LEAD_Q=q.lead, HAS_BIAS_Q=q.bias is not None, KEPT_Q_FROM=_kept_from(q, parts[0]),
            LEAD_K=k.lead, HAS_BIAS_K=k.bias is not None, KEPT_K_FROM=_kept_from(k, parts[1]),
            LEAD_V=v.lead, HAS_BIAS_V=v.bias is not None, KEPT_V_FROM=_kept_from(v, parts[2]),
            Q0=parts[0][0], Q1=parts[0][1], Q2=parts[0][2], K0=parts[1][0], K1=parts[1][1], K2=parts[1][2],
            V0=parts[2][0], V1=parts[2][1], V2=parts[2][2],
            D0=side if rotary is None else half, D1=0 if rotary is None else half, D=side,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
            EVEN=cu_seqlens is None and length % launch.block_n == 0,
            **_common(z.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return context


def _check_head(head_dim: int, rotary: bool, launch: Launch) -> None:
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim: expected 32, 64, 96 or 128, got {head_dim}")
    if head_columns(head_dim, rotary) > launch.block_k:
        most = launch.block_k // head_columns(1, rotary)
        raise ValueError(f"head_dim: expected at most {most} for {launch.name}, got {head_dim}")


def close(
    context: Tensor, out: Factors, launch: Launch, residual: Tensor | None = None, norm: Norm | None = None
) -> Tensor:
    """y [rows, out] = norm(context [rows, in] through ``out`` + residual), z kept on chip.

    Raises:
        ValueError: more columns (rank + kept) than ``launch`` holds.
    """
    rows, depth = context.shape
    parts = _cut("down_o", out, launch)
    block_k = _block_k(launch, context.dtype)
    y = context.new_empty((rows, out.cols))
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)

    def pointer(tensor: Tensor | None) -> Tensor:
        return context if tensor is None else tensor

    if rows and out.cols:
        start(
            _close, (-(-rows // launch.block_m),),
            context, out.down, out.up, pointer(out.kept), pointer(out.bias), pointer(residual), pointer(weight),
            pointer(bias), y,
            rows, depth, out.cols, out.rank, out.width - out.rank, context.stride(0),
            0 if residual is None else residual.stride(0),
            HAS_BIAS=out.bias is not None, KEPT_FROM=_kept_from(out, parts), HAS_RESIDUAL=residual is not None,
            NORM="none" if norm is None else norm.kind, NORM_BIAS=bias is not None,
            EPS=0.0 if norm is None else norm.eps, P0=parts[0], P1=parts[1], P2=parts[2],
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=block_k,
            EVEN_K=depth % block_k == 0, EVEN_N=out.cols % launch.block_n == 0,
            **_common(context.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return y
