"""Kernels of lowrank_sparse_linear on the packed parameters (KERNELS.md's notation: z = x [u | s]).

Two kernels make the forward: `_project` reads x once and writes z = x down^T, `_expand` multiplies its rank columns
with up and adds the kept columns, the bias and the activation before anything is written. `_one_kernel` keeps z on
chip instead. The backward is `_project` on the output's gradient (d z), `_expand` on d z (d x), and `_outer` for the
gradients of both weights. Nothing uses atomics: partial sums are added in a fixed order.

Kept columns. `kept` is sorted, so the columns that fall into one output tile are neighbours in z. A tile therefore
adds them with a few matrix instructions, z[:, first:last] times a 0/1 matrix, and needs no inverse index. As in any
dense product an infinity in z becomes NaN in the other columns of its tile.

Ranks. A tile side must be a power of two, a rank is not: rank columns are cut into up to three parts (80 = 64 + 16)
and rank loops into full steps and one tail step, see :mod:`.launch`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, derivative
from .launch import GRANULE, Launch, multiprocessors, pitch, split_depth, split_width, start

# Kept columns that one step of the epilogue adds, that one program gathers, and that one step of the search reads.
_KEPT_STEP = tl.constexpr(16)
_GATHER_STEP = tl.constexpr(32)
_SEARCH_STEP = tl.constexpr(1024)


@triton.jit
def _mma(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # the interpreter's numpy has no bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _cast(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """float32 to DTYPE, to nearest even; the interpreter cuts bfloat16 off, so it gets what needs no rounding."""
    if UPCAST:
        if tl.bfloat16 == DTYPE and x.dtype == tl.float32:
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _load(pointers, mask):
    """A tile, 0 where ``mask`` is false; everything if it is None."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _rows_tile(weight_ptr, first, width, k, depth, PART: tl.constexpr, EVEN_K: tl.constexpr):
    """Rows first.. of weight [width, depth] as a [k, PART] tile; rows beyond the last repeat it (never stored)."""
    n = tl.minimum(first + tl.arange(0, PART), width - 1)
    pointers = weight_ptr + n.to(tl.int64)[None, :] * depth + k[:, None]
    return _load(pointers, None if EVEN_K else (k < depth)[:, None])


@triton.jit
def _store_part(z_ptr, m, rows, z_stride, acc, first, stop, PART: tl.constexpr, UPCAST: tl.constexpr):
    n = first + tl.arange(0, PART)
    tl.store(
        z_ptr + m.to(tl.int64)[:, None] * z_stride + n[None, :],
        _cast(acc, z_ptr.dtype.element_ty, UPCAST),
        mask=(m < rows)[:, None] & (n < stop)[None, :],
    )


@triton.jit
def _load_gradient(a_ptr, saved_ptr, offsets, mask, ACTIVATION: tl.constexpr, UPCAST: tl.constexpr):
    """A tile of the input, or of the gradient times the activation's derivative."""
    a = _load(a_ptr + offsets, mask)
    if ACTIVATION != "none":
        saved = _load(saved_ptr + offsets, mask).to(tl.float32)
        a = _cast(a.to(tl.float32) * derivative(saved, ACTIVATION), a_ptr.dtype.element_ty, UPCAST)
    return a


@triton.jit
def _gather_columns(
    a_ptr, saved_ptr, kept_ptr, z_ptr, m, rows, first, kept, a_stride, z_stride,
    ACTIVATION: tl.constexpr, PART: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """z[:, first + j] = a[:, kept[first + j]] for PART columns."""
    j = first + tl.arange(0, PART)
    column = tl.load(kept_ptr + j, mask=j < kept, other=0)
    inside = (m < rows)[:, None] & (j < kept)[None, :]
    row = m.to(tl.int64)[:, None]
    values = _load_gradient(a_ptr, saved_ptr, row * a_stride + column[None, :], inside, ACTIVATION, UPCAST)
    tl.store(z_ptr + row * z_stride + j[None, :], values, mask=inside)


@triton.jit
def _project_tile(
    a_ptr, saved_ptr, grad_ptr, weight_ptr, z_ptr, m, rows, start, stop, depth, first, width, stored,
    a_stride, z_stride,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """z[m, first: first + P0 + P1 + P2] = a[m, start:stop] weight[first.., start:stop]^T, columns below ``stored``."""
    m_in = tl.minimum(m, rows - 1).to(tl.int64)
    acc0 = tl.zeros((BLOCK_M, P0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, P1 if P1 > 0 else 16), tl.float32)
    acc2 = tl.zeros((BLOCK_M, P2 if P2 > 0 else 16), tl.float32)
    for k0 in range(start, stop, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        offsets = m_in[:, None] * a_stride + k[None, :]
        inside = None if EVEN_K else (k < depth)[None, :]
        a = _load_gradient(a_ptr, saved_ptr, offsets, inside, ACTIVATION, UPCAST)
        if ACTIVATION != "none":
            # What the weights' gradients read: written by the programs of the first columns, once.
            tl.store(grad_ptr + offsets, a, mask=(m < rows)[:, None] & (k < depth)[None, :] & (first == 0))
        acc0 = _mma(a, _rows_tile(weight_ptr, first, width, k, depth, P0, EVEN_K), acc0, PRECISION, UPCAST)
        if P1 > 0:
            w1 = _rows_tile(weight_ptr, first + P0, width, k, depth, P1, EVEN_K)
            acc1 = _mma(a, w1, acc1, PRECISION, UPCAST)
        if P2 > 0:
            w2 = _rows_tile(weight_ptr, first + P0 + P1, width, k, depth, P2, EVEN_K)
            acc2 = _mma(a, w2, acc2, PRECISION, UPCAST)
    _store_part(z_ptr, m, rows, z_stride, acc0, first, stored, P0, UPCAST)
    if P1 > 0:
        _store_part(z_ptr, m, rows, z_stride, acc1, first + P0, stored, P1, UPCAST)
    if P2 > 0:
        _store_part(z_ptr, m, rows, z_stride, acc2, first + P0 + P1, stored, P2, UPCAST)


@triton.jit
def _project(
    a_ptr, saved_ptr, grad_ptr, weight_ptr, kept_ptr, z_ptr,
    rows, depth, width, kept, a_stride, z_stride, split_stride, programs, depth_per_split,
    ACTIVATION: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """z[:, :width] = a weight^T, a [rows, depth], weight [width, depth]; z[:, width:] = a[:, kept] if GATHER.

    With an ACTIVATION a is the gradient times act'(saved), and grad receives it.

    Program axis 0: row tiles times (`programs` tiles of P0 + P1 + P2 columns, then tiles of gathered columns), the
    row tile slowest, so that neighbours share a. Axis 1: splits of depth, each with its own z.
    """
    split = tl.program_id(1)
    start = split * depth_per_split
    stop = tl.minimum(start + depth_per_split, depth)
    z_ptr += split.to(tl.int64) * split_stride
    if GATHER:
        tiles = programs + tl.cdiv(kept, _GATHER_STEP)
    else:
        tiles = programs
    m = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    pid_n = tl.program_id(0) % tiles
    if GATHER:
        if pid_n >= programs:
            _gather_columns(
                a_ptr, saved_ptr, kept_ptr, z_ptr + width, m, rows, (pid_n - programs) * _GATHER_STEP, kept,
                a_stride, z_stride, ACTIVATION, _GATHER_STEP, UPCAST,
            )  # fmt: skip
        else:
            _project_tile(
                a_ptr, saved_ptr, grad_ptr, weight_ptr, z_ptr, m, rows, start, stop, depth,
                pid_n * (P0 + P1 + P2), width, width, a_stride, z_stride,
                ACTIVATION, P0, P1, P2, BLOCK_M, BLOCK_K, EVEN_K, PRECISION, UPCAST,
            )  # fmt: skip
    else:
        # The padding of a row is written too: whole 16-byte pieces, and it is nobody else's.
        _project_tile(
            a_ptr, saved_ptr, grad_ptr, weight_ptr, z_ptr, m, rows, start, stop, depth,
            pid_n * (P0 + P1 + P2), width, z_stride, a_stride, z_stride,
            ACTIVATION, P0, P1, P2, BLOCK_M, BLOCK_K, EVEN_K, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def _load_z(
    z_ptr, offsets, mask, split_stride, DTYPE: tl.constexpr, SPLITS: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """A tile of z (its sum over the splits, in order) as DTYPE."""
    z = _load(z_ptr + offsets, mask)
    if SPLITS > 1:
        for split in tl.static_range(1, SPLITS):
            z += _load(z_ptr + split * split_stride + offsets, mask)
        z = _cast(z, DTYPE, UPCAST)
    return z


@triton.jit
def _kept_range(kept_ptr, kept, n0, BLOCK_N: tl.constexpr, SEARCHES: tl.constexpr):
    """[first, last): which kept columns lie in the output columns [n0, n0 + BLOCK_N)."""
    first = 0
    last = 0
    for search in tl.static_range(SEARCHES):
        j = search * _SEARCH_STEP + tl.arange(0, _SEARCH_STEP)
        position = tl.load(kept_ptr + j, mask=j < kept, other=2147483647)
        first += tl.sum((position < n0).to(tl.int32), 0)
        last += tl.sum((position < n0 + BLOCK_N).to(tl.int32), 0)
    return first, last


@triton.jit
def _finish(
    acc, bias_ptr, y_ptr, pre_ptr, m, n, rows, cols,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Bias, activation and the stores of one output tile."""
    inside = (m < rows)[:, None] & (n < cols)[None, :]
    offsets = m.to(tl.int64)[:, None] * cols + n[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    if SAVE_PRE:
        # Backward differentiates at the stored value, as torch does.
        pre = _cast(acc, y_ptr.dtype.element_ty, UPCAST)
        tl.store(pre_ptr + offsets, pre, mask=inside)
        acc = pre.to(tl.float32)
    tl.store(y_ptr + offsets, _cast(activate(acc, ACTIVATION), y_ptr.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def _expand(
    z_ptr, weight_ptr, kept_ptr, bias_ptr, y_ptr, pre_ptr,
    rows, depth, cols, kept, z_stride, split_stride,
    ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, SEARCHES: tl.constexpr, SAVE_PRE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y = act(z[:, :depth] weight + scatter(z[:, depth:], kept) + bias), weight [depth, cols].

    Program axis 0: row tiles times column tiles, the row tile slowest, so that neighbours share z; weight stays in L2.
    """
    tiles = tl.cdiv(cols, BLOCK_N)
    m = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    z_rows = tl.minimum(m, rows - 1).to(tl.int64)[:, None] * z_stride
    n0 = (tl.program_id(0) % tiles) * BLOCK_N
    n = n0 + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    full = depth // BLOCK_K * BLOCK_K
    for k0 in range(0, full, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        z = _load_z(z_ptr, z_rows + k[None, :], None, split_stride, dtype, SPLITS, UPCAST)
        w = tl.load(weight_ptr + k.to(tl.int64)[:, None] * cols + n[None, :], mask=(n < cols)[None, :], other=0.0)
        acc = _mma(z, w, acc, PRECISION, UPCAST)
    if TAIL > 0:
        k = full + tl.arange(0, TAIL)
        # Loaded to the end of the padded row, in whole 16-byte pieces; what is no rank column is cut afterwards.
        z = _load_z(z_ptr, z_rows + k[None, :], (k < z_stride)[None, :], split_stride, dtype, SPLITS, UPCAST)
        z = tl.where((k < depth)[None, :], z, tl.zeros_like(z))
        inside = (k < depth)[:, None] & (n < cols)[None, :]
        w = tl.load(weight_ptr + k.to(tl.int64)[:, None] * cols + n[None, :], mask=inside, other=0.0)
        acc = _mma(z, w, acc, PRECISION, UPCAST)
    if SEARCHES > 0:
        first, last = _kept_range(kept_ptr, kept, n0, BLOCK_N, SEARCHES)
        for j0 in range(first, last, _KEPT_STEP):
            j = j0 + tl.arange(0, _KEPT_STEP)
            s = _load_z(z_ptr, z_rows + (depth + j)[None, :], (j < last)[None, :], split_stride, dtype, SPLITS, UPCAST)
            position = tl.load(kept_ptr + j, mask=j < last, other=-1)
            ones = tl.where(position[:, None] == n[None, :], 1.0, 0.0).to(dtype)
            acc = _mma(s, ones, acc, PRECISION, UPCAST)
    _finish(acc, bias_ptr, y_ptr, pre_ptr, m, n, rows, cols, ACTIVATION, HAS_BIAS, SAVE_PRE, UPCAST)


@triton.jit
def _extended_tile(up_ptr, kept_ptr, first, n, rank, kept, cols, PART: tl.constexpr, HAS_KEPT: tl.constexpr):
    """Rows first.. of up [rank, cols] continued by one 0/1 row per kept column, as a [PART, n] tile."""
    k = first + tl.arange(0, PART)
    inside = (k < rank)[:, None] & (n < cols)[None, :]
    tile = tl.load(up_ptr + k.to(tl.int64)[:, None] * cols + n[None, :], mask=inside, other=0.0)
    if HAS_KEPT:
        position = tl.load(kept_ptr + (k - rank), mask=(k >= rank) & (k < rank + kept), other=-1)
        tile = tl.where(position[:, None] == n[None, :], 1.0, tile.to(tl.float32)).to(up_ptr.dtype.element_ty)
    return tile


@triton.jit
def _one_kernel(
    x_ptr, down_ptr, up_ptr, kept_ptr, bias_ptr, y_ptr, z_ptr, pre_ptr, rows, depth, cols, rank, kept, x_stride,
    z_stride, cols_per_split, ACTIVATION: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEPT: tl.constexpr,
    SAVE_PRE: tl.constexpr, SAVE_Z: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The whole operator for one row tile and `cols_per_split` output columns; z never leaves the chip unless SAVE_Z.

    Program axis 0: row tiles. Axis 1: splits of the output columns, each of which computes z anew.
    """
    width = rank + kept
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_in = tl.minimum(m, rows - 1).to(tl.int64)
    acc0 = tl.zeros((BLOCK_M, P0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, P1 if P1 > 0 else 16), tl.float32)
    acc2 = tl.zeros((BLOCK_M, P2 if P2 > 0 else 16), tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = _load(x_ptr + m_in[:, None] * x_stride + k[None, :], None if EVEN_K else (k < depth)[None, :])
        acc0 = _mma(x, _rows_tile(down_ptr, 0, width, k, depth, P0, EVEN_K), acc0, PRECISION, UPCAST)
        if P1 > 0:
            acc1 = _mma(x, _rows_tile(down_ptr, P0, width, k, depth, P1, EVEN_K), acc1, PRECISION, UPCAST)
        if P2 > 0:
            acc2 = _mma(x, _rows_tile(down_ptr, P0 + P1, width, k, depth, P2, EVEN_K), acc2, PRECISION, UPCAST)
    start = tl.program_id(1) * cols_per_split
    if SAVE_Z:
        if start == 0:
            _store_part(z_ptr, m, rows, z_stride, acc0, 0, z_stride, P0, UPCAST)
            if P1 > 0:
                _store_part(z_ptr, m, rows, z_stride, acc1, P0, z_stride, P1, UPCAST)
            if P2 > 0:
                _store_part(z_ptr, m, rows, z_stride, acc2, P0 + P1, z_stride, P2, UPCAST)
    z0 = _cast(acc0, y_ptr.dtype.element_ty, UPCAST)
    z1 = _cast(acc1, y_ptr.dtype.element_ty, UPCAST)
    z2 = _cast(acc2, y_ptr.dtype.element_ty, UPCAST)
    for n0 in range(start, tl.minimum(start + cols_per_split, cols), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        w0 = _extended_tile(up_ptr, kept_ptr, 0, n, rank, kept, cols, P0, HAS_KEPT)
        acc = _mma(z0, w0, acc, PRECISION, UPCAST)
        if P1 > 0:
            w1 = _extended_tile(up_ptr, kept_ptr, P0, n, rank, kept, cols, P1, HAS_KEPT)
            acc = _mma(z1, w1, acc, PRECISION, UPCAST)
        if P2 > 0:
            w2 = _extended_tile(up_ptr, kept_ptr, P0 + P1, n, rank, kept, cols, P2, HAS_KEPT)
            acc = _mma(z2, w2, acc, PRECISION, UPCAST)
        _finish(acc, bias_ptr, y_ptr, pre_ptr, m, n, rows, cols, ACTIVATION, HAS_BIAS, SAVE_PRE, UPCAST)


@triton.jit
def _columns_tile(a_ptr, m, rows, first, a_stride, PART: tl.constexpr):
    """Columns first.. of a as an [m, PART] tile; rows beyond the last are 0, columns up to the padded row end."""
    n = first + tl.arange(0, PART)
    offsets = m.to(tl.int64)[:, None] * a_stride + n[None, :]
    return tl.load(a_ptr + offsets, mask=(m < rows)[:, None] & (n < a_stride)[None, :], other=0.0)


@triton.jit
def _store_columns(c_ptr, n, cols, acc, first, width, PART: tl.constexpr, UPCAST: tl.constexpr):
    """acc [n, PART] into c [width, cols], transposed."""
    k = first + tl.arange(0, PART)
    tl.store(
        c_ptr + k.to(tl.int64)[None, :] * cols + n[:, None],
        _cast(acc, c_ptr.dtype.element_ty, UPCAST),
        mask=(n < cols)[:, None] & (k < width)[None, :],
    )


@triton.jit
def _outer(
    a_ptr, b_ptr, c_ptr, sums_ptr, rows, width, cols, a_stride, b_stride, programs, rows_per_split,
    SUMS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """c = a^T b, a [rows, width], b [rows, cols]; sums = the column sums of b if SUMS.

    Held as c^T, because the matrix unit wants a wide first side and a rank part may be 16. Program axis 0: column tiles
    times `programs` tiles of a's columns, the latter fastest, so that neighbours share b. Axis 1: splits of rows, each
    with its own c and sums.
    """
    pid = tl.program_id(0)
    pid_w = pid % programs
    n = (pid // programs) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    first = pid_w * (P0 + P1 + P2)
    acc0 = tl.zeros((BLOCK_N, P0), tl.float32)
    acc1 = tl.zeros((BLOCK_N, P1 if P1 > 0 else 16), tl.float32)
    acc2 = tl.zeros((BLOCK_N, P2 if P2 > 0 else 16), tl.float32)
    sums = tl.zeros((BLOCK_N,), tl.float32)
    start = split * rows_per_split
    for m0 in range(start, tl.minimum(start + rows_per_split, rows), BLOCK_K):
        m = m0 + tl.arange(0, BLOCK_K)
        inside = (m < rows)[:, None] & (n < cols)[None, :]
        offsets = m.to(tl.int64)[:, None] * b_stride + n[None, :]
        b = _load(b_ptr + offsets, inside)
        bt = tl.trans(b)
        acc0 = _mma(bt, _columns_tile(a_ptr, m, rows, first, a_stride, P0), acc0, PRECISION, UPCAST)
        if P1 > 0:
            acc1 = _mma(bt, _columns_tile(a_ptr, m, rows, first + P0, a_stride, P1), acc1, PRECISION, UPCAST)
        if P2 > 0:
            acc2 = _mma(bt, _columns_tile(a_ptr, m, rows, first + P0 + P1, a_stride, P2), acc2, PRECISION, UPCAST)
        if SUMS:
            sums += tl.sum(b.to(tl.float32), 0)
    c_ptr += split.to(tl.int64) * width * cols
    _store_columns(c_ptr, n, cols, acc0, first, width, P0, UPCAST)
    if P1 > 0:
        _store_columns(c_ptr, n, cols, acc1, first + P0, width, P1, UPCAST)
    if P2 > 0:
        _store_columns(c_ptr, n, cols, acc2, first + P0 + P1, width, P2, UPCAST)
    if SUMS:
        if pid_w == 0:
            tl.store(sums_ptr + split * cols + n, sums, mask=n < cols)


def _common(dtype: torch.dtype) -> dict[str, object]:
    """Constants of every kernel: the precision of float32 products follows torch, and whether this is interpreted."""
    exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return {"PRECISION": "ieee" if exact else "tf32", "UPCAST": not isinstance(_project, triton.JITFunction)}


def _block_k(launch: Launch, dtype: torch.dtype, activation: str = "none") -> int:
    """The step that fits: half for 4-byte types (shared memory), half where a derivative is taken (registers)."""
    halvings = (dtype.itemsize == 4) + (activation != "none")
    return max(launch.block_k >> halvings, GRANULE)


def project(
    a: Tensor,
    weight: Tensor,
    launch: Launch,
    kept: Tensor | None = None,
    saved: Tensor | None = None,
    activation: str = "none",
    keep_splits: bool = True,
) -> tuple[Tensor, int, Tensor]:
    """z [rows, pitch] of a [rows, depth] and weight [width, depth], or its float32 partial sums [splits, rows, pitch].

    Partial sums only with ``keep_splits``: :func:`expand` adds them, others want z. With ``kept`` the columns
    a[:, kept] follow. With ``activation`` a is a gradient, first multiplied with its derivative at ``saved``.

    Returns:
        z, the number of splits, and the gradient that was multiplied (a itself without an activation).
    """
    rows, depth = a.shape
    width = weight.shape[0]
    columns = 0 if kept is None else kept.shape[0]
    parts, programs = split_width(width, launch.max_width) if width else ((GRANULE, 0, 0), 0)
    block_k = _block_k(launch, a.dtype, activation)
    steps = -(-depth // block_k)
    splits = max(min(launch.splits, steps), 1) if keep_splits else 1
    length = pitch(width + columns)
    shape, dtype = ((rows, length), a.dtype) if splits == 1 else ((splits, rows, length), torch.float32)
    z = a.new_empty(shape, dtype=dtype)
    grad = a if activation == "none" else torch.empty_like(a)
    per_split = -(-steps // splits) * block_k
    tiles = programs + -(-columns // _GATHER_STEP.value)
    if rows and tiles:
        start(
            _project, (-(-rows // launch.block_m) * tiles, splits),
            a, saved if saved is not None else a, grad, weight, kept if kept is not None else a, z,
            rows, depth, width, columns, a.stride(0), length, rows * length, programs, per_split,
            ACTIVATION=activation, P0=parts[0], P1=parts[1], P2=parts[2], GATHER=columns > 0,
            BLOCK_M=launch.block_m, BLOCK_K=block_k, EVEN_K=depth % block_k == 0,
            **_common(a.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return z, splits, grad


def expand(
    z: Tensor,
    splits: int,
    weight: Tensor,
    dtype: torch.dtype,
    launch: Launch,
    kept: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    save_pre: bool = False,
) -> tuple[Tensor, Tensor]:
    """y [rows, cols] from :func:`project`'s z and weight [depth, cols], and the activation's input (or nothing)."""
    rows, length = z.shape[-2:]
    depth, cols = weight.shape
    columns = 0 if kept is None else kept.shape[0]
    step, tail = split_depth(depth, _block_k(launch, dtype)) if depth else (GRANULE, 0)
    y = weight.new_empty((rows, cols), dtype=dtype)
    pre = torch.empty_like(y) if save_pre else y.new_empty(0)
    if rows and cols:
        start(
            _expand, (-(-rows // launch.block_m) * -(-cols // launch.block_n),),
            z, weight, kept if kept is not None else z, bias if bias is not None else weight, y, pre,
            rows, depth, cols, columns, length, rows * length,
            ACTIVATION=activation, HAS_BIAS=bias is not None, SEARCHES=-(-columns // _SEARCH_STEP.value),
            SAVE_PRE=save_pre, SPLITS=splits,
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=step, TAIL=tail,
            **_common(dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return y, pre


def one_kernel(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    launch: Launch,
    kept: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str = "none",
    save_z: bool = False,
    save_pre: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [rows, out], z [rows, pitch] and the activation's input (the last two only where asked for)."""
    rows, depth = x.shape
    rank, cols = up.shape
    width = down.shape[0]
    parts, programs = split_width(width, launch.max_width)
    if programs != 1:
        raise ValueError(f"down: expected at most {launch.max_width} rows for {launch.name}, got {width}")
    block_k = _block_k(launch, x.dtype)
    y = x.new_empty((rows, cols))
    z = x.new_empty((rows, pitch(width)) if save_z else 0)
    pre = torch.empty_like(y) if save_pre else x.new_empty(0)
    row_tiles, column_tiles = -(-rows // launch.block_m), -(-cols // launch.block_n)
    splits = launch.splits or max(multiprocessors(x) // max(row_tiles, 1), 1)
    per_split = -(-column_tiles // min(splits, column_tiles)) * launch.block_n
    if rows:
        start(
            _one_kernel, (row_tiles, -(-cols // per_split)),
            x, down, up, kept if kept is not None else x, bias if bias is not None else x, y, z, pre,
            rows, depth, cols, rank, width - rank, x.stride(0), pitch(width), per_split,
            ACTIVATION=activation, HAS_BIAS=bias is not None, HAS_KEPT=width > rank, SAVE_PRE=save_pre, SAVE_Z=save_z,
            P0=parts[0], P1=parts[1], P2=parts[2],
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=block_k, EVEN_K=depth % block_k == 0,
            **_common(x.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return y, z, pre


def outer(
    a: Tensor,
    width: int,
    b: Tensor,
    launch: Launch,
    sums: bool = False,
) -> tuple[Tensor, Tensor]:
    """a[:, :width]^T b for a [rows, pitch], b [rows, cols], in b's dtype; and b's column sums (or nothing)."""
    rows, cols = b.shape
    parts, programs = split_width(width, launch.max_width) if width else ((GRANULE, 0, 0), 1 if sums else 0)
    tiles = -(-cols // launch.block_n) * programs
    block_k = _block_k(launch, b.dtype)
    steps = max(-(-rows // block_k), 1)
    # Each split costs a write and a read of c: no more of them than fill the device, and at least 4 steps in each.
    splits = launch.splits or max(multiprocessors(b) // max(tiles, 1), 1)
    splits = max(min(splits, steps // 4), 1)
    per_split = -(-steps // splits) * block_k
    splits = -(-rows // per_split) if rows else 1
    dtype = b.dtype if splits == 1 else torch.float32
    c = b.new_empty((splits, width, cols), dtype=dtype)
    total = b.new_empty((splits, cols) if sums else (splits, 0), dtype=torch.float32)
    if rows == 0:
        return b.new_zeros((width, cols)), b.new_zeros(cols if sums else 0)
    if tiles:
        start(
            _outer, (tiles, splits),
            a, b, c, total,
            rows, width, cols, a.shape[1], b.stride(0), programs, per_split,
            SUMS=sums, P0=parts[0], P1=parts[1], P2=parts[2],
            BLOCK_N=launch.block_n, BLOCK_K=block_k,
            **_common(b.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    summed = c[0] if splits == 1 else c.sum(0)
    return summed.to(b.dtype), total.sum(0).to(b.dtype)
