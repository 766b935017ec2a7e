"""The Triton kernels of lowrank_ffn: interpreted on the CPU, compiled for every architecture, on a GPU."""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import interpreted

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SEEDS = range(180)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable]:
    """Run a function of :mod:`interpreted` in a process whose triton interprets; this process's must compile."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=interpreted.start_process) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            assert pool.submit(interpreted.is_interpreting).result()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@needs_triton
@pytest.mark.parametrize("seed", SEEDS)
def test_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_ffn, seed)


@needs_triton
@pytest.mark.parametrize("seed", range(120))
def test_backward_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_lowrank_ffn_backward, seed)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", SEEDS)
def test_on_a_gpu(seed: int) -> None:
    interpreted.check_lowrank_ffn(seed, "cuda")
    interpreted.check_lowrank_ffn_backward(seed, "cuda")
