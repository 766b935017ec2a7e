"""One rank for all matrices against ``--rank auto`` on a pruned model: the study of docs/results/rank-allocation.md.

    python benchmarks/rank_allocation.py --model DENSE --train-file TRAIN --validation-file TEST --output runs/ranks

Prunes the fine-tuned classifier DENSE (once: its work directory beside the output is reused), then factorises copies
of it at each ratio: with one rank, with the ranks of ``--rank auto``, and with those of the two measures that it was
chosen against. Prints a row per cell, and with ``--retrain-epochs`` all but the last again after retraining. For binary
tasks: beside the accuracy stands the area under the ROC curve, which no shift of the logits changes.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from lpaf.evaluate.predict import predict
from lpaf.factorize import SVDFactorizer, allocate_ranks, comparable, rank_params, relative, weighted_spectra
from lpaf.models.count import largest_ranks, matrix_shapes, rank_for_ratio, resolve_budget
from lpaf.recipes.compress import Compression
from lpaf.recipes.options import CompressOptions
from lpaf.recipes.prepare import default_mixed_rank_p, prepare

Spectra = Mapping[str, torch.Tensor]
Measure = Callable[[Spectra, Mapping[str, tuple[int, int]]], Spectra]

#: what errors of several matrices may be added up as; "auto" is the pipeline's
MEASURES: dict[str, Measure] = {
    "auto": comparable,
    "relative": lambda spectra, shapes: {name: relative(values) for name, values in spectra.items()},
    "absolute": lambda spectra, shapes: spectra,
}
HEAD = (
    "ratio",
    "ranks",
    "params",
    "rank min / median / max",
    *(f"error, {name}" for name in MEASURES),
    "accuracy",
    "AUC",
)


def left_over(spectra: Spectra, ranks: Mapping[str, int]) -> float:
    """The share of the sum of squares that these ranks miss."""
    missed = sum(float(spectra[name][rank:].square().sum()) for name, rank in ranks.items())
    return missed / sum(float(values.square().sum()) for values in spectra.values())


def scored(run: Compression, model: nn.Module) -> tuple[float, float]:
    """(accuracy, area under the ROC curve) on the examples of the validation file."""
    (examples,) = run.validation.values()
    logits = predict(model, examples, run.prepared.tokenizer).numpy()
    margins, labels = logits[:, 1] - logits[:, 0], np.array(examples["labels"])
    return float(np.mean((margins > 0) == labels)), float(roc_auc_score(labels, margins))


def row(
    ratio: float, name: str, ranks: Mapping[str, int], shapes: dict, spectra: Spectra, scores: tuple[float, float]
) -> str:
    """One line of the table."""
    params = rank_params(ranks, shapes) / sum(rows * columns for rows, columns in shapes.values())
    spread = f"{min(ranks.values())} / {statistics.median(ranks.values()):g} / {max(ranks.values())}"
    errors = [f"{left_over(measure(spectra, shapes), ranks):.4f}" for measure in MEASURES.values()]
    return (
        "| " + " | ".join([f"{ratio:g}", name, f"{params:.5f}", spread, *errors, *(f"{s:.4f}" for s in scores)]) + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a classifier fine-tuned for the task")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--train-file", required=True)
    parser.add_argument("--validation-file", required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/rank-allocation"))
    parser.add_argument("--keep", type=float, default=0.5, help="share of weights that pruning keeps")
    parser.add_argument("--retrain-epochs", type=float, default=0.0, help="0 leaves the retraining out")
    parser.add_argument("--examples", type=int, help="test on so many of the validation file's examples (default: all)")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.15])
    arguments = parser.parse_args()
    options = CompressOptions(
        model=arguments.model,
        task=arguments.task,
        train_file=arguments.train_file,
        validation_file=arguments.validation_file,
        output=str(arguments.output),
        ratio=0.25,  # of no effect here: every cell has its own
        keep=arguments.keep,
        prune_epochs=1,
        retrain_epochs=arguments.retrain_epochs or 0.5,
        retrain_lr=8e-4,
        freeze_embeddings=True,
        bf16=True,
        checkpoint_steps=10_000,
        resume=True,
    )
    run = Compression(prepare(options), command="")
    dense = run.finetune()
    pruned = copy.deepcopy(dense)
    embeddings = [module for module in pruned.modules() if isinstance(module, nn.Embedding)]
    nn.ModuleList(embeddings).requires_grad_(False)
    train_set = run.with_teacher(dense)
    scores = run.prune(pruned, train_set)
    for name, split in run.validation.items():
        run.validation[name] = split.select(range(arguments.examples or len(split)))
    for name, model in (("dense", dense), ("pruned", pruned)):
        print(name, "accuracy {:.4f}, AUC {:.4f}".format(*scored(run, model)))

    shapes = matrix_shapes(pruned)
    spectra = weighted_spectra(pruned, scores, run.prepared.method.weighting)
    chosen = {}
    print("| " + " | ".join(HEAD) + " |")
    for ratio in arguments.ratios:
        budget, largest = resolve_budget(shapes, ratio), largest_ranks(shapes)
        chosen[ratio, "uniform"] = dict.fromkeys(shapes, rank_for_ratio(shapes.values(), ratio))
        for name, measure in MEASURES.items():
            chosen[ratio, name] = allocate_ranks(measure(spectra, shapes), shapes, budget, largest)
    for (ratio, name), ranks in chosen.items():
        model = copy.deepcopy(pruned)
        SVDFactorizer(ranks, run.prepared.method.weighting)(model, scores)
        print(row(ratio, name, ranks, shapes, spectra, scored(run, model)), flush=True)
    if not arguments.retrain_epochs:
        return
    print(f"after {options.retrain_epochs:g} epochs of retraining", flush=True)
    for (ratio, name), ranks in chosen.items():
        if name != "absolute":
            run.mixed_rank_p = default_mixed_rank_p(ratio)
            model, _ = run.shrink(pruned, scores, train_set, ranks, suffix=f"-{name}-{ratio:g}")
            print(row(ratio, name, ranks, shapes, spectra, scored(run, model)), flush=True)


if __name__ == "__main__":
    main()
