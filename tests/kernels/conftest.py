"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Every allocation, native ones too, starts as NaN (or the largest integer), so unwritten elements show."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def assert_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    """assert_accurate(actual, chain, exact): the error against float64 is at most twice that of torch's own chain.

    The floor of one rounding of the largest entry covers chains that happen to be exact.
    """

    def check(actual: Tensor, chain: Tensor, exact: Tensor) -> None:
        assert actual.shape == exact.shape
        assert actual.dtype == chain.dtype
        if exact.numel() == 0:
            return
        floor = torch.finfo(actual.dtype).eps * exact.abs().max().item()
        error = (actual.double() - exact).abs().max().item()
        allowed = 2 * (chain.double() - exact).abs().max().item() + floor
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check
