"""Gates on the parts of a model's layers: put in, counted, and made final by removing what is closed.

A block's gates sit on its last linear: what comes in is multiplied by the gates of its heads or neurons, what goes out,
bias included, by the gate of the block. Hooks do this, so that the layers keep their classes and names, and any linear
can be gated, dense or low-rank plus sparse.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..models.blocks import Layer, removable_layers
from .hard_concrete import HardConcrete, without_noise

#: role of the linear that ends a block -> roles of all linears of the block
BLOCKS = {"attention_output": ("query", "key", "value", "attention_output"), "down": ("up", "down")}


class BlockGates(nn.Module):
    """The gates of one block, a child called ``gates`` of its last linear.

    Args:
        units: heads or neurons of the block.
        inputs: inputs of the last linear; each unit has as many of them.
        gated_units: whether the units have gates too, or the block alone.
    """

    def __init__(self, units: int, inputs: int, gated_units: bool, device: torch.device | None = None) -> None:
        super().__init__()
        self.count, self.width = units, inputs // units
        self.block = HardConcrete(1, device)
        self.units = HardConcrete(units, device) if gated_units else None

    def scale(self) -> torch.Tensor:
        """z of every input [inputs]."""
        return self.units().repeat_interleave(self.width)

    def expected_units(self) -> torch.Tensor:
        """Expected number of units whose weights stay: 0-d, differentiable."""
        units = self.count if self.units is None else self.units.open_probability().sum()
        return self.block.open_probability()[0] * units


def _gate_inputs(linear: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    (x,) = arguments
    return (x * linear.gates.scale().to(x.dtype),)


def _gate_output(linear: nn.Module, _: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    return y * linear.gates.block().to(y.dtype)


def add_gates(model: nn.Module, neurons: bool) -> None:
    """Gate every attention block, head and feed-forward block of ``model``, and with ``neurons`` every neuron."""
    for layer in removable_layers(model):
        for role, units in (("attention_output", layer.sizes.heads), ("down", layer.sizes.neurons)):
            linear = layer.linear(role)
            if linear is None:
                continue
            gated_units = neurons or role == "attention_output"
            gates = BlockGates(units, linear.in_features, gated_units, linear.bias.device)
            gates.handles = [linear.register_forward_hook(_gate_output)]
            if gated_units:
                gates.handles.append(linear.register_forward_pre_hook(_gate_inputs))
            linear.gates = gates.train(linear.training)


def block_gates(model: nn.Module) -> Iterator[tuple[Layer, str, BlockGates]]:
    """(layer, role of the gated linear, gates) of every gated block, in order."""
    for layer in removable_layers(model):
        for role in BLOCKS:
            gates = getattr(layer.linear(role), "gates", None)
            if gates is not None:
                yield layer, role, gates


def all_gates(model: nn.Module) -> list[HardConcrete]:
    """Every group of gates of ``model``, in order."""
    return [module for module in model.modules() if isinstance(module, HardConcrete)]


def unit_params(layer: Layer, role: str) -> int:
    """Weights that one head or neuron has in the block whose last linear has ``role``, were it dense."""
    *first, last = (layer.linear(name) for name in BLOCKS[role])
    width = last.in_features // last.gates.count
    return width * (sum(linear.in_features for linear in first) + last.out_features)


def gated_params(model: nn.Module) -> int:
    """Encoder weights behind gates, were the layers dense."""
    return sum(gates.count * unit_params(layer, role) for layer, role, gates in block_gates(model))


@torch.no_grad()
def fix_gates(gates: BlockGates, kept: torch.Tensor) -> None:
    """Fix the gates of a block: at 0 for the units outside the mask ``kept`` [units], and for the block if it is empty,
    else without noise."""
    kept = kept.to(gates.block.log_alpha.device)
    gates.kept = kept
    gates.block.fix(without_noise(gates.block.log_alpha) * kept.any())
    if gates.units is not None:
        gates.units.fix(without_noise(gates.units.log_alpha) * kept)


@torch.no_grad()
def remove_closed(model: nn.Module) -> None:
    """Remove the units that :func:`fix_gates` closed, multiply the last linears by the other gates, and drop the gates.

    The model computes what it did with these gates. A unit that was kept although its gate is 0 stays, with weights of
    zero, and can learn.
    """
    for layer, role, gates in list(block_gates(model)):
        linear = layer.linear(role)
        for handle in gates.handles:
            handle.remove()
        del linear.gates
        scale_outputs(linear, gates.block())
        if gates.units is not None:
            scale_inputs(linear, gates.scale())
        kept = gates.kept.nonzero().squeeze(1).cpu()
        (layer.keep_heads if role == "attention_output" else layer.keep_neurons)(kept)


def scale_outputs(linear: nn.Module, factor: torch.Tensor) -> None:
    """Multiply what ``linear``, dense or low-rank plus sparse, computes by ``factor`` [1], in place."""
    for name in ("weight", "bias", "sparse", "up"):
        tensor = getattr(linear, name, None)
        if tensor is not None:
            tensor.mul_(factor.to(tensor.dtype))


def scale_inputs(linear: nn.Module, factor: torch.Tensor) -> None:
    """Multiply the inputs of ``linear``, dense or low-rank plus sparse, by ``factor`` [in], in place."""
    for name in ("weight", "sparse", "down"):
        tensor = getattr(linear, name, None)
        if tensor is not None:
            tensor.mul_(factor.to(tensor.dtype))
