"""Reorder the neurons between two layers so that the kept columns of S lie side by side."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .lowrank_sparse_linear import LowRankSparseLinear

Layer = nn.Linear | LowRankSparseLinear


@torch.no_grad()
def fold_kept(
    first: LowRankSparseLinear, second: Layer, heads: int | None = None, alongside: Iterable[Layer] = ()
) -> Tensor:
    """Move the kept outputs of ``first`` to the front, and the inputs of ``second`` with them, in place.

    What stands between the two must act on every neuron alone: an activation, dropout, a product with another
    layer's output (name that layer in ``alongside``), or attention, which mixes tokens but no neurons of a head
    (``heads``). A normalisation does not qualify, because its own weights would have to move too. The function of
    both layers together stays what it was, up to the rounding of ``second``'s sums in their new order.

    The operators take kept columns at any positions, so this is not needed for them; side by side, S x is one
    slice of the output (one per head), which is what runtimes without a scatter can add.

    Args:
        first: the feed-forward's first layer, or attention's value layer.
        second: the layer that reads its output: nn.Linear or LowRankSparseLinear. In grouped-query attention it
            may have n times as many inputs if ``heads`` is given: every value head is then read n times in a row.
        heads: value heads of attention, groups of neighbouring neurons that each stay together. Default: none, all
            neurons are one group.
        alongside: layers whose outputs are multiplied with those of ``first`` neuron by neuron (the gate of a gated
            feed-forward); theirs are moved in the same way. Default: none.

    Returns:
        int64 [out]: where each output of ``first`` was before.

    Raises:
        TypeError: a layer of another type, or with a parametrised weight.
        ValueError: sizes that do not fit, or one layer twice.
    """
    alongside = list(alongside)
    if type(first) is not LowRankSparseLinear:
        raise TypeError(f"first: expected a LowRankSparseLinear, got {type(first).__name__}")
    layers = {"first": first, "second": second} | {f"alongside[{i}]": layer for i, layer in enumerate(alongside)}
    for name, layer in layers.items():
        # Subclasses and parametrised layers keep more than a weight and a bias.
        if type(layer) not in (nn.Linear, LowRankSparseLinear):
            raise TypeError(f"{name}: expected an nn.Linear or LowRankSparseLinear, got {type(layer).__name__}")
        if any(tensor is not layer._parameters.get(key) for key, tensor in _weights(layer)):
            raise TypeError(f"{name}: its weight is computed by a parametrisation; remove that first")
    if len({id(layer) for layer in layers.values()}) < len(layers):
        raise ValueError("first, second, alongside: expected different layers, got one twice")
    size = first.out_features
    check_fold(size, second.in_features, heads)
    heads = heads or 1
    for i, layer in enumerate(alongside):
        if layer.out_features != size:
            raise ValueError(f"alongside[{i}]: expected {size} outputs (those of first), got {layer.out_features}")
    moved = torch.ones(size, dtype=torch.bool, device=first.kept.device)
    moved[first.kept.long()] = False
    # A stable sort: neither the kept neurons nor the others change their order among themselves.
    within = moved.view(heads, -1).sort(stable=True).indices
    order = (within + torch.arange(0, size, size // heads, device=within.device)[:, None]).flatten()
    for layer in (first, *alongside):
        _permute_outputs(layer, order)
    repeats = second.in_features // size
    by_head = order.view(heads, 1, -1) % (size // heads)
    starts = torch.arange(0, second.in_features, size // heads, device=order.device).view(heads, repeats, 1)
    _permute_inputs(second, (by_head + starts).flatten())
    return order


def _weights(layer: Layer) -> list[tuple[str, Tensor | None]]:
    names = ("weight", "bias") if isinstance(layer, nn.Linear) else ("down", "up", "bias")
    return [(name, getattr(layer, name)) for name in names]


def check_fold(outputs: int, inputs: int, heads: int | None) -> None:
    """Raise unless a layer with so many inputs can read one with so many outputs in ``heads`` groups."""
    integer = isinstance(heads, int) and not isinstance(heads, bool)
    if heads is not None and (not integer or heads < 1 or outputs % heads):
        raise ValueError(f"heads: expected a divisor of {outputs} (the outputs of first), got {heads!r}")
    if inputs % outputs or (inputs != outputs and heads is None):
        raise ValueError(f"second: expected {outputs} inputs (the outputs of first), got {inputs}")


def _permute_outputs(layer: Layer, order: Tensor) -> None:
    """Output i becomes what output order[i] was."""
    dense = isinstance(layer, nn.Linear)
    order = order.to((layer.weight if dense else layer.up).device)
    if layer.bias is not None:
        layer.bias.copy_(layer.bias[order])
    if dense:
        layer.weight.copy_(layer.weight[order])
        return
    layer.up.copy_(layer.up[:, order])
    positions = order.argsort()[layer.kept.long()]
    kept, rows = positions.sort()
    layer.kept.copy_(kept)
    layer.down[layer.rank :] = layer.down[layer.rank :][rows]


def _permute_inputs(layer: Layer, order: Tensor) -> None:
    """Input i becomes what input order[i] was."""
    weight = layer.weight if isinstance(layer, nn.Linear) else layer.down
    weight.copy_(weight[:, order.to(weight.device)])
