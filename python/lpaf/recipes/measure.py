"""The measured parts of a report: latency, ranks and spectra, versions."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

import lpaf_kernels
from lpaf_kernels import sparsity_statistics

from ..evaluate.latency import interleaved_latency
from ..evaluate.spectra import numerical_rank, singular_values
from ..factorize import Factorized
from ..models.device import device_name
from ..report.figures import pack_mask
from ..report.summary import rank_spread, whole_rank
from ..retrain.mixed_rank import lowrank_linears

#: masks of at most this many matrices are kept for the sparsity pictures
PICTURED_MASKS = 6


def latency_record(models: Mapping[str, nn.Module], batch: int, length: int, rounds: int = 15) -> dict[str, Any]:
    """report.json's ``latency_ms``: "dense" against "compressed" (and others), interleaved, in their own dtype."""
    times = interleaved_latency(models, batch, length, rounds=rounds)
    parameter = next(models["dense"].parameters())
    return {
        "dense": times["dense"].median,
        "compressed": times["compressed"].median,
        "speedup": times["dense"].median / times["compressed"].median,
        "batch": batch,
        "length": length,
        "device": device_name(parameter.device),
        "device_type": parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "median": {name: value.median for name, value in times.items()},
        "p20": {name: value.p20 for name, value in times.items()},
        "p80": {name: value.p80 for name, value in times.items()},
        "rounds": rounds,
    }


def rank_record(
    dense: Mapping[str, torch.Tensor], factorized: Factorized, model: nn.Module, pruned: bool, compact: bool = False
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """report.json's ``rank``, and the spectra and masks behind the pictures.

    Args:
        dense: matrix name -> [out, in] before compression.
        factorized: the matrices that were factorised, pruned or not, or that stayed of a model cut short.
        model: the compressed model.
        pruned: whether ``factorized.weights`` were pruned.
        compact: whether they are the sums of what ``model`` stores.
    """
    dense = {name: weight for name, weight in dense.items() if name in factorized.weights}
    if not dense:  # token embeddings alone were compressed
        return {"mean_before": None, "mean_after": None, "mean_compressed": None, "per_matrix": {}}, {}
    spectra = {"dense": singular_values(dense, "spectra dense")}
    if pruned:
        spectra["pruned"] = singular_values(factorized.weights, "spectra pruned")
    shapes = {name: tuple(weight.shape) for name, weight in dense.items()}
    ranks = {
        stage: {name: numerical_rank(values, shapes[name]) for name, values in stage_values.items()}
        for stage, stage_values in spectra.items()
    }
    compressed = lowrank_linears(model)
    counts = sparsity_statistics([factorized.weights[name] for name in shapes]).tolist()
    if compact:  # what is sparse is S
        for row, name in enumerate(shapes):
            layer = compressed.get(name)
            if layer is not None and layer.rank:
                rows = layer.kept.numel()
                counts[row] = rows * layer.in_features, rows, layer.in_features if rows else 0
    per_matrix = {
        name: {
            "shape": list(shape),
            "left": list(factorized.weights[name].shape),
            "dense": ranks["dense"][name],
            "pruned": ranks["pruned"][name] if pruned else None,
            "compressed": compressed[name].rank if name in compressed else None,
            "kept": compressed[name].kept.numel() if name in compressed else None,
            "kept_share": entries / (shape[0] * shape[1]),
            "kept_rows": rows,
            "kept_columns": columns,
            "error": factorized.errors[name],
        }
        for (name, shape), (entries, rows, columns) in zip(shapes.items(), counts, strict=True)
    }
    smallest, median, largest = rank_spread(per_matrix) or (None, None, None)
    chosen = [rank for entry in per_matrix.values() if (rank := whole_rank(entry)) is not None]
    record = {
        "mean_before": float(np.mean(list(ranks["dense"].values()))),
        "mean_after": float(np.mean(list(ranks["pruned" if pruned else "dense"].values()))),
        "mean_compressed": float(np.mean(chosen)) if chosen else None,
        "min_compressed": smallest,
        "median_compressed": median,
        "max_compressed": largest,
        "per_matrix": per_matrix,
    }
    analysis = {
        f"singular_values.{stage}.{name}": values
        for stage, stage_values in spectra.items()
        for name, values in stage_values.items()
    }
    if pruned:
        middle = len(shapes) // 2 // PICTURED_MASKS * PICTURED_MASKS
        for name in list(shapes)[middle : middle + PICTURED_MASKS]:
            dense_sum = compact and name in compressed and compressed[name].rank
            if factorized.weights[name].shape == shapes[name] and not dense_sum:  # nothing of it is gone
                analysis[f"mask.{name}"] = pack_mask((factorized.weights[name] != 0).cpu())
    return record, analysis


def neuron_record(scores: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """What the picture of the neurons' importance is drawn from: tensors for analysis.safetensors.

    Args:
        scores: matrix name -> importance of its neurons [out], as a pruner of neurons detaches them. Scores [out, in]
            are of weights, and scores with signs are movement: both are left out.
        model: the compact model; its ``LowRankSparseLinear`` say which neurons they keep.

    Returns:
        ``importance.NAME`` float32 [out] and, for compact layers, ``kept_neurons.NAME`` int32 [kept], on the CPU.
    """
    compact, analysis = lowrank_linears(model), {}
    for name, values in scores.items():
        if values.dim() == 1 and not (values < 0).any():
            analysis[f"importance.{name}"] = values.detach().float().cpu()
            if name in compact:
                analysis[f"kept_neurons.{name}"] = compact[name].kept.detach().int().cpu()
    return analysis


def versions() -> dict[str, str]:
    """Versions of what computed a result."""
    names = ("torch", "transformers", "datasets", "accelerate", "safetensors", "numpy")
    return {
        "lpaf-kernels": lpaf_kernels.__version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }
