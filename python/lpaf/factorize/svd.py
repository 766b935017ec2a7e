"""Replace encoder linears by low-rank factors: plain, mask-weighted or score-weighted SVD (LPAF section 4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from lpaf_kernels import LowRankSparseLinear, weighted_svd

from ..models.targets import encoder_linears

WEIGHTINGS = ("none", "mask", "scores")


@dataclass(frozen=True)
class Factorized:
    """What factorisation leaves behind: relative errors ``||D(W - AB)||_F / ||DW||_F`` and the matrices it replaced."""

    errors: dict[str, float]
    weights: dict[str, torch.Tensor]


def score_row_weights(scores: torch.Tensor, root: bool = True) -> torch.Tensor:
    """Row weights d [n] from a matrix's scores [n, m].

    With s the row sums, d = sqrt(s - min(s) + 1e-3 (max(s) - min(s))), the weighting of Eq. 7; ``root=False`` leaves
    the root out, as Eq. 9 is printed. All rows equal: d = 1. d is scaled to maximum 1, which changes nothing in the
    solution.
    """
    sums = scores.double().sum(dim=1)
    spread = sums.max() - sums.min()
    if not spread > 0:
        return torch.ones_like(sums, dtype=torch.float32)
    weights = sums - sums.min() + 1e-3 * spread
    weights = weights.sqrt() if root else weights
    return (weights / weights.max()).float()


def mask_row_weights(weight: torch.Tensor, root: bool = True) -> torch.Tensor:
    """Row weights d [n] from the number of weights that pruning left in each row of ``weight`` [n, m]."""
    return score_row_weights((weight != 0).float(), root)


def balance(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with equal norms of each column of a [n, r] and row of b [r, m], so that both train at one
    rate."""
    tiny = torch.finfo(a.dtype).tiny
    scale = (b.norm(dim=1).clamp_min(tiny) / a.norm(dim=0).clamp_min(tiny)).sqrt()
    scale = torch.where((a.norm(dim=0) > 0) & (b.norm(dim=1) > 0), scale, torch.ones_like(scale))
    return a * scale, b / scale[:, None]


class SVDFactorizer:
    """Row-weighted truncated SVD at one rank for every encoder linear.

    Args:
        rank: rank of every matrix.
        weighting: "scores" (needs the pruner's scores), "mask" (needs a pruned model) or "none".
        root: see :func:`score_row_weights`.
    """

    def __init__(self, rank: int, weighting: str = "none", root: bool = True) -> None:
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        self.rank, self.weighting, self.root = rank, weighting, root

    def row_weights(self, weight: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor | None:
        if self.weighting == "scores":
            if scores is None:
                raise ValueError("weighting: 'scores' needs the scores of a first-order pruner")
            return score_row_weights(scores, self.root)
        if self.weighting == "mask":
            return mask_row_weights(weight, self.root)
        return None

    @torch.no_grad()
    def __call__(self, model: nn.Module, scores: dict[str, torch.Tensor] | None = None) -> Factorized:
        """Swap every encoder linear of ``model`` for a LowRankSparseLinear, in place."""
        errors, weights = {}, {}
        linears = encoder_linears(model)
        for name, linear in tqdm(linears.items(), desc="factorize", unit="matrix", delay=2, leave=False):
            weight = linear.weight.detach()
            d = self.row_weights(weight, scores.get(name) if scores else None)
            a, b = weighted_svd(weight, self.rank, row_weights=d)
            a, b = balance(a, b)
            residual = weight - a @ b
            scale = torch.ones(weight.shape[0], 1, device=weight.device) if d is None else d[:, None]
            norm = (scale * weight).norm()
            errors[name] = float((scale * residual).norm() / norm) if norm > 0 else 0.0
            weights[name] = weight.clone()
            model.set_submodule(name, LowRankSparseLinear.from_factors(a, b, linear.bias))
        return Factorized(errors, weights)
