"""Makes ``benchmarks`` importable, which is no installed package, and the rows that several tests need."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
# At the end: where lpaf_kernels is installed, that copy and not the source tree's is tested.
sys.path.append(str(ROOT))


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Commands set torch's thread count for their whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_row():
    """make_row(provider="ours", median_us=10.0, **changes): a complete row of a small cell."""
    from benchmarks.rows import REQUIRED

    def make(provider: str = "ours", median_us: float | None = 10.0, **changes):
        row = dict.fromkeys(REQUIRED) | {
            "op": "linear",
            "in": 768,
            "out": 3072,
            "rank": 80,
            "kept": 0,
            "rows": 128,
            "dtype": "float32",
            "direction": "forward",
            "provider": provider,
            "median_us": median_us,
            "p20_us": None if median_us is None else 0.99 * median_us,
            "p80_us": None if median_us is None else 1.01 * median_us,
            "rounds": 9,
            "bytes": 3_200_000,
            "flops": 78_643_200,
            "roofline_share": 0.5,
            "ceiling_bandwidth": 2e10,
            "ceiling_flops": 1e11,
            "device": "CPU Example",
            "threads": 2,
            "torch": "2.13.0",
            "run": "a",
        }
        return row | changes

    return make
