"""The model card: README.md of a compressed model's directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lpaf.report.summary import (
    command_text,
    flatten,
    format_count,
    format_factor,
    format_seconds,
    headlines,
    latency_conditions,
    loading_snippet,
    stage_rows,
)

METHODS = {
    "lpaf": "LPAF: first-order pruning, low-rank factorization of the sparse matrices, mixed-rank training",
    "svd": "truncated singular value decomposition of the fine-tuned matrices, then fine-tuning",
    "fwsvd": "truncated singular value decomposition weighted by Fisher information, then fine-tuning",
    "truncate": "the first layers of the fine-tuned model, fine-tuned again",
    "kd": "the first layers of the fine-tuned model, trained on its logits (knowledge distillation)",
    "losparse": "LoSparse: low-rank plus sparse matrices, neurons pruned by importance, then fine-tuning",
    "itp": "iterative structured pruning of neurons by importance, then fine-tuning",
    "movement-structured": "structured movement pruning of neurons, then fine-tuning",
    "low-rank-1": "truncated singular value decomposition, every matrix at the same share, then fine-tuning",
    "low-rank-2": "low-rank plus sparse matrices with the sparse part pruned to nothing, then fine-tuning",
    "autoencoder": "offline compression: latent rows and decoders stand in for chosen matrices, then fine-tuning",
    "prune-l1": "offline: the largest weights of chosen matrices, then fine-tuning",
    "kronecker": "offline: Kronecker products in place of chosen matrices, then fine-tuning",
    "tucker": "offline: Tucker decompositions in place of chosen matrices, then fine-tuning",
    "cofi": "blocks, heads and feed-forward neurons removed by learned gates (CoFi), then fine-tuning",
    "cofi+losparse": "blocks and heads removed by learned gates (CoFi), matrices as low-rank plus sparse (LoSparse)",
}
#: the same where nothing is trained after the matrices are replaced
WITHOUT_RETRAINING = {
    "lpaf": "LPAF without retraining: first-order pruning, low-rank factorization of the sparse matrices",
    "svd": "truncated singular value decomposition of the matrices, without training",
    "fwsvd": "truncated singular value decomposition weighted by Fisher information, without training",
    "losparse": "LoSparse without retraining: low-rank plus sparse matrices, neurons pruned by importance",
    "itp": "iterative structured pruning of neurons by importance",
    "movement-structured": "structured movement pruning of neurons",
    "low-rank-1": "truncated singular value decomposition, every matrix at the same share, without training",
    "low-rank-2": "low-rank plus sparse matrices with the sparse part pruned to nothing",
    "cofi": "blocks, heads and feed-forward neurons removed by learned gates (CoFi)",
    "autoencoder": "offline compression: latent rows and decoders stand in for chosen matrices, without training",
    "prune-l1": "offline: the largest weights of chosen matrices, without training",
    "kronecker": "offline: Kronecker products in place of chosen matrices, without training",
    "tucker": "offline: Tucker decompositions in place of chosen matrices, without training",
    "truncate": "the first layers of the model as they are",
    "kd": "the first layers of the model as they are",
}
TAGS = {
    "lpaf": ("low-rank", "pruning"),
    "svd": ("low-rank", "svd"),
    "autoencoder": ("low-rank", "autoencoder"),
    "prune-l1": ("pruning",),
    "kronecker": ("kronecker",),
    "tucker": ("tucker",),
    "fwsvd": ("low-rank", "svd", "fisher-information"),
    "truncate": ("truncated",),
    "losparse": ("low-rank", "pruning", "structured-pruning"),
    "itp": ("pruning", "structured-pruning"),
    "movement-structured": ("pruning", "structured-pruning"),
    "low-rank-1": ("low-rank", "svd"),
    "low-rank-2": ("low-rank", "pruning"),
    "cofi": ("pruning", "structured-pruning"),
    "cofi+losparse": ("low-rank", "pruning", "structured-pruning"),
    "kd": ("truncated", "knowledge-distillation"),
}
#: problem -> the Hub's name for what a model does
PIPELINE_TAGS = {
    "question-answering": "question-answering",
    "summarization": "summarization",
    "language-modeling": "text-generation",
    "masked-language-modeling": "fill-mask",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_id(model: str) -> str | None:
    """``model`` when it can only be a name on the Hub (owner/name and no such path here), else None."""
    return model if HUB_ID.fullmatch(model) and not Path(model).exists() else None


def front_matter(report: Mapping[str, Any]) -> dict[str, Any]:
    """The card's metadata, without a licence: that of the original model holds, and it is not known here."""
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": PIPELINE_TAGS.get(report.get("problem"), "text-classification"),
        "tags": ["lpaf", "model-compression", *TAGS.get(report["method"], ())],
        "metrics": [report["metric"]["name"], *report["metric"].get("others", ())],
    }
    base = hub_id(str(report["model"]))
    if base is not None:
        fields["base_model"] = base
    return fields


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _code(text: Any) -> str:
    """Inline code whose fence is longer than any run of backticks inside."""
    line = _one_line(text)
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def _block(text: str, language: str = "") -> str:
    fence = "`" * max(max((len(run) for run in re.findall(r"`+", text)), default=0) + 1, 3)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _cell(text: Any) -> str:
    return re.sub(r"([\\|*_<>\[\]`])", r"\\\1", _one_line(text))


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    ruler = "|" + "|".join([" --- ", *(" ---: " for _ in head[1:])]) + "|"
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], ruler, *lines[1:]])


def calibration_lines(report: Mapping[str, Any]) -> list[str]:
    """What the factors were fitted on, where that was calibration data."""
    found = report.get("calibration")
    if not found:
        return []
    where = "the training set" if found["source"] == "train" else _code(found["source"])
    return [
        f"- Calibration: the factors give the matrices' outputs on {found['examples']} examples of {where} "
        f"({found['tokens']} tokens) with the least error"
    ]


def module_lines(report: Mapping[str, Any]) -> list[str]:
    """What became of the modules that were compressed alone."""
    lines = []
    for name, found in (report.get("modules") or {}).items():
        errors = found["errors"].values()
        together = ", all layers together" if found["joint"] else ""
        lines.append(
            f"- Module {_code(name)}: {format_count(found['weights'])} weights in {format_count(found['stored'])} "
            f"numbers, {format_factor(found['ratio'])} smaller ({found['form']}{together}); mean relative error "
            f"{sum(errors) / len(errors):.3f}; {format_seconds(found['seconds'])}"
        )
    return lines


def fisher_lines(report: Mapping[str, Any]) -> list[str]:
    """What rows were weighted by, where that was Fisher information."""
    found = report.get("fisher")
    if not found:
        return []
    where = "of the training set" if found["source"] == "compute" else f"({_code(found['source'])})"
    examples = f"on {found['examples']} examples {where}" if "examples" in found else f"from a file {where}"
    return [f"- Rows weighted by the Fisher information of their weights {examples}"]


def render_card(report: Mapping[str, Any]) -> str:
    """The model card of one compression run as Markdown with YAML front matter."""
    matter = yaml.safe_dump(front_matter(report), sort_keys=False, allow_unicode=True, width=1000)
    method, latency, data = str(report["method"]), report["latency_ms"], report["data"]
    head = ("", "dense", "pruned", "factorized", "compressed", "compressed / dense")
    validation = ", ".join(f"{split} {count}" for split, count in data["validation"].items())
    methods = METHODS if report.get("config", {}).get("retrain_epochs") != 0 else METHODS | WITHOUT_RETRAINING
    provenance = [
        f"- Original model: {_code(report['model'])}",
        f"- Task: {_code(report['task'])}; {data['train']} training examples; validation examples: "
        f"{_one_line(validation) or 'none'}; data fingerprint {_code(data['fingerprint'])}",
        f"- Method: {_cell(methods.get(method, method))}",
        *calibration_lines(report),
        *module_lines(report),
        *fisher_lines(report),
        f"- Seed: {_one_line(report['seed'])}",
        "- Versions: " + ", ".join(f"{_cell(name)} {_cell(version)}" for name, version in flatten(report["versions"])),
    ]
    parts = [
        f"---\n{matter}---",
        f"# {_cell(Path(str(report['model'])).name)} compressed by {_cell(method)}",
        "\n".join(f"- **{_cell(part.value)}** {_cell(part.text)}" for part in headlines(report)),
        "## Use",
        "With `lpaf-kernels` installed:",
        _block(loading_snippet(report.get("problem", "classification")), "python"),
        "## Numbers",
        _table(head, [tuple(row) for row in stage_rows(report)]),
        f"Latency: median of {latency['rounds']} interleaved rounds, {_cell(latency_conditions(report))}. "
        "MACs: multiply-accumulates of the encoder's matrices and attention products. Pictures and numbers: "
        "`report.html`, `report.json`.",
        "## How it was made",
        _block(command_text(report["command"]), "sh"),
        "\n".join(provenance),
        "The licence, intended use and limits of the original model and of its training data carry over; "
        "compression can change behaviour on groups of inputs that the metric above does not tell apart.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
