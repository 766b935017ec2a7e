"""Ranks, spectra and sparsity patterns of a saved model, compressed or plain: what ``lpaf inspect`` shows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from lpaf.errors import InputError
from lpaf.evaluate.spectra import numerical_rank
from lpaf.factorize.ranks import rank_for_error
from lpaf.report.figures import (
    in_order,
    matrix_pictures,
    matrix_place,
    matrix_stack,
    pack_mask,
    pictures,
    to_png,
    unpack_mask,
)
from lpaf.report.html import folded, matrix_table, page, picture_section, section, table
from lpaf.report.summary import (
    MISSING,
    Headline,
    format_percent,
    format_rank,
    headline_sentence,
    headlines,
    is_number,
    whole_rank,
)
from lpaf.report.write import ANALYSIS_FILE, REPORT_FILE, validate_report

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Parts of a model that are 2-D but not matrices of its encoder's layers.
OUTSIDE_ENCODER = frozenset(
    {"classifier", "score", "pooler", "lm_head", "cls", "qa_outputs", "relative_attention_bias"}
)
MASKS_SHOWN = 4
# The relative error of 0.316 leaves 90 % of the sum of squares.
SMALL_ERROR = 0.1**0.5


@dataclass(frozen=True)
class Inspection:
    """What was found in a directory.

    kind: "compressed" (a run of ``lpaf compress``) or "dense" (a plain transformers directory).
    per_matrix: {name: entry} with the keys of a report's rank.per_matrix (None where there is no such number)
        and effective_rank {stage: the smallest k that keeps 90 % of the sum of squared singular values}.
    summary: counts, mean ranks, mean kept share and error.
    analysis: the spectra and masks, by the keys of analysis.safetensors.
    report: the run's report, None for a plain directory.
    """

    directory: Path
    kind: str
    per_matrix: Mapping[str, Mapping[str, Any]]
    summary: Mapping[str, Any]
    analysis: Mapping[str, torch.Tensor]
    report: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """The numbers as a JSON-able dict (without spectra and masks)."""
        return {
            "directory": str(self.directory),
            "kind": self.kind,
            "summary": dict(self.summary),
            "per_matrix": {name: dict(entry) for name, entry in self.per_matrix.items()},
        }

    def sentence(self) -> str:
        """The finding in one line."""
        means, effective = self.summary["mean_rank"], self.summary["mean_effective_rank"]
        known = [stage for stage in ("dense", "pruned", "compressed") if is_number(means[stage])]
        if not known:  # of matrices in layers nothing was compressed
            return headline_sentence(self.report) if self.report else "no matrices in layers"
        text = "mean rank: " + ", ".join(f"{stage} {format_rank(means[stage])}" for stage in known)
        known = [stage for stage in ("dense", "pruned") if is_number(effective[stage])]
        if known:
            words = ", ".join(f"{stage} {format_rank(effective[stage])}" for stage in known)
            text += f"; rank that keeps 90 % of the squares: {words}"
        return text


def is_encoder_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether a checkpoint's tensor is a weight matrix inside a numbered layer (no embedding, no head)."""
    parts = name.split(".")
    return (
        len(shape) == 2
        and min(shape) > 1
        and parts[-1] == "weight"
        and any(part.isdecimal() for part in parts)
        and not any(part in OUTSIDE_ENCODER or "embed" in part.lower() for part in parts)
    )


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"model: {path} cannot be read ({_one_line(error)}); {remedy}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _mean(values: list[Any]) -> float | None:
    known = [value for value in values if is_number(value)]
    return sum(known) / len(known) if known else None


def _summary(per_matrix: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    entries = list(per_matrix.values())
    return {
        "matrices": len(entries),
        "layers": len({(matrix_stack(name), matrix_place(name)[0]) for name in per_matrix}),
        "mean_rank": {
            **{stage: _mean([entry[stage] for entry in entries]) for stage in ("dense", "pruned")},
            "compressed": _mean([whole_rank(entry) for entry in entries]),
        },
        "mean_effective_rank": {
            stage: _mean([entry["effective_rank"].get(stage) for entry in entries]) for stage in ("dense", "pruned")
        },
        "mean_full_rank": _mean([min(entry["shape"]) for entry in entries]),
        "mean_kept_share": _mean([entry["kept_share"] for entry in entries]),
        "mean_error": _mean([entry["error"] for entry in entries]),
    }


def _inspect_compressed(directory: Path) -> Inspection:
    remedy = "pass a directory written by lpaf compress, or compress again"
    report = _read_json(directory / REPORT_FILE, remedy)
    try:
        validate_report(report)
    except ValueError as error:
        raise InputError(
            f"model: {directory / REPORT_FILE} is not a report of lpaf compress: {error}; {remedy}"
        ) from error
    path = directory / ANALYSIS_FILE
    if not path.is_file():
        raise InputError(f"model: {path} is missing beside {REPORT_FILE}; {remedy}")
    try:
        analysis = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"model: {path} cannot be read ({_one_line(error)}); {remedy}") from error
    per_matrix = {}
    for name, entry in in_order(report["rank"]["per_matrix"]).items():
        spectra = {stage: analysis.get(f"singular_values.{stage}.{name}") for stage in ("dense", "pruned")}
        effective = {stage: rank_for_error(s, SMALL_ERROR) for stage, s in spectra.items() if s is not None}
        per_matrix[name] = {**entry, "effective_rank": effective}
        if f"mask.{name}" in analysis:
            try:
                unpack_mask(analysis[f"mask.{name}"], entry["shape"])
            except ValueError as error:
                raise InputError(f"model: {path} holds a broken mask of {name} ({error}); {remedy}") from error
    return Inspection(directory, "compressed", per_matrix, _summary(per_matrix), analysis, report)


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if (directory / INDEX_FILE).is_file():
        remedy = "save the model again with save_pretrained"
        index = _read_json(directory / INDEX_FILE, remedy)
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not names:
            raise InputError(f"model: {directory / INDEX_FILE} has no weight_map; {remedy}")
        files = [directory / name for name in sorted(set(names.values()))]
        for path in files:
            if not path.is_file():
                raise InputError(f"model: {path} is missing though {INDEX_FILE} names it; copy the whole directory")
        return files
    raise InputError(
        f"model: {directory} has neither {REPORT_FILE} nor {WEIGHTS_FILE}; pass a directory written by "
        "lpaf compress or by save_pretrained (safetensors)"
    )


def _inspect_dense(directory: Path, progress: bool) -> Inspection:
    files = _weight_files(directory)
    per_matrix: dict[str, dict[str, Any]] = {}
    analysis: dict[str, torch.Tensor] = {}
    masks: dict[str, torch.Tensor] = {}
    found: list[tuple[Path, str]] = []
    try:
        for path in files:
            with safe_open(path, framework="pt") as tensors:
                names = sorted(tensors.keys(), key=lambda name: (matrix_place(name)[0], name))
                found.extend(
                    (path, name) for name in names if is_encoder_matrix(name, tensors.get_slice(name).get_shape())
                )
        # Shards cut through layers, so their order is not the model's.
        found.sort(key=lambda pair: (matrix_place(pair[1])[0], pair[1]))
        bar = tqdm(found, desc="singular values", unit="matrix", delay=1.0, disable=None if progress else True)
        for path, key in bar:
            with safe_open(path, framework="pt") as tensors:
                weight = tensors.get_tensor(key).float()
            if not torch.isfinite(weight).all():
                raise InputError(f"model: tensor {key} in {path} has NaN or infinite entries; pass a sound checkpoint")
            name = key.removesuffix(".weight")
            values = torch.linalg.svdvals(weight)
            kept = weight != 0
            per_matrix[name] = {
                "shape": list(weight.shape),
                "dense": numerical_rank(values, weight.shape),
                "pruned": None,
                "compressed": None,
                "kept": None,
                "kept_share": float(kept.double().mean()),
                "error": None,
                "effective_rank": {"dense": rank_for_error(values, SMALL_ERROR)},
            }
            analysis[f"singular_values.dense.{name}"] = values
            if per_matrix[name]["kept_share"] < 0.99:
                masks[f"mask.{name}"] = pack_mask(kept)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"model: the weights in {directory} cannot be read ({_one_line(error)}); copy or save the model again"
        ) from error
    if not per_matrix:
        raise InputError(
            f"model: {directory} has no weight matrices in numbered layers; pass a transformers encoder, or "
            f"for a compressed model the whole directory with {REPORT_FILE} and {ANALYSIS_FILE}"
        )
    step = max(len(masks) // MASKS_SHOWN, 1)
    for key in list(masks)[::step][:MASKS_SHOWN]:
        analysis[key] = masks[key]
    return Inspection(directory, "dense", per_matrix, _summary(per_matrix), analysis)


def inspect_directory(path: str | Path, progress: bool = True) -> Inspection:
    """Ranks and spectra of the model in a directory.

    A directory with report.json is read as a run of ``lpaf compress`` (report.json and analysis.safetensors);
    any other as a plain transformers directory, whose encoder matrices are decomposed here (``progress``:
    show a bar on a terminal when that takes over a second). Raises InputError for missing or broken files.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise InputError(f"model: {directory} is not a directory; pass one written by lpaf compress or save_pretrained")
    if (directory / REPORT_FILE).is_file():
        return _inspect_compressed(directory)
    return _inspect_dense(directory, progress)


def render_inspection(inspection: Inspection) -> str:
    """The inspection as one self-contained page."""
    means = inspection.summary["mean_rank"]
    stages = [stage for stage in ("dense", "pruned", "compressed") if is_number(means[stage])]
    if inspection.report is not None:
        found, headline = pictures(inspection.report, inspection.analysis), headlines(inspection.report)
    else:
        found = matrix_pictures(inspection.per_matrix, inspection.analysis)
        headline = [Headline(format_rank(means[stage]), f"mean rank, {stage}") for stage in stages]
    effective, full = inspection.summary["mean_effective_rank"], inspection.summary["mean_full_rank"]
    rows = [
        (
            stage,
            format_rank(means[stage]),
            format_percent(means[stage] / full),
            format_rank(effective.get(stage)),
        )
        for stage in stages
    ]
    numbers = section(
        "Ranks in numbers",
        table(("", "mean rank", "of full rank", "rank that keeps 90 % of the squares"), rows),
        folded("Every matrix", matrix_table(inspection.per_matrix)),
    )
    summary = inspection.summary
    subtitle = f"{inspection.kind} model, {summary['matrices']} matrices in {summary['layers']} layers"
    kept = summary["mean_kept_share"]
    if inspection.kind == "dense" and kept is not None and kept < 1:
        subtitle += f", {format_percent(kept)} of their weights are not zero"
    title = f"Inside {inspection.directory.resolve().name or MISSING}"
    return page(title, subtitle, headline, [numbers, *(picture_section(picture) for picture in found)])


def write_pictures(inspection: Inspection, out_dir: str | Path) -> list[Path]:
    """Write every picture as PNG and the page inspect.html into ``out_dir``; returns the paths.

    The directory is made if missing; InputError when it cannot be written.
    """
    target = Path(out_dir)
    if inspection.report is not None:
        found = pictures(inspection.report, inspection.analysis)
    else:
        found = matrix_pictures(inspection.per_matrix, inspection.analysis)
    contents = {f"{picture.name}.png": to_png(picture.figure) for picture in found}
    contents["inspect.html"] = render_inspection(inspection).encode()
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (target / name).write_bytes(content)
    except OSError as error:
        raise InputError(
            f"output: {target} cannot be written ({_one_line(error)}); choose another directory"
        ) from error
    return [target / name for name in contents]
