"""``lpaf evaluate``: score a model directory on a task."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..data import TaskSpec, check_labels, get_task, load_task, tokenize
from ..data.spans import span_options
from ..data.texts import text_options
from ..errors import InputError
from ..models.checkpoint import load_config, load_task_model, load_tokenizer
from ..models.device import resolve_device
from ..models.positions import most_tokens, resolve_length
from ..processes import from_main, main_first, start
from .metrics import compute_metrics, predictions_of
from .predict import NotNumbersError, task_outputs


def evaluate_directory(
    model: str,
    task: str,
    data_dir: str | None = None,
    validation_file: str | None = None,
    max_length: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    predictions: str | None = None,
    fuse: bool = False,
    doc_stride: int | None = None,
    n_best: int | None = None,
    max_answer_length: int | None = None,
    null_threshold: float | None = None,
    max_target_length: int | None = None,
    num_beams: int | None = None,
    generate_length: int | None = None,
    length_penalty: float | None = None,
    no_repeat_ngram: int | None = None,
) -> dict[str, Any]:
    """Metrics of ``model`` on the validation splits of ``task``; many processes share the examples out.

    Args:
        model: directory (compressed or dense), Hub name or short name of a model with a head for the task.
        max_length: tokens per example. Default: 384 for question answering, 512 for summarisation and (causal)
            language modelling, else 128; at most what the model takes.
        batch_size: examples per batch. Default: 64, for summarisation and language modelling 8.
        predictions: file for one JSON line per example: split, index, label, prediction, logits; for question
            answering split, index, id, prediction, score, null_score, answers; for summarisation split, index,
            prediction, summary; for running text split, index, tokens, loss (the mean over these tokens in nats, null
            where there are none) of each block.
        fuse: run the blocks of a compressed model as one operator each. Default: False.
        doc_stride, n_best, max_answer_length, null_threshold: as in ``SpanOptions``, for question answering.
        max_target_length, num_beams, generate_length, length_penalty, no_repeat_ngram: as in ``TextOptions``, for
            summarisation.

    Returns:
        {"model", "task", "metrics": {split: {metric: value}}, "examples": {split: n}}.

    Raises:
        InputError: bad input, labels outside the model's classes or NaN weights among it.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: must be at least 1")
    if predictions and not Path(predictions).resolve().parent.is_dir():
        raise InputError(f"--predictions {predictions}: its folder does not exist")
    if predictions and Path(predictions).is_dir():
        raise InputError(f"--predictions {predictions}: is a directory; pass a file")
    start()
    spec = get_task(task)
    given = {"doc_stride": doc_stride, "n_best": n_best, "max_answer_length": max_answer_length}
    spans = span_options(spec, given | {"null_threshold": null_threshold})
    target = resolve_device(device)
    with main_first():
        config = load_config(model)
        length = resolve_length(max_length, spec.max_length, config)
        given = {"max_target_length": max_target_length, "num_beams": num_beams, "generate_length": generate_length}
        given |= {"length_penalty": length_penalty, "no_repeat_ngram": no_repeat_ngram}
        texts = text_options(spec, given, config, most_tokens(config))
        data = load_task(spec, data_dir=data_dir, validation_file=validation_file, evaluation_only=True)
        loaded = load_task_model(model, spec.problem, fuse=fuse)
        tokenizer = load_tokenizer(model)
    data = check_labels(data, loaded.config)
    loaded.to(target)
    metrics, lines = {}, []
    for name, split in data.validation.items():
        encoded = tokenize(split, tokenizer, spec, length, data.labels, spans=spans, texts=texts)
        try:
            outputs, labels = task_outputs(loaded, spec, split, encoded, tokenizer, spans, texts, batch_size)
        except NotNumbersError:
            raise InputError(
                f"--model {model}: its outputs on {name} are not numbers (NaN); its weights are damaged"
            ) from None
        metrics[name] = compute_metrics(spec, outputs, labels)
        for index, row in enumerate(prediction_rows(spec, split, outputs, labels)):
            lines.append(json.dumps({"split": name, "index": index, **row}))
    if predictions:
        text = "\n".join(lines) + "\n"
        from_main(lambda: Path(predictions).write_text(text, encoding="utf-8"))
    examples = {name: len(split) for name, split in data.validation.items()}
    return {"model": model, "task": task, "metrics": metrics, "examples": examples}


def prediction_rows(spec: TaskSpec, examples: Dataset, outputs: Any, labels: Any) -> Iterator[dict[str, Any]]:
    """What is written of every example of a split; ``outputs`` and ``labels`` are those of ``task_outputs``."""
    if spec.is_summarization:
        for written, truth in zip(outputs, labels, strict=True):
            yield {"prediction": written, "summary": truth}
        return
    if spec.is_running_text:
        for loss, tokens in zip(outputs, labels, strict=True):
            yield {"tokens": int(tokens), "loss": float(loss / tokens) if tokens else None}
        return
    if spec.is_question_answering:
        for name, answer, truth in zip(examples["id"], outputs, labels, strict=True):
            score = answer.score if math.isfinite(answer.score) else None
            found = {"id": name, "prediction": answer.text, "score": score, "null_score": answer.null_score}
            yield found | {"answers": truth}
        return
    for label, guess, logits in zip(labels, predictions_of(spec, outputs), np.asarray(outputs), strict=True):
        yield {"label": label.item(), "prediction": guess.item(), "logits": logits.tolist()}
