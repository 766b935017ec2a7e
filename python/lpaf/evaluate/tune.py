"""``lpaf tune``: measure which implementation of the fused layers is the fastest on this GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from lpaf_kernels import LowRankSparseLinear, fuse
from lpaf_kernels.nn.fuse import AttentionParts, FeedForwardParts, fused_blocks
from lpaf_kernels.triton import missing
from lpaf_kernels.tuning import tune_attention, tune_ffn, tune_linear
from lpaf_kernels.tuning.tune import ROWS
from lpaf_kernels.tuning.tune_lowrank_attention import batches

from ..errors import InputError
from ..models.checkpoint import is_compressed, load_config
from ..models.quantizer import CompressionConfig, remove_parts

DIRECTIONS = {"inference": ("forward",), "training": ("forward", "backward")}


def layer_shapes(model: str) -> list[tuple[int, int, int, int]]:
    """(in, out, rank, kept) of the compressed layers of a directory, each shape once; no weight is read.

    Raises:
        InputError: the directory cannot be read, or holds no compressed model.
    """
    _, layers = _read(model)
    return list(dict.fromkeys(layers.values()))


def block_shapes(model: str) -> tuple[list[tuple], list[tuple]]:
    """The shapes of a directory's feed-forward and attention blocks that can run as one operator, each once.

    As :func:`tune_ffn` and :func:`tune_attention` take them; no weight is read.

    Raises:
        InputError: as :func:`layer_shapes`.
    """
    skeleton, layers = _read(model)
    for name, sizes in layers.items():
        skeleton.set_submodule(name, LowRankSparseLinear(*sizes, device="meta"))
    try:
        fuse(skeleton)
    except ValueError:  # no block of a kind that the operators know
        return [], []
    ffn, attention = {}, {}
    for block in fused_blocks(skeleton):
        if isinstance(block, FeedForwardParts):
            ffn[_ffn_sizes(block)] = None
        else:
            attention[_attention_sizes(block)] = None
    return list(ffn), list(attention)


def _ffn_sizes(block: FeedForwardParts) -> tuple:
    """(in, hidden, out, ranks, kept, gate)."""
    first, second = block.first, block.second
    ranks, kept = (first.rank, second.rank), (len(first.kept), len(second.kept))
    return first.in_features, first.out_features, second.out_features, ranks, kept, 0


def _attention_sizes(block: AttentionParts) -> tuple:
    """(in, heads, kv_heads, head_dim, out, ranks, kept, rotary)."""
    layers = (*block.projections, block.o)
    q, k, *_ = layers
    head_dim = q.out_features // block.heads
    sizes = q.in_features, block.heads, k.out_features // head_dim, head_dim, block.o.out_features
    return *sizes, tuple(layer.rank for layer in layers), tuple(len(layer.kept) for layer in layers), False


def _read(model: str) -> tuple[nn.Module, dict[str, tuple[int, int, int, int]]]:
    """The dense model of a compressed directory without its weights, and (in, out, rank, kept) by layer."""
    config = load_config(model)
    if not is_compressed(config):
        raise InputError(f"--model {model}: is not compressed; pass the output of lpaf compress, or --shape")
    quantization = config.quantization_config
    if isinstance(quantization, dict):
        quantization = CompressionConfig(**quantization)
    del config.quantization_config
    with torch.device("meta"):
        skeleton = AutoModel.from_config(config)
        remove_parts(skeleton, quantization)
    dense = dict(skeleton.named_modules())
    layers = {}
    for name, entry in quantization.modules.items():
        if name not in dense:
            raise InputError(f"--model {model}: its config.json compresses {name!r}, which the model does not have")
        linear = dense[name]
        layers[name] = linear.in_features, linear.out_features, entry["rank"], entry.get("kept", 0)
    return skeleton, layers


def tune(
    model: str | None = None,
    shapes: Sequence[tuple[int, int, int, int]] = (),
    rows: Sequence[int] | None = None,
    dtype: str = "bfloat16",
    purpose: str = "training",
    budget: float | None = None,
    output: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Measure every implementation for every shape and write the table that the layers then choose by.

    Args:
        model: a compressed directory, whose layers' shapes are measured, then those of its blocks that can be fused
            (attention in sequences of 128 and 512 that fill the rows). Default: none.
        shapes: (in, out, rank, kept) of further layers. Default: none.
        rows: numbers of rows (batch times length). Default: 1 to 16,384 in six steps.
        dtype: of inputs and parameters. Default: "bfloat16".
        purpose: "inference", or "training" for the backward too. Default: "training".
        budget: stop after so many seconds; what was measured is kept. Default: no limit.
        output: the table's file. Default: the user's own, which the layers read.
        report: receives a line per measurement. Default: print.

    Returns:
        The file.

    Raises:
        InputError: nothing to measure, a bad argument, or no NVIDIA GPU.
    """
    found = list(dict.fromkeys([*(layer_shapes(model) if model is not None else ()), *shapes]))
    if not found:
        raise InputError("--shape: expected at least one layer; pass --model DIR or --shape IN,OUT,RANK,KEPT")
    for d_in, d_out, rank, kept in found:
        if not (rank + kept > 0 and rank <= min(d_in, d_out) and kept <= d_out):
            raise InputError(f"--shape {d_in},{d_out},{rank},{kept}: RANK is at most IN and OUT, KEPT at most OUT")
    if budget is not None and not budget > 0:
        raise InputError(f"--budget {budget}: expected more than 0 seconds")
    if not torch.cuda.is_available():
        raise InputError("tuning measures on an NVIDIA GPU, and this torch sees none")
    if missing():
        raise InputError(f"tuning measures Triton kernels: {missing()}")
    rows = ROWS if rows is None else sorted(set(rows))
    started = time.monotonic()

    def options() -> dict[str, Any]:
        return {
            "dtype": getattr(torch, dtype),
            "budget_s": None if budget is None else max(budget - (time.monotonic() - started), 0.0),
            "output": None if output is None else Path(output),
            "report": report,
        }

    try:
        # Blocks are held against their layers one by one, which go by what is measured here.
        table = tune_linear(found, rows=rows, directions=DIRECTIONS[purpose], **options())
        ffn, attention = block_shapes(model) if model is not None else ([], [])
        if ffn:
            table = tune_ffn(ffn, rows=rows, directions=DIRECTIONS[purpose], **options())
        if attention and batches(rows):
            table = tune_attention(attention, batches=batches(rows), **options())
        return table
    except ValueError as error:
        raise InputError(f"--{error}") from None
