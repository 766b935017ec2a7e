"""Run lowrank_attention as one block by a plan. Its other provider, the chain, is the operator's own, by layers."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..triton.launch import Launch, candidates, default_launch
from . import dispatch
from .lowrank_ffn import matrix
from .lowrank_sparse_linear import launches
from .table import ATTENTION, AttentionShape, Plan

if TYPE_CHECKING:
    from ..ops._blocks import Norm
    from ..triton.lowrank_attention import Projection
    from ..triton.lowrank_ffn import Factors

# The kernels of a forward, and of one whose launches do not hold the rank columns of O: that is a layer then.
FORWARD = ("project", "attend", "close")
OPEN = ("project", "attend")


class Problem(NamedTuple):
    """The arguments of the operator, in the order of its schema."""

    x: Tensor
    down_qkv: Tensor
    up_q: Tensor
    kept_q: Tensor | None
    up_k: Tensor
    kept_k: Tensor | None
    up_v: Tensor
    kept_v: Tensor | None
    bias_qkv: Tensor | None
    down_o: Tensor
    up_o: Tensor
    kept_o: Tensor | None
    bias_o: Tensor | None
    residual: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    attn_mask: Tensor | None
    cu_seqlens: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    max_seqlen: int | None
    num_heads: int
    num_kv_heads: int
    is_causal: bool
    scale: float
    norm: str
    eps: float

    @property
    def rows(self) -> int:
        return math.prod(self.x.shape[:-1])

    @property
    def ups(self) -> tuple[Tensor, Tensor, Tensor]:
        """Those of Q, K and V."""
        return self.up_q, self.up_k, self.up_v

    @property
    def kept(self) -> tuple[Tensor | None, ...]:
        """Those of Q, K and V."""
        return self.kept_q, self.kept_k, self.kept_v

    def with_length(self) -> Problem:
        """The same with ``max_seqlen`` as a number: the length of every sequence, or of the longest."""
        if self.cu_seqlens is None:
            return self._replace(max_seqlen=self.x.shape[-2])
        if self.max_seqlen is not None:
            return self
        lengths = self.cu_seqlens.diff()
        return self._replace(max_seqlen=int(lengths.max()) if lengths.numel() else 0)

    def shape(self, direction: str) -> AttentionShape:
        """Of a problem with a length."""
        inner, out_features = self.up_q.shape[1], self.up_o.shape[1]
        ranks = tuple(up.shape[0] for up in (*self.ups, self.up_o))
        kept = tuple(0 if positions is None else positions.shape[0] for positions in (*self.kept, self.kept_o))
        return AttentionShape(
            ATTENTION, direction, str(self.x.dtype).removeprefix("torch."), self.x.shape[-1], self.num_heads,
            self.num_kv_heads, inner // self.num_heads, out_features, ranks, kept, self.cos is not None,
            max(self.max_seqlen, 1),
        )  # fmt: skip

    def prepared(self) -> Problem:
        """The same as the kernels take it: x, the residual and the angles as matrices, a mask of one row as that."""
        own = ("x", "residual", "attn_mask", "cu_seqlens")
        tensors = (
            tensor.contiguous() if isinstance(tensor, Tensor) and name not in own else tensor
            for name, tensor in self._asdict().items()
        )
        problem = Problem(*tensors)
        return problem._replace(
            x=matrix(self.x),
            residual=None if self.residual is None else matrix(self.residual),
            attn_mask=None if self.attn_mask is None else _narrow(self.attn_mask),
            cu_seqlens=None if self.cu_seqlens is None else self.cu_seqlens.int().contiguous(),
            cos=None if self.cos is None else problem.cos.flatten(0, -2),
            sin=None if self.sin is None else problem.sin.flatten(0, -2),
        )

    def projections(self) -> list[Projection]:
        """Q, K and V, where they are in z."""
        from ..triton.lowrank_attention import Projection

        columns = [up.shape[1] for up in self.ups]
        biases = (None,) * 3 if self.bias_qkv is None else self.bias_qkv.split(columns)
        found = [Projection(0, *layer) for layer in zip(self.ups, self.kept, biases)]
        firsts = accumulate((layer.rank + layer.columns_kept for layer in found), initial=0)
        return [layer._replace(first=first) for layer, first in zip(found, firsts)]

    def normalisation(self) -> Norm | None:
        from ..ops._blocks import Norm

        return None if self.norm == "none" else Norm(self.norm, self.norm_weight, self.norm_bias, self.eps)


def _narrow(mask: Tensor) -> Tensor:
    """A mask whose rows are all one row, as that row."""
    return mask[:, :, :1] if mask.stride(2) == 0 else mask


def block_launches(plan: Plan, problem: Problem, shape: AttentionShape, arch: int) -> list[Launch]:
    """Those of ``plan`` for FORWARD or OPEN, or where it names none, the defaults.

    Raises:
        ValueError: a name that this version does not have, or more columns than a launch holds.
    """
    rows, dtype = problem.rows, problem.x.dtype
    closes = bool(candidates("close", shape.out_width, arch, dtype))
    if plan.launches:
        closes = len(plan.launches) == len(FORWARD)
        return launches(plan, FORWARD if closes else OPEN, rows, shape.width, arch, dtype)
    # A tile taller than the sequences would be padding for the rest.
    tall = 64 << (max(shape.length, 16) - 1).bit_length()
    found = [
        default_launch("project", rows, problem.down_qkv.shape[0], arch, dtype),
        default_launch("attend", min(shape.heads * rows, tall), shape.width, arch, dtype, shape.head),
    ]
    return [*found, default_launch("close", rows, shape.out_width, arch, dtype)] if closes else found


def forward(plan: Plan, problem: Problem, arch: int) -> Tensor:
    """y [rows, out] of a prepared problem with a length by the block."""
    from ..triton import lowrank_attention as kernels
    from ..triton.lowrank_ffn import Factors
    from ..triton.lowrank_sparse_linear import project

    first, second, *last = block_launches(plan, problem, problem.shape("forward"), arch)
    z, _, _ = project(problem.x, problem.down_qkv, first, keep_splits=False)
    context = kernels.attend(
        z, *problem.projections(), second, num_heads=problem.num_heads, num_kv_heads=problem.num_kv_heads,
        length=problem.max_seqlen, scale=problem.scale, cu_seqlens=problem.cu_seqlens, mask=problem.attn_mask,
        is_causal=problem.is_causal, rotary=None if problem.cos is None else (problem.cos, problem.sin),
    )  # fmt: skip
    out = Factors(problem.down_o, problem.up_o, problem.kept_o, problem.bias_o)
    if last:
        return kernels.close(context, out, *last, problem.residual, problem.normalisation())
    return _end(context, out, problem)


def _end(context: Tensor, out: Factors, problem: Problem) -> Tensor:
    """norm(O(context) + residual) with O as a layer by itself."""
    from ..ops._blocks import normalise
    from ..ops.lowrank_sparse_linear import kernels

    layer, _ = kernels(context)
    y, _, _ = layer(context, *out, "none", False)
    if problem.residual is not None:
        y += problem.residual
    return normalise(y, problem.norm, problem.norm_weight, problem.norm_bias, problem.eps)


def cuda_forward(problem: Problem) -> Tensor | None:
    """The operator's forward for CUDA tensors, with a length, as one block; None where its layers are to serve.

    Autograd saves nothing but the arguments, so a forward that it records goes the same way. The backward makes the
    block again, layer by layer.
    """
    gpu = dispatch.current_gpu(problem.x.get_device())
    plan = _plan(problem, gpu)
    if plan.provider != "block":
        return None
    try:
        y = forward(plan, problem.prepared(), gpu.arch)
    except Exception as error:
        if dispatch.is_forced(ATTENTION):
            raise
        dispatch.report_broken(ATTENTION, plan, error)
        return None
    return y.view(*problem.x.shape[:-1], y.shape[1])


def _plan(problem: Problem, gpu: dispatch.Gpu) -> Plan:
    shape, rows = problem.shape("forward"), problem.rows
    if rows == 0 or not dispatch.takes(ATTENTION, problem.x.dtype, shape.width, gpu):
        return Plan("chain")
    return dispatch.choose(shape, rows, gpu)
