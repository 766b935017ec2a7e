"""Whole neurons by their scores: which rows stay, and the compact layers that hold them alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lpaf_kernels import KeepThreshold

from ..models.count import Shape
from ..models.neurons import row_cost, rows_per_matrix
from .schedule import select


def select_neurons(
    scores: Mapping[str, torch.Tensor], shapes: Mapping[str, Shape], keep: float, scope: str
) -> dict[str, KeepThreshold]:
    """The thresholds of the neurons that stay, as near to ``keep`` as whole rows allow and not above it.

    Args:
        scores: matrix name -> score of every neuron, [out].
        shapes: matrix name -> (out, in).
        keep: share of what all rows would store, indices counted, in [0, 1].
        scope: "global" ranks all neurons together, each counting by what its row stores; "matrix" within each.
    """
    if scope == "global":
        costs = [torch.full_like(scores[name], row_cost(shapes[name]), dtype=torch.int64) for name in scores]
        return dict(zip(scores, select(list(scores.values()), keep, scope, costs), strict=True))
    counts = rows_per_matrix({name: shapes[name] for name in scores}, keep)
    return {name: select([score], counts[name] / len(score), scope)[0] for name, score in scores.items()}
