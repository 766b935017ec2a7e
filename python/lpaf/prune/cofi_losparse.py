"""LoSparse inside CoFi: gates remove blocks and heads, and rows of S go in place of neurons (LoSparse, section 4.6).

Every encoder linear is U V + S. The gates of blocks and heads keep a share C of the weights, U V and the rows of S hold
a share L of what is left, and the whole is C L (appendix F). The paper takes L = 0.5 and C = 0.2 for 10 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from lpaf_kernels import LowRankSparseLinear

from ..models.neurons import compact_like, row_cost
from .cofi import CofiCallback, CofiPruner
from .gates import gated_params, remove_closed
from .importance import ImportanceCallback, ImportancePruner, sparse_linears
from .neurons import select_neurons
from .schedule import refuse_nan


def losparse_ratio(ratio: float) -> float:
    """The share L that U V and S keep of what the gates leave: 0.5, but above a ``ratio`` of 0.25 its root, which is C
    too."""
    return max(0.5, math.sqrt(ratio))


class CofiLoSparsePruner(CofiPruner):
    """Prunes heads, blocks and rows of S until ``ratio`` of the encoder's weights is stored.

    Args:
        ratio: share of encoder weights to store, in (0, 1].
        keep: share of what all rows of S would store that training goes down to, indices counted.
        rank, scope, interval, beta2: as for :class:`ImportancePruner`.
        warmup, cooldown: of both schedules.
    """

    budgeted = True
    fine = False

    def __init__(
        self,
        ratio: float,
        keep: float,
        rank: int | Mapping[str, int],
        scope: str = "global",
        warmup: float = 0.1,
        cooldown: float = 0.3,
        interval: int = 10,
        beta2: float | None = None,
    ) -> None:
        super().__init__(ratio, warmup, cooldown)
        self.rows = ImportancePruner(keep, rank, scope, warmup, cooldown, interval=interval, beta2=beta2)

    @property
    def coarse_ratio(self) -> float:
        return self.ratio / losparse_ratio(self.ratio)

    def attach(self, model: nn.Module) -> None:
        """Replace every encoder linear of ``model`` by U V + S, and gate heads and blocks: the same function."""
        self.rows.attach(model)
        super().attach(model)

    def callback(self, steps: int) -> CofiLoSparseCallback:
        """The Trainer callback of both schedules over ``steps`` updates; its term is the Lagrangian."""
        return CofiLoSparseCallback(self, steps)

    @torch.no_grad()
    def detach(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Remove what the gates close, put compact layers in, and return the importance: name -> [out] float32.

        The rows of S get what is left of the ratio. Where that is more than training left of them, rows of zeros are
        among them, which retraining fills.
        """
        stored = int(self.ratio * gated_params(model) * (1 + 1e-12))
        self.close(model)
        remove_closed(model)
        layers = dict(sparse_linears(model))
        importance = {name: layer.importance.clone() for name, layer in layers.items()}
        refuse_nan(list(importance.values()))
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        factors = sum(layer.rank * sum(shapes[name]) for name, layer in layers.items())
        whole = sum(shape[0] * row_cost(shape) for shape in shapes.values())
        keep = min(max(stored - factors, 0) / whole, 1.0)
        chosen = select_neurons(importance, shapes, keep, self.rows.scope)
        for name, layer in layers.items():
            kept = chosen[name].mask(importance[name]).nonzero().squeeze(1)
            compact = LowRankSparseLinear.from_factors(layer.up.t(), layer.down, layer.bias, kept, layer.sparse[kept])
            model.set_submodule(name, compact.train(layer.training))
        return importance

    def rebuild(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        super().rebuild(model, state)
        compact_like(model, state)


class CofiLoSparseCallback(CofiCallback):
    """The gates' steps and those of the rows."""

    def __init__(self, pruner: CofiLoSparsePruner, steps: int) -> None:
        super().__init__(pruner, steps)
        self.rows: ImportanceCallback = pruner.rows.callback(steps)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.rows.on_pre_optimizer_step(args, state, control, **kwargs)

    def on_optimizer_step(self, args, state, control, **kwargs):
        super().on_optimizer_step(args, state, control, **kwargs)
        self.rows.on_optimizer_step(args, state, control, **kwargs)

    @property
    def progress(self) -> dict[str, float]:
        """As for CoFi, and the share of the rows of S that is kept now."""
        return super().progress | {"rows": self.rows.progress["keep"]}

    def on_log(self, args, state, control, **kwargs):
        super().on_log(args, state, control, **kwargs)
        self.rows.on_log(args, state, control, **kwargs)
