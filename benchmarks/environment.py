"""Where a row was measured: device, versions, commit, and the two ceilings of the device."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lpaf_kernels

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Environment:
    """The columns of a row that are the same for a whole run."""

    device: str
    driver: str | None
    cuda: str | None
    torch: str
    triton: str | None
    lpaf_kernels: str
    python: str
    threads: int | None
    commit: str | None

    def columns(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def slug(self) -> str:
        """A folder name for the device."""
        words = self.device if self.threads is None else f"{self.device} {self.threads} threads"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def _output(*command: str) -> str | None:
    """The first line that a program prints, or None if it cannot be run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None


def _processor() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return f"CPU {found[1].strip()}" if found else f"CPU {platform.processor() or platform.machine()}"


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def describe(device: torch.device) -> Environment:
    """The environment of a run on ``device``."""
    cuda = device.type == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return Environment(
        device=torch.cuda.get_device_name(device) if cuda else _processor(),
        driver=_output(*query) if cuda else None,
        cuda=torch.version.cuda,
        torch=torch.__version__,
        triton=_triton_version(),
        lpaf_kernels=lpaf_kernels.__version__,
        python=platform.python_version(),
        threads=None if cuda else torch.get_num_threads(),
        commit=_output("git", "describe", "--always", "--dirty"),
    )


@dataclass(frozen=True)
class Ceilings:
    """What the device was seen to do in this run: bytes per second of a large copy (read and written) and
    operations per second of a large matrix product in one dtype."""

    bandwidth: float
    flops: float

    def seconds(self, flops: int, moved: int) -> float:
        """The least time for this much work."""
        return max(flops / self.flops, moved / self.bandwidth)


def _seconds(run: Callable[[], Tensor], device: torch.device, repeats: int) -> float:
    """The shortest of ``repeats`` calls after two that warm up: a ceiling is the best that was seen."""
    taken = []
    for turn in range(repeats + 2):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if turn >= 2:
            taken.append(time.perf_counter() - begin)
    return min(taken)


def measure_ceilings(device: torch.device, dtype: torch.dtype, small: bool = False) -> Ceilings:
    """Copy and multiply random tensors: 2 GiB and 8192 cubed on CUDA, 256 MiB and 1536 cubed on a CPU.

    Args:
        device: the device.
        dtype: of the product.
        small: 4 MiB and 128 cubed, for tests of what comes after. Default: False.
    """
    cuda = device.type == "cuda"
    copied, side, repeats = (2**31, 8192, 9) if cuda else (2**28, 1536, 9)
    if small:
        copied, side, repeats = 2**22, 128, 3
    bandwidth = 2 * copied / _copy_seconds(copied, device, repeats)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return Ceilings(bandwidth, 2 * side**3 / _seconds(lambda: left @ right, device, repeats))


def _copy_seconds(size: int, device: torch.device, repeats: int) -> float:
    """The time to copy ``size`` bytes; the buffers are gone afterwards."""
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    return _seconds(lambda: target.copy_(source), device, repeats)
