"""What a run leaves beside its weights: report.json, report.html, README.md and analysis.safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from lpaf.report.card import render_card
from lpaf.report.html import render_html

SCHEMA = 1
REPORT_FILE = "report.json"
PAGE_FILE = "report.html"
CARD_FILE = "README.md"
ANALYSIS_FILE = "analysis.safetensors"

REQUIRED: dict[str, tuple[str, ...]] = {
    "metric": ("name", "dense", "pruned", "factorized", "compressed", "details"),
    "encoder_params": ("dense", "compressed", "ratio"),
    "total_params": ("dense", "compressed"),
    "file_bytes": ("dense", "compressed"),
    "flops": ("dense", "compressed", "sequence_length"),
    "latency_ms": (
        "dense", "compressed", "speedup", "batch", "length", "device", "dtype", "threads", "rounds",
        "p20", "p80",
    ),
    "rank": ("mean_before", "mean_after", "mean_compressed", "per_matrix"),
    "training": (),
    "seconds": (),
    "versions": (),
    "config": (),
    "data": ("train", "validation", "fingerprint"),
}  # fmt: skip
SCALARS = ("schema", "method", "model", "task", "seed", "command")
PER_MATRIX = ("shape", "dense", "pruned", "compressed", "kept", "kept_share", "error")
MAPPINGS_INSIDE = {
    "metric": ("details",),
    "latency_ms": ("p20", "p80"),
    "rank": ("per_matrix",),
    "data": ("validation",),
}


def _require(block: Any, keys: tuple[str, ...], where: str) -> None:
    if not isinstance(block, Mapping):
        raise ValueError(f"report: {where} is {type(block).__name__}, expected a mapping")
    missing = [key for key in keys if key not in block]
    if missing:
        raise ValueError(f"report: {where} lacks {', '.join(missing)}")


def validate_report(report: Any) -> None:
    """Check that a report has the keys its readers need; ValueError names what is missing or wrong."""
    _require(report, (*SCALARS, *REQUIRED), "report")
    if report["schema"] != SCHEMA:
        raise ValueError(f"report: schema is {report['schema']!r}, expected {SCHEMA}")
    for block, keys in REQUIRED.items():
        _require(report[block], keys, block)
        for inner in MAPPINGS_INSIDE.get(block, ()):
            _require(report[block][inner], (), f"{block}.{inner}")
    for stage, splits in report["metric"]["details"].items():
        _require(splits, (), f"metric.details.{stage}")
        for split, values in splits.items():
            _require(values, (), f"metric.details.{stage}.{split}")
    for name, entry in report["rank"]["per_matrix"].items():
        _require(entry, PER_MATRIX, f"rank.per_matrix.{name}")
        shape = entry["shape"]
        if (
            not isinstance(shape, (list, tuple))
            or len(shape) != 2
            or not all(isinstance(n, int) and n > 0 for n in shape)
        ):
            raise ValueError(f"report: rank.per_matrix.{name}.shape is {shape!r}, expected [out, in]")
    for stage, records in report["training"].items():
        if not isinstance(records, (list, tuple)):
            raise ValueError(f"report: training.{stage} is {type(records).__name__}, expected a list")
        for record in records:
            _require(record, ("step", "loss", "learning_rate"), f"training.{stage}[]")


def _finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON has no words for, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def report_json(report: Mapping[str, Any]) -> str:
    """The report as JSON text with sorted keys, the same text for the same report."""
    return json.dumps(_finite(report), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_report(directory: str | Path, report: Mapping[str, Any], analysis: Mapping[str, torch.Tensor]) -> list[Path]:
    """Write report.json, report.html, README.md and analysis.safetensors into an existing directory.

    Everything is made before the first file is written. Returns the paths. Raises ValueError for an
    incomplete report, TypeError for a value that JSON cannot hold, OSError where the
    directory cannot be written.
    """
    validate_report(report)
    tensors = {key: analysis[key].detach().cpu().contiguous().clone() for key in sorted(analysis)}
    contents = {
        REPORT_FILE: report_json(report).encode(),
        PAGE_FILE: render_html(report, tensors).encode(),
        CARD_FILE: render_card(report).encode(),
        ANALYSIS_FILE: save(tensors, metadata={"format": "pt"}),
    }
    target = Path(directory)
    for name, content in contents.items():
        (target / name).write_bytes(content)
    return [target / name for name in contents]
