"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Every allocation, native ones too, starts as NaN, so unwritten elements show."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are small: a second thread only adds waiting. Tests of the threads ask for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def assert_accurate() -> Callable[[Tensor, Tensor, Tensor], None]:
    """assert_accurate(actual, chain, exact): the error to float64 is at most twice that of torch's own chain.

    The floor of one rounding of the largest entry covers chains that happen to be exact. A float64 chain is
    the truth itself and shows no error of its own: there the floor is that of a short sum in another order.
    """

    def check(actual: Tensor, chain: Tensor, exact: Tensor) -> None:
        assert actual.shape == exact.shape
        assert actual.dtype == chain.dtype
        if exact.numel() == 0:
            return
        roundings = 16 if actual.dtype == torch.float64 else 1
        floor = roundings * torch.finfo(actual.dtype).eps * exact.abs().max().item()
        error = (actual.double() - exact).abs().max().item()
        allowed = 2 * (chain.double() - exact).abs().max().item() + floor
        assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"

    return check
