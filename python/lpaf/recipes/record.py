"""What a finished run says of itself: the content of report.json and the tensors behind its pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..factorize import Factorized
from ..models.count import encoder_params, forward_macs, total_params, weight_bytes
from ..models.targets import encoder_linears
from ..report.summary import STAGES
from .measure import latency_record, rank_record, versions
from .pruning import score_init, takes

if TYPE_CHECKING:
    from .compress import Compression

REPORT_SCHEMA = 1


def run_record(
    run: Compression, dense: nn.Module, model: nn.Module, factorized: Factorized, controls: Mapping[str, nn.Module]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """report.json's content and the tensors behind its pictures."""
    options, prepared, spec = run.options, run.prepared, run.prepared.data.spec
    pruner = prepared.method.pruner
    before = {name: linear.weight.detach() for name, linear in encoder_linears(dense).items()}
    models = {"dense": dense, "compressed": model, **controls}
    with run.timed("measure"):
        times = latency_record(models, options.bench_batch, options.bench_length)
        ranks, analysis = rank_record(before, factorized, model, pruned=pruner is not None)
    analysis |= {f"scores.{name}": scores for name, scores in run.examples.items()}
    dense_params, compressed_params = encoder_params(dense), encoder_params(model)
    length = options.bench_length
    return {
        "schema": REPORT_SCHEMA,
        "method": prepared.method.name,
        "model": options.model,
        "task": options.task,
        "problem": spec.problem,
        "seed": options.seed,
        "command": run.command,
        "metric": {
            "name": spec.main_metric,
            **{stage: run.metric(stage) for stage in STAGES},
            "others": {
                name: {stage: run.metric(stage, name) for stage in STAGES}
                for name in spec.metrics
                if name != spec.main_metric
            },
            "details": run.details,
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
                "metric": run.metric(f"compressed-{name}"),
                "encoder_ratio": encoder_params(control) / dense_params,
                "file_bytes": weight_bytes(control),
                "flops": forward_macs(control, length),
                "latency_ms": times["median"][name],
            }
            for name, control in controls.items()
        },
        "rank": ranks,
        "training": run.history,
        "seconds": {stage: round(value, 2) for stage, value in run.seconds.items()},
        "versions": versions(),
        "config": options.to_dict()
        | {
            "rank": options.rank if prepared.rank is None else prepared.rank,
            "pruner": pruner,
            "keep": options.keep if pruner and takes(pruner, "keep") else None,
            "score_init": score_init(pruner, options),
            "mixed_rank_p": run.mixed_rank_p if prepared.method.retrainer == "mixed-rank" else None,
            "finetune_epochs": prepared.finetune_epochs,
            "max_length": prepared.max_length,
            **(dataclasses.asdict(prepared.spans) if spec.is_question_answering else {}),
            "weighting": prepared.method.weighting,
            "device": prepared.device,
        },
        "data": {
            "train": len(prepared.data.train),
            "validation": {name: len(split) for name, split in prepared.data.validation.items()},
            "fingerprint": prepared.data.fingerprint,
        },
    }, analysis
