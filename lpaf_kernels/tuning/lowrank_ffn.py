"""Run lowrank_ffn as one block by a plan. Its other provider, the chain, is the operator's own: layers one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..triton.launch import candidates
from . import dispatch
from .lowrank_sparse_linear import launches
from .table import FFN, FfnShape, Plan

if TYPE_CHECKING:
    from ..triton.lowrank_ffn import Factors, Norm

# The kernels of a forward whose launches hold all rank columns, of one that passes over them, and of a backward.
FORWARD = ("ffn",)
WIDE = ("project", "ffn_wide", "expand")
BACKWARD = ("ffn", "project", "expand", "outer", "ffn_rows", "ffn_weights")
# The arguments without a gradient.
OTHERS = ("kept1", "kept2", "activation", "norm", "eps")


class Problem(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    x: Tensor
    down1: Tensor
    up1: Tensor
    kept1: Tensor | None
    bias1: Tensor | None
    down2: Tensor
    up2: Tensor
    kept2: Tensor | None
    bias2: Tensor | None
    down_gate: Tensor | None
    up_gate: Tensor | None
    bias_gate: Tensor | None
    residual: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    activation: str
    norm: str
    eps: float

    @property
    def rows(self) -> int:
        return math.prod(self.x.shape[:-1])

    @property
    def width(self) -> int:
        """The rank columns of F1 and the gate together, or those of F2: what one program holds."""
        gate = 0 if self.down_gate is None else self.down_gate.shape[0]
        return max(self.down1.shape[0] + gate, self.down2.shape[0])

    def shape(self, direction: str) -> FfnShape:
        (rank1, hidden), (rank2, out_features) = self.up1.shape, self.up2.shape
        kept = self.down1.shape[0] - rank1, self.down2.shape[0] - rank2
        gate = 0 if self.down_gate is None else self.down_gate.shape[0]
        dtype = str(self.x.dtype).removeprefix("torch.")
        return FfnShape(FFN, direction, dtype, self.x.shape[-1], hidden, out_features, (rank1, rank2), kept, gate)

    def prepared(self) -> Problem:
        """The same with x and the residual as matrices whose rows are dense, and everything else contiguous."""
        tensors = (
            tensor.contiguous() if isinstance(tensor, Tensor) and name not in ("x", "residual") else tensor
            for name, tensor in self._asdict().items()
        )
        return Problem(*tensors)._replace(
            x=matrix(self.x), residual=None if self.residual is None else matrix(self.residual)
        )

    def factors(self) -> tuple[Factors, Factors, Factors | None]:
        """F1, F2 and the gate."""
        from ..triton.lowrank_ffn import Factors

        gate = None
        if self.down_gate is not None:
            gate = Factors(self.down_gate, self.up_gate, None, self.bias_gate)
        first = Factors(self.down1, self.up1, self.kept1, self.bias1)
        return first, Factors(self.down2, self.up2, self.kept2, self.bias2), gate

    def normalisation(self) -> Norm | None:
        from ..triton.lowrank_ffn import Norm

        return None if self.norm == "none" else Norm(self.norm, self.norm_weight, self.norm_bias, self.eps)


def matrix(tensor: Tensor) -> Tensor:
    """``tensor`` as a matrix with dense rows."""
    tensor = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])
    return tensor if tensor.shape[1] <= 1 or tensor.stride(1) == 1 else tensor.contiguous()


def forward(plan: Plan, problem: Problem, arch: int) -> Tensor:
    """y [rows, out] of a prepared problem by the block."""
    from ..triton import lowrank_ffn as kernels

    x, width = problem.x, problem.width
    first, second, gate = problem.factors()
    options = {"gate": gate, "activation": problem.activation, "residual": problem.residual}
    options["norm"] = problem.normalisation()
    holds = bool(candidates("ffn", width, arch, x.dtype)) if not plan.launches else len(plan.launches) == len(FORWARD)
    if holds:
        (launch,) = launches(plan, FORWARD, x.shape[0], width, arch, x.dtype)
        return kernels.forward(x, first, second, launch, **options)
    found = launches(plan, WIDE, x.shape[0], width, arch, x.dtype)
    return kernels.forward_wide(x, first, second, kernels.WideLaunches(*found), **options)


def backward(plan: Plan, problem: Problem, grad: Tensor, needs: Sequence[bool], arch: int) -> tuple[Tensor, ...]:
    """The gradients of the floating arguments of a prepared problem, in their order, from ``grad`` [rows, out].

    The forward is run again for z1, z2 and, where there is a norm, its input. What is not needed is an empty tensor.
    """
    from ..ops._blocks import norm_backward
    from ..triton import lowrank_ffn as kernels

    x, width = problem.x, problem.width
    first, second, gate = problem.factors()
    launch, *others = launches(plan, BACKWARD, x.shape[0], width, arch, x.dtype)
    d_weight = d_bias = None
    if problem.norm == "none":
        saved = kernels.intermediates(x, first, second, launch, gate=gate, activation=problem.activation)
    else:
        s, *saved = kernels.forward_with_z(
            x, first, second, launch, gate=gate, activation=problem.activation, residual=problem.residual
        )
        grad, d_weight, d_bias = norm_backward(grad, s, problem.norm_weight, problem.norm, problem.eps)
    found = kernels.backward(
        grad, x, saved, first, second, kernels.BackwardLaunches(*others), gate=gate, activation=problem.activation,
        needs=needs,
    )  # fmt: skip
    gradients = (*found, grad.clone() if needs[10] else None, d_weight, d_bias)
    nothing = x.new_empty(0)
    return tuple(gradient if need else nothing for gradient, need in zip(gradients, needs, strict=True))


def cuda_forward(*arguments: object, training: bool) -> Tensor | None:
    """The operator's forward for CUDA tensors as one block; None where its layers are to serve one by one."""
    problem = Problem(*arguments)
    gpu = dispatch.current_gpu(problem.x.get_device())
    plan = _plan(problem, gpu, "training" if training else "forward")
    if plan.provider != "block":
        return None
    try:
        y = forward(plan, problem.prepared(), gpu.arch)
    except Exception as error:
        _report(plan, error)
        return None
    return y.view(*problem.x.shape[:-1], y.shape[1])


def cuda_backward(grad: Tensor, *arguments: object, needs: Sequence[bool]) -> tuple[Tensor, ...] | None:
    """The operator's backward for CUDA tensors as one block; None where its layers are to serve one by one."""
    problem = Problem(*arguments)
    gpu = dispatch.current_gpu(problem.x.get_device())
    plan = _plan(problem, gpu, "backward")
    if plan.provider != "block":
        return None
    try:
        d_x, *others, d_residual, d_weight, d_bias = backward(plan, problem.prepared(), matrix(grad), needs, gpu.arch)
    except Exception as error:
        _report(plan, error)
        return None
    d_x = d_x.view(problem.x.shape) if needs[0] else d_x
    d_residual = d_residual.view(grad.shape) if needs[10] else d_residual
    return d_x, *others, d_residual, d_weight, d_bias


def _plan(problem: Problem, gpu: dispatch.Gpu, direction: str) -> Plan:
    if not dispatch.takes(FFN, problem.x.dtype, problem.width, gpu):
        return Plan("chain")
    return dispatch.choose(problem.shape(direction), problem.rows, gpu)


def _report(plan: Plan, error: Exception) -> None:
    """Raise the error of a forced plan; leave another plan out from now on."""
    if dispatch.is_forced(FFN):
        raise error
    dispatch.report_broken(FFN, plan, error)
