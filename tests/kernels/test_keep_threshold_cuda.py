"""The GPU's keep_threshold: its algorithm run on the host, block by block and thread by thread, and on a GPU."""

from __future__ import annotations

import ctypes
import math
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lpaf_kernels import NATIVE
from lpaf_kernels.ops.keep_threshold import _keep_threshold, keep_threshold_reference, threshold_mask

ROOT = Path(__file__).resolve().parents[2]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]  # in the order of the driver's numbers
MIN_CHUNK, CHUNK = 1 << 12, 1 << 15  # entries of one block
ENOUGH = 1024  # blocks; longer chunks wait until there are so many
TABLE = 256  # tensors of one launch of Prepare

on_a_gpu = pytest.mark.skipif(NATIVE["cuda"] != "loaded" or not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """grid(scores, keep, across, weights=None, blocks=ENOUGH, seed=0) runs blocks and threads in a drawn order."""
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    library = tmp_path_factory.mktemp("grid") / "keep_threshold_grid.so"
    source = Path(__file__).with_name("keep_threshold_grid.cpp")
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC"]
    command = [compiler, *flags, f"-I{ROOT / 'csrc'}", source, "-o", library]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    driver = ctypes.CDLL(library).keep_threshold_grid

    def run(
        scores: list[Tensor],
        keep: float,
        across: bool,
        weights: list[Tensor] | None = None,
        blocks: int = ENOUGH,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        dtype, count = scores[0].dtype, len(scores)
        value = torch.empty(count, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        tie_index = torch.empty(count, dtype=torch.int64)
        driver(
            DTYPES.index(dtype),
            ctypes.c_int64(count),
            _pointers(scores),
            None if weights is None else _pointers(weights),
            (ctypes.c_int64 * count)(*(tensor.numel() for tensor in scores)),
            ctypes.c_double(keep),
            ctypes.c_bool(across),
            blocks,
            ctypes.c_uint64(seed),
            ctypes.c_void_p(value.data_ptr()),
            ctypes.c_void_p(tie_index.data_ptr()),
        )
        return value, tie_index

    return run


def _pointers(tensors: list[Tensor]) -> ctypes.Array:
    assert all(tensor.is_contiguous() for tensor in tensors)
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def draw_scores(draw: random.Random, dtype: torch.dtype, size: int) -> Tensor:
    """Entries of one kind, some with others strewn in, at any alignment."""
    start = draw.randrange(8)
    shape = (start + size,)
    tiny = torch.finfo(dtype).smallest_normal
    kinds = {
        "normal": lambda: torch.randn(shape),
        "ties": lambda: torch.randint(-2, 3, shape).float(),
        "equal": lambda: torch.full(shape, draw.choice([0.0, -0.0, -1.5, math.inf, -math.inf])),
        "denormals": lambda: torch.randn(shape, dtype=torch.float64) * tiny / 8,
        "close": lambda: 1 + torch.randint(0, 40, shape).double() * torch.finfo(dtype).eps,
    }
    scores = kinds[draw.choice(list(kinds))]().to(dtype)
    for other in (math.inf, -math.inf, 0.0, -0.0):
        if draw.random() < 0.2:
            scores[torch.rand(shape) < 0.1] = other
    return scores[start:]


def draw_case(seed: int) -> tuple[list[Tensor], float, bool, list[Tensor] | None]:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    dtype = DTYPES[seed % len(DTYPES)]
    sizes = draw.choices([0, 1, 3, 9, 100, 1023, MIN_CHUNK + 1, CHUNK - 1, CHUNK + 9], k=draw.choice([1, 2, 5]))
    scores = [draw_scores(draw, dtype, size) for size in sizes]
    keep = draw.choice([0.0, 1.0, 0.5, 0.1, 0.9, 1e-6, 1 - 1e-6, draw.random()])
    highest = draw.choice([1, 5, 3000, 1 << 40])
    weights = [torch.randint(1, highest + 1, (size,)) for size in sizes] if draw.random() < 0.4 else None
    return scores, keep, draw.random() < 0.5, weights


def check(
    result: tuple[Tensor, Tensor], scores: list[Tensor], keep: float, across: bool, weights: list[Tensor] | None
) -> None:
    """The masks are those of the reference; without weights the threshold is the last kept entry, as on the CPU."""
    expected = keep_threshold_reference(scores, keep, "global" if across else "matrix", weights)
    for entries, value, tie_index, mask in zip(scores, *result, expected, strict=True):
        assert torch.equal(threshold_mask(entries, value, tie_index), mask)
        assert 0 <= tie_index <= entries.numel()
    if weights is None:
        value, tie_index = _keep_threshold(scores, keep, across, None)
        assert torch.equal(result[0], value)
        assert torch.equal(result[1], tie_index)


@pytest.mark.parametrize("seed", range(120))
def test_drawn_cases_match_a_stable_sort(grid, seed):
    case = draw_case(seed)
    check(grid(*case, blocks=(ENOUGH, 1, 8)[seed % 3], seed=seed), *case)


@pytest.mark.parametrize("chunk", [MIN_CHUNK, CHUNK])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_chunks_and_packs_at_any_alignment(grid, dtype, chunk):
    entries = torch.randn(3 * chunk + 40).to(dtype).round(decimals=1)
    sizes = [*range(20), 255, 256, 1024, chunk - 1, chunk, chunk + 1, 2 * chunk, 3 * chunk + 17]
    for start in range(16 // dtype.itemsize):
        scores = [entries[start : start + size] for size in sizes]
        for across in (False, True):
            value, tie_index = grid(scores, 0.4, across, blocks=ENOUGH if chunk == MIN_CHUNK else 1)
            expected = _keep_threshold(scores, 0.4, across, None)
            assert torch.equal(value, expected[0])
            assert torch.equal(tie_index, expected[1])


@pytest.mark.parametrize("weighted", [False, True])
def test_sizes_and_order_of_the_grid_do_not_matter(grid, weighted):
    scores = [torch.randn(2 * CHUNK).round(decimals=1), torch.zeros(4 * CHUNK + 5), torch.randn(900)]
    weights = [torch.randint(1, 800, tensor.shape) for tensor in scores] if weighted else None
    for across in (False, True):
        first = grid(scores, 0.3, across, weights)
        for seed in range(1, 7):
            value, tie_index = grid(scores, 0.3, across, weights, (ENOUGH, 40, 1)[seed % 3], seed)
            assert torch.equal(value, first[0])
            assert torch.equal(tie_index, first[1])


@pytest.mark.parametrize("count", [1, TABLE - 1, TABLE, TABLE + 1, 2 * TABLE + 3])
@pytest.mark.parametrize("across", [False, True])
def test_many_tensors(grid, count, across):
    scores = [torch.randint(-9, 9, (i % 7,)).float() for i in range(count)]
    check(grid(scores, 0.6, across), scores, 0.6, across, None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_values_of_16_bits(grid, dtype):
    """Each tensor keeps its first entry."""
    entries = torch.arange(0, 1 << 16, 13).to(torch.int16).view(dtype)
    entries = torch.cat([entries[~entries.isnan()], torch.tensor([math.inf, 0.0, -0.0, -65504.0], dtype=dtype)])
    entries = entries[entries > -math.inf]
    value, tie_index = grid([torch.stack([entry, -torch.tensor(math.inf)]).to(dtype) for entry in entries], 0.5, False)
    assert torch.equal(value, entries.float())
    assert (tie_index == 1).all()


@pytest.mark.parametrize("fill", [0.0, -1.0])
def test_all_equal(grid, fill):
    scores = [torch.full((3 * CHUNK + 1,), fill)]
    value, tie_index = grid(scores, 0.7, False)
    assert (value.item(), tie_index.item()) == (fill, math.floor(0.7 * scores[0].numel() + 0.5))


def test_nothing_and_everything(grid):
    scores = [torch.randn(6), torch.empty(0), torch.randn(CHUNK + 3)]
    sizes = [6, 0, CHUNK + 3]
    heavy = [torch.full(tensor.shape, 100) for tensor in scores]
    nothing = [math.inf] * 3, [0] * 3
    for across in (False, True):
        results = [grid(scores, 0.0, across), grid(scores, 0.0, across, heavy), grid(scores, 1e-5, across, heavy)]
        assert all((value.tolist(), tie_index.tolist()) == nothing for value, tie_index in results)
        for weights in (None, heavy):
            value, tie_index = grid(scores, 1.0, across, weights)
            expected = [-math.inf, -math.inf if across else math.inf, -math.inf]  # nothing is all of nothing
            assert (value.tolist(), tie_index.tolist()) == (expected, sizes)
    assert [result.tolist() for result in grid([torch.empty(0)], 1.0, True)] == [[math.inf], [0]]


def invalid_cases(dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor] | None]]:
    """Lists whose second tensor alone has no threshold."""
    scores = [torch.randn(size).to(dtype) for size in (50, 2 * CHUNK + 7, 40)]
    ones = [torch.ones(tensor.shape, dtype=torch.int64) for tensor in scores]
    cases = []
    for place in (0, CHUNK + 3, -1):
        for bad in (math.nan, -math.nan):
            broken = scores[1].clone()
            broken[place] = bad
            cases += [([scores[0], broken, scores[2]], weights) for weights in (None, ones)]
        for bad in (0, -1, (1 << 62) // 100, -(1 << 63), (1 << 63) - 1):
            counts = ones[1].clone()
            counts[place] = bad
            cases.append((scores, [ones[0], counts, ones[2]]))
    return cases


def check_invalid(run: Callable, scores: list[Tensor], weights: list[Tensor] | None) -> None:
    value, tie_index = run(scores, 0.5, False, weights)
    assert value.isnan().tolist() == [False, True, False]
    assert tie_index[1] == 0
    value, tie_index = run(scores, 0.5, True, weights)
    assert value.isnan().all()
    assert (tie_index == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_counts_out_of_range_make_the_value_nan(grid, dtype):
    for scores, weights in invalid_cases(dtype):
        check_invalid(grid, scores, weights)


def test_smallest_nan_is_not_missed(grid):
    bits = torch.tensor([0x7F800001, 0x7FFFFFFF, -0x7FFFFF, -1], dtype=torch.int32)
    for pattern in bits:
        scores = torch.cat([torch.randn(37), pattern.view(1).view(torch.float32)])
        assert scores.isnan().sum() == 1
        assert grid([scores], 1.0, False)[0].isnan().all()


def test_largest_counts(grid):
    scores = [torch.tensor([3.0, 2.0, 1.0, 0.0])]
    weights = [torch.full((4,), (1 << 62) // 4)]
    check(grid(scores, 0.6, False, weights), scores, 0.6, False, weights)
    weights[0][2] += 1
    assert grid(scores, 0.6, False, weights)[0].isnan().all()


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_ten_million_scores(grid, keep):
    scores = [torch.randn(3000, 2000), torch.zeros(2000, 1000), torch.rand(2000, 1000) - 0.5]
    value, tie_index = grid(scores, keep, True, seed=1)
    kept = [threshold_mask(tensor, *pair) for tensor, pair in zip(scores, zip(value, tie_index), strict=True)]
    total = sum(tensor.numel() for tensor in scores)
    assert sum(mask.sum() for mask in kept) == math.floor(keep * total + 0.5)
    lowest = min(tensor[mask].min() for tensor, mask in zip(scores, kept, strict=True) if mask.any())
    highest = max(tensor[~mask].max() for tensor, mask in zip(scores, kept, strict=True) if not mask.all())
    assert lowest >= highest
    assert value[0] == lowest


# On a GPU


def launch(
    scores: list[Tensor], keep: float, across: bool, weights: list[Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    counts = None if weights is None else [count.cuda() for count in weights]
    value, tie_index = torch.ops.lpaf_kernels.keep_threshold([t.cuda() for t in scores], keep, across, counts)
    return value.cpu(), tie_index.cpu()


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(120))
def test_drawn_cases_on_a_gpu(seed):
    case = draw_case(seed)
    check(launch(*case), *case)


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_invalid_entries_on_a_gpu(dtype):
    for scores, weights in invalid_cases(dtype):
        check_invalid(launch, scores, weights)


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
def test_misaligned_on_a_gpu(weighted):
    entries = torch.randn(3 * CHUNK + 40).round(decimals=1).cuda()
    counts = torch.randint(1, 9, entries.shape).cuda()
    for start in range(9):
        case = [entries[start : start + size] for size in (5, CHUNK, 3 * CHUNK + 17)]
        weights = [counts[start : start + tensor.numel()] for tensor in case] if weighted else None
        for across in (False, True):
            value, tie_index = launch(case, 0.4, across, weights)
            on_cpu = None if weights is None else [count.cpu() for count in weights]
            check((value, tie_index), [tensor.cpu() for tensor in case], 0.4, across, on_cpu)


@on_a_gpu
@pytest.mark.gpu
def test_ten_million_scores_on_a_gpu():
    scores = [torch.randn(3000, 2000), torch.zeros(2000, 1000), torch.rand(2000, 1000) - 0.5]
    for keep in (0.1, 0.5, 0.9):
        for across in (False, True):
            expected = torch.ops.lpaf_kernels.keep_threshold(scores, keep, across, None)
            for _ in range(3):
                value, tie_index = launch(scores, keep, across)
                assert torch.equal(value, expected[0])
                assert torch.equal(tie_index, expected[1])


@on_a_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("across", [False, True])
def test_captured_in_a_graph(across):
    scores = [torch.zeros(CHUNK + 9, device="cuda"), torch.zeros(70, 30, device="cuda").t()]
    operator = torch.ops.lpaf_kernels.keep_threshold
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        operator(scores, 0.3, across, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, tie_index = operator(scores, 0.3, across, None)
    for _ in range(3):
        for tensor in scores:
            tensor.normal_()
        graph.replay()
        check((value.cpu(), tie_index.cpu()), [tensor.cpu() for tensor in scores], 0.3, across, None)
