"""Every shipped launch at representative sizes, recorded on meta tensors: what is compiled before it ships."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .launch import LAUNCHES, MAX_SPLIT_ROWS, MAX_WIDTH, Call, Launch, candidates, default_launch, pitch, recording

SHAPES = [  # rows, in, out, rank, kept: divisible by 16 or not, parts of 64 + 16, 128 + 16, 256 + 16, several programs
    (4096, 768, 3072, 80, 154),
    (4096, 768, 768, 130, 38),
    (4096, 3072, 768, 260, 0),
    (16, 768, 768, 20, 77),
    (128, 4096, 4096, 1024, 410),
]
# (shape, dtype, activation): the fewest that meet every branch, and all of them.
CORE_CASES = [(SHAPES[0], torch.bfloat16, "none"), (SHAPES[2], torch.bfloat16, "gelu")]
ALL_CASES = [
    *((shape, torch.bfloat16, activation) for shape in SHAPES for activation in ("none", "gelu")),
    (SHAPES[1], torch.float16, "silu"),
]
# Products of 4-byte numbers where torch allows TF32; one_kernel holds fewer columns of them.
TF32_SHAPES = [SHAPES[1], (4096, 768, 3072, 80, 41), (512, 768, 768, 41, 8), (16, 768, 768, 16, 8)]
# The same for lowrank_ffn, as (rows, in, hidden, rank, kept); silu stands for a gated block.
FFN_SHAPES = [
    (65536, 768, 3072, 80, 0),
    (65536, 768, 3072, 130, 0),
    (65536, 768, 3072, 260, 0),
    (4096, 768, 3072, 80, 38),
    (4096, 768, 3072, 80, 64),
    (4096, 768, 3072, 130, 77),
    (4096, 768, 3072, 200, 72),
    (128, 384, 1536, 41, 19),
    (16, 1000, 2730, 20, 0),
    (1, 768, 3072, 80, 13),
]
GATED_SHAPES = [(4096, 4096, 11008, 72, 0), (4096, 768, 3072, 130, 0), (1, 768, 2048, 40, 0)]
# Ranks that only the passes hold.
WIDE_SHAPES = [(4096, 768, 3072, 384, 0), (4096, 768, 3072, 768, 77), (16, 1000, 2730, 1024, 0)]
FFN_CORE_CASES = [(shape, torch.bfloat16, "gelu") for shape in (FFN_SHAPES[3], FFN_SHAPES[2], WIDE_SHAPES[0])]
FFN_ALL_CASES = [
    *((shape, torch.bfloat16, "gelu") for shape in (*FFN_SHAPES, *WIDE_SHAPES)),
    (FFN_SHAPES[1], torch.float16, "gelu_tanh"),
    *((shape, torch.bfloat16, "silu") for shape in (*GATED_SHAPES, WIDE_SHAPES[0])),
]
FFN_KERNELS = ("ffn", "ffn_wide", "ffn_rows", "ffn_weights")
FFN_TF32_SHAPES = [(4096, 768, 3072, 41, 8), (65536, 768, 3072, 68, 0), (1, 384, 1536, 16, 4), WIDE_SHAPES[0]]


def calls(launch: Launch, shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> list[Call]:
    """What ``launch`` launches in a forward and a backward of one shape; nothing where it cannot hold the rank."""
    if launch.kernel in FFN_KERNELS:
        return _ffn_calls(launch, shape, dtype, activation)
    from . import lowrank_sparse_linear as kernels

    rows, d_in, d_out, rank, kept = shape

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, device="meta", dtype=dtype)

    x, down, up, bias = empty(rows, d_in), empty(rank + kept, d_in), empty(rank, d_out), empty(d_out)
    grad, z = empty(rows, d_out), empty(rows, pitch(rank + kept))
    positions = torch.empty(kept, device="meta", dtype=torch.int32) if kept else None
    saved = None if activation == "none" else grad
    with recording() as recorded:
        if launch.kernel == "project":
            kernels.project(x, down, launch)
            kernels.project(grad, up, launch, positions, saved, activation, keep_splits=False)
        elif launch.kernel == "expand":
            kernels.expand(z, 1, up, dtype, launch, positions, bias, activation, activation != "none")
            kernels.expand(z, 1, down, dtype, launch)
            if launch.block_m <= MAX_SPLIT_ROWS:
                parts = torch.empty(4, *z.shape, device="meta")
                kernels.expand(parts, 4, up, dtype, launch, positions, bias)
        elif launch.kernel == "outer":
            kernels.outer(z, rank + kept, x, launch)
            kernels.outer(z, rank, grad, launch, True)
        elif launch.holds(rank + kept, dtype):
            kernels.one_kernel(x, down, up, launch, positions, bias, activation)
            kernels.one_kernel(x, down, up, launch, positions, bias, activation, True, activation != "none")
    return recorded


def _ffn_calls(launch: Launch, shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> list[Call]:
    from . import lowrank_ffn as kernels

    rows, d, hidden, rank, kept = shape

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, device="meta", dtype=dtype)

    def factors(d_in: int, d_out: int) -> kernels.Factors:
        positions = torch.empty(kept, device="meta", dtype=torch.int32) if kept else None
        return kernels.Factors(empty(rank + kept, d_in), empty(rank, d_out), positions, empty(d_out))

    x, z = empty(rows, d), empty(rows, pitch(rank + kept))
    first, second = factors(d, hidden), factors(hidden, d)
    gate = first if activation == "silu" else None
    width = (rank + kept) * (1 if gate is None else 2)
    if launch.kernel == "ffn_wide":
        if width <= MAX_WIDTH:
            return []
        around = (default_launch(kernel, rows, width, launch.archs[0]) for kernel in ("project", "expand"))
        launches = kernels.WideLaunches(next(around), launch, next(around))
        with recording() as recorded:
            kernels.forward_wide(x, first, second, launches, gate=gate, activation=activation)
        return [call for call in recorded if call.kernel is kernels._ffn_wide]
    norm = kernels.Norm("layer", empty(d), empty(d)) if gate is None else kernels.Norm("rms", empty(d))
    with recording() as recorded:
        if not launch.holds(width, dtype):
            pass
        elif launch.kernel == "ffn_rows":
            kernels.hidden_rows(z, z, z, first, second, launch, gate, activation)
        elif launch.kernel == "ffn_weights":
            kernels.hidden_weights(z, z, z, first, second, launch, gate, activation)
        else:
            kernels.forward(x, first, second, launch, gate=gate, activation=activation, residual=x, norm=norm)
            # z is saved only where there is a backward.
            if all(candidates("ffn_rows", width, arch, dtype) for arch in launch.archs):
                kernels.forward_with_z(x, first, second, launch, gate=gate, activation=activation)
    return recorded


def faults(name: str, arch: int, cases: Iterable[tuple] | None = None) -> Iterator[tuple[Call, list[str]]]:
    """Each kernel that launch ``name`` needs for ``cases``, compiled for ``arch``, and why it must not ship."""
    from .resources import compile_calls

    launch = LAUNCHES[name]
    if cases is None:
        cases = FFN_CORE_CASES if launch.kernel in FFN_KERNELS else CORE_CASES
    recorded = [call for case in cases for call in calls(launch, *case)]
    for call, used in compile_calls(recorded, (arch,)):
        # Products of 4-byte numbers may use another instruction than those of 2-byte ones.
        exact = call.constants["PRECISION"] == "tf32"
        # `_finish` has row tiles of its own.
        wanted = launch.instruction[arch] if call.kernel.__name__ != "_finish" else "mma.sync"
        yield call, used.faults(None if exact else wanted)
