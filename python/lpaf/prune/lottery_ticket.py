"""The lottery ticket hypothesis: iterative magnitude pruning that rewinds to the pre-trained weights.

Frankle and Carbin (2019); on BERT, Chen et al. (2020). Every round trains under the mask so far, masks the smallest of
the weights that are left, and puts everything but the mask back to what it was before fine-tuning: the other weights,
embeddings, norms and the head. After the last round the ticket is trained.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback

from lpaf_kernels import KeepThreshold, set_thresholds

from .magnitude import mask_smallest, unmask
from .masks import add_masks, kept_share, masked_linears, refuse_nan_thresholds
from .pruner import Pruner, Surroundings
from .schedule import check_keep, check_scope, refuse_nan


class LotteryTicketPruner(Pruner):
    """Iterative magnitude pruning with rewinding; round r of R ends with a share of keep^(r / R).

    Args:
        keep: final share of weights kept, in (0, 1].
        scope: "matrix" keeps the share in every matrix, "global" over all of them together.
        rounds: how often it prunes and rewinds. Default: 3.
    """

    looks_back = True

    def __init__(self, keep: float, scope: str = "matrix", rounds: int = 3) -> None:
        check_scope(scope)
        if rounds < 1:
            raise ValueError(f"rounds: must be at least 1, got {rounds}")
        check_keep(keep)
        self.keep, self.scope, self.rounds = keep, scope, rounds

    def look_around(self, surroundings: Surroundings) -> None:
        """Remember what to rewind to."""
        self.pretrained = surroundings.pretrained

    def attach(self, model: nn.Module) -> None:
        """Replace every encoder linear by a MaskedLinear that keeps everything, and rewind."""
        add_masks(model, learned=False)
        self.rewind(model)

    @torch.no_grad()
    def rewind(self, model: nn.Module) -> None:
        """Everything but the masks as it was before fine-tuning."""
        state = model.state_dict()
        for name, value in self.pretrained.items():
            state[name].copy_(value)

    def share(self, number: int) -> float:
        """Share of weights kept after round ``number``, from 1."""
        return self.keep if number == self.rounds else self.keep ** (number / self.rounds)

    def end_round(self, model: nn.Module, number: int) -> dict[str, torch.Tensor]:
        """Mask the smallest of the weights that are left; returns the masks: name -> bool [out, in]."""
        mask_smallest(model, self.share(number), self.scope, nested=True)
        refuse_nan_thresholds(model)
        return {name: module.mask() for name, module in masked_linears(model)}

    @torch.no_grad()
    def next_round(self, model: nn.Module, masks: dict[str, torch.Tensor]) -> None:
        """Put the masks in place that the round before left, and rewind."""
        for name, module in masked_linears(model):
            module.scores.copy_(masks[name])
            half = KeepThreshold(torch.full_like(module.threshold_value, 0.5), module.threshold_tie_index)
            set_thresholds([module], [half])
        self.rewind(model)

    def callback(self, steps: int) -> TicketCallback:
        """The Trainer callback that reports the share kept."""
        return TicketCallback()

    def detach(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Zero the masked weights and return |W| of before: name -> [out, in] float32."""
        return unmask(model)


class TicketCallback(TrainerCallback):
    """Reports the share that the mask keeps; the mask stands while a round trains."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.progress = {"keep": kept_share(model)}

    def on_log(self, args, state, control, model=None, **kwargs):
        refuse_nan([module.weight for _, module in masked_linears(model)])
