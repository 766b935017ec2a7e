"""Measure whether lowrank_attention runs faster as one block or layer by layer on this GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..triton.launch import HEAD_DIMS, candidates, default_launch
from . import dispatch
from .lowrank_attention import Problem, forward
from .table import ATTENTION, AttentionShape, Plan
from .tune import ROWS, double, graph_times, measure, rank, this_gpu

Four = tuple[int, int, int, int]
Sizes = tuple[int, int, int, int, int, Four, Four, bool]
LENGTHS = (128, 512)


def batches(rows: Iterable[int], lengths: Sequence[int] = LENGTHS) -> list[tuple[int, int]]:
    """(sequences, length) of the whole sequences in these row counts; none where not even one fits."""
    pairs = ((count // length, length) for count, length in itertools.product(rows, lengths))
    return list(dict.fromkeys(pair for pair in pairs if pair[0]))


def make_attention_problem(sequences: int, shape: AttentionShape, dtype: torch.dtype, device: str = "cuda") -> Problem:
    """Random inputs of the right scale, drawn from a fixed seed.

    Without mask, residual and norm, which the block has for nothing: what it wins here it wins with them.
    """
    generator = torch.Generator(device).manual_seed(sequences)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, device=device, generator=generator)).to(dtype)

    def layer(d_in: int, d_out: int, rank: int, kept: int) -> tuple[Tensor, Tensor, Tensor | None]:
        positions = torch.randperm(d_out, device=device, generator=generator)[:kept].sort().values.int()
        up = draw(rank, d_out, scale=max(rank, 1) ** -0.5)
        return draw(rank + kept, d_in, scale=d_in**-0.5), up, positions if kept else None

    inner, kv_inner = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sides = [(shape.in_features, columns) for columns in (inner, kv_inner, kv_inner)]
    sides.append((inner, shape.out_features))
    *projections, out = (layer(*side, *sizes) for side, *sizes in zip(sides, shape.ranks, shape.kept))
    downs, *rest = zip(*projections)
    cos = sin = None
    if shape.rotary:
        angles = 10 * torch.rand(shape.length, shape.head_dim, device=device, generator=generator)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return Problem(
        draw(sequences, shape.length, shape.in_features), torch.cat(downs), *itertools.chain(*zip(*rest)),
        draw(inner + 2 * kv_inner), *out, draw(shape.out_features), None, None, None, None, None, cos, sin,
        shape.length, shape.heads, shape.kv_heads, False, shape.head_dim**-0.5, "none", 0.0,
    )  # fmt: skip


def attention_plans(shape: AttentionShape, rows: int, arch: int, dtype: torch.dtype = torch.bfloat16) -> list[Plan]:
    """Every plan that is worth a measurement; the projection takes its default launch."""
    width = sum(shape.ranks[:3]) + sum(shape.kept[:3])
    first = default_launch("project", rows, width, arch, dtype)
    middles = candidates("attend", shape.width, arch, dtype, shape.head) if shape.head_dim in HEAD_DIMS else []
    lasts = [(launch,) for launch in candidates("close", shape.out_width, arch, dtype)] or [()]
    found = ((first, middle, *last) for middle, last in itertools.product(middles, lasts))
    return [Plan("chain"), *(Plan("block", tuple(launch.name for launch in launches)) for launches in found)]


def rank_attention_plans(
    problem: Problem, gpu: dispatch.Gpu, times: Callable[[Sequence[Callable[[], object]]], list[float]]
) -> tuple[Plan, ...]:
    """The plans that compute the right thing, the fastest first, with their microseconds."""
    from ..ops.lowrank_attention import chain

    rows = problem.rows
    plans = attention_plans(problem.shape("forward"), rows, gpu.arch, problem.x.dtype)

    def outputs(plan: Plan, given: Problem) -> tuple[Tensor, ...]:
        if plan.provider == "chain":
            return (chain(*given).flatten(0, -2),)
        return (forward(plan, given.prepared(), gpu.arch),)

    return rank(plans, rows, outputs, problem, outputs(Plan("chain"), double(problem)), times)


def tune_attention(
    shapes: Iterable[Sizes],
    dtype: torch.dtype = torch.bfloat16,
    batches: Sequence[tuple[int, int]] = tuple(batches(ROWS)),
    budget_s: float | None = None,
    output: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure attention blocks by their own kernels and layer by layer, and write the table after each measurement.

    The layers one by one go by the tables of :func:`.tune_linear`: tune those first. The backward always runs so.

    Args:
        shapes: (in, heads, kv_heads, head_dim, out, ranks, kept, rotary) of each block: the ranks and kept columns of
            q, k, v and o as fours, and whether Q and K are turned by rotary angles.
        batches: (sequences, length) pairs. Default: sequences of 128 and 512 that fill the rows of
            :func:`.tune_linear`.
        dtype, budget_s, output, report: as for :func:`.tune_linear`.

    Returns:
        The file.

    Raises:
        RuntimeError: no CUDA device, or no triton.
        ValueError: a shape or batch that does not exist, or an ``output`` that is no table of this GPU.
    """
    gpu = this_gpu()
    name = str(dtype).removeprefix("torch.")
    found = []
    for sizes, (sequences, length) in itertools.product(list(shapes), batches):
        if sequences < 1 or length < 1:
            raise ValueError(f"batches: expected (sequences, length), got {(sequences, length)}")
        shape = AttentionShape(ATTENTION, "forward", name, *checked_sizes(sizes), length)
        found.append((shape, sequences * length))

    def ranked(shape: AttentionShape, count: int) -> tuple[Plan, ...]:
        return rank_attention_plans(make_attention_problem(count // shape.length, shape, dtype), gpu, graph_times)

    return measure(found, ranked, gpu, budget_s, output, report)


def checked_sizes(sizes: Sizes) -> Sizes:
    """Raise unless they are those of a block."""
    expected = f"shapes: expected (in, heads, kv_heads, head_dim, out, ranks, kept, rotary), got {sizes}"
    if len(sizes) != 8:
        raise ValueError(expected)
    *outer, ranks, kept, rotary = sizes
    fours = isinstance(ranks, tuple) and isinstance(kept, tuple) and len(ranks) == len(kept) == 4
    if not fours or min(outer) < 1 or min(*ranks, *kept) < 0 or not all(map(sum, zip(ranks, kept))):
        raise ValueError(expected)
    if outer[1] % outer[2] or not isinstance(rotary, bool) or (rotary and outer[3] % 2):
        raise ValueError(expected)
    return sizes
