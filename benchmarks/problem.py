"""The tensors of one case, the same for every provider, and the float64 truth of its outputs.

Inputs are drawn anew for every case from a seed that follows from its name. The entries of x, dy and, by their
scaling, y are about standard normal. There are several copies of x (and dy): a CUDA timing walks over them so that
the cache does not hold the next one.
"""

from __future__ import annotations

import zlib
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import DTYPE_BYTES, Case, FfnCase, LinearCase

MOST_SETS = 64


def input_sets(case: Case, device: torch.device) -> int:
    """How many copies of x: on CUDA as many as fill the L2 cache twice, at most 64; on the CPU one."""
    if device.type != "cuda":
        return 1
    size = case.rows * case.shape["in"] * DTYPE_BYTES[case.dtype]
    wanted = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return min(max(-(-wanted // size), 2), MOST_SETS)


class Problem:
    """Tensors of a case on a device: what both kinds of case share."""

    def __init__(self, case: Case, device: torch.device, sets: int | None = None) -> None:
        self.case = case
        self.device = device
        self.dtype = getattr(torch, case.dtype)
        self.sets = input_sets(case, device) if sets is None else sets
        self._generator = torch.Generator(device).manual_seed(zlib.crc32(str(case).encode()))

    def _normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        # Drawn in float32 and rounded: bfloat16 draws would be coarse.
        drawn = torch.randn(*shape, generator=self._generator, device=self.device)
        return (drawn * scale).to(self.dtype)

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


class FfnProblem(Problem):
    """x [M, hidden]; down1, up1, bias1 and down2, up2, bias2 as in two low-rank linears."""

    case: FfnCase

    def __init__(self, case: FfnCase, device: torch.device, sets: int | None = None) -> None:
        super().__init__(case, device, sets)
        hidden, wide, rank = case.hidden, case.intermediate, case.rank
        self.down1 = self._normal(rank, hidden, scale=hidden**-0.5)
        self.up1 = self._normal(rank, wide, scale=rank**-0.5)
        self.bias1 = self._normal(wide)
        self.down2 = self._normal(rank, wide, scale=wide**-0.5)
        self.up2 = self._normal(rank, hidden, scale=rank**-0.5)
        self.bias2 = self._normal(hidden)
        self.x = [self._normal(case.rows, hidden) for _ in range(self.sets)]

    @cached_property
    def dense_weights(self) -> tuple[Tensor, Tensor]:
        """[intermediate, hidden] and [hidden, intermediate], computed in float64 and rounded once."""
        pairs = ((self.down1, self.up1), (self.down2, self.up2))
        first, second = ((up.double().t() @ down.double()).to(self.dtype) for down, up in pairs)
        return first, second

    def reference(self) -> dict[str, Tensor]:
        """y in float64, of the first x."""
        x = self.x[0].double()
        hidden = F.gelu((x @ self.down1.double().t()) @ self.up1.double() + self.bias1.double())
        return {"y": (hidden @ self.down2.double().t()) @ self.up2.double() + self.bias2.double()}


def make_problem(case: Case, device: torch.device, sets: int | None = None) -> LinearProblem | FfnProblem:
    """The tensors of ``case``; ``sets`` copies of x, by default :func:`input_sets`."""
    return (LinearProblem if isinstance(case, LinearCase) else FfnProblem)(case, device, sets)
