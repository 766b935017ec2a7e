"""GPT-2's ``Conv1D``: a linear layer that stores its weight the other way round.

``transformers.pytorch_utils.Conv1D`` keeps the weight of nn.Linear transposed, [in, out]. Pruners, factorisers and
counts know nn.Linear, so that models are converted when they are loaded, and what is still dense is converted back when
they are saved: every directory loads through plain transformers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def features(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of an nn.Linear or a Conv1D."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def linear_from_conv1d(conv: Conv1D) -> nn.Linear:
    """The nn.Linear [out, in] of the same function; the bias is shared, the weight a transposed copy."""
    linear = nn.Linear(conv.nx, conv.nf, bias=conv.bias is not None, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().t().contiguous(), requires_grad=conv.weight.requires_grad)
    linear.bias = conv.bias
    return linear.train(conv.training)


def conv1d_from_linear(linear: nn.Linear) -> Conv1D:
    """The Conv1D of the same function; the bias is shared, the weight a transposed copy."""
    with torch.device("meta"):
        conv = Conv1D(linear.out_features, linear.in_features)
    conv.weight = nn.Parameter(linear.weight.detach().t().contiguous(), requires_grad=linear.weight.requires_grad)
    conv.bias = linear.bias
    return conv.train(linear.training)


def use_linears(model: nn.Module) -> nn.Module:
    """Replace every Conv1D of ``model`` by an nn.Linear, in place; returns ``model``."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, linear_from_conv1d(module))
    return model


def conv1d_names(model: nn.Module) -> set[str]:
    """Names of the modules that transformers makes as Conv1D in a model of this class and configuration."""
    if not hasattr(sys.modules[type(model).__module__], "Conv1D"):
        return set()
    with torch.device("meta"):
        fresh = type(model)(model.config)
    return {name for name, module in fresh.named_modules() if isinstance(module, Conv1D)}


@contextmanager
def as_published(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` with Conv1D where its class has them and they are still dense, as its checkpoint must have them."""
    linears = {
        name: module for name in sorted(conv1d_names(model)) if type(module := model.get_submodule(name)) is nn.Linear
    }
    for name, linear in linears.items():
        model.set_submodule(name, conv1d_from_linear(linear))
    try:
        yield model
    finally:
        for name, linear in linears.items():
            model.set_submodule(name, linear)
