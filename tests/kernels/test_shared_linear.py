"""Linears that share what another stores: one decoder, one state_dict entry, gradients from all."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lpaf_kernels import DecodedLinear, LowRankSparseLinear, SharedDecodedLinear, SharedLowRankLinear


def lowrank_pair() -> tuple[LowRankSparseLinear, SharedLowRankLinear]:
    owner = LowRankSparseLinear.from_factors(torch.randn(8, 3), torch.randn(3, 5), torch.randn(8))
    return owner, SharedLowRankLinear.of(owner, torch.randn(7, 3), torch.randn(7))


def decoded_pair() -> tuple[DecodedLinear, SharedDecodedLinear]:
    owner = DecodedLinear(5, 8, 3, hidden=(6,), norms=True)
    return owner, SharedDecodedLinear.of(owner, torch.randn(7, 3), torch.rand(7) + 0.5, torch.randn(7))


PAIRS = pytest.mark.parametrize("pair", [lowrank_pair, decoded_pair])


def model_of(pair) -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict(zip(("owner", "shared"), pair(), strict=True))


@PAIRS
def test_forward_is_that_of_the_dense_weight(pair):
    model, x = model_of(pair), torch.randn(4, 5)
    for layer in model.values():
        expected = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
        assert (layer.in_features, layer.out_features) == tuple(reversed(layer.weight.shape))


@PAIRS
def test_what_is_shared_is_stored_once(pair):
    model = model_of(pair)
    names = [name.removeprefix("shared.") for name in model.state_dict() if name.startswith("shared.")]
    assert not any(name.startswith(("down", "decoder")) for name in names)
    again = model_of(pair)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(1.0)
    again.load_state_dict(model.state_dict())
    x = torch.randn(4, 5)
    assert torch.equal(again["shared"](x), model["shared"](x))


@PAIRS
def test_gradients_of_both_add_up_in_the_owner(pair):
    model, x = model_of(pair), torch.randn(4, 5)
    common = [name for name, _ in model.named_parameters() if name.startswith(("owner.down", "owner.decoder"))]
    assert common
    alone = {}
    for layer in ("owner", "shared"):
        model.zero_grad()
        model[layer](x).square().sum().backward()
        alone[layer] = {name: model.get_parameter(name).grad.clone() for name in common}
    model.zero_grad()
    sum(layer(x).square().sum() for layer in model.values()).backward()
    for name in common:
        both = alone["owner"][name] + alone["shared"][name]
        torch.testing.assert_close(model.get_parameter(name).grad, both, rtol=1e-4, atol=1e-4)


@PAIRS
def test_a_copy_keeps_them_together(pair):
    model = model_of(pair)
    twin = copy.deepcopy(model)
    assert twin["shared"].owner is twin["owner"]
    with torch.no_grad():
        for parameter in twin["owner"].parameters():
            parameter.zero_()
    assert not torch.equal(twin["shared"].weight, model["shared"].weight)


@PAIRS
def test_it_follows_its_owner_to_another_dtype(pair):
    model, x = model_of(pair), torch.randn(4, 5)
    before = model["shared"](x)
    model.double()
    torch.testing.assert_close(model["shared"](x.double()).float(), before, rtol=1e-4, atol=1e-4)


def test_owners_are_checked():
    owner, shared = lowrank_pair()
    with pytest.raises(TypeError, match="owner: expected a LowRankSparseLinear that is not shared"):
        SharedLowRankLinear(shared, 4)
    kept = LowRankSparseLinear(5, 8, 2, kept=1)
    with pytest.raises(ValueError, match="owner: expected a layer without kept rows, got 1"):
        SharedLowRankLinear(kept, 4)
    with pytest.raises(ValueError, match="a: expected shape"):
        SharedLowRankLinear.of(owner, torch.randn(4, 2))
    decoded, sharing = decoded_pair()
    with pytest.raises(TypeError, match="owner: expected a DecodedLinear that is not shared"):
        SharedDecodedLinear(sharing, 4)
    with pytest.raises(ValueError, match="decoder"):
        SharedDecodedLinear.of(decoded, torch.randn(4, 2))


def test_empty_ones_are_drawn():
    torch.manual_seed(0)
    for layer in (SharedLowRankLinear(lowrank_pair()[0], 6), SharedDecodedLinear(decoded_pair()[0], 6, norms=True)):
        assert layer.weight.shape == (6, 5)
        assert layer.weight.isfinite().all()
        assert layer.weight.abs().sum() > 0
