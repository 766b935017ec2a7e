"""Run a task model over a tokenised dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..data import TaskSpec
from ..data.spans import SpanOptions
from ..models.outputs import PADDING, task_logits
from ..processes import exchange, is_main, my_share
from ..retrain.batches import Collator
from .answers import best_answers


@torch.no_grad()
def run_over(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: Any,
    read: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    batch_size: int,
    description: str,
    problem: str = "classification",
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What ``read`` makes of every batch with ``model`` in eval mode, on the CPU, and the examples' places.

    Batches are made of examples of similar length, so that little is spent on padding. Many processes share the batches
    out and end with what one process would have found.

    Args:
        dataset: tokenised examples with a ``length`` column.
        read: calls the model on a batch's inputs, which are on its device.
        problem: that of the task, for the padding.

    Returns:
        (a tensor for every batch, shortest examples first; the place in ``dataset`` of each of their rows in turn,
        int64 [len(dataset)]).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    collate = Collator(tokenizer, problem)
    inputs = dataset.select_columns([name for name in tokenizer.model_input_names if name in dataset.column_names])
    order = sorted(range(len(dataset)), key=list(dataset["length"]).__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rows: list[torch.Tensor] = []
    for indices in tqdm(my_share(batches), desc=description, unit="batch", delay=2, leave=False, disable=not is_main()):
        batch = collate([inputs[index] for index in indices])
        rows.append(read({name: value.to(device) for name, value in batch.items()}).cpu())
    model.train(was_training)
    shares = exchange(rows)
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(batches))], torch.tensor(order)


def predict(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: Any,
    batch_size: int = 64,
    description: str = "evaluate",
    problem: str = "classification",
) -> torch.Tensor:
    """Logits of every example, in the dataset's order; many processes share the batches out (see :func:`run_over`).

    Args:
        dataset: tokenised examples with a ``length`` column.
        problem: that of the task.

    Returns:
        float32 logits on the CPU, [len(dataset), C]; for question answering [len(dataset), 2, L] with the starts and
        ends of every window, ``PADDING`` after its end.
    """

    def read(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return task_logits(model(**batch), batch.get("attention_mask")).float()

    rows, places = run_over(model, dataset, tokenizer, read, batch_size, description, problem)
    # the last batch has the longest windows
    width = rows[-1].shape[-1]
    logits = torch.cat([F.pad(row, (0, width - row.shape[-1]), value=PADDING) for row in rows])
    return torch.empty_like(logits).index_copy_(0, places, logits)


def add_teacher_logits(dataset: Dataset, logits: torch.Tensor) -> Dataset:
    """``dataset`` with what :func:`predict` said of it as the column ``teacher_logits``, a list per example.

    That of a window holds the starts of its positions, then the ends, without padding.
    """
    rows = logits.numpy()
    if rows.ndim == 3:
        rows = [row[:, :length].ravel() for row, length in zip(rows, dataset["length"], strict=True)]
    return dataset.add_column("teacher_logits", list(rows))


def task_outputs(
    model: nn.Module,
    spec: TaskSpec,
    examples: Dataset,
    encoded: Dataset,
    tokenizer: Any,
    spans: SpanOptions,
    batch_size: int = 64,
) -> tuple[Any, Any]:
    """(outputs, labels) of a split as ``compute_metrics`` takes them.

    Args:
        examples: the split.
        encoded: what ``tokenize`` made of it.
        spans: how answers are read; for question answering.

    Returns:
        Logits [N, C] and labels [N]; for question answering N ``Answer`` and the true answers of every question.
    """
    logits = predict(model, encoded, tokenizer, batch_size, problem=spec.problem)
    return read_logits(logits, spec, examples, encoded, spans)


def read_logits(
    logits: torch.Tensor, spec: TaskSpec, examples: Dataset, encoded: Dataset, spans: SpanOptions
) -> tuple[Any, Any]:
    """:func:`task_outputs` of what :func:`predict` said of ``encoded``."""
    logits = logits.numpy()
    if not spec.is_question_answering:
        return logits, np.array(encoded["labels"])
    answers = best_answers(logits, encoded, examples["context"], spans, spec.unanswerable)
    return answers, [answer["text"] for answer in examples["answers"]]
