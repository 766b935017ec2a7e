"""Replace encoder linears by low-rank factors: plain, mask-weighted, score-weighted (LPAF section 4.2) or
Fisher-weighted SVD (:mod:`fisher`), of the matrices or of their outputs on calibration data (:mod:`whitening`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from lpaf_kernels import LowRankSparseLinear, weighted_singular_values, weighted_svd

from ..models.targets import encoder_linears
from ..processes import is_main
from .fisher import fisher_row_weights
from .processes import Results, eigen_cost, on_all_processes
from .whitening import input_factor, project

WEIGHTINGS = ("none", "mask", "scores", "fisher")
#: Weights that are factorised in one call: the memory that it takes, and how often the progress bar moves.
CHUNK = 1 << 23


@dataclass(frozen=True)
class Factorized:
    """What factorisation leaves behind: relative errors ``||D(W - AB)||_F / ||DW||_F``, of ``D(W - AB)L`` where inputs
    were known, and the matrices it replaced. The error of a matrix that lost rows or columns is None."""

    errors: dict[str, float | None]
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


def check_weighting(weighting: str) -> None:
    """ValueError unless ``weighting`` is one of ``WEIGHTINGS``."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")


def row_weights(
    weighting: str, weight: torch.Tensor, scores: torch.Tensor | None = None, root: bool = True
) -> torch.Tensor | None:
    """The row weights d [n] of a matrix ``weight`` [n, m] under one of ``WEIGHTINGS``; None for "none".

    Args:
        scores: [n, m] for "scores"; the row sums [n] of the Fisher information for "fisher".
    """
    if weighting == "scores":
        if scores is None:
            raise ValueError("weighting: 'scores' needs the scores of a first-order pruner")
        return score_row_weights(scores, root)
    if weighting == "fisher":
        if scores is None:
            raise ValueError("weighting: 'fisher' needs the row sums of the Fisher information")
        return fisher_row_weights(scores)
    if weighting == "mask":
        return mask_row_weights(weight, root)
    return None


def balance(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with equal norms of each column of a [n, r] and row of b [r, m], so that both train at one
    rate."""
    tiny = torch.finfo(a.dtype).tiny
    scale = (b.norm(dim=1).clamp_min(tiny) / a.norm(dim=0).clamp_min(tiny)).sqrt()
    scale = torch.where((a.norm(dim=0) > 0) & (b.norm(dim=1) > 0), scale, torch.ones_like(scale))
    return a * scale, b / scale[:, None]


def relative_error(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor | None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """||D (W - A B) L||_F / ||D W L||_F as a float64 scalar; 0 for a zero matrix. Without ``factor`` L is 1."""
    left, whole = torch.addmm(weight, a, b, alpha=-1), weight
    if factor is not None:
        left, whole = left.double() @ factor, whole.double() @ factor
    left, whole = left.norm(dim=1).double(), whole.norm(dim=1).double()
    if d is not None:
        left, whole = d * left, d * whole
    return left.norm() / whole.norm().clamp_min(torch.finfo(torch.float64).tiny)


class Matrices:
    """The encoder matrices of a model with their row weights and inputs, walked through in chunks on every process.

    Args:
        model: its encoder linears are dense, pruned or not, and the same in every process.
        scores: matrix name -> scores [n, m] of a first-order pruner, for "scores"; row sums [n] of the Fisher
            information (:class:`fisher.RowFisher`), for "fisher".
        weighting, root: see :class:`SVDFactorizer`.
        moments: matrix name -> second moment [m, m] of its inputs; None, or none for a matrix: all inputs count alike.
    """

    def __init__(
        self,
        model: nn.Module,
        scores: Mapping[str, torch.Tensor] | None,
        weighting: str,
        root: bool = True,
        moments: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        check_weighting(weighting)
        self.linears = encoder_linears(model)
        self.weights = {name: linear.weight.detach() for name, linear in self.linears.items()}
        self.scores, self.weighting, self.root = scores or {}, weighting, root
        self.moments = moments or {}

    @torch.no_grad()
    def map(self, solve: Callable[[list[str], list, list, list], Results], description: str) -> Results:
        """``solve(names, weights, rows, factors)`` of all matrices, a chunk at a time, in the order of the model.

        ``rows`` are the row weights d and ``factors`` the L of the inputs, None where there are none.
        """
        costs = {name: eigen_cost(tuple(weight.shape)) for name, weight in self.weights.items()}
        device = next(iter(self.weights.values())).device

        def compute(names: Sequence[str]) -> Results:
            found: Results = {}
            hidden = not is_main()
            with tqdm(total=len(names), desc=description, unit="matrix", delay=2, leave=False, disable=hidden) as bar:
                for chunk in self.chunks(names):
                    weights = [self.weights[name] for name in chunk]
                    rows = [
                        row_weights(self.weighting, weight, self.scores.get(name), self.root)
                        for name, weight in zip(chunk, weights, strict=True)
                    ]
                    found |= solve(chunk, weights, rows, [self.factor(name) for name in chunk])
                    bar.update(len(chunk))
            return found

        found = on_all_processes(costs, compute, device)
        return {name: found[name] for name in self.weights}

    def factor(self, name: str) -> torch.Tensor | None:
        """L of the matrix's inputs, float64 [m, m]."""
        return input_factor(self.moments[name])[0] if name in self.moments else None

    def chunks(self, names: Sequence[str]) -> Iterator[list[str]]:
        """``names`` in lists of about ``CHUNK`` weights; on a CPU of one matrix per thread at least."""
        chunk: list[str] = []
        for name in names:
            chunk.append(name)
            threads = torch.get_num_threads() if self.weights[name].device.type == "cpu" else 1
            if len(chunk) >= threads and sum(self.weights[member].numel() for member in chunk) >= CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk


def through_inputs(weights: Sequence[torch.Tensor], factors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """W L of every matrix, at least float32; W itself where there is no L."""
    return [
        weight if factor is None else (weight.double() @ factor).to(torch.promote_types(weight.dtype, torch.float32))
        for weight, factor in zip(weights, factors, strict=True)
    ]


def weighted_spectra(
    model: nn.Module,
    scores: Mapping[str, torch.Tensor] | None = None,
    weighting: str = "none",
    root: bool = True,
    moments: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Matrix name -> singular values of D W, or D W L, falling, float64 [min(n, m)]; arguments as for
    :class:`SVDFactorizer`."""

    def solve(names: list[str], weights: list, rows: list, factors: list) -> Results:
        values = weighted_singular_values(through_inputs(weights, factors), row_weights=rows)
        return {name: (value,) for name, value in zip(names, values, strict=True)}

    matrices = Matrices(model, scores, weighting, root, moments)
    return {name: value for name, (value,) in matrices.map(solve, "spectra").items()}


class SVDFactorizer:
    """Row-weighted truncated SVD of every encoder linear.

    Args:
        rank: rank of every matrix, or matrix name -> rank.
        weighting: "scores" (needs the pruner's scores), "mask" (needs a pruned model), "fisher" (needs Fisher
            information) or "none".
        root: see :func:`score_row_weights`.
    """

    def __init__(self, rank: int | Mapping[str, int], weighting: str = "none", root: bool = True) -> None:
        check_weighting(weighting)
        self.rank, self.weighting, self.root = rank, weighting, root

    @torch.no_grad()
    def __call__(
        self,
        model: nn.Module,
        scores: Mapping[str, torch.Tensor] | None = None,
        moments: Mapping[str, torch.Tensor] | None = None,
    ) -> Factorized:
        """Swap every encoder linear of ``model`` for a LowRankSparseLinear, in place.

        With ``torch.distributed`` initialised the matrices are shared out among the processes, which all end with the
        same factors; ``model``, ``scores`` and ``moments`` must be the same in all of them.

        Args:
            scores: matrix name -> scores [n, m], for "scores"; row sums [n], for "fisher".
            moments: matrix name -> second moment [m, m] of its inputs (``InputMoments.by_linear``): the outputs on
                these are approximated instead of the matrix. A matrix that has none is approximated itself.
        """
        matrices = Matrices(model, scores, self.weighting, self.root, moments)
        ranks = self.ranks(list(matrices.weights))

        def solve(names: list[str], weights: list, rows: list, factors: list) -> Results:
            wanted = [ranks[name] for name in names]
            pairs = zip(*weighted_svd(through_inputs(weights, factors), wanted, row_weights=rows), strict=True)
            found: Results = {}
            for name, (a, b), weight, d, factor in zip(names, pairs, weights, rows, factors, strict=True):
                a, b = balance(a, b) if factor is None else balance(*project(weight, a, d))
                found[name] = (a, b, relative_error(weight, a, b, d, factor))
            return found

        found = matrices.map(solve, "factorize")
        for name, (a, b, _) in found.items():
            model.set_submodule(name, LowRankSparseLinear.from_factors(a, b, matrices.linears[name].bias))
        return Factorized({name: float(error) for name, (_, _, error) in found.items()}, matrices.weights)

    def ranks(self, names: Sequence[str]) -> dict[str, int]:
        """The rank of every matrix."""
        if isinstance(self.rank, int):
            return dict.fromkeys(names, self.rank)
        missing = [name for name in names if name not in self.rank]
        if missing:
            raise ValueError(f"rank: has none for {missing[0]}; expected one for every encoder matrix")
        return {name: self.rank[name] for name in names}
