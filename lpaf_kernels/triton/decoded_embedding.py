"""The kernel of decoded_embedding: gather, every layer of the decoder, activations and norms in one launch.

A program makes a tile of rows. Its latent rows are gathered while they are loaded as the first product's operand. What
a hidden layer gives is written to memory and read back by the same program, with a barrier between: it stays in the
caches, and no width is limited. A row's length must be known before the row is written, so the last product is made
twice where norms are kept, as the norms of whole blocks are.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .activations import activate
from .launch import Launch, start
from .lowrank_sparse_linear import _cast, _common, _load, _mma

_SLOPE = tl.constexpr(0.01)


@triton.jit
def _leaky(x):
    # Written so that NaN stays NaN.
    return tl.where(x < 0, x * _SLOPE, x)


@triton.jit
def _layer_tile(
    a_ptr, a_rows, weight_ptr, bias_ptr, n, depth, cols,
    ACTIVATE_A: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Columns n of a weight + bias in float32, for the rows of a that begin at ``a_rows`` [BLOCK_M, 1]."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = _load(a_ptr + a_rows + k[None, :], (k < depth)[None, :])
        if ACTIVATE_A:
            a = _cast(_leaky(a.to(tl.float32)), a_ptr.dtype.element_ty, UPCAST)
        inside = (k < depth)[:, None] & (n < cols)[None, :]
        weight = _load(weight_ptr + k.to(tl.int64)[:, None] * cols + n[None, :], inside)
        acc = _mma(a, weight, acc, PRECISION, UPCAST)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + n, mask=n < cols, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _hidden_layer(
    a_ptr, a_rows, weight_ptr, bias_ptr, hidden_ptr, m, rows, depth, cols,
    ACTIVATE_A: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """hidden[m] = lrelu(a weight + bias), there for every thread of the program when this returns."""
    for n0 in range(0, cols, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        acc = _layer_tile(
            a_ptr, a_rows, weight_ptr, bias_ptr, n, depth, cols,
            ACTIVATE_A, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        tl.store(
            hidden_ptr + m.to(tl.int64)[:, None] * cols + n[None, :],
            _cast(_leaky(acc), hidden_ptr.dtype.element_ty, UPCAST),
            mask=(m < rows)[:, None] & (n < cols)[None, :],
        )
    tl.debug_barrier()


@triton.jit
def _decode(
    ids_ptr, latent_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr, norms_ptr,
    hidden1_ptr, hidden2_ptr, y_ptr, rows, vocabulary, width, width1, width2, cols,
    LAYERS: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr, HAS_BIAS3: tl.constexpr,
    HAS_NORMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y [rows, cols] of ids [rows], latent [vocabulary, width] and up to three layers, of which the last makes cols.

    Program axis 0: row tiles. Axis 1: programs that share the columns of one, more than one only without hidden
    layers and norms. An id out of range makes a row of NaN: nothing is read for it.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_in = tl.minimum(m, rows - 1)
    ids = tl.load(ids_ptr + m_in).to(tl.int64)
    known = (ids >= 0) & (ids < vocabulary)
    ids = tl.where(known, ids, 0)
    a_ptr, a_rows, depth = latent_ptr, ids[:, None] * width, width
    weight_ptr, bias_ptr = weight1_ptr, bias1_ptr
    HAS_BIAS: tl.constexpr = HAS_BIAS1 if LAYERS == 1 else (HAS_BIAS2 if LAYERS == 2 else HAS_BIAS3)
    if LAYERS > 1:
        _hidden_layer(
            latent_ptr, a_rows, weight1_ptr, bias1_ptr, hidden1_ptr, m, rows, width, width1,
            True, HAS_BIAS1, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        a_ptr, a_rows, depth = hidden1_ptr, m_in.to(tl.int64)[:, None] * width1, width1
        weight_ptr, bias_ptr = weight2_ptr, bias2_ptr
    if LAYERS > 2:
        _hidden_layer(
            hidden1_ptr, a_rows, weight2_ptr, bias2_ptr, hidden2_ptr, m, rows, width1, width2,
            False, HAS_BIAS2, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        a_ptr, a_rows, depth = hidden2_ptr, m_in.to(tl.int64)[:, None] * width2, width2
        weight_ptr, bias_ptr = weight3_ptr, bias3_ptr
    ACTIVATION: tl.constexpr = "tanh" if LAYERS > 1 else "none"
    tiles = tl.cdiv(cols, BLOCK_N)
    scale = tl.where(known, 1.0, float("nan"))
    if HAS_NORMS:
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for tile in range(tiles):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = _layer_tile(
                a_ptr, a_rows, weight_ptr, bias_ptr, n, depth, cols,
                False, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
            acc = activate(acc, ACTIVATION)
            # Columns beyond the last are 0: their weights and biases were.
            squares += tl.sum(acc * acc, 1)
        length = tl.sqrt(squares)
        scale *= tl.load(norms_ptr + ids).to(tl.float32) / tl.where(length == 0, 1.0, length)
    for tile in range(tl.program_id(1), tiles, tl.num_programs(1)):
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = _layer_tile(
            a_ptr, a_rows, weight_ptr, bias_ptr, n, depth, cols,
            False, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        acc = activate(acc, ACTIVATION) * scale[:, None]
        tl.store(
            y_ptr + m.to(tl.int64)[:, None] * cols + n[None, :],
            _cast(acc, y_ptr.dtype.element_ty, UPCAST),
            mask=(m < rows)[:, None] & (n < cols)[None, :],
        )


def columns_apart(layers: Sequence[tuple[Tensor, Tensor | None]], norms: Tensor | None) -> bool:
    """Whether different programs may make the columns of one row."""
    return len(layers) == 1 and norms is None


def decode(
    ids: Tensor,
    latent: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    norms: Tensor | None,
    launch: Launch,
) -> Tensor:
    """[*ids.shape, dim] of ids of any shape; ``layers`` as :func:`lpaf_kernels.decoded_embedding` takes them."""
    latent, ids_in = latent.contiguous(), ids.contiguous()
    weights = [weight.contiguous() for weight, _ in layers]
    biases = [None if bias is None else bias.contiguous() for _, bias in layers]
    norms = None if norms is None else norms.contiguous()
    rows, cols = ids.numel(), weights[-1].shape[1]
    y = latent.new_empty((*ids.shape, cols))
    if rows == 0 or cols == 0:
        return y
    if latent.shape[0] == 0:
        return y.fill_(float("nan"))
    hidden = [latent.new_empty((rows, weight.shape[1])) for weight in weights[:-1]]
    missing = 3 - len(weights)
    # What is not there is never read; some pointer must be given.
    pairs = [(weight, latent if bias is None else bias) for weight, bias in zip(weights, biases)]
    pairs += [(latent, latent)] * missing
    hidden += [y] * (2 - len(hidden))
    widths = [*(weight.shape[1] for weight in weights[:-1]), *[16] * missing][:2]
    programs = -(-cols // launch.block_n) if columns_apart(layers, norms) else 1
    start(
        _decode, (-(-rows // launch.block_m), programs),
        ids_in, latent, *(tensor for pair in pairs for tensor in pair), latent if norms is None else norms,
        *hidden, y, rows, latent.shape[0], latent.shape[1], *widths, cols,
        LAYERS=len(weights),
        **{f"HAS_BIAS{index + 1}": index < len(biases) and biases[index] is not None for index in range(3)},
        HAS_NORMS=norms is not None,
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_K=launch.block_k,
        **_common(latent.dtype), num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip
    return y
