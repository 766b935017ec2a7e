"""What a share of an encoder's weights buys as U V + S (LoSparse): ranks, and the rows of S that may stay.

A kept row of S [out, in] stands for one neuron. It stores its ``in`` weights and one index, so that the size asked for
is that of the saved file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lpaf_kernels import LowRankSparseLinear

from ..errors import InputError
from .count import Shape
from .targets import encoder_linears

#: share of the encoder's weights that U V gets; the paper takes 1 to 5 % (tables 9 to 11)
LOW_RANK_SHARE = 0.05


@dataclass(frozen=True)
class NeuronBudget:
    """How U V + S spend a number of weights.

    Args:
        low_rank_share: share of the weights meant for U V, before ranks are rounded up.
        ranks: matrix name -> rank of U V, 0 without it.
        rows: the most that the kept rows of all S may store, indices counted.
        keep: ``rows`` as a share of what all rows of S would store.
    """

    low_rank_share: float
    ranks: dict[str, int]
    rows: int
    keep: float


def row_cost(shape: Shape) -> int:
    """Numbers that one kept row of S stores: its weights and its index."""
    return shape[1] + 1


def proportional_ranks(shapes: Mapping[str, Shape], share: float) -> dict[str, int]:
    """Ranks whose factors hold nearly the same share of every matrix, and together at most ``share`` of all weights.

    With share * n m / (n + m) rounded down everywhere, the matrices that lost most get one rank more while it fits.
    """
    exact = {name: share * math.prod(shape) / sum(shape) for name, shape in shapes.items()}
    ranks = {name: int(value + 1e-9) for name, value in exact.items()}
    room = share * sum(map(math.prod, shapes.values())) * (1 + 1e-12)
    room -= sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    for name in sorted(shapes, key=lambda name: ranks[name] - exact[name]):
        if sum(shapes[name]) <= room and ranks[name] < min(shapes[name]):
            ranks[name] += 1
            room -= sum(shapes[name])
    return ranks


def low_rank_ranks(shapes: Mapping[str, Shape], ratio: float) -> dict[str, int]:
    """The ranks of U V alone at ``ratio`` of the weights (LoSparse's Low-rank I and II), or InputError."""
    ranks = proportional_ranks(shapes, ratio)
    empty = next((name for name, rank in ranks.items() if rank < 1), None)
    if empty is not None:
        rows, columns = shapes[empty]
        least = (rows + columns) / (rows * columns)
        raise InputError(
            f"--ratio {ratio:g}: buys no rank of {empty} [{rows}, {columns}], where one costs {rows} + {columns} of "
            f"{rows * columns} weights; pass at least --ratio {math.ceil(least * 1e4) / 1e4:g}"
        )
    return ranks


def neuron_budget(shapes: Mapping[str, Shape], ratio: float, low_rank_share: float) -> NeuronBudget:
    """What U V + S get of ``ratio`` of the weights.

    The rank of every matrix is ceil(share * n m / (n + m)); what is left belongs to the rows of S.

    Args:
        shapes: matrix name -> (out_features, in_features).
        ratio: share of the weights that stay, in (0, 1].
        low_rank_share: share of the weights for U V; 0 leaves it out, ``ratio`` leaves S out.

    Raises:
        InputError: U V take more than ``ratio``, or there is nothing left for a single row of S.
    """
    dense = sum(map(math.prod, shapes.values()))
    if low_rank_share > ratio:
        raise InputError(
            f"--low-rank-share {low_rank_share:g}: U V alone would be above --ratio {ratio:g}, which leaves S "
            f"{ratio:g} - {low_rank_share:g} = {ratio - low_rank_share:g}; pass a share below the ratio"
        )
    if low_rank_share == ratio:
        return NeuronBudget(low_rank_share, low_rank_ranks(shapes, ratio), 0, 0.0)
    ranks = {
        name: min(math.ceil(low_rank_share * math.prod(shape) / sum(shape) - 1e-9), *shape)
        for name, shape in shapes.items()
    }
    factors = sum(rank * sum(shapes[name]) for name, rank in ranks.items())
    rows = int(ratio * dense * (1 + 1e-12)) - factors
    least = min(map(row_cost, shapes.values()))
    if rows < least:
        smaller = " or a smaller share" if max(ranks.values()) > 1 else ""
        raise InputError(
            f"--ratio {ratio:g}: {ratio:g} of {dense} weights is {int(ratio * dense)}, and U V of ranks "
            f"{min(ranks.values())} to {max(ranks.values())} (--low-rank-share {low_rank_share:g}, rounded up) take "
            f"{factors}, which leaves {rows} for S, where a row takes {least}; pass a larger ratio{smaller}"
        )
    whole = sum(shape[0] * row_cost(shape) for shape in shapes.values())
    return NeuronBudget(low_rank_share, ranks, rows, min(rows / whole, 1.0))


def default_low_rank_share(ratio: float) -> float:
    """U V's share when ``--low-rank-share`` is silent: 5 %, and at small ratios at most half of what there is."""
    return min(LOW_RANK_SHARE, ratio / 2)


def rows_per_matrix(shapes: Mapping[str, Shape], keep: float) -> dict[str, int]:
    """Rows of S that stay where every matrix keeps the same share: together at most ``keep`` of what all would store.

    The share of the rows rounded down, and one more where rounding took most, while it fits.
    """
    counts = {name: int(keep * shape[0] + 1e-9) for name, shape in shapes.items()}
    room = keep * sum(shape[0] * row_cost(shape) for shape in shapes.values()) * (1 + 1e-12)
    room -= sum(count * row_cost(shapes[name]) for name, count in counts.items())
    for name in sorted(shapes, key=lambda name: counts[name] - keep * shapes[name][0]):
        if row_cost(shapes[name]) <= room and counts[name] < shapes[name][0]:
            counts[name] += 1
            room -= row_cost(shapes[name])
    return counts


def compact_like(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give the dense encoder linears of ``model`` the compact layers whose tensors are in ``state``, empty."""
    for name, linear in encoder_linears(model).items():
        if f"{name}.down" in state and isinstance(linear, nn.Linear):
            layer = LowRankSparseLinear(
                linear.in_features,
                linear.out_features,
                rank=state[f"{name}.up"].shape[0],
                kept=state[f"{name}.kept"].numel(),
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
            model.set_submodule(name, layer.train(linear.training))
