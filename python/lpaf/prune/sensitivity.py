"""First-order pruning by sensitivity: scores add up |W dL/dW_eff| (Lee et al., 2019; LoSparse, Eq. 2; over all steps).

By Taylor's first term |W dL/dW| is what the loss would change by if the weight were zero, and LPAF calls its criterion
a sensitivity too (section 3.2). Movement (Eq. 4) sums the same products with their signs: what has moved away from
zero. Where the signs are mostly noise, as in a run of a thousand updates, the weights with the largest products end up
at both ends of that order, and some of them are the first to be cut; their absolute values add up. Products of a row
share its output gradient and products of a column its input, so that what is kept gathers in rows and columns, and the
rank falls (docs/results/low-rank.md).

Scores follow the order of ``movement``: masks over weights that keep their value, straight-through gradients for the
pruned ones too, so that they may return.
"""

from __future__ import annotations

import torch
from torch import nn

from .masks import masked_linears
from .movement import MovementPruner, PruningCallback
from .schedule import CubicSchedule


class SensitivityPruner(MovementPruner):
    """Top-v of accumulated |W dL/dW_eff|, per matrix or over all matrices at once.

    Args:
        keep, scope, warmup, cooldown: as for :class:`MovementPruner`. Scores start at zero and rank by their order
            alone, whatever the learning rate.
    """

    learned_scores = False

    def __init__(self, keep: float, scope: str = "matrix", warmup: float = 0.1, cooldown: float = 0.3) -> None:
        super().__init__(keep, scope, warmup, cooldown)

    @torch.no_grad()
    def accumulate(self, model: nn.Module) -> None:
        """Add the absolute values of the gradients that the scores hold now, W dL/dW_eff, and take the gradients away,
        so that no optimizer moves the scores."""
        for _, module in masked_linears(model):
            if module.scores.grad is not None:
                module.scores.add_(module.scores.grad.abs_())
                module.scores.grad = None

    def callback(self, steps: int) -> SensitivityCallback:
        """The Trainer callback that follows the cubic schedule over ``steps`` updates."""
        return SensitivityCallback(self, CubicSchedule(self.keep, steps, self.warmup, self.cooldown))


class SensitivityCallback(PruningCallback):
    """Accumulates before every optimizer step and updates the masks before the next."""

    pruner: SensitivityPruner

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.pruner.accumulate(model)
