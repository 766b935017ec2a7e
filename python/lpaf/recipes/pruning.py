"""From the options of a run to its pruner: what each one takes, and what it would ignore."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from ..errors import InputError
from ..prune import PRUNERS, Pruner
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


def takes(pruner: str, field: str) -> bool:
    """Whether the option means something to the pruner called ``pruner``."""
    cls = PRUNERS[pruner]
    if field in TRAINING:
        return getattr(cls, TRAINING[field])
    return ARGUMENTS[field] in inspect.signature(cls).parameters


def check_pruner_options(pruner: str | None, options: CompressOptions) -> None:
    """InputError for an option that ``pruner`` would ignore. Without a pruner, only those of one kind are refused."""
    for field in dataclasses.fields(options):
        if field.name not in (*ARGUMENTS, *TRAINING) or getattr(options, field.name) == field.default:
            continue
        takers = [name for name in PRUNER_CHOICES if takes(name, field.name)]
        if takes(pruner, field.name) if pruner else "movement" in takers:
            continue
        instead = f"{pruner} would ignore it" if pruner else f"--method {options.method} does not prune that way"
        raise InputError(f"{flag(field.name)}: is for --pruner {', '.join(takers)}; {instead}")


def make_pruner(name: str, options: CompressOptions) -> Pruner:
    """The pruner called ``name`` with what it takes of ``options``."""
    given = options.to_dict() | {"score_init": score_init(name, options)}
    arguments: dict[str, Any] = {argument: given[field] for field, argument in ARGUMENTS.items() if takes(name, field)}
    return PRUNERS[name](**arguments)
