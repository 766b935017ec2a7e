"""Zero-order pruning: the smallest |W| go, at once after training or step by step while training."""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback

from lpaf_kernels import set_thresholds, zero_pruned_

from ..models.targets import encoder_linears
from .masks import add_masks, kept_share, masked_linears, remove_masks
from .pruner import Pruner
from .schedule import CubicSchedule, check_keep, check_scope, refuse_nan, select


class MagnitudePruner(Pruner):
    """POMP: the fine-tuned weights are pruned once, without training (LPAF, appendix A).

    Args:
        keep: share of weights kept, in (0, 1].
        scope: "matrix" keeps the share in every matrix, "global" over all of them together.
    """

    trains = False

    def __init__(self, keep: float, scope: str = "matrix") -> None:
        check_scope(scope)
        check_keep(keep)
        self.keep, self.scope = keep, scope

    def attach(self, model: nn.Module) -> None:
        """Nothing to add."""

    def detach(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Zero all but the largest weights and return |W| as it was before: name -> [out, in] float32."""
        linears = encoder_linears(model)
        scores = {name: linear.weight.detach().abs().float() for name, linear in linears.items()}
        thresholds = select(list(scores.values()), self.keep, self.scope)
        refuse_nan([threshold.value for threshold in thresholds])
        zero_pruned_([linear.weight for linear in linears.values()], thresholds, list(scores.values()))
        return scores


@torch.no_grad()
def mask_smallest(model: nn.Module, keep: float, scope: str, nested: bool = False) -> None:
    """Mask all but the ``keep`` share of the weights with the largest |W|.

    Masked weights compete with the value that they have, or, ``nested``, stay masked. Every MaskedLinear's scores
    become |W| of this moment (-1 where a weight must stay masked), so that the mask stands until the next call.
    """
    modules = [module for _, module in masked_linears(model)]
    for module in modules:
        magnitude = module.weight.abs()
        module.scores.copy_(torch.where(module.mask(), magnitude, -1.0) if nested else magnitude)
    set_thresholds(modules, select([module.scores.detach() for module in modules], keep, scope))


def unmask(model: nn.Module) -> dict[str, torch.Tensor]:
    """Zero the masked weights for good, put plain linears back, and return |W| of before: name -> [out, in] float32."""
    scores = {name: module.weight.detach().abs().float() for name, module in masked_linears(model)}
    remove_masks(model)
    return scores


class GradualMagnitudePruner(Pruner):
    """The smallest |W| are masked step by step under the cubic schedule while the others train (Zhu and Gupta, 2017).

    As there, a masked weight is not zeroed but left out, and gets no gradient; AdamW still moves it, by the momentum of
    earlier gradients until that has died out, and by weight decay. It returns when it is larger than others at a
    selection. From the first step at the final share on, the mask stands.

    Args:
        keep, scope: as for :class:`MagnitudePruner`.
        warmup, cooldown: see :class:`CubicSchedule`.
        interval: steps between selections. Default: 10.
    """

    def __init__(
        self, keep: float, scope: str = "matrix", warmup: float = 0.1, cooldown: float = 0.3, interval: int = 10
    ) -> None:
        check_scope(scope)
        if interval < 1:
            raise ValueError(f"interval: must be at least 1, got {interval}")
        check_keep(keep)
        CubicSchedule(keep, 1, warmup, cooldown)
        self.keep, self.scope, self.warmup, self.cooldown, self.interval = keep, scope, warmup, cooldown, interval

    def attach(self, model: nn.Module) -> None:
        """Replace every encoder linear of ``model`` by a MaskedLinear that keeps everything."""
        add_masks(model, learned=False)

    def callback(self, steps: int) -> GradualMagnitudeCallback:
        """The Trainer callback that follows the cubic schedule over ``steps`` updates."""
        return GradualMagnitudeCallback(self, CubicSchedule(self.keep, steps, self.warmup, self.cooldown))

    def detach(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Zero the masked weights and return |W| of before: name -> [out, in] float32."""
        mask_smallest(model, self.keep, self.scope, nested=True)
        return unmask(model)


class GradualMagnitudeCallback(TrainerCallback):
    """Selects before some steps, while the share falls."""

    def __init__(self, pruner: GradualMagnitudePruner, schedule: CubicSchedule) -> None:
        self.pruner, self.schedule = pruner, schedule

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        keep, before = self.schedule(step), self.schedule(step - 1)
        self.model = model
        if keep < before and (step % self.pruner.interval == 0 or keep == self.pruner.keep):
            mask_smallest(model, keep, self.pruner.scope)

    @property
    def progress(self) -> dict[str, float]:
        """The share that the last selection left; counted when it is read."""
        return {"keep": kept_share(self.model)}

    def on_log(self, args, state, control, model=None, **kwargs):
        refuse_nan([module.weight for _, module in masked_linears(model)])
