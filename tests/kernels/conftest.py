"""Fixtures of the kernel tests."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import native
import pytest
import torch
from torch import Tensor

import interpreted
from accuracy import check_accurate
from lpaf_kernels.tuning import Gpu, dispatch
from lpaf_kernels.tuning.table import to_json

TEST_GPU = Gpu("NVIDIA Test GPU", 90, "3.6")


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


@pytest.fixture(scope="module", params=["default", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[Callable]:
    """Run a function of :mod:`native` in a process that may use instructions up to this set: it is chosen once."""
    if request.param == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor has no AVX-512")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=native.start_process) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ATEN_CPU_CAPABILITY", request.param)
            patch.delenv("OMP_NUM_THREADS", raising=False)
            pool.submit(native.start_process).result()
        yield lambda function, seed: pool.submit(function, seed).result()


@contextmanager
def interpreting(**environment: str) -> Iterator[Callable]:
    """Run a function of :mod:`interpreted` in a process whose triton interprets; this process's must compile."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=interpreted.start_process) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {"TRITON_INTERPRET": "1", **environment}.items():
                patch.setenv(name, value)
            assert pool.submit(interpreted.is_interpreting).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable]:
    """See :func:`interpreting`."""
    with interpreting() as run:
        yield run


@pytest.fixture(scope="module")
def portable_interpreter() -> Iterator[Callable]:
    """The same with torch's portable code in the chain by which errors are judged: what a processor's vectors make of a
    product of a row or two differs between processors, and is no measure of a kernel."""
    with interpreting(ATEN_CPU_CAPABILITY="default") as run:
        yield run


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """write(entries, **meta) makes the user's table of TEST_GPU; the tables are read anew around each test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dispatch.forget()

    def write(entries: dict, **meta: str) -> Path:
        path = dispatch.user_table(TEST_GPU.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(entries, {"gpu": TEST_GPU.name, "triton": "3.6", **meta}))
        dispatch.forget()
        return path

    yield write
    dispatch.forget()
