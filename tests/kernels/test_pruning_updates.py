"""The updates of pruning steps: against plain torch in float64, in place, whatever the shapes and strides."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from accuracy import check_accurate
from lpaf_kernels import (
    KeepThreshold,
    accumulate_movement_,
    keep_threshold,
    sparsity_statistics,
    update_importance_,
    update_sensitivity_,
    zero_pruned_,
)
from lpaf_kernels.ops.pruning_updates import (
    accumulate_movement_reference,
    sparsity_statistics_reference,
    update_importance_reference,
    update_sensitivity_reference,
    zero_pruned_reference,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(7, 31), (1, 1300), (700, 1), (0, 5), (5, 0), (64, 128), (1, 1), (33, 515), (33, 520), (40, 264), (9, 4096)]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def strided(tensor: Tensor) -> Tensor:
    """The same entries, every other row and column of a larger tensor."""
    wide = torch.full([2 * size + 1 for size in tensor.shape], math.nan, dtype=tensor.dtype, device=tensor.device)
    view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


def offset(tensor: Tensor) -> Tensor:
    """The same entries in a row, but not where a vector may begin; beside them lie NaN."""
    flat = torch.full((tensor.numel() + 2,), math.nan, dtype=tensor.dtype, device=tensor.device)
    return flat[1:-1].view(tensor.shape).copy_(tensor)


PLACEMENTS = {"contiguous": torch.clone, "strided": strided, "offset": offset}


class Problem:
    """Matrices, their gradients and states that are not zero; every other tensor lies in memory as ``place`` says."""

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype, place: str = "contiguous", device="cpu"):
        state = state_dtype(dtype)

        def draw(shapes: list, to: torch.dtype) -> list[Tensor]:
            tensors = [torch.randn(shape).to(device, to) for shape in shapes]
            return [PLACEMENTS[place](t) if i % 2 else t for i, t in enumerate(tensors)]

        self.weights = draw(shapes, dtype)
        self.grads = draw(shapes, dtype)
        self.scores = draw(shapes, state)
        self.row_scores = draw([shape[:1] for shape in shapes], state)
        self.sensitivity = [tensor.abs() for tensor in draw(shapes, state)]
        self.uncertainty = [tensor.abs() for tensor in draw(shapes, state)]


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Clones that lie in memory as the tensors do."""

    def place(tensor: Tensor) -> Callable:
        if not tensor.is_contiguous():
            return strided
        return offset if tensor.storage_offset() else torch.clone

    return [place(tensor)(tensor) for tensor in tensors]


def check_update(reference: Callable, before: list[list[Tensor]], after: list[list[Tensor]], *rates: float) -> None:
    """``after`` is reference(tensors of one matrix, *rates): the entries of all matrices together are accurate."""
    exact_state = [[tensor.double() for tensor in tensors] for tensors in before[:-2]]
    results = []
    for lists in (before, exact_state + before[-2:]):
        by_matrix = [reference(*tensors, *rates) for tensors in zip(*lists, strict=True)]
        results.append(list(zip(*by_matrix)) if isinstance(by_matrix[0], tuple) else [by_matrix])
    for actual, chain, exact in zip(after, *results, strict=True):
        check_accurate(*(torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (actual, chain, exact)))


def check_movement(problem: Problem, lr: float = 0.3) -> None:
    scores, pair = copies(problem.scores), [problem.weights, problem.grads]
    assert accumulate_movement_(scores, *pair, lr) is None
    check_update(accumulate_movement_reference, [problem.scores, *pair], [scores], lr)


def check_importance(problem: Problem, beta: float = 0.85) -> None:
    importance, pair = copies(problem.row_scores), [problem.weights, problem.grads]
    assert update_importance_(importance, *pair, beta) is None
    check_update(update_importance_reference, [problem.row_scores, *pair], [importance], beta)


def check_sensitivity(problem: Problem, beta1: float = 0.85, beta2: float = 0.95) -> None:
    averages, pair = [problem.sensitivity, problem.uncertainty], [problem.weights, problem.grads]
    new = [copies(tensors) for tensors in averages]
    rows = update_sensitivity_(*new, *pair, beta1, beta2)
    check_update(update_sensitivity_reference, [*averages, *pair], [*new, rows], beta1, beta2)


def check_zeroing(problem: Problem, scores: list[Tensor], keep: float = 0.4) -> None:
    thresholds = keep_threshold(scores, keep)
    weights = copies(problem.weights)
    assert zero_pruned_(weights, thresholds, scores) is None
    for new, old, threshold, score in zip(weights, problem.weights, thresholds, scores):
        assert torch.equal(new, zero_pruned_reference(old, score, *threshold))


def check_statistics(weights: list[Tensor]) -> None:
    statistics = sparsity_statistics(weights)
    assert statistics.dtype == torch.int64
    assert statistics.shape == (len(weights), 3)
    for counts, weight in zip(statistics, weights):
        assert torch.equal(counts, sparsity_statistics_reference(weight))


def check_everything(problem: Problem) -> None:
    check_movement(problem)
    check_importance(problem)
    check_sensitivity(problem)
    mixed = [rows if i % 3 == 0 else scores for i, (rows, scores) in enumerate(zip(problem.row_scores, problem.scores))]
    for scores in (problem.scores, problem.row_scores, mixed):
        check_zeroing(problem, scores)
    zero_pruned_(problem.weights, keep_threshold(mixed, 0.2), mixed)
    check_statistics(problem.weights)


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(dtype, place):
    check_everything(Problem(SHAPES, dtype, place))


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 70) | st.integers(500, 1100)), max_size=3),
    dtype=st.sampled_from(DTYPES),
    place=st.sampled_from(list(PLACEMENTS)),
    seed=st.integers(0, 2**31),
)
def test_matches_float64_on_drawn_shapes(shapes, dtype, place, seed):
    torch.manual_seed(seed)
    check_everything(Problem([(16, 40), *shapes], dtype, place))


def test_many_matrices():
    check_everything(Problem([(i % 5 + 1, i % 7 + 1) for i in range(1200)], torch.float32))


def run_everything(problem: Problem) -> list[Tensor]:
    accumulate_movement_(problem.scores, problem.weights, problem.grads, 0.3)
    update_importance_(problem.row_scores, problem.weights, problem.grads)
    rows = update_sensitivity_(problem.sensitivity, problem.uncertainty, problem.weights, problem.grads)
    zero_pruned_(problem.weights, keep_threshold(problem.scores, 0.5, "global"), problem.scores)
    states = problem.scores + problem.row_scores + problem.sensitivity + problem.uncertainty
    return [*states, *rows, *problem.weights, sparsity_statistics(problem.weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads_gives_the_same_bits(dtype):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        results.append(run_everything(Problem([(300, 700), (50, 3001), (3, 70000)], dtype)))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_importance_is_the_mean_of_the_averages():
    """LoSparse averages |w g| of each weight over the steps and then over the row; so must the row's average."""
    per_weight, importance = torch.zeros(5, 40, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    for _ in range(20):
        weight, grad = torch.randn(2, 5, 40, dtype=torch.float64)
        per_weight = 0.85 * per_weight + 0.15 * (weight * grad).abs()
        update_importance_([importance], [weight], [grad])
    torch.testing.assert_close(importance, per_weight.mean(1))


def test_uncertainty_is_measured_against_the_new_average():
    sensitivity, uncertainty = torch.zeros(1, 1), torch.zeros(1, 1)
    (row,) = update_sensitivity_(
        [sensitivity], [uncertainty], [torch.tensor([[-2.0]])], [torch.tensor([[2.0]])], 0.75, 0.5
    )
    assert sensitivity.item() == 1.0  # 0.25 * 4
    assert uncertainty.item() == 1.5  # 0.5 * |4 - 1|
    assert row.tolist() == [1.5]


def check_ties(device: str = "cpu") -> None:
    """Masses of equal scores, more than one thread or thread block takes: the first half stays."""
    weights = [torch.ones(300, 200, device=device) for _ in range(2)]
    scores = [torch.zeros(300, 200, device=device), torch.zeros(300, device=device)]
    zero_pruned_(weights, keep_threshold(scores, 0.5), scores)
    for weight in weights:
        assert weight[:150].all()
        assert not weight[150:].any()


def test_ties_are_resolved_by_index():
    check_ties()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_zeroing_nothing_and_everything(dtype, keep):
    weight = torch.randn(9, 13).to(dtype)
    weight[0, 0], weight[3, 3] = math.nan, -math.inf
    for scores in (torch.randn(9, 13, dtype=state_dtype(dtype)), torch.randn(9, dtype=state_dtype(dtype))):
        zeroed = weight.clone()
        zero_pruned_([zeroed], [keep_threshold(scores, keep)], [scores])
        torch.testing.assert_close(zeroed, weight if keep else torch.zeros_like(weight), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_counted_as_zero(dtype):
    weight = torch.zeros(3, 40, dtype=dtype)
    weight[0, 0] = -0.0
    weight[1, 2], weight[1, 39] = math.nan, torch.finfo(dtype).smallest_normal / 4
    weight[2, 2] = -1.0
    assert sparsity_statistics([weight]).tolist() == [[3, 2, 2]]


def test_nan_gradients_show():
    problem = Problem([(3, 600)], torch.float32)
    problem.grads[0][1, 555] = math.nan
    update_importance_(problem.row_scores, problem.weights, problem.grads)
    assert problem.row_scores[0].isnan().tolist() == [False, True, False]
    (rows,) = update_sensitivity_(problem.sensitivity, problem.uncertainty, problem.weights, problem.grads)
    assert rows.isnan().tolist() == [False, True, False]
    accumulate_movement_(problem.scores, problem.weights, problem.grads)
    assert problem.scores[0].isnan().sum() == 1


def test_parameters_are_updated_without_a_graph():
    linear = torch.nn.Linear(6, 4)
    scores = [torch.randn(4, 6, requires_grad=True)]
    linear(torch.randn(2, 6)).sum().backward()
    weights, grads = [linear.weight], [linear.weight.grad]
    importance = [torch.zeros(4)]
    accumulate_movement_(scores, weights, grads)
    update_importance_(importance, weights, grads)
    zero_pruned_(weights, keep_threshold(scores, 0.5), scores)
    assert (linear.weight == 0).sum() == 12
    assert scores[0].is_leaf
    assert not importance[0].requires_grad


def test_a_backward_that_saved_an_updated_tensor_raises():
    weight = torch.randn(4, 6, requires_grad=True)
    loss = (torch.randn(2, 6, requires_grad=True) @ weight.t()).sum()
    zero_pruned_([weight], [keep_threshold(weight, 0.5)], [weight.detach().clone()])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_opcheck():
    ops = torch.ops.lpaf_kernels
    problem = Problem([(4, 3), (2, 70)], torch.float32)
    weights, grads = problem.weights, problem.grads
    value, tie_index = ops.keep_threshold(problem.scores, 0.5, False, None)
    for operator, arguments in (
        (ops.accumulate_movement, (problem.scores, weights, grads, 0.3)),
        (ops.update_importance, (problem.row_scores, weights, grads, 0.85)),
        (ops.update_sensitivity, (problem.sensitivity, problem.uncertainty, weights, grads, 0.85, 0.95)),
        (ops.zero_pruned, (weights, problem.scores, list(value), list(tie_index))),
        (ops.sparsity_statistics, (weights,)),
    ):
        torch.library.opcheck(operator, arguments)


def test_compiles_whole():
    compiled = torch.compile(run_everything, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        results = []
        for run in (run_everything, compiled):
            torch.manual_seed(seed)
            results.append(run(Problem([(4, 3), (5, 70)], torch.float32)))
        for eager, traced in zip(*results, strict=True):
            assert torch.equal(eager, traced)


def matrix(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


ONE = matrix(3, 2)
HALF = matrix(3, 2, dtype=torch.float16)
THRESHOLD = KeepThreshold(torch.tensor(0.0), torch.tensor(0))


@pytest.mark.parametrize(
    ("function", "arguments", "error", "text"),
    [
        (sparsity_statistics, (ONE,), TypeError, "weights: expected a list of tensors, got Tensor"),
        (sparsity_statistics, ([],), ValueError, "weights: expected at least one tensor"),
        (sparsity_statistics, ([ONE, 1.0],), TypeError, r"weights\[1\]: expected a torch.Tensor, got float"),
        (sparsity_statistics, ([ONE.long()],), TypeError, r"weights\[0\]: expected float32.*got torch.int64"),
        (sparsity_statistics, ([ONE, matrix(3)],), ValueError, r"weights\[1\]: expected shape \[out, in\], got \[3\]"),
        (
            sparsity_statistics,
            ([ONE, HALF],),
            TypeError,
            r"weights\[1\]: expected torch.float32 \(that of weights\[0\]",
        ),
        (sparsity_statistics, ([ONE, matrix(1, 1, device="meta")],), ValueError, r"weights\[1\]: expected device cpu"),
        (accumulate_movement_, ([], [ONE], [ONE]), ValueError, "scores: expected 1 tensors .* got 0"),
        (
            accumulate_movement_,
            ([HALF], [HALF], [HALF]),
            TypeError,
            r"scores\[0\]: expected torch.float32 \(weights\[0\]",
        ),
        (accumulate_movement_, ([matrix(2, 3)], [ONE], [ONE]), ValueError, r"scores\[0\]: expected shape \[3, 2\]"),
        (accumulate_movement_, ([ONE], [ONE], [None]), TypeError, r"grads\[0\]: expected a torch.Tensor, got NoneType"),
        (accumulate_movement_, ([ONE], [ONE], [HALF]), TypeError, r"grads\[0\]: expected torch.float32"),
        (accumulate_movement_, ([ONE], [ONE], [ONE], math.nan), ValueError, "lr: expected a finite number, got nan"),
        (accumulate_movement_, ([ONE], [ONE], [ONE], True), TypeError, "lr: expected a number, got True"),
        (
            accumulate_movement_,
            ([ONE, ONE], [ONE] * 2, [ONE] * 2),
            ValueError,
            r"scores\[1\]: .* got that of scores\[0\]",
        ),
        (update_importance_, ([ONE], [ONE], [ONE]), ValueError, r"importance\[0\]: expected shape \[3\] \(the rows"),
        (
            update_importance_,
            ([matrix(3)], [ONE], [ONE], 1.5),
            ValueError,
            r"beta: expected a number in \[0, 1\], got 1.5",
        ),
        (
            update_sensitivity_,
            ([ONE], [ONE], [ONE], [ONE]),
            ValueError,
            r"uncertainty\[0\]: .* that of sensitivity\[0\]",
        ),
        (
            update_sensitivity_,
            ([ONE], [ONE.clone()], [ONE], [ONE], 0.5, "half"),
            TypeError,
            r"beta2: expected a number in \[0, 1\], got 'half'",
        ),
        (zero_pruned_, ([ONE], [THRESHOLD], [matrix(2)]), ValueError, r"scores\[0\]: expected shape \[3, 2\] or \[3\]"),
        (zero_pruned_, ([ONE], [0.5], [ONE]), TypeError, r"thresholds\[0\]: expected a KeepThreshold, got float"),
        (zero_pruned_, ([ONE], THRESHOLD, [ONE]), ValueError, "thresholds: expected 1 tensors"),
        (zero_pruned_, ([ONE], [THRESHOLD], [HALF]), TypeError, r"scores\[0\]: expected torch.float32"),
        (
            zero_pruned_,
            ([ONE, ONE], [THRESHOLD] * 2, [ONE] * 2),
            ValueError,
            r"weights\[1\]: .* got that of weights\[0\]",
        ),
    ],
)
def test_bad_input(function, arguments, error, text):
    with pytest.raises(error, match=text):
        function(*arguments)


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_launch_covers_every_tile(tmp_path):
    """What finds a thread block its matrix has no CUDA in it, so it runs here."""
    source, program = Path(__file__).with_name("tensor_table_tiles.cpp"), tmp_path / "tiles"
    includes = f"-I{source.parents[2] / 'csrc'}"
    subprocess.run([COMPILER, "-std=c++20", "-Wall", "-Wextra", "-Werror", includes, source, "-o", program], check=True)
    assert subprocess.run([program]).returncode == 0


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype, place):
    check_everything(Problem([*SHAPES, (768, 768), (300, 3072)], dtype, place, "cuda"))


@needs_gpu
@pytest.mark.gpu
def test_ties_on_a_gpu():
    check_ties("cuda")


@needs_gpu
@pytest.mark.gpu
def test_many_matrices_on_a_gpu():
    check_everything(Problem([(i % 5 + 1, i % 7 + 1) for i in range(1200)], torch.float32, device="cuda"))


@needs_gpu
@pytest.mark.gpu
def test_in_a_cuda_graph():
    """Capturing refuses what waits for the device, and a replay reads the thresholds anew."""
    problem = Problem([(64, 128), (33, 515)], torch.float32, device="cuda")
    thresholds = keep_threshold(problem.scores, 0.5)

    def step() -> Tensor:
        accumulate_movement_(problem.scores, problem.weights, problem.grads, 0.0)
        update_importance_(problem.row_scores, problem.weights, problem.grads)
        update_sensitivity_(problem.sensitivity, problem.uncertainty, problem.weights, problem.grads)
        zero_pruned_(problem.weights, thresholds, problem.scores)
        return sparsity_statistics(problem.weights)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        statistics = step()
    for threshold, fewer in zip(thresholds, keep_threshold(problem.scores, 0.25)):
        threshold.value.copy_(fewer.value)
        threshold.tie_index.copy_(fewer.tie_index)
    graph.replay()
    assert statistics[:, 0].tolist() == [64 * 128 // 4, math.floor(33 * 515 / 4 + 0.5)]
