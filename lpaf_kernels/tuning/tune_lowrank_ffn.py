"""Measure whether lowrank_ffn runs faster as one block or layer by layer on this GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..triton.launch import candidates, default_launch
from . import dispatch
from .lowrank_ffn import OTHERS, WIDE, Problem, backward, forward
from .table import FFN, FfnShape, Plan
from .tune import ROWS, checked_directions, double, graph_times, measure, rank, this_gpu

Sizes = tuple[int, int, int, tuple[int, int], tuple[int, int], int]


def make_ffn_problem(rows: int, shape: FfnShape, dtype: torch.dtype, device: str = "cuda") -> Problem:
    """Random inputs of the right scale, drawn from a fixed seed.

    Without residual and norm, which the block has for nothing: what it wins here it wins with them.
    """
    generator = torch.Generator(device).manual_seed(rows)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, device=device, generator=generator)).to(dtype)

    def layer(d_in: int, d_out: int, rank: int, kept: int) -> tuple[Tensor | None, ...]:
        positions = torch.randperm(d_out, device=device, generator=generator)[:kept].sort().values.int()
        up = draw(rank, d_out, scale=max(rank, 1) ** -0.5)
        return draw(rank + kept, d_in, scale=d_in**-0.5), up, positions if kept else None, draw(d_out)

    x = draw(rows, shape.in_features)
    (rank1, rank2), (kept1, kept2) = shape.ranks, shape.kept
    first = layer(shape.in_features, shape.hidden, rank1, kept1)
    second = layer(shape.hidden, shape.out_features, rank2, kept2)
    gate = (None, None, None)
    if shape.gate:
        down, up, _, bias = layer(shape.in_features, shape.hidden, shape.gate, 0)
        gate = down, up, bias
    return Problem(x, *first, *second, *gate, None, None, None, "silu" if shape.gate else "gelu", "none", 0.0)


def ffn_plans(direction: str, rows: int, width: int, arch: int, dtype: torch.dtype = torch.bfloat16) -> list[Plan]:
    """Every plan that is worth a measurement; the kernels of single layers take their default launches."""

    def default(kernel: str) -> str:
        return default_launch(kernel, rows, width, arch, dtype).name

    def each(kernel: str) -> list[str]:
        return [launch.name for launch in candidates(kernel, width, arch, dtype)]

    blocks = each("ffn")
    if direction == "forward" and blocks:
        return [Plan("chain"), *(Plan("block", (name,)) for name in blocks)]
    if direction == "forward":
        first, kernel, last = WIDE
        return [Plan("chain"), *(Plan("block", (default(first), name, default(last))) for name in each(kernel))]
    if not blocks:
        return [Plan("chain")]
    layers = tuple(default(kernel) for kernel in ("project", "expand", "outer"))
    pairs = itertools.product(each("ffn_rows"), each("ffn_weights"))
    return [Plan("chain"), *(Plan("block", (default("ffn"), *layers, *pair)) for pair in pairs)]


def rank_ffn_plans(
    problem: Problem, direction: str, gpu: dispatch.Gpu, times: Callable[[Sequence[Callable[[], object]]], list[float]]
) -> tuple[Plan, ...]:
    """The plans that compute the right thing, the fastest first, with their microseconds."""
    from ..ops.lowrank_ffn import chain, chain_backward

    rows, x = problem.rows, problem.x
    plans = ffn_plans(direction, rows, problem.width, gpu.arch, x.dtype)
    grad = torch.randn(rows, problem.up2.shape[1], device=x.device).to(x.dtype)
    needs = [isinstance(field, Tensor) for name, field in problem._asdict().items() if name not in OTHERS]

    def outputs(plan: Plan, given: Problem) -> tuple[Tensor, ...]:
        if direction == "forward":
            return ((chain(*given) if plan.provider == "chain" else forward(plan, given, gpu.arch)),)
        to = grad.to(given.x.dtype)
        if plan.provider == "chain":
            return chain_backward(to, *given, needs)
        return backward(plan, given, to, needs, gpu.arch)

    exact = outputs(Plan("chain"), double(problem))
    return rank(plans, rows, outputs, problem, exact, times)


def tune_ffn(
    shapes: Iterable[Sizes],
    dtype: torch.dtype = torch.bfloat16,
    rows: Sequence[int] = ROWS,
    directions: Sequence[str] = ("forward", "backward"),
    budget_s: float | None = None,
    output: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure feed-forward blocks in one pass and layer by layer, and write the table after each measurement.

    The layers one by one go by the tables of :func:`.tune_linear`: tune those first.

    Args:
        shapes: (in, hidden, out, ranks, kept, gate) of each block: the ranks and kept columns of both layers as pairs,
            the rank of the gate or 0.
        dtype, rows, directions, budget_s, output, report: as for :func:`.tune_linear`.

    Returns:
        The file.

    Raises:
        RuntimeError: no CUDA device, or no triton.
        ValueError: a direction or a shape that does not exist, or an ``output`` that is no table of this GPU.
    """
    gpu = this_gpu()
    name = str(dtype).removeprefix("torch.")
    found = []
    for sizes, direction in itertools.product(list(shapes), checked_directions(directions)):
        found.append(FfnShape(FFN, direction, name, *checked_sizes(sizes)))

    def ranked(shape: FfnShape, count: int) -> tuple[Plan, ...]:
        return rank_ffn_plans(make_ffn_problem(count, shape, dtype), shape.direction, gpu, graph_times)

    return measure(itertools.product(found, rows), ranked, gpu, budget_s, output, report)


def checked_sizes(sizes: Sizes) -> Sizes:
    """Raise unless they are those of a block."""
    expected = f"shapes: expected (in, hidden, out, ranks, kept, gate), got {sizes}"
    if len(sizes) != 6:
        raise ValueError(expected)
    *outer, ranks, kept, gate = sizes
    pairs = isinstance(ranks, tuple) and isinstance(kept, tuple) and len(ranks) == len(kept) == 2
    if not pairs or min(outer) < 1 or min(*ranks, *kept, gate) < 0 or not all(map(sum, zip(ranks, kept))):
        raise ValueError(expected)
    return sizes
