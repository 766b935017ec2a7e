"""Kernels run by Triton's interpreter on the CPU, in a process of their own: it must be chosen before triton loads."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from accuracy import check_accurate
from lpaf_kernels.triton.launch import LAUNCHES, Launch, head_columns

if TYPE_CHECKING:
    from lpaf_kernels.triton.lowrank_ffn import Factors, Norm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "relu", "silu", "tanh")
# Beside the shipped ones: tiles so small that small problems have many, and splits.
TINY = {
    "project": [Launch("project", 16, 0, 16, 4, 1), Launch("project", 16, 0, 16, 4, 1, splits=3, max_width=32)],
    "expand": [Launch("expand", 16, 16, 16, 4, 1), Launch("expand", 16, 32, 32, 4, 1)],
    "one_kernel": [Launch("one_kernel", 16, 16, 16, 4, 1, splits=1), Launch("one_kernel", 16, 16, 32, 4, 1, splits=3)],
    "outer": [Launch("outer", 0, 16, 16, 4, 1, splits=2), Launch("outer", 0, 32, 16, 4, 1, max_width=48)],
    "ffn": [
        Launch("ffn", 16, 16, 16, 4, 1, splits=1),
        Launch("ffn", 16, 16, 32, 4, 1, splits=3),
        Launch("ffn", 32, 32, 16, 4, 1, splits=2),
    ],
    "ffn_wide": [
        Launch("ffn_wide", 16, 16, 16, 4, 1, max_width=48),
        Launch("ffn_wide", 16, 32, 32, 4, 1, splits=3),
    ],
    "ffn_rows": [Launch("ffn_rows", 16, 16, 0, 4, 1), Launch("ffn_rows", 16, 32, 0, 4, 1, splits=3)],
    "ffn_weights": [
        Launch("ffn_weights", 0, 16, 16, 4, 1, splits=2),
        Launch("ffn_weights", 0, 32, 16, 4, 1, max_width=176),
    ],
    "attend": [
        Launch("attend", 32, 16, 256, 4, 1),
        Launch("attend", 16, 32, 256, 4, 1, max_width=144),
        Launch("attend", 32, 32, 64, 4, 1, max_width=48),
    ],
    "close": [Launch("close", 16, 16, 16, 4, 1), Launch("close", 32, 32, 16, 4, 1, max_width=80)],
    "masked": [Launch("masked", 16, 16, 16, 4, 1), Launch("masked", 32, 16, 32, 4, 1)],
    "decode": [Launch("decode", 16, 16, 16, 4, 1), Launch("decode", 32, 16, 32, 4, 1)],
    "decode_grad": [Launch("decode_grad", 16, 16, 16, 4, 1), Launch("decode_grad", 32, 16, 32, 4, 1)],
    "masked_grads": [Launch("masked_grads", 16, 16, 16, 4, 1), Launch("masked_grads", 16, 32, 32, 4, 1)],
}


def start_process() -> None:
    """What the child process does first."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()


def act(y: Tensor, activation: str) -> Tensor:
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return {"none": lambda t: t, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh}[activation](y)


def chain(
    x: Tensor, down: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """z, the activation's input and the result, as torch computes them."""
    z = F.linear(x, down)
    pre = F.linear(z[:, : up.shape[0]], up.t(), bias)
    if kept is not None:
        pre = pre.index_add(1, kept, z[:, up.shape[0] :])
    return z, pre, act(pre, activation)


def draw_launch(kernel: str, seed: int) -> Launch:
    """Every other time a shipped one, all of them in turn."""
    if seed % 2:
        return TINY[kernel][seed // 2 % len(TINY[kernel])]
    shipped = [launch for launch in LAUNCHES.values() if launch.kernel == kernel]
    return shipped[seed // 2 % len(shipped)]


def check_lowrank_sparse_linear(seed: int, device: str = "cpu") -> None:
    """Forward by both ways and backward of one drawn problem, against float64 and within twice the chain's error."""
    with torch.device(device):
        _check(seed)


def _check(seed: int) -> None:
    from lpaf_kernels.triton import lowrank_sparse_linear as kernels

    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 3]
    activation = draw.choice(ACTIVATIONS)
    rows = draw.choice([0, 1, 15, 16, 33, 70]) if seed % 8 else draw.randint(1, 140)
    d_in, d_out = draw.randint(1, 70), draw.randint(2, 90)
    rank = draw.choice([0, 1, 7, 16, 20, 41, 80, draw.randint(1, 150)])
    kept = draw.choice([0, 0, 1, d_out // 2, d_out])
    if rank + kept == 0:
        rank = 3
    if rank == 0:
        activation = "none"  # its derivative would go the chain's way
    x = torch.randn(rows, d_in).to(dtype)
    if draw.random() < 0.3:  # rows apart in memory
        x = torch.randn(rows, 2 * d_in + 3).to(dtype)[:, 1 : d_in + 1]
    down = (torch.randn(rank + kept, d_in) / d_in**0.5).to(dtype)
    up = (torch.randn(rank, d_out) / max(rank, 1) ** 0.5).to(dtype)
    index = draw.choice([torch.int32, torch.int64])
    positions = torch.randperm(d_out)[:kept].sort().values.to(index) if kept else None
    bias = torch.randn(d_out).to(dtype) if draw.random() < 0.7 else None
    z_chain, pre_chain, y_chain = chain(x, down, up, positions, bias, activation)
    wide = [None if t is None else t.double() for t in (x, down, up, bias)]
    z_exact, pre_exact, y_exact = chain(wide[0], wide[1], wide[2], positions, wide[3], activation)
    save_pre = activation in ("gelu", "gelu_tanh", "silu")

    z, splits, _ = kernels.project(x, down, draw_launch("project", seed))
    y, pre = kernels.expand(z, splits, up, dtype, draw_launch("expand", seed), positions, bias, activation, save_pre)
    check_accurate(y, y_chain, y_exact)
    launch = draw_launch("one_kernel", seed)
    if rank + kept <= launch.max_width:
        y, z, pre = kernels.one_kernel(x, down, up, launch, positions, bias, activation, True, save_pre)
        check_accurate(y, y_chain, y_exact)
    else:
        z, splits, _ = kernels.project(x, down, draw_launch("project", seed), keep_splits=False)
        assert splits == 1
    check_accurate(z[:, : rank + kept], z_chain, z_exact)
    if save_pre:
        check_accurate(pre, pre_chain, pre_exact)

    # The backward starts from what torch's forward in this dtype saved; all of the derivative is taken there.
    grad = torch.randn(rows, d_out).to(dtype)
    z = torch.empty_like(z)  # the padding of the rows is NaN
    z[:, : rank + kept] = z_chain
    saved = None if activation == "none" else (pre_chain if save_pre else y_chain)
    d_z, _, d_pre = kernels.project(
        grad, up, draw_launch("project", seed), positions, saved, activation, keep_splits=False
    )
    d_x, _ = kernels.expand(d_z, 1, down, dtype, draw_launch("expand", seed + 1))
    d_down, _ = kernels.outer(d_z, rank + kept, x, draw_launch("outer", seed))
    d_up, d_bias = kernels.outer(z, rank, d_pre, draw_launch("outer", seed + 1), True)
    references = []
    for to in (dtype, torch.float64):
        g = grad.to(to)
        if activation != "none":
            leaf = pre_chain.to(to).requires_grad_()
            (g,) = torch.autograd.grad(act(leaf, activation), leaf, g)
        dz = g @ up.to(to).t()
        if kept:
            dz = torch.cat([dz, g.index_select(1, positions)], 1)
        low = z_chain.to(to)[:, :rank]
        references.append((dz @ down.to(to), dz.t() @ x.to(to), low.t() @ g, g.sum(0)))
    for actual, chained, exact in zip((d_x, d_down, d_up, d_bias), *references):
        check_accurate(actual, chained, exact)


class Drawn(NamedTuple):
    """The sizes of drawn factors."""

    rank: int
    kept: int
    index: torch.dtype
    biased: bool

    def factors(self, d_in: int, d_out: int, dtype: torch.dtype) -> Factors:
        from lpaf_kernels.triton.lowrank_ffn import Factors

        positions = torch.randperm(d_out)[: self.kept].sort().values.to(self.index)
        return Factors(
            (torch.randn(self.rank + self.kept, d_in) / d_in**0.5).to(dtype),
            (torch.randn(self.rank, d_out) / max(self.rank, 1) ** 0.5).to(dtype),
            positions if self.kept else None,
            torch.randn(d_out).to(dtype) if self.biased else None,
        )


def _draw_factors(draw: random.Random, d_out: int, most: int, ranks: Sequence[int] = ()) -> Drawn:
    """At most ``most`` rank and kept columns, at least one of them."""
    kept = min(draw.choice([0, 0, 1, d_out // 2, d_out]), most)
    rank = min(draw.choice(ranks or [0, 1, 7, 16, 20, 41, 80, draw.randint(1, 150)]), most - kept)
    rank = max(rank, 1) if kept == 0 else rank
    return Drawn(rank, kept, draw.choice([torch.int32, torch.int64]), draw.random() < 0.7)


def _apart(rows: int, cols: int, draw: random.Random, dtype: torch.dtype) -> Tensor:
    """Random rows, sometimes apart in memory."""
    if draw.random() < 0.3:
        return torch.randn(rows, 2 * cols + 3).to(dtype)[:, 1 : cols + 1]
    return torch.randn(rows, cols).to(dtype)


def ffn_chain(
    x: Tensor, first: Factors, second: Factors, gate: Factors | None, activation: str, residual: Tensor | None,
    norm: Norm | None,
) -> Tensor:  # fmt: skip
    """The block as torch computes it, in the dtype of ``x``."""

    def to(tensor: Tensor | None) -> Tensor | None:
        return tensor.to(x.dtype) if tensor is not None and tensor.is_floating_point() else tensor

    def linear(x: Tensor, factors: Factors) -> Tensor:
        return chain(x, to(factors.down), to(factors.up), factors.kept, to(factors.bias), "none")[2]

    hidden = linear(x, first)
    hidden = act(hidden, activation) if gate is None else act(linear(x, gate), activation) * hidden
    return ended(linear(hidden, second), residual, norm)


def ended(y: Tensor, residual: Tensor | None, norm: Norm | None) -> Tensor:
    """The end of a block, in the dtype of ``y``."""
    if residual is not None:
        y = y + residual.to(y.dtype)
    if norm is None:
        return y
    weight, bias = (None if tensor is None else tensor.to(y.dtype) for tensor in (norm.weight, norm.bias))
    if norm.kind == "layer":
        return F.layer_norm(y, y.shape[1:], weight, bias, norm.eps)
    return F.rms_norm(y, y.shape[1:], weight, norm.eps)


def check_lowrank_ffn(seed: int, device: str = "cpu") -> None:
    """The forward of one drawn block, against float64 and within twice the chain's error."""
    with torch.device(device):
        _check_ffn(seed, wide=False)


def check_lowrank_ffn_wide(seed: int, device: str = "cpu") -> None:
    """The same in passes over many rank columns."""
    with torch.device(device):
        _check_ffn(seed, wide=True)


def _norm(draw: random.Random, size: int, dtype: torch.dtype) -> Norm | None:
    from lpaf_kernels.triton.lowrank_ffn import Norm

    kind = draw.choice(["none", "layer", "rms"])
    if kind == "none":
        return None
    bias = torch.randn(size).to(dtype) if kind == "layer" and draw.random() < 0.7 else None
    return Norm(kind, torch.randn(size).to(dtype), bias, draw.choice([1e-5, 1e-12, 0.1]))


def _check_ffn(seed: int, wide: bool) -> None:
    from lpaf_kernels.triton import lowrank_ffn as kernels

    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 3]
    activation = ACTIVATIONS[seed // 3 % 6]
    launches = kernels.WideLaunches(*(draw_launch(name, seed) for name in ("project", "ffn_wide", "expand")))
    launch = draw_launch("ffn", seed)
    rows = draw.choice([0, 1, 15, 16, 33, 70]) if seed % 8 else draw.randint(1, 140)
    d_in, hidden, d_out = draw.randint(1, 70), draw.randint(2, 120), draw.randint(2, 90)
    if wide:  # small otherwise: the interpreter takes seconds for a rank of 1024
        rows, hidden, d_out = min(rows, 33), min(hidden, 70), min(d_out, 40)
    gated = draw.random() < 0.3
    # The smallest tiles make the most steps.
    ranks = ((41, 384, 1024) if launches.wide in LAUNCHES.values() else (1, 20, 130, 273)) if wide else ()
    most = 2048 if wide else launch.max_width
    inner = most // 2 if gated else most
    first, gate = _draw_factors(draw, hidden, inner, ranks), _draw_factors(draw, hidden, inner, ranks)
    second = _draw_factors(draw, d_out, most, ranks)
    residual = _apart(rows, d_out, draw, dtype) if draw.random() < 0.6 else None
    norm = _norm(draw, d_out, dtype)
    x = _apart(rows, d_in, draw, dtype)
    first, second = first.factors(d_in, hidden, dtype), second.factors(hidden, d_out, dtype)
    gate = gate.factors(d_in, hidden, dtype) if gated else None
    block = (first, second, gate, activation, residual, norm)
    chained = ffn_chain(x, *block)
    exact = ffn_chain(x.double(), *block)
    options = {"gate": gate, "activation": activation, "residual": residual, "norm": norm}
    if wide:
        y = kernels.forward_wide(x, first, second, launches, **options)
    else:
        y = kernels.forward(x, first, second, launch, **options)
    check_accurate(y, chained, exact)


def check_lowrank_ffn_backward(seed: int, device: str = "cpu") -> None:
    """The backward of one drawn block from the z that its forward saved, against float64."""
    with torch.device(device):
        _check_ffn_backward(seed)


def _check_ffn_backward(seed: int) -> None:
    from lpaf_kernels.triton import lowrank_ffn as kernels

    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 3]
    activation = ACTIVATIONS[seed // 3 % 6]
    names = ("project", "expand", "outer", "ffn_rows", "ffn_weights")
    launches = kernels.BackwardLaunches(*(draw_launch(name, seed) for name in names))
    launch = draw_launch("ffn", seed)
    most = min(launch.max_width, launches.rows.max_width, launches.weights.max_width)
    rows = draw.choice([0, 1, 2, 15, 16, 33, 50]) if seed % 8 else draw.randint(1, 140)
    d_in, hidden, d_out = draw.randint(1, 70), draw.randint(2, 100), draw.randint(2, 70)
    gated = draw.random() < 0.4
    inner, ranks = (most // 2, (0, 1, 7, 16, 41)) if gated else (most, ())
    drawn = [_draw_factors(draw, size, held, ranks) for size, held in ((hidden, inner), (d_out, most), (hidden, inner))]
    # The largest error of a handful of entries is a matter of luck: several draws are measured together.
    few = min(rows, d_in, hidden, d_out, *(part.rank + part.kept for part in drawn)) < 4
    results = []
    for _ in range(8 if rows in (1, 2) else 3 if few else 1):
        x = _apart(rows, d_in, draw, dtype)
        grad = _apart(rows, d_out, draw, dtype)
        first, second = drawn[0].factors(d_in, hidden, dtype), drawn[1].factors(hidden, d_out, dtype)
        gate = drawn[2].factors(d_in, hidden, dtype) if gated else None
        y, *saved = kernels.forward_with_z(x, first, second, launch, gate=gate, activation=activation)
        if seed % 8 == 0:
            again = kernels.intermediates(x, first, second, launch, gate=gate, activation=activation)
            assert all(map(torch.equal, again, saved))
        found = kernels.backward(grad, x, saved, first, second, launches, gate=gate, activation=activation)
        chained, exact = (
            _ffn_gradients(grad, x, saved, first, second, gate, activation, to) for to in (dtype, torch.double)
        )
        y_chained, y_exact = (
            ffn_chain(x.to(to), first, second, gate, activation, None, None) for to in (dtype, torch.double)
        )
        results.append([(y, y_chained, y_exact)])
        results[-1] += [(getattr(found, name), chained[name], exact[name]) for name in chained]
    for same in zip(*results, strict=True):
        check_accurate(*(torch.stack(tensors) for tensors in zip(*same, strict=True)))


def _ffn_gradients(
    grad: Tensor, x: Tensor, saved: Sequence[Tensor], first: Factors, second: Factors, gate: Factors | None,
    activation: str, dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients by name, by torch in ``dtype`` from the saved z: no kink of relu lies between them."""
    leaves = {"up1": first.up, "bias1": first.bias, "down2": second.down, "up2": second.up, "bias2": second.bias}
    leaves["z1"] = saved[0][:, : first.width]
    if gate is not None:
        leaves |= {"up_gate": gate.up, "bias_gate": gate.bias, "z_g": saved[1][:, : gate.width]}
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items() if leaf is not None}

    def layer(z: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor | None) -> Tensor:
        y = F.linear(z[:, : up.shape[0]], up.t(), bias)
        return y if kept is None else y.index_add(1, kept, z[:, up.shape[0] :])

    h = layer(leaves["z1"], leaves["up1"], first.kept, leaves.get("bias1"))
    if gate is None:
        h = act(h, activation)
    else:
        h = act(layer(leaves["z_g"], leaves["up_gate"], gate.kept, leaves.get("bias_gate")), activation) * h
    y = layer(F.linear(h, leaves["down2"]), leaves["up2"], second.kept, leaves.get("bias2"))
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad.to(dtype))))
    d_z1 = found.pop("z1")
    found |= {"x": d_z1 @ first.down.to(dtype), "down1": d_z1.t() @ x.to(dtype)}
    if gate is not None:
        d_z_g = found.pop("z_g")
        found["x"] = found["x"] + d_z_g @ gate.down.to(dtype)
        found["down_gate"] = d_z_g.t() @ x.to(dtype)
    return found


def check_lowrank_ffn_plan(seed: int) -> None:
    """The operator's forward and backward as the plan "block" makes them, with residual and norm."""
    from lpaf_kernels.ops.lowrank_ffn import chain as layers
    from lpaf_kernels.ops.lowrank_ffn import chain_backward
    from lpaf_kernels.tuning import FfnShape, Plan
    from lpaf_kernels.tuning import lowrank_ffn as plans
    from lpaf_kernels.tuning.tune import double
    from lpaf_kernels.tuning.tune_lowrank_ffn import make_ffn_problem

    torch.manual_seed(seed)
    gate, norm = 9 * (seed % 2), ("none", "layer", "rms")[seed % 3]
    # A forward with more columns than a launch holds of 4-byte numbers takes passes over them.
    ranks = (41, 300) if seed == 0 else (12, 20)
    shape = FfnShape("lowrank_ffn", "forward", "float32", 24, 50, 33, ranks, (5, 7), gate)
    problem = make_ffn_problem(21, shape, torch.float32, "cpu")
    weight, bias = torch.randn(2, 33)
    problem = problem._replace(residual=torch.randn(21, 33) if seed else None)
    if norm != "none":
        problem = problem._replace(norm=norm, eps=1e-5, norm_weight=weight, norm_bias=bias if norm == "layer" else None)
    exact = double(problem)
    check_accurate(plans.forward(Plan("block"), problem, 90), layers(*problem), layers(*exact))
    if seed == 0:
        return
    grad = torch.randn(21, 33)
    for needed in (lambda name: True, lambda name: name in ("x", "down_gate", "norm_weight")):
        tensors = {name: value for name, value in problem._asdict().items() if name not in plans.OTHERS}
        needs = [value is not None and needed(name) for name, value in tensors.items()]
        found = plans.backward(Plan("block"), problem, grad, needs, 90)
        chained, wide = chain_backward(grad, *problem, needs), chain_backward(grad.double(), *exact, needs)
        for results in zip(found, chained, wide, strict=True):
            check_accurate(*results)


@dataclass(frozen=True)
class Attention:
    """One drawn problem: Q, K and V of x by factors, and how rows attend."""

    x: Tensor
    factors: tuple[Factors, Factors, Factors]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bounds: list[int]
    mask: Tensor | None
    is_causal: bool
    rotary: tuple[Tensor, Tensor] | None
    scale: float

    def context(self, dtype: torch.dtype) -> Tensor:
        """As torch computes it in ``dtype``."""
        heads = []
        for factors, rotated in zip(self.factors, (True, True, False)):
            down, up, bias = (None if t is None else t.to(dtype) for t in (factors.down, factors.up, factors.bias))
            rows = chain(self.x.to(dtype), down, up, factors.kept, bias, "none")[1]
            rows = rows.unflatten(1, (-1, self.head_dim))
            if rotated and self.rotary is not None:
                cos, sin = (t.to(dtype).unsqueeze(1) for t in self.rotary)
                first, second = rows.chunk(2, -1)
                rows = rows * cos + torch.cat([-second, first], -1) * sin
            heads.append(rows.repeat_interleave(self.num_heads // rows.shape[1], 1).transpose(0, 1))
        sequences = [self._sequence(index, *heads) for index in range(len(self.bounds) - 1)]
        return torch.cat([torch.empty(0, self.num_heads * self.head_dim, dtype=dtype), *sequences])

    def _sequence(self, index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = slice(self.bounds[index], self.bounds[index + 1])
        length = rows.stop - rows.start
        mask = None
        if self.mask is not None:
            mask = self.mask[index if self.mask.shape[0] > 1 else 0]
            mask = mask.to(q.dtype) if mask.is_floating_point() else mask
        if self.is_causal:
            past = torch.ones(length, length, dtype=torch.bool).tril()
            if mask is None or mask.dtype == torch.bool:
                mask = past if mask is None else mask & past
            else:
                mask = mask.masked_fill(~past, float("-inf"))
        parts = (part[None, :, rows] for part in (q, k, v))
        context = F.scaled_dot_product_attention(*parts, attn_mask=mask, scale=self.scale)
        return context[0].transpose(0, 1).flatten(1)


def _mask(draw: random.Random, batch: int, heads: int, length: int, dtype: torch.dtype) -> Tensor | None:
    """Of every form, now and then with rows that attend to nothing."""
    kind = draw.choice(["none", "bool", "float", "lowest"])
    if kind == "none":
        return None
    sizes = [draw.choice([1, size]) for size in (batch, heads, length)]
    attended = torch.rand(*sizes, length) < draw.choice([0.3, 0.7, 0.95])
    if draw.random() < 0.5:
        attended[..., 0] = True
    if draw.random() < 0.3:  # keys apart in memory
        attended = attended.repeat_interleave(2, -1)[..., ::2]
    if kind == "bool":
        return attended
    least = float("-inf") if kind == "float" else torch.finfo(dtype).min
    return torch.randn(attended.shape).to(dtype).masked_fill(~attended, least)


def draw_attention(seed: int, launch: Launch) -> Attention:
    draw = random.Random(seed)
    dtype = DTYPES[seed % 3]
    turned = draw.random() < 0.3
    sizes = [size for size in (32, 64, 96, 128) if head_columns(size, turned) <= launch.block_k]
    head_dim = sizes[seed // 3 % len(sizes)]
    length = draw.choice([1, 15, 33, 70])
    # The interpreter is slow: few heads of long sequences.
    group, kv_heads = draw.choice([(1, 1), (1, 2), (2, 1)] if length > 33 else [(1, 3), (2, 1), (2, 2)])
    variable = draw.random() < 0.3
    if variable:
        lengths = [draw.choice([0, 1, length // 2, length]) for _ in range(draw.randint(1, 3))]
    else:
        lengths = [length] * (1 if length > 33 else draw.choice([0, 1, 2]))
    bounds = [0, *accumulate(lengths)]
    rows, d_in = bounds[-1], draw.randint(1, 70)
    sizes = (group * kv_heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    mask = None if variable else _mask(draw, len(lengths), group * kv_heads, length, dtype)
    rotary = None
    if turned:
        angles = 10 * torch.rand(rows, head_dim)
        rotary = angles.cos().to(dtype), angles.sin().to(dtype)
    # Up to 7 columns before the first are read with the others.
    factors = tuple(_draw_factors(draw, size, launch.max_width - 7).factors(d_in, size, dtype) for size in sizes)
    return Attention(
        _apart(rows, d_in, draw, dtype), factors,
        group * kv_heads, kv_heads, head_dim, bounds, mask, draw.random() < 0.3, rotary,
        draw.choice([head_dim**-0.5, 1.0 / head_dim]),
    )  # fmt: skip


def check_lowrank_attention(seed: int, device: str = "cpu") -> None:
    """The context of one drawn problem, against float64 and within twice the chain's error."""
    with torch.device(device):
        _check_attention(seed)


def _check_attention(seed: int) -> None:
    from lpaf_kernels.triton.lowrank_attention import Projection, attend
    from lpaf_kernels.triton.lowrank_sparse_linear import project

    torch.manual_seed(seed)
    launch = draw_launch("attend", seed)
    problem = draw_attention(seed, launch)
    draw = random.Random(seed)
    down = torch.cat([factors.down for factors in problem.factors])
    z, _, _ = project(problem.x, down, draw_launch("project", seed), keep_splits=False)
    if draw.random() < 0.3:  # rows apart in memory
        apart = torch.empty(z.shape[0], 2 * z.shape[1] + 3).to(z.dtype)[:, 1 : z.shape[1] + 1]
        z = apart.copy_(z)
    firsts = accumulate((factors.width for factors in problem.factors), initial=0)
    projections = [
        Projection(first, factors.up, factors.kept, factors.bias) for first, factors in zip(firsts, problem.factors)
    ]
    bounds = problem.bounds
    lengths = {stop - start for start, stop in pairwise(bounds)}
    variable = len(lengths) > 1 or (problem.mask is None and draw.random() < 0.3)
    context = attend(
        z, *projections, launch, num_heads=problem.num_heads, num_kv_heads=problem.num_kv_heads,
        length=max(lengths, default=1), scale=problem.scale,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32) if variable else None,
        mask=problem.mask, is_causal=problem.is_causal, rotary=problem.rotary,
    )  # fmt: skip
    check_accurate(context, problem.context(problem.x.dtype), problem.context(torch.float64))


def check_lowrank_attention_close(seed: int, device: str = "cpu") -> None:
    """The block's end of one drawn problem, against float64 and within twice the chain's error."""
    with torch.device(device):
        _check_close(seed)


def _check_close(seed: int) -> None:
    from lpaf_kernels.triton.lowrank_attention import close

    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 3]
    launch = draw_launch("close", seed)
    rows = draw.choice([0, 1, 15, 16, 33, 70]) if seed % 8 else draw.randint(1, 140)
    d_in, d_out = draw.randint(1, 140), draw.randint(2, 90)
    x = _apart(rows, d_in, draw, dtype)
    out = _draw_factors(draw, d_out, launch.max_width).factors(d_in, d_out, dtype)
    residual = _apart(rows, d_out, draw, dtype) if draw.random() < 0.6 else None
    norm = _norm(draw, d_out, dtype)
    references = []
    for to in (dtype, torch.float64):
        down, up, bias = (None if t is None else t.to(to) for t in (out.down, out.up, out.bias))
        references.append(ended(chain(x.to(to), down, up, out.kept, bias, "none")[2], residual, norm))
    check_accurate(close(x, out, launch, residual, norm), *references)


def check_lowrank_attention_plan(seed: int) -> None:
    """The operator's forward as the plan "block" makes it, from arguments as the operator gets them."""
    from lpaf_kernels.ops.lowrank_attention import chain as layers
    from lpaf_kernels.tuning import AttentionShape, Plan
    from lpaf_kernels.tuning import lowrank_attention as plans
    from lpaf_kernels.tuning.tune import double
    from lpaf_kernels.tuning.tune_lowrank_attention import make_attention_problem

    torch.manual_seed(seed)
    # Of o's columns no launch of "close" holds 81 of 4 bytes.
    ranks, norm = (12, 9, 20, 75 if seed == 3 else 17), ("none", "layer", "rms", "layer")[seed % 4]
    shape = AttentionShape(
        "lowrank_attention", "forward", "float32", 24, 2, 1 + seed % 2, 32, 33, ranks, (5, 0, 3, 6), seed % 2 == 1, 9
    )
    problem = make_attention_problem(2, shape, torch.float32, "cpu")
    x, weight, bias = problem.x, *torch.randn(2, 33)
    problem = problem._replace(x=x.transpose(0, 1).contiguous().transpose(0, 1), residual=torch.randn(2, 9, 33))
    if norm != "none":
        problem = problem._replace(norm=norm, eps=1e-5, norm_weight=weight, norm_bias=bias if norm == "layer" else None)
    if seed == 0:
        problem = problem._replace(attn_mask=(torch.rand(2, 1, 1, 9) < 0.7).expand(2, 2, 9, 9))
    elif seed == 1:  # angles of each sequence's own, additive numbers
        cos, sin = torch.rand(2, 2, 9, 32)
        problem = problem._replace(cos=cos, sin=sin, attn_mask=torch.randn(1, 2, 9, 9).expand(2, 2, 9, 9))
    elif seed == 2:
        bounds = torch.tensor([0, 7, 7, 18])
        residual = problem.residual.flatten(0, 1)
        problem = problem._replace(
            x=x.flatten(0, 1), residual=residual, cu_seqlens=bounds, max_seqlen=None, is_causal=True
        )
    problem = problem.with_length()
    actual = plans.forward(Plan("block"), problem.prepared(), 90)
    references = (layers(*given).reshape(actual.shape) for given in (problem, double(problem)))
    check_accurate(actual, *references)


def check_masked_linear(seed: int, device: str = "cpu") -> None:
    """Forward and gradients of one drawn layer, against float64 and within twice the error of torch's chain."""
    with torch.device(device):
        _check_masked(seed)


def _check_masked(seed: int) -> None:
    from lpaf_kernels import keep_threshold
    from lpaf_kernels.triton import masked_linear as kernels

    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 3]
    rows = draw.choice([0, 1, 15, 16, 33, 70]) if seed % 8 else draw.randint(1, 140)
    d_in, d_out = draw.choice([1, 16, 64, draw.randint(1, 90)]), draw.choice([1, 16, 64, draw.randint(1, 90)])
    stored = [draw.choice([dtype, torch.float32]) for _ in range(2)]
    weight = torch.randn(d_out, d_in).to(stored[0])
    # Coarse scores tie in masses, so that the tie's index falls between two columns of some row.
    scores = (torch.randn(d_out, d_in) * draw.choice([0, 1, 1000])).round().to(stored[1])
    threshold = keep_threshold(scores, draw.choice([0, 0.3, 0.7, 1]))
    if draw.random() < 0.1:
        threshold = threshold._replace(value=torch.tensor(torch.nan))
    selection = kernels.Selection(scores, *threshold)
    bias = torch.randn(d_out).to(dtype) if draw.random() < 0.7 else None
    x, grad = _apart(rows, d_in, draw, dtype), _apart(rows, d_out, draw, dtype)
    launch = draw_launch("masked", seed)
    found = [
        kernels.product(x, weight, selection, launch, transposed=True, bias=bias),
        kernels.product(grad, weight, selection, launch),
        *kernels.weight_grads(grad, x, weight, selection, draw_launch("masked_grads", seed)),
    ]
    mask = threshold.mask(scores)
    references = []
    for wide in (False, True):
        to, *parameters = (torch.float64,) * 3 if wide else (dtype, *stored)
        product = torch.promote_types(to, torch.float32)
        masked = torch.where(mask, weight.to(to), 0.0)
        g = grad.to(to).t() @ x.to(to)
        y = F.linear(x.to(to), masked, None if bias is None else bias.to(to))
        d_weight = torch.where(mask, g.to(parameters[0]), 0.0)
        d_scores = (weight.to(product) * g.to(product)).to(parameters[1])
        references.append((y, grad.to(to) @ masked, d_weight, d_scores))
    for actual, chained, exact in zip(found, *references, strict=True):
        check_accurate(actual, chained, exact)
    # Exactly nothing where the mask is 0.
    assert not found[2][~mask].any()


def check_decoded_embedding(seed: int, device: str = "cpu") -> None:
    """One drawn embedding, against float64 and within twice the error of torch's chain."""
    with torch.device(device):
        _check_decoded(seed)


def _check_decoded(seed: int) -> None:
    from lpaf_kernels.ops.decoded_embedding import decoded_embedding_reference
    from lpaf_kernels.triton import decoded_embedding as kernels

    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows = draw.choice([0, 1, 15, 16, 33, 70]) if seed % 8 else draw.randint(1, 140)
    latent, layers, norms = _draw_decoded(draw, DTYPES[seed % 3])
    vocabulary = latent.shape[0]
    ids = torch.randint(vocabulary, (rows,), dtype=draw.choice([torch.int32, torch.int64]))
    y = kernels.decode(ids, latent, layers, norms, draw_launch("decode", seed))
    wide = [(weight.double(), None if bias is None else bias.double()) for weight, bias in layers]
    exact = decoded_embedding_reference(ids, latent.double(), wide, None if norms is None else norms.double())
    check_accurate(y, decoded_embedding_reference(ids, latent, layers, norms), exact)
    if rows:
        ids[0], ids[-1] = vocabulary, -1
        bad = kernels.decode(ids, latent, layers, norms, draw_launch("decode", seed))
        assert bad[[0, -1]].isnan().all()
        assert bad[1:-1].equal(y[1:-1])


def check_decoded_embedding_gradient(seed: int, device: str = "cpu") -> None:
    """The same for the backward's kernel, which goes as far as the last layer's product."""
    with torch.device(device):
        _check_decoded_gradient(seed)


def _check_decoded_gradient(seed: int) -> None:
    from lpaf_kernels.ops.decoded_embedding import _last_gradient_by_torch
    from lpaf_kernels.triton import decoded_embedding as kernels

    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % 3]
    # A sum of products that cancel may come out exact by chance in the chain: rows enough that it does not in all.
    rows = draw.choice([0, 15, 16, 33, 70])
    latent, layers, norms = _draw_decoded(draw, dtype)
    vocabulary, cols = latent.shape[0], layers[-1][0].shape[1]
    ids = torch.randint(vocabulary, (rows,), dtype=draw.choice([torch.int32, torch.int64]))
    grad = _apart(rows, cols, draw, dtype)
    padding_idx = draw.choice([-1, 0, vocabulary - 1])
    results = [kernels.last_gradient(grad, ids, latent, layers, norms, padding_idx, draw_launch("decode_grad", seed))]
    for to in (dtype, torch.float64):
        own = [(weight.to(to), None if bias is None else bias.to(to)) for weight, bias in layers]
        inputs = torch.nn.functional.embedding(ids, latent.to(to))
        inputs = torch.nn.functional.leaky_relu(inputs) if len(layers) > 1 else inputs
        own_norms = None if norms is None else norms.to(to)
        results.append(_last_gradient_by_torch(grad.to(to), ids, inputs, own, own_norms, padding_idx))
    compared = [[d_last, *hidden] for d_last, _, hidden in results]
    if norms is not None:
        for tensors, (_, d_norms, _) in zip(compared, results):
            tensors.append(d_norms)
        if cols == 1:
            # Such a row cannot turn: its gradient is a rounding error, which has no size to compare with.
            assert compared[0].pop(0).abs().sum() <= 1e-2 * grad.abs().sum()
            del compared[1][0], compared[2][0]
    for tensors in zip(*compared, strict=True):
        check_accurate(*tensors)


def _draw_decoded(draw: random.Random, dtype: torch.dtype) -> tuple[torch.Tensor, list[tuple], torch.Tensor | None]:
    """latent, layers and norms or None."""
    vocabulary = draw.choice([1, 5, 50])
    widths = [draw.choice([1, 16, 64, draw.randint(1, 90)]) for _ in range(draw.choice([2, 2, 3, 4]))]
    layers = [
        ((torch.randn(a, b) / a**0.5).to(dtype), torch.randn(b).to(dtype) if draw.random() < 0.7 else None)
        for a, b in pairwise(widths)
    ]
    latent = _apart(vocabulary, widths[0], draw, dtype)
    return latent, layers, torch.rand(vocabulary).to(dtype) if draw.random() < 0.5 else None


def check_masked_linear_plan(seed: int) -> None:
    """Forward and backward as the plan "kernels" makes them, from arguments as the operator gets them."""
    from lpaf_kernels.ops import masked_linear as op
    from lpaf_kernels.tuning import MaskedShape, Plan
    from lpaf_kernels.tuning import masked_linear as plans
    from lpaf_kernels.tuning.tune import double
    from lpaf_kernels.tuning.tune_masked_linear import make_masked_problem

    torch.manual_seed(seed)
    shape = MaskedShape("masked_linear", "forward", "bfloat16", 48, 32, ("float32", "bfloat16")[seed % 2])
    problem = make_masked_problem(2 * 9, shape, "cpu")
    grad = torch.randn(2, 9, 32).bfloat16()
    # As from a transpose and a wider tensor: neither in one piece.
    x = torch.randn(9, 2, 53).bfloat16()[..., 5:].transpose(0, 1)
    problem = problem._replace(x=x, weight=problem.weight.t().contiguous().t(), bias=(None, problem.bias)[seed % 2])
    plan = Plan("kernels", (("masked_grads-64x64x64-w4-s3-p1-r272",) if seed == 2 else ()))
    prepared, needs = problem.prepared(), (True, True, True, seed != 1)
    actual = [plans.forward(Plan("kernels"), prepared, 90)]
    found = plans.backward(plan, prepared, plans.matrix(grad), needs, 90)
    assert (found[0] is None) == (seed == 2)
    actual += op.completed(found, plans.matrix(grad), prepared, needs)
    references = []
    for given in (problem, double(problem)):
        own = grad.to(given.x.dtype)
        references.append([op.cast_forward(*given), *op.cast_backward(own, *given[:5], needs)])
    for result, chained, exact in zip(actual, *references, strict=True):
        check_accurate(result.view(exact.shape), chained, exact)


def is_interpreting() -> bool:
    import triton

    from lpaf_kernels.triton import lowrank_sparse_linear as kernels

    return not isinstance(kernels._project, triton.JITFunction)
