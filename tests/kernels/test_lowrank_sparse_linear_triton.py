"""The Triton kernels of lowrank_sparse_linear: interpreted on the CPU, compiled for every architecture, on a GPU."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import interpreted
from lpaf_kernels.triton.launch import LAUNCHES, MAX_WIDTH, Launch, default_launch, pitch, split_depth, split_width

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable]:
    """Run a function of :mod:`interpreted` in a process whose triton interprets."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=interpreted.start_process) as pool:
            yield lambda function, *arguments: pool.submit(function, *arguments).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


@needs_triton
@pytest.mark.parametrize("seed", range(208))
def test_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_sparse_linear, seed)


@needs_triton
def test_interpreter_runs_interpreted(interpreter: Callable) -> None:
    """The process above really interprets, or the tests above would need a GPU."""
    assert interpreter(interpreted.is_interpreting)


@pytest.mark.parametrize("kernel", ["project", "expand", "one_kernel", "outer"])
def test_every_launch_is_drawn(kernel: str) -> None:
    drawn = {interpreted.draw_launch(kernel, seed) for seed in range(208)}
    assert {launch for launch in LAUNCHES.values() if launch.kernel == kernel} <= drawn


SHAPES = [  # rows, in, out, rank, kept: divisible by 16 or not, parts of 64 + 16, 128 + 16, 256 + 16, several programs
    (4096, 768, 3072, 80, 154),
    (4096, 768, 768, 130, 38),
    (4096, 3072, 768, 260, 0),
    (16, 768, 768, 20, 77),
    (128, 4096, 4096, 1024, 410),
]


def launched(launch: Launch, shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> list:
    """The launches that ``launch`` makes for one shape in a forward and a backward, on meta tensors."""
    from lpaf_kernels.triton import lowrank_sparse_linear as kernels
    from lpaf_kernels.triton.launch import recording

    rows, d_in, d_out, rank, kept = shape
    x, down, up, bias, grad, z = (
        torch.empty(*size, device="meta", dtype=dtype)
        for size in (
            (rows, d_in), (rank + kept, d_in), (rank, d_out), (d_out,), (rows, d_out), (rows, pitch(rank + kept))
        )
    )  # fmt: skip
    positions = torch.empty(kept, device="meta", dtype=torch.int32) if kept else None
    saved = None if activation == "none" else grad
    with recording() as calls:
        if launch.kernel == "project":
            kernels.project(x, down, launch)
            kernels.project(grad, up, launch, positions, saved, activation, keep_splits=False)
        elif launch.kernel == "expand":
            kernels.expand(z, 1, up, dtype, launch, positions, bias, activation, activation != "none")
            kernels.expand(z, 1, down, dtype, launch)
            parts = torch.empty(4, *z.shape, device="meta")
            kernels.expand(parts, 4, up, dtype, launch, positions, bias)
        elif launch.kernel == "outer":
            kernels.outer(z, rank + kept, x, launch)
            kernels.outer(z, rank, grad, launch, True)
        elif rank + kept <= launch.max_width:
            kernels.one_kernel(x, down, up, launch, positions, bias, activation)
            kernels.one_kernel(x, down, up, launch, positions, bias, activation, True, activation != "none")
    return calls


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiled(name: str, arch: int) -> None:
    """Every shipped launch on every architecture it names: no stack, shared memory fits, its matrix instruction."""
    check_compiled(name, arch, [(SHAPES[0], torch.bfloat16, "none"), (SHAPES[2], torch.bfloat16, "gelu")])


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiled_at_every_shape(name: str, arch: int) -> None:
    cases = [(shape, torch.bfloat16, activation) for shape in SHAPES for activation in ("none", "gelu")]
    check_compiled(name, arch, [*cases, (SHAPES[1], torch.float16, "silu")])


def check_compiled(name: str, arch: int, cases: list[tuple]) -> None:
    from lpaf_kernels.triton.resources import compile_calls

    launch = LAUNCHES[name]
    if arch not in launch.archs:
        pytest.skip(f"{name} is not meant for sm_{arch}")
    calls = [call for case in cases for call in launched(launch, *case)]
    assert calls or launch.kernel == "one_kernel"
    for call, used in compile_calls(calls, (arch,)):
        assert not used.faults(launch.instruction[arch]), (call.grid, call.constants, used)


@needs_triton
@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.slow
@pytest.mark.parametrize("name", LAUNCHES)
def test_compiled_tf32(name: str, arch: int) -> None:
    from lpaf_kernels.triton.resources import compile_calls

    launch = LAUNCHES[name]
    if arch not in launch.archs:
        pytest.skip(f"{name} is not meant for sm_{arch}")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        calls = launched(launch, SHAPES[1], torch.float32, "none")
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(call.constants["PRECISION"] == "tf32" for call in calls)
    for call, used in compile_calls(calls, (arch,)):
        assert not used.faults(), (call.grid, call.constants, used)


@needs_triton
def test_resources_see_spills() -> None:
    """A tile that cannot fit into the registers is reported, so that the tests above can fail."""
    from lpaf_kernels.triton.resources import compile_calls

    huge = Launch("expand", 256, 256, 64, 4, 2)
    ((_, used), *_) = compile_calls(launched(huge, SHAPES[0], torch.bfloat16, "gelu"), (80,))
    assert any("stack" in fault for fault in used.faults())
    assert any("wgmma" in fault for fault in used.faults("wgmma"))


def test_grid_fits_for_a_million_rows() -> None:
    for launch in LAUNCHES.values():
        for call in launched(launch, (1 << 20, 4096, 11008, 260, 0), torch.bfloat16, "none"):
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
    # Below 128 columns the matrix unit's granule of 16, or the number of programs, may cost more.
    if width >= 128 and limit >= 144:
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
