"""Soft movement pruning: a threshold on the scores instead of a share (Sanh et al., 2020, section 4).

A weight is kept while sigmoid(S) > tau. tau rises from 0, and a penalty on mean sigmoid(S) pushes the scores down, so
that matrices share out among themselves what is kept. What is kept in the end is not known before: it falls with the
penalty's weight. Gradients pass straight through the mask, as in movement pruning; the penalty adds its own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from lpaf_kernels import KeepThreshold, set_thresholds

from ..processes import say
from .masks import add_masks, kept_share, masked_linears, refuse_nan_thresholds, remove_masks
from .pruner import Pruner
from .schedule import CubicSchedule, select

#: share of every matrix that is kept whatever its scores are
FLOOR = 0.005


class SoftMovementPruner(Pruner):
    """Keeps where sigmoid(S) > tau, and at least 0.5 % of every matrix.

    Args:
        threshold: final tau, in (0, 1). tau rises from 0 by the cubic schedule.
        penalty: final weight lambda of the mean of sigmoid(S) over all scores, 0 or more; it rises as tau does.
        warmup, cooldown: see :class:`CubicSchedule`.
        score_init: scores start at this multiple of |W| / mean(|W|) of their matrix; 0 starts them at zero.
    """

    learned_scores = True

    def __init__(
        self,
        threshold: float = 0.1,
        penalty: float = 100.0,
        warmup: float = 0.1,
        cooldown: float = 0.3,
        score_init: float = 0.0,
    ) -> None:
        if not 0.0 < threshold < 1.0:
            raise ValueError(f"threshold: must be in (0, 1), got {threshold}")
        for name, value in (("penalty", penalty), ("score_init", score_init)):
            if value < 0:
                raise ValueError(f"{name}: must be 0 or more, got {value}")
        CubicSchedule(threshold, 1, warmup, cooldown)
        self.threshold, self.penalty, self.score_init = threshold, penalty, score_init
        self.warmup, self.cooldown = warmup, cooldown

    def attach(self, model: nn.Module) -> None:
        """Replace every encoder linear of ``model`` by a MaskedLinear that keeps everything."""
        add_masks(model, self.score_init)

    def update_masks(self, model: nn.Module, tau: float) -> None:
        """Keep where sigmoid(S) > ``tau``, and the top 0.5 % of every matrix."""
        modules = [module for _, module in masked_linears(model)]
        floors = select([module.scores.detach() for module in modules], FLOOR, "matrix")
        set_thresholds(modules, [lower(threshold_at(tau, floor), floor) for floor in floors])

    def callback(self, steps: int) -> SoftPruningCallback:
        """The Trainer callback that raises tau and the penalty over ``steps`` updates; its term is the penalty."""
        return SoftPruningCallback(self, CubicSchedule(self.threshold, steps, self.warmup, self.cooldown, start=0.0))

    def detach(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Zero the pruned weights, put plain linears back, and return the scores: name -> [out, in] float32."""
        self.update_masks(model, self.threshold)
        scores = {name: module.scores.detach().float().clone() for name, module in masked_linears(model)}
        remove_masks(model)
        return scores


def logit(probability: float) -> float:
    """The number whose sigmoid is ``probability``, in [0, 1)."""
    return math.log(probability / (1.0 - probability)) if probability > 0 else -math.inf


def threshold_at(tau: float, like: KeepThreshold) -> KeepThreshold:
    """The selection of sigmoid(S) > ``tau``, on the device of ``like``."""
    return KeepThreshold(torch.full_like(like.value, logit(tau)), torch.zeros_like(like.tie_index))


def lower(soft: KeepThreshold, floor: KeepThreshold) -> KeepThreshold:
    """Of two selections the one that keeps more, NaN before all; ``soft`` keeps no tie. Nobody waits for the device."""
    keep_soft = floor.value > soft.value
    return KeepThreshold(
        torch.where(keep_soft, soft.value, floor.value), torch.where(keep_soft, soft.tie_index, floor.tie_index)
    )


def mean_sigmoid(model: nn.Module) -> torch.Tensor:
    """Mean of sigmoid(S) over all scores of ``model``: 0-d float32, differentiable."""
    scores = [module.scores for _, module in masked_linears(model)]
    return torch.stack([score.float().sigmoid().sum() for score in scores]).sum() / sum(map(torch.numel, scores))


@torch.no_grad()
def median_score(model: nn.Module) -> float:
    """Median over all scores of ``model``."""
    return float(torch.cat([module.scores.flatten() for _, module in masked_linears(model)]).median())


class SoftPruningCallback(TrainerCallback):
    """Sets tau and the penalty's weight before every step, and warns of a run too short to prune anything."""

    def __init__(self, pruner: SoftMovementPruner, schedule: CubicSchedule) -> None:
        self.pruner, self.schedule = pruner, schedule
        self.weight = 0.0
        self.terms = (self.penalty,)

    def penalty(self, model: nn.Module, outputs: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """lambda_t * mean sigmoid(S), the loss term."""
        return {"penalty": self.weight * mean_sigmoid(model)} if self.weight else {}

    def on_train_begin(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        if state.global_step > 0:
            return
        if self.pruner.penalty == 0:
            say("soft-movement: --penalty 0 pushes no score down; what is pruned is up to the task alone")
        # Under Adam a score moves by about its learning rate a step, from where it starts down to logit(tau).
        travel = rate_sum(lr_scheduler, state.max_steps)
        needed = median_score(model) - logit(self.pruner.threshold)
        if travel < needed:
            say(
                f"soft-movement: the scores' learning rates sum to {travel:.2g} over {state.max_steps} updates, and "
                f"half of the scores must fall by {needed:.2g} or more before they are pruned; train longer, or pass a "
                "larger --score-lr"
            )

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        tau = self.schedule(state.global_step)
        self.weight = self.pruner.penalty * tau / self.pruner.threshold
        self.pruner.update_masks(model, tau)
        self.model, self.tau = model, tau

    @property
    def progress(self) -> dict[str, float]:
        """What is kept now, and by which threshold; counted when it is read."""
        return {"keep": kept_share(self.model), "threshold": self.tau}

    def on_log(self, args, state, control, model=None, **kwargs):
        refuse_nan_thresholds(model)


def rate_sum(lr_scheduler: Any, steps: int) -> float:
    """The learning rates of the last parameter group, which the scores are, summed over ``steps`` updates."""
    schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
    return schedule.base_lrs[-1] * sum(map(schedule.lr_lambdas[-1], range(steps)))
