"""The kernels of decoded_embedding: gather, every layer of the decoder, activations and norms in one launch.

A program makes a tile of rows. Its latent rows are gathered while they are loaded as the first product's operand. What
a hidden layer gives is written to memory and read back by the same program, with a barrier between: it stays in the
caches, and no width is limited. A row's length must be known before the row is written, so the last product is made
twice where norms are kept, as the norms of whole blocks are.

The backward decodes again the same way, and takes the gradient through the norms and the last activation in that
launch: of what is as wide as the embedding it reads the given gradient and writes its own. The products that remain are
torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, derivative
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
def _hidden_layers(
    ids, m, latent_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr, hidden1_ptr,
    hidden2_ptr, rows, width, width1, width2,
    LAYERS: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Every layer but the last, of rows m with these ids; (a, its rows, depth, weight, bias) of the last one."""
    a_ptr, a_rows, depth = latent_ptr, ids[:, None] * width, width
    weight_ptr, bias_ptr = weight1_ptr, bias1_ptr
    m_in = tl.minimum(m, rows - 1).to(tl.int64)[:, None]
    if LAYERS > 1:
        _hidden_layer(
            latent_ptr, a_rows, weight1_ptr, bias1_ptr, hidden1_ptr, m, rows, width, width1,
            True, HAS_BIAS1, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        a_ptr, a_rows, depth = hidden1_ptr, m_in * width1, width1
        weight_ptr, bias_ptr = weight2_ptr, bias2_ptr
    if LAYERS > 2:
        _hidden_layer(
            hidden1_ptr, a_rows, weight2_ptr, bias2_ptr, hidden2_ptr, m, rows, width1, width2,
            False, HAS_BIAS2, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        a_ptr, a_rows, depth = hidden2_ptr, m_in * width2, width2
        weight_ptr, bias_ptr = weight3_ptr, bias3_ptr
    return a_ptr, a_rows, depth, weight_ptr, bias_ptr


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
    ids = tl.load(ids_ptr + tl.minimum(m, rows - 1)).to(tl.int64)
    known = (ids >= 0) & (ids < vocabulary)
    ids = tl.where(known, ids, 0)
    a_ptr, a_rows, depth, weight_ptr, bias_ptr = _hidden_layers(
        ids, m, latent_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr, hidden1_ptr,
        hidden2_ptr, rows, width, width1, width2,
        LAYERS, HAS_BIAS1, HAS_BIAS2, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    HAS_BIAS: tl.constexpr = HAS_BIAS1 if LAYERS == 1 else (HAS_BIAS2 if LAYERS == 2 else HAS_BIAS3)
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


@triton.jit
def _last_gradient(
    grad_ptr, ids_ptr, latent_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr, norms_ptr,
    hidden1_ptr, hidden2_ptr, d_last_ptr, d_norms_ptr, rows, vocabulary, padding, width, width1, width2, cols,
    LAYERS: tl.constexpr, HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr, HAS_BIAS3: tl.constexpr,
    HAS_NORMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """From the gradient of y to that of what the last layer's product and bias give [rows, cols].

    d_norms [rows]: each position's part in the gradient of its norm. Both are 0 where the id is ``padding``. Hidden
    layers are written for the products that follow. Program axis 0: row tiles.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ids = tl.load(ids_ptr + tl.minimum(m, rows - 1)).to(tl.int64)
    known = (ids >= 0) & (ids < vocabulary)
    counted = ((m < rows) & (ids != padding))[:, None]
    ids = tl.where(known, ids, 0)
    a_ptr, a_rows, depth, weight_ptr, bias_ptr = _hidden_layers(
        ids, m, latent_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, weight3_ptr, bias3_ptr, hidden1_ptr,
        hidden2_ptr, rows, width, width1, width2,
        LAYERS, HAS_BIAS1, HAS_BIAS2, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
    )  # fmt: skip
    HAS_BIAS: tl.constexpr = HAS_BIAS1 if LAYERS == 1 else (HAS_BIAS2 if LAYERS == 2 else HAS_BIAS3)
    ACTIVATION: tl.constexpr = "tanh" if LAYERS > 1 else "none"
    # Offsets from the tile's first row fit 32 bits, which takes fewer registers than 64.
    first = tl.program_id(0).to(tl.int64) * BLOCK_M * cols
    at = tl.arange(0, BLOCK_M)[:, None] * cols
    scale = tl.where(known, 1.0, float("nan"))
    along = tl.zeros((BLOCK_M,), tl.float32)
    if HAS_NORMS:
        squares = tl.zeros((BLOCK_M,), tl.float32)
        for n0 in range(0, cols, BLOCK_N):
            n = n0 + tl.arange(0, BLOCK_N)
            acc = _layer_tile(
                a_ptr, a_rows, weight_ptr, bias_ptr, n, depth, cols,
                False, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
            )  # fmt: skip
            acc = activate(acc, ACTIVATION)
            grad = _load(grad_ptr + first + (at + n[None, :]), counted & (n < cols)[None, :]).to(tl.float32)
            squares += tl.sum(acc * acc, 1)
            along += tl.sum(acc * grad, 1)
        length = tl.sqrt(squares)
        length = tl.where(length == 0, 1.0, length)
        along *= scale / length
        tl.store(d_norms_ptr + m, _cast(along, d_norms_ptr.dtype.element_ty, UPCAST), mask=m < rows)
        scale *= tl.load(norms_ptr + ids).to(tl.float32) / length
        # As a share of the decoded row: only what is across it turns it.
        along /= length
    for n0 in range(0, cols, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        acc = _layer_tile(
            a_ptr, a_rows, weight_ptr, bias_ptr, n, depth, cols,
            False, HAS_BIAS, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, UPCAST,
        )  # fmt: skip
        acc = activate(acc, ACTIVATION)
        grad = _load(grad_ptr + first + (at + n[None, :]), counted & (n < cols)[None, :]).to(tl.float32)
        grad = (grad - acc * along[:, None]) * scale[:, None]
        if LAYERS > 1:
            grad *= derivative(acc, ACTIVATION)
        tl.store(
            d_last_ptr + first + (at + n[None, :]),
            _cast(grad, d_last_ptr.dtype.element_ty, UPCAST),
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
    rows, cols = ids.numel(), layers[-1][0].shape[1]
    y = latent.new_empty((*ids.shape, cols))
    if rows == 0 or cols == 0:
        return y
    if latent.shape[0] == 0:
        return y.fill_(float("nan"))
    tensors, widths, constants = _stored(latent, layers, norms)
    programs = -(-cols // launch.block_n) if columns_apart(layers, norms) else 1
    start(
        _decode, (-(-rows // launch.block_m), programs),
        ids.contiguous(), *tensors, *_or(_hidden(rows, latent, layers), y), y, rows, latent.shape[0], *widths, cols,
        **constants, **_tiles(launch),
    )  # fmt: skip
    return y


def last_gradient(
    grad: Tensor,
    ids: Tensor,
    latent: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    norms: Tensor | None,
    padding_idx: int,
    launch: Launch,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Backward up to the last layer's product, for ``grad`` [rows, dim] and ids [rows].

    Returns:
        The gradient of what product and bias of the last layer give [rows, dim], that of each position's norm [rows]
        (undefined without norms), and what the hidden layers gave. Gradients are 0 where the id is ``padding_idx``
        (-1: nowhere).
    """
    rows, cols = grad.shape
    d_last, d_norms = torch.empty_like(grad, memory_format=torch.contiguous_format), grad.new_empty(rows)
    hidden = _hidden(rows, latent, layers)
    if rows == 0 or cols == 0:
        return d_last, d_norms, hidden
    tensors, widths, constants = _stored(latent, layers, norms)
    start(
        _last_gradient, (-(-rows // launch.block_m),),
        grad.contiguous(), ids.contiguous(), *tensors, *_or(hidden, d_last), d_last, d_norms, rows, latent.shape[0],
        padding_idx, *widths, cols,
        **constants, **_tiles(launch),
    )  # fmt: skip
    return d_last, d_norms, hidden


def _hidden(rows: int, latent: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """Room for what the hidden layers give."""
    return [latent.new_empty((rows, weight.shape[1])) for weight, _ in layers[:-1]]


def _or(hidden: list[Tensor], other: Tensor) -> list[Tensor]:
    """Two pointers: what is not there is never read or written, but some pointer must be given."""
    return [*hidden, *[other] * 2][:2]


def _stored(
    latent: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], norms: Tensor | None
) -> tuple[list[Tensor], list[int], dict[str, object]]:
    """What an embedding stores as both kernels take it: tensors, the widths of latent and hidden layers, constants."""
    latent = latent.contiguous()
    missing = 3 - len(layers)
    pairs = [(weight.contiguous(), latent if bias is None else bias.contiguous()) for weight, bias in layers]
    pairs += [(latent, latent)] * missing
    widths = [*(weight.shape[1] for weight, _ in layers[:-1]), *[16] * missing][:2]
    constants = {
        "LAYERS": len(layers),
        **{f"HAS_BIAS{i + 1}": i < len(layers) and layers[i][1] is not None for i in range(3)},
        "HAS_NORMS": norms is not None,
        **_common(latent.dtype),
    }
    tensors = [latent, *(tensor for pair in pairs for tensor in pair), latent if norms is None else norms.contiguous()]
    return tensors, [latent.shape[1], *widths], constants


def _tiles(launch: Launch) -> dict[str, int]:
    return {
        "BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n, "BLOCK_K": launch.block_k,
        "num_warps": launch.num_warps, "num_stages": launch.num_stages,
    }  # fmt: skip
