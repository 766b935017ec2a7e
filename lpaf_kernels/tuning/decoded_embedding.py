"""When decoded_embedding's Triton kernel runs, and with which tiles: a rule, not a measurement."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..triton.launch import tile_launch
from . import dispatch
from .table import Plan

OP = "decoded_embedding"
KERNEL = Plan("one_kernel")


def cuda_forward(
    ids: Tensor, latent: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], norms: Tensor | None
) -> Tensor | None:
    """[*ids.shape, dim] of CUDA tensors by the kernel, in the dtypes whose products the matrix unit makes; None where
    torch is to serve."""
    gpu = dispatch.current_gpu(latent.get_device())
    broken = dispatch.is_broken(OP, KERNEL) or gpu.triton is None
    if broken or gpu.arch < 80 or not dispatch.matrix_unit(latent.dtype, gpu.arch):
        return None
    from ..triton import decoded_embedding as kernels

    try:
        # One program makes whole rows where a row must be known before it is written.
        columns = layers[-1][0].shape[1] if kernels.columns_apart(layers, norms) else 1
        launch = tile_launch("decode", max(ids.numel(), 1), columns, gpu.arch)
        return kernels.decode(ids, latent, layers, norms, launch)
    except Exception as error:
        dispatch.report_broken(OP, KERNEL, error)
        return None
