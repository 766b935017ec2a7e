"""Pruners: ``PRUNERS[name](keep=..., scope=..., warmup=..., cooldown=...)``; what a pruner takes is its signature.

A recipe drives a pruner in this order:

1. ``look_around(surroundings)``, if it ``looks_back``: the :class:`Surroundings` of the model.
2. ``attach(model)`` puts in place what pruning needs.
3. If it ``trains``: for number = 1 ... ``rounds`` a training stage, ``tensors = end_round(model, number)`` and
   ``next_round(model, tensors)``; then a last training stage. Each stage has ``callback(steps)`` of its own, a Trainer
   callback. What the callback sets as ``progress`` is logged; its ``terms``, if it has any, are added to the loss (see
   ``retrain.trainer.Term``).
4. ``detach(model)`` zeroes what is pruned, puts final layers in, and returns the scores by which the factorisation may
   weight the rows: name -> [out, in] (or [out]) float32.

``rebuild(model, state)`` gives a dense model the layers that ``detach`` left, for a run that finds them finished.

State between steps lives in parameters and buffers of the model, so that checkpoints hold it. :class:`Pruner` has the
attributes' defaults.
"""

from .cofi import CofiPruner
from .cofi_losparse import CofiLoSparsePruner
from .contrastive import ContrastivePruner
from .importance import ImportancePruner
from .lottery_ticket import LotteryTicketPruner
from .magnitude import GradualMagnitudePruner, MagnitudePruner
from .movement import HardMovementPruner, MovementPruner
from .neuron_movement import NeuronMovementPruner
from .pruner import Pruner, Surroundings
from .schedule import CubicSchedule
from .sensitivity import SensitivityPruner
from .soft_movement import SoftMovementPruner

#: name -> class with the interface above
PRUNERS = {
    "sensitivity": SensitivityPruner,
    "movement": MovementPruner,
    "hard-movement": HardMovementPruner,
    "soft-movement": SoftMovementPruner,
    "cap": ContrastivePruner,
    "magnitude": MagnitudePruner,
    "gradual-magnitude": GradualMagnitudePruner,
    "lottery-ticket": LotteryTicketPruner,
    "importance": ImportancePruner,
    "neuron-movement": NeuronMovementPruner,
    "cofi": CofiPruner,
    "cofi+losparse": CofiLoSparsePruner,
}

__all__ = [
    "PRUNERS",
    "CofiLoSparsePruner",
    "CofiPruner",
    "ContrastivePruner",
    "CubicSchedule",
    "GradualMagnitudePruner",
    "HardMovementPruner",
    "ImportancePruner",
    "LotteryTicketPruner",
    "MagnitudePruner",
    "MovementPruner",
    "NeuronMovementPruner",
    "Pruner",
    "SensitivityPruner",
    "SoftMovementPruner",
    "Surroundings",
]
