"""fold_kept: the same function, the kept columns side by side."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpaf_kernels import LowRankSparseLinear, MaskedLinear, fold_kept, swap_linears


def layer(d_in: int, d_out: int, keep: float = 0.3, bias: bool = True) -> LowRankSparseLinear:
    return LowRankSparseLinear.from_linear(nn.Linear(d_in, d_out, bias=bias), 3, keep).double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dense", [True, False])
def test_feed_forward(bias, dense):
    first = layer(10, 24, bias=bias)
    second = nn.Linear(24, 10, bias=bias).double() if dense else layer(24, 10, bias=bias)
    x = torch.randn(7, 10, dtype=torch.float64)
    expected, before = second(F.gelu(first(x))), first(x)
    kept, parameters = first.kept.tolist(), list(map(id, (*first.parameters(), *second.parameters())))
    order = fold_kept(first, second)
    assert kept != list(range(7))
    assert first.kept.tolist() == list(range(7))
    assert order[:7].tolist() == kept
    assert sorted(order.tolist()) == list(range(24))
    # Outputs are moved, not computed anew; only the second layer's sums have another order.
    torch.testing.assert_close(first(x), before[:, order], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(second(F.gelu(first(x))), expected, rtol=1e-13, atol=1e-13)
    assert parameters == list(map(id, (*first.parameters(), *second.parameters())))


def test_gated_feed_forward():
    gate, first, second = layer(10, 24, 0.2), layer(10, 24), layer(24, 10, 0.5)
    dense_gate = nn.Linear(10, 24).double()
    x = torch.randn(7, 10, dtype=torch.float64)

    def run() -> torch.Tensor:
        return second(F.silu(gate(x)) * dense_gate(x) * first(x))

    expected = run()
    fold_kept(first, second, alongside=[gate, dense_gate])
    gate.check_kept()
    assert first.kept.tolist() == list(range(7))
    torch.testing.assert_close(run(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("heads", "repeats"), [(4, 1), (2, 1), (2, 3), (1, 3)])
def test_attention(heads, repeats):
    """Value and output layers; with repeats, grouped-query attention as transformers' repeat_kv lays it out."""
    size = 8
    value, output = layer(10, heads * size, 0.4), layer(heads * repeats * size, 10)
    weights = torch.randn(heads * repeats, 5, 5, dtype=torch.float64).softmax(-1)
    x = torch.randn(5, 10, dtype=torch.float64)

    def run() -> torch.Tensor:
        values = value(x).view(5, heads, size).transpose(0, 1).repeat_interleave(repeats, 0)
        return output((weights @ values).transpose(0, 1).reshape(5, -1))

    expected = run()
    counts = torch.bincount(value.kept // size, minlength=heads)
    fold_kept(value, output, heads=heads)
    assert value.kept.tolist() == [head * size + i for head in range(heads) for i in range(counts[head])]
    torch.testing.assert_close(run(), expected, rtol=1e-13, atol=1e-13)


def test_folding_again_changes_nothing():
    first, second = layer(10, 24), layer(24, 10)
    fold_kept(first, second)
    again = copy.deepcopy(first), copy.deepcopy(second)
    assert fold_kept(*again).tolist() == list(range(24))
    for name, tensor in first.state_dict().items():
        assert torch.equal(again[0].state_dict()[name], tensor)


def test_nothing_kept_moves_nothing():
    first, second = layer(10, 24, keep=0.0), nn.Linear(24, 10).double()
    weight = second.weight.clone()
    assert fold_kept(first, second).tolist() == list(range(24))
    assert torch.equal(second.weight, weight)


def test_swap_folds():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)).double()
    plain, folded = copy.deepcopy(model), copy.deepcopy(model)
    swap_linears(plain, rank=3, keep=0.25)
    assert swap_linears(folded, rank=3, keep=0.25, fold=[("0", "2")]) == ["0", "2"]
    assert plain[0].kept.tolist() != list(range(6))
    assert folded[0].kept.tolist() == list(range(6))
    x = torch.randn(5, 16, dtype=torch.float64)
    torch.testing.assert_close(folded(x), plain(x), rtol=1e-12, atol=1e-12)


def test_layers_that_keep_more_than_a_weight_are_refused():
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(24, 10))
    for second in (normed, MaskedLinear(24, 10)):
        with pytest.raises(TypeError, match="second: "):
            fold_kept(layer(10, 24), second)
    hooked = nn.utils.spectral_norm(nn.Linear(24, 10))
    with pytest.raises(TypeError, match="second: its weight is computed"):
        fold_kept(layer(10, 24), hooked)


def test_no_layer_moves_twice():
    first, gate, square = layer(10, 24), nn.Linear(10, 24), layer(24, 24)
    with pytest.raises(ValueError, match="got one twice"):
        fold_kept(first, nn.Linear(24, 10), alongside=[gate, gate])
    with pytest.raises(ValueError, match="got one twice"):
        fold_kept(square, square)
    model = nn.ModuleDict({"a": nn.Linear(24, 24), "b": nn.Linear(24, 24), "o": nn.Linear(24, 24)})
    for fold in ([("a", "o"), ("b", "o")], [("a", "b"), ("a", "o")]):
        with pytest.raises(ValueError, match="fold: expected every layer once as"):
            swap_linears(model, rank=3, keep=0.25, fold=fold)
    assert all(type(module) is nn.Linear for module in model.values())


@pytest.mark.parametrize(
    ("fold", "text"),
    [
        ([("0", "3")], "fold: expected names of layers .*got '3'"),
        ([("1", "2")], "fold: expected names of layers .*got '1'"),
        ([("0", "2", 5)], "heads: expected a divisor of 24"),
        ([("0",)], r"fold: expected \(first, second\) or \(first, second, heads\), got \('0',\)"),
    ],
)
def test_bad_swap_leaves_the_model(fold, text):
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    with pytest.raises(ValueError, match=text):
        swap_linears(model, rank=3, keep=0.25, fold=fold)
    assert [type(module) for module in model] == [nn.Linear, nn.GELU, nn.Linear]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((nn.Linear(3, 4), nn.Linear(4, 3)), TypeError, "first: expected a LowRankSparseLinear, got Linear"),
        ((layer(10, 24), nn.GELU()), TypeError, "second: expected .*got GELU"),
        ((layer(10, 24), layer(23, 10)), ValueError, "second: expected 24 inputs .*got 23"),
        ((layer(10, 24), layer(48, 10)), ValueError, "second: expected 24 inputs .*got 48"),
        ((layer(10, 24), layer(24, 10), 7), ValueError, "heads: expected a divisor of 24 .*got 7"),
        ((layer(10, 24), layer(24, 10), True), ValueError, "heads: .*got True"),
        ((layer(10, 24), layer(24, 10), 1, [layer(10, 20)]), ValueError, r"alongside\[0\]: expected 24 outputs"),
    ],
)
def test_bad_input(arguments, error, text):
    with pytest.raises(error, match=text):
        fold_kept(*arguments)
