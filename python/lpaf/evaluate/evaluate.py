"""``lpaf evaluate``: score a model directory on a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..data import check_labels, load_task, tokenize
from ..errors import InputError
from ..models.checkpoint import load_classifier, load_tokenizer
from ..models.device import resolve_device
from ..processes import from_main, main_first, start
from .metrics import compute_metrics
from .predict import predict


def evaluate_directory(
    model: str,
    task: str,
    data_dir: str | None = None,
    validation_file: str | None = None,
    max_length: int = 128,
    batch_size: int = 64,
    device: str | None = None,
    predictions: str | None = None,
    fuse: bool = False,
) -> dict[str, Any]:
    """Metrics of ``model`` on the validation splits of ``task``; many processes share the examples out.

    Args:
        model: directory (compressed or dense), Hub name or short name of a classifier.
        predictions: file for one JSON line per example: split, index, label, prediction, logits.
        fuse: run the blocks of a compressed model as one operator each. Default: False.

    Returns:
        {"model", "task", "metrics": {split: {metric: value}}, "examples": {split: n}}.

    Raises:
        InputError: bad input, labels outside the model's classes among it.
    """
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    if predictions and not Path(predictions).resolve().parent.is_dir():
        raise InputError(f"--predictions {predictions}: its folder does not exist")
    start()
    target = resolve_device(device)
    with main_first():
        data = load_task(task, data_dir=data_dir, validation_file=validation_file, evaluation_only=True)
        classifier = load_classifier(model, fuse=fuse)
        tokenizer = load_tokenizer(model)
    data = check_labels(data, classifier.config)
    classifier.to(target)
    metrics, lines = {}, []
    for name, split in data.validation.items():
        encoded = tokenize(split, tokenizer, data.spec, max_length, data.labels)
        logits = predict(classifier, encoded, tokenizer, batch_size=batch_size).numpy()
        metrics[name] = compute_metrics(data.spec, logits, encoded["labels"])
        guesses = logits[:, 0] if data.spec.problem == "regression" else np.argmax(logits, axis=1)
        for index, (label, guess) in enumerate(zip(encoded["labels"], guesses.tolist(), strict=True)):
            row = {"split": name, "index": index, "label": label, "prediction": guess, "logits": logits[index].tolist()}
            lines.append(json.dumps(row))
    if predictions:
        text = "\n".join(lines) + "\n"
        from_main(lambda: Path(predictions).write_text(text, encoding="utf-8"))
    examples = {name: len(split) for name, split in data.validation.items()}
    return {"model": model, "task": task, "metrics": metrics, "examples": examples}
