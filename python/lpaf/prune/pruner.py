"""What a pruner is to the recipes that drive it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn


@dataclass(frozen=True)
class Surroundings:
    """What a pruner may look at besides the model that it prunes.

    Args:
        pretrained: state dict of the model before it was fine-tuned.
        dense: the fine-tuned model.
        train: the tokenised training set, in the order that ``index`` in its batches means.
        tokenizer: pads ``train``.
    """

    pretrained: dict[str, torch.Tensor]
    dense: nn.Module
    train: Dataset
    tokenizer: Any


class Pruner:
    """A pruner; ``lpaf.prune`` says what else a member of PRUNERS must have.

    Class attributes, for those that differ:
        trains: False prunes in :meth:`detach` alone; there is no callback then.
        learned_scores: an optimizer moves the scores, at a rate of their own.
        score_lr: that rate, unless the recipe asks for another.
        looks_back: needs :meth:`look_around` before it is attached.
        budgeted: what it keeps and at which rank follow from ``--ratio``, the share of the weights that is stored.
        structured: removes heads, neurons or blocks of known model types, and is told ``ratio``, the share of the
            weights that is to stay.
        distill: the weight of logit distillation that belongs to the method, whatever the recipe's.
        rounds: training stages before the last one. Each ends with ``end_round(model, number)``, number from 1, which
            returns tensors; the next begins with ``next_round(model, tensors)``, in a resumed run perhaps with those
            that were stored.
    """

    trains: bool = True
    learned_scores: bool = False
    score_lr: float = 1e-2
    looks_back: bool = False
    budgeted: bool = False
    structured: bool = False
    distill: float | None = None
    rounds: int = 0

    def rebuild(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        """Give a dense ``model`` the layers that :meth:`detach` leaves, as the tensors of the state dict ``state`` have
        them, before it is loaded. Default: they are dense still."""
