"""lowrank_ffn: the block against its layers one by one."""

from __future__ import annotations

import native
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from lpaf_kernels import Norm, lowrank_ffn
from lpaf_kernels.ops import lowrank_ffn as op
from lpaf_kernels.ops.lowrank_ffn import lowrank_ffn_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
ACTIVATIONS = ["none", "gelu", "gelu_tanh", "relu", "silu", "tanh"]
# leading shape, in, hidden, out, (rank, kept) of both layers, rank of the gate, biases, residual, norm
CASES = [
    ((5,), 7, 11, 6, (3, 2), (2, 1), 0, True, True, "layer"),
    ((2, 3), 7, 11, 7, (3, 0), (2, 0), 0, False, False, "none"),
    ((4,), 7, 11, 6, (3, 2), (2, 6), 4, True, True, "rms"),
    ((4,), 7, 11, 6, (0, 2), (0, 1), 3, True, False, "layer"),
    ((), 7, 11, 6, (3, 11), (2, 1), 0, True, True, "layer"),
    ((0,), 7, 11, 6, (3, 2), (2, 1), 2, True, True, "layer"),
    ((4,), 7, 0, 6, (3, 0), (2, 1), 0, True, True, "layer"),
    ((1,), 1, 1, 1, (1, 1), (1, 0), 1, True, True, "none"),
    ((133,), 65, 260, 130, (41, 13), (20, 7), 0, True, True, "layer"),
    ((67,), 65, 130, 65, (41, 0), (131, 0), 33, True, True, "rms"),
]


def make(lead, d_in, hidden, d_out, first, second, gate, biases, residual, norm, dtype=torch.float32):
    """(the floating tensors by name, the kept positions by name, the norm's kind)."""

    def draw(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * torch.randn(*size)).to(dtype).requires_grad_()

    tensors = {"x": draw(*lead, d_in)}
    for suffix, inputs, outputs, (rank, kept) in (("1", d_in, hidden, first), ("2", hidden, d_out, second)):
        tensors[f"down{suffix}"] = draw(rank + kept, inputs, scale=max(inputs, 1) ** -0.5)
        tensors[f"up{suffix}"] = draw(rank, outputs, scale=max(rank, 1) ** -0.5)
        if biases:
            tensors[f"bias{suffix}"] = draw(outputs)
    if gate:
        tensors["down_gate"], tensors["up_gate"] = draw(gate, d_in, scale=d_in**-0.5), draw(gate, hidden)
        if biases:
            tensors["bias_gate"] = draw(hidden)
    if residual:
        tensors["residual"] = draw(*lead, d_out)
    if norm != "none":
        tensors["weight"] = draw(d_out)
        if norm == "layer":
            tensors["bias"] = draw(d_out)
    kept = {
        f"kept{suffix}": torch.randperm(outputs)[:count].sort().values.int() if count else None
        for suffix, outputs, (_, count) in (("1", hidden, first), ("2", d_out, second))
    }
    return tensors, kept, norm


def run(function, tensors, kept, norm, activation):
    gate = (tensors["down_gate"], tensors["up_gate"], tensors.get("bias_gate")) if "down_gate" in tensors else None
    return function(
        tensors["x"],
        tensors["down1"],
        tensors["up1"],
        tensors.get("bias1"),
        tensors["down2"],
        tensors["up2"],
        tensors.get("bias2"),
        activation=activation,
        gate=gate,
        residual=tensors.get("residual"),
        norm=None if norm == "none" else Norm(norm, tensors["weight"], tensors.get("bias"), 1e-5),
        **kept,
    )


def act(name: str, y: torch.Tensor) -> torch.Tensor:
    if name.startswith("gelu"):
        return F.gelu(y, approximate="tanh" if name == "gelu_tanh" else "none")
    return {"none": lambda t: t, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}[name](y)


def chain(x, down1, up1, bias1, down2, up2, bias2, *, activation, gate, residual, norm, kept1, kept2):
    """What a user writes by hand."""

    def layer(x, down, up, kept, bias):
        y = F.linear(F.linear(x, down[: up.shape[0]]), up.T, bias)
        return y if kept is None else y.index_add(-1, kept, F.linear(x, down[up.shape[0] :]))

    h = layer(x, down1, up1, kept1, bias1)
    h = act(activation, h) if gate is None else act(activation, layer(x, gate[0], gate[1], None, gate[2])) * h
    y = layer(h, down2, up2, kept2, bias2)
    y = y if residual is None else y + residual
    if norm is None:
        return y
    if norm.kind == "layer":
        return F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, norm.eps)
    return F.rms_norm(y, y.shape[-1:], norm.weight, norm.eps)


def differentiate(function, tensors, kept, norm, activation, grad, dtype) -> list[torch.Tensor]:
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    y = run(function, leaves, kept, norm, activation)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), grad.to(dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype, assert_accurate):
    for activation in ACTIVATIONS:
        draws = []
        # The largest error of a handful of entries is a matter of luck: several draws are measured together.
        for _ in range(4 if case[2] > 100 else 16):
            tensors, kept, norm = make(*case, dtype=dtype)
            grad = torch.randn(*case[0], case[3]).to(dtype)
            arguments = (tensors, kept, norm, activation, grad)
            actual = differentiate(lowrank_ffn, *arguments, dtype)
            draws.append(
                (actual, differentiate(chain, *arguments, dtype), differentiate(chain, *arguments, torch.float64))
            )
            with torch.no_grad():
                torch.testing.assert_close(run(lowrank_ffn, tensors, kept, norm, activation), actual[0])
        for results in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
            assert_accurate(*(torch.stack(same) for same in zip(*results, strict=True)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case, activation):
    tensors, kept, norm = make(*case, dtype=torch.float64)
    expected = run(lowrank_ffn_reference, tensors, kept, norm, activation)
    torch.testing.assert_close(run(lowrank_ffn, tensors, kept, norm, activation), expected)


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3]], ids=str)
def test_gradcheck(case):
    tensors, kept, norm = make(*case, dtype=torch.float64)
    names = list(tensors)

    def function(*leaves):
        return run(lowrank_ffn, dict(zip(names, leaves, strict=True)), kept, norm, "gelu")

    assert torch.autograd.gradcheck(function, list(tensors.values()))


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_partial_gradients(case):
    tensors, kept, norm = make(*case)
    expected = dict(
        zip(
            tensors,
            torch.autograd.grad(run(lowrank_ffn, tensors, kept, norm, "silu").sum(), list(tensors.values())),
            strict=True,
        )
    )
    for needed in tensors:
        leaves = {name: tensor.detach().requires_grad_(name == needed) for name, tensor in tensors.items()}
        run(lowrank_ffn, leaves, kept, norm, "silu").sum().backward()
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name == needed)
        torch.testing.assert_close(leaves[needed].grad, expected[needed])


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_first(kind):
    tensors, kept, _ = make((5,), 7, 11, 7, (3, 2), (2, 1), 0, True, True, "none", dtype=torch.float64)
    weight, bias = torch.randn(2, 7, dtype=torch.float64)
    norm = Norm(kind, weight, bias if kind == "layer" else None, 1e-6)
    layers = [tensors[name] for name in ("down1", "up1", "bias1", "down2", "up2", "bias2")]
    actual = lowrank_ffn(tensors["x"], *layers, residual=tensors["x"], norm=norm, norm_first=True, **kept)
    normed = (
        F.layer_norm(tensors["x"], (7,), weight, bias, 1e-6)
        if kind == "layer"
        else F.rms_norm(tensors["x"], (7,), weight, 1e-6)
    )
    expected = lowrank_ffn_reference(normed, *layers, residual=tensors["x"], **kept)
    torch.testing.assert_close(actual, expected)


def test_dropout_zeroes_before_the_residual():
    tensors, kept, _ = make((400,), 7, 11, 6, (3, 2), (2, 1), 0, True, True, "none")
    layers = [tensors[name] for name in ("x", "down1", "up1", "bias1", "down2", "up2", "bias2")]
    plain = lowrank_ffn(*layers, **kept)
    dropped = lowrank_ffn(*layers, residual=tensors["residual"], dropout_p=0.25, **kept) - tensors["residual"]
    zero = dropped.abs() < 1e-6
    assert 0.2 < zero.float().mean() < 0.3
    torch.testing.assert_close(dropped[~zero], plain[~zero] / 0.75, rtol=1e-4, atol=1e-5)
    norm = Norm("layer", torch.ones(6), torch.zeros(6))
    y = lowrank_ffn(*layers, residual=tensors["residual"], norm=norm, dropout_p=0.25, **kept)
    torch.testing.assert_close(y.mean(-1), torch.zeros(400), rtol=0, atol=1e-5)


def test_a_seed_fixes_the_dropout():
    tensors, kept, _ = make(*CASES[0])
    layers = [tensors[name] for name in ("x", "down1", "up1", "bias1", "down2", "up2", "bias2")]
    first = lowrank_ffn(*layers, dropout_p=0.5, seed=3, **kept)
    assert torch.equal(lowrank_ffn(*layers, dropout_p=0.5, seed=3, **kept), first)
    assert not torch.equal(lowrank_ffn(*layers, dropout_p=0.5, seed=4, **kept), first)


def test_no_second_or_forward_derivative_is_made_up():
    tensors, kept, norm = make(*CASES[0])
    y = run(lowrank_ffn, tensors, kept, norm, "gelu")
    (d_x,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        d_x.sum().backward()
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    with pytest.raises(NotImplementedError, match="lowrank_ffn: has no forward-mode derivative"):
        torch.func.jvp(lambda x: run(lowrank_ffn, plain | {"x": x}, kept, norm, "gelu"), (plain["x"],), (plain["x"],))


def test_non_contiguous_arguments():
    tensors, kept, norm = make(*CASES[2])
    expected = run(lowrank_ffn, tensors, kept, norm, "gelu")
    strided = {
        name: tensor.detach().t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in tensors.items()
    }
    with torch.no_grad():
        assert torch.equal(run(lowrank_ffn, strided, kept, norm, "gelu"), expected)
    grown = torch.randn(9, 14)
    grown[2:6, 3:10] = tensors["x"].detach()
    with torch.no_grad():
        assert torch.equal(run(lowrank_ffn, {**tensors, "x": grown[2:6, 3:10]}, kept, norm, "gelu"), expected)


@pytest.mark.parametrize("norm", ["none", "layer", "rms"])
@pytest.mark.parametrize("gate", [0, 3])
def test_opcheck(norm, gate):
    tensors, kept, _ = make((5,), 7, 11, 6, (3, 2), (2, 1), gate, True, True, norm)
    names = ("down1", "up1", "kept1", "bias1", "down2", "up2", "kept2", "bias2", "down_gate", "up_gate", "bias_gate")
    values = [tensors["x"], *((tensors | kept).get(name) for name in (*names, "residual", "weight", "bias"))]
    torch.library.opcheck(torch.ops.lpaf_kernels.lowrank_ffn, (*values, "gelu", norm, 1e-5, True))
    plain = [None if value is None else value.detach() for value in values]
    needs = [plain[index] is not None for index in op._FLOATING]
    arguments = (torch.randn(5, 6), *plain, "gelu", norm, 1e-5, needs)
    torch.library.opcheck(torch.ops.lpaf_kernels.lowrank_ffn_backward, arguments)


@pytest.mark.parametrize("grad", [True, False])
def test_compiles_whole_without_recompilation(grad):
    tensors, kept, norm = make((1,), 7, 11, 6, (3, 2), (2, 1), 3, True, False, "layer")
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def block(x: torch.Tensor) -> torch.Tensor:
        return run(lowrank_ffn, {**tensors, "x": x}, kept, norm, "silu")

    compiled = torch.compile(block, fullgraph=True, backend=counter)
    with torch.set_grad_enabled(grad):
        for rows in (4, 9, 33):
            x = torch.randn(rows, 7)
            torch._dynamo.mark_dynamic(x, 0)
            y = compiled(x)
            assert torch.equal(y, block(x))
            if grad:
                y.sum().backward()
    assert counter.frame_count == 1


def test_exports():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            tensors, self.kept, self.norm = make((1,), 7, 11, 6, (3, 2), (2, 1), 0, True, False, "layer")
            self.tensors = nn.ParameterDict(
                {name: nn.Parameter(t.detach()) for name, t in tensors.items() if name != "x"}
            )

        def forward(self, x):
            return run(lowrank_ffn, {**self.tensors, "x": x}, self.kept, self.norm, "gelu")

    block = Block()
    program = torch.export.export(block, (torch.randn(4, 7),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    x = torch.randn(9, 7)
    assert torch.equal(program.module()(x), block(x))


def test_autocast():
    tensors, kept, norm = make((5,), 7, 11, 6, (3, 2), (2, 1), 3, True, True, "layer")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(lowrank_ffn, tensors, kept, norm, "silu")
    assert y.dtype == torch.bfloat16
    half = {name: tensor.detach().bfloat16() for name, tensor in tensors.items()}
    assert torch.equal(y, run(lowrank_ffn, half, kept, norm, "silu"))
    y.sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors.values())


@pytest.mark.skipif(not op._HAS_NATIVE, reason="_ops_cpu.so was not built")
@pytest.mark.parametrize("rows", [1, 2, 59, 60, 61, 121, 500])
@pytest.mark.parametrize("threads", [1, 3])
def test_native_rows_do_not_depend_on_their_neighbours(rows, threads):
    tensors, kept, norm = make((rows,), 65, 260, 130, (41, 13), (20, 7), 9, True, True, "layer")
    step = max(rows // 7, 1)

    def block(first: int, last: int) -> torch.Tensor:
        part = {name: tensors[name][first:last] for name in ("x", "residual")}
        return run(lowrank_ffn, tensors | part, kept, norm, "silu")

    with torch.no_grad():
        alone = torch.cat([block(row, row + 1) for row in range(0, rows, step)])
        torch.set_num_threads(threads)
        together = block(0, rows)
    assert torch.equal(together[::step], alone)


@pytest.mark.skipif(not op._HAS_NATIVE, reason="_ops_cpu.so was not built")
@pytest.mark.parametrize("seeds", [range(start, start + 25) for start in range(0, 100, 25)], ids=str)
def test_native_path(seeds, instruction_set):
    for seed in seeds:
        instruction_set(native.check_feed_forward, seed)


@pytest.mark.skipif(not op._HAS_NATIVE, reason="_ops_cpu.so was not built")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_native_activations_over_their_whole_range(activation):
    """x -> act(x) -> the identity: rank 1 with weight 1, so that only the activation rounds."""
    x = torch.cat([sign * torch.logspace(-30, 2, 4000, base=2.0) for sign in (1.0, -1.0)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e4, -1e4, 1e20, -1e20])])[:, None]
    one = torch.ones(1, 1)
    with torch.no_grad():
        y = lowrank_ffn(x, one, one, None, one, one, None, activation=activation)
    exact = act(activation, x.double())
    torchs = act(activation, x).double()
    # Relative to x, as all of them are about x, or x / 2, near 0 and x, or 0, far away.
    scale = x.double().abs().clamp_min(1e-30)
    error, allowed = (y.double() - exact).abs() / scale, (torchs - exact).abs() / scale
    assert y.isfinite().all()
    infinity = torch.tensor([[torch.inf]])
    with torch.no_grad():
        y = lowrank_ffn(infinity, one, one, None, one, one, None, activation=activation)
    assert torch.equal(y, act(activation, infinity))
    assert error.max() <= 2 * allowed.max() + torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.ones(5, 8)}, ValueError, r"down1: expected shape \[5, 8\]"),
        ({"x": 3}, TypeError, "x: expected a torch.Tensor"),
        ({"up1": torch.ones(3, 12)}, ValueError, "bias1: expected shape"),
        ({"down2": torch.ones(3, 12)}, ValueError, r"down2: expected shape \[3, 11\]"),
        ({"bias2": torch.ones(7)}, ValueError, r"bias2: expected shape \[6\]"),
        ({"residual": torch.ones(4, 6)}, ValueError, r"residual: expected shape \[5, 6\]"),
        ({"down2": torch.ones(3, 11).double()}, TypeError, "down2, up2, bias2: expected dtype torch.float32"),
        ({"kept1": torch.ones(2)}, TypeError, "kept1?: expected int32 or int64"),
        ({"activation": "swish"}, ValueError, "activation: expected one of none.*got 'swish'"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p: expected a number in \[0, 1\), got 1.0"),
        ({"gate": (torch.ones(2, 7), torch.ones(2, 10), None)}, ValueError, "up_gate: expected 11 columns"),
        ({"norm": Norm("batch", torch.ones(6))}, ValueError, "norm.kind: expected layer or rms, got 'batch'"),
        ({"norm": Norm("rms", torch.ones(6), torch.ones(6))}, ValueError, "norm.bias: expected None for rms"),
        ({"norm": Norm("layer", torch.ones(5))}, ValueError, r"norm.weight: expected shape \[6\]"),
        ({"norm": Norm("layer", torch.ones(6), None, -1.0)}, ValueError, "norm.eps: expected at least 0"),
        ({"norm": nn.LayerNorm(6)}, TypeError, "norm: expected a Norm, got LayerNorm"),
        ({"residual": torch.ones(5, 6).double()}, TypeError, "residual: expected dtype torch.float32"),
        ({"gate": (torch.ones(2, 7),)}, ValueError, r"gate: expected \(down, up, bias\)"),
        ({"seed": 1.5}, TypeError, "seed: expected an integer or None, got 1.5"),
        ({"residual": torch.ones(5, 6, device="meta")}, ValueError, "residual: expected device cpu"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(change, error, text, grad):
    tensors, kept, _ = make((5,), 7, 11, 6, (3, 2), (2, 1), 0, True, False, "none")
    with torch.set_grad_enabled(grad), pytest.raises(error, match=text):
        lowrank_ffn(**{**tensors, **kept, **change})
