"""Pruners: ``PRUNERS[name](keep=..., scope=..., warmup=..., cooldown=...)``."""

from .movement import MovementPruner
from .schedule import CubicSchedule

#: name -> class with attach(model), callback(steps), detach(model) -> scores
PRUNERS = {"movement": MovementPruner}

__all__ = ["PRUNERS", "CubicSchedule", "MovementPruner"]
