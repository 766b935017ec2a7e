"""Pruners: ``PRUNERS[name](keep=..., scope=..., warmup=..., cooldown=...)``, some with more."""

from .importance import ImportancePruner
from .movement import HardMovementPruner, MovementPruner
from .schedule import CubicSchedule

#: name -> class with attach(model), callback(steps), detach(model) -> scores
PRUNERS = {"movement": MovementPruner, "hard-movement": HardMovementPruner, "importance": ImportancePruner}

__all__ = ["PRUNERS", "CubicSchedule", "HardMovementPruner", "ImportancePruner", "MovementPruner"]
