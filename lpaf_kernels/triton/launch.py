"""Launch configurations and how a rank is cut into tiles whose sides are powers of two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

# Rank columns that a program can hold: 256 + 16, the two parts of rank 260.
MAX_WIDTH = 272
GRANULE = 16
# Taller tiles do not add up splits: their float32 parts would not fit into shared memory, and need no splits.
MAX_SPLIT_ROWS = 64
# More padding than this is avoided where a finer cut exists.
MAX_PADDING = 1.15

# About what fills a large GPU.
FEW_PROGRAMS = 128

# Sides of a head that "attend" has tiles for.
HEAD_DIMS = (32, 64, 96, 128)
# "attend" reads z from columns that are a multiple of this, in 16-byte pieces of 2-byte numbers.
ALIGNED = 8

KERNELS = (
    "project",
    "expand",
    "one_kernel",
    "outer",
    "ffn",
    "ffn_wide",
    "ffn_rows",
    "ffn_weights",
    "attend",
    "close",
    "masked",
    "masked_grads",
    "decode",
    "decode_grad",
)
# Those whose programs hold no rank columns, or any number of them.
_ANY_WIDTH = ("project", "expand", "outer", "ffn_wide", "masked", "masked_grads", "decode", "decode_grad")

# The matrix instruction of 16-bit products by capability: tiles of at least 64 rows use the warpgroup's.
_SMALL = {80: "mma.sync", 90: "mma.sync", 100: "mma.sync"}
_LARGE = {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}


@dataclass(frozen=True)
class Launch:
    """How one kernel is launched.

    Args:
        kernel: "project", "expand", "one_kernel", "outer", "ffn", "ffn_wide", "ffn_rows", "ffn_weights", "attend",
            "close", "masked", "masked_grads", "decode" or "decode_grad".
        block_m, block_n, block_k: tile sides, powers of two of at least 16. What they tile is said at each kernel;
            a side that a kernel derives from the rank is 0. "ffn": rows, hidden columns, input columns ("ffn_wide":
            rank columns). "attend": query rows, keys, the widest head (see ``head``). "close": rows, output columns,
            input columns. "masked": rows, output columns, the columns that are summed over. "masked_grads": output and
            input columns, the rows that are summed over. "decode" and "decode_grad": rows, output
            columns, the columns that are summed over.
        num_warps: 1, 2, 4, 8 or 16.
        num_stages: depth of the software pipeline, at least 1.
        splits: programs that share one output tile's sum ("project", "outer", "ffn_weights"), one row tile's columns
            ("one_kernel") or its hidden columns ("ffn", "ffn_wide", "ffn_rows"). 0: as many as fill the device.
        max_width: rank columns that one program holds at most, up to 272; "one_kernel" holds a quarter of 4 bytes.
        archs: the compute capabilities times ten (80, 90, 100) it is meant for.
    """

    kernel: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    max_width: int = MAX_WIDTH
    archs: tuple[int, ...] = (80, 90, 100)

    def __post_init__(self) -> None:
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel: expected {', '.join(KERNELS[:-1])} or {KERNELS[-1]}, got {self.kernel!r}")
        for name in ("block_m", "block_n", "block_k"):
            side = getattr(self, name)
            if side != 0 and (side < GRANULE or side & (side - 1)):
                raise ValueError(f"{name}: expected 0 or a power of two of at least {GRANULE}, got {side}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps: expected 1, 2, 4, 8 or 16, got {self.num_warps}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages: expected at least 1, got {self.num_stages}")
        if self.splits < 0:
            raise ValueError(f"splits: expected at least 0, got {self.splits}")
        if not GRANULE <= self.max_width <= MAX_WIDTH:
            raise ValueError(f"max_width: expected {GRANULE} to {MAX_WIDTH}, got {self.max_width}")

    @property
    def name(self) -> str:
        """Short and unique: what tables store."""
        sides = "x".join(str(side) for side in (self.block_m, self.block_n, self.block_k))
        return f"{self.kernel}-{sides}-w{self.num_warps}-s{self.num_stages}-p{self.splits}-r{self.max_width}"

    def holds(self, width: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        """Whether it can run at ``width`` rank columns: only one_kernel and those of a block must hold all at once.

        They keep z as an operand of the next product, in registers: of 4-byte numbers (TF32) a quarter fits.
        """
        return self.kernel in _ANY_WIDTH or width <= self.max_width // (1 if dtype.itemsize <= 2 else 4)

    @property
    def instruction(self) -> dict[int, str]:
        """By capability, the matrix instruction that products of 16-bit numbers must compile to."""
        side = self.block_n if self.kernel in ("outer", "ffn_weights") else self.block_m
        table = _LARGE if side >= 64 and self.num_warps >= 4 else _SMALL
        return {arch: table[arch] for arch in self.archs}


_NEW = (90, 100)
_SHIPPED = (
    # Tall inputs: every row tile reads its rows once for all rank columns.
    Launch("project", 128, 0, 64, 8, 3, archs=_NEW),
    Launch("project", 128, 0, 64, 8, 3, max_width=192, archs=(80,)),
    Launch("project", 64, 0, 64, 4, 3, max_width=208, archs=_NEW),
    Launch("project", 64, 0, 32, 4, 3, max_width=144, archs=_NEW),
    Launch("project", 64, 0, 32, 4, 2, max_width=144, archs=(80,)),
    # Few row tiles: the depth is split, or the rank columns go to more programs.
    Launch("project", 64, 0, 64, 4, 3, splits=4, max_width=80, archs=_NEW),
    Launch("project", 32, 0, 64, 4, 4, max_width=144),
    Launch("project", 32, 0, 64, 4, 4, splits=4, max_width=144),
    Launch("project", 16, 0, 64, 4, 4, max_width=80),
    Launch("project", 16, 0, 128, 4, 2, splits=2, max_width=64),
    Launch("project", 16, 0, 128, 2, 2, splits=4, max_width=32),
    Launch("expand", 128, 128, 64, 8, 3),
    Launch("expand", 64, 128, 64, 4, 3, archs=_NEW),
    Launch("expand", 64, 128, 64, 8, 3, archs=(80,)),
    Launch("expand", 32, 64, 64, 2, 3, archs=(90,)),
    Launch("expand", 32, 64, 64, 4, 3, archs=(80,)),
    Launch("expand", 32, 64, 64, 4, 2, archs=(100,)),
    Launch("expand", 16, 64, 64, 4, 3),
    Launch("expand", 16, 32, 128, 4, 3),
    Launch("one_kernel", 128, 128, 64, 8, 3, max_width=144),
    Launch("one_kernel", 128, 64, 64, 8, 2, archs=_NEW),
    Launch("one_kernel", 64, 64, 64, 4, 3, splits=0, max_width=144),
    Launch("one_kernel", 64, 32, 64, 8, 2, splits=0, archs=_NEW),
    Launch("one_kernel", 16, 64, 64, 4, 3, splits=0, max_width=144),
    Launch("one_kernel", 16, 32, 128, 4, 3, splits=0, max_width=64),
    Launch("outer", 0, 128, 64, 8, 3, splits=0, archs=_NEW),
    Launch("outer", 0, 128, 64, 8, 3, splits=0, max_width=144),
    Launch("outer", 0, 64, 64, 4, 3, splits=0, max_width=144),
    Launch("ffn", 128, 32, 64, 8, 2, archs=(100,)),
    Launch("ffn", 128, 32, 64, 8, 2, max_width=208, archs=(90,)),
    Launch("ffn", 128, 32, 64, 8, 2, max_width=144, archs=(80,)),
    Launch("ffn", 64, 32, 64, 4, 2, splits=0, max_width=208, archs=(100,)),
    Launch("ffn", 64, 16, 64, 4, 2, splits=0, archs=(100,)),
    Launch("ffn", 64, 32, 64, 4, 2, splits=0, max_width=144, archs=(80, 90)),
    Launch("ffn", 64, 64, 64, 8, 2, splits=0, max_width=144, archs=(90,)),
    Launch("ffn", 64, 32, 64, 8, 2, splits=0, archs=(90,)),
    Launch("ffn", 128, 16, 16, 8, 3, splits=0, archs=(80,)),
    Launch("ffn", 16, 16, 64, 4, 2, splits=0, max_width=144),
    Launch("ffn_wide", 128, 32, 64, 8, 2, max_width=144, archs=(90,)),
    Launch("ffn_wide", 128, 32, 32, 8, 2, max_width=144, archs=(80,)),
    Launch("ffn_wide", 64, 32, 64, 4, 2, splits=0, archs=(100,)),
    Launch("ffn_wide", 64, 32, 32, 8, 2, splits=0, archs=(90,)),
    Launch("ffn_wide", 64, 32, 32, 4, 2, splits=0, max_width=144, archs=(80,)),
    Launch("ffn_rows", 128, 32, 0, 8, 2, max_width=144, archs=(90,)),
    Launch("ffn_rows", 64, 32, 0, 8, 2, splits=0, archs=(90,)),
    Launch("ffn_rows", 64, 32, 0, 4, 1, splits=0, archs=(100,)),
    Launch("ffn_rows", 128, 16, 0, 8, 2, splits=0, max_width=208, archs=(80,)),
    Launch("ffn_rows", 16, 32, 0, 4, 2, splits=0, max_width=128),
    Launch("ffn_weights", 0, 64, 32, 8, 2, splits=0, archs=(90,)),
    Launch("ffn_weights", 0, 64, 32, 4, 2, splits=0, max_width=208, archs=(100,)),
    Launch("ffn_weights", 0, 64, 16, 4, 2, splits=0, archs=(100,)),
    Launch("ffn_weights", 0, 64, 16, 8, 2, splits=0, max_width=208, archs=(80,)),
    # Tall tiles make K and V of a sequence less often.
    Launch("attend", 128, 64, 64, 8, 3, max_width=80, archs=(90,)),
    Launch("attend", 128, 64, 64, 8, 1, max_width=128, archs=(100,)),
    Launch("attend", 128, 32, 64, 8, 1, max_width=80, archs=(80,)),
    Launch("attend", 64, 64, 64, 4, 2, max_width=144, archs=(90,)),
    Launch("attend", 128, 32, 256, 8, 2, archs=_NEW),
    Launch("attend", 64, 32, 128, 8, 2, archs=(90,)),
    Launch("attend", 64, 32, 256, 8, 1, max_width=144, archs=(100,)),
    Launch("attend", 32, 32, 64, 4, 2, archs=(80,)),
    Launch("attend", 32, 32, 256, 4, 2, max_width=144, archs=(80,)),
    Launch("attend", 16, 32, 256, 4, 2, max_width=144, archs=(80, 90)),
    Launch("attend", 16, 32, 64, 4, 2, max_width=144, archs=(100,)),
    Launch("close", 128, 64, 64, 8, 2, archs=_NEW),
    Launch("close", 128, 64, 64, 8, 2, max_width=144, archs=(80,)),
    Launch("close", 64, 64, 64, 4, 2, max_width=208, archs=_NEW),
    Launch("close", 64, 64, 64, 4, 2, max_width=144, archs=(80,)),
    Launch("close", 128, 16, 16, 8, 3, archs=(80,)),
    Launch("close", 16, 64, 64, 4, 2, max_width=144),
    Launch("masked", 128, 128, 64, 8, 3, archs=_NEW),
    Launch("masked", 128, 128, 32, 8, 3, archs=(80,)),
    Launch("masked", 128, 64, 64, 8, 3, archs=_NEW),
    Launch("masked", 128, 64, 32, 4, 3, archs=(80,)),
    Launch("masked", 64, 64, 64, 4, 3),
    Launch("masked", 16, 64, 64, 4, 3),
    Launch("masked_grads", 128, 128, 64, 8, 3),
    Launch("masked_grads", 128, 64, 64, 4, 3),
    Launch("masked_grads", 64, 64, 64, 4, 3),
    Launch("decode", 128, 128, 64, 8, 3, archs=_NEW),
    Launch("decode", 128, 128, 32, 8, 3, archs=(80,)),
    Launch("decode", 64, 64, 64, 4, 3, archs=_NEW),
    Launch("decode", 64, 64, 32, 4, 3, archs=(80,)),
    Launch("decode", 16, 64, 64, 4, 3, archs=(80, 100)),
    Launch("decode", 16, 64, 64, 4, 2, archs=(90,)),
    # Beside the sum there is a tile of the given gradient.
    Launch("decode_grad", 64, 64, 32, 8, 3),
    Launch("decode_grad", 16, 64, 32, 4, 2, archs=(80, 100)),
    Launch("decode_grad", 16, 64, 16, 4, 2, archs=(90,)),
)
LAUNCHES = {launch.name: launch for launch in _SHIPPED}


def head_columns(head_dim: int, rotary: bool) -> int:
    """What "attend" holds of a head: turned by an angle, its halves with their cosines and sines count twice."""
    return 2 * head_dim if rotary else head_dim


def candidates(kernel: str, width: int, arch: int, dtype: torch.dtype = torch.bfloat16, head: int = 0) -> list[Launch]:
    """The shipped launches of ``kernel`` for a capability that hold ``width`` rank columns of ``dtype``.

    "attend" must hold ``head`` columns (:func:`head_columns`) of Q, K and V as well.
    """
    arch = max((known for known in (80, 90, 100) if known <= arch), default=80)
    return [
        launch
        for launch in LAUNCHES.values()
        if launch.kernel == kernel and arch in launch.archs and launch.holds(width, dtype)
        if kernel != "attend" or head <= launch.block_k
    ]


def default_launch(
    kernel: str, rows: int, width: int, arch: int, dtype: torch.dtype = torch.bfloat16, head: int = 0
) -> Launch:
    """What is used where nothing was measured: the tallest tile that still makes about one program per multiprocessor.

    "attend" counts the rows of every head, and ``head`` as :func:`candidates` does.

    Raises:
        ValueError: more rank columns than one_kernel or a kernel of a block holds.
    """
    found = candidates(kernel, width, arch, dtype, head)
    if not found:
        most = max((held for held in range(MAX_WIDTH + 1) if candidates(kernel, held, arch, dtype, head)), default=0)
        raise ValueError(f"rank + kept: expected at most {most} for {kernel} in {dtype}, got {width}")
    if kernel in ("outer", "ffn_weights"):
        return found[0]
    # Splits of the hidden dimension fill the device from one row tile on.
    blocks = kernel in ("ffn", "ffn_wide", "ffn_rows")
    fits = [
        launch
        for launch in found
        if launch.splits != 4 and rows >= (1 if blocks and launch.splits == 0 else 64) * launch.block_m
    ]
    return fits[0] if fits else min(found, key=lambda launch: launch.block_m)


def tile_launch(kernel: str, height: int, width: int, arch: int) -> Launch:
    """What is used where nothing was measured for a kernel with one program per output tile, one of masked_linear's.

    Of an output [height, width] the largest tile that makes at least 128 of them, else the smallest.
    """
    found = sorted(candidates(kernel, 0, arch), key=lambda launch: -launch.block_m * launch.block_n)
    fits = (launch for launch in found if -(-height // launch.block_m) * -(-width // launch.block_n) >= FEW_PROGRAMS)
    return next(fits, found[-1])


def _ceil(value: int, granule: int) -> int:
    return -(-value // granule) * granule


@lru_cache(maxsize=4096)
def split_width(width: int, limit: int = MAX_WIDTH) -> tuple[tuple[int, int, int], int]:
    """Cut ``width`` columns into equal programs of up to three power-of-two parts: (parts, programs).

    The fewest programs (each reads the input once) whose padding is at most 15 %, else those with the least
    padding. A part of 0 is not there. 130 -> (128, 16, 0) x 1; 207 -> (128, 64, 16) x 1; 1024 -> (256, 0, 0) x 4.

    Example:
        >>> split_width(80)
        ((64, 16, 0), 1)
    """
    least = _ceil(width, GRANULE)
    best: tuple[int, tuple[int, int, int], int] | None = None
    for programs in range(-(-width // limit), max(width // GRANULE, 1) + 1):
        parts = _parts(-(-width // programs), limit)
        if parts is None:
            continue
        padded = sum(parts) * programs
        if best is None or padded < best[0]:
            best = (padded, parts, programs)
        if padded <= max(MAX_PADDING * width, least):
            break
    assert best is not None
    return best[1], best[2]


def _parts(width: int, limit: int) -> tuple[int, int, int] | None:
    """The smallest sum of at most three descending powers of two of at least 16 that covers ``width``."""
    sides = [0, *(1 << bit for bit in range(4, 9))]
    fits = [
        (high + middle + low, (high, middle, low))
        for high in sides[1:]
        for middle in sides
        for low in sides
        if high >= middle >= low and (middle or not low) and width <= high + middle + low <= limit
    ]
    # Of equal sums the one with the fewest parts.
    return min(fits, key=lambda fit: (fit[0], -fit[1].count(0)))[1] if fits else None


@lru_cache(maxsize=4096)
def split_depth(depth: int, limit: int) -> tuple[int, int]:
    """(step, tail): a loop of ``depth // step`` full steps and one tail step (0: none), both powers of two.

    The largest step up to ``limit`` with at most 15 % padding, else the one with the least.

    Example:
        >>> split_depth(130, 64), split_depth(80, 64), split_depth(41, 64)
        ((64, 16), (64, 16), (32, 16))
    """
    best: tuple[int, int, int] | None = None
    step = limit
    while step >= GRANULE:
        rest = depth % step
        tail = 0
        if rest:
            tail = GRANULE
            while tail < rest:
                tail *= 2
        padded = depth - rest + tail
        if best is None or padded < best[0]:
            best = (padded, step, tail)
        if padded <= MAX_PADDING * depth:
            break
        step //= 2
    assert best is not None
    return best[1], best[2]


def pitch(width: int) -> int:
    """Row length of a stored intermediate of ``width`` columns: 16 elements make rows load in 16-byte pieces."""
    return _ceil(width, GRANULE)


@lru_cache(maxsize=16)
def _multiprocessor_count(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many multiprocessors the tensor's device has; 132 (H100) for meta tensors, 1 for the interpreter's."""
    if tensor.is_cuda:
        return _multiprocessor_count(tensor.get_device())
    return 132 if tensor.is_meta else 1


@dataclass(frozen=True)
class Call:
    """One kernel launch that was recorded in place of being made."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any] = field(hash=False)
    num_warps: int
    num_stages: int


_recorded: list[Call] | None = None


@contextmanager
def recording() -> Iterator[list[Call]]:
    """Collect launches in place of making them. With meta tensors the host code runs at any size, without a GPU."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def start(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int, **constants: Any
) -> None:
    """Launch ``kernel``, or record the launch inside :func:`recording`."""
    if _recorded is not None:
        _recorded.append(Call(kernel, grid, arguments, constants, num_warps, num_stages))
        return
    kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages)
