"""First-order (movement) pruning: learned scores, top-v selection (LPAF section 2.2, Eqs. 3 to 5).

Every encoder linear becomes a ``MaskedLinear`` with a score per weight. The straight-through estimator gives
dL/dS = W * dL/dW_eff, so that AdamW on the scores accumulates -W dL/dW (Eq. 4): weights that move away from zero rise,
weights that move towards it fall. After each step the top v_t share of the scores is kept. Pruned weights keep their
value and their score keeps learning, so they may return; at the end they are zeroed for good.

Scores start at zero in the papers, which train for tens of thousands of updates. In a run of a thousand, the first
cuts then follow noise and wreck the model; scores that start at the weights' magnitude make them harmless, and
movement takes over from there (docs/methods.md has the measurement).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback

from lpaf_kernels import accumulate_movement_, set_thresholds, zero_pruned_

from ..models.targets import encoder_linears
from .masks import add_masks, masked_linears, refuse_nan_thresholds, remove_masks
from .pruner import Pruner
from .schedule import CubicSchedule, check_keep, check_scope, refuse_nan, select


class MovementPruner(Pruner):
    """Top-v of learned scores (SMvP as the papers use it), per matrix or over all matrices at once.

    Args:
        keep: final share of weights kept, in (0, 1].
        scope: "matrix" keeps the share in every matrix, "global" over all of them together.
        warmup, cooldown: see :class:`CubicSchedule`.
        score_init: scores start at this multiple of |W| / mean(|W|) of their matrix; 0 starts them at zero.
    """

    learned_scores = True

    def __init__(
        self, keep: float, scope: str = "matrix", warmup: float = 0.1, cooldown: float = 0.3, score_init: float = 0.0
    ) -> None:
        if score_init < 0:
            raise ValueError(f"score_init: must be 0 or more, got {score_init}")
        check_scope(scope)
        check_keep(keep)
        CubicSchedule(keep, 1, warmup, cooldown)
        self.keep, self.scope, self.warmup, self.cooldown = keep, scope, warmup, cooldown
        self.score_init = score_init

    def attach(self, model: nn.Module) -> None:
        """Replace every encoder linear of ``model`` by a MaskedLinear that keeps everything."""
        add_masks(model, self.score_init)

    def update_masks(self, model: nn.Module, keep: float) -> None:
        """Select the top ``keep`` share of the current scores."""
        modules = [module for _, module in masked_linears(model)]
        scores = [module.scores.detach() for module in modules]
        set_thresholds(modules, select(scores, keep, self.scope))

    def callback(self, steps: int) -> PruningCallback:
        """The Trainer callback that follows the cubic schedule over ``steps`` updates."""
        return PruningCallback(self, CubicSchedule(self.keep, steps, self.warmup, self.cooldown))

    def detach(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Zero the pruned weights, put plain linears back, and return the scores: name -> [out, in] float32."""
        self.update_masks(model, self.keep)
        scores = {name: module.scores.detach().float().clone() for name, module in masked_linears(model)}
        remove_masks(model)
        return scores


class PruningCallback(TrainerCallback):
    """Updates the masks before every step from the scores of the step before."""

    def __init__(self, pruner: MovementPruner, schedule: CubicSchedule) -> None:
        self.pruner, self.schedule = pruner, schedule

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        keep = self.schedule(state.global_step)
        self.pruner.update_masks(model, keep)
        self.progress = {"keep": keep}

    def on_log(self, args, state, control, model=None, **kwargs):
        refuse_nan_thresholds(model)


class HardMovementPruner(Pruner):
    """Movement pruning as LPAF's text has it: S accumulates -W dL/dW, and pruned weights are zeroed on the spot.

    The layers stay plain, the scores have no optimizer, and the score of a zeroed weight stands still (W dL/dW = 0), so
    that it hardly returns. A step costs what a fine-tuning step costs and one pass over W, its gradient and S.

    Args:
        keep, scope, warmup, cooldown: as for :class:`MovementPruner`. Scores start at zero and rank by their order
            alone, whatever the learning rate.
    """

    def __init__(self, keep: float, scope: str = "matrix", warmup: float = 0.1, cooldown: float = 0.3) -> None:
        check_scope(scope)
        check_keep(keep)
        CubicSchedule(keep, 1, warmup, cooldown)
        self.keep, self.scope, self.warmup, self.cooldown = keep, scope, warmup, cooldown

    def attach(self, model: nn.Module) -> None:
        """Give every encoder linear of ``model`` a score per weight, as a buffer that checkpoints hold."""
        for linear in encoder_linears(model).values():
            linear.register_buffer("movement", torch.zeros_like(linear.weight, dtype=torch.float32))

    def accumulate(self, model: nn.Module) -> None:
        """Add the movement of the gradients that the parameters hold now (Eq. 4)."""
        linears = encoder_linears(model).values()
        weights = [linear.weight for linear in linears]
        accumulate_movement_([linear.movement for linear in linears], weights, [weight.grad for weight in weights])

    def zero(self, model: nn.Module, keep: float) -> None:
        """Zero the weights outside the top ``keep`` share of the scores."""
        linears = encoder_linears(model).values()
        scores = [linear.movement for linear in linears]
        zero_pruned_([linear.weight for linear in linears], select(scores, keep, self.scope), scores)

    def callback(self, steps: int) -> HardPruningCallback:
        """The Trainer callback that follows the cubic schedule over ``steps`` updates."""
        return HardPruningCallback(self, CubicSchedule(self.keep, steps, self.warmup, self.cooldown))

    def detach(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Zero the pruned weights for good, and return the scores: name -> [out, in] float32."""
        refuse_nan([linear.movement for linear in encoder_linears(model).values()])
        self.zero(model, self.keep)
        scores = {}
        for name, linear in encoder_linears(model).items():
            scores[name] = linear.movement
            del linear.movement
        return scores


class HardPruningCallback(TrainerCallback):
    """Accumulates before every optimizer step and zeroes after it."""

    def __init__(self, pruner: HardMovementPruner, schedule: CubicSchedule) -> None:
        self.pruner, self.schedule = pruner, schedule

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.pruner.accumulate(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        keep = self.schedule(state.global_step + 1)
        self.progress = {"keep": keep}
        if keep < 1.0:
            self.pruner.zero(model, keep)

    def on_log(self, args, state, control, model=None, **kwargs):
        refuse_nan([linear.movement for linear in encoder_linears(model).values()])
