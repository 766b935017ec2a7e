"""From the options of a run to its pruner: what each one takes, and what it would ignore."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from ..errors import InputError
from ..models.count import Shape
from ..models.neurons import NeuronBudget, default_low_rank_share, neuron_budget
from ..prune import PRUNERS, Pruner
from ..prune.cofi_losparse import losparse_ratio
from .options import PRUNER_CHOICES, CompressOptions, flag

#: field of CompressOptions -> argument of the pruners whose signature has it
ARGUMENTS = {
    "keep": "keep",
    "scope": "scope",
    "prune_warmup": "warmup",
    "prune_cooldown": "cooldown",
    "score_init": "score_init",
    "threshold": "threshold",
    "penalty": "penalty",
    "contrastive": "contrastive",
    "prune_interval": "interval",
    "rounds": "rounds",
    "low_rank_share": "rank",
    "uncertainty": "beta2",
}
#: field of CompressOptions -> attribute of the pruners that have a use for it
TRAINING = {"prune_lr": "trains", "prune_from": "trains", "score_lr": "learned_scores"}
#: fields that mean nothing where nothing is pruned
PRUNER_OPTIONS = (*ARGUMENTS, *TRAINING, "pruner", "hard_pruning")
#: where scores start that rank against each other: at zero, the first cuts of a short run would follow noise
SCORE_INIT = 4.0


def score_init(pruner: str | None, options: CompressOptions) -> float | None:
    """Where the scores of ``pruner`` start; None where none are learned."""
    if pruner is None or not takes(pruner, "score_init"):
        return None
    if options.score_init is not None:
        return options.score_init
    return 0.0 if pruner == "soft-movement" else SCORE_INIT


def score_lr(pruner: str | None, options: CompressOptions) -> float:
    """The learning rate of the scores of ``pruner``."""
    return options.score_lr or PRUNERS.get(pruner, Pruner).score_lr


def default_scope(pruner: str) -> str:
    """Where ``pruner`` ranks its scores when ``--scope`` is silent."""
    return inspect.signature(PRUNERS[pruner]).parameters["scope"].default


def takes(pruner: str, field: str) -> bool:
    """Whether the option means something to the pruner called ``pruner``."""
    cls = PRUNERS[pruner]
    if field in TRAINING:
        return getattr(cls, TRAINING[field])
    if field == "keep" and cls.budgeted:
        return False
    return ARGUMENTS[field] in inspect.signature(cls).parameters


def check_pruner_options(pruner: str | None, options: CompressOptions, low_rank_share: float | None = None) -> None:
    """InputError for an option that ``pruner`` would ignore. Without a pruner, only those of one kind are refused.

    Args:
        low_rank_share: the share that the method fixes.
    """
    if options.low_rank_share is not None and low_rank_share is not None:
        raise InputError(f"--low-rank-share: is for --method losparse; --method {options.method} fixes it")
    for field in dataclasses.fields(options):
        if field.name not in (*ARGUMENTS, *TRAINING) or getattr(options, field.name) == field.default:
            continue
        takers = [name for name in PRUNER_CHOICES if takes(name, field.name)]
        if takes(pruner, field.name) if pruner else "movement" in takers:
            continue
        by_method = pruner is None or PRUNERS[pruner].budgeted
        instead = f"--method {options.method} does not prune that way" if by_method else f"{pruner} would ignore it"
        meant = f"--pruner {', '.join(takers)}" if takers else "--method losparse"
        raise InputError(f"{flag(field.name)}: is for {meant}; {instead}")


def budget_of(
    shapes: Mapping[str, Shape], pruner: str, options: CompressOptions, low_rank_share: float | None
) -> NeuronBudget:
    """What ``--ratio`` buys ``pruner``, one of neurons, or InputError; ``low_rank_share`` is that of the method."""
    if low_rank_share is not None:
        share = low_rank_share * options.ratio
    elif options.low_rank_share is not None:
        share = options.low_rank_share
    else:
        share = default_low_rank_share(options.ratio)
    budget = neuron_budget(shapes, options.ratio, share)
    if PRUNERS[pruner].structured:  # there is more for the rows of what is not removed
        budget = neuron_budget(shapes, losparse_ratio(options.ratio), share)
    return budget


def make_pruner(name: str, options: CompressOptions, budget: NeuronBudget | None = None) -> Pruner:
    """The pruner called ``name`` with what it takes of ``options``; a budgeted one gets its size from ``budget``."""
    given = options.to_dict() | {"score_init": score_init(name, options)}
    if budget is not None:
        given |= {"keep": budget.keep, "low_rank_share": budget.ranks}
    parameters = inspect.signature(PRUNERS[name]).parameters
    arguments: dict[str, Any] = {
        argument: given[field]
        for field, argument in ARGUMENTS.items()
        if argument in parameters and given[field] is not None
    }
    if PRUNERS[name].structured:
        arguments["ratio"] = options.ratio
    return PRUNERS[name](**arguments)
