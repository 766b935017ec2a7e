"""LowRankAttention, and its packed storage."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_model
from torch import nn

from lpaf_kernels import LowRankAttention, LowRankSparseLinear
from lpaf_kernels.nn.lowrank_attention import PackedProjections

HEADS = 2


def layer(inputs: int, outputs: int, rank: int = 3, kept: int = 2, bias: bool = True) -> LowRankSparseLinear:
    made = LowRankSparseLinear(inputs, outputs, rank, kept, bias)
    nn.init.normal_(made.down, std=0.5)
    return made


def make(kv_heads: int = HEADS, bias: tuple[bool, ...] = (True, True, True), **options) -> LowRankAttention:
    """Layers of different ranks, with and without kept columns."""
    q = layer(12, 16, 3, 2, bias[0])
    k = layer(12, 8 * kv_heads, 4, 0, bias[1])
    v = layer(12, 8 * kv_heads, 5, 1, bias[2])
    return LowRankAttention(q, k, v, layer(16, 12), HEADS, num_kv_heads=kv_heads, **options).eval()


def by_hand(attention: LowRankAttention, x, attn_mask=None, residual=None) -> torch.Tensor:
    """The block of its own modules, one by one."""
    inner = attention.norm(x) if attention.norm_first else x
    q, k, v = (
        linear(inner).unflatten(-1, (-1, 8)).transpose(1, 2) for linear in (attention.q, attention.k, attention.v)
    )
    context = F.scaled_dot_product_attention(
        q, k, v, attn_mask, is_causal=attention.is_causal, scale=attention.scale, enable_gqa=True
    )
    y = attention.o(context.transpose(1, 2).flatten(-2))
    if residual is not None:
        y = y + residual
    return y if attention.norm is None or attention.norm_first else attention.norm(y)


def packed(attention: LowRankAttention) -> bool:
    """Whether inference reads the parameters' memory, without a copy."""
    layers = (attention.q, attention.k, attention.v)
    with torch.no_grad():
        matrix, bias = attention._packed.down(*layers), attention._packed.bias(*layers)
    assert torch.equal(matrix, torch.cat([layer.down for layer in layers]))
    if all(layer.bias is not None for layer in layers):
        assert torch.equal(bias, torch.cat([layer.bias for layer in layers]))
    return matrix.data_ptr() == attention.q.down.data_ptr()


CASES = [
    {},
    {"kv_heads": 1, "is_causal": True},
    {"bias": (True, False, True), "scale": 0.3},
    {"bias": (False, False, False), "norm": "rms", "norm_first": True},
    {"norm": "layer"},
]


def make_case(case: dict) -> LowRankAttention:
    norms = {"layer": lambda: nn.LayerNorm(12), "rms": lambda: nn.RMSNorm(12, eps=1e-6), None: lambda: None}
    return make(**(case | {"norm": norms[case.get("norm")]()}))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_layers_one_by_one(case, dtype, assert_accurate):
    attention = make_case(case).to(dtype)
    wide = copy.deepcopy(attention).double()
    x, residual = torch.randn(8, 17, 12, dtype=dtype), torch.randn(8, 17, 12, dtype=dtype)
    lengths = torch.tensor([17, 3, 5, 9, 17, 17, 16, 2])
    mask = None if attention.is_causal else (torch.arange(17) < lengths[:, None])[:, None, None]
    assert packed(attention)
    with torch.no_grad():
        exact = by_hand(wide, x.double(), mask, residual.double())
        assert_accurate(attention(x, mask, residual), by_hand(attention, x, mask, residual), exact)


@pytest.mark.parametrize("case", CASES)
def test_gradients_reach_the_layers(case):
    attention = make_case(case).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *attention.parameters()]
    expected = torch.autograd.grad(by_hand(attention, x, None, x).square().sum(), leaves)
    found = torch.autograd.grad(attention(x, residual=x).square().sum(), leaves)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_only_inference_reads_the_memory_in_place():
    attention = make()
    layers = (attention.q, attention.k, attention.v)
    assert packed(attention)
    copied = attention._packed.down(*layers)
    assert copied.requires_grad
    assert copied.data_ptr() != attention.q.down.data_ptr()
    attention.requires_grad_(False)
    assert attention._packed.down(*layers).data_ptr() == attention.q.down.data_ptr()


def test_updates_in_place_are_seen():
    attention = make()
    x = torch.randn(2, 5, 12)
    torch.optim.SGD(attention.parameters(), lr=0.1)
    attention(x).square().sum().backward()
    torch.optim.SGD(attention.parameters(), lr=0.1).step()
    assert packed(attention)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), by_hand(attention, x))


def changed(attention: LowRankAttention, change: str, tmp_path) -> LowRankAttention:
    """The module after something that moves, copies or replaces its tensors; loaded values are other ones."""
    other = make()
    if change == "to":
        return attention.double().float()
    if change == "deepcopy":
        return copy.deepcopy(attention)
    if change == "pickle":
        return pickle.loads(pickle.dumps(attention))
    if change == "load":
        attention.load_state_dict(other.state_dict())
    elif change == "assign":
        attention.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    elif change == "safetensors":
        save_model(other, str(tmp_path / "model.safetensors"))
        attention.load_state_dict(load_file(tmp_path / "model.safetensors"))
    elif change == "to_empty":
        attention.to_empty(device="cpu").load_state_dict(other.state_dict())
    elif change == "data":
        attention.k.down.data = torch.randn_like(attention.k.down)
    elif change == "layer":
        attention.v = layer(12, 16, 5, 1)
    elif change == "share_memory":
        attention.share_memory()
    return attention


STAYS = ("to", "deepcopy", "pickle", "load", "safetensors", "to_empty")


@pytest.mark.parametrize("change", [*STAYS, "assign", "data", "layer", "share_memory"])
def test_right_after(change, tmp_path):
    attention = changed(make(), change, tmp_path)
    assert packed(attention) == (change in STAYS)
    x = torch.randn(2, 5, 12)
    with torch.no_grad():
        torch.testing.assert_close(attention(x), by_hand(attention, x))


def test_a_deepcopy_shares_nothing():
    attention = make()
    other = copy.deepcopy(attention)
    before = attention.k.down.clone()
    with torch.no_grad():
        other.k.down.zero_()
        other.q.down.zero_()
    assert torch.equal(attention.k.down, before)
    assert attention.q.down.any()


def test_packing_leaves_parameters_and_their_storages_alone():
    layers = [layer(12, 16, rank) for rank in (2, 3, 4)]
    for linear in layers:
        linear(torch.randn(4, 12)).sum().backward()
    before = [(parameter, parameter.detach().clone()) for linear in layers for parameter in linear.parameters()]
    together = PackedProjections()

    def check(packed: bool) -> None:
        parameters = [parameter for linear in layers for parameter in linear.parameters()]
        for parameter, (same, value) in zip(parameters, before, strict=True):
            assert parameter is same
            assert parameter.grad is not None
            assert torch.equal(parameter, value)
            assert parameter.storage_offset() == 0
            assert parameter.untyped_storage().nbytes() == parameter.nbytes
        ends = [linear.down.data_ptr() + linear.down.nbytes for linear in layers[:-1]]
        assert (ends == [linear.down.data_ptr() for linear in layers[1:]]) == packed

    check(False)
    together.pack(*layers)
    check(True)
    together.unpack(*layers)
    check(False)


def test_what_cannot_lie_together_stays_where_it_is():
    def check(*layers: LowRankSparseLinear) -> None:
        before = [linear.down.data_ptr() for linear in layers]
        PackedProjections().pack(*layers)
        assert [linear.down.data_ptr() for linear in layers] == before

    check(layer(12, 16), layer(12, 16).double(), layer(12, 16))
    one = layer(12, 16)
    check(one, one, layer(12, 16))
    check(*(LowRankSparseLinear(12, 16, 3, device="meta") for _ in range(3)))
    check(*(layer(12, 16).share_memory() for _ in range(3)))


def test_functional_call_and_vmap_see_their_own_tensors():
    attention = make()
    x = torch.randn(2, 5, 12)
    other = {name: torch.randn_like(parameter) for name, parameter in attention.named_parameters()}
    expected = make()
    expected.load_state_dict(other | dict(attention.named_buffers()))
    with torch.no_grad():
        found = torch.func.functional_call(attention, other, (x,))
        assert torch.equal(found, expected(x))


def test_dropout_is_for_training():
    x = torch.randn(2, 5, 12)
    for options in ({"dropout": 0.5}, {"attention_dropout": 0.5}):
        attention = make(**options)
        assert torch.equal(attention(x), attention(x))
        attention.train()
        assert not torch.equal(attention(x), attention(x))


def test_autocast_keeps_residual_and_norm_in_float32():
    attention = make(norm=nn.LayerNorm(12))
    x = torch.randn(2, 5, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert attention(x, residual=x).dtype == by_hand(attention, x, residual=x).dtype == torch.float32


def test_compiles_whole_with_any_length():
    attention = make(norm=nn.LayerNorm(12))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for length in (5, 9):
            x = torch.randn(2, length, 12)
            assert torch.equal(compiled(x, residual=x), attention(x, residual=x))


def test_bad_input():
    good = {"q": layer(12, 16), "k": layer(12, 16), "v": layer(12, 16), "o": layer(16, 12), "num_heads": 2}
    for changes, error, text in (
        ({"q": nn.Linear(12, 16)}, TypeError, "q: expected a LowRankSparseLinear, got Linear"),
        ({"k": layer(11, 16)}, ValueError, "k: expected 12 inputs, got 11"),
        ({"v": layer(12, 8)}, ValueError, "v: expected 16 outputs, got 8"),
        ({"o": layer(12, 12)}, ValueError, "o: expected 16 inputs, got 12"),
        ({"num_heads": 3}, ValueError, r"num_heads: expected a divisor of 16 \(the outputs of q\), got 3"),
        ({"num_heads": 2.0}, TypeError, "num_heads: expected an integer, got 2.0"),
        ({"num_heads": 4, "num_kv_heads": 3}, ValueError, "num_kv_heads: expected a divisor of 4"),
        ({"norm": nn.LayerNorm(16)}, ValueError, "norm: expected weights for 12 columns"),
    ):
        with pytest.raises(error, match=text):
            LowRankAttention(**(good | changes))
