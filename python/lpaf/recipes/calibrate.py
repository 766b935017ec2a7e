"""Calibration data: which examples show the factorisation what enters the matrices, and what they showed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..data import TaskData, load_texts, sampled
from ..data.tasks import MASKED_LANGUAGE_MODELING
from ..data.texts import IGNORED
from ..errors import InputError
from ..evaluate.predict import default_batch, run_over
from ..factorize import InputMoments
from ..models.count import matrix_shapes
from ..models.outputs import forward_inputs, head_at
from ..processes import say
from ..prune import PRUNERS
from ..report.summary import format_bytes
from ..retrain.batches import Collator
from .fingerprints import content_fingerprint
from .options import CompressOptions, given_flags

#: examples, windows or blocks that are used of a calibration file
SAMPLES = 256


def check_calibration(options: CompressOptions, factorizes: bool) -> None:
    """InputError for calibration options that the method would ignore; ``factorizes``: whether it does."""
    if options.calibration is None:
        if options.calibration_samples is not None:
            raise InputError(
                f"--calibration-samples {options.calibration_samples}: there is nothing to choose them from; pass "
                "--calibration FILE as well"
            )
    elif not factorizes:
        raise InputError(
            f"--calibration {options.calibration}: --method {options.method} factorises nothing; leave it out, or pass "
            "--method svd, fwsvd, lpaf or low-rank-1"
        )


def check_retraining(options: CompressOptions, pruner: str | None) -> None:
    """InputError for options that a run without retraining would ignore; ``pruner``: what it prunes by."""
    if options.retrain_epochs != 0:
        return
    idle = ["retrain_lr", "mixed_rank", "mixed_rank_p", "consistency"]
    if pruner is None or not PRUNERS[pruner].trains:
        # what would go to retraining, and what says how it learns
        idle += ["prune_epochs", "distill", "temperature", "freeze_embeddings"]
    for name in given_flags(options, idle):
        raise InputError(f"{name}: is for training, which --retrain-epochs 0 leaves out; leave out one of them")


def calibration_fingerprint(options: CompressOptions) -> str | None:
    """Content of the calibration file, which decides the factors."""
    path = options.calibration_file
    return None if path is None else content_fingerprint([Path(path)])


def load_calibration(data: TaskData, options: CompressOptions) -> Dataset | None:
    """The examples of the file that ``--calibration`` names, before tokenisation; None without one.

    Raises:
        InputError: no such file, one of another kind, empty or with other columns than the task's data.
    """
    path = options.calibration_file
    return None if path is None else load_texts(data, path, "--calibration")


def choose(encoded: Dataset, options: CompressOptions) -> Dataset:
    """A seeded choice of ``--calibration-samples`` tokenised examples, in their order; all if there are fewer.

    Raises:
        InputError: there is no token in them.
    """
    if not len(encoded) or not any(encoded["length"]):
        raise InputError(f"--calibration {options.calibration}: holds no token; pass a file with text")
    return sampled(encoded, options.calibration_samples or SAMPLES, options.seed)


def input_moments(
    model: nn.Module, encoded: Dataset, tokenizer: Any, problem: str, batch_size: int | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The second moment of what enters every encoder linear of ``model`` on ``encoded``, and a record of it.

    Many processes share the batches of one and add up.

    Args:
        batch_size: examples per batch. Default: those of evaluation.

    Raises:
        InputError: the model's activations are not finite.
    """
    device = next(model.parameters()).device

    def inputs(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        taken = forward_inputs(model, batch)
        if "decoder_input_ids" in taken and "labels" in batch:  # says which rows of the decoder are padding
            taken["decoder_attention_mask"] = (batch["labels"] != IGNORED).long()
        return taken

    def read(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        masked = problem == MASKED_LANGUAGE_MODELING
        with head_at(model, batch["labels"] != IGNORED) if masked else nullcontext():
            model(**inputs(batch))
        return torch.empty(0)

    was_training = model.training
    model.eval()
    example = {name: value.to(device) for name, value in Collator(tokenizer, problem)([encoded[0]]).items()}
    with InputMoments(model, inputs(example)) as moments:
        run_over(model, encoded, tokenizer, read, batch_size or default_batch(problem), "calibrate", problem)
    model.train(was_training)
    moments.sum_over_processes()
    for name, moment in moments.sums.items():
        if not moment.isfinite().all():
            raise InputError(f"--calibration: what enters {name} is not finite (NaN or infinity); check --model")
    found, shapes = moments.by_linear(), matrix_shapes(model)
    rows = {name: moments.rows[owner] for name, owner in moments.owners.items()}
    record = {
        "examples": len(encoded),
        "tokens": max(rows.values()),
        "moments": len(moments.sums),
        "bytes": moments.bytes,
        # matrices with fewer tokens than inputs: their ranks beyond the tokens follow the matrix alone
        "short_of_tokens": sum(rows.get(name, 0) < shape[1] for name, shape in shapes.items()),
    }
    say(
        f"calibrated: {record['examples']} examples, {record['tokens']} tokens; {record['moments']} moments of the "
        f"inputs take {format_bytes(record['bytes'])}"
    )
    if record["short_of_tokens"]:
        say(
            f"calibrated: {record['short_of_tokens']} of {len(shapes)} matrices have more inputs than there are "
            "tokens; pass more --calibration-samples, or a longer file"
        )
    return found, record
