"""Measure whether masked_linear runs faster by its kernels or by folding the mask into the weight's cast."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..triton.launch import GRANULE, candidates
from . import dispatch
from .masked_linear import Problem, backward, forward
from .table import MASKED, MaskedShape, Plan
from .tune import ROWS, checked_directions, double, graph_times, measure, rank, this_gpu

NEEDS = (True, True, True, True)


def make_masked_problem(rows: int, shape: MaskedShape, device: str = "cuda") -> Problem:
    """Random inputs of the right scale, drawn from a fixed seed; half of the weights are kept."""
    generator = torch.Generator(device).manual_seed(rows)

    def draw(*size: int, dtype: str) -> Tensor:
        return torch.randn(*size, device=device, generator=generator).to(getattr(torch, dtype))

    sides = shape.out_features, shape.in_features
    weight = draw(*sides, dtype=shape.weight) / math.sqrt(shape.in_features)
    value, tie_index = torch.zeros((), device=device), torch.zeros((), dtype=torch.int64, device=device)
    x, bias = (draw(*size, dtype=shape.dtype) for size in ((rows, shape.in_features), (shape.out_features,)))
    return Problem(x, weight, draw(*sides, dtype=shape.weight), value, tie_index, bias)


def masked_plans(direction: str, arch: int) -> list[Plan]:
    """Every plan that is worth a measurement."""
    products = [launch.name for launch in candidates("masked", 0, arch)]
    if direction == "forward":
        return [Plan("cast"), *(Plan("kernels", (name,)) for name in products)]
    last = [launch.name for launch in candidates("masked_grads", 0, arch)]
    return [Plan("cast"), *(Plan("kernels", names) for names in (*zip(last), *itertools.product(products, last)))]


def rank_masked_plans(
    problem: Problem,
    direction: str,
    gpu: dispatch.Gpu,
    times: Callable[[Sequence[Callable[[], object]]], list[float]],
) -> tuple[Plan, ...]:
    """The plans that compute the right thing, the fastest first, with their microseconds."""
    from ..ops import masked_linear as op

    grad = torch.randn(problem.rows, problem.weight.shape[0], device=problem.x.device).to(problem.x.dtype)

    def outputs(plan: Plan, given: Problem) -> tuple[Tensor, ...]:
        if direction == "forward":
            return (op.cast_forward(*given) if plan.provider == "cast" else forward(plan, given, gpu.arch),)
        own = grad.to(given.x.dtype)
        found = (None, None) if plan.provider == "cast" else backward(plan, given, own, NEEDS, gpu.arch)
        return op.completed(found, own, given, NEEDS)

    cast = dispatch.baseline(MASKED)
    exact = outputs(cast, double(problem))
    return rank(masked_plans(direction, gpu.arch), problem.rows, outputs, problem, exact, times, cast)


def tune_masked(
    shapes: Iterable[tuple[int, int]],
    dtype: torch.dtype = torch.bfloat16,
    rows: Sequence[int] = ROWS,
    directions: Sequence[str] = ("forward", "backward"),
    budget_s: float | None = None,
    output: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
    weight: torch.dtype = torch.float32,
) -> Path:
    """Measure masked layers with a score per weight, and write the table after each measurement.

    Args:
        shapes: (in, out) of each layer shape, multiples of 16.
        dtype: of inputs and products, float16 or bfloat16. Default: bfloat16.
        weight: dtype of weight and scores. Default: float32, as under autocast.
        rows, directions, budget_s, output, report: as for :func:`.tune_linear`.

    Returns:
        The file.

    Raises:
        RuntimeError: no CUDA device, or no triton.
        ValueError: a direction, shape or dtype that the kernels do not take, or an ``output`` that is no table of this
            GPU.
    """
    gpu = this_gpu()
    names = [str(kind).removeprefix("torch.") for kind in (dtype, weight)]
    found = []
    for sizes, direction in itertools.product(list(shapes), checked_directions(directions)):
        if len(sizes) != 2 or min(sizes) < 1:
            raise ValueError(f"shapes: expected (in, out), multiples of {GRANULE}, got {sizes}")
        shape = MaskedShape(MASKED, direction, names[0], *sizes, names[1])
        if (reason := dispatch.unfit_masked(shape)) is not None:
            raise ValueError(f"shapes: {reason}, got {shape.text} {shape.dtype}")
        found.append(shape)

    def ranked(shape: MaskedShape, count: int) -> tuple[Plan, ...]:
        return rank_masked_plans(make_masked_problem(count, shape), shape.direction, gpu, graph_times)

    return measure(itertools.product(found, rows), ranked, gpu, budget_s, output, report)
