"""What a finished run says of itself: the content of report.json and the tensors behind its pictures."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data import TaskSpec
from ..data.task_data import TEST
from ..evaluate.metrics import compute_metrics, example_scores
from ..factorize import Factorized
from ..models.count import encoder_params, forward_macs, total_params, weight_bytes
from ..models.targets import encoder_linears
from ..report.summary import STAGES
from .measure import latency_record, neuron_record, rank_record, versions
from .prepare import Prepared
from .pruning import default_scope, score_init, takes

REPORT_SCHEMA = 1


class Findings:
    """What the stages of a run find, for its report.

    Args:
        spec: the task.
    """

    def __init__(self, spec: TaskSpec) -> None:
        self.spec = spec
        #: stage -> split -> metric -> value
        self.details: dict[str, dict[str, dict[str, float]]] = {}
        #: training stage -> what it logged
        self.history: dict[str, list[dict[str, float]]] = {}
        self.seconds: dict[str, float] = {}
        #: group that ``--modules`` names -> what became of it
        self.modules: dict[str, dict[str, Any]] = {}
        #: what Fisher information was computed on
        self.fisher: dict[str, Any] = {}
        #: "stage.split" -> score of every example, float32 [N]
        self.examples: dict[str, torch.Tensor] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds of a block to those of ``stage``."""
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def score(self, stage: str, split: str, outputs: Any, labels: Any) -> None:
        """Record how well ``outputs`` fit ``labels``; both as ``compute_metrics`` takes them."""
        self.details.setdefault(stage, {})[split] = compute_metrics(self.spec, outputs, labels)
        self.examples[f"{stage}.{split}"] = torch.from_numpy(example_scores(self.spec, outputs, labels))

    def repeat(self, stage: str, other: str) -> None:
        """Record for ``other`` what ``stage`` scored: the same model."""
        self.details[other] = self.details[stage]
        for split in self.details[stage]:
            self.examples[f"{other}.{split}"] = self.examples[f"{stage}.{split}"].clone()

    def metric(self, stage: str, name: str | None = None) -> float | None:
        """A metric (default: the main one) of ``stage``, the mean over validation splits; None when the stage did not
        run."""
        if stage not in self.details:
            return None
        name = name or self.spec.main_metric
        splits = [metrics for split, metrics in self.details[stage].items() if split != TEST]
        return float(np.mean([metrics[name] for metrics in splits]))

    def to_json(self) -> dict[str, Any]:
        """All but ``examples``, which are tensors."""
        found = {"details": self.details, "history": self.history, "seconds": self.seconds}
        return found | {"fisher": self.fisher, "modules": self.modules}

    def restore(self, record: Mapping[str, Any], examples: Mapping[str, torch.Tensor]) -> None:
        """Add what :meth:`to_json` gave an earlier run, and its examples."""
        for name, values in record.items():
            getattr(self, name).update(values)
        self.examples.update(examples)


def run_record(
    prepared: Prepared,
    findings: Findings,
    command: str,
    mixed_rank_p: float | None,
    dense: nn.Module,
    model: nn.Module,
    factorized: Factorized,
    scores: Mapping[str, torch.Tensor] | None,
    controls: Mapping[str, nn.Module],
    calibrated: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """report.json's content and the tensors behind its pictures.

    Args:
        command: how the run was started.
        mixed_rank_p: first probability of the sparse path.
        dense, model: before and after.
        factorized: what factorisation left behind.
        scores: what the pruner returned.
        controls: further models made for comparison.
        calibrated: what ``input_moments`` recorded.
    """
    options, spec = prepared.options, prepared.data.spec
    pruner = prepared.method.pruner
    mixed_rank = prepared.method.retrainer == "mixed-rank" and options.retrain_epochs > 0
    before = {name: linear.weight.detach() for name, linear in encoder_linears(dense).items()}
    models = {"dense": dense, "compressed": model, **controls}
    with findings.timed("measure"):
        times = latency_record(models, options.bench_batch, prepared.bench_length)
        ranks, analysis = rank_record(before, factorized, model, pruner is not None, prepared.method.compact)
    analysis |= neuron_record(scores or {}, model)
    analysis |= {f"scores.{name}": scores for name, scores in findings.examples.items()}
    dense_params, compressed_params = encoder_params(dense), encoder_params(model)
    length = prepared.bench_length
    return {
        "schema": REPORT_SCHEMA,
        "method": prepared.method.name,
        "model": options.model,
        "task": options.task,
        "problem": spec.problem,
        "seed": options.seed,
        "command": command,
        "metric": {
            "name": spec.main_metric,
            **{stage: findings.metric(stage) for stage in STAGES},
            "others": {
                name: {stage: findings.metric(stage, name) for stage in STAGES}
                for name in spec.metrics
                if name != spec.main_metric
            },
            "details": findings.details,
        },
        "encoder_params": {
            "dense": dense_params,
            "compressed": compressed_params,
            "ratio": compressed_params / dense_params,
        },
        "total_params": {"dense": total_params(dense), "compressed": total_params(model)},
        "file_bytes": {"dense": weight_bytes(dense), "compressed": weight_bytes(model)},
        "flops": {
            "dense": forward_macs(dense, length),
            "compressed": forward_macs(model, length),
            "sequence_length": length,
        },
        "latency_ms": times,
        "controls": {
            name: {
                "metric": findings.metric(f"compressed-{name}"),
                "encoder_ratio": encoder_params(control) / dense_params,
                "file_bytes": weight_bytes(control),
                "flops": forward_macs(control, length),
                "latency_ms": times["median"][name],
            }
            for name, control in controls.items()
        },
        "rank": ranks,
        "calibration": calibrated,
        "modules": findings.modules or None,
        "fisher": findings.fisher or None,
        "training": findings.history,
        "seconds": {stage: round(value, 2) for stage, value in findings.seconds.items()},
        "versions": versions(),
        "config": options.to_dict()
        | {
            "rank": options.rank if prepared.rank is None else prepared.rank,
            "pruner": pruner,
            "scope": (options.scope or default_scope(pruner)) if pruner and takes(pruner, "scope") else None,
            "low_rank_share": prepared.neurons.low_rank_share if prepared.neurons else None,
            "keep": options.keep if pruner and takes(pruner, "keep") else None,
            "score_init": score_init(pruner, options),
            "mixed_rank_p": mixed_rank_p if mixed_rank else None,
            "finetune_epochs": prepared.finetune_epochs,
            "max_length": prepared.max_length,
            "bench_length": prepared.bench_length,
            **(dataclasses.asdict(prepared.spans) if spec.is_question_answering else {}),
            **(dataclasses.asdict(prepared.texts) if spec.is_summarization else {}),
            "weighting": prepared.method.weighting,
            "device": prepared.device,
        },
        "data": {
            "train": len(prepared.data.train or ()),
            "validation": {name: len(split) for name, split in prepared.data.validation.items()},
            "fingerprint": prepared.data.fingerprint,
        },
    }, analysis
