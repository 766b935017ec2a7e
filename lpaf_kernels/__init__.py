"""Kernels and layers for compressed transformers: low-rank and masked linears, selection, weighted SVD."""

from __future__ import annotations

import torch

from ._library import NATIVE
from ._version import __version__
from .nn.decoded_embedding import DecodedEmbedding
from .nn.decoded_linear import DecodedLinear, SharedDecodedLinear
from .nn.decoded_output import DecodedOutput
from .nn.fold import fold_kept
from .nn.fuse import fuse, unfuse
from .nn.graphed import GraphRunner
from .nn.lowrank_attention import LowRankAttention
from .nn.lowrank_ffn import LowRankFFN
from .nn.lowrank_plus_sparse_linear import LowRankPlusSparseLinear
from .nn.lowrank_sparse_linear import LowRankSparseLinear, SharedLowRankLinear
from .nn.masked_linear import MaskedLinear, set_thresholds
from .nn.mixed_rank_linear import MixedRankLinear, clear_paths, draw_paths
from .nn.swap import swap_linears
from .ops._blocks import Norm
from .ops.decoded_embedding import decoded_embedding
from .ops.keep_threshold import KeepThreshold, PackedMask, keep_threshold
from .ops.lowrank_attention import lowrank_attention
from .ops.lowrank_ffn import lowrank_ffn
from .ops.lowrank_sparse_linear import lowrank_sparse_linear, packed_lowrank_sparse_linear
from .ops.masked_linear import masked_linear
from .ops.pruning_updates import (
    accumulate_movement_,
    sparsity_statistics,
    update_importance_,
    update_sensitivity_,
    zero_pruned_,
)
from .ops.weighted_svd import weighted_singular_values, weighted_svd
from .tuning.dispatch import explain, use_provider

__all__ = [
    "DecodedEmbedding",
    "DecodedLinear",
    "DecodedOutput",
    "GraphRunner",
    "KeepThreshold",
    "LowRankAttention",
    "LowRankFFN",
    "LowRankPlusSparseLinear",
    "LowRankSparseLinear",
    "MaskedLinear",
    "MixedRankLinear",
    "Norm",
    "PackedMask",
    "SharedDecodedLinear",
    "SharedLowRankLinear",
    "__version__",
    "accumulate_movement_",
    "build_info",
    "clear_paths",
    "decoded_embedding",
    "draw_paths",
    "explain",
    "fold_kept",
    "fuse",
    "keep_threshold",
    "lowrank_attention",
    "lowrank_ffn",
    "lowrank_sparse_linear",
    "masked_linear",
    "packed_lowrank_sparse_linear",
    "set_thresholds",
    "sparsity_statistics",
    "swap_linears",
    "unfuse",
    "update_importance_",
    "update_sensitivity_",
    "use_provider",
    "weighted_singular_values",
    "weighted_svd",
    "zero_pruned_",
]


def build_info() -> dict:
    """What is installed: versions, the state of each native library in words, and what the native build
    recorded.

    Keys: version, torch, native ({"cpu", "cuda"}: "loaded" or why not), build (the native module's own
    record, or None and, in "build_missing", why).
    """
    info = {"version": __version__, "torch": torch.__version__, "native": dict(NATIVE)}
    try:
        from . import _native
    except ImportError as error:
        info["build"] = None
        info["build_missing"] = f"{error}; reinstall lpaf-kernels where a C++20 compiler is installed to build it"
    else:
        info["build"] = dict(_native.build_info())
    return info
