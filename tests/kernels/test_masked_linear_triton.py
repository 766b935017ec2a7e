"""The Triton kernels of masked_linear: interpreted on the CPU, compiled for every architecture, on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

import interpreted
from accuracy import check_accurate
from lpaf_kernels import keep_threshold, masked_linear, use_provider
from lpaf_kernels.ops.masked_linear import masked_linear_reference
from lpaf_kernels.triton.launch import LAUNCHES, candidates, tile_launch
from lpaf_kernels.triton.shipped import MASKED_ALL_CASES, MASKED_CORE_CASES, MASKED_KERNELS, faults

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SEEDS = 36


@needs_triton
@pytest.mark.parametrize("seed", range(SEEDS))
def test_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_masked_linear, seed)


@needs_triton
@pytest.mark.parametrize("seed", range(3))
def test_interpreted_plan(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_masked_linear_plan, seed)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_on_a_gpu(seed: int) -> None:
    interpreted.check_masked_linear(seed, "cuda")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("provider", ["kernels", "cast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("blocks", [(160, 96), (5, 3), (160, 1), (1, 96)])
@pytest.mark.parametrize("packed", [True, False])
def test_operator_on_a_gpu(provider: str, dtype: torch.dtype, blocks: tuple[int, int], packed: bool) -> None:
    """The operator end to end under autocast; blocks and packed masks go by the native kernels."""
    torch.manual_seed(0)
    inputs = [torch.randn(70, 96), torch.randn(160, 96), torch.randn(blocks).round(), torch.randn(160)]
    inputs = [tensor.cuda().requires_grad_() for tensor in inputs]
    threshold = keep_threshold(inputs[2], 0.4)
    mask = threshold.pack(inputs[2]) if packed else threshold
    assert torch.equal(threshold.pack(inputs[2]).unpack(), threshold.mask(inputs[2]))
    grad = torch.randn(70, 160, device="cuda").to(dtype)

    def run(function: Callable, wide: bool) -> list[torch.Tensor]:
        leaves = [tensor.detach().double().requires_grad_() if wide else tensor for tensor in inputs]
        with torch.autocast("cuda", dtype=dtype, enabled=not wide):
            y = function(*leaves[:3], mask, leaves[3])
        return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    chained, exact = run(masked_linear_reference, False), run(masked_linear_reference, True)
    with use_provider(provider):
        for results in zip(run(masked_linear, False), chained, exact, strict=True):
            check_accurate(*results)


@pytest.mark.parametrize("kernel", MASKED_KERNELS)
def test_every_launch_is_drawn(kernel: str) -> None:
    drawn = {interpreted.draw_launch(kernel, seed) for seed in range(SEEDS)}
    assert {launch for launch in LAUNCHES.values() if launch.kernel == kernel} <= drawn


COMPILED = [
    (name, arch) for name, launch in LAUNCHES.items() if launch.kernel in MASKED_KERNELS for arch in launch.archs
]


@needs_triton
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled(name: str, arch: int) -> None:
    """Every shipped launch on every architecture it names: no stack, shared memory fits, its matrix instruction."""
    check_compiled(name, arch, MASKED_CORE_CASES)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled_at_every_shape(name: str, arch: int) -> None:
    check_compiled(name, arch, MASKED_ALL_CASES)


def check_compiled(name: str, arch: int, cases: list[tuple]) -> None:
    compiled = list(faults(name, arch, cases))
    assert compiled
    for call, found in compiled:
        assert not found, (call.grid, call.constants)


@pytest.mark.parametrize("kernel", MASKED_KERNELS)
@pytest.mark.parametrize("arch", [75, 80, 86, 90, 100, 120])
def test_default_tiles_fill_the_device_where_there_is_enough_to_do(kernel: str, arch: int) -> None:
    known = max((listed for listed in (80, 90, 100) if listed <= arch), default=80)
    for height, width in ((1, 16), (128, 768), (768, 768), (4096, 3072), (65536, 3072)):
        launch = tile_launch(kernel, height, width, arch)
        assert launch.kernel == kernel
        assert known in launch.archs
        programs = -(-height // launch.block_m) * -(-width // launch.block_n)
        smallest = min(other.block_m * other.block_n for other in candidates(kernel, 0, known))
        assert programs >= 128 or launch.block_m * launch.block_n == smallest
