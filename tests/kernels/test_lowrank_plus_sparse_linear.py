"""LowRankPlusSparseLinear: the same function and gradients whichever way it multiplies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from accuracy import check_accurate
from lpaf_kernels import LowRankPlusSparseLinear


def make(d_in: int, d_out: int, rank: int, bias: bool = True) -> LowRankPlusSparseLinear:
    layer = LowRankPlusSparseLinear(d_in, d_out, rank, bias=bias)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def reference(layer: LowRankPlusSparseLinear, x: torch.Tensor) -> torch.Tensor:
    """(x U) V + x S + bias, in this order."""
    return F.linear(x, layer.sparse, layer.bias) + (x @ layer.down.t()) @ layer.up


@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,), (64, 3)])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_matches_the_reference_with_gradients(lead, rank, bias):
    layer = make(11, 7, rank, bias)
    exact = make(11, 7, rank, bias).double()
    exact.load_state_dict(layer.state_dict())
    torch.manual_seed(1)
    x = torch.randn(*lead, 11, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    grad = torch.randn(*lead, 7)
    inputs = [x, *layer.parameters()]
    y, by_hand, truth = layer(x), reference(layer, x), reference(exact, wide)
    check_accurate(y, by_hand, truth)
    actual = torch.autograd.grad(y, inputs, grad)
    expected = torch.autograd.grad(by_hand, inputs, grad)
    exact_grads = torch.autograd.grad(truth, [wide, *exact.parameters()], grad.double())
    for found, plain, best in zip(actual, expected, exact_grads, strict=True):
        # Few sums, so an ulp of luck is allowed beside twice the error of the plain chain.
        bound = 2 * (plain - best).abs().max() if best.numel() else 0
        torch.testing.assert_close(found.double(), best, rtol=1e-5, atol=float(bound) + 1e-6)


def test_multiplies_once_where_rows_are_many(monkeypatch):
    layer, calls = make(12, 8, 3), []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *arguments: calls.append(arguments[1].shape) or linear(*arguments))
    layer(torch.randn(100, 12))
    assert calls == [(8, 12)]
    calls.clear()
    layer(torch.randn(2, 12))
    assert len(calls) == 3


def test_starts_as_the_linear_layer_and_ends_compact():
    linear = nn.Linear(12, 8)
    layer = LowRankPlusSparseLinear.from_linear(linear, 3)
    x = torch.randn(30, 12)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.bias is linear.bias
    torch.testing.assert_close(layer.down.norm(dim=1), layer.up.norm(dim=1))
    with torch.no_grad():
        layer.sparse[[0, 3, 4, 7]] = 0
    compact = layer.to_lowrank_sparse()
    assert compact.kept.tolist() == [1, 2, 5, 6]
    assert compact.rank == 3
    torch.testing.assert_close(compact(x), layer(x))


def test_no_sparse_rows_and_no_bias():
    layer = LowRankPlusSparseLinear.from_linear(nn.Linear(6, 5, bias=False), 2)
    with torch.no_grad():
        layer.sparse.zero_()
    compact = layer.to_lowrank_sparse()
    assert compact.kept.numel() == 0
    assert compact.bias is None


def test_autocast_and_compile():
    layer, x = make(32, 16, 4), torch.randn(500, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, chain = layer(x), reference(layer, x)
    assert y.dtype == torch.bfloat16
    check_accurate(y, chain, reference(layer.double(), x.double()))
    layer = make(32, 16, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for rows in (1, 50):
        torch.testing.assert_close(compiled(x[:rows]), layer(x[:rows]))


def test_bad_input():
    with pytest.raises(ValueError, match="rank: expected 0 to 5, got 6"):
        LowRankPlusSparseLinear(6, 5, 6)
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear, got ReLU"):
        LowRankPlusSparseLinear.from_linear(nn.ReLU(), 2)
    with pytest.raises(ValueError, match=r"factors\[0\]: expected shape \[5, 2\]"):
        LowRankPlusSparseLinear.from_linear(nn.Linear(6, 5), 2, (torch.ones(5, 3), torch.ones(2, 6)))
