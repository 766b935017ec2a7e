"""The tensors of one case, the same for every provider, and the float64 truth of its outputs.

Inputs are drawn anew for every case from a seed that follows from its name. The entries of x, dy and, by their
scaling, y are about standard normal. There are several copies of x (and dy): a CUDA timing walks over them so that
the cache does not hold the next one.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lpaf_kernels import KeepThreshold
from lpaf_kernels.ops.masked_linear import masked_linear_reference

from .cases import DTYPE_BYTES, AttentionCase, Case, EncoderCase, FfnCase, LinearCase, MaskedCase

MOST_SETS = 64
LAYER_NORM_EPS = 1e-12  # BERT's


def input_sets(case: Case, device: torch.device) -> int:
    """How many copies of x: on CUDA as many as fill the L2 cache twice, at most 64; on the CPU one."""
    if device.type != "cuda":
        return 1
    size = case.rows * case.shape["in"] * DTYPE_BYTES[case.dtype]
    wanted = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-wanted // size), 2), MOST_SETS)


class Problem:
    """Tensors of a case on a device: what all kinds of case share."""

    def __init__(self, case: Case, device: torch.device, sets: int | None = None) -> None:
        self.case = case
        self.device = device
        self.dtype = getattr(torch, case.dtype)
        self.sets = input_sets(case, device) if sets is None else sets
        self._generator = torch.Generator(device).manual_seed(zlib.crc32(str(case).encode()))

    def _wide_normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self._generator, device=self.device) * scale

    def _normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        # Drawn in float32 and rounded: bfloat16 draws would be coarse.
        return self._wide_normal(*shape, scale=scale).to(self.dtype)

    @property
    def training(self) -> bool:
        return self.case.direction == "forward+backward"


class LinearProblem(Problem):
    """x [M, in], dy [M, out], down [r + kept, in], up [r, out], kept int32 [kept], bias [out]."""

    case: LinearCase

    def __init__(self, case: LinearCase, device: torch.device, sets: int | None = None) -> None:
        super().__init__(case, device, sets)
        inputs, outputs = case.in_features, case.out_features
        self.down = self._normal(case.rank + case.kept, inputs, scale=inputs**-0.5)
        self.up = self._normal(case.rank, outputs, scale=case.rank**-0.5)
        self.bias = self._normal(outputs)
        order = torch.rand(outputs, generator=self._generator, device=self.device).argsort()
        self.kept = order[: case.kept].sort().values.int()
        self.x = [self._normal(case.rows, inputs) for _ in range(self.sets)]
        self.grad = [self._normal(case.rows, outputs) for _ in range(self.sets if self.training else 0)]

    @cached_property
    def dense_weight(self) -> Tensor:
        """[out, in], (u v + S)^T computed in float64 and rounded once."""
        return self._exact_weight().to(self.dtype)

    def _exact_weight(self) -> Tensor:
        rank = self.case.rank
        weight = self.up.double().t() @ self.down[:rank].double()
        return weight.index_add(0, self.kept, self.down[rank:].double())

    def reference(self) -> dict[str, Tensor]:
        """Every output in float64, of the first x and dy: y, and of a training step d_x, d_down, d_up, d_bias, and
        d_weight for those who hold the weight dense."""
        rank, x = self.case.rank, self.x[0].double()
        down, up = self.down.double(), self.up.double()
        z = x @ down.t()
        y = (z[:, :rank] @ up + self.bias.double()).index_add_(1, self.kept, z[:, rank:])
        if not self.training:
            return {"y": y}
        grad = self.grad[0].double()
        d_z = torch.cat([grad @ up.t(), grad[:, self.kept.long()]], dim=1)
        return {
            "y": y,
            "d_x": d_z @ down,
            "d_down": d_z.t() @ x,
            "d_up": z[:, :rank].t() @ grad,
            "d_bias": grad.sum(0),
            "d_weight": grad.t() @ x,
        }


class MaskedProblem(Problem):
    """x [M, in], dy [M, out] in the case's dtype; weight, scores [out, in], bias [out] in float32; half is kept."""

    case: MaskedCase

    def __init__(self, case: MaskedCase, device: torch.device, sets: int | None = None) -> None:
        super().__init__(case, device, sets)
        inputs, outputs = case.in_features, case.out_features
        self.weight = self._wide_normal(outputs, inputs, scale=inputs**-0.5)
        self.scores = self._wide_normal(outputs, inputs)
        self.bias = self._wide_normal(outputs)
        # Scores of at least 0: the same as a comparison, so that every provider can select it.
        everything = torch.full((), outputs * inputs, device=device)
        self.threshold = KeepThreshold(torch.zeros((), device=device), everything)
        self.x = [self._normal(case.rows, inputs) for _ in range(self.sets)]
        self.grad = [self._normal(case.rows, outputs) for _ in range(self.sets if self.training else 0)]

    @cached_property
    def masked_weight(self) -> Tensor:
        """[out, in], pruned for good."""
        return torch.where(self.threshold.mask(self.scores), self.weight, 0.0)

    def reference(self) -> dict[str, Tensor]:
        """Every output in float64, of the first x and dy: y, and of a training step d_x, d_weight, d_scores, d_bias,
        and d_pruned for those who hold the masked weight."""
        tensors = (self.x[0], self.weight, self.scores, self.bias)
        leaves = x, weight, scores, bias = [tensor.double().requires_grad_() for tensor in tensors]
        y = masked_linear_reference(x, weight, scores, self.threshold, bias)
        if not self.training:
            return {"y": y.detach()}
        grad = self.grad[0].double()
        gradients = torch.autograd.grad(y, leaves, grad)
        outputs = dict(zip(("d_x", "d_weight", "d_scores", "d_bias"), gradients, strict=True))
        return {"y": y.detach(), **outputs, "d_pruned": grad.t() @ x.detach()}


class Factors(NamedTuple):
    """A low-rank linear: down [r, in], up [r, out], bias [out]."""

    down: Tensor
    up: Tensor
    bias: Tensor

    @property
    def dense(self) -> Tensor:
        """[out, in], computed in float64 and rounded once."""
        return (self.up.double().t() @ self.down.double()).to(self.down.dtype)

    def double(self) -> Factors:
        return Factors(*(tensor.double() for tensor in self))


class LayerNorm(NamedTuple):
    """weight [size], bias [size]; eps is LAYER_NORM_EPS."""

    weight: Tensor
    bias: Tensor

    def double(self) -> LayerNorm:
        return LayerNorm(*(tensor.double() for tensor in self))


class EncoderLayer(NamedTuple):
    """The parameters of one encoder layer, or of those blocks of it that a case has."""

    attention: tuple[Factors, ...] = ()  # q, k, v, o
    attention_norm: LayerNorm | None = None
    ffn: tuple[Factors, ...] = ()  # first, second
    ffn_norm: LayerNorm | None = None


class BlockProblem(Problem):
    """x [batch, length, hidden] and the parameters of every layer."""

    case: FfnCase | AttentionCase | EncoderCase

    def __init__(self, case: FfnCase | AttentionCase | EncoderCase, device: torch.device, sets: int | None = None):
        super().__init__(case, device, sets)
        self.layers = [self._layer() for _ in range(case.layers if isinstance(case, EncoderCase) else 1)]
        self.x = [self._normal(case.batch, case.length, case.hidden) for _ in range(self.sets)]

    def _factors(self, inputs: int, outputs: int) -> Factors:
        rank = self.case.rank
        down, up = self._normal(rank, inputs, scale=inputs**-0.5), self._normal(rank, outputs, scale=rank**-0.5)
        return Factors(down, up, self._normal(outputs))

    def _norm(self) -> LayerNorm:
        size = self.case.hidden
        return LayerNorm(self._normal(size, scale=0.1) + 1, self._normal(size, scale=0.1))

    def _layer(self) -> EncoderLayer:
        case, attention, ffn = self.case, (), ()
        if not isinstance(case, FfnCase):
            attention = tuple(self._factors(case.hidden, case.hidden) for _ in "qkvo")
        if not isinstance(case, AttentionCase):
            sizes = ((case.hidden, case.intermediate), (case.intermediate, case.hidden))
            ffn = tuple(self._factors(*size) for size in sizes)
        whole = isinstance(case, EncoderCase)
        return EncoderLayer(attention, self._norm() if attention else None, ffn, self._norm() if whole else None)

    def reference(self) -> dict[str, Tensor]:
        """y in float64, of the first x."""
        y = self.x[0].double()
        for layer in self.layers:
            wide = EncoderLayer(*(part and _double(part) for part in layer))
            y = encoder_layer(y, wide, self.case, [dense_linear(f) for f in (*wide.attention, *wide.ffn)])
        return {"y": y}


def _double(part):
    return part.double() if isinstance(part, LayerNorm) else tuple(factors.double() for factors in part)


Linear = Callable[[Tensor], Tensor]


def dense_linear(factors: Factors) -> Linear:
    """The weight multiplied out."""
    weight, bias = factors.dense, factors.bias
    return lambda x: F.linear(x, weight, bias)


def encoder_layer(
    x: Tensor, layer: EncoderLayer, case: FfnCase | AttentionCase | EncoderCase, linears: Sequence[Linear]
) -> Tensor:
    """The blocks of one layer in plain torch; ``linears`` are those of the attention, then of the feed-forward."""
    if layer.attention_norm is not None:
        q, k, v, o, *linears = linears
        heads = [linear(x).unflatten(-1, (case.heads, -1)).transpose(1, 2) for linear in (q, k, v)]
        context = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = F.layer_norm(x + o(context), (case.hidden,), *layer.attention_norm, LAYER_NORM_EPS)
    if layer.ffn:
        first, second = linears
        y = second(F.gelu(first(x)))
        x = y if layer.ffn_norm is None else F.layer_norm(x + y, (case.hidden,), *layer.ffn_norm, LAYER_NORM_EPS)
    return x


def make_problem(
    case: Case, device: torch.device, sets: int | None = None
) -> LinearProblem | MaskedProblem | BlockProblem:
    """The tensors of ``case``; ``sets`` copies of x, by default :func:`input_sets`."""
    kinds = {LinearCase: LinearProblem, MaskedCase: MaskedProblem}
    return kinds.get(type(case), BlockProblem)(case, device, sets)
