"""The Triton kernels of lowrank_attention: interpreted on the CPU, compiled for every architecture, on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch

import interpreted
from accuracy import check_accurate
from lpaf_kernels import use_provider
from lpaf_kernels.triton.launch import LAUNCHES, Launch, default_launch, head_columns
from lpaf_kernels.triton.shipped import ATTENTION_ALL_CASES, ATTENTION_CORE_CASES, ATTENTION_KERNELS, faults
from lpaf_kernels.tuning import AttentionShape
from lpaf_kernels.tuning.lowrank_attention import Problem
from lpaf_kernels.tuning.tune import double
from lpaf_kernels.tuning.tune_lowrank_attention import make_attention_problem

if TYPE_CHECKING:
    from lpaf_kernels.triton.lowrank_attention import Projection

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SEEDS = range(40)
MORE_SEEDS = range(40, 300)
CLOSE_SEEDS = range(48)


@needs_triton
@pytest.mark.parametrize("seed", SEEDS)
def test_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_attention, seed)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("seed", MORE_SEEDS)
def test_more_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_attention, seed)


@needs_triton
@pytest.mark.parametrize("seed", CLOSE_SEEDS)
def test_close_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_attention_close, seed)


@needs_triton
@pytest.mark.parametrize("seed", range(4))
def test_plan_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_attention_plan, seed)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", [*SEEDS, *MORE_SEEDS])
def test_on_a_gpu(seed: int) -> None:
    interpreted.check_lowrank_attention(seed, "cuda")
    interpreted.check_lowrank_attention_close(seed, "cuda")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("rank", [20, 260, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_operator_on_a_gpu(dtype: torch.dtype, rank: int, rotary: bool) -> None:
    """The operator end to end, by its kernels: a padding mask, residual and norm; o of 300 columns runs as a layer."""
    ranks = (min(rank, 260), 41, 24, rank)
    shape = AttentionShape("lowrank_attention", "forward", "", 96, 4, 2, 64, 96, ranks, (5, 0, 7, 3), rotary, 70)
    problem = make_attention_problem(3, shape, dtype)._replace(norm="layer", eps=1e-5)
    mask = torch.arange(70, device="cuda") < torch.tensor([70, 33, 1], device="cuda").view(3, 1, 1, 1)
    problem = problem._replace(residual=torch.randn_like(problem.x), attn_mask=mask.expand(3, 4, 70, 70))
    problem = problem._replace(norm_weight=torch.randn_like(problem.x[0, 0]))

    def run(problem: Problem) -> list[torch.Tensor]:
        wanted = [t.requires_grad_() for t in problem[:16] if torch.is_tensor(t) and t.is_floating_point()]
        y = torch.ops.lpaf_kernels.lowrank_attention(*problem)
        return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y))]

    with use_provider("chain"):
        chained, exact = run(problem), run(double(problem))
    with use_provider("block"):
        for results in zip(run(problem), chained, exact, strict=True):
            check_accurate(*results)


@pytest.mark.parametrize(("kernel", "seeds"), [("attend", SEEDS), ("close", CLOSE_SEEDS)])
def test_every_launch_is_drawn(kernel: str, seeds: range) -> None:
    drawn = {interpreted.draw_launch(kernel, seed) for seed in seeds}
    assert {launch for launch in LAUNCHES.values() if launch.kernel == kernel} <= drawn


def test_every_option_is_drawn() -> None:
    """By the problems that run every time, most of them in every dtype."""
    problems = [interpreted.draw_attention(seed, interpreted.draw_launch("attend", seed)) for seed in SEEDS]
    for dtype in interpreted.DTYPES:
        drawn = [problem for problem in problems if problem.x.dtype == dtype]
        assert {problem.is_causal for problem in drawn} == {True, False}
        assert {problem.rotary is None for problem in drawn} == {True, False}
        assert {problem.num_heads > problem.num_kv_heads for problem in drawn} == {True, False}
        assert {None, torch.bool, dtype} == {p.mask if p.mask is None else p.mask.dtype for p in drawn}
        assert any(factors.rank == 0 for problem in drawn for factors in problem.factors)
        assert any(factors.kept is None for problem in drawn for factors in problem.factors)
    assert {problem.head_dim for problem in problems} == {32, 64, 96, 128}
    lengths = [torch.tensor(problem.bounds).diff() for problem in problems]
    assert any(any(length == 0) and any(length > 0) for length in lengths)
    assert any(len(length) == 0 for length in lengths)


COMPILED = [
    (name, arch) for name, launch in LAUNCHES.items() if launch.kernel in ATTENTION_KERNELS for arch in launch.archs
]


@needs_triton
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled(name: str, arch: int) -> None:
    """Every shipped launch on every architecture it names: no stack, shared memory fits, its matrix instruction."""
    check_compiled(name, arch, ATTENTION_CORE_CASES)


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled_at_every_shape(name: str, arch: int) -> None:
    check_compiled(name, arch, ATTENTION_ALL_CASES)


def check_compiled(name: str, arch: int, cases: list[tuple]) -> None:
    compiled = list(faults(name, arch, cases))
    assert compiled
    for call, found in compiled:
        assert not found, (call.grid, call.constants)


@pytest.mark.parametrize("arch", [75, 80, 86, 90, 100, 120])
def test_there_is_a_default_launch(arch: int) -> None:
    known = max((listed for listed in (80, 90, 100) if listed <= arch), default=80)
    for rows in (1, 128, 1536, 49152):
        for width in (16, 80, 144, 272):
            launch = default_launch("close", rows, width, arch)
            assert known in launch.archs
            assert launch.holds(width)
            for head in (32, 64, 128, 256) if width <= 144 else (32, 64):
                launch = default_launch("attend", 12 * rows, width, arch, head=head)
                assert known in launch.archs
                assert launch.holds(width)
                assert launch.block_k >= head


def test_long_inputs_take_tall_tiles_of_queries() -> None:
    for arch in (80, 90, 100):
        assert default_launch("attend", 12 * 4096, 80, arch, head=64).block_m == 128
        assert default_launch("attend", 12 * 128, 80, arch, head=64).block_m == 16


def test_a_head_that_is_turned_counts_twice() -> None:
    assert default_launch("attend", 12 * 4096, 80, 90, head=head_columns(64, True)).block_k == 256
    with pytest.raises(ValueError, match=r"expected at most 144 for attend in torch.bfloat16, got 145"):
        default_launch("attend", 12 * 4096, 145, 80, head=head_columns(128, True))


@needs_triton
def test_what_no_program_holds_is_named() -> None:
    from lpaf_kernels.triton.lowrank_attention import Projection, attend, close
    from lpaf_kernels.triton.lowrank_ffn import Factors

    def up(rank: int, head_dim: int = 64, first: int = 0) -> Projection:
        return Projection(first, torch.empty(rank, 2 * head_dim, device="meta"))

    z = torch.empty(4, 192, device="meta")
    launch = Launch("attend", 16, 16, 64, 4, 1, max_width=64)
    sizes = {"num_heads": 2, "num_kv_heads": 2, "length": 4, "scale": 0.125}
    with pytest.raises(ValueError, match="q: expected at most 64 rows for attend-16x16x64-w4-s1-p1-r64, got 65"):
        attend(z, up(65), up(64), up(64), launch, **sizes)
    # Three columns before the first are read with it.
    with pytest.raises(ValueError, match=r"v: expected at most 64 rows for .*, got 67"):
        attend(z, up(64), up(64), up(64, first=131), launch, **sizes)
    for head_dim in (48, 256):
        with pytest.raises(ValueError, match=f"head_dim: expected 32, 64, 96 or 128, got {head_dim}"):
            attend(z, up(64, head_dim), up(64, head_dim), up(64, head_dim), launch, **sizes)
    with pytest.raises(ValueError, match=r"head_dim: expected at most 64 for attend-16x16x64-.*, got 96"):
        attend(z, up(64, 96), up(64, 96), up(64, 96), launch, **sizes)
    angles = torch.empty(4, 64, device="meta")
    with pytest.raises(ValueError, match=r"head_dim: expected at most 32 for attend-16x16x64-.*, got 64"):
        attend(z, up(64), up(64), up(64), launch, **sizes, rotary=(angles, angles))
    bounds = torch.empty(2, device="meta", dtype=torch.int32)
    with pytest.raises(ValueError, match=r"mask: expected None with cu_seqlens, got \[1, 1, 1, 4\]"):
        attend(z, up(64), up(64), up(64), launch, **sizes, mask=z[:1, :4].view(1, 1, 1, 4), cu_seqlens=bounds)
    out = Factors(torch.empty(65, 128, device="meta"), torch.empty(65, 96, device="meta"))
    with pytest.raises(ValueError, match=r"down_o: expected at most 64 rows for close-.*, got 65"):
        close(torch.empty(4, 128, device="meta"), out, Launch("close", 16, 16, 16, 4, 1, max_width=64))
