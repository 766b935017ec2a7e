"""``lpaf tune``: measure which implementation of the fused layers is the fastest on this GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModel

from lpaf_kernels.triton import missing
from lpaf_kernels.tuning.tune import ROWS, tune_linear

from ..errors import InputError
from ..models.checkpoint import is_compressed, load_config

DIRECTIONS = {"inference": ("forward",), "training": ("forward", "backward")}


def layer_shapes(model: str) -> list[tuple[int, int, int, int]]:
    """(in, out, rank, kept) of the compressed layers of a directory, each shape once; no weight is read.

    Raises:
        InputError: the directory cannot be read, or holds no compressed model.
    """
    config = load_config(model)
    if not is_compressed(config):
        raise InputError(f"--model {model}: is not compressed; pass the output of lpaf compress, or --shape")
    quantization = config.quantization_config
    modules = quantization["modules"] if isinstance(quantization, dict) else quantization.modules
    del config.quantization_config
    with torch.device("meta"):
        dense = dict(AutoModel.from_config(config).named_modules())
    shapes = {}
    for name, entry in modules.items():
        if name not in dense:
            raise InputError(f"--model {model}: its config.json compresses {name!r}, which the model does not have")
        linear = dense[name]
        shapes[linear.in_features, linear.out_features, entry["rank"], entry.get("kept", 0)] = None
    return list(shapes)


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
        model: a compressed directory, whose layers' shapes are measured. Default: none.
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
    try:
        return tune_linear(
            found,
            dtype=getattr(torch, dtype),
            rows=ROWS if rows is None else sorted(set(rows)),
            directions=DIRECTIONS[purpose],
            budget_s=budget,
            output=None if output is None else Path(output),
            report=report,
        )
    except ValueError as error:
        raise InputError(f"--{error}") from None
