"""lowrank_sparse_linear and LowRankSparseLinear."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import native
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lpaf_kernels import LowRankSparseLinear, lowrank_sparse_linear, packed_lowrank_sparse_linear
from lpaf_kernels.ops import lowrank_sparse_linear as op
from lpaf_kernels.ops.lowrank_sparse_linear import lowrank_sparse_linear_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ACTIVATIONS = [None, "gelu", "gelu_tanh", "relu", "silu", "tanh"]
CASES = [  # leading shape, in, out, rank, kept, bias
    ((5,), 7, 6, 3, 2, True),
    ((), 7, 6, 3, 2, True),
    ((2, 3), 7, 6, 3, 0, True),
    ((2, 3), 7, 6, 3, 0, False),
    ((4,), 7, 6, 0, 2, True),
    ((4,), 7, 6, 0, 2, False),
    ((4,), 7, 6, 0, 0, True),
    ((4,), 7, 6, 2, 6, True),
    ((0,), 7, 6, 3, 2, True),
    ((2, 0), 7, 6, 3, 0, False),
    ((1,), 1, 1, 1, 1, True),
    ((33,), 65, 130, 41, 13, True),
]


def act(name: str | None, y: torch.Tensor) -> torch.Tensor:
    table = {
        None: lambda t: t,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
        "relu": F.relu,
        "silu": F.silu,
        "tanh": torch.tanh,
    }
    return table[name](y)


def chain(x, down, up, kept, bias, activation):
    """What a user writes by hand."""
    rank = up.shape[0]
    y = F.linear(F.linear(x, down[:rank]), up.T, bias)
    if kept is not None:
        y = y.index_add(-1, kept, F.linear(x, down[rank:]))
    return act(activation, y)


def make(lead, d_in, d_out, rank, kept, bias, dtype=torch.float32):
    x = torch.randn(*lead, d_in).to(dtype).requires_grad_()
    down = (torch.randn(rank + kept, d_in) / d_in**0.5).to(dtype).requires_grad_()
    up = torch.randn(rank, d_out).to(dtype).requires_grad_()
    positions = torch.randperm(d_out)[:kept].sort().values.int() if kept else None
    b = torch.randn(d_out).to(dtype).requires_grad_() if bias else None
    return x, down, up, positions, b


def differentiate(function, inputs, kept, activation, grad, dtype) -> list[torch.Tensor]:
    """function's result and its gradients for (x, down, up, bias or None), in ``dtype``."""
    x, down, up, bias = (None if t is None else t.detach().to(dtype).requires_grad_() for t in inputs)
    y = function(x, down, up, kept, bias, activation)
    leaves = [t for t in (x, down, up, bias) if t is not None]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype, assert_accurate):
    for activation in ACTIVATIONS:
        draws = []
        # The largest error of a handful of entries is a matter of luck: several draws are measured together.
        for _ in range(4):
            x, down, up, kept, bias = make(*case, dtype=dtype)
            inputs = (x, down, up, bias)
            grad = torch.randn(*case[0], case[2]).to(dtype)
            actual = differentiate(packed_lowrank_sparse_linear, inputs, kept, activation, grad, dtype)
            by_hand = differentiate(chain, inputs, kept, activation, grad, dtype)
            exact = differentiate(chain, inputs, kept, activation, grad, torch.float64)
            draws.append((actual, by_hand, exact))
            with torch.no_grad():
                y = packed_lowrank_sparse_linear(x, down, up, kept, bias, activation)
            torch.testing.assert_close(y, actual[0])
        for results in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
            assert_accurate(*(torch.stack(same) for same in zip(*results, strict=True)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference(activation):
    x, down, up, kept, bias = make((2, 5), 7, 6, 3, 2, True, torch.float64)
    u, s = down[:3].T, down[3:].T
    expected = lowrank_sparse_linear_reference(x, u, up, s, kept, bias, activation)
    torch.testing.assert_close(lowrank_sparse_linear(x, u, up, s, kept, bias, activation), expected)
    without = lowrank_sparse_linear_reference(x, u, up, activation=activation)
    torch.testing.assert_close(lowrank_sparse_linear(x, u, up, activation=activation), without)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4], CASES[8]], ids=str)
def test_gradcheck(activation, case):
    x, down, up, kept, bias = make(*case, dtype=torch.float64)
    inputs = (x, down, up) if bias is None else (x, down, up, bias)
    assert torch.autograd.gradcheck(
        lambda x, down, up, bias=None: packed_lowrank_sparse_linear(x, down, up, kept, bias, activation),
        inputs,
    )


def test_gradients_reach_the_separate_factors():
    x, down, up, kept, bias = make((5,), 7, 6, 3, 2, True, torch.float64)
    leaves = [t.detach().clone().requires_grad_() for t in (down[:3].T, up, down[3:].T)]
    assert torch.autograd.gradcheck(
        lambda u, v, s: lowrank_sparse_linear(x.detach(), u, v, s, kept, bias.detach()), leaves
    )


@pytest.mark.parametrize("needed", range(4))
def test_partial_gradients(needed):
    x, down, up, kept, bias = make((5,), 7, 6, 3, 2, True)
    expected = torch.autograd.grad(
        packed_lowrank_sparse_linear(x, down, up, kept, bias, "gelu").sum(), [x, down, up, bias]
    )
    leaves = [t.detach().requires_grad_(i == needed) for i, t in enumerate((x, down, up, bias))]
    packed_lowrank_sparse_linear(*leaves[:3], kept, leaves[3], "gelu").sum().backward()
    for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is not None) == (i == needed)
        if i == needed:
            assert torch.equal(leaf.grad, gradient)


def test_non_contiguous_input():
    x, down, up, kept, bias = make((4, 3), 7, 6, 3, 2, True)
    expected = packed_lowrank_sparse_linear(x.transpose(0, 1).contiguous(), down, up, kept, bias)
    strided = x.detach().transpose(0, 1)
    for kept_as in (kept, kept.long()):
        assert torch.equal(packed_lowrank_sparse_linear(strided, down, up, kept_as, bias), expected)
        with torch.no_grad():
            assert torch.equal(packed_lowrank_sparse_linear(strided, down, up, kept_as, bias), expected)
    columns = torch.randn(7, 12).T
    torch.testing.assert_close(
        packed_lowrank_sparse_linear(columns, down, up, kept, bias),
        packed_lowrank_sparse_linear(columns.contiguous(), down, up, kept, bias),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_into_larger_tensors(dtype):
    """Tensors that begin in the middle of their storage, as chunks of a larger one do."""
    tensors = make((5,), 7, 6, 3, 2, True, dtype)
    kept = tensors[3]
    grad = torch.randn(5, 6).to(dtype)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        larger = torch.randn(tensor.numel() + 13).to(dtype)
        larger[13:] = tensor.detach().flatten()
        return larger[13:].view(tensor.shape).requires_grad_()

    def run(x, down, up, bias, grad) -> list[torch.Tensor]:
        with torch.no_grad():
            y = packed_lowrank_sparse_linear(x, down, up, kept, bias)
        recorded = packed_lowrank_sparse_linear(x, down, up, kept, bias, "gelu")
        return [y, recorded, *torch.autograd.grad(recorded, [x, down, up, bias], grad)]

    whole = [tensors[i] for i in (0, 1, 2, 4)]
    views = [shifted(tensor) for tensor in whole]
    for actual, expected in zip(run(*views, shifted(grad).detach()), run(*whole, grad), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(7, 6, 3, 2), (7, 20, 5, 9)])  # z is saved, z is computed again
def test_backward_under_another_autocast(shape):
    d_in, d_out, rank, kept_columns = shape
    x, down, up, kept, bias = make((5,), d_in, d_out, rank, kept_columns, True)
    leaves = [x, down, up, bias]

    def gradients(autocast: bool) -> tuple[torch.Tensor, ...]:
        y = packed_lowrank_sparse_linear(x, down, up, kept, bias, "gelu").sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return torch.autograd.grad(y, leaves)

    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinite_gradients_stay_infinite(value):
    x, down, up, kept, bias = make((70,), 7, 40, 3, 2, True)
    grad = torch.ones(70, 40)
    grad[33, 5], grad[12, 39] = value, value
    (d_bias,) = torch.autograd.grad(packed_lowrank_sparse_linear(x, down, up, kept, bias), bias, grad)
    assert torch.equal(d_bias, grad.sum(0))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traces_and_saves():
    layer = LowRankSparseLinear.from_linear(nn.Linear(7, 6), 3, 0.3)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, torch.randn(4, 7), check_trace=False), buffer)
    buffer.seek(0)
    x = torch.randn(4, 7)
    assert torch.equal(torch.jit.load(buffer)(x), layer(x))


def test_inputs_are_not_written():
    x, down, up, kept, bias = make((4,), 7, 6, 3, 2, True)
    before = [t.detach().clone() for t in (x, down, up, kept, bias)]
    packed_lowrank_sparse_linear(x, down, up, kept, bias, "relu").sum().backward()
    with torch.no_grad():
        packed_lowrank_sparse_linear(x, down, up, kept, bias, "relu")
    for tensor, old in zip((x, down, up, kept, bias), before, strict=True):
        assert torch.equal(tensor, old)


def test_backward_needs_training():
    x, down, up, _, bias = make((4,), 7, 6, 3, 0, True)
    y = torch.ops.lpaf_kernels.lowrank_sparse_linear(x, down, up, None, bias, "none", False)[0]
    with pytest.raises(RuntimeError, match="training=True"):
        y.sum().backward()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_autocast(grad, compiled):
    layer = LowRankSparseLinear.from_linear(nn.Linear(7, 6), 3, 0.3)
    x = torch.randn(5, 7)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(x)
    assert y.dtype == torch.bfloat16
    half = copy.deepcopy(layer).bfloat16()
    assert torch.equal(y, half(x.bfloat16()))
    if grad:
        y.sum().backward()
        assert layer.down.grad.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_gradient_checkpointing(reentrant, autocast):
    layers = [LowRankSparseLinear.from_linear(nn.Linear(7, 7), 3, 0.3) for _ in range(2)]
    layers[0].activation = "gelu"
    x = torch.randn(5, 7, requires_grad=True)

    def gradients(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        leaves = [x, *layers[0].parameters(), *layers[1].parameters()]
        for leaf in leaves:
            leaf.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = run(x)
        y.float().square().sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(lambda x: layers[1](layers[0](x)))
    actual = gradients(lambda x: checkpoint(lambda x: layers[1](layers[0](x)), x, use_reentrant=reentrant))
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


def test_tracers_see_the_operator():
    """Where something watches or transforms the operators, the call goes through the dispatcher."""
    x, down, up, kept, bias = make((5,), 7, 6, 3, 2, True)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            seen.append(function)
            return function(*arguments, **(keywords or {}))

    with Watch():
        packed_lowrank_sparse_linear(x, down, up, kept, bias, "gelu").sum().backward()
    operators = torch.ops.lpaf_kernels
    assert operators.lowrank_sparse_linear.default in seen
    assert operators.lowrank_sparse_linear_backward.default in seen
    graph = make_fx(lambda x: packed_lowrank_sparse_linear(x, down, up, kept, bias))(x).graph
    assert operators.lowrank_sparse_linear.default in {node.target for node in graph.nodes}


def test_second_derivatives_are_refused():
    x, down, up, kept, bias = make((5,), 7, 6, 3, 2, True)
    (gradient,) = torch.autograd.grad(
        packed_lowrank_sparse_linear(x, down, up, kept, bias).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("activation", ["none", "gelu", "tanh"])
@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[4]], ids=str)
def test_opcheck(activation, case):
    x, down, up, kept, bias = make(*case)
    op = torch.ops.lpaf_kernels.lowrank_sparse_linear
    torch.library.opcheck(op, (x, down, up, kept, bias, activation, True))
    plain = [None if t is None else t.detach() for t in (x, down, up, kept, bias)]
    torch.library.opcheck(op, (*plain, activation, False))
    y, z, pre = op(*plain, activation, True)
    saved = y if activation == "tanh" else pre
    for needs in ([True] * 4, [False, True, False, False]):
        torch.library.opcheck(
            torch.ops.lpaf_kernels.lowrank_sparse_linear_backward,
            (torch.randn_like(y), *plain[:4], z, saved, activation, needs),
        )


@pytest.mark.parametrize("keep", [0.0, 0.3])
@pytest.mark.parametrize("grad", [True, False])
def test_compiles_whole_without_recompilation(keep, grad):
    layer = LowRankSparseLinear.from_linear(nn.Linear(7, 6), 3, keep)
    layer.activation = "gelu"
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(grad):
        for rows in (4, 9, 33):
            x = torch.randn(rows, 5, 7)
            torch._dynamo.mark_dynamic(x, 0)
            y = compiled(x)
            assert torch.equal(y, layer(x))
            if grad:
                y.sum().backward()
    assert counter.frame_count == 1


def test_compiles_with_inductor():
    layer = LowRankSparseLinear.from_linear(nn.Linear(7, 6), 3, 0.3)
    x = torch.randn(4, 7, requires_grad=True)
    y = torch.compile(layer, fullgraph=True)(x)
    assert torch.equal(y, layer(x))
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_exports(keep):
    layer = LowRankSparseLinear.from_linear(nn.Linear(7, 6), 3, keep)
    program = torch.export.export(layer, (torch.randn(4, 7),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    x = torch.randn(9, 7)
    assert torch.equal(program.module()(x), layer(x))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    assert torch.equal(torch.export.load(buffer).module()(x), layer(x))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": 1.0}, TypeError, "x: expected a torch.Tensor, got float"),
        ({"x": torch.ones(5, 7).long()}, TypeError, "x: expected float32.*got torch.int64"),
        ({"x": torch.ones(5, 8)}, ValueError, r"x: expected last dimension 7 .*\[5, 8\]"),
        ({"x": torch.ones(5, 7).half()}, TypeError, "down, up, bias: expected dtype torch.float16"),
        ({"down": torch.ones(7)}, ValueError, r"down: expected shape \[r \+ kept, in\], got \[7\]"),
        ({"down": torch.ones(4, 7)}, ValueError, r"down: expected 3 \+ 2 rows .*got shape \[4, 7\]"),
        ({"up": torch.ones(3)}, ValueError, r"up: expected shape \[r, out\], got \[3\]"),
        ({"up": torch.ones(3, 6, device="meta")}, ValueError, "up: expected device cpu"),
        ({"kept": [0, 1]}, TypeError, "kept: expected a torch.Tensor, got list"),
        ({"kept": torch.ones(2)}, TypeError, "kept: expected int32 or int64, got torch.float32"),
        ({"kept": torch.ones(1, 2).int()}, ValueError, r"kept: expected shape \[kept\]"),
        ({"down": torch.ones(5, 7, device="meta")}, ValueError, "down: expected device cpu"),
        ({"kept": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, "kept: expected device cpu"),
        ({"bias": torch.ones(6, device="meta")}, ValueError, "bias: expected device cpu"),
        ({"bias": torch.ones(5)}, ValueError, r"bias: expected shape \[6\].*got \[5\]"),
        ({"bias": torch.ones(6).double()}, TypeError, "bias: expected dtype torch.float32"),
        ({"activation": "swish"}, ValueError, "activation: expected None or one of gelu.*got 'swish'"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(change, error, text, grad):
    arguments = {
        "x": torch.ones(5, 7),
        "down": torch.ones(5, 7),
        "up": torch.ones(3, 6),
        "kept": torch.tensor([1, 4], dtype=torch.int32),
    }
    with torch.set_grad_enabled(grad), pytest.raises(error, match=text):
        packed_lowrank_sparse_linear(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"u": torch.ones(7)}, r"u: expected shape \[in, r\]"),
        ({"v": torch.ones(4, 6)}, r"v: expected shape \[3, out\]"),
        ({"s": torch.ones(7, 2)}, "kept: expected together with s"),
        ({"s": torch.ones(7, 2), "kept": torch.tensor([1])}, r"s: expected shape \[7, 1\]"),
        ({"s": torch.ones(7, 2), "kept": torch.ones(1, 2).int()}, r"kept: expected shape \[kept\]"),
    ],
)
def test_bad_factors(change, text):
    with pytest.raises(ValueError, match=text):
        lowrank_sparse_linear(**{"x": torch.ones(5, 7), "u": torch.ones(7, 3), "v": torch.ones(3, 6), **change})


@pytest.mark.skipif(not op._HAS_NATIVE, reason="_ops_cpu.so was not built")
@pytest.mark.parametrize("seeds", [range(start, start + 25) for start in range(0, 200, 25)], ids=str)
def test_native_path(seeds, instruction_set):
    for seed in seeds:
        instruction_set(native.check_linear, seed)


class TestModule:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(12, 9), (9, 12)])
    def test_from_linear_at_full_rank(self, bias, shape):
        linear = nn.Linear(*shape, bias=bias)
        layer = LowRankSparseLinear.from_linear(linear, 9)
        x = torch.randn(4, shape[0])
        torch.testing.assert_close(layer(x), linear(x))
        dense = layer.to_dense()
        torch.testing.assert_close(dense.weight, linear.weight)
        torch.testing.assert_close(dense(x), layer(x))
        assert (dense.bias is None) == (not bias)

    def test_from_linear_keeps_the_worst_rows(self):
        linear = nn.Linear(12, 10)
        rank_2 = LowRankSparseLinear.from_linear(linear, 2)
        residual = (linear.weight - rank_2.to_dense().weight).norm(dim=1)
        layer = LowRankSparseLinear.from_linear(linear, 2, keep=0.3)
        assert layer.kept.tolist() == residual.topk(3).indices.sort().values.tolist()
        assert layer.kept.dtype == torch.int32
        torch.testing.assert_close(layer.to_dense().weight[layer.kept], linear.weight[layer.kept])
        torch.testing.assert_close(layer.weight, layer.to_dense().weight)
        assert layer.u.shape == (12, 2)
        assert layer.v.shape == (2, 10)
        assert layer.s.shape == (12, 3)

    def test_rank_zero_is_sparse_only(self):
        linear = nn.Linear(12, 10)
        layer = LowRankSparseLinear.from_linear(linear, 0, keep=1.0)
        x = torch.randn(3, 12)
        torch.testing.assert_close(layer(x), linear(x))

    def test_from_factors_copies(self):
        a, b, bias = torch.randn(6, 3), torch.randn(3, 7), torch.randn(6)
        layer = LowRankSparseLinear.from_factors(a, b, bias)
        x = torch.randn(4, 7)
        torch.testing.assert_close(layer(x), F.linear(x, a @ b, bias))
        for tensor in (a, b, bias):
            tensor.zero_()
        assert all((parameter != 0).any() for parameter in layer.parameters())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_from_linear_keeps_dtype_and_copies(self, dtype):
        linear = nn.Linear(12, 10, dtype=dtype)
        layer = LowRankSparseLinear.from_linear(linear, 10)
        assert {parameter.dtype for parameter in layer.parameters()} == {dtype}
        storages = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        assert linear.bias.untyped_storage().data_ptr() not in storages
        tolerance = 8 * torch.finfo(dtype).eps if dtype != torch.float64 else 1e-14
        torch.testing.assert_close(layer.weight, linear.weight.detach(), rtol=0, atol=tolerance)

    def test_round_trip(self):
        layer = LowRankSparseLinear.from_linear(nn.Linear(12, 10), 2, keep=0.3)
        other = LowRankSparseLinear(12, 10, 2, kept=3)
        assert list(layer.state_dict()) == ["down", "up", "bias", "kept"]
        other.load_state_dict(layer.state_dict())
        x = torch.randn(3, 12)
        assert torch.equal(other(x), layer(x))
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))

    def test_meta_then_load(self):
        layer = LowRankSparseLinear.from_linear(nn.Linear(12, 10), 2, keep=0.3)
        meta = LowRankSparseLinear(12, 10, 2, kept=3, device="meta")
        assert all(tensor.is_meta for tensor in (*meta.parameters(), *meta.buffers()))
        assert meta(torch.empty(4, 12, device="meta")).shape == (4, 10)
        meta.load_state_dict(layer.state_dict(), assign=True)
        meta.check_kept()
        x = torch.randn(3, 12)
        assert torch.equal(meta(x), layer(x))

    def test_bfloat16_keeps_the_indices(self):
        layer = LowRankSparseLinear.from_linear(nn.Linear(600, 600), 2, keep=1.0).bfloat16()
        assert layer.kept.dtype == torch.int32
        assert torch.equal(layer.kept, torch.arange(600, dtype=torch.int32))
        assert layer(torch.randn(3, 600).bfloat16()).dtype == torch.bfloat16

    def test_initial_variance_is_that_of_linear(self):
        layer, linear = LowRankSparseLinear(256, 256, 32, kept=3), nn.Linear(256, 256)
        assert 0.8 < layer.weight.var() / linear.weight.var() < 1.2
        assert (layer.s == 0).all()

    def test_repr(self):
        layer = LowRankSparseLinear(12, 10, 2, kept=3, activation="gelu")
        text = "in_features=12, out_features=10, rank=2, kept=3, bias=True, activation='gelu'"
        assert repr(layer) == f"LowRankSparseLinear({text})"

    @pytest.mark.parametrize(
        ("positions", "text"),
        [
            ([0, 10], r"\[0, 10\), got 0 to 10"),
            ([-1, 2], "got -1 to 2"),
            ([2, 1], "sorted"),
            ([1, 1], "sorted"),
        ],
    )
    def test_bad_positions(self, positions, text):
        bad = torch.tensor(positions)
        with pytest.raises(ValueError, match=f"kept: .*{text}"):
            LowRankSparseLinear(12, 10, 2, kept=bad)
        layer = LowRankSparseLinear(12, 10, 2, kept=2)
        with pytest.raises(RuntimeError, match=f"kept: .*{text}"):
            layer.load_state_dict({**layer.state_dict(), "kept": bad.int()})
        layer.kept = bad.int()
        with pytest.raises(ValueError, match=f"kept: .*{text}"):
            layer.check_kept()

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ((12, 10, 11), ValueError, "rank: expected 0 to 10, got 11"),
            ((12, 10, -1), ValueError, "rank: expected 0 to 10, got -1"),
            ((12, 10, 2.0), TypeError, "rank: expected an integer, got 2.0"),
            ((0, 10, 2), ValueError, "in_features: expected at least 1, got 0"),
            ((12, 10, 2, 11), ValueError, "kept: expected 0 to 10, got 11"),
            ((12, 10, 2, 0, True, "swish"), ValueError, "activation: .*got 'swish'"),
        ],
    )
    def test_bad_arguments(self, arguments, error, text):
        with pytest.raises(error, match=text):
            LowRankSparseLinear(*arguments)

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ((nn.Identity(), 2), TypeError, "linear: expected an nn.Linear, got Identity"),
            ((nn.Linear(12, 10), 0), ValueError, "rank: expected 1 to 10, got 0"),
            ((nn.Linear(12, 10), 2, 1.5), ValueError, "keep: .*got 1.5"),
            ((nn.Linear(12, 10), 2, 0.0, torch.ones(12)), ValueError, r"row_weights: expected shape \[10\]"),
        ],
    )
    def test_bad_from_linear(self, arguments, error, text):
        with pytest.raises(error, match=text):
            LowRankSparseLinear.from_linear(*arguments)

    def test_bad_conversions(self):
        with pytest.raises(ValueError, match="a, b: expected shapes"):
            LowRankSparseLinear.from_factors(torch.ones(6, 3), torch.ones(2, 7))
        with pytest.raises(ValueError, match=r"bias: expected shape \[6\]"):
            LowRankSparseLinear.from_factors(torch.ones(6, 3), torch.ones(3, 7), torch.ones(7))
        with pytest.raises(ValueError, match="activation: expected a layer without activation, got 'gelu'"):
            LowRankSparseLinear(12, 10, 2, activation="gelu").to_dense()
