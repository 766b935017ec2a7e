"""How many ranks each matrix gets: the fewest for an error, or the best use of a budget of parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

Shape = tuple[int, int]

#: Ranks per cost that the last step may move away from the greedy solution, each way.
WINDOW = 64


def rank_for_error(spectrum: torch.Tensor, error: float) -> int:
    """The smallest k whose best rank-k approximation has a relative error of at most ``error``.

    Args:
        spectrum: singular values [n] of (D) W, falling.
        error: bound on sqrt(sum_{j >= k} s_j^2 / sum_j s_j^2), the sums from 0.

    Returns:
        0 for ``error`` >= 1 or a zero matrix, at most n.
    """
    left = spectrum.double().square().flip(0).cumsum(0).flip(0)
    return int((left > error**2 * left[:1]).sum())


def rank_params(ranks: Mapping[str, int], shapes: Mapping[str, Shape]) -> int:
    """Parameters sum k_i (n_i + m_i) of factors of these ranks."""
    return sum(rank * sum(shapes[name]) for name, rank in ranks.items())


def comparable(spectra: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    """``spectra`` as :func:`allocate_ranks` adds them up in ``--rank auto``.

    The row weights of a matrix are known up to a factor, so that only relative errors compare. What is minimised is
    the sum over the matrices of sqrt(n m) ||D (W - A B)||_F^2 / ||D W||_F^2: with no weight for the size, the matrices
    of a feed-forward block, whose ranks cost most, are left with few (docs/results/rank-allocation.md).
    """
    return {name: math.prod(shapes[name]) ** 0.25 * relative(values) for name, values in spectra.items()}


def relative(spectrum: torch.Tensor) -> torch.Tensor:
    """``spectrum`` scaled to a sum of squares of 1; zeros stay."""
    norm = spectrum.double().norm()
    return spectrum / norm if norm > 0 else spectrum


def allocate_ranks(
    spectra: Mapping[str, torch.Tensor],
    shapes: Mapping[str, Shape],
    budget: int,
    largest: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """The ranks k_i, at least 1, with the least sum of squared errors whose parameters fit the budget.

    The j-th rank of a matrix costs n + m parameters and takes s_j^2 off the sum of squared errors. Gains fall within
    a matrix, so that for every cost the best t ranks are the t largest gains, and only how many ranks each cost gets
    is open. The relaxed problem is solved greedily by gain per parameter; an integer solution lies within 2c + 1
    ranks of it, with c the largest cost over the greatest common divisor of all (Eisenbrand and Weismantel, 2018), and
    is found there by dynamic programming. So the result is the optimum for c below ``WINDOW`` / 2 (5 for BERT), and
    the best within ``WINDOW`` ranks per cost of the relaxed optimum beyond.

    Args:
        spectra: matrix name -> singular values [min(n, m)], falling. They are added up as they are: scale them to
            weigh matrices against each other.
        shapes: matrix name -> (n, m).
        budget: the most that sum k_i (n_i + m_i) may be.
        largest: matrix name -> its largest rank. Default: min(n, m).

    Returns:
        matrix name -> rank. No further rank fits the budget: what is left of it is less than the smallest n + m of
        the matrices below their largest rank.

    Raises:
        ValueError: the budget is too small for rank 1 everywhere.
    """
    largest = {name: min(shape) for name, shape in shapes.items()} if largest is None else largest
    least = rank_params(dict.fromkeys(shapes, 1), shapes)
    budget = min(budget, rank_params(largest, shapes))
    if budget < least:
        raise ValueError(f"budget: expected at least {least} parameters (rank 1 everywhere), got {budget}")
    gains = {name: spectra[name].double().square().cpu().numpy()[1 : largest[name]] for name in shapes}
    groups = [
        Group.of({name: gains[name] for name in shapes if sum(shapes[name]) == cost}, cost)
        for cost in sorted({sum(shape) for shape in shapes.values()})
    ]
    taken = _take(groups, budget - least)
    ranks = dict.fromkeys(shapes, 1)
    for group, count in zip(groups, taken, strict=True):
        for name in group.owners[:count]:
            ranks[name] += 1
    return ranks


@dataclass(frozen=True)
class Group:
    """The ranks that cost the same, best first: their gains and the matrices they belong to."""

    cost: int
    gains: np.ndarray
    owners: list[str]

    @classmethod
    def of(cls, gains: Mapping[str, np.ndarray], cost: int) -> Group:
        every = np.concatenate(list(gains.values()))
        owners = [name for name, values in gains.items() for _ in values]
        order = np.argsort(-every, kind="stable")
        return cls(cost, every[order], [owners[i] for i in order])


def _take(groups: list[Group], room: int) -> list[int]:
    """How many ranks of each group to take."""
    divisor = math.gcd(*(group.cost for group in groups))
    window = min(WINDOW, 2 * max(group.cost for group in groups) // divisor + 1)
    relaxed = _relaxed(groups, room)
    low = [max(count - window, 0) for count in relaxed]
    room -= sum(group.cost * count for group, count in zip(groups, low, strict=True))
    units = [group.cost // divisor for group in groups]
    tables = [
        np.concatenate([[0.0], np.cumsum(group.gains[start : count + window + 1])])
        for group, start, count in zip(groups, low, relaxed, strict=True)
    ]
    more = _knapsack(tables, units, room // divisor)
    taken = [start + count for start, count in zip(low, more, strict=True)]
    # Ranks that gain nothing still belong to the size asked for.
    room -= sum(group.cost * count for group, count in zip(groups, more, strict=True))
    for i, group in enumerate(groups):
        extra = min(room // group.cost, len(group.gains) - taken[i])
        taken[i] += extra
        room -= extra * group.cost
    return taken


def _relaxed(groups: list[Group], room: int) -> list[int]:
    """How many whole ranks of each group the relaxed problem takes: by gain per parameter, until one does not fit."""
    which = np.concatenate([np.full(len(group.gains), i) for i, group in enumerate(groups)])
    costs = np.concatenate([np.full(len(group.gains), group.cost) for group in groups])
    order = np.argsort(-np.concatenate([group.gains for group in groups]) / costs, kind="stable")
    fitting = order[np.cumsum(costs[order]) <= room]
    return [int((which[fitting] == i).sum()) for i in range(len(groups))]


def _knapsack(tables: list[np.ndarray], units: list[int], room: int) -> list[int]:
    """The counts t_i with the largest sum of ``tables[i][t_i]`` and sum of ``units[i]`` t_i at most ``room``."""
    best = np.zeros(room + 1)
    choices = []
    for table, unit in zip(tables, units, strict=True):
        new, choice = best.copy(), np.zeros(room + 1, dtype=int)
        for count in range(1, min(len(table) - 1, room // unit) + 1):
            value = best[: room + 1 - count * unit] + table[count]
            better = value > new[count * unit :]
            new[count * unit :][better] = value[better]
            choice[count * unit :][better] = count
        best = new
        choices.append(choice)
    counts = []
    for choice, unit in zip(reversed(choices), reversed(units), strict=True):
        counts.append(int(choice[room]))
        room -= counts[-1] * unit
    return counts[::-1]
