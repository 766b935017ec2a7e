"""CoFi: coarse and fine structures pruned together by hard-concrete gates (Xia, Zhong, Chen, ACL 2022).

Attention blocks, feed-forward blocks, heads and feed-forward neurons have a gate each; a weight stays while all gates
above it are open. The Lagrangian lambda_1 (s - t) + lambda_2 (s - t)^2 pulls the expected share s of encoder weights
that the gates close to a target t: the gates descend it, the lambdas ascend it. In the end what is closed is removed
for good, and the smaller dense model is retrained.

CoFi's mask over the hidden dimensions is left out: it would cut embeddings, norms and head along with the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..models.blocks import check_removable, shrink_to
from ..processes import say
from .gates import BlockGates, add_gates, all_gates, block_gates, fix_gates, gated_params, remove_closed, unit_params
from .pruner import Pruner
from .schedule import CubicSchedule, refuse_nan


class CofiPruner(Pruner):
    """Prunes heads, neurons and whole blocks until ``ratio`` of the encoder's weights is left.

    Args:
        ratio: share of encoder weights to keep, in (0, 1].
        warmup: share of the steps before the target starts to rise.
        cooldown: share of the steps at the final target. In between it rises linearly.
    """

    learned_scores = True
    structured = True
    score_lr = 0.1
    #: whether neurons have gates
    fine = True

    def __init__(self, ratio: float, warmup: float = 0.1, cooldown: float = 0.3) -> None:
        CubicSchedule(ratio, 1, warmup, cooldown)
        self.ratio, self.warmup, self.cooldown = ratio, warmup, cooldown

    @property
    def coarse_ratio(self) -> float:
        """Share of the weights that the gates keep."""
        return self.ratio

    def attach(self, model: nn.Module) -> None:
        """Put gates that are open and multipliers that are zero into ``model``: the same function."""
        check_removable(model.config.model_type, "--method cofi")
        add_gates(model, neurons=self.fine)
        model.multipliers = Multipliers().to(next(model.parameters()).device)

    def callback(self, steps: int) -> CofiCallback:
        """The Trainer callback that draws gates and moves the multipliers over ``steps`` updates; its term is the
        Lagrangian."""
        return CofiCallback(self, steps)

    def target(self, step: int, steps: int) -> float:
        """The share t of weights to close at ``step`` of ``steps``."""
        first, end = self.warmup * steps, steps - self.cooldown * steps
        return (1.0 - self.coarse_ratio) * min(max((step - first) / (end - first), 0.0), 1.0)

    def detach(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Decide which gates are closed, remove what they close, and leave dense layers; there are no scores."""
        self.close(model)
        remove_closed(model)
        return {}

    def close(self, model: nn.Module) -> None:
        """Fix every gate: at 0 for what is removed, so that the rest fits into the ratio, else without noise."""
        refuse_nan([gates.log_alpha for gates in all_gates(model)])
        found = list(block_gates(model))
        blocks = [Block.of(gates, unit_params(layer, role), role == "attention_output") for layer, role, gates in found]
        whole = gated_params(model)
        share = sum(block.cost * block.chance * float(block.units.sum()) for block in blocks) / whole
        if abs(share - self.coarse_ratio) > UNDECIDED:
            say(
                f"cofi: the gates expect to keep {share:.1%} of the weights they guard, and {self.coarse_ratio:.1%} "
                "was asked for; the likeliest stay. Train longer, or pass a larger --score-lr"
            )
        masks = decide(blocks, budget=int(self.coarse_ratio * whole * (1 + 1e-12)))
        for (_, _, gates), mask in zip(found, masks, strict=True):
            fix_gates(gates, mask)
        del model.multipliers

    def rebuild(self, model: nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Give a dense model the layers that detach left, as the tensors of ``state`` have them."""
        shrink_to(model, state)


#: a share of weights by which gates may miss their target before a run says so
UNDECIDED = 0.05


class Multipliers(nn.Module):
    """lambda_1 and lambda_2, moved by Adam against the gates; its state is in buffers, so that checkpoints hold it.

    Their gradients follow from the gates alone, which are the same in every process.
    """

    def __init__(self) -> None:
        super().__init__()
        for name in ("values", "mean", "square"):
            self.register_buffer(name, torch.zeros(2))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def ascend(self, gradient: torch.Tensor, rate: float, betas: tuple[float, float] = (0.9, 0.999)) -> None:
        """One step of Adam up ``gradient`` [2]."""
        self.count += 1
        self.mean.lerp_(gradient, 1 - betas[0])
        self.square.lerp_(gradient.square(), 1 - betas[1])
        mean, square = self.mean / (1 - betas[0] ** self.count), self.square / (1 - betas[1] ** self.count)
        self.values += rate * mean / (square.sqrt() + 1e-8)


class CofiCallback(TrainerCallback):
    """Draws the gates before every step, adds the Lagrangian to the loss, and moves its multipliers."""

    def __init__(self, pruner: CofiPruner, steps: int) -> None:
        self.pruner, self.steps = pruner, steps
        self.terms = (self.lagrangian,)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.gates, self.multipliers = all_gates(model), model.multipliers
        self.costs = [(gates, unit_params(layer, role)) for layer, role, gates in block_gates(model)]
        self.whole = gated_params(model)

    def sparsity(self) -> torch.Tensor:
        """Expected share of weights that the gates close: 0-d, differentiable."""
        kept = torch.stack([gates.expected_units() * cost for gates, cost in self.costs]).sum()
        return 1.0 - kept / self.whole

    def lagrangian(self, model: nn.Module, outputs: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """lambda_1 (s - t) + lambda_2 (s - t)^2, the loss term; none before the target rises."""
        if self.target == 0.0:
            return {}
        gap = self.sparsity() - self.target
        first, second = self.multipliers.values
        return {"lagrangian": first * gap + second * gap.square()}

    def on_step_begin(self, args, state, control, **kwargs):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + state.global_step)
        for gates in self.gates:
            gates.draw(generator)
        self.target = self.pruner.target(state.global_step, self.steps)

    def on_pre_optimizer_step(self, args, state, control, lr_scheduler=None, **kwargs):
        if self.target > 0.0:
            gap = self.sparsity().detach() - self.target
            schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)  # accelerate wraps it
            self.multipliers.ascend(torch.stack((gap, gap.square())), rate=schedule.base_lrs[-1])

    def on_optimizer_step(self, args, state, control, **kwargs):
        for gates in self.gates:
            gates.constrain()

    @property
    def progress(self) -> dict[str, float]:
        """The share that the gates expect to keep, and the share asked for now; counted when it is read."""
        return {"keep": 1.0 - float(self.sparsity().detach()), "target": 1.0 - self.target}

    def on_log(self, args, state, control, **kwargs):
        refuse_nan([gates.log_alpha for gates in self.gates])


@dataclass(frozen=True)
class Block:
    """What the final decision knows of a block.

    Args:
        cost: weights of one head or neuron.
        chance: P(z > 0) of the block.
        units: P(z > 0) of its heads or neurons, float [n].
        heads: whether it is an attention block.
        whole: whether its units have no gates of their own.
    """

    cost: int
    chance: float
    units: torch.Tensor
    heads: bool
    whole: bool = False

    @classmethod
    @torch.no_grad()
    def of(cls, gates: BlockGates, cost: int, heads: bool) -> Block:
        """The block behind ``gates``; the other arguments as above."""
        chance = float(gates.block.open_probability())
        whole = gates.units is None
        units = torch.ones(gates.count) if whole else gates.units.open_probability().cpu()
        return cls(cost, chance, units, heads, whole)


def likeliest(chances: torch.Tensor) -> torch.Tensor:
    """The expected number of open gates [n], as a mask of the likeliest; the first of equals."""
    mask = torch.zeros(len(chances), dtype=torch.bool)
    mask[chances.argsort(descending=True, stable=True)[: round(float(chances.sum()))]] = True
    return mask


def decide(blocks: Sequence[Block], budget: int) -> list[torch.Tensor]:
    """Which heads and neurons of every block stay: bool [n] masks that cost at most ``budget`` weights.

    1. As many attention blocks, feed-forward blocks, and heads of each open block stay as their gates expect, the
       likeliest.
    2. While that is too much, the least likely head goes (or block, where neurons have no gates).
    3. While not even all neurons would use the budget up, the likeliest closed head (or block) returns that fits.
    4. What is left of the budget goes to neurons: the likeliest of the open blocks, over all layers; then those of the
       closed blocks, one block after the other.

    What stays costs less than ``budget`` by less than one neuron, where neurons have gates and not everything stays.
    """
    opened = {}
    for heads in (True, False):
        members = [index for index, block in enumerate(blocks) if block.heads == heads]
        stays = likeliest(torch.tensor([blocks[index].chance for index in members]))
        opened |= dict(zip(members, stays.tolist(), strict=True))
    masks, coarse, fine = [], [], []  # parts: (order, block, units)
    for index, block in enumerate(blocks):
        everything = torch.arange(len(block.units))
        mask = torch.zeros(len(block.units), dtype=torch.bool)
        if block.whole:
            mask[:] = opened[index]
            coarse.append((block.chance, index, everything))
        elif block.heads:
            mask = likeliest(block.units) & opened[index]
            coarse += [
                (block.chance * float(block.units[unit]), index, everything[unit : unit + 1]) for unit in everything
            ]
        else:
            order = (1.0, 0.0) if opened[index] else (0.0, block.chance)
            chances = block.chance * block.units
            fine += [((*order, float(chances[unit])), index, everything[unit : unit + 1]) for unit in everything]
        masks.append(mask)
    left = budget - sum(block.cost * int(mask.sum()) for block, mask in zip(blocks, masks, strict=True))
    coarse.sort(key=lambda part: part[0], reverse=True)
    fine.sort(key=lambda part: part[0], reverse=True)
    for _, index, units in reversed(coarse):
        if left < 0 and bool(masks[index][units].all()):
            masks[index][units] = False
            left += blocks[index].cost * len(units)
    neurons = sum(blocks[index].cost for _, index, _ in fine)
    for _, index, units in coarse:
        cost = blocks[index].cost * len(units)
        if neurons < left and cost <= left and not bool(masks[index][units].any()):
            masks[index][units] = True
            left -= cost
    for _, index, units in fine:
        if blocks[index].cost <= left:
            masks[index][units] = True
            left -= blocks[index].cost
    return masks
