"""What the operators on whole blocks share: normalisation, dropout and the checks of a layer's arguments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._checks import check_device, check_floating, check_shape
from .lowrank_sparse_linear import check_kept_type

aten = torch.ops.aten

NORMS = ("layer", "rms")
# What csrc/cpu computes as whole blocks (in float32 inside).
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


class Norm(NamedTuple):
    """The normalisation of a block's rows.

    Args:
        kind: "layer" (LayerNorm) or "rms" (RMSNorm).
        weight: [out].
        bias: [out], for "layer" only. Default: none.
        eps: added to the variance, or to the mean square. Default: 1e-5.
    """

    kind: str
    weight: Tensor
    bias: Tensor | None = None
    eps: float = 1e-5


def normalise(y: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm ("layer"), RMSNorm ("rms") or ``y`` itself ("none") over the last dimension."""
    if kind == "layer":
        return F.layer_norm(y, (y.shape[-1],), weight, bias, eps)
    return F.rms_norm(y, (y.shape[-1],), weight, eps) if kind == "rms" else y


def norm_backward(grad: Tensor, s: Tensor, weight: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """d s, d weight and d bias of norm(s) weight + bias."""
    if norm == "layer":
        size = [s.shape[-1]]
        _, mean, scale = aten.native_layer_norm(s, size, weight, None, eps)
        return aten.native_layer_norm_backward(grad, s, size, mean, scale, weight, weight, [True, True, True])
    wide = torch.promote_types(s.dtype, torch.float32)
    g, s, w = grad.to(wide), s.to(wide), weight.to(wide)
    scale = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    normal, weighted = s * scale, g * w
    d_s = (weighted - normal * (weighted * normal).mean(-1, keepdim=True)) * scale
    d_weight = (g * normal).reshape(-1, w.shape[0]).sum(0)
    return d_s.to(grad.dtype), d_weight.to(weight.dtype), weight.new_empty(0)


def reference_norm(y: Tensor, norm: Norm | None) -> Tensor:
    """The same, written out."""
    if norm is None:
        return y
    centred = y - y.mean(-1, keepdim=True) if norm.kind == "layer" else y
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
    return y if norm.bias is None else y + norm.bias


@contextmanager
def seeded(seed: int | None, x: Tensor) -> Iterator[None]:
    """Random numbers inside the block follow from ``seed``, and those after it from what was before; None: as ever."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        yield


def is_autocast(x: Tensor) -> bool:
    """Whether autocast will choose the dtypes (torch has none for the meta device and raises when asked)."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def check_dropout(name: str, p: float) -> None:
    """Raise unless ``p`` is a number in [0, 1)."""
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0.0 <= p < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {p!r}")


def check_seed(seed: int | None) -> None:
    """Raise unless ``seed`` is a whole number or None."""
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed: expected an integer or None, got {seed!r}")


def check_residual(residual: Tensor | None, x: Tensor, out: int, because: str) -> None:
    """Raise unless ``residual`` has the rows of ``x`` and ``out`` columns."""
    if residual is not None:
        check_floating("residual", residual)
        check_shape("residual", residual, *x.shape[:-1], out, because=f"the rows of x, {because}")
        check_device("residual", residual, x)
        if residual.dtype != x.dtype and not is_autocast(x):
            raise TypeError(f"residual: expected dtype {x.dtype} (that of x), got {residual.dtype}")


def check_layer(
    x: Tensor, inputs: int, suffix: str, down: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor | None
) -> int:
    """Raise unless the layer fits ``inputs``; returns its outputs."""
    for name, tensor in ((f"down{suffix}", down), (f"up{suffix}", up)):
        check_floating(name, tensor)
        check_device(name, tensor, x)
        if tensor.dim() != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {list(tensor.shape)}")
    columns = 0
    if kept is not None:
        check_kept_type(kept)
        check_device(f"kept{suffix}", kept, x)
        columns = kept.shape[0]
    check_shape(
        f"down{suffix}", down, up.shape[0] + columns, inputs,
        because=f"the rows of up{suffix} and the length of kept{suffix}, the inputs",
    )  # fmt: skip
    if bias is not None:
        check_floating(f"bias{suffix}", bias)
        check_shape(f"bias{suffix}", bias, up.shape[1], because=f"the columns of up{suffix}")
        check_device(f"bias{suffix}", bias, x)
    dtypes = {tensor.dtype for tensor in (down, up, bias) if tensor is not None}
    if not is_autocast(x) and dtypes != {x.dtype}:
        names = f"down{suffix}, up{suffix}, bias{suffix}"
        raise TypeError(f"{names}: expected dtype {x.dtype} (that of x), got {', '.join(sorted(map(str, dtypes)))}")
    return up.shape[1]


def unchecked_norm(norm: Norm | None) -> tuple[str, Tensor | None, Tensor | None, float]:
    """Its parts for a kernel that checks the tensors itself; raises where :func:`check_norm` would find more."""
    if norm is None:
        return "none", None, None, 0.0
    kind, weight, bias, eps = norm
    if kind not in NORMS or (kind == "rms" and bias is not None) or not eps >= 0:
        raise ValueError
    return kind, weight, bias, eps


def refuse_forward_ad(name: str, *tensors: Tensor | None) -> None:
    """Raise if a tensor carries a forward-mode derivative, which the operators would lose."""
    if forward_ad._current_level < 0 or torch.compiler.is_compiling():
        return
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(f"{name}: has no forward-mode derivative")


def check_norm(norm: Norm | None, size: int, x: Tensor) -> tuple[str, Tensor | None, Tensor | None, float]:
    if norm is None:
        return "none", None, None, 0.0
    if not isinstance(norm, Norm):
        raise TypeError(f"norm: expected a Norm, got {type(norm).__name__}")
    kind, weight, bias, eps = norm
    if kind not in NORMS:
        raise ValueError(f"norm.kind: expected layer or rms, got {kind!r}")
    if kind == "rms" and bias is not None:
        raise ValueError("norm.bias: expected None for rms")
    for name, tensor in (("norm.weight", weight), ("norm.bias", bias)):
        if tensor is not None or name == "norm.weight":
            check_floating(name, tensor)
            check_shape(name, tensor, size, because="the normalised columns")
            check_device(name, tensor, x)
    if not eps >= 0:
        raise ValueError(f"norm.eps: expected at least 0, got {eps!r}")
    return kind, weight, bias, float(eps)
