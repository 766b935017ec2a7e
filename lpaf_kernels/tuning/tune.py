"""Measure which way lowrank_sparse_linear runs fastest on this GPU, and write the table that dispatch reads.

What is common to operators is here too; :mod:`.tune_lowrank_ffn` measures lowrank_ffn, :mod:`.tune_lowrank_attention`
lowrank_attention, :mod:`.tune_masked_linear` masked_linear.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .._version import __version__
from ..triton.launch import candidates
from . import dispatch
from .lowrank_sparse_linear import Problem, backward, forward
from .table import LINEAR, AnyShape, Plan, Shape, Table, to_json

ROWS = (1, 16, 128, 512, 4096, 16384)
# Inputs rotate through about twice the L2 cache of the largest GPUs, so that x is read from memory as in a model.
_ROTATE_BYTES = 128 * 2**20
_MAX_COPIES = 8
# A plan whose error against float64 is more than this many times the baseline's is wrong, not slow.
_MAX_ERROR = 2.0
_CHAIN = Plan("chain")


def graph_times(calls: Sequence[Callable[[], object]], rounds: int = 9, target_us: float = 400.0) -> list[float]:
    """Microseconds of each call as the median over interleaved replays of CUDA graphs (no launch overhead).

    A graph holds enough repetitions to last about ``target_us``.
    """
    graphs = []
    for call in calls:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(2):
                call()
        stream.synchronize()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        repeats = max(1, min(200, math.ceil(target_us / max(1e3 * start.elapsed_time(stop), 2.0))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
        graphs.append((graph, repeats))
    samples: list[list[float]] = [[] for _ in graphs]
    for _ in range(rounds + 1):
        for (graph, repeats), values in zip(graphs, samples):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            values.append(1e3 * start.elapsed_time(stop) / repeats)
    return [statistics.median(values[1:]) for values in samples]


def make_problem(
    rows: int, in_features: int, out_features: int, rank: int, kept: int, dtype: torch.dtype, device: str = "cuda"
) -> Problem:
    """Random inputs of the right scale, drawn from a fixed seed."""
    generator = torch.Generator(device).manual_seed(rows)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    positions = torch.randperm(out_features, device=device, generator=generator)[:kept].sort().values.int()
    return Problem(
        draw(rows, in_features).to(dtype),
        (draw(rank + kept, in_features) / math.sqrt(in_features)).to(dtype),
        (draw(rank, out_features) / math.sqrt(max(rank, 1))).to(dtype),
        positions if kept else None,
        draw(out_features).to(dtype),
        "none",
    )


def forward_plans(width: int, arch: int, dtype: torch.dtype = torch.bfloat16) -> list[Plan]:
    """Every forward plan that is worth a measurement."""
    single = [Plan("one_kernel", (launch.name,)) for launch in candidates("one_kernel", width, arch, dtype)]
    pairs = itertools.product(candidates("project", width, arch), candidates("expand", width, arch))
    # A short first kernel never meets a tall second one: both follow the row count.
    double = [
        Plan("two_kernels", (first.name, second.name))
        for first, second in pairs
        if max(first.block_m, second.block_m) <= 2 * min(first.block_m, second.block_m)
    ]
    return [Plan("chain"), Plan("dense"), *single, *double]


def backward_plans(width: int, arch: int) -> list[Plan]:
    """Every backward plan that is worth a measurement."""
    found = [Plan("chain")]
    for first, second in itertools.product(candidates("project", width, arch), candidates("expand", width, arch)):
        if first.splits == 1 and first.block_m == second.block_m:
            thirds = candidates("outer", width, arch)
            found += [Plan("kernels", (first.name, second.name, third.name)) for third in thirds]
    return found


def rank_plans(
    problem: Problem, direction: str, gpu: dispatch.Gpu, times: Callable[[Sequence[Callable[[], object]]], list[float]]
) -> tuple[Plan, ...]:
    """The plans that compute the right thing, the fastest first, with their microseconds."""
    width, rows = problem.down.shape[0], problem.x.shape[0]
    plans = (
        forward_plans(width, gpu.arch, problem.x.dtype) if direction == "forward" else backward_plans(width, gpu.arch)
    )
    grad = torch.randn(rows, problem.up.shape[1], device=problem.x.device).to(problem.x.dtype)
    needs = (True, True, True, problem.bias is not None)
    z = forward(Plan("chain"), problem, True, False, gpu.arch)[1]

    def outputs(plan: Plan, given: Problem) -> tuple[Tensor, ...]:
        if direction == "forward":
            return forward(plan, given, False, False, gpu.arch)[:1]
        if plan.provider == "chain":
            return chain_backward(given, grad, z)
        return backward(plan, given, grad, z, None, needs, gpu.arch)

    exact_problem = double(problem)
    if direction == "forward":
        exact = forward(Plan("chain"), exact_problem, False, False, gpu.arch)[:1]
    else:
        wide = forward(Plan("chain"), exact_problem, True, False, gpu.arch)[1]
        exact = chain_backward(exact_problem, grad.double(), wide)
    return rank(plans, rows, outputs, problem, exact, times)


def double(problem: NamedTuple) -> NamedTuple:
    """The problem with every floating tensor in float64."""
    fields = (t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in problem)
    return type(problem)(*fields)


def rank(
    plans: Sequence[Plan],
    rows: int,
    outputs: Callable[[Plan, NamedTuple], tuple[Tensor, ...]],
    problem: NamedTuple,
    exact: tuple[Tensor, ...],
    times: Callable[[Sequence[Callable[[], object]]], list[float]],
    baseline: Plan = _CHAIN,
) -> tuple[Plan, ...]:
    """Those of ``plans`` whose ``outputs`` of ``problem`` are about as near to ``exact`` as the baseline's, by time."""
    # Tall tiles make no sense on few rows: more than half of the tile would be padding.
    plans = [plan for plan in plans if _least_rows(plan) <= max(2 * rows, 16)]
    copies = max(1, min(_MAX_COPIES, _ROTATE_BYTES // max(problem.x.nbytes, 1)))
    inputs = itertools.cycle([problem, *(problem._replace(x=problem.x.clone()) for _ in range(copies - 1))])
    allowed = [_MAX_ERROR * _error(*pair) for pair in zip(outputs(baseline, problem), exact)]
    right: list[Plan] = []
    for plan in plans:
        try:
            errors = [_error(*pair) for pair in zip(outputs(plan, problem), exact)]
        except Exception as error:
            warnings.warn(f"{plan.provider} {plan.launches} failed: {str(error).splitlines()[0]}", stacklevel=2)
            continue
        floor = torch.finfo(problem.x.dtype).eps
        if all(error <= limit + floor for error, limit in zip(errors, allowed)):
            right.append(plan)
        else:
            warnings.warn(f"{plan.provider} {plan.launches} is wrong: {errors}, allowed {allowed}", stacklevel=2)
    measured = times([lambda plan=plan: outputs(plan, next(inputs)) for plan in right])
    ranked = sorted(plan._replace(microseconds=round(us, 3)) for plan, us in zip(right, measured))
    return tuple(sorted(ranked, key=lambda plan: plan.microseconds))


def chain_backward(problem: Problem, grad: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """The backward by torch's products, without an activation."""
    x, down, up, kept, bias, _ = problem
    rank, width = up.shape[0], down.shape[0]
    d_z = grad.new_empty(grad.shape[0], width)
    torch.mm(grad, up.t(), out=d_z[:, :rank])
    if kept is not None:
        d_z[:, rank:] = grad.index_select(1, kept)
    d_bias = grad.sum(0) if bias is not None else grad.new_empty(0)
    return d_z @ down, d_z.t() @ x, z[:, :rank].t() @ grad, d_bias


def _least_rows(plan: Plan) -> int:
    from ..triton.launch import LAUNCHES

    # Tiles of "masked_grads" are of the weight.
    launches = (LAUNCHES[name] for name in plan.launches)
    return max((launch.block_m for launch in launches if launch.kernel != "masked_grads"), default=0)


def _error(actual: Tensor, exact: Tensor) -> float:
    """The error relative to the largest entry; NaN counts as infinite."""
    if exact.numel() == 0:
        return 0.0
    error = ((actual.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30)).item()
    return error if error == error else math.inf


def tune_linear(
    shapes: Iterable[tuple[int, int, int, int]],
    dtype: torch.dtype = torch.bfloat16,
    rows: Sequence[int] = ROWS,
    directions: Sequence[str] = ("forward", "backward"),
    budget_s: float | None = None,
    output: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Measure every plan for every shape and row count on the current GPU, and write the table after each measurement.

    Args:
        shapes: (in, out, rank, kept) of each layer shape.
        dtype: of inputs and parameters. Default: bfloat16.
        rows: row counts; between them the nearest one in log space serves. Default: 1 to 16,384.
        directions: "forward" and "backward". Default: both.
        budget_s: stop before the next measurement once this many seconds are spent. Default: no limit.
        output: the table's file. Default: the user's own table of this GPU (:func:`.dispatch.user_table`). Shapes that
            it already holds are kept, or measured again if they are among ``shapes``.
        report: receives one line per measurement.

    Returns:
        The file. The next call of the operator in this process reads it if it is the user's own table.

    Raises:
        RuntimeError: no CUDA device, or no triton.
        ValueError: a direction or a shape that does not exist, or an ``output`` that is no table of this GPU.
    """
    gpu = this_gpu()
    name = str(dtype).removeprefix("torch.")
    found = []
    for sizes, direction in itertools.product(list(shapes), checked_directions(directions)):
        if len(sizes) != 4 or min(sizes[:2]) < 1 or min(sizes[2:]) < 0 or sum(sizes[2:]) == 0:
            raise ValueError(f"shapes: expected (in, out, rank, kept), got {sizes}")
        found.append(Shape(LINEAR, direction, name, *sizes))

    def ranked(shape: Shape, count: int) -> tuple[Plan, ...]:
        sizes = (shape.in_features, shape.out_features, shape.rank, shape.kept)
        return rank_plans(make_problem(count, *sizes, dtype), shape.direction, gpu, graph_times)

    return measure(itertools.product(found, rows), ranked, gpu, budget_s, output, report)


def this_gpu() -> dispatch.Gpu:
    """The GPU to measure on."""
    if not torch.cuda.is_available():
        raise RuntimeError("tuning measures on a GPU: torch finds no CUDA device here")
    gpu = dispatch.current_gpu(torch.cuda.current_device())
    if gpu.triton is None:
        raise RuntimeError(f"tuning measures Triton kernels: {dispatch.missing()}")
    return gpu


def checked_directions(directions: Sequence[str]) -> Sequence[str]:
    for direction in directions:
        if direction not in ("forward", "backward"):
            raise ValueError(f"directions: expected forward or backward, got {direction!r}")
    return directions


def measure(
    cells: Iterable[tuple[AnyShape, int]],
    ranked: Callable[[AnyShape, int], tuple[Plan, ...]],
    gpu: dispatch.Gpu,
    budget_s: float | None,
    output: Path | None,
    report: Callable[[str], None],
) -> Path:
    """Add what ``ranked`` finds for each shape and row count to the table, which is written after each of them."""
    path = Path(output) if output is not None else dispatch.user_table(gpu.name)
    entries = _known(path, gpu)
    started = time.monotonic()
    for shape, count in cells:
        if budget_s is not None and time.monotonic() - started > budget_s:
            report(f"stopped after {budget_s:.0f} s, before {shape.direction} {shape.text} {count} rows")
            return path
        plans = ranked(shape, count)
        entries.setdefault(shape, {})[count] = plans
        best = plans[0]
        name = dispatch.baseline(shape.op).provider
        other = next(plan.microseconds for plan in plans if plan.provider == name)
        report(
            f"{shape.direction} {shape.text} {count} rows: {best.provider} {best.microseconds:.1f} us,"
            f" {name} {other:.1f} us"
        )
        _write(path, entries, gpu)
    return path


def _known(path: Path, gpu: dispatch.Gpu) -> dict[AnyShape, dict[int, tuple[Plan, ...]]]:
    """The entries of a table that is already there and was measured on this GPU."""
    if not path.is_file():
        return {}
    own = path == dispatch.user_table(gpu.name)
    try:
        table = Table.load(path)
    except ValueError:
        if own:  # dispatch has said that it is unreadable, and to write a new one
            return {}
        raise
    reason = table.rejects(gpu.name, gpu.triton or "none")
    if reason is not None and not own:
        raise ValueError(f"output: {path} would be replaced: {reason}")
    return {} if reason is not None else dict(table.entries)


def _write(path: Path, entries: dict[AnyShape, dict[int, tuple[Plan, ...]]], gpu: dispatch.Gpu) -> None:
    """Replace the file in one step, so that an interrupted run leaves the old or the new one."""
    meta = {
        "gpu": gpu.name,
        "triton": gpu.triton,
        "torch": torch.__version__,
        "lpaf_kernels": __version__,
        "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(to_json(entries, meta), encoding="utf-8")
    part.replace(path)
    dispatch.forget()
