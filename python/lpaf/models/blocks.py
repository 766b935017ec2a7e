"""The parts of an encoder layer that structured pruning removes: attention block, heads, feed-forward block, neurons.

A block is what is added to the residual: without it, a post-norm layer computes LayerNorm(x) where it computed
LayerNorm(x + block(x)), and the block's output bias is gone with it. (CoFi's published code skips the LayerNorm too.
What is done here is the limit of a block whose output is scaled down to zero, and the norm keeps its parameters.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import InputError
from .targets import LAYER_LINEARS, encoder_linears, find_targets


class Sizes(NamedTuple):
    """What a layer has: attention heads and feed-forward neurons; 0 where the block is gone."""

    heads: int
    neurons: int


class NoBlock(nn.Module):
    """In place of a module whose output is zero: a zero that broadcasts."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """[...] -> []."""
        return x.new_zeros(())


class NoAttention(NoBlock):
    """In place of an attention module, which also returns its probabilities."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        """[...] -> ([], None)."""
        return x.new_zeros(()), None


@dataclass(frozen=True)
class Parts:
    """Where the parts are inside one layer; the linears are those of ``LAYER_LINEARS``.

    Args:
        attention: the module that splits into heads, replaced when the block goes.
        heads, width: its attributes with the number of heads and the size of all of them together.
        feed_forward: the module that holds the up-projection, replaced when the block goes.
        heads_setting, neurons_setting: the configuration's names of the dense sizes.
    """

    attention: str
    heads: str
    width: str
    feed_forward: str
    heads_setting: str
    neurons_setting: str


_BERT = Parts(
    attention="attention.self",
    heads="num_attention_heads",
    width="all_head_size",
    feed_forward="intermediate",
    heads_setting="num_attention_heads",
    neurons_setting="intermediate_size",
)
#: model type -> where the parts of its layers are
LAYER_PARTS: dict[str, Parts] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra", "ernie"), _BERT),
    "distilbert": Parts(
        attention="attention",
        heads="n_heads",
        width="dim",
        feed_forward="ffn",
        heads_setting="n_heads",
        neurons_setting="hidden_dim",
    ),
}

#: tensor of a linear, dense or low-rank plus sparse -> the dimension of its outputs and that of its inputs
_OUTPUTS = {"weight": 0, "bias": 0, "sparse": 0, "up": 1, "importance": 0, "sensitivity": 0, "uncertainty": 0}
_INPUTS = {"weight": 1, "sparse": 1, "down": 1, "sensitivity": 1, "uncertainty": 1}


class Layer:
    """One encoder layer whose parts can be removed.

    Args:
        name: qualified name.
        module: the layer.
        model_type: a key of ``LAYER_PARTS``.
    """

    def __init__(self, name: str, module: nn.Module, model_type: str) -> None:
        self.name, self.module = name, module
        self.parts, self.roles = LAYER_PARTS[model_type], LAYER_LINEARS[model_type]

    def linear(self, role: str) -> nn.Module | None:
        """The linear of ``role`` ("query", ..., "down"), None where its block is gone."""
        found: nn.Module | None = self.module
        for part in self.roles[role].split("."):
            found = found._modules.get(part) if found is not None else None
        return None if isinstance(found, NoBlock) else found

    @property
    def attention(self) -> nn.Module:
        """The module that splits into heads."""
        return self.module.get_submodule(self.parts.attention)

    @property
    def head_size(self) -> int:
        """Outputs of one head of a layer with attention."""
        return self.attention.attention_head_size

    @property
    def sizes(self) -> Sizes:
        """Heads and neurons that the layer has now."""
        query, up = self.linear("query"), self.linear("up")
        return Sizes(0 if query is None else query.out_features // self.head_size, 0 if up is None else up.out_features)

    def keep_heads(self, heads: torch.Tensor) -> None:
        """Remove all heads but those at the sorted positions ``heads`` int64 [n]; with none, the whole block."""
        if self.linear("query") is None or len(heads) == self.sizes.heads:
            return
        if not len(heads):
            # The larger module may hold the smaller one, as in DistilBERT.
            self._replace(self.roles["attention_output"], NoBlock())
            self._replace(self.parts.attention, NoAttention())
            return
        outputs = (heads[:, None] * self.head_size + torch.arange(self.head_size)).flatten()
        for role in ("query", "key", "value"):
            keep_outputs(self.linear(role), outputs)
        keep_inputs(self.linear("attention_output"), outputs)
        setattr(self.attention, self.parts.heads, len(heads))
        setattr(self.attention, self.parts.width, len(outputs))

    def keep_neurons(self, neurons: torch.Tensor) -> None:
        """Remove all feed-forward neurons but those at the sorted positions ``neurons`` int64 [n]; with none, the whole
        block."""
        if self.linear("up") is None or len(neurons) == self.sizes.neurons:
            return
        if not len(neurons):
            self._replace(self.roles["down"], NoBlock())
            self._replace(self.parts.feed_forward, NoBlock())
            return
        keep_outputs(self.linear("up"), neurons)
        keep_inputs(self.linear("down"), neurons)

    def shrink(self, sizes: Sizes) -> None:
        """Keep the first heads and neurons, as many as ``sizes`` says: the shapes that a checkpoint's tensors fill."""
        self.keep_heads(torch.arange(sizes.heads))
        self.keep_neurons(torch.arange(sizes.neurons))

    def _replace(self, path: str, module: nn.Module) -> None:
        module.train(self.module.training)
        self.module.set_submodule(path, module)


def keep_outputs(linear: nn.Module, outputs: torch.Tensor) -> None:
    """Drop all outputs of ``linear`` (dense, or in LoSparse's training form) but those at ``outputs``, in place."""
    _select(linear, _OUTPUTS, outputs)
    linear.out_features = len(outputs)


def keep_inputs(linear: nn.Module, inputs: torch.Tensor) -> None:
    """Drop all inputs of ``linear`` but those at ``inputs``, in place."""
    _select(linear, _INPUTS, inputs)
    linear.in_features = len(inputs)


def _select(linear: nn.Module, dimensions: Mapping[str, int], index: torch.Tensor) -> None:
    for name, dimension in dimensions.items():
        tensor = getattr(linear, name, None)
        if tensor is None:
            continue
        chosen = tensor.detach().index_select(dimension, index.to(tensor.device))
        if isinstance(tensor, nn.Parameter):
            chosen = nn.Parameter(chosen, requires_grad=tensor.requires_grad)
        setattr(linear, name, chosen)


def check_removable(model_type: str, flag: str) -> None:
    """InputError unless parts of such a model's layers can be removed; ``flag`` is the option that asks for it."""
    if model_type not in LAYER_PARTS:
        raise InputError(
            f"{flag}: does not know the heads and blocks of model type {model_type!r}; pass one of "
            f"{', '.join(LAYER_PARTS)}"
        )


def removable_layers(model: nn.Module) -> list[Layer]:
    """The encoder layers of ``model`` in order; none for a model type whose parts are unknown."""
    model_type = getattr(model.config, "model_type", "")
    if model_type not in LAYER_PARTS:
        return []
    (stack,) = {target.stack for target in find_targets(model)}
    layers = model.get_submodule(stack).named_children()
    return [Layer(f"{stack}.{name}", module, model_type) for name, module in layers]


def dense_sizes(model: nn.Module) -> Sizes:
    """What the configuration of ``model`` gives every layer."""
    parts = LAYER_PARTS[model.config.model_type]
    return Sizes(getattr(model.config, parts.heads_setting), getattr(model.config, parts.neurons_setting))


def least_ratio(model: nn.Module) -> float:
    """The share of the encoder's weights that one feed-forward neuron of a dense ``model`` has."""
    down = removable_layers(model)[0].linear("down")
    neuron = down.out_features + removable_layers(model)[0].linear("up").in_features
    return neuron / sum(linear.weight.numel() for linear in encoder_linears(model).values())


def removed_sizes(model: nn.Module) -> dict[str, Sizes]:
    """Layer name -> what it has left, for the layers that have less than the configuration says."""
    layers = removable_layers(model)
    return {layer.name: layer.sizes for layer in layers if layer.sizes != dense_sizes(model)}


def shrink_to(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Give the layers of ``model`` the sizes that the tensors of ``state``, the state dict of a pruned one, have.

    A model that has these sizes already stays as it is.
    """

    def outputs(layer: Layer, role: str) -> int:
        linear = f"{layer.name}.{layer.roles[role]}"
        if f"{linear}.weight" in state:
            return state[f"{linear}.weight"].shape[0]
        return state[f"{linear}.up"].shape[1] if f"{linear}.up" in state else 0

    for layer in removable_layers(model):
        heads = outputs(layer, "query")
        layer.shrink(Sizes(heads and heads // layer.head_size, outputs(layer, "up")))
