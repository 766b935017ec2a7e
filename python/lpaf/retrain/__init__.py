"""Training stages: objective, trainer, and the retrainers ``RETRAINERS[name]``."""

from .mixed_rank import MixedRank
from .objective import Objective
from .plain import PlainRetraining
from .trainer import TrainOptions, train_stage

#: name -> class with attach(model, weights), callbacks(steps, passes), detach(model)
RETRAINERS = {"mixed-rank": MixedRank, "plain": PlainRetraining}

__all__ = ["RETRAINERS", "MixedRank", "Objective", "PlainRetraining", "TrainOptions", "train_stage"]
