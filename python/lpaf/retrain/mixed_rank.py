"""Mixed-rank fine-tuning: factors that now and then give way to the sparse matrix they came from (Eqs. 12 and 13)."""

from __future__ import annotations

import torch
from torch import nn
from transformers import TrainerCallback

from lpaf_kernels import LowRankSparseLinear, MixedRankLinear, clear_paths, draw_paths


class MixedRank:
    """Attach, draw and detach the mixed-rank paths of a factorised model.

    Args:
        p_init: first probability that a matrix runs as its sparse original, in [0, 1].
        decay: share of the steps over which p falls linearly to 0. Default: 0.5.
        seed: together with the step number it fixes the draws, so that a resumed run repeats them.
    """

    def __init__(self, p_init: float, decay: float = 0.5, seed: int = 0) -> None:
        if not 0.0 <= p_init <= 1.0:
            raise ValueError(f"p_init: must be in [0, 1], got {p_init}")
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay: must be in (0, 1], got {decay}")
        self.p_init, self.decay, self.seed = p_init, decay, seed

    def attach(self, model: nn.Module, weights: dict[str, torch.Tensor], train_sparse: bool = False) -> None:
        """Wrap every factorised linear together with its sparse original: name -> [out, in]."""
        for name, weight in weights.items():
            lowrank = model.get_submodule(name)
            model.set_submodule(name, MixedRankLinear(lowrank, weight, train_sparse=train_sparse))

    def probability(self, step: int, steps: int) -> float:
        """p_t = max(0, p_init - d t) with d such that p reaches 0 at ``decay`` of the steps (Eq. 13)."""
        return self.p_init * max(0.0, 1.0 - step / (self.decay * steps))

    def callbacks(self, steps: int, passes: int) -> list[TrainerCallback]:
        """The Trainer callback that draws new paths before every step."""
        return [MixedRankCallback(self, steps, passes)]

    def detach(self, model: nn.Module) -> None:
        """Put the low-rank layers back and drop the sparse matrices."""
        for name, module in list(model.named_modules()):
            if isinstance(module, MixedRankLinear):
                model.set_submodule(name, module.to_lowrank())


class MixedRankCallback(TrainerCallback):
    """Draws one Bernoulli per matrix and pass before every step."""

    def __init__(self, mixed: MixedRank, steps: int, passes: int) -> None:
        self.mixed, self.steps, self.passes = mixed, steps, passes

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        p = self.mixed.probability(state.global_step, self.steps)
        generator = torch.Generator().manual_seed(self.mixed.seed * 1_000_003 + state.global_step)
        draw_paths(model, p, generator, passes=self.passes)
        self.progress = {"mixed_rank_p": p}

    def on_train_end(self, args, state, control, model=None, **kwargs):
        clear_paths(model)


def lowrank_linears(model: nn.Module) -> dict[str, LowRankSparseLinear]:
    """Name -> module of every LowRankSparseLinear of ``model``."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankSparseLinear)}
