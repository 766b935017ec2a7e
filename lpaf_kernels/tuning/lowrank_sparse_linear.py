"""Run lowrank_sparse_linear by a plan, and measure which plan is the fastest."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..triton.launch import LAUNCHES, MAX_SPLIT_ROWS, Launch, default_launch, pitch
from . import dispatch
from .table import LINEAR, Plan, Shape


class Problem(NamedTuple):
    """The arguments of one forward call, with x as [rows, in] and everything contiguous."""

    x: Tensor
    down: Tensor
    up: Tensor
    kept: Tensor | None
    bias: Tensor | None
    activation: str

    @classmethod
    def of(
        cls, x: Tensor, down: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor | None, activation: str
    ) -> Problem:
        x = x.reshape(-1, down.shape[1])
        if x.shape[1] > 1 and x.stride(1) != 1:
            x = x.contiguous()
        return cls(
            x,
            down.contiguous(),
            up.contiguous(),
            None if kept is None else kept.contiguous(),
            None if bias is None else bias.contiguous(),
            activation,
        )

    def shape(self, direction: str) -> Shape:
        rank, out_features = self.up.shape
        width, in_features = self.down.shape
        dtype = str(self.x.dtype).removeprefix("torch.")
        return Shape(LINEAR, direction, dtype, in_features, out_features, rank, width - rank)


def launches(
    plan: Plan, kernels: tuple[str, ...], rows: int, width: int, arch: int, dtype: torch.dtype
) -> list[Launch]:
    """The launch configurations of ``plan`` for its kernels, by name or, where it names none, the defaults.

    Raises:
        ValueError: a name that this version does not have, or more rank columns than one_kernel holds.
    """
    if not plan.launches:
        return [default_launch(kernel, rows, width, arch, dtype) for kernel in kernels]
    unknown = [name for name in plan.launches if name not in LAUNCHES]
    if unknown or [LAUNCHES[name].kernel for name in plan.launches] != list(kernels):
        raise ValueError(f"launches: expected one of {', '.join(kernels)} each, got {', '.join(plan.launches)}")
    return [LAUNCHES[name] for name in plan.launches]


def forward(plan: Plan, problem: Problem, training: bool, save_pre: bool, arch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(y [rows, out], z [rows, pitch] if training, the activation's input if save_pre) by ``plan``."""
    x, down, up, kept, bias, activation = problem
    rows, width = x.shape[0], down.shape[0]
    if plan.provider == "one_kernel":
        from ..triton import lowrank_sparse_linear as kernels

        (launch,) = launches(plan, ("one_kernel",), rows, width, arch, x.dtype)
        return kernels.one_kernel(x, down, up, launch, kept, bias, activation, training, save_pre)
    if plan.provider == "two_kernels":
        from ..triton import lowrank_sparse_linear as kernels

        first, second = launches(plan, ("project", "expand"), rows, width, arch, x.dtype)
        keep_splits = not training and second.block_m <= MAX_SPLIT_ROWS
        z, splits, _ = kernels.project(x, down, first, keep_splits=keep_splits)
        y, pre = kernels.expand(z, splits, up, x.dtype, second, kept, bias, activation, save_pre)
        return y, z if training else x.new_empty(0), pre
    if plan.provider == "dense":
        return _activate(F.linear(x, dense_weight(down, up, kept), bias), activation), x.new_empty(0), x.new_empty(0)
    return _chain(problem, training, save_pre)


def _chain(problem: Problem, training: bool, save_pre: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, down, up, kept, bias, activation = problem
    width = down.shape[0]
    # Rows of 16 elements' multiple: an odd rank would send the second product to cuBLAS's unaligned kernels.
    z = x.new_empty(x.shape[0], pitch(width))
    torch.mm(x, down.t(), out=z[:, :width])
    y = expand_chain(z[:, :width], up, kept, bias)
    return _activate(y, activation), z if training else x.new_empty(0), y if save_pre else x.new_empty(0)


def expand_chain(z: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor | None) -> Tensor:
    """y [rows, out] of z [rows, r + kept] by torch's product."""
    rank = up.shape[0]
    low = z[:, :rank]
    y = low @ up if bias is None else torch.addmm(bias, low, up)
    if kept is not None:
        y.scatter_add_(1, kept.long().expand(z.shape[0], -1), z[:, rank:])
    return y


def _activate(y: Tensor, activation: str) -> Tensor:
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return {"none": lambda t: t, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}[activation](y)


def backward(
    plan: Plan, problem: Problem, grad: Tensor, z: Tensor, saved: Tensor | None, needs: Sequence[bool], arch: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d x, d down, d up, d bias) by the Triton kernels; empty where not needed.

    Args:
        grad, saved: [rows, out], contiguous; what the activation's derivative is taken at.
        z: [rows, at least r + kept], contiguous.
    """
    from ..triton import lowrank_sparse_linear as kernels

    x, down, up, kept, _, activation = problem
    width = down.shape[0]
    first, second, third = launches(plan, ("project", "expand", "outer"), x.shape[0], width, arch, x.dtype)
    d_x, d_down, d_up, d_bias = (x.new_empty(0) for _ in range(4))
    # Also where only the gradients of up or bias are asked for: it takes the derivative of the activation.
    d_z, _, grad = kernels.project(grad, up, first, kept, saved, activation, keep_splits=False)
    if needs[0]:
        d_x, _ = kernels.expand(d_z, 1, down, x.dtype, second)
    if needs[1]:
        d_down, _ = kernels.outer(d_z, width, x, third)
    if needs[2] or needs[3]:
        d_up, d_bias = kernels.outer(z, up.shape[0] if needs[2] else 0, grad, third, needs[3])
    return d_x, d_down, d_up, d_bias


# Rebuilt dense weights by the id of `down`: the versions and addresses they were built from, and the weight.
_dense: dict[int, tuple[tuple, Tensor]] = {}


def _state(down: Tensor, up: Tensor, kept: Tensor | None) -> tuple | None:
    """What changes when one of the tensors is written or replaced; None for tensors that count no versions."""
    tensors = [tensor for tensor in (down, up, kept) if tensor is not None]
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)


def has_dense(down: Tensor, up: Tensor, kept: Tensor | None) -> bool:
    """Whether the dense weight can be had for free or kept: not while a CUDA graph is captured."""
    state = _state(down, up, kept)
    found = _dense.get(id(down))
    if state is None:
        return False
    return (found is not None and found[0] == state) or not torch.cuda.is_current_stream_capturing()


def dense_weight(down: Tensor, up: Tensor, kept: Tensor | None) -> Tensor:
    """The dense [out, in] weight, built in float32, rounded once, and kept until one of the factors changes.

    It dies with ``down``, and costs in * out numbers of memory meanwhile. Writing through ``.data`` goes unnoticed, as
    it does for autograd.
    """
    state = _state(down, up, kept)
    found = _dense.get(id(down))
    if state is not None and found is not None and found[0] == state:
        return found[1]
    rank = up.shape[0]
    with torch.no_grad():
        wide = torch.promote_types(down.dtype, torch.float32)
        weight = up.t().to(wide) @ down[:rank].to(wide)
        if kept is not None:
            weight.index_add_(0, kept, down[rank:].to(wide))
        weight = weight.to(down.dtype)
    if state is not None:
        if found is None:
            weakref.finalize(down, _dense.pop, id(down), None)
        _dense[id(down)] = (state, weight)
    return weight


def cuda_forward(
    x: Tensor, down: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor | None, activation: str, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's forward for CUDA tensors: (y, z, the activation's input), the last two only if training."""
    problem = Problem.of(x, down, up, kept, bias, activation)
    width, in_features = problem.down.shape
    gpu = dispatch.current_gpu(x.get_device())
    plan = _plan(problem, gpu, "training" if training else "forward")
    save_z = training and saves_z(width, in_features)
    save_pre = training and saves_pre(activation)
    try:
        y, z, pre = forward(plan, problem, save_z, save_pre, gpu.arch)
    except Exception as error:
        if dispatch.is_forced(LINEAR) or plan.provider not in dispatch.TRITON_PROVIDERS:
            raise
        dispatch.report_broken(LINEAR, plan, error)
        y, z, pre = forward(Plan("chain"), problem, save_z, save_pre, gpu.arch)
    lead = x.shape[:-1]
    return y.view(*lead, y.shape[1]), z, pre.view(*lead, y.shape[1]) if save_pre else pre


def cuda_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    kept: Tensor | None,
    z: Tensor,
    saved: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """The operator's backward for CUDA tensors by the Triton kernels; None where the chain is to serve.

    ``z`` is what the forward saved, or nothing: then it is computed again.
    """
    problem = Problem.of(x, down, up, kept, None, activation)
    gpu = dispatch.current_gpu(x.get_device())
    plan = _plan(problem, gpu, "backward")
    if plan.provider != "kernels" or (up.shape[0] == 0 and activation != "none"):
        return None
    grad = grad.reshape(-1, up.shape[1]).contiguous()
    derivative_at = None if activation == "none" else saved.reshape(-1, up.shape[1]).contiguous()
    if z.numel() == 0:
        z = F.linear(problem.x, problem.down)
    try:
        d_x, *others = backward(plan, problem, grad, z, derivative_at, needs, gpu.arch)
    except Exception as error:
        if dispatch.is_forced(LINEAR):
            raise
        dispatch.report_broken(LINEAR, plan, error)
        return None
    return d_x.view(x.shape) if needs[0] else d_x, *others


def prefers_chain(x: Tensor, down: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the layer runs by torch's products for inference: on CUDA as the tables say, elsewhere it may."""
    if not x.is_cuda:
        return True
    return (
        _plan(Problem.of(x, down, up, kept, bias, "none"), dispatch.current_gpu(x.get_device()), "forward").provider
        == "chain"
    )


def _plan(problem: Problem, gpu: dispatch.Gpu, direction: str) -> Plan:
    if not dispatch.takes(LINEAR, problem.x.dtype, problem.down.shape[0], gpu):
        return Plan("chain")
    shape, rows = problem.shape(direction), problem.x.shape[0]
    plan = dispatch.choose(shape, rows, gpu, inference=direction == "forward")
    if plan.provider == "dense" and not has_dense(problem.down, problem.up, problem.kept):
        plan = dispatch.choose(shape, rows, gpu, inference=False)
    return plan


def saves_z(width: int, in_features: int) -> bool:
    """Whether training keeps z for the backward.

    Kept, its ``width`` numbers per row are read back once. Computed again, x's ``in_features`` are read once more,
    written as z and read. Kept is fewer bytes whenever width < in_features, and x must be kept in either case.
    """
    return width < in_features


def saves_pre(activation: str) -> bool:
    """Whether the derivative needs the activation's input (that of relu and tanh follows from the result)."""
    return activation not in ("none", "relu", "tanh")
