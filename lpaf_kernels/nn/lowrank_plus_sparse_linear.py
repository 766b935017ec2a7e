"""The training form of a low-rank plus sparse layer: S is a whole matrix whose rows are pruned on the way."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import check_floating, check_integer, check_shape
from ..ops.weighted_svd import weighted_svd
from .lowrank_sparse_linear import LowRankSparseLinear


class LowRankPlusSparseLinear(nn.Module):
    """y = (x U) V + x S + bias with a dense S that training prunes row by row (LoSparse, Li et al. 2023, Eq. 4).

    Parameters: down = U^T [rank, in], up = V [rank, out], sparse = S^T [out, in] in nn.Linear's layout, bias [out].
    A pruned neuron is a zero row of ``sparse``; :meth:`to_lowrank_sparse` drops these rows.

    With many rows x (more than in * out / (in + out)) the layer first forms W = V^T U^T + S^T and multiplies once:
    in the backward dL/dW = dy^T x, which S needs anyway, gives the gradients of U and V by two small products. What
    is left of U and V is then rank / rows of a dense layer's work, and in memory one W at a time, in the dtype of
    the product (under autocast the sum is rounded as a dense weight would be).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("rank", rank, 0, min(in_features, out_features))
        self.in_features, self.out_features = in_features, out_features
        options = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.zeros(rank, in_features, **options))
        self.up = nn.Parameter(torch.zeros(rank, out_features, **options))
        self.sparse = nn.Parameter(torch.zeros(out_features, in_features, **options))
        self.bias = nn.Parameter(torch.zeros(out_features, **options)) if bias else None

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: nn.Linear, rank: int, factors: tuple[Tensor, Tensor] | None = None
    ) -> LowRankPlusSparseLinear:
        """The same function as ``linear``: U V its best rank-``rank`` product, S what is left over.

        Args:
            linear: its bias parameter is shared, not copied.
            rank: 0, S alone, to min(in, out).
            factors: (A [out, rank], B [rank, in]) with A B = V^T U^T. Default: the truncated SVD with the roots of
                the singular values on both sides, as the paper has it. Copied.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        weight = linear.weight.detach()
        if rank == 0:
            factors = weight.new_empty(linear.out_features, 0), weight.new_empty(0, linear.in_features)
        elif factors is None:
            a, b = weighted_svd(weight, rank)
            roots = a.norm(dim=0).sqrt()
            safe = torch.where(roots > 0, roots, 1.0)
            factors = a / safe, b * roots[:, None]
        a, b = factors
        check_shape("factors[0]", a, linear.out_features, rank, because="[out, rank] of linear")
        check_shape("factors[1]", b, rank, linear.in_features, because="[rank, in] of linear")
        layer = cls(linear.in_features, linear.out_features, rank, bias=linear.bias is not None, device="meta")
        layer.down = nn.Parameter(b.clone(memory_format=torch.contiguous_format))
        layer.up = nn.Parameter(a.t().clone(memory_format=torch.contiguous_format))
        layer.sparse = nn.Parameter(weight - a @ b)
        layer.bias = linear.bias
        layer.train(linear.training)
        return layer

    @property
    def rank(self) -> int:
        """Columns of U."""
        return self.down.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        check_floating("x", x)
        rows = x.numel() // self.in_features
        if rows * (self.in_features + self.out_features) > self.in_features * self.out_features:
            return F.linear(x, torch.addmm(self.sparse, self.up.t(), self.down), self.bias)
        return F.linear(x, self.sparse, self.bias) + F.linear(F.linear(x, self.down), self.up.t())

    def to_lowrank_sparse(self) -> LowRankSparseLinear:
        """The compact layer: S without its zero rows."""
        kept = self.sparse.detach().any(dim=1).nonzero().squeeze(1)
        return LowRankSparseLinear.from_factors(
            self.up.detach().t(), self.down.detach(), self.bias, kept=kept, rows=self.sparse.detach()[kept]
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank},"
            f" bias={self.bias is not None}"
        )
