"""masked_linear and MaskedLinear."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from lpaf_kernels import KeepThreshold, MaskedLinear, PackedMask, keep_threshold, masked_linear, set_thresholds
from lpaf_kernels.ops.keep_threshold import keep_threshold_reference
from lpaf_kernels.ops.masked_linear import expand_blocks, masked_linear_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
BITS = torch.zeros(6, dtype=torch.uint8)
# (out, in), and the scores over it: small blocks, runs around a vector's length, rows, columns, the whole, parts.
BLOCKS = [
    ((6, 8), (3, 2)),
    ((64, 96), (2, 3)),
    ((10, 34), (2, 2)),
    ((6, 70), (6, 1)),
    ((70, 6), (1, 6)),
    ((6, 9), (1, 1)),
    ((12, 33), (4, 33)),
    ((2, 10000), (1, 5000)),
]


def make(shape=(5, 7), out=6, dtype=torch.float32, bias=True, ties=False):
    x = torch.randn(*shape).to(dtype).requires_grad_()
    weight = torch.randn(out, shape[-1]).to(dtype).requires_grad_()
    scores = torch.randn(out, shape[-1])
    if ties:
        scores = scores.round()
    scores = scores.to(dtype).requires_grad_()
    b = torch.randn(out).to(dtype).requires_grad_() if bias else None
    return x, weight, scores, b


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 7), (7,), (2, 3, 7), (0, 7), (2, 0, 7), (1, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_and_backward(dtype, shape, bias, assert_accurate):
    x, weight, scores, b = make(shape, dtype=dtype, bias=bias, ties=True)
    threshold = keep_threshold(scores, 0.4)
    inputs = [tensor for tensor in (x, weight, scores, b) if tensor is not None]
    y = masked_linear(x, weight, scores, threshold, b)
    grad = torch.randn(y.shape).to(dtype)
    actual = [y, *torch.autograd.grad(y, inputs, grad)]

    def differentiate(dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        out = masked_linear_reference(leaves[0], leaves[1], leaves[2], threshold, leaves[3] if bias else None)
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    exact = differentiate(torch.float64)
    for result, chain, truth in zip(actual, differentiate(dtype), exact, strict=True):
        assert_accurate(result, chain, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "blocks"), BLOCKS)
@pytest.mark.parametrize("packed", [True, False])
def test_blocks(dtype, shape, blocks, packed, assert_accurate):
    """One score per block, by the selection itself or packed; [out, in] scores only differ when packed."""
    x, weight, _, b = make((5, shape[1]), shape[0], dtype)
    scores = torch.randn(blocks).round().to(dtype).requires_grad_()
    threshold = keep_threshold(scores, 0.4)
    if packed:
        threshold = threshold.pack(scores)
    inputs = [x, weight, scores, b]
    y = masked_linear(x, weight, scores, threshold, b)
    grad = torch.randn(y.shape).to(dtype)
    actual = [y, *torch.autograd.grad(y, inputs, grad)]

    def differentiate(dtype):
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        out = masked_linear_reference(*leaves[:3], threshold, leaves[3])
        return [out, *torch.autograd.grad(out, leaves, grad.to(dtype))]

    for result, chain, truth in zip(actual, differentiate(dtype), differentiate(torch.float64), strict=True):
        assert_accurate(result, chain, truth)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("blocks", [(96, 1), (1, 800), (3, 25), (96, 800), (48, 100)])
def test_gradients_of_blocks_by_hand(blocks, threads):
    """Large enough for several tasks; sums do not depend on their number."""
    weight, scores = torch.randn(96, 800), torch.randn(blocks)
    threshold = keep_threshold(scores, 0.5)
    bits = threshold.pack(scores).bits
    g = torch.randn(96, 800)
    torch.set_num_threads(threads)
    ops = torch.ops.lpaf_kernels
    d_weight, d_scores = ops.masked_linear_packed_grads(g, weight, bits, *blocks, torch.float32)
    mask = expand_blocks(threshold.mask(scores), weight)
    assert torch.equal(d_weight, g * mask + 0.0)
    assert torch.equal(ops.masked_linear_packed_weight(weight, bits, *blocks, torch.float32), weight * mask + 0.0)
    rows, cols = blocks
    summed = (weight.double() * g.double()).view(rows, 96 // rows, cols, 800 // cols).sum((1, 3))
    torch.testing.assert_close(d_scores.double(), summed, rtol=1e-5, atol=1e-3)
    torch.set_num_threads(1)
    alone = ops.masked_linear_packed_grads(g, weight, bits, *blocks, torch.float32)
    assert torch.equal(d_scores, alone[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (8,), (9,), (3, 7), (70000,), (64, 3, 5), ()])
def test_packs_one_bit_per_score(dtype, shape):
    scores = torch.randn(shape).round().to(dtype)
    threshold = keep_threshold(scores, 0.4)
    mask = threshold.pack(scores)
    assert mask.bits.shape == ((scores.numel() + 7) // 8,)
    assert mask.shape == shape
    assert torch.equal(mask.unpack(), threshold.mask(scores))
    places = (2 ** torch.arange(8)).expand(mask.bits.numel(), 8).flatten()[: scores.numel()]
    # The last byte holds nothing else.
    assert mask.bits.long().sum() == (threshold.mask(scores).flatten() * places).sum()


def test_packs_what_the_wider_dtype_separates():
    scores = torch.tensor([1.0, 1.0 + 2**-12])
    threshold = KeepThreshold(torch.tensor(1.0 + 2**-40, dtype=torch.float64), torch.tensor(0))
    assert threshold.pack(scores).unpack().tolist() == threshold.mask(scores).tolist() == [False, True]
    with pytest.raises(TypeError, match=r"scores: expected a torch\.Tensor, got list"):
        threshold.pack([1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_is_the_same_selection(dtype):
    """Bit for bit, forward and backward, under autocast too; without scores only theirs is missing."""
    x, weight, scores, bias = make(ties=True)
    mask = keep_threshold(scores, 0.4).pack(scores)
    results = []
    for given, threshold in ((scores, keep_threshold(scores, 0.4)), (scores, mask), (None, mask)):
        inputs = [tensor for tensor in (x, weight, bias, given) if tensor is not None]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = masked_linear(x, weight, given, threshold, bias)
        assert y.dtype == dtype
        results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_packed_saves_no_scores():
    x, weight, scores, bias = make()
    mask = keep_threshold(scores, 0.5).pack(scores)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_linear(x, weight, scores, mask, bias)
    known = {t.untyped_storage().data_ptr() for t in (x, weight, mask.bits)}
    assert {t.untyped_storage().data_ptr() for t in saved} <= known


def test_gradients_by_hand():
    x, weight, scores, bias = make(dtype=torch.float64)
    threshold = keep_threshold(scores, 0.5)
    grad = torch.randn(5, 6, dtype=torch.float64)
    masked_linear(x, weight, scores, threshold, bias).backward(grad)
    g, mask = grad.T @ x.detach(), threshold.mask(scores)
    torch.testing.assert_close(weight.grad, g * mask)
    torch.testing.assert_close(scores.grad, g * weight.detach())
    torch.testing.assert_close(x.grad, grad @ (weight.detach() * mask))
    torch.testing.assert_close(bias.grad, grad.sum(0))


def test_gradcheck():
    x, weight, scores, bias = make(dtype=torch.float64)
    threshold = keep_threshold(scores, 0.5)
    # The score gradient is straight-through by design, so a finite difference does not see it.
    assert torch.autograd.gradcheck(
        lambda x, w, b: masked_linear(x, w, scores.detach(), threshold, b), (x, weight, bias)
    )


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_partial_gradients(needs):
    x, weight, scores, _ = make()
    expected = torch.autograd.grad(masked_linear(x, weight, scores, 0.0).square().sum(), [x, weight, scores])
    leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip((x, weight, scores), needs, strict=True)]
    masked_linear(*leaves, 0.0).square().sum().backward()
    for leaf, need, gradient in zip(leaves, needs, expected, strict=True):
        assert (leaf.grad is not None) == need
        if need:
            assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("threshold", [0.0, -0.25, 1, math.inf, -math.inf])
def test_number_as_threshold(threshold):
    x, weight, scores, bias = make(ties=True)
    expected = F.linear(x, weight * (scores >= threshold), bias)
    torch.testing.assert_close(masked_linear(x, weight, scores, threshold, bias), expected)


def test_low_precision_scores_are_compared_as_they_are():
    scores = torch.tensor([[0.1, 0.2]], dtype=torch.bfloat16)
    x = torch.eye(2)
    # 0.1 in bfloat16 is 0.10009765625: above 0.1, below 0.1001, and equal to both once they are rounded.
    assert masked_linear(x, torch.ones(1, 2), scores, 0.1001).flatten().tolist() == [0.0, 1.0]
    assert masked_linear(x, torch.ones(1, 2), scores, 0.1).flatten().tolist() == [1.0, 1.0]


def test_pruned_entries_contribute_nothing():
    x, weight, scores, _ = make()
    threshold = keep_threshold(scores, 0.5)
    with torch.no_grad():
        weight[~threshold.mask(scores)] = math.nan
    assert masked_linear(x, weight, scores, threshold).isfinite().all()


def test_non_contiguous():
    x, weight, scores, bias = make((4, 3, 7))
    threshold = keep_threshold(scores, 0.5)
    strided = x.detach().transpose(0, 1)
    expected = masked_linear(strided.contiguous(), weight, scores, threshold, bias)
    torch.testing.assert_close(masked_linear(strided, weight, scores, threshold, bias), expected)
    transposed = weight.detach().T.contiguous().T
    torch.testing.assert_close(masked_linear(strided, transposed, scores, threshold, bias), expected)


def test_saves_neither_mask_nor_masked_weight():
    x, weight, scores, bias = make()
    threshold = keep_threshold(scores, 0.5)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        masked_linear(x, weight, scores, threshold, bias)
    known = {t.untyped_storage().data_ptr() for t in (x, weight, scores, threshold.value, threshold.tie_index)}
    assert {t.untyped_storage().data_ptr() for t in saved} <= known


@pytest.mark.parametrize("mode", ["eager", "compiled"])
def test_autocast(mode):
    x, weight, scores, bias = make()
    with torch.no_grad():
        # The selection separates two scores that bfloat16 cannot tell apart.
        scores[0, 0], scores[0, 1] = 1.0, 1.0 + 2**-12
    threshold = KeepThreshold(torch.tensor(1.0 + 2**-13), torch.tensor(0))
    run = masked_linear
    if mode == "compiled":
        run = torch.compile(masked_linear, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(x, weight, scores, threshold, bias)
    assert y.dtype == torch.bfloat16
    mask = scores > threshold.value
    expected = F.linear(x.bfloat16(), (weight * mask).bfloat16(), bias.bfloat16())
    assert torch.equal(y, expected)
    y.sum().backward()
    assert weight.grad.dtype == scores.grad.dtype == bias.grad.dtype == x.grad.dtype == torch.float32
    assert weight.grad[0, 0] == 0.0
    assert weight.grad[0, 1] != 0.0


@pytest.mark.parametrize("blocks", [(6, 7), (2, 1)])
def test_backward_under_autocast_keeps_the_forwards_dtype(blocks):
    x, weight, _, bias = make()
    scores = torch.randn(blocks, requires_grad=True)
    y = masked_linear(x, weight, scores, 0.0, bias)
    grad = torch.randn_like(y)
    inputs = [x, weight, scores, bias]
    expected = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, torch.autograd.grad(y, inputs, grad), expected))


def test_mixed_dtypes():
    x, weight, scores, bias = make()
    y = masked_linear(x.double(), weight, scores, 0.0, bias)
    assert y.dtype == torch.float64
    y.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype, bias):
    x, weight, scores, b = make(dtype=dtype, bias=bias)
    value, tie_index = keep_threshold(scores, 0.5)
    ops = torch.ops.lpaf_kernels
    torch.library.opcheck(ops.masked_linear, (x, weight, scores, value, tie_index, b))
    plain = [tensor.detach() for tensor in (torch.randn(5, 6).to(dtype), x, weight, scores, value, tie_index)]
    for needs in ([True] * 4, [False, True, False, False], [True, False, False, True]):
        torch.library.opcheck(ops.masked_linear_backward, (*plain, needs))
    torch.library.opcheck(ops.masked_linear_weight, (*plain[2:], torch.float32 if dtype != torch.float64 else dtype))
    torch.library.opcheck(ops.masked_linear_grads, (torch.randn(6, 7).to(dtype), *plain[2:]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", [(6, 7), (2, 1)])
def test_opcheck_packed(dtype, blocks):
    x, weight, _, b = make(dtype=dtype)
    scores = torch.randn(blocks).to(dtype).requires_grad_()
    threshold = keep_threshold(scores, 0.5)
    mask = (threshold.pack(scores).bits, *blocks)
    ops = torch.ops.lpaf_kernels
    torch.library.opcheck(ops.masked_linear_pack, (scores.detach(), *threshold))
    for given, bias in ((scores, b), (None, None)):
        torch.library.opcheck(ops.masked_linear_packed, (x, weight, given, *mask, bias))
    plain = [tensor.detach() for tensor in (torch.randn(5, 6).to(dtype), x, weight)]
    for needs in ([True] * 4, [False, True, False, False], [False, False, True, True]):
        torch.library.opcheck(ops.masked_linear_packed_backward, (*plain, *mask, dtype, needs))
    torch.library.opcheck(ops.masked_linear_packed_weight, (plain[2], *mask, dtype))
    torch.library.opcheck(ops.masked_linear_packed_grads, (torch.randn(6, 7).to(dtype), plain[2], *mask, dtype))


@pytest.mark.parametrize("block", [(1, 1), (2, 7)])
def test_compiles_whole_without_recompilation(block):
    layer = MaskedLinear(7, 6, block=block)
    layer.set_threshold(keep_threshold(nn.init.normal_(layer.scores).detach(), 0.5))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for rows in (4, 9, 33):
        x = torch.randn(rows, 7)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x).sum().backward()
        assert torch.equal(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("block", [(1, 1), (2, 7)])
def test_exports(block):
    layer = MaskedLinear(7, 6, block=block)
    layer.set_threshold(keep_threshold(nn.init.normal_(layer.scores).detach(), 0.5))
    program = torch.export.export(layer, (torch.randn(4, 7),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    x = torch.randn(9, 7)
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a torch.Tensor, got list"),
        ({"x": torch.ones(5, 7).int()}, TypeError, "x: expected float32.*got torch.int32"),
        ({"x": torch.ones(5, 8)}, ValueError, r"x: expected last dimension 7 .*got shape \[5, 8\]"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: expected last dimension 7"),
        ({"weight": torch.ones(7)}, ValueError, r"weight: expected shape \[out, in\], got \[7\]"),
        ({"scores": torch.ones(6, 8)}, ValueError, r"scores: expected shape \[6, 7\].*got \[6, 8\]"),
        ({"scores": torch.ones(4, 7)}, ValueError, r"or \[6 / b, 7 / c\] with whole b and c, got \[4, 7\]"),
        ({"scores": torch.ones(0, 7)}, ValueError, r"scores: expected shape .* got \[0, 7\]"),
        ({"scores": torch.ones(6)}, ValueError, r"scores: expected shape .* got \[6\]"),
        ({"scores": None}, TypeError, "scores: expected a torch.Tensor, got NoneType"),
        ({"scores": torch.ones(6, 7, device="meta")}, ValueError, "scores: expected device cpu"),
        ({"bias": torch.ones(7)}, ValueError, r"bias: expected shape \[6\]"),
        ({"threshold": math.nan}, ValueError, "threshold: expected a number, got nan"),
        ({"threshold": "0.5"}, TypeError, "threshold: expected a KeepThreshold, a PackedMask or a number, got str"),
        ({"threshold": PackedMask(BITS, (6, 8))}, ValueError, r"threshold.shape: expected shape .* got \[6, 8\]"),
        ({"threshold": PackedMask(BITS[:3], (3, 7))}, ValueError, r"scores: expected shape \[3, 7\] .*threshold"),
        ({"threshold": PackedMask(BITS[:5], (6, 7))}, ValueError, r"threshold.bits: expected shape \[6\]"),
        ({"threshold": PackedMask(BITS.int(), (6, 7))}, TypeError, "threshold.bits: expected .* got torch.int32"),
        ({"threshold": PackedMask(None, (6, 7))}, TypeError, "threshold.bits: expected .* got NoneType"),
    ],
)
def test_bad_input(change, error, text):
    arguments = {
        "x": torch.ones(5, 7),
        "weight": torch.ones(6, 7),
        "scores": torch.ones(6, 7),
        "threshold": 0.5,
        "bias": None,
    }
    with pytest.raises(error, match=text):
        masked_linear(**{**arguments, **change})


class TestModule:
    def test_keeps_everything_at_first(self):
        linear = nn.Linear(7, 6)
        layer = MaskedLinear.from_linear(linear)
        x = torch.randn(3, 7)
        assert layer.mask().all()
        torch.testing.assert_close(layer(x), linear(x))
        assert isinstance(layer, nn.Linear)

    def test_shares_parameters(self):
        linear = nn.Linear(7, 6)
        layer = MaskedLinear.from_linear(linear)
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        assert layer.scores.abs().sum() == 0
        assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "scores"}

    @pytest.mark.parametrize("block", [(2, 7), (3, 1), (1, 7), (6, 1)])
    def test_blocks(self, block):
        linear = nn.Linear(7, 6)
        layer = MaskedLinear.from_linear(linear, block=block)
        assert layer.scores.shape == (6 // block[0], 7 // block[1])
        assert layer.mask().all()
        assert f"block={block}" in repr(layer)
        nn.init.normal_(layer.scores)
        layer.set_threshold(keep_threshold(layer.scores, 0.5))
        kept = int(layer.threshold.count(layer.scores)) * block[0] * block[1]
        assert layer.mask().shape == (6, 7)
        assert layer.mask().sum() == (layer.to_linear().weight != 0).sum() == kept
        x = torch.randn(3, 7)
        assert torch.equal(layer.to_linear()(x), layer(x))
        layer(x).sum().backward()
        assert layer.scores.grad.shape == layer.scores.shape

    @pytest.mark.parametrize("bias", [True, False])
    def test_to_linear(self, bias):
        layer = MaskedLinear(7, 6, bias=bias)
        nn.init.normal_(layer.scores)
        layer.set_threshold(keep_threshold(layer.scores, 0.25))
        linear = layer.to_linear()
        assert linear.bias is layer.bias
        assert (linear.weight != 0).sum() == math.floor(0.25 * 42 + 0.5)
        assert not torch.signbit(linear.weight[linear.weight == 0]).any()
        x = torch.randn(3, 7)
        assert torch.equal(linear(x), layer(x))

    def test_round_trip(self):
        layer = MaskedLinear(7, 6)
        nn.init.normal_(layer.scores)
        layer.set_threshold(keep_threshold(layer.scores, 0.25))
        other = MaskedLinear(7, 6)
        other.load_state_dict(layer.state_dict())
        copied = copy.deepcopy(layer)
        x = torch.randn(3, 7)
        assert torch.equal(other(x), layer(x))
        assert torch.equal(copied(x), layer(x))
        assert copied.scores is not layer.scores

    def test_meta_and_bfloat16(self):
        layer = MaskedLinear(7, 6, device="meta")
        assert layer(torch.empty(3, 7, device="meta")).shape == (3, 6)
        half = MaskedLinear(7, 6).to(torch.bfloat16)
        assert half(torch.randn(3, 7).bfloat16()).dtype == torch.bfloat16
        double = MaskedLinear(7, 6, dtype=torch.float64)
        assert double.threshold_value.dtype == torch.float64

    def test_bad_input(self):
        with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear, got Identity"):
            MaskedLinear.from_linear(nn.Identity())
        with pytest.raises(ValueError, match=r"block: expected sides that divide \[6, 7\], got \(4, 1\)"):
            MaskedLinear(7, 6, block=(4, 1))
        with pytest.raises(TypeError, match=r"block: expected two integers \(b, c\), got 2"):
            MaskedLinear(7, 6, block=2)
        with pytest.raises(TypeError, match="threshold: expected a KeepThreshold, got float"):
            MaskedLinear(7, 6).set_threshold(0.5)
        with pytest.raises(ValueError, match=r"threshold.value: expected shape \[\]"):
            MaskedLinear(7, 6).set_threshold(KeepThreshold(torch.zeros(2), torch.zeros(())))


def test_thresholds_of_many_layers_at_once():
    layers = [MaskedLinear(7, 6), MaskedLinear(5, 4)]
    for layer in layers:
        nn.init.normal_(layer.scores)
    scores = [layer.scores.detach() for layer in layers]
    set_thresholds(layers, keep_threshold(scores, 0.5, "global"))
    for layer, mask in zip(layers, keep_threshold_reference(scores, 0.5, "global"), strict=True):
        assert torch.equal(layer.mask(), mask)
    set_thresholds([], [])
    with pytest.raises(ValueError, match=r"thresholds: expected 2 \(one per layer\), got 1"):
        set_thresholds(layers, [layers[0].threshold])
