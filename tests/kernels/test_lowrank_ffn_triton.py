"""The Triton kernels of lowrank_ffn: interpreted on the CPU, compiled for every architecture, on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

import interpreted
from accuracy import check_accurate
from lpaf_kernels import use_provider
from lpaf_kernels.triton.launch import LAUNCHES, Launch, default_launch
from lpaf_kernels.triton.shipped import FFN_ALL_CASES, FFN_CORE_CASES, FFN_KERNELS, FFN_TF32_SHAPES, faults
from lpaf_kernels.tuning import FfnShape
from lpaf_kernels.tuning.dispatch import matrix_unit
from lpaf_kernels.tuning.lowrank_ffn import Problem
from lpaf_kernels.tuning.tune import double
from lpaf_kernels.tuning.tune_lowrank_ffn import make_ffn_problem

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SEEDS = range(180)


@needs_triton
@pytest.mark.parametrize("seed", SEEDS)
def test_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_ffn, seed)


@needs_triton
@pytest.mark.parametrize("seed", range(90))
def test_backward_interpreted(seed: int, portable_interpreter: Callable) -> None:
    portable_interpreter(interpreted.check_lowrank_ffn_backward, seed)


@needs_triton
@pytest.mark.parametrize("seed", range(24))
def test_wide_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_ffn_wide, seed)


@needs_triton
@pytest.mark.parametrize("seed", range(6))
def test_plan_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_ffn_plan, seed)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", SEEDS)
def test_on_a_gpu(seed: int) -> None:
    interpreted.check_lowrank_ffn(seed, "cuda")
    interpreted.check_lowrank_ffn_wide(seed, "cuda")
    interpreted.check_lowrank_ffn_backward(seed, "cuda")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("gate", [0, 24])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operator_on_a_gpu(dtype: torch.dtype, gate: int) -> None:
    """The operator end to end, made to run as one block: autograd with a norm and a residual."""
    shape = FfnShape("lowrank_ffn", "forward", "", 96, 160, 96, (41, 20), (13, 0), gate)
    problem = make_ffn_problem(70, shape, dtype)._replace(norm="rms", eps=1e-5)
    problem = problem._replace(norm_weight=torch.randn_like(problem.x[0]), residual=torch.randn_like(problem.x))

    def run(problem: Problem) -> list[torch.Tensor]:
        leaves = [t.detach().requires_grad_() if torch.is_tensor(t) and t.is_floating_point() else t for t in problem]
        y = torch.ops.lpaf_kernels.lowrank_ffn(*leaves, True)
        wanted = [leaf for leaf in leaves if torch.is_tensor(leaf) and leaf.requires_grad]
        return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y))]

    with use_provider("chain"):
        chained, exact = run(problem), run(double(problem))
    with use_provider("block"):
        for results in zip(run(problem), chained, exact, strict=True):
            check_accurate(*results)


@pytest.mark.parametrize(("kernel", "seeds"), [("ffn", 180), ("ffn_wide", 24), ("ffn_rows", 90), ("ffn_weights", 90)])
def test_every_launch_is_drawn(kernel: str, seeds: int) -> None:
    drawn = {interpreted.draw_launch(kernel, seed) for seed in range(seeds)}
    assert {launch for launch in LAUNCHES.values() if launch.kernel == kernel} <= drawn


COMPILED = [(name, arch) for name, launch in LAUNCHES.items() if launch.kernel in FFN_KERNELS for arch in launch.archs]


@needs_triton
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled(name: str, arch: int) -> None:
    """Every shipped launch on every architecture it names: no stack, shared memory fits, its matrix instruction."""
    check_compiled(name, arch, FFN_CORE_CASES)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled_at_every_shape(name: str, arch: int) -> None:
    check_compiled(name, arch, FFN_ALL_CASES)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled_tf32(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    if not matrix_unit(torch.float32, arch):
        assert arch == 100
        return
    check_compiled(name, arch, [(shape, torch.float32, "gelu") for shape in FFN_TF32_SHAPES])


def check_compiled(name: str, arch: int, cases: list[tuple]) -> None:
    compiled = list(faults(name, arch, cases))
    assert compiled
    for call, found in compiled:
        assert not found, (call.grid, call.constants)


@pytest.mark.parametrize("kernel", FFN_KERNELS)
@pytest.mark.parametrize("arch", [75, 80, 86, 90, 100, 120])
def test_there_is_a_default_launch(kernel: str, arch: int) -> None:
    known = max((listed for listed in (80, 90, 100) if listed <= arch), default=80)
    for rows in (1, 16, 512, 65536):
        for width in (16, 80, 144, 208):
            launch = default_launch(kernel, rows, width, arch)
            assert launch.kernel == kernel
            assert known in launch.archs
            assert launch.holds(width)


def test_few_rows_take_a_launch_that_splits_the_hidden_dimension() -> None:
    for rows in (1, 128, 4096):
        for width in (80, 130, 260):
            assert default_launch("ffn", rows, width, 90).splits == 0
    assert default_launch("ffn", 65536, 80, 90).block_m == 128


@needs_triton
def test_widths_that_no_program_holds_are_named() -> None:
    from lpaf_kernels.triton.lowrank_ffn import Factors, forward

    def factors(d_in: int, d_out: int, rank: int) -> Factors:
        return Factors(torch.empty(rank, d_in, device="meta"), torch.empty(rank, d_out, device="meta"))

    x, narrow, wide = torch.empty(4, 8, device="meta"), factors(8, 12, 7), factors(8, 12, 80)
    back = factors(12, 8, 7)
    launch = Launch("ffn", 16, 16, 16, 4, 1, max_width=64)
    with pytest.raises(ValueError, match="down1: expected at most 64 rows for ffn-16x16x16-w4-s1-p1-r64, got 80"):
        forward(x, wide, back, launch)
    with pytest.raises(ValueError, match="down2: expected at most 64 rows"):
        forward(x, narrow, factors(12, 8, 65), launch)
    with pytest.raises(ValueError, match="gate: expected at most 64 rows"):
        forward(x, narrow, back, launch, gate=wide)
    with pytest.raises(ValueError, match=r"down1, gate: expected at most 64 rows for .*, got 7 \+ 60"):
        forward(x, narrow, back, launch, gate=factors(8, 12, 60))
