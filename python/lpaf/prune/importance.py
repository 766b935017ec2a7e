"""LoSparse's neuron pruning: W = U V + S, rows of S ranked by a moving average of |w dL/dw| (Li et al., 2023).

Every encoder linear becomes a ``LowRankPlusSparseLinear``. Importance is taken with the weight and the gradient of the
same step, right before the optimizer moves the weight; the mean over a neuron's weights commutes with the moving
average, so that one number per neuron is kept between steps. Every ``interval`` steps, and every step of the cool-down,
the rows below the threshold are zeroed; they keep training, so they may return.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import TrainerCallback

from lpaf_kernels import (
    LowRankPlusSparseLinear,
    update_importance_,
    update_sensitivity_,
    weighted_svd,
    zero_pruned_,
)

from ..factorize.svd import balance
from ..models.neurons import compact_like
from ..models.targets import encoder_linears
from .neurons import select_neurons
from .pruner import Pruner
from .schedule import CubicSchedule, check_scope, refuse_nan


def sparse_linears(model: nn.Module) -> Iterator[tuple[str, LowRankPlusSparseLinear]]:
    """(name, module) of every LowRankPlusSparseLinear of ``model``."""
    return ((name, part) for name, part in model.named_modules() if isinstance(part, LowRankPlusSparseLinear))


class ImportancePruner(Pruner):
    """Keeps the most important neurons of S beside a low-rank part.

    Args:
        keep: final share of what all rows of S would store, indices counted, in [0, 1].
        rank: rank of U V in every matrix, or matrix name -> rank; 0 leaves S alone, which is iterative structured
            pruning (ITP, the paper's baseline).
        scope: "global" ranks the neurons of all matrices together, each counting by what its row stores; "matrix"
            within each.
        warmup, cooldown: see :class:`CubicSchedule`.
        beta1: decay of the moving average.
        interval: steps between selections before the cool-down.
        beta2: decay of PLATON's uncertainty, by which importance is multiplied per weight (Zhang et al., 2022);
            keeps two numbers per weight. Default: None, importance alone.
    """

    budgeted = True

    def __init__(
        self,
        keep: float,
        rank: int | Mapping[str, int],
        scope: str = "global",
        warmup: float = 0.1,
        cooldown: float = 0.3,
        beta1: float = 0.85,
        interval: int = 10,
        beta2: float | None = None,
    ) -> None:
        check_scope(scope)
        if min(rank.values() if isinstance(rank, Mapping) else [rank]) < 0:
            raise ValueError(f"rank: must be 0 or more, got {rank}")
        if interval < 1:
            raise ValueError(f"interval: must be at least 1, got {interval}")
        for name, value in (("beta1", beta1), ("beta2", beta2)):
            if value is not None and not 0.0 <= value < 1.0:
                raise ValueError(f"{name}: must be in [0, 1), got {value}")
        CubicSchedule(keep, 1, warmup, cooldown)
        self.keep, self.rank, self.scope, self.warmup, self.cooldown = keep, rank, scope, warmup, cooldown
        self.beta1, self.beta2, self.interval = beta1, beta2, interval

    def attach(self, model: nn.Module) -> None:
        """Replace every encoder linear of ``model`` by U V + S, the same function."""
        linears = encoder_linears(model)
        ranks = self.rank if isinstance(self.rank, Mapping) else dict.fromkeys(linears, self.rank)
        factored = [name for name in linears if ranks[name]]
        factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if factored:
            weights = [linears[name].weight.detach() for name in factored]
            products = weighted_svd(weights, [ranks[name] for name in factored])
            factors = {name: balance(a, b) for name, a, b in zip(factored, *products, strict=True)}
        for name, linear in linears.items():
            module = LowRankPlusSparseLinear.from_linear(linear, ranks[name], factors.get(name))
            # Buffers, so that checkpoints hold them.
            module.register_buffer("importance", linear.weight.new_zeros(linear.out_features, dtype=torch.float32))
            if self.beta2 is not None:
                for state in ("sensitivity", "uncertainty"):
                    module.register_buffer(state, torch.zeros_like(module.sparse, dtype=torch.float32))
            model.set_submodule(name, module)

    def update_importance(self, model: nn.Module) -> None:
        """Add |w dL/dw| of the gradients that the parameters hold now."""
        modules = [module for _, module in sparse_linears(model)]
        weights = [module.sparse for module in modules]
        grads = [weight.grad for weight in weights]
        if self.beta2 is None:
            update_importance_([module.importance for module in modules], weights, grads, beta=self.beta1)
            return
        states = [module.sensitivity for module in modules], [module.uncertainty for module in modules]
        rows = update_sensitivity_(*states, weights, grads, beta1=self.beta1, beta2=self.beta2)
        for module, importance in zip(modules, rows, strict=True):
            module.importance.copy_(importance)

    def zero_rows(self, model: nn.Module, keep: float) -> None:
        """Zero the rows of S outside the most important ``keep`` share."""
        modules = dict(sparse_linears(model))
        importance = {name: module.importance for name, module in modules.items()}
        shapes = {name: (module.out_features, module.in_features) for name, module in modules.items()}
        thresholds = select_neurons(importance, shapes, keep, self.scope)
        weights = [module.sparse for module in modules.values()]
        zero_pruned_(weights, list(thresholds.values()), list(importance.values()))

    def callback(self, steps: int) -> ImportanceCallback:
        """The Trainer callback that follows the cubic schedule over ``steps`` updates."""
        return ImportanceCallback(self, CubicSchedule(self.keep, steps, self.warmup, self.cooldown))

    def detach(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Zero the pruned rows, put compact layers in, and return the importance: name -> [out] float32."""
        refuse_nan([module.importance for _, module in sparse_linears(model)])
        self.zero_rows(model, self.keep)
        importance = {}
        for name, module in list(sparse_linears(model)):
            importance[name] = module.importance.clone()
            model.set_submodule(name, module.to_lowrank_sparse())
        return importance

    def rebuild(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        compact_like(model, state)


class ImportanceCallback(TrainerCallback):
    """Measures importance before every optimizer step and zeroes rows after some."""

    def __init__(self, pruner: ImportancePruner, schedule: CubicSchedule) -> None:
        self.pruner, self.schedule = pruner, schedule

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.pruner.update_importance(model)

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        step = state.global_step + 1
        keep = self.schedule(step)
        self.progress = {"keep": keep}
        if keep < 1.0 and (step % self.pruner.interval == 0 or keep == self.pruner.keep):
            self.pruner.zero_rows(model, keep)

    def on_log(self, args, state, control, model=None, **kwargs):
        refuse_nan([module.importance for _, module in sparse_linears(model)])
