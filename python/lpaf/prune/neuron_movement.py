"""Structured movement pruning: the movement of a neuron is the mean of its weights' (LoSparse's baseline).

Movement (Sanh et al., 2020; LPAF, Eq. 4) adds up -W dL/dW_eff, which is positive where a weight moves away from zero.
Here a row of W [out, in], a neuron, has one score, the mean over its weights, and stays or goes as a whole. Masked rows
keep their values and get straight-through gradients in their scores, so that they may return. In the end only the rows
that stay are stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from transformers import TrainerCallback

from lpaf_kernels import LowRankSparseLinear, MaskedLinear, set_thresholds

from ..models.neurons import compact_like
from .masks import add_masks, masked_linears, refuse_nan_thresholds
from .neurons import select_neurons
from .pruner import Pruner
from .schedule import CubicSchedule, check_scope


class NeuronMovementPruner(Pruner):
    """Keeps the neurons that have moved furthest away from zero.

    Args:
        keep: final share of what all rows would store, indices counted, in [0, 1].
        scope: "global" ranks the neurons of all matrices together, "matrix" within each. Default: "global".
        warmup, cooldown: see :class:`CubicSchedule`.
        interval: steps between selections before the cool-down. Default: 10.
    """

    budgeted = True

    def __init__(
        self, keep: float, scope: str = "global", warmup: float = 0.1, cooldown: float = 0.3, interval: int = 10
    ) -> None:
        check_scope(scope)
        if interval < 1:
            raise ValueError(f"interval: must be at least 1, got {interval}")
        CubicSchedule(keep, 1, warmup, cooldown)
        self.keep, self.scope, self.warmup, self.cooldown, self.interval = keep, scope, warmup, cooldown, interval

    def attach(self, model: nn.Module) -> None:
        """Replace every encoder linear of ``model`` by a MaskedLinear with a score per row that keeps everything."""
        add_masks(model, rows=True)

    @torch.no_grad()
    def accumulate(self, model: nn.Module) -> None:
        """Add the mean of -W dL/dW_eff over every row to its score, and take the gradients of the scores, which are
        the sums of W dL/dW_eff, away, so that no optimizer moves the scores."""
        for _, module in masked_linears(model):
            if module.scores.grad is not None:
                module.scores.sub_(module.scores.grad, alpha=1 / module.in_features)
                module.scores.grad = None

    def update_masks(self, model: nn.Module, keep: float) -> None:
        """Mask the neurons outside the top ``keep`` share."""
        modules = dict(masked_linears(model))
        scores = {name: module.scores.detach().squeeze(1) for name, module in modules.items()}
        shapes = {name: (module.out_features, module.in_features) for name, module in modules.items()}
        thresholds = select_neurons(scores, shapes, keep, self.scope)
        set_thresholds(list(modules.values()), list(thresholds.values()))

    def callback(self, steps: int) -> NeuronMovementCallback:
        """The Trainer callback that follows the cubic schedule over ``steps`` updates."""
        return NeuronMovementCallback(self, CubicSchedule(self.keep, steps, self.warmup, self.cooldown))

    def detach(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Put in compact layers of the neurons that stay, and return the movement: name -> [out] float32."""
        self.update_masks(model, self.keep)
        refuse_nan_thresholds(model)
        movement = {}
        for name, module in list(masked_linears(model)):
            movement[name] = module.scores.detach().float().squeeze(1).clone()
            model.set_submodule(name, _compact(module))
        return movement

    def rebuild(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        compact_like(model, state)


def _compact(module: MaskedLinear) -> LowRankSparseLinear:
    """The rows of a masked matrix that stay, without a low-rank part."""
    weight = module.weight.detach()
    kept = module.mask().any(dim=1).nonzero().squeeze(1)
    nothing = weight.new_empty(module.out_features, 0), weight.new_empty(0, module.in_features)
    return LowRankSparseLinear.from_factors(*nothing, module.bias, kept=kept, rows=weight[kept])


class NeuronMovementCallback(TrainerCallback):
    """Accumulates before every optimizer step; selects before some steps, and before every one of the cool-down."""

    def __init__(self, pruner: NeuronMovementPruner, schedule: CubicSchedule) -> None:
        self.pruner, self.schedule = pruner, schedule

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        keep = self.schedule(state.global_step)
        self.progress = {"keep": keep}
        if keep < 1.0 and (state.global_step % self.pruner.interval == 0 or keep == self.pruner.keep):
            self.pruner.update_masks(model, keep)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.pruner.accumulate(model)

    def on_log(self, args, state, control, model=None, **kwargs):
        refuse_nan_thresholds(model)
