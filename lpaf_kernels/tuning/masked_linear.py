"""Run masked_linear by a plan of its Triton kernels. Its other provider, the cast, is the operator's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..triton.launch import GRANULE, LAUNCHES, Launch, tile_launch
from . import dispatch
from .table import MASKED, MaskedShape, Plan

if TYPE_CHECKING:
    from ..triton.masked_linear import Selection

FORWARD = ("masked",)
# A backward with every gradient by kernels, and one that leaves d x to the cast.
BACKWARD = ("masked", "masked_grads")
WEIGHTS = ("masked_grads",)


class Problem(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    x: Tensor
    weight: Tensor
    scores: Tensor
    value: Tensor
    tie_index: Tensor
    bias: Tensor | None

    @property
    def rows(self) -> int:
        return self.x.numel() // max(self.x.shape[-1], 1)

    def shape(self, direction: str) -> MaskedShape:
        """With the wider dtype of weight and scores: float64 of either is the cast's."""
        out_features, in_features = self.weight.shape
        wider = max(self.weight.dtype, self.scores.dtype, key=lambda dtype: dtype.itemsize)
        names = (str(dtype).removeprefix("torch.") for dtype in (self.x.dtype, wider))
        return MaskedShape(MASKED, direction, next(names), in_features, out_features, next(names))

    def prepared(self) -> Problem:
        """The same as the kernels take it."""
        bias = None if self.bias is None else self.bias.to(self.x.dtype).contiguous()
        own = (self.weight.contiguous(), self.scores.contiguous())
        return Problem(matrix(self.x), *own, self.value, self.tie_index, bias)

    def selection(self) -> Selection:
        from ..triton.masked_linear import Selection

        return Selection(self.scores, self.value, self.tie_index)


def matrix(x: Tensor) -> Tensor:
    """x as [rows, columns], each row in one piece that begins at a multiple of 16 bytes: else loads are narrow."""
    x = x.reshape(-1, x.shape[-1])
    aligned = x.stride(1) == 1 and x.stride(0) % GRANULE == 0 and x.data_ptr() % 16 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def launches(plan: Plan, kernels: Sequence[str], tiled: Sequence[tuple[int, int]], arch: int) -> list[Launch]:
    """Those of ``plan`` for its kernels, by name or, where it names none, by the outputs that they tile.

    Raises:
        ValueError: a name that this version does not have.
    """
    if not plan.launches:
        return [tile_launch(kernel, *sides, arch) for kernel, sides in zip(kernels, tiled, strict=True)]
    found = [LAUNCHES.get(name) for name in plan.launches]
    if [launch and launch.kernel for launch in found] != list(kernels):
        raise ValueError(f"launches: expected one of {', '.join(kernels)} each, got {', '.join(plan.launches)}")
    return found


def forward(plan: Plan, problem: Problem, arch: int) -> Tensor:
    """y [rows, out] of a prepared problem."""
    from ..triton import masked_linear as kernels

    x, weight, *_, bias = problem
    (launch,) = launches(plan, FORWARD, [(problem.rows, weight.shape[0])], arch)
    return kernels.product(x, weight, problem.selection(), launch, transposed=True, bias=bias)


def backward(
    plan: Plan, problem: Problem, grad: Tensor, needs: Sequence[bool], arch: int
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """(d x [rows, in], (d weight, d scores)) of a prepared problem and grad [rows, out]; None of either where it is not
    needed, or not the plan's."""
    from ..triton import masked_linear as kernels

    x, weight, *_ = problem
    names = WEIGHTS if len(plan.launches) == 1 else BACKWARD
    *first, last = launches(plan, names, [(problem.rows, weight.shape[1]), tuple(weight.shape)][-len(names) :], arch)
    d_x = kernels.product(grad, weight, problem.selection(), *first) if first and needs[0] else None
    if not needs[2]:  # the cast masks G in one pass
        return d_x, None
    return d_x, kernels.weight_grads(grad, x, weight, problem.selection(), last)


def cuda_forward(problem: Problem) -> Tensor | None:
    """The operator's forward for CUDA tensors by the kernels; None where the cast is to serve."""
    gpu = dispatch.current_gpu(problem.x.get_device())
    plan = _plan(problem, gpu, "forward")
    if plan.provider != "kernels":
        return None
    try:
        y = forward(plan, problem.prepared(), gpu.arch)
    except Exception as error:
        if dispatch.is_forced(MASKED):
            raise
        dispatch.report_broken(MASKED, plan, error)
        return None
    return y.view(*problem.x.shape[:-1], y.shape[1])


def cuda_backward(
    problem: Problem, grad: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
    """(d x, (d weight, d scores)) for CUDA tensors, None of either where the cast is to serve."""
    gpu = dispatch.current_gpu(problem.x.get_device())
    plan = _plan(problem, gpu, "backward")
    if plan.provider != "kernels":
        return None, None
    try:
        d_x, both = backward(plan, problem.prepared(), matrix(grad), needs, gpu.arch)
    except Exception as error:
        if dispatch.is_forced(MASKED):
            raise
        dispatch.report_broken(MASKED, plan, error)
        return None, None
    return None if d_x is None else d_x.view(problem.x.shape), both


def _plan(problem: Problem, gpu: dispatch.Gpu, direction: str) -> Plan:
    shape = problem.shape(direction)
    if problem.rows == 0 or dispatch.unfit_masked(shape) is not None:
        return dispatch.baseline(MASKED)
    return dispatch.choose(shape, problem.rows, gpu)
