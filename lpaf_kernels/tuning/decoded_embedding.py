"""When decoded_embedding's Triton kernels run, and with which tiles: a rule, not a measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from torch import Tensor

from ..triton.launch import tile_launch
from . import dispatch
from .table import Plan

OP = "decoded_embedding"
FORWARD = Plan("one_kernel")
BACKWARD = Plan("kernels")


def cuda_forward(
    ids: Tensor, latent: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], norms: Tensor | None
) -> Tensor | None:
    """[*ids.shape, dim] of CUDA tensors, or None where torch is to serve."""

    def run(kernels: ModuleType, arch: int) -> Tensor:
        # One program makes whole rows where a row must be known before it is written.
        columns = layers[-1][0].shape[1] if kernels.columns_apart(layers, norms) else 1
        launch = tile_launch("decode", max(ids.numel(), 1), columns, arch)
        return kernels.decode(ids, latent, layers, norms, launch)

    return _by_triton(FORWARD, latent, run)


def cuda_last_gradient(
    grad: Tensor,
    ids: Tensor,
    latent: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None]],
    norms: Tensor | None,
    padding_idx: int,
) -> tuple[Tensor, Tensor, list[Tensor]] | None:
    """As :func:`lpaf_kernels.triton.decoded_embedding.last_gradient`, or None where torch is to serve."""

    def run(kernels: ModuleType, arch: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        launch = tile_launch("decode_grad", max(ids.numel(), 1), 1, arch)
        return kernels.last_gradient(grad, ids, latent, layers, norms, padding_idx, launch)

    return _by_triton(BACKWARD, latent, run)


def _by_triton(plan: Plan, latent: Tensor, run: Callable[[ModuleType, int], Any]) -> Any | None:
    """``run(kernels, capability)`` in the dtypes whose products the matrix unit makes.

    None where Triton cannot, or where it failed, which is said once.
    """
    gpu = dispatch.current_gpu(latent.get_device())
    broken = dispatch.is_broken(OP, plan) or gpu.triton is None
    if broken or gpu.arch < 80 or not dispatch.matrix_unit(latent.dtype, gpu.arch):
        return None
    from ..triton import decoded_embedding as kernels

    try:
        return run(kernels, gpu.arch)
    except Exception as error:
        dispatch.report_broken(OP, plan, error)
        return None
