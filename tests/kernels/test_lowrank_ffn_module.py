"""LowRankFFN."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lpaf_kernels import LowRankFFN, LowRankSparseLinear

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "none": lambda x: x,
}


def layer(inputs: int, outputs: int, rank: int = 3, kept: int = 2, bias: bool = True) -> LowRankSparseLinear:
    made = LowRankSparseLinear(inputs, outputs, rank, kept, bias)
    nn.init.normal_(made.down)
    return made


def make(norm: nn.Module | None = None, gated: bool = False, **options) -> LowRankFFN:
    gate = layer(12, 20, kept=0) if gated else None
    return LowRankFFN(layer(12, 20), layer(20, 12, 4, 0), gate=gate, norm=norm, **options)


def by_hand(ffn: LowRankFFN, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """The block of its own modules, one by one."""
    act = ACTIVATIONS[ffn.activation]
    inner = ffn.norm(x) if ffn.norm_first else x
    h = act(ffn.first(inner)) if ffn.gate is None else act(ffn.gate(inner)) * ffn.first(inner)
    y = ffn.second(h)
    if residual is not None:
        y = y + residual
    return y if ffn.norm is None or ffn.norm_first else ffn.norm(y)


CASES = [
    {},
    {"norm": "layer"},
    {"norm": "rms", "activation": "silu", "gated": True},
    {"norm": "rms", "norm_first": True, "activation": "gelu_tanh"},
]


def make_case(case: dict) -> LowRankFFN:
    norms = {"layer": lambda: nn.LayerNorm(12, eps=1e-6), "rms": lambda: nn.RMSNorm(12), None: lambda: None}
    return make(**(case | {"norm": norms[case.get("norm")]()}))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_layers_one_by_one(case, dtype, assert_accurate):
    ffn = make_case(case).to(dtype)
    wide = copy.deepcopy(ffn).double()
    x, residual = torch.randn(2, 5, 12, dtype=dtype), torch.randn(2, 5, 12, dtype=dtype)
    with torch.no_grad():
        exact = by_hand(wide, x.double(), residual.double())
        assert_accurate(ffn(x, residual), by_hand(ffn, x, residual), exact)


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_the_layers(case):
    ffn = make_case(case).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *ffn.parameters()]
    expected = torch.autograd.grad(by_hand(ffn, x, x).square().sum(), leaves)
    for actual, wanted in zip(torch.autograd.grad(ffn(x, x).square().sum(), leaves), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_parameters_are_the_layers_own():
    first, second, norm = layer(12, 20), layer(20, 12), nn.LayerNorm(12)
    ffn = LowRankFFN(first, second, norm=norm)
    assert {id(parameter) for parameter in ffn.parameters()} == {
        id(parameter) for module in (first, second, norm) for parameter in module.parameters()
    }


def test_dropout_is_for_training():
    ffn = make(dropout=0.5)
    x = torch.randn(50, 12)
    assert (ffn(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    ffn.eval()
    assert torch.equal(ffn(x), ffn(x))
    assert not (ffn(x) == 0).any()


def test_autocast_keeps_residual_and_norm_in_float32():
    ffn = make(norm=nn.LayerNorm(12)).eval()
    x = torch.randn(3, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = ffn(x, x)
        assert y.dtype == by_hand(ffn, x, x).dtype == torch.float32
        assert ffn(x).dtype == by_hand(ffn, x).dtype


def test_compiles_whole_with_any_number_of_rows():
    ffn = make(norm=nn.LayerNorm(12)).eval()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for rows in (3, 7):
            x = torch.randn(rows, 12)
            assert torch.equal(compiled(x, x), ffn(x, x))


def test_bad_input():
    good = {"first": layer(12, 20), "second": layer(20, 12)}
    for changes, error, text in (
        ({"first": nn.Linear(12, 20)}, TypeError, "first: expected a LowRankSparseLinear, got Linear"),
        ({"first": LowRankSparseLinear(12, 20, 3, activation="gelu")}, ValueError, "first: .*activation, got 'gelu'"),
        ({"second": layer(12, 12)}, ValueError, "second: expected 20 inputs, got 12"),
        ({"gate": layer(12, 20)}, ValueError, "gate: expected a layer without kept columns, got 2"),
        ({"gate": layer(12, 12, kept=0)}, ValueError, "gate: expected 20 outputs, got 12"),
        ({"activation": "elu"}, ValueError, "activation: .*got 'elu'"),
        ({"norm": nn.LayerNorm(20)}, ValueError, "norm: expected weights for 12 columns"),
        ({"norm": nn.LayerNorm(12, elementwise_affine=False)}, ValueError, "norm: expected weights"),
        ({"norm": nn.Identity()}, TypeError, "norm: expected an nn.LayerNorm or nn.RMSNorm, got Identity"),
    ):
        with pytest.raises(error, match=text):
            LowRankFFN(**(good | changes))
