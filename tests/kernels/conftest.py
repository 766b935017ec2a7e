"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from accuracy import check_accurate


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
    return check_accurate
