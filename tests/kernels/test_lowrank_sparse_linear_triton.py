"""The Triton kernels of lowrank_sparse_linear: interpreted on the CPU, compiled for every architecture, on a GPU."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import pytest
import torch

import interpreted
from accuracy import check_accurate
from lpaf_kernels import LowRankSparseLinear, use_provider
from lpaf_kernels.triton.launch import LAUNCHES, MAX_WIDTH, Launch, default_launch, split_depth, split_width
from lpaf_kernels.triton.shipped import (
    ALL_CASES,
    ATTENTION_KERNELS,
    CORE_CASES,
    DECODED_KERNELS,
    MASKED_KERNELS,
    SHAPES,
    TF32_SHAPES,
    calls,
    faults,
)
from lpaf_kernels.tuning.dispatch import matrix_unit

OWN = ("project", "expand", "one_kernel", "outer")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.parametrize("seed", range(208))
def test_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_sparse_linear, seed)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(208))
def test_on_a_gpu(seed: int) -> None:
    interpreted.check_lowrank_sparse_linear(seed, "cuda")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("provider", ["one_kernel", "two_kernels", "chain", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_operator_on_a_gpu(provider: str, dtype: torch.dtype) -> None:
    """The operator end to end, as modules call it: forced providers, autograd, a CUDA graph."""
    torch.manual_seed(0)
    layer = LowRankSparseLinear(96, 160, 41, 13, activation="gelu", device="cuda", dtype=dtype)
    with torch.no_grad():
        layer.down[41:].normal_(std=0.1)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(70, 96, device="cuda", dtype=dtype)

    def run(module: LowRankSparseLinear, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.detach().requires_grad_()
        y = module(x)
        grad = torch.ones_like(y)
        return [y, *torch.autograd.grad(y, [x, module.down, module.up, module.bias], grad)]

    expected = run(exact, x.double())
    with use_provider("chain"):
        chained = run(layer, x)
    with use_provider(provider):
        for actual, chain, wide in zip(run(layer, x), chained, expected):
            check_accurate(actual, chain, wide)
        with torch.no_grad():
            y = layer(x)
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                layer(x)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = layer(x)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(captured, y)


@pytest.mark.parametrize("kernel", ["project", "expand", "one_kernel", "outer"])
def test_every_launch_is_drawn(kernel: str) -> None:
    drawn = {interpreted.draw_launch(kernel, seed) for seed in range(208)}
    assert {launch for launch in LAUNCHES.values() if launch.kernel == kernel} <= drawn


COMPILED = [(name, arch) for name, launch in LAUNCHES.items() if launch.kernel in OWN for arch in launch.archs]


@needs_triton
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled(name: str, arch: int) -> None:
    """Every shipped launch on every architecture it names: no stack, shared memory fits, its matrix instruction."""
    check_compiled(name, arch, CORE_CASES)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled_at_every_shape(name: str, arch: int) -> None:
    check_compiled(name, arch, ALL_CASES)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled_tf32(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    if not matrix_unit(torch.float32, arch):
        assert arch == 100
        return
    check_compiled(name, arch, [(shape, torch.float32, "none") for shape in TF32_SHAPES])


def check_compiled(name: str, arch: int, cases: list[tuple]) -> None:
    compiled = list(faults(name, arch, cases))
    held = [shape for shape, dtype, _ in cases if LAUNCHES[name].holds(sum(shape[3:]), dtype)]
    assert bool(compiled) == bool(held)
    for call, found in compiled:
        assert not found, (call.grid, call.constants)


@needs_triton
def test_resources_see_spills() -> None:
    """A tile that cannot fit into the registers is reported, so that the tests above can fail."""
    from lpaf_kernels.triton.resources import compile_calls

    huge = Launch("expand", 256, 256, 64, 4, 2)
    ((_, used), *_) = compile_calls(calls(huge, SHAPES[0], torch.bfloat16, "gelu"), (80,))
    assert any("stack" in fault for fault in used.faults())
    assert any("wgmma" in fault for fault in used.faults("wgmma"))


def test_grid_fits_for_a_million_rows() -> None:
    layer, sequences = ((1 << 20, 4096, 11008, 260, 0), "none"), ((8192, 128, 32, 8, 128, 80, 0), "padding")
    masked, decoded = ((1 << 20, 4096, 11008), torch.float32), ((1 << 20, 32000, 128, (), 4096), False)
    for launch in LAUNCHES.values():
        shape, variant = sequences if launch.kernel in ATTENTION_KERNELS else layer
        shape, variant = masked if launch.kernel in MASKED_KERNELS else (shape, variant)
        shape, variant = decoded if launch.kernel in DECODED_KERNELS else (shape, variant)
        for call in calls(launch, shape, torch.bfloat16, variant):
            assert call.grid[0] < 2**31
            assert all(side < 2**16 for side in call.grid[1:])


@pytest.mark.parametrize("width", [*range(1, 400), 744, 1024, 2225, 4096])
@pytest.mark.parametrize("limit", [32, 80, 144, 192, MAX_WIDTH])
def test_split_width_covers_with_little_padding(width: int, limit: int) -> None:
    parts, programs = split_width(width, limit)
    assert all(part == 0 or (part >= 16 and part & (part - 1) == 0) for part in parts)
    assert parts[0] > 0
    assert sum(parts) <= limit
    assert sum(parts) * programs >= width
    # Each program pads its share by at most 15 %, or up to the matrix unit's granule of 16.
    share = -(-width // programs)
    assert sum(parts) <= max(1.15 * share, -(-share // 16) * 16)
    if width >= 128 and limit == MAX_WIDTH:
        assert sum(parts) * programs <= 1.15 * width


@pytest.mark.parametrize("rank", [80, 130, 260, 1024])
def test_ranks_of_the_papers_pad_at_most_15_percent(rank: int) -> None:
    parts, programs = split_width(rank)
    assert sum(parts) * programs <= 1.15 * rank
    for limit in (64, 128):
        step, tail = split_depth(rank, limit)
        assert rank // step * step + tail <= 1.15 * rank


@pytest.mark.parametrize("depth", range(1, 600, 7))
def test_split_depth_covers(depth: int) -> None:
    for limit in (16, 32, 64, 128):
        step, tail = split_depth(depth, limit)
        assert step <= limit
        assert (tail == 0) == (depth % step == 0)
        assert tail == 0 or depth % step <= tail <= step


@pytest.mark.parametrize("kernel", ["project", "expand", "one_kernel", "outer"])
@pytest.mark.parametrize("arch", [75, 80, 86, 90, 100, 120])
def test_there_is_a_default_launch(kernel: str, arch: int) -> None:
    known = max((listed for listed in (80, 90, 100) if listed <= arch), default=80)
    for rows in (1, 16, 512, 65536):
        for width in (16, 80, 144):
            launch = default_launch(kernel, rows, width, arch)
            assert launch.kernel == kernel
            assert known in launch.archs
            assert launch.block_m <= max(rows, 16)


def test_one_kernel_holds_272_columns_at_most() -> None:
    with pytest.raises(ValueError, match=r"rank \+ kept: expected at most 272"):
        default_launch("one_kernel", 16, 273, 90)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel": "gemm"}, "kernel: expected"),
        ({"block_m": 48}, "block_m: expected 0 or a power of two"),
        ({"block_k": 8}, "block_k: expected 0 or a power of two of at least 16"),
        ({"num_warps": 3}, "num_warps: expected"),
        ({"num_stages": 0}, "num_stages: expected"),
        ({"splits": -1}, "splits: expected"),
        ({"max_width": 300}, "max_width: expected 16 to 272"),
    ],
)
def test_bad_launches_are_named(change: dict, message: str) -> None:
    fields = {"kernel": "expand", "block_m": 16, "block_n": 16, "block_k": 16, "num_warps": 4, "num_stages": 2}
    with pytest.raises(ValueError, match=message):
        Launch(**(fields | change))
