"""A linear layer stored as a low-rank product plus a few full rows, with bias and activation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .._library import has_kernel, library, register_autocast, register_fallback
from ..tuning import lowrank_sparse_linear as plans
from ._checks import check_device, check_floating, check_shape

aten = torch.ops.aten

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu", "tanh")
# Backward of these needs the activation's result only, of the others its input.
_FROM_RESULT = ("relu", "tanh")
# csrc/cpu/lowrank_sparse_linear.cpp: these dtypes; float64 runs through ATen.
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HAS_NATIVE = has_kernel("lowrank_sparse_linear_forward", "CPU")
_native_forward = torch.ops.lpaf_kernels.lowrank_sparse_linear_forward.default
_native_gradients = torch.ops.lpaf_kernels.lowrank_sparse_linear_gradients.default
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


def lowrank_sparse_linear(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    s: Tensor | None = None,
    kept: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """act((x u) v + scatter(x s, kept) + bias), the form of the papers (LoSparse: W = U V + S).

    Args:
        x: [..., in], float32, float16, bfloat16 or float64 (as every other floating argument).
        u: [in, r]; v: [r, out]. r = 0 is valid.
        s: [in, kept], the kept columns of S. Default: none.
        kept: int32 or int64 [kept], their sorted unique positions among the outputs; given iff ``s`` is.
            :func:`check_kept` reads the values where a module or checkpoint is made, on a GPU nothing else does.
        bias: [out]. Default: none.
        activation: None, "gelu", "gelu_tanh", "relu", "silu" or "tanh".

    Returns:
        [..., out].

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or name.
    """
    check_floating("u", u)
    if u.dim() != 2:
        raise ValueError(f"u: expected shape [in, r], got {list(u.shape)}")
    if (s is None) != (kept is None):
        raise ValueError("kept: expected together with s, got one without the other")
    down = u.t()
    if s is not None:
        check_floating("s", s)
        check_kept_type(kept)
        check_shape("s", s, u.shape[0], kept.numel(), because="the rows of u, the length of kept")
        down = torch.cat([down, s.t()])
    check_floating("v", v)
    if v.dim() != 2 or v.shape[0] != u.shape[1]:
        raise ValueError(f"v: expected shape [{u.shape[1]}, out] (the columns of u), got {list(v.shape)}")
    return packed_lowrank_sparse_linear(x, down, v, kept, bias, activation)


def packed_lowrank_sparse_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    kept: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """:func:`lowrank_sparse_linear` on the packed parameters that modules and checkpoints store.

    Args:
        x: [..., in], float32, float16, bfloat16 or float64 (as every other floating argument).
        down: [r + kept, in]: the rows of u^T, then those of s^T.
        up: [r, out], v.
        kept: int32 or int64 [kept]. Default: none.
        bias: [out]. Default: none.
        activation: None, "gelu", "gelu_tanh", "relu", "silu" or "tanh".

    Returns:
        [..., out].

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or name.
    """
    if (
        _HAS_NATIVE
        and not torch.is_grad_enabled()
        and is_eager(x, down, up, kept, bias)
        and x.is_cpu
        and x.dtype in _NATIVE_DTYPES
        and (activation is None or activation in ACTIVATIONS)
        and not torch.is_autocast_enabled("cpu")
    ):
        # The kernel checks dtypes and shapes itself, in less time than it takes here. What it refuses comes to the
        # checks below, which say why.
        try:
            y, _ = _native_forward(x, down, up, kept, bias, False)
        except (RuntimeError, TypeError, ValueError):
            pass
        else:
            return y if activation is None or activation == "none" else _activate_(y, activation)
    check_floating("x", x)
    check_floating("down", down)
    check_floating("up", up)
    if down.dim() != 2:
        raise ValueError(f"down: expected shape [r + kept, in], got {list(down.shape)}")
    if up.dim() != 2:
        raise ValueError(f"up: expected shape [r, out], got {list(up.shape)}")
    if x.dim() == 0 or x.shape[-1] != down.shape[1]:
        raise ValueError(f"x: expected last dimension {down.shape[1]} (that of down), got shape {list(x.shape)}")
    columns = 0
    if kept is not None:
        check_kept_type(kept)
        columns = kept.shape[0]
    if up.shape[0] + columns != down.shape[0]:
        raise ValueError(
            f"down: expected {up.shape[0]} + {columns} rows (those of up and the length of kept),"
            f" got shape {list(down.shape)}"
        )
    device = x.device
    # torch has no autocast for the meta device and raises when asked.
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    if not autocast and (down.dtype != x.dtype or up.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype)):
        dtypes = f"{down.dtype}, {up.dtype}, {None if bias is None else bias.dtype}"
        raise TypeError(f"down, up, bias: expected dtype {x.dtype} (that of x), got {dtypes}")
    check_device("down", down, x)
    check_device("up", up, x)
    if bias is not None:
        check_floating("bias", bias)
        check_shape("bias", bias, up.shape[1], because="the columns of up")
        check_device("bias", bias, x)
    if columns:
        check_device("kept", kept, x)
    else:
        kept = None
    if activation is None:
        activation = "none"
    elif activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected None or one of {', '.join(ACTIVATIONS[1:])}, got {activation!r}")
    training = torch.is_grad_enabled() and (
        x.requires_grad or down.requires_grad or up.requires_grad or (bias is not None and bias.requires_grad)
    )
    if is_eager(x, down, up, bias):
        if autocast:
            arguments = _cast(torch.get_autocast_dtype(device.type), x, down, up, kept, bias, activation, training)
            x, down, up, kept, bias, _, _ = arguments
        if training:
            return _Eager.apply(x, down, up, kept, bias, activation)
        return kernels(x)[0](x, down, up, kept, bias, activation, False)[0]
    return torch.ops.lpaf_kernels.lowrank_sparse_linear(x, down, up, kept, bias, activation, training)[0]


def lowrank_sparse_linear_reference(
    x: Tensor,
    u: Tensor,
    v: Tensor,
    s: Tensor | None = None,
    kept: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """The same in plain torch, differentiable: the dense weight is built and applied."""
    weight = u @ v
    if s is not None:
        weight = weight.index_add(1, kept, s)
    y = x @ weight
    if bias is not None:
        y = y + bias
    if activation is None:
        return y
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return {"relu": F.relu, "silu": F.silu, "tanh": torch.tanh}[activation](y)


def is_eager(*tensors: Tensor | None) -> bool:
    """Whether plain tensors of one device are computed now, and nothing traces, counts or transforms the operators."""
    x = tensors[0]
    return (
        type(x) is Tensor
        and not x.is_meta
        and all(
            tensor is None or (type(tensor) in _PLAIN_TYPES and tensor.device == x.device) for tensor in tensors[1:]
        )
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def check_kept_type(kept: Tensor) -> None:
    """Raise unless ``kept`` is a vector of indices (its values are not read)."""
    if not isinstance(kept, Tensor):
        raise TypeError(f"kept: expected a torch.Tensor, got {type(kept).__name__}")
    if kept.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"kept: expected int32 or int64, got {kept.dtype}")
    if kept.dim() != 1:
        raise ValueError(f"kept: expected shape [kept], got {list(kept.shape)}")


def check_kept(kept: Tensor, out_features: int) -> None:
    """Raise unless ``kept`` holds sorted unique output positions in [0, out_features). Reads the values."""
    check_kept_type(kept)
    if kept.is_meta or kept.numel() == 0:
        return
    if int(kept.min()) < 0 or int(kept.max()) >= out_features:
        raise ValueError(f"kept: expected positions in [0, {out_features}), got {int(kept.min())} to {int(kept.max())}")
    if not bool((kept[1:] > kept[:-1]).all()):
        raise ValueError("kept: expected sorted unique positions, got repeated or unsorted ones")


def _activate_(pre: Tensor, activation: str) -> Tensor:
    """The activation in place."""
    if activation == "gelu":
        return aten.gelu_(pre)
    if activation == "gelu_tanh":
        return aten.gelu_(pre, approximate="tanh")
    if activation == "relu":
        return pre.relu_()
    if activation == "silu":
        return aten.silu_(pre)
    return pre.tanh_()


def _activation_grad(grad: Tensor, saved: Tensor, activation: str) -> Tensor:
    """d pre from d y; ``saved`` is y for relu and tanh, pre for the others."""
    if activation == "gelu":
        return aten.gelu_backward(grad, saved)
    if activation == "gelu_tanh":
        return aten.gelu_backward(grad, saved, approximate="tanh")
    if activation == "relu":
        return aten.threshold_backward(grad, saved, 0)
    if activation == "silu":
        return aten.silu_backward(grad, saved)
    return aten.tanh_backward(grad, saved)


def _forward(
    x: Tensor, down: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor | None, activation: str, keep_z: bool
) -> tuple[Tensor, Tensor]:
    """y, and z = x down^T [rows, r + kept] or, where it is not to be kept, an empty tensor."""
    if _HAS_NATIVE and x.dtype in _NATIVE_DTYPES and x.is_cpu:
        y, z = _native_forward(x, down, up, kept, bias, keep_z)
    else:
        y, z = _lowrank_sparse_linear_forward(x, down, up, kept, bias, keep_z)
    return y if activation == "none" else _activate_(y, activation), z


def _lowrank_sparse_linear_forward(
    x: Tensor, down: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor | None, keep_z: bool
) -> tuple[Tensor, Tensor]:
    """One GEMM reads x once for u and s; the second starts from the bias; S joins at its columns: y and z."""
    rank, out_features = up.shape
    z = F.linear(x if x.dim() == 2 else x.reshape(_rows(x), down.shape[1]), down)
    low = z if kept is None else z[:, :rank]
    y = torch.mm(low, up) if bias is None else torch.addmm(bias, low, up)
    if kept is not None:
        # Row by row, which index_add_ along columns is not (20 times slower at 1536 outputs).
        y.scatter_add_(1, _columns(kept, z), z[:, rank:])
    return (y if x.dim() == 2 else y.view(*x.shape[:-1], out_features)), z if keep_z else x.new_empty(0)


def _lowrank_sparse_linear_forward_fake(x, down, up, kept, bias, keep_z):
    y, _, _ = _lowrank_sparse_linear_fake(x, down, up, kept, bias, "none", False)
    return y, x.new_empty((_rows(x), down.shape[0]) if keep_z else 0)


def _columns(kept: Tensor, z: Tensor) -> Tensor:
    """``kept`` for every row of ``z``, as scatter and gather want it (no copy beyond the vector)."""
    return kept.long().expand(z.shape[0], -1)


def _lowrank_sparse_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    kept: Tensor | None,
    bias: Tensor | None,
    activation: str,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    keep_z = training and plans.saves_z(*down.shape)
    if training and plans.saves_pre(activation):
        pre, z = _forward(x, down, up, kept, bias, "none", keep_z)
        return _activate_(pre.clone(), activation), z, pre
    y, z = _forward(x, down, up, kept, bias, activation, keep_z)
    return y, z, x.new_empty(0)


def _lowrank_sparse_linear_fake(x, down, up, kept, bias, activation, training):
    lead, out_features = x.shape[:-1], up.shape[1]
    # The kernels keep the rows of z padded to whole 16-byte pieces.
    columns = plans.pitch(down.shape[0]) if x.device.type == "cuda" else down.shape[0]
    return (
        x.new_empty((*lead, out_features)),
        x.new_empty((_rows(x), columns) if training and plans.saves_z(*down.shape) else 0),
        x.new_empty((*lead, out_features) if training and plans.saves_pre(activation) else 0),
    )


def _rows(x: Tensor) -> int:
    """Of x as a matrix (a loop, because it must also run on symbolic sizes)."""
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


def _lowrank_sparse_linear_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    kept: Tensor | None,
    z: Tensor,
    saved: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if activation != "none":
        grad = _activation_grad(grad, saved, activation)
    grad = grad.reshape(_rows(grad), up.shape[1])
    if needs[2] and not plans.saves_z(*down.shape):
        z = F.linear(x.reshape(_rows(x), x.shape[-1]), down[: up.shape[0]])
    native = _HAS_NATIVE and x.dtype in _NATIVE_DTYPES and x.is_cpu
    gradients = _native_gradients if native else _lowrank_sparse_linear_gradients
    return gradients(grad, x, down, up, kept, z, *needs)


def _lowrank_sparse_linear_gradients(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    kept: Tensor | None,
    z: Tensor,
    needs_x: bool,
    needs_down: bool,
    needs_up: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From grad [rows, out] and z [rows, r or more]; a gradient that is not needed is an empty tensor."""
    rank = up.shape[0]
    d_x, d_down, d_up, d_bias = (grad.new_empty(0) for _ in range(4))
    if needs_x or needs_down:
        if kept is None:
            d_z = grad @ up.t()
        else:
            d_z = grad.new_empty(grad.shape[0], down.shape[0])
            torch.mm(grad, up.t(), out=d_z[:, :rank])
            torch.gather(grad, 1, _columns(kept, d_z), out=d_z[:, rank:])
        if needs_x:
            d_x = (d_z @ down).view(x.shape)
        if needs_down:
            d_down = d_z.t() @ x.reshape(_rows(x), down.shape[1])
    if needs_up:
        d_up = z[:, :rank].t() @ grad
    if needs_bias:
        d_bias = grad.sum(0)
    return d_x, d_down, d_up, d_bias


def _lowrank_sparse_linear_gradients_fake(grad, x, down, up, kept, z, *needs):
    shapes = (x.shape, down.shape, up.shape, (up.shape[1],))
    return tuple(grad.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def _lowrank_sparse_linear_backward_fake(grad, x, down, up, kept, z, saved, activation, needs):
    return _lowrank_sparse_linear_gradients_fake(grad, x, down, up, kept, z, *needs)


def kernels(x: Tensor) -> tuple[Callable, Callable]:
    """The operator's forward and backward for the device of ``x``."""
    if x.is_cuda:
        return plans.cuda_forward, _cuda_backward
    return _lowrank_sparse_linear, _lowrank_sparse_linear_backward


class _Eager(torch.autograd.Function):
    """The operator's autograd without the dispatcher, whose Python round trips cost more than a small layer does."""

    @staticmethod
    def forward(ctx, x, down, up, kept, bias, activation):
        y, z, pre = kernels(x)[0](x, down, up, kept, bias, activation, True)
        ctx.save_for_backward(x, down, up, kept, z, y if activation in _FROM_RESULT else pre)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        direct = is_eager(grad)
        backward = kernels(grad)[1] if direct else torch.ops.lpaf_kernels.lowrank_sparse_linear_backward
        return _differentiate(ctx, grad, backward)


def _setup_context(ctx, inputs, output) -> None:
    x, down, up, kept, _, activation, training = inputs
    y, z, pre = output
    ctx.mark_non_differentiable(z, pre)
    ctx.set_materialize_grads(False)
    if not training:
        z, pre = None, None
    ctx.save_for_backward(x, down, up, kept, z, y if activation in _FROM_RESULT else pre)
    ctx.activation = activation


def _differentiate(ctx, grad: Tensor, backward: Callable) -> tuple[Tensor | None, ...]:
    x, down, up, kept, z, saved = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 4)]
    # A backward runs under whatever autocast surrounds it; these products take the forward's dtype.
    kind = grad.device.type
    autocast = kind != "meta" and torch.is_autocast_enabled(kind)
    with torch.autocast(kind, enabled=False) if autocast else nullcontext():
        grads = backward(grad, x, down, up, kept, z, saved, ctx.activation, needs)
    d_x, d_down, d_up, d_bias = (d if need else None for d, need in zip(grads, needs, strict=True))
    return d_x, d_down, d_up, None, d_bias, None


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 7
    if ctx.saved_tensors[4] is None:
        raise RuntimeError("lowrank_sparse_linear: backward needs a forward with training=True")
    return *_differentiate(ctx, grad, torch.ops.lpaf_kernels.lowrank_sparse_linear_backward), None


def _cast(dtype, x, down, up, kept, bias, activation, training):
    if x.dtype == torch.float64:
        return x, down, up, kept, bias, activation, training
    return (
        x.to(dtype),
        down.to(dtype),
        up.to(dtype),
        kept,
        None if bias is None else bias.to(dtype),
        activation,
        training,
    )


def _cuda_backward(grad, x, down, up, kept, z, saved, activation, needs):
    """The Triton kernels where the tables prefer them, else the same products as everywhere."""
    grads = plans.cuda_backward(grad, x, down, up, kept, z, saved, activation, needs)
    if grads is None:
        return _lowrank_sparse_linear_backward(grad, x, down, up, kept, z, saved, activation, needs)
    return grads


for _name, _kernel, _cuda_kernel, _fake in (
    ("lowrank_sparse_linear", _lowrank_sparse_linear, plans.cuda_forward, _lowrank_sparse_linear_fake),
    (
        "lowrank_sparse_linear_backward",
        _lowrank_sparse_linear_backward,
        _cuda_backward,
        _lowrank_sparse_linear_backward_fake,
    ),
    (
        "lowrank_sparse_linear_forward",
        _lowrank_sparse_linear_forward,
        _lowrank_sparse_linear_forward,
        _lowrank_sparse_linear_forward_fake,
    ),
    (
        "lowrank_sparse_linear_gradients",
        _lowrank_sparse_linear_gradients,
        _lowrank_sparse_linear_gradients,
        _lowrank_sparse_linear_gradients_fake,
    ),
):
    register_fallback(_name, _kernel, ("CPU",))
    register_fallback(_name, _cuda_kernel, ("CUDA",))
    torch.library.register_fake(f"lpaf_kernels::{_name}", _fake, lib=library)
torch.library.register_autograd(
    "lpaf_kernels::lowrank_sparse_linear", _backward, setup_context=_setup_context, lib=library
)
register_autocast("lowrank_sparse_linear", _cast)
