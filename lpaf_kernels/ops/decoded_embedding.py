"""An embedding that is stored as a short latent row per token and a decoder that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import has_kernel, library, register_autocast, register_fallback
from ..tuning import decoded_embedding as plans
from ._checks import check_device, check_floating, check_integer, check_shape
from .lowrank_sparse_linear import is_eager

Layer = tuple[Tensor, Tensor | None]

# Hidden layers of a decoder beside the last one.
MAX_HIDDEN = 2
# torch's default slope below 0; csrc/cpu/elementwise_kernels.cpp and triton/decoded_embedding.py have it too.
SLOPE = 0.01
_HAS_NATIVE = has_kernel("decoded_embedding_forward", "CPU")
_native_forward = torch.ops.lpaf_kernels.decoded_embedding_forward.default
# On a CPU backward computes with distinct ids where they are at most this share of all: finding and summing them costs
# about as much as the rest of the rows would.
_DISTINCT_SHARE = 0.75


def decoded_embedding(
    ids: Tensor,
    latent: Tensor,
    decoder: Sequence[Layer],
    norms: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """The rows ``ids`` of an embedding that autoencoder compression stores as latent rows and a decoder.

    With z = latent[ids], one layer decodes to v = z W1 + b1. With hidden layers the latent is an activation as well:
    v = tanh(lrelu(lrelu(z) W1 + b1) W2 + b2), or one layer more. Where norms are kept, y = norms[ids] v / ||v||, and a
    row v of zeros stays; else y = v. Nothing of vocabulary size is decoded. Backward saves the arguments only, decodes
    again, and sums the gradients of repeated ids. Autocast leaves the operator alone, as it does an embedding.

    Source: the offline compression of pretrained transformers by autoencoders, section 3 (separated and concatenated
    matrices, linear and non-linear decoders, rows that keep their norm).

    Args:
        ids: any shape, int32 or int64, each from 0 to vocab - 1.
        latent: [vocab, k], float32, float16, bfloat16 or float64.
        decoder: one to three pairs (weight [in, out], bias [out] or None) in the dtype of ``latent``, the first of them
            with in = k; the last one's out is the embedding's dimension.
        norms: [vocab], the lengths of the rows, in the dtype of ``latent``. Default: rows as decoded.
        padding_idx: the id whose positions contribute to no gradient. Default: none.

    Returns:
        [*ids.shape, dim] in the dtype of ``latent``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        IndexError: an id out of range, on the CPU. On a GPU nothing waits to see it: the kernel gives a row of NaN,
            torch's own gather stops the device.
    """
    if _HAS_NATIVE and not torch.is_grad_enabled():
        # The kernel checks its arguments itself, in less time than it takes here. What it refuses comes to the checks
        # below, which say why.
        try:
            tensors = _flat(decoder)
            if (
                is_eager(ids, latent, *tensors, norms)
                and ids.is_cpu
                and latent is not None
                and latent.dtype == torch.float32
                and all(weight is not None for weight, _ in decoder)
                and (padding_idx is None or (type(padding_idx) is int and 0 <= padding_idx < latent.shape[0]))
            ):
                return _native_forward(ids, latent, *tensors, norms)
        except (RuntimeError, TypeError, ValueError):
            pass
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected a torch.Tensor, got {type(ids).__name__}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"ids: expected int32 or int64, got {ids.dtype}")
    check_latent(latent)
    check_device("ids", ids, latent, "latent")
    tensors = _flat(check_decoder(decoder, latent))
    if norms is not None:
        check_per_row("norms", norms, latent)
    if padding_idx is not None:
        check_integer("padding_idx", padding_idx, 0, latent.shape[0] - 1)
    arguments = (ids, latent, *tensors, norms, -1 if padding_idx is None else padding_idx)
    if is_eager(ids, latent, *tensors, norms):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (latent, *tensors, norms)):
            return _Eager.apply(*arguments)
        with _without_autocast(latent.device.type):
            return _implementation(latent)(*arguments)
    return torch.ops.lpaf_kernels.decoded_embedding(*arguments)


def decoded_embedding_reference(
    ids: Tensor,
    latent: Tensor,
    decoder: Sequence[Layer],
    norms: Tensor | None = None,
    padding_idx: int | None = None,
) -> Tensor:
    """The same in plain torch, differentiable."""
    y = F.embedding(ids, latent)
    if len(decoder) > 1:
        y = F.leaky_relu(y, SLOPE)
    for index, (weight, bias) in enumerate(decoder):
        y = y @ weight
        if bias is not None:
            y = y + bias
        if index + 1 < len(decoder):
            y = F.leaky_relu(y, SLOPE)
        elif len(decoder) > 1:
            y = torch.tanh(y)
    if norms is not None:
        length = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
        y = y * (F.embedding(ids, norms[:, None]) / torch.where(length == 0, 1, length))
    if padding_idx is not None:
        y = torch.where((ids == padding_idx)[..., None], y.detach(), y)
    return y


def check_latent(latent: Tensor) -> None:
    """Raise unless ``latent`` is [vocab, k] with k of at least 1."""
    check_floating("latent", latent)
    if latent.dim() != 2 or latent.shape[1] == 0:
        raise ValueError(f"latent: expected shape [vocab, k] with k of at least 1, got {list(latent.shape)}")


def check_per_row(name: str, tensor: Tensor, latent: Tensor) -> None:
    """Raise unless ``tensor`` has a number for each row of ``latent`` [vocab, k]."""
    _check_like(name, tensor, latent)
    check_shape(name, tensor, latent.shape[0], because="the rows of latent")


def check_decoder(decoder: Sequence[Layer], latent: Tensor) -> list[Layer]:
    """``decoder`` as a list of pairs, or raise where they do not follow from ``latent`` [vocab, k] one by one."""
    if not isinstance(decoder, (list, tuple)) or not all(
        isinstance(layer, (list, tuple)) and len(layer) == 2 for layer in decoder
    ):
        raise TypeError(f"decoder: expected a list of pairs (weight, bias or None), got {type(decoder).__name__}")
    if not 1 <= len(decoder) <= 1 + MAX_HIDDEN:
        raise ValueError(f"decoder: expected 1 to {1 + MAX_HIDDEN} layers, got {len(decoder)}")
    width = latent.shape[1]
    for index, (weight, bias) in enumerate(decoder):
        name = f"decoder[{index}]"
        _check_like(f"{name} weight", weight, latent)
        if weight.dim() != 2 or weight.shape[0] != width or weight.shape[1] == 0:
            before = "the columns of latent" if index == 0 else f"those of decoder[{index - 1}]"
            raise ValueError(f"{name} weight: expected shape [{width}, out] ({before}), got {list(weight.shape)}")
        width = weight.shape[1]
        if bias is not None:
            _check_like(f"{name} bias", bias, latent)
            check_shape(f"{name} bias", bias, width, because="the columns of its weight")
    return [tuple(layer) for layer in decoder]


def _check_like(name: str, tensor: Tensor, latent: Tensor) -> None:
    check_floating(name, tensor)
    if tensor.dtype != latent.dtype:
        raise TypeError(f"{name}: expected {latent.dtype} (that of latent), got {tensor.dtype}")
    check_device(name, tensor, latent, "latent")


# Through torch, for what no native library serves.


def _affine(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows @ weight if bias is None else torch.addmm(bias, rows, weight)


def _rescale(decoded: Tensor, ids: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """(factor, length) [rows, 1] that give each row its norm; the length of a row of zeros counts as 1."""
    length = torch.linalg.vector_norm(decoded, dim=-1, keepdim=True)
    length.masked_fill_(length == 0, 1)
    return norms[ids][:, None] / length, length


def _flat(layers: Sequence[Layer]) -> list[Tensor | None]:
    """Weight and bias of each layer in turn, then None for the layers that a decoder of fewer lacks."""
    tensors = [tensor for weight, bias in layers for tensor in (weight, bias)]
    return tensors + [None] * (2 * (1 + MAX_HIDDEN) - len(tensors))


def _layers(*tensors: Tensor | None) -> list[Layer]:
    return [layer for layer in zip(tensors[::2], tensors[1::2]) if layer[0] is not None]


def _forward_by_torch(ids: Tensor, latent: Tensor, *rest: Tensor | None) -> Tensor:
    *tensors, norms = rest
    layers, flat = _layers(*tensors), ids.reshape(-1)
    rows = F.embedding(flat, latent)
    if len(layers) > 1:
        F.leaky_relu_(rows, SLOPE)
    for weight, bias in layers[:-1]:
        rows = F.leaky_relu_(_affine(rows, weight, bias), SLOPE)
    rows = _affine(rows, *layers[-1])
    if len(layers) > 1:
        rows.tanh_()
    if norms is not None:
        rows *= _rescale(rows, flat, norms)[0]
    return rows.view(*ids.shape, rows.shape[1])


def _forward_fake(ids, latent, *rest):
    return latent.new_empty((*ids.shape, _layers(*rest[:-1])[-1][0].shape[1]))


# The operator.


def _check_range(ids: Tensor, vocabulary: int) -> None:
    if ids.numel() == 0:
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if least < 0 or most >= vocabulary:
        raise IndexError(f"ids: expected 0 to {vocabulary - 1}, got {least if least < 0 else most}")


def _decoded_embedding(ids: Tensor, latent: Tensor, *rest: Tensor | int | None) -> Tensor:
    tensors = rest[:-1]  # the padding index only matters to gradients
    if not _HAS_NATIVE or latent.dtype != torch.float32:
        _check_range(ids, latent.shape[0])
        return _forward_by_torch(ids, latent, *tensors)
    try:
        return _native_forward(ids, latent, *tensors)
    except (RuntimeError, ValueError):
        _check_range(ids, latent.shape[0])  # says it as an IndexError
        raise


def _cuda_forward(ids: Tensor, latent: Tensor, *rest: Tensor | int | None) -> Tensor:
    """By the Triton kernel where it can run."""
    tensors = rest[:-1]
    y = plans.cuda_forward(ids, latent, _layers(*tensors[:-1]), tensors[-1])
    return _forward_by_torch(ids, latent, *tensors) if y is None else y


def _fake(ids, latent, *rest):
    return _forward_fake(ids, latent, *rest[:-1])


def _last_gradient_by_torch(
    grad: Tensor, ids: Tensor, rows: Tensor, layers: Sequence[Layer], norms: Tensor | None, padding_idx: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Backward up to the last layer's product, from the rows that enter the first one.

    The gradient of what product and bias of the last layer give, that of each position's norm, and what the hidden
    layers gave.
    """
    d_norms, hidden = None, []
    if padding_idx >= 0:
        grad = grad.masked_fill((ids == padding_idx)[:, None], 0)
    for weight, bias in layers[:-1]:
        rows = F.leaky_relu_(_affine(rows, weight, bias), SLOPE)
        hidden.append(rows)
    if norms is not None or len(layers) > 1:
        decoded = _affine(rows, *layers[-1])
        if len(layers) > 1:
            decoded.tanh_()
    if norms is not None:
        wide = torch.promote_types(grad.dtype, torch.float32)
        factor, length = _rescale(decoded.to(wide), ids, norms)
        direction = decoded / length
        along = (grad * direction).sum(1, keepdim=True)
        d_norms = along[:, 0].to(grad.dtype)
        # Only what is across the row turns it.
        grad = ((grad - direction * along) * factor).to(grad.dtype)
    if len(layers) > 1:
        grad = torch.ops.aten.tanh_backward(grad, decoded)
    return grad, d_norms, hidden


def _gradients(
    grad: Tensor, ids: Tensor, latent: Tensor, *rest: Tensor | int | Sequence[bool] | None
) -> tuple[Tensor, ...]:
    """Those of latent, of each layer's weight and bias, and of norms; what is not needed is an empty tensor."""
    *tensors, norms, padding_idx, needs = rest
    layers, flat, vocabulary = _layers(*tensors), ids.reshape(-1), latent.shape[0]
    found = [grad.new_empty(0) for _ in needs]
    grad = grad.reshape(flat.shape[0], layers[-1][0].shape[1])
    # Positions of one id have the same row, so their gradients may be summed before they go through the decoder. On a
    # GPU the number of distinct ids would have to be waited for; in 16 bits the sums would be rounded too often.
    if flat.is_cpu and grad.dtype in (torch.float32, torch.float64):
        distinct, place = flat.unique(return_inverse=True)
        if distinct.shape[0] < _DISTINCT_SHARE * flat.shape[0]:
            grad, flat = _sum_by_id(grad, place, distinct.shape[0], -1), distinct
    rows = F.embedding(flat, latent)
    if len(layers) > 1:
        F.leaky_relu_(rows, SLOPE)
    last = None
    if latent.is_cuda and (norms is not None or len(layers) > 1):
        last = plans.cuda_last_gradient(grad, flat, latent, layers, norms, padding_idx)
    if last is None:
        last = _last_gradient_by_torch(grad, flat, rows, layers, norms, padding_idx)
    grad, d_norms, hidden = last
    inputs = [rows, *hidden]
    if norms is not None and needs[-1]:
        found[-1] = _sum_by_id(d_norms[:, None], flat, vocabulary, padding_idx)[:, 0]
    for index in reversed(range(len(layers))):
        # What is needed of this layer, and whether anything before it is.
        at = 1 + 2 * index
        if needs[at + 1]:
            found[at + 1] = grad.sum(0)
        if needs[at]:
            found[at] = inputs[index].t() @ grad
        if not any(needs[:at]):
            return tuple(found)
        grad = grad @ layers[index][0].t()
        if len(layers) > 1:
            grad = torch.ops.aten.leaky_relu_backward(grad, inputs[index], SLOPE, True)
    found[0] = _sum_by_id(grad, flat, vocabulary, padding_idx)
    return tuple(found)


def _sum_by_id(rows: Tensor, ids: Tensor, vocabulary: int, padding_idx: int) -> Tensor:
    return torch.ops.aten.embedding_dense_backward(rows, ids, vocabulary, padding_idx, False)


def _gradients_fake(grad, ids, latent, *rest):
    *tensors, _, needs = rest
    return tuple(
        tensor.new_empty(tensor.shape) if need else grad.new_empty(0)
        for tensor, need in zip((latent, *tensors), needs, strict=True)
    )


def _implementation(latent: Tensor) -> Callable:
    return _cuda_forward if latent.is_cuda else _decoded_embedding


class _Eager(torch.autograd.Function):
    """The operator's autograd without the dispatcher, whose Python round trips cost more than a small decoder does."""

    @staticmethod
    def forward(ctx, *arguments):
        *tensors, ctx.padding_idx = arguments
        ctx.save_for_backward(*tensors)
        with _without_autocast(tensors[1].device.type):
            return _implementation(tensors[1])(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        backward = _gradients if is_eager(grad) else torch.ops.lpaf_kernels.decoded_embedding_backward
        return _differentiate(ctx, grad, backward)


def _without_autocast(kind: str) -> AbstractContextManager:
    """A block whose products keep their dtype."""
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)  # torch has none for the meta device
    return torch.autocast(kind, enabled=False) if autocast else nullcontext()


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.padding_idx = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    return _differentiate(ctx, grad, torch.ops.lpaf_kernels.decoded_embedding_backward)


def _differentiate(ctx, grad: Tensor, backward: Callable) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] and tensors[i] is not None for i in range(1, len(tensors))]
    # A backward runs under whatever autocast surrounds it; these products take the forward's dtype.
    with _without_autocast(grad.device.type):
        grads = backward(grad, *tensors, ctx.padding_idx, needs)
    return None, *(d if need else None for d, need in zip(grads, needs, strict=True)), None


register_fallback("decoded_embedding", _cuda_forward, ("CUDA",))
for _name, _kernel, _fake_kernel in (
    ("decoded_embedding", _decoded_embedding, _fake),
    ("decoded_embedding_forward", _forward_by_torch, _forward_fake),
    ("decoded_embedding_backward", _gradients, _gradients_fake),
):
    register_fallback(_name, _kernel)
    torch.library.register_fake(f"lpaf_kernels::{_name}", _fake_kernel, lib=library)
torch.library.register_autograd("lpaf_kernels::decoded_embedding", _backward, setup_context=_setup_context, lib=library)
register_autocast("decoded_embedding", lambda dtype, *arguments: arguments)
