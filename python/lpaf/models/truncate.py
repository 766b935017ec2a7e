"""Students with fewer layers: the first ones of their teacher (the BERT-Truncated and vanilla KD baselines of LPAF)."""

from __future__ import annotations

import copy

from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError
from .conv1d import use_linears
from .targets import find_targets

#: by how much of itself a share of layers may be missed upwards: 2 layers of 12 stand for 16 %
TOLERANCE = 0.05


def layer_stack(model: nn.Module) -> str:
    """Qualified name of the one list of encoder layers of ``model``.

    InputError when there are several (encoder and decoder), or when layers share their weights.
    """
    stacks = sorted({target.stack for target in find_targets(model)})
    if len(stacks) > 1:
        raise InputError(f"model: has several stacks of layers ({', '.join(stacks)}); only one can be cut short")
    (stack,) = stacks
    if len(model.get_submodule(stack)) != model.config.num_hidden_layers:
        raise InputError(f"model: its layers share their weights ({stack}); leaving some out makes it no smaller")
    return stack


def layers_for_ratio(model: nn.Module, ratio: float) -> int:
    """The most layers whose share of all layers is at most ``ratio``, or above it by 5 % of it.

    Raises:
        InputError: not even one layer fits.
    """
    layers = len(model.get_submodule(layer_stack(model)))
    kept = int(ratio * (1 + TOLERANCE) * layers)
    if kept < 1:
        raise InputError(f"--ratio {ratio:g}: one of {layers} layers is {1 / layers:.1%} of the encoder already")
    return min(kept, layers)


def truncate(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A copy of ``model`` with its first ``layers`` encoder layers; embeddings and head are copied, and what is
    frozen stays so."""
    full = model.config.num_hidden_layers
    layer_stack(model)
    config = copy.deepcopy(model.config)
    for name, value in vars(config).items():
        if isinstance(value, list) and len(value) == full and name.startswith("layer"):
            setattr(config, name, value[:layers])  # such as layer_types
    config.num_hidden_layers = layers
    student = use_linears(type(model)(config))
    missing, _ = student.load_state_dict(model.state_dict(), strict=False)
    if missing:
        raise ValueError(f"model: {type(model).__name__} has no {missing[0]}, which its shorter copy needs")
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(trained[name])
    return student.to(next(model.parameters()).device)
