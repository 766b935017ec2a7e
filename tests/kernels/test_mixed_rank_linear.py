"""MixedRankLinear, draw_paths and clear_paths."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lpaf_kernels import LowRankSparseLinear, MixedRankLinear, clear_paths, draw_paths


def make(activation: str | None = None, train_sparse: bool = False) -> MixedRankLinear:
    linear = nn.Linear(8, 6)
    lowrank = LowRankSparseLinear.from_linear(linear, 2)
    lowrank.activation = activation
    return MixedRankLinear(lowrank, linear.weight, train_sparse)


def by_hand(layer: MixedRankLinear, x: torch.Tensor, paths: tuple[bool, ...]) -> torch.Tensor:
    activation = layer.lowrank.activation
    run = {None: lambda t: t, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, "silu": F.silu}.get(
        activation, lambda t: F.gelu(t, approximate="tanh")
    )
    sparse = run(F.linear(x, layer.sparse_weight, layer.lowrank.bias))
    parts = zip(sparse.chunk(len(paths)), layer.lowrank(x).chunk(len(paths)), paths, strict=True)
    return torch.cat([s if path else low for s, low, path in parts])


@pytest.mark.parametrize("paths", [p for n in (1, 2, 3) for p in itertools.product((False, True), repeat=n)])
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
def test_each_pass_takes_its_path(paths, activation):
    layer = make(activation)
    x = torch.randn(6, 5, 8)
    layer.paths = paths
    torch.testing.assert_close(layer(x), by_hand(layer, x, paths))


@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh", "silu"])
def test_activation_of_the_sparse_path(activation):
    layer = make(activation)
    layer.paths = (True,)
    x = torch.randn(6, 8)
    torch.testing.assert_close(layer(x), by_hand(layer, x, (True,)))


@pytest.mark.parametrize("first", [False, True])
def test_input_shared_by_the_passes_takes_the_first_path(first):
    layer = make()
    x = torch.randn(1, 5, 8)
    layer.paths = (first, not first)
    torch.testing.assert_close(layer(x), by_hand(layer, x, (first,)))


def test_no_paths_is_low_rank_only():
    layer = make()
    x = torch.randn(5, 8)
    assert layer.paths is None
    assert torch.equal(layer(x), layer.lowrank(x))
    layer.paths = (False, False)
    assert torch.equal(layer(x), layer.lowrank(x))


@pytest.mark.parametrize("paths", [(True, False), (False, True)])
def test_an_input_shared_by_all_passes_takes_the_first_path(paths):
    layer = make()
    x = torch.randn(1, 5, 8)
    layer.paths = paths
    torch.testing.assert_close(layer(x), by_hand(layer, x, paths[:1]))


def test_equal_neighbours_share_a_call():
    layer = make()
    calls = []
    layer.lowrank.register_forward_hook(lambda *_: calls.append(1))
    layer.paths = (False, False, True, True)
    layer(torch.randn(8, 8))
    assert len(calls) == 1


def test_train_sparse():
    frozen, trained = make(), make(train_sparse=True)
    assert "sparse_weight" in dict(frozen.named_buffers())
    assert "sparse_weight" in dict(trained.named_parameters())
    for layer in (frozen, trained):
        layer.paths = (True, False)
        layer(torch.randn(4, 8)).sum().backward()
    assert frozen.sparse_weight.grad is None
    assert trained.sparse_weight.grad is not None


def test_draws_are_reproducible_and_independent():
    model = nn.ModuleList(make() for _ in range(50))
    draw_paths(model, 0.5, torch.Generator().manual_seed(3), passes=4)
    first = [layer.paths for layer in model]
    draw_paths(model, 0.5, torch.Generator().manual_seed(3), passes=4)
    assert [layer.paths for layer in model] == first
    assert all(len(paths) == 4 for paths in first)
    assert 60 < sum(map(sum, first)) < 140
    assert len({sum(paths) for paths in first}) > 2
    draw_paths(model, 0.0)
    assert {layer.paths for layer in model} == {(False, False)}
    draw_paths(model, 1.0)
    assert {layer.paths for layer in model} == {(True, True)}
    clear_paths(model)
    assert {layer.paths for layer in model} == {None}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_recomputes_the_same_path(use_reentrant):
    model = nn.Sequential(*(nn.Sequential(make(), nn.GELU(), nn.Linear(6, 8)) for _ in range(3)))
    draw_paths(model, 0.5, torch.Generator().manual_seed(0))
    assert len({block[0].paths for block in model}) > 1
    x = torch.randn(4, 8, requires_grad=True)
    leaves = [x, *model.parameters()]
    # A matrix that is sparse in both passes leaves its factors unused.
    expected = torch.autograd.grad(model(x).square().sum(), leaves, allow_unused=True)
    y = x
    for block in model:
        y = checkpoint(block, y, use_reentrant=use_reentrant)
    model.zero_grad()
    y.square().sum().backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        assert leaf.grad is gradient if gradient is None else torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("paths", [None, (True, False)])
def test_compiles_whole(paths):
    layer = make()
    layer.paths = paths
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8)
    assert torch.equal(compiled(x), layer(x))


def test_round_trip():
    layer = make()
    other = make()
    other.load_state_dict(layer.state_dict())
    layer.paths = other.paths = (True, False)
    x = torch.randn(4, 8)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.to_lowrank() is layer.lowrank
    assert (layer.in_features, layer.out_features) == (8, 6)
    assert "train_sparse=False" in repr(layer)


def test_bad_input():
    layer = make()
    with pytest.raises(TypeError, match="lowrank: expected a LowRankSparseLinear, got Linear"):
        MixedRankLinear(nn.Linear(8, 6), torch.ones(6, 8))
    with pytest.raises(ValueError, match=r"sparse_weight: expected shape \[6, 8\]"):
        MixedRankLinear(layer.lowrank, torch.ones(8, 6))
    layer.paths = (True, False)
    with pytest.raises(ValueError, match=r"x: expected dimension 0 to be 2 equal passes.*\[3, 8\]"):
        layer(torch.ones(3, 8))
    for arguments, error, text in (
        ({"p": 1.5}, ValueError, "p: .*got 1.5"),
        ({"p": "x"}, TypeError, "p: .*got 'x'"),
        ({"p": 0.5, "passes": 0}, ValueError, "passes: expected at least 1, got 0"),
        ({"p": 0.5, "passes": 1.0}, TypeError, "passes: expected an integer, got 1.0"),
    ):
        with pytest.raises(error, match=text):
            draw_paths(layer, **arguments)
