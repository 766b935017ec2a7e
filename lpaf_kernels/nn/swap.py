"""Replace the nn.Linear layers of a model, in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import nn

from ..ops._checks import check_fraction
from .fold import check_fold, fold_kept
from .lowrank_sparse_linear import LowRankSparseLinear


def swap_linears(
    model: nn.Module,
    rank: int,
    keep: float = 0.0,
    names: Callable[[str], bool] | Iterable[str] | None = None,
    fold: Iterable[tuple[str, str] | tuple[str, str, int]] = (),
) -> list[str]:
    """Replace nn.Linear layers of ``model`` by their :class:`LowRankSparseLinear`, in place.

    Args:
        model: any module that contains nn.Linear layers. Only nn.Linear itself is replaced, no subclass:
            their forward may differ.
        rank: of every factorised layer.
        keep: share of the output neurons kept in full, see :meth:`LowRankSparseLinear.from_linear`. Default:
            0.0.
        names: which layers: a list of module names, each of which must be there and fit the rank; or a
            predicate on the name. Default: all. With the default or a predicate, layers that would not get
            smaller and layers whose weight is shared with another module (a decoder tied to its embedding) are
            left alone.
        fold: (first, second) or (first, second, heads) names of layers between which neurons are reordered so
            that the kept columns of the first lie side by side, see :func:`fold_kept`; the first must be among
            those that are replaced. Default: none.

    Returns:
        The names of the replaced layers, in the order of the model. A layer that the model holds twice is
        replaced in both places by one new layer.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range; a named layer that is missing,
            not an nn.Linear, tied, or too small for the rank; no layer replaced. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: expected an integer, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    keep = check_fraction("keep", keep)
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and name
    }
    tied = _tied(model)
    if names is None or callable(names):
        chosen = [
            name
            for name, linear in linears.items()
            if (names is None or names(name)) and id(linear) not in tied and _shrinks(linear, rank, keep)
        ]
    else:
        if isinstance(names, str):
            raise TypeError(f"names: expected a list of names or a predicate, got the string {names!r}")
        wanted = set(names)
        for name in sorted(wanted):
            _check_named(name, linears.get(name), rank, tied)
        chosen = [name for name in linears if name in wanted]
    if not chosen:
        raise ValueError(
            f"names: expected at least one nn.Linear that rank {rank} makes smaller, found none among {len(linears)}"
        )
    pairs = [_check_fold(pair, chosen, linears, tied) for pair in fold]
    for i, role in enumerate(("first", "second")):
        if len({id(linears[pair[i]]) for pair in pairs}) < len(pairs):
            raise ValueError(f"fold: expected every layer once as {role}, got one twice")
    made: dict[int, LowRankSparseLinear] = {}
    for name in chosen:
        linear = linears[name]
        if id(linear) not in made:
            made[id(linear)] = LowRankSparseLinear.from_linear(linear, rank, keep)
            made[id(linear)].train(linear.training)
        model.set_submodule(name, made[id(linear)])
    for first, second, heads in pairs:
        fold_kept(model.get_submodule(first), model.get_submodule(second), heads)
    return chosen


def _shrinks(linear: nn.Linear, rank: int, keep: float) -> bool:
    out_features, in_features = linear.weight.shape
    kept = math.floor(keep * out_features + 0.5)
    return rank * (in_features + out_features) + kept * in_features < linear.weight.numel()


def _tied(model: nn.Module) -> set[int]:
    """The ids of the modules that share a parameter named weight with another module."""
    owners: dict[int, list[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(id(module))
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def _check_fold(
    pair: tuple, chosen: list[str], linears: dict[str, nn.Linear], tied: set[int]
) -> tuple[str, str, int | None]:
    pair = tuple(pair)
    if len(pair) not in (2, 3) or not all(isinstance(name, str) for name in pair[:2]):
        raise ValueError(f"fold: expected (first, second) or (first, second, heads), got {pair!r}")
    first, second = pair[:2]
    for name, found in ((first, first in chosen), (second, second in linears and id(linears[second]) not in tied)):
        if not found:
            raise ValueError(f"fold: expected names of layers that are replaced and read their output, got {name!r}")
    heads = pair[2] if len(pair) == 3 else None
    check_fold(linears[first].out_features, linears[second].in_features, heads)
    return first, second, heads


def _check_named(name: str, linear: nn.Linear | None, rank: int, tied: set[int]) -> None:
    if linear is None:
        raise ValueError(f"names: expected names of nn.Linear layers of the model, got {name!r}")
    if id(linear) in tied:
        raise ValueError(f"names: {name!r} shares its weight with another module; untie it first")
    shape = list(linear.weight.shape)
    if rank > min(shape):
        raise ValueError(f"rank: expected 1 to {min(shape)} for {name!r} of shape {shape}, got {rank}")
