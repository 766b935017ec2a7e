"""The Triton kernel of decoded_embedding: interpreted on the CPU, compiled for every architecture, on a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

import interpreted
from accuracy import check_accurate
from lpaf_kernels import DecodedEmbedding
from lpaf_kernels.ops.decoded_embedding import decoded_embedding_reference
from lpaf_kernels.triton.launch import LAUNCHES
from lpaf_kernels.triton.shipped import DECODED_ALL_CASES, DECODED_CORE_CASES, DECODED_KERNELS, DECODED_SHAPES, faults
from lpaf_kernels.tuning import decoded_embedding as plans
from lpaf_kernels.tuning import dispatch
from lpaf_kernels.tuning.dispatch import matrix_unit

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
SEEDS = 48


@needs_triton
@pytest.mark.parametrize("seed", range(SEEDS))
def test_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_decoded_embedding, seed)


@needs_triton
@pytest.mark.parametrize("seed", range(SEEDS))
def test_gradient_interpreted(seed: int, interpreter: Callable) -> None:
    interpreter(interpreted.check_decoded_embedding_gradient, seed)


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_on_a_gpu(seed: int) -> None:
    interpreted.check_decoded_embedding(seed, "cuda")
    interpreted.check_decoded_embedding_gradient(seed, "cuda")


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("hidden", [(), (64,), (64, 128)])
def test_operator_on_a_gpu(dtype: torch.dtype, hidden: tuple[int, ...]) -> None:
    """The operator end to end, forward and backward."""
    layer = DecodedEmbedding(1000, 256, 32, hidden, norms=True, padding_idx=0, device="cuda", dtype=dtype)
    ids = torch.randint(1000, (4, 70), device="cuda")
    grad = torch.randn(4, 70, 256, device="cuda").to(dtype)
    parameters = list(layer.parameters())
    y = layer(ids)
    actual = [y, *torch.autograd.grad(y, parameters, grad)]

    def reference(to: torch.dtype) -> list[torch.Tensor]:
        latent, *rest = (parameter.detach().to(to).requires_grad_() for parameter in parameters)
        y = decoded_embedding_reference(ids, latent, list(zip(rest[::2], rest[1::2])), layer.norms.to(to), 0)
        return [y, *torch.autograd.grad(y, [latent, *rest], grad.to(to))]

    for results in zip(actual, reference(dtype), reference(torch.float64), strict=True):
        check_accurate(*results)


def test_every_launch_is_drawn() -> None:
    drawn = {interpreted.draw_launch(kernel, seed) for kernel in DECODED_KERNELS for seed in range(SEEDS)}
    assert {launch for launch in LAUNCHES.values() if launch.kernel in DECODED_KERNELS} <= drawn


COMPILED = [
    (name, arch) for name, launch in LAUNCHES.items() if launch.kernel in DECODED_KERNELS for arch in launch.archs
]


@needs_triton
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled(name: str, arch: int) -> None:
    """Every shipped launch on every architecture it names: no stack, shared memory fits, its matrix instruction."""
    check_compiled(name, arch, DECODED_CORE_CASES)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled_at_every_shape(name: str, arch: int) -> None:
    check_compiled(name, arch, DECODED_ALL_CASES)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), COMPILED)
def test_compiled_tf32(name: str, arch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    if not matrix_unit(torch.float32, arch):
        assert arch == 100
        return
    check_compiled(name, arch, [(shape, torch.float32, True) for shape in DECODED_SHAPES[:3]])


def check_compiled(name: str, arch: int, cases: list[tuple]) -> None:
    compiled = list(faults(name, arch, cases))
    assert compiled
    for call, found in compiled:
        assert not found, (call.grid, call.constants)


@needs_triton
@pytest.mark.parametrize("case", ["taken", "exact float32", "no triton", "old", "fails"])
def test_rule(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit embeddings go by the kernel where it can run; what fails is left to torch, with one warning."""
    from lpaf_kernels.triton import decoded_embedding as kernels

    monkeypatch.setattr(dispatch, "_broken", set())
    gpu = dispatch.Gpu("NVIDIA Test GPU", 70 if case == "old" else 90, None if case == "no triton" else "3.6")
    monkeypatch.setattr(dispatch, "current_gpu", lambda index: gpu)
    launched = []

    def decode(ids, latent, layers, norms, launch):
        launched.append(launch)
        if case == "fails":
            raise RuntimeError("out of resource")
        return latent.new_zeros((*ids.shape, layers[-1][0].shape[1]))

    def last_gradient(grad, ids, latent, layers, norms, padding_idx, launch):
        return decode(ids, latent, layers, norms, launch), None, []

    monkeypatch.setattr(kernels, "decode", decode)
    monkeypatch.setattr(kernels, "last_gradient", last_gradient)
    dtype = torch.float32 if case == "exact float32" else torch.bfloat16
    latent, layers = torch.randn(50, 16).to(dtype), [(torch.randn(16, 64).to(dtype), None)]
    ids = torch.zeros(65536, dtype=torch.int64)
    if case == "fails":
        with pytest.warns(UserWarning, match="one_kernel failed and is not used again: out of resource"):
            assert plans.cuda_forward(ids, latent, layers, None) is None
        # The forward's failure is not the backward's.
        with pytest.warns(UserWarning, match="kernels failed and is not used again: out of resource"):
            assert plans.cuda_last_gradient(latent, ids, latent, layers, None, -1) is None
        launched.pop()
    assert (plans.cuda_last_gradient(latent, ids, latent, layers, None, -1) is None) == (case != "taken")
    assert [launch.kernel for launch in launched] == {"taken": ["decode_grad"], "fails": ["decode"]}.get(case, [])
    launched.clear()
    y = plans.cuda_forward(ids, latent, layers, None)
    assert (y is not None) == (case == "taken")
    assert len(launched) == (case == "taken")
    if case == "taken":
        assert y.shape == (65536, 64)
        assert launched[0].block_m == 128
        # Where rows are whole, fewer programs: the tiles are smaller.
        plans.cuda_forward(ids[:2048], latent, layers, torch.ones(50).bfloat16())
        assert launched[1].block_m == 16
