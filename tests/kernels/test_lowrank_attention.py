"""lowrank_attention: the block against its layers and torch's attention."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import native
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from lpaf_kernels import Norm, lowrank_attention, packed_lowrank_sparse_linear
from lpaf_kernels.ops import lowrank_attention as op
from lpaf_kernels.ops.lowrank_attention import lowrank_attention_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
LAYERS = ("q", "k", "v", "o")


class Case(NamedTuple):
    """One block; ranks and kept are those of q, k, v and o; lengths: of the sequences of cu_seqlens."""

    lead: tuple[int, ...]
    d: int
    heads: tuple[int, int]
    head_dim: int
    ranks: tuple[int, ...] = (3, 4, 5, 2)
    kept: tuple[int, ...] = (0, 0, 0, 0)
    biases: bool = True
    mask: str = "none"
    is_causal: bool = False
    rotary: str = "none"
    residual: bool = True
    norm: str = "layer"
    lengths: tuple[int, ...] | None = None


CASES = [
    Case((2, 5), 8, (2, 2), 4),
    Case((3, 7), 8, (4, 2), 6, kept=(2, 1, 3, 2), mask="padding", rotary="shared", norm="rms"),
    Case((2, 4), 6, (2, 1), 4, biases=False, mask="bias", residual=False, norm="none"),
    Case((2, 5), 8, (2, 2), 3, is_causal=True, mask="rows"),
    Case((2, 5), 8, (3, 3), 4, is_causal=True, rotary="own", kept=(0, 3, 0, 0), norm="rms"),
    Case((11,), 8, (2, 2), 4, lengths=(3, 0, 7, 1), rotary="own"),
    Case((9,), 8, (2, 1), 4, lengths=(4, 5), is_causal=True, norm="none"),
    Case((16,), 8, (2, 2), 4),
    Case((2, 2, 3), 8, (2, 2), 4, mask="padding"),
    Case((0, 5), 8, (2, 2), 4),
    Case((2, 0), 8, (2, 2), 4),
    Case((0,), 8, (2, 2), 4, lengths=()),
    Case((0,), 8, (2, 2), 4),
    Case((2, 3, 0), 8, (2, 2), 4, rotary="own"),
    Case((1, 1), 1, (1, 1), 1, (1, 1, 1, 1)),
    Case((2, 5), 8, (2, 2), 4, (0, 0, 0, 0), (8, 3, 8, 2)),
    # Ranks whose columns begin where one product for q, k and v serves.
    Case((2, 5), 8, (2, 2), 4, (8, 16, 5, 2)),
    Case((3, 7), 8, (4, 2), 6, (6, 16, 5, 3), (2, 0, 3, 2), biases=False, mask="padding", rotary="shared"),
    Case((2, 67), 48, (3, 3), 16, (20, 41, 17, 33), (0, 5, 0, 7), mask="padding"),
    Case((1, 150), 40, (2, 1), 32, (20, 41, 17, 33), mask="rows", rotary="shared"),
]
FEW = [CASES[1], CASES[2], CASES[4], CASES[5]]


def make(case: Case, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict]:
    """(the floating tensors by name, the other arguments)."""

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size)).to(dtype).requires_grad_()

    (heads, kv_heads), head_dim = case.heads, case.head_dim
    widths = dict(zip(LAYERS, (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, case.d), strict=True))
    columns = [rank + kept for rank, kept in zip(case.ranks, case.kept, strict=True)]
    tensors = {"x": draw(*case.lead, case.d)}
    tensors["down_qkv"] = draw(sum(columns[:3]), case.d, scale=case.d**-0.5)
    tensors["down_o"] = draw(columns[3], widths["q"], scale=widths["q"] ** -0.5)
    for name, rank in zip(LAYERS, case.ranks, strict=True):
        tensors[f"up_{name}"] = draw(rank, widths[name], scale=max(rank, 1) ** -0.5)
    if case.biases:
        tensors["bias_qkv"] = draw(sum(widths[name] for name in "qkv"))
        tensors["bias_o"] = draw(case.d)
    if case.residual:
        tensors["residual"] = draw(*case.lead, case.d)
    if case.norm != "none":
        tensors["weight"] = draw(case.d)
        if case.norm == "layer":
            tensors["bias"] = draw(case.d)
    kept = [
        torch.randperm(widths[name])[:count].sort().values.int() if count else None
        for name, count in zip(LAYERS, case.kept, strict=True)
    ]
    length, batch = (case.lead[-1], case.lead[:-1]) if case.lengths is None else (sum(case.lengths), ())
    flat = torch.Size(batch).numel()
    mask = {
        "none": None,
        "padding": torch.arange(length) < torch.randint(0, length + 1, (flat, 1, 1, 1)),
        "rows": torch.rand(length, length) < 0.6,
        "bias": torch.randn(flat, 1, length, length).to(dtype).transpose(2, 3),
    }[case.mask]
    angles = torch.randn(*(batch if case.rotary == "own" else ()), length, head_dim)
    rest = {
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "attn_mask": mask,
        "is_causal": case.is_causal,
        "rotary": None if case.rotary == "none" else (angles.cos().to(dtype), angles.sin().to(dtype)),
        "kept": kept,
        "cu_seqlens": None if case.lengths is None else torch.tensor([0, *case.lengths]).cumsum(0).int(),
        "max_seqlen": max(case.lengths) if case.lengths and not case.is_causal else None,
        "norm": case.norm,
    }
    return tensors, rest


def run(function, tensors: dict[str, Tensor], rest: dict, **more) -> Tensor:
    names = ("x", "down_qkv", "up_q", "up_k", "up_v", "bias_qkv", "down_o", "up_o", "bias_o")
    dtype = tensors["x"].dtype
    options = {**rest, **more}
    kind = options.pop("norm")
    if kind != "none":
        options["norm"] = Norm(kind, tensors["weight"], tensors.get("bias"), 1e-5)
    if options["rotary"] is not None:
        options["rotary"] = tuple(table.to(dtype) for table in options["rotary"])
    mask = options["attn_mask"]
    if mask is not None and mask.dtype != torch.bool:
        options["attn_mask"] = mask.to(dtype)
    return function(*(tensors.get(name) for name in names), residual=tensors.get("residual"), **options)


def chain(
    x, down_qkv, up_q, up_k, up_v, bias_qkv, down_o, up_o, bias_o, *, num_heads, num_kv_heads, attn_mask, cu_seqlens,
    max_seqlen, is_causal, rotary, kept, residual, norm=None, scale=None,
):  # fmt: skip
    """What a user writes by hand."""
    assert max_seqlen is None or max_seqlen == int(cu_seqlens.diff().max())
    head_dim = up_q.shape[1] // num_heads

    def layer(x, down, up, positions, bias):
        y = F.linear(F.linear(x, down[: up.shape[0]]), up.T, bias)
        return y if positions is None else y.index_add(-1, positions, F.linear(x, down[up.shape[0] :]))

    def turn(heads, cos, sin):
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat([-second, first], -1) * sin

    def attend(x, rotary, mask):
        start, begin, parts = 0, 0, []
        for up, positions in zip((up_q, up_k, up_v), kept[:3], strict=True):
            end, last = start + up.shape[0] + (0 if positions is None else len(positions)), begin + up.shape[1]
            bias = None if bias_qkv is None else bias_qkv[begin:last]
            heads = layer(x, down_qkv[start:end], up, positions, bias)
            parts.append(heads.unflatten(-1, (-1, head_dim)).transpose(-3, -2))
            start, begin = end, last
        q, k, v = parts
        if rotary is not None:
            q, k = (turn(t, rotary[0].unsqueeze(-3), rotary[1].unsqueeze(-3)) for t in (q, k))
        if is_causal:
            causal = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
            if mask is None:
                mask = causal
            else:
                mask = mask & causal if mask.dtype == torch.bool else mask.masked_fill(~causal, -torch.inf)
        context = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=num_heads != num_kv_heads)
        return context.transpose(-3, -2).flatten(-2)

    if cu_seqlens is None:
        context = attend(x.reshape(-1, *x.shape[-2:]) if x.numel() else x, rotary, attn_mask)
        context = context.view(*x.shape[:-1], up_q.shape[1])
    else:
        pieces = [slice(*pair) for pair in pairwise(cu_seqlens.tolist())]
        # Of one sequence each: without the batch's dimension torch would take another kernel.
        context = [attend(x[None, at], None if rotary is None else [t[at] for t in rotary], None)[0] for at in pieces]
        context = torch.cat([x.new_zeros(0, up_q.shape[1]), *context])
    y = layer(context, down_o, up_o, kept[3], bias_o)
    y = y if residual is None else y + residual
    if norm is None:
        return y
    if norm.kind == "layer":
        return F.layer_norm(y, y.shape[-1:], norm.weight, norm.bias, norm.eps)
    return F.rms_norm(y, y.shape[-1:], norm.weight, norm.eps)


def reference(*tensors, max_seqlen, **options):
    return lowrank_attention_reference(*tensors, **options)


def differentiate(function, tensors, rest, grad, dtype) -> list[Tensor]:
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    y = run(function, leaves, rest)
    grads = torch.autograd.grad(y, list(leaves.values()), grad.to(dtype), materialize_grads=True)
    return [y.detach(), *grads]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, dtype, assert_accurate):
    draws = []
    # The largest error of a handful of entries is a matter of luck: several draws are measured together.
    for _ in range(4 if case.d > 30 else 24):
        tensors, rest = make(case, dtype)
        grad = torch.randn(*case.lead, case.d).to(dtype)
        actual = differentiate(lowrank_attention, tensors, rest, grad, dtype)
        by_torch = differentiate(chain, tensors, rest, grad, dtype)
        draws.append((actual, by_torch, differentiate(chain, tensors, rest, grad, torch.float64)))
    for results in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
        assert_accurate(*(torch.stack(same) for same in zip(*results, strict=True)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_without_gradients(case, dtype, assert_accurate):
    draws = []
    for _ in range(4 if case.d > 30 else 24):
        tensors, rest = make(case, dtype)
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        with torch.no_grad():
            draws.append([run(lowrank_attention, tensors, rest), run(chain, tensors, rest), run(chain, wide, rest)])
    assert_accurate(*(torch.stack(same) for same in zip(*draws, strict=True)))


@pytest.mark.parametrize(
    ("ranks", "chain", "layers"), [((8, 16, 5, 2), True, 1), ((8, 16, 5, 2), False, 4), ((8, 3, 5, 2), True, 4)]
)
def test_inference_reads_x_once_where_the_layers_take_torchs_products(ranks, chain, layers, monkeypatch):
    tensors, rest = make(Case((2, 5), 8, (2, 2), 4, ranks), torch.float64)
    monkeypatch.setattr(op, "prefers_chain", lambda *layer: chain)
    calls = []

    def linear(*layer):
        calls.append(layer)
        return packed_lowrank_sparse_linear(*layer)

    monkeypatch.setattr(op, "packed_lowrank_sparse_linear", linear)
    with torch.no_grad():
        run(lowrank_attention, tensors, rest)
    assert len(calls) == layers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference(case):
    tensors, rest = make(case, torch.float64)
    if len(case.lead) == 3 and rest["attn_mask"] is not None:
        rest["attn_mask"] = rest["attn_mask"].view(*case.lead[:-1], 1, 1, case.lead[-1])
    expected = run(reference, tensors, rest)
    if len(case.lead) == 3 and rest["attn_mask"] is not None:
        rest["attn_mask"] = rest["attn_mask"].view(-1, 1, 1, case.lead[-1])
    torch.testing.assert_close(run(lowrank_attention, tensors, rest), expected)


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9])
def test_gradients_of_a_row_whose_scores_are_all_about_the_lowest(lowest):
    """As transformers masks a sequence that is all padding."""
    tensors, rest = make(Case((2, 7), 8, (2, 2), 4))
    rest["attn_mask"] = torch.zeros(2, 1, 1, 7)
    rest["attn_mask"][1] = lowest
    grad = torch.randn(2, 7, 8)
    actual = differentiate(lowrank_attention, tensors, rest, grad, torch.float32)
    expected = differentiate(reference, tensors, rest, grad, torch.float32)
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_no_second_derivative_is_made_up():
    tensors, rest = make(CASES[0])
    y = run(lowrank_attention, tensors, rest)
    (d_x,) = torch.autograd.grad(y.square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        d_x.sum().backward()


def test_no_forward_derivative_is_made_up():
    tensors, rest = make(CASES[0])
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    with pytest.raises(NotImplementedError, match="lowrank_attention: has no forward-mode derivative"):
        torch.func.jvp(lambda x: run(lowrank_attention, plain | {"x": x}, rest), (plain["x"],), (plain["x"],))
    with torch.autograd.forward_ad.dual_level():
        assert run(lowrank_attention, plain, rest).shape == (2, 5, 8)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_gradcheck(case):
    tensors, rest = make(case, torch.float64)
    names = list(tensors)

    def function(*leaves):
        return run(lowrank_attention, dict(zip(names, leaves, strict=True)), rest)

    assert torch.autograd.gradcheck(function, list(tensors.values()))


def test_partial_gradients():
    tensors, rest = make(CASES[1])
    whole = torch.autograd.grad(run(lowrank_attention, tensors, rest).sum(), list(tensors.values()))
    for needed, expected in zip(tensors, whole, strict=True):
        leaves = {name: tensor.detach().requires_grad_(name == needed) for name, tensor in tensors.items()}
        run(lowrank_attention, leaves, rest).sum().backward()
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == {needed}
        torch.testing.assert_close(leaves[needed].grad, expected)


def test_a_mask_and_rotary_tables_may_learn():
    tensors, rest = make(CASES[2]._replace(rotary="shared"), torch.float64)
    learnt = [rest["attn_mask"].requires_grad_(), *(table.requires_grad_() for table in rest["rotary"])]
    actual = torch.autograd.grad(run(lowrank_attention, tensors, rest).square().sum(), learnt)
    expected = torch.autograd.grad(run(reference, tensors, rest).square().sum(), learnt)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_query_without_keys_gives_nothing(dtype, kind):
    tensors, rest = make(Case((2, 5), 8, (2, 2), 4, biases=False, residual=False, norm="none"), dtype)
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    allowed[1, :, 3] = False
    mask = allowed if kind == "bool" else torch.zeros(2, 1, 5, 5).masked_fill(~allowed, -torch.inf)
    with torch.no_grad():
        y = run(lowrank_attention, tensors, rest | {"attn_mask": mask})
    assert torch.equal(y[1, 3], torch.zeros_like(y[1, 3]))
    assert y[0].abs().min() > 0


def test_what_is_masked_does_not_count():
    tensors, rest = make(Case((1, 6), 8, (2, 2), 4))
    with torch.no_grad():
        short = run(lowrank_attention, {n: t[:, :4] if n in ("x", "residual") else t for n, t in tensors.items()}, rest)
        mask = torch.tensor([True] * 4 + [False] * 2)
        long = run(lowrank_attention, tensors, rest | {"attn_mask": mask})
    torch.testing.assert_close(long[:, :4], short)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_first(kind):
    tensors, rest = make(CASES[0]._replace(norm=kind), torch.float64)
    actual = run(lowrank_attention, tensors, rest, norm_first=True)
    weight, bias = tensors.pop("weight"), tensors.pop("bias", None)
    normed = (
        F.layer_norm(tensors["x"], (8,), weight, bias, 1e-5)
        if kind == "layer"
        else F.rms_norm(tensors["x"], (8,), weight, 1e-5)
    )
    expected = run(reference, tensors | {"x": normed}, rest | {"norm": "none"})
    torch.testing.assert_close(actual, expected)


def test_scale():
    tensors, rest = make(CASES[1], torch.float64)
    expected = run(reference, tensors, rest, scale=0.3)
    torch.testing.assert_close(run(lowrank_attention, tensors, rest, scale=0.3), expected)


def test_dropout_zeroes_before_the_residual():
    tensors, rest = make(Case((50, 8), 8, (2, 2), 4, norm="none"))
    plain = run(lowrank_attention, {**tensors, "residual": None}, rest)
    dropped = run(lowrank_attention, tensors, rest, dropout_p=0.25) - tensors["residual"]
    zero = dropped.abs() < 1e-6
    assert 0.2 < zero.float().mean() < 0.3
    torch.testing.assert_close(dropped[~zero], plain[~zero] / 0.75, rtol=1e-4, atol=1e-5)


def test_dropout_of_the_probabilities():
    """The mean over many draws is what it is without; a single draw is not."""
    tensors, rest = make(Case((1, 6), 8, (2, 2), 4, residual=False, norm="none"))
    tensors["x"] = tensors["x"].detach().expand(8000, 6, 8)
    with torch.no_grad():
        y = run(lowrank_attention, tensors, rest, attention_dropout_p=0.3)
        expected = run(lowrank_attention, tensors | {"x": tensors["x"][:1]}, rest)
    assert (y[0] - expected[0]).abs().max() > 0.01
    torch.testing.assert_close(y.mean(0), expected[0], atol=5 * (y.std(0) / 8000**0.5).max().item(), rtol=0)


@pytest.mark.parametrize("dropout", [{"dropout_p": 0.3}, {"attention_dropout_p": 0.3}])
def test_a_seed_fixes_the_dropout(dropout):
    tensors, rest = make(CASES[0])
    before = torch.get_rng_state()
    first = run(lowrank_attention, tensors, rest, seed=3, **dropout)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(run(lowrank_attention, tensors, rest, seed=3, **dropout), first)
    assert not torch.equal(run(lowrank_attention, tensors, rest, seed=4, **dropout), first)
    assert not torch.equal(run(lowrank_attention, tensors, rest, **dropout), first)


@pytest.mark.parametrize("grad", [True, False])
def test_non_contiguous_arguments(grad):
    tensors, rest = make(CASES[1])
    with torch.set_grad_enabled(grad):
        expected = run(lowrank_attention, tensors, rest)
        strided = {n: t.detach().t().contiguous().t() if t.dim() == 2 else t for n, t in tensors.items()}
        grown = torch.randn(6, 11, 20)
        grown[1:4, 2:9, 5:13] = tensors["x"].detach()
        assert torch.equal(run(lowrank_attention, strided | {"x": grown[1:4, 2:9, 5:13]}, rest), expected)


def _values(tensors: dict[str, Tensor], rest: dict) -> list:
    """The operator's arguments."""
    kept, (cos, sin) = rest["kept"], rest["rotary"] or (None, None)
    mask = rest["attn_mask"]
    if mask is not None:
        batch, length, _ = tensors["x"].shape
        mask = mask.expand(batch, rest["num_heads"], length, length)
    get = tensors.get
    return [
        get("x"), get("down_qkv"), get("up_q"), kept[0], get("up_k"), kept[1], get("up_v"), kept[2], get("bias_qkv"),
        get("down_o"), get("up_o"), kept[3], get("bias_o"), get("residual"), get("weight"), get("bias"), mask,
        rest["cu_seqlens"], cos, sin, rest["max_seqlen"], rest["num_heads"], rest["num_kv_heads"], rest["is_causal"],
        0.5, rest["norm"], 1e-5,
    ]  # fmt: skip


@pytest.mark.parametrize("case", FEW, ids=str)
def test_opcheck(case):
    values = _values(*make(case))
    torch.library.opcheck(torch.ops.lpaf_kernels.lowrank_attention, values)
    plain = [value.detach() if isinstance(value, Tensor) else value for value in values]
    torch.library.opcheck(torch.ops.lpaf_kernels.lowrank_attention_forward, plain)


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_compiles_whole_without_recompilation(case, grad):
    tensors, rest = make(case)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def block(x: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
        return run(lowrank_attention, tensors | {"x": x, "residual": residual}, rest | {"attn_mask": mask})

    compiled = torch.compile(block, fullgraph=True, backend=counter)
    rest["rotary"] = None
    with torch.set_grad_enabled(grad):
        for length in (4, 9, 33):
            x, residual, mask = torch.randn(3, length, 8), torch.randn(3, length, 8), torch.rand(3, 1, 1, length) < 0.7
            for tensor, dim in ((x, 1), (residual, 1), (mask, 3)):
                torch._dynamo.mark_dynamic(tensor, dim)
            y = compiled(x, residual, mask)
            assert torch.equal(y, block(x, residual, mask))
            if grad:
                leaves = [tensor for name, tensor in tensors.items() if name not in ("x", "residual")]
                for actual, expected in zip(
                    torch.autograd.grad(y.square().sum(), leaves),
                    torch.autograd.grad(block(x, residual, mask).square().sum(), leaves),
                    strict=True,
                ):
                    torch.testing.assert_close(actual, expected)
    assert counter.frame_count == 1


def test_exports():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            tensors, self.rest = make(CASES[0])
            leaves = {name: nn.Parameter(t.detach()) for name, t in tensors.items() if name not in ("x", "residual")}
            self.tensors = nn.ParameterDict(leaves)

        def forward(self, x):
            return run(lowrank_attention, {**self.tensors, "x": x, "residual": x}, self.rest)

    block = Block()
    shapes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length")},)
    program = torch.export.export(block, (torch.randn(3, 4, 8),), dynamic_shapes=shapes)
    x = torch.randn(5, 9, 8)
    assert torch.equal(program.module()(x), block(x))


def test_autocast():
    tensors, rest = make(CASES[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(lowrank_attention, tensors, rest)
    assert y.dtype == torch.bfloat16
    half = {name: tensor.detach().bfloat16() for name, tensor in tensors.items()}
    assert torch.equal(y, run(lowrank_attention, half, rest))
    y.sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in tensors.values())


def test_checkpointing():
    tensors, rest = make(CASES[1])
    leaves = list(tensors.values())

    def block(x: Tensor) -> Tensor:
        return run(lowrank_attention, tensors | {"x": x}, rest)

    expected = torch.autograd.grad(block(tensors["x"]).square().sum(), leaves)
    again = torch.utils.checkpoint.checkpoint(block, tensors["x"], use_reentrant=False)
    for actual, wanted in zip(torch.autograd.grad(again.square().sum(), leaves), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.skipif(not op._HAS_NATIVE, reason="_ops_cpu.so was not built")
@pytest.mark.parametrize("length", [1, 2, 60, 61, 150, 700])
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("is_causal", [False, True])
def test_native_sequences_do_not_depend_on_their_neighbours(length, threads, is_causal):
    case = Case((4, length), 48, (2, 1), 16, (20, 41, 17, 33), (0, 5, 0, 7), mask="padding", is_causal=is_causal)
    tensors, rest = make(case)
    rest["attn_mask"][2] = True

    def block(at: slice) -> Tensor:
        part = {name: tensors[name][at] for name in ("x", "residual")}
        return run(lowrank_attention, tensors | part, rest | {"attn_mask": rest["attn_mask"][at]})

    with torch.no_grad():
        alone = block(slice(2, 3))
        torch.set_num_threads(threads)
        together = block(slice(0, 4))
    # The order of every sum follows from the sequence's own length.
    assert torch.equal(together[2:3], alone)


@pytest.mark.skipif(not op._HAS_NATIVE, reason="_ops_cpu.so was not built")
@pytest.mark.parametrize("seeds", [range(start, start + 20) for start in range(0, 80, 20)], ids=str)
def test_native_path(seeds, instruction_set):
    for seed in seeds:
        instruction_set(native.check_attention, seed)


@pytest.mark.skipif(not op._HAS_NATIVE, reason="_ops_cpu.so was not built")
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_native_softmax_over_a_wide_range(scale, assert_accurate):
    tensors, rest = make(Case((2, 65), 48, (3, 3), 16, (20, 41, 17, 33), norm="none"))
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    with torch.no_grad():
        results = [run(f, t, rest, scale=scale) for f, t in ((lowrank_attention, tensors), (chain, tensors))]
        assert_accurate(*results, run(chain, wide, rest, scale=scale))


def test_nan_and_infinity_stay_in_their_sequence():
    tensors, rest = make(Case((3, 5), 8, (2, 2), 4))
    with torch.no_grad():
        expected = run(lowrank_attention, tensors, rest)
        tensors["x"][1, 2, 3] = torch.nan
        y = run(lowrank_attention, tensors, rest)
    assert y[1].isnan().all()
    assert torch.equal(y[0], expected[0])
    assert torch.equal(y[2], expected[2])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": 3}, TypeError, "x: expected a torch.Tensor"),
        ({"x": torch.ones(8)}, ValueError, r"x: expected shape \[..., length, in\], got \[8\]"),
        ({"x": torch.ones(2, 5, 9)}, ValueError, r"down_qkv: expected shape \[12, 9\]"),
        ({"up_q": torch.ones(3, 9)}, ValueError, "bias_qkv: expected shape"),
        ({"up_k": torch.ones(4)}, ValueError, "up_k: expected two dimensions"),
        ({"bias_o": torch.ones(7)}, ValueError, r"bias_o: expected shape \[8\]"),
        ({"down_o": torch.ones(2, 8).double()}, TypeError, "down_o, up_o, bias_o: expected dtype torch.float32"),
        ({"bias_qkv": torch.ones(1, 24)}, ValueError, r"bias_qkv: expected shape \[24\]"),
        ({"num_heads": True}, ValueError, "num_heads: expected a whole number of at least 1, got True"),
        ({"is_causal": "no"}, TypeError, "is_causal: expected a bool, got 'no'"),
        ({"kept": None}, ValueError, "kept: expected four entries"),
        ({"norm": nn.LayerNorm(8)}, TypeError, "norm: expected a Norm, got LayerNorm"),
        ({"norm": Norm("rms", torch.ones(8), torch.ones(8))}, ValueError, "norm.bias: expected None for rms"),
        ({"norm": Norm("layer", torch.ones(8), None, -5.0)}, ValueError, "norm.eps: expected at least 0"),
        ({"num_heads": 0}, ValueError, "num_heads: expected a whole number of at least 1, got 0"),
        ({"num_heads": 4, "num_kv_heads": 3}, ValueError, r"num_kv_heads: expected a divisor of 4 \(num_heads\)"),
        ({"num_heads": 3, "num_kv_heads": 3}, ValueError, r"up_q: expected 3 heads of 2 columns"),
        ({"num_heads": 4, "num_kv_heads": 2}, ValueError, r"up_k: expected 2 heads of 2 columns \(as those of up_q\)"),
        ({"kept": (None, None)}, ValueError, "kept: expected four entries"),
        ({"kept": (torch.ones(1), None, None, None)}, TypeError, "kept: expected int32 or int64"),
        ({"attn_mask": torch.ones(3, 1, 1, 5) > 0}, ValueError, r"broadcasts to \[2, 2, 5, 5\], got \[3, 1, 1, 5\]"),
        ({"attn_mask": torch.ones(5, 5).int()}, TypeError, "attn_mask: expected bool or float32, got torch.int32"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, r"x: expected shape \[tokens, in\] with cu_seqlens"),
        ({"rotary": (torch.ones(5, 4), torch.ones(4, 4))}, ValueError, r"rotary sin: expected shape \[5, 4\]"),
        ({"rotary": torch.ones(5, 4)}, ValueError, "rotary: expected"),
        ({"residual": torch.ones(2, 4, 8)}, ValueError, r"residual: expected shape \[2, 5, 8\]"),
        ({"dropout_p": -0.1}, ValueError, r"dropout_p: expected a number in \[0, 1\), got -0.1"),
        ({"attention_dropout_p": 1.0}, ValueError, "attention_dropout_p: expected a number"),
        ({"max_seqlen": 5}, ValueError, "max_seqlen: expected None without cu_seqlens, got 5"),
        ({"seed": 0.5}, TypeError, "seed: expected an integer or None, got 0.5"),
        ({"norm": Norm("batch", torch.ones(8))}, ValueError, "norm.kind: expected layer or rms"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_bad_input(change, error, text, grad):
    tensors, _ = make(CASES[0]._replace(norm="none"))
    with torch.set_grad_enabled(grad), pytest.raises(error, match=text):
        lowrank_attention(**{**tensors, "num_heads": 2, **change})


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "text"),
    [
        (torch.tensor([0.0, 5.0]), TypeError, "cu_seqlens: expected int32 or int64, got torch.float32"),
        (torch.tensor([[0, 5]]), ValueError, r"cu_seqlens: expected shape \[sequences \+ 1\]"),
        (torch.tensor([0, 4]), ValueError, "cu_seqlens: expected ascending positions from 0 to 5"),
        (torch.tensor([0, 6, 5]), ValueError, "cu_seqlens: expected ascending positions from 0 to 5"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_sequences(cu_seqlens, error, text, dtype):
    tensors, _ = make(Case((5,), 8, (2, 2), 4, norm="none"), dtype)
    with torch.no_grad(), pytest.raises(error, match=text):
        lowrank_attention(**tensors, num_heads=2, cu_seqlens=cu_seqlens)
    with pytest.raises(ValueError, match="max_seqlen: expected at least 3"):
        lowrank_attention(**tensors, num_heads=2, cu_seqlens=torch.tensor([0, 3, 5]), max_seqlen=2)
    mask = torch.ones(5, 5) > 0
    with pytest.raises(ValueError, match="attn_mask: expected None together with cu_seqlens"):
        lowrank_attention(**tensors, num_heads=2, cu_seqlens=torch.tensor([0, 5]), attn_mask=mask)
