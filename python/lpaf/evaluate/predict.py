"""Run a task model over a tokenised dataset: logits, the losses of running text, or summaries."""

from __future__ import annotations

import copy
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
from ..data.tasks import LANGUAGE_MODELING, MASKED_LANGUAGE_MODELING, SUMMARIZATION, TOKEN_PROBLEMS
from ..data.texts import IGNORED, TextOptions
from ..models.outputs import NOT_INPUTS, PADDING, forward_inputs, head_at, logits_at, task_logits
from ..processes import exchange, is_main, my_share
from ..retrain.batches import Collator
from .answers import best_answers


class NotNumbersError(ValueError):
    """A model's outputs are NaN."""

    def __init__(self) -> None:
        super().__init__("outputs contains NaN: expected finite numbers")


def default_batch(problem: str) -> int:
    """Examples per batch when nothing is said: 64, or 8 where every token has a row of the vocabulary's size."""
    return 8 if problem in (SUMMARIZATION, LANGUAGE_MODELING) else 64


@torch.no_grad()
def run_over(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: Any,
    read: Callable[[Mapping[str, torch.Tensor]], torch.Tensor],
    batch_size: int,
    description: str,
    problem: str = "classification",
    labelled: bool = False,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What ``read`` makes of every batch with ``model`` in eval mode, on the CPU, and the examples' places.

    Batches are made of examples of similar length, so that little is spent on padding. Many processes share the batches
    out and end with what one process would have found.

    Args:
        dataset: tokenised examples with a ``length`` column.
        read: calls the model on a batch's inputs, which are on its device.
        problem: that of the task, for the padding.
        labelled: whether batches have ``labels`` also where they are no tokens.

    Returns:
        (a tensor for every batch, shortest examples first; the place in ``dataset`` of each of their rows in turn,
        int64 [len(dataset)]).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    collate = Collator(tokenizer, problem)
    names = [*tokenizer.model_input_names, *(["labels"] if labelled or problem in TOKEN_PROBLEMS else [])]
    inputs = dataset.select_columns([name for name in names if name in dataset.column_names])
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


def token_losses(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: Any,
    batch_size: int = 64,
    description: str = "evaluate",
    problem: str = LANGUAGE_MODELING,
) -> torch.Tensor:
    """Negative log-likelihood in nats of every example's labels, summed, float64 [len(dataset)] on the CPU."""

    def read_hidden(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        labels = batch["labels"]
        positions = labels != IGNORED
        with head_at(model, positions):
            logits = logits_at(model(**forward_inputs(model, batch)).logits, positions)
        losses = F.cross_entropy(logits.float(), labels[positions], reduction="none").double()
        return torch.stack([part.sum() for part in losses.split(positions.sum(dim=1).tolist())])

    def read(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if problem == MASKED_LANGUAGE_MODELING:
            return read_hidden(batch)
        logits, labels = model(**forward_inputs(model, batch)).logits, batch["labels"]
        # row by row: a copy of all logits in float32 would be the largest tensor of all
        rows = [
            F.cross_entropy(row.float(), label, ignore_index=IGNORED, reduction="none").double().sum()
            for row, label in zip(logits, labels, strict=True)
        ]
        return torch.stack(rows)

    rows, places = run_over(model, dataset, tokenizer, read, batch_size, description, problem)
    losses = torch.cat(rows)
    return torch.empty_like(losses).index_copy_(0, places, losses)


def write_texts(
    model: nn.Module,
    dataset: Dataset,
    tokenizer: Any,
    texts: TextOptions,
    batch_size: int = 64,
    description: str = "write",
    problem: str = SUMMARIZATION,
) -> list[str]:
    """What ``model`` writes about every example, by beam search without sampling; see ``TextOptions``.

    What the options leave open (length penalty, repeated words, forced tokens) is the model's generation
    configuration.
    """
    settings = copy.deepcopy(model.generation_config)
    settings.update(num_beams=texts.num_beams, do_sample=False, max_length=None, max_new_tokens=texts.written)
    settings.update(temperature=None, top_p=None, top_k=None)  # of sampling
    settings.min_length = min(settings.min_length or 0, texts.written)
    if texts.length_penalty is not None:
        settings.length_penalty = texts.length_penalty
    if texts.no_repeat_ngram is not None:
        settings.no_repeat_ngram_size = texts.no_repeat_ngram

    def read(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        return model.generate(**inputs, generation_config=settings)

    rows, places = run_over(model, dataset, tokenizer, read, batch_size, description, problem)
    written = [text.strip() for row in rows for text in tokenizer.batch_decode(row, skip_special_tokens=True)]
    return [written[at] for at in places.argsort().tolist()]


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
    texts: TextOptions | None = None,
    batch_size: int | None = None,
) -> tuple[Any, Any]:
    """(outputs, labels) of a split as ``compute_metrics`` takes them.

    Args:
        examples: the split.
        encoded: what ``tokenize`` made of it.
        spans: how answers are read; for question answering.
        texts: how summaries are written; for summarisation. Default: ``TextOptions()``.
        batch_size: examples per batch. Default: :func:`default_batch`.

    Returns:
        Logits [N, C] and labels [N]; for question answering N ``Answer`` and the true answers of every question; for
        summarisation the written and the true texts; for running text every block's loss in nats [N] and number of
        labels [N].

    Raises:
        NotNumbersError: the outputs contain NaN.
    """
    batch_size = batch_size or default_batch(spec.problem)
    if spec.is_summarization:
        if any(bool(parameter.isnan().any()) for parameter in model.parameters()):
            raise NotNumbersError()  # a search through NaN ends like any other
        written = write_texts(model, encoded, tokenizer, texts or TextOptions(), batch_size)
        return written, list(examples[_summary_column(spec, examples)])
    if spec.is_running_text:
        losses = token_losses(model, encoded, tokenizer, batch_size, problem=spec.problem).numpy()
        if np.isnan(losses).any():
            raise NotNumbersError()
        return losses, np.array([sum(label != IGNORED for label in row) for row in encoded["labels"]])
    logits = predict(model, encoded, tokenizer, batch_size, problem=spec.problem)
    if bool(logits.isnan().any()):
        raise NotNumbersError()
    return read_logits(logits, spec, examples, encoded, spans)


def _summary_column(spec: TaskSpec, examples: Dataset) -> str:
    return next(choice for choice in spec.text_columns if set(choice) <= set(examples.column_names))[1]


def read_logits(
    logits: torch.Tensor, spec: TaskSpec, examples: Dataset, encoded: Dataset, spans: SpanOptions
) -> tuple[Any, Any]:
    """:func:`task_outputs` of what :func:`predict` said of ``encoded``."""
    logits = logits.numpy()
    if not spec.is_question_answering:
        return logits, np.array(encoded["labels"])
    answers = best_answers(logits, encoded, examples["context"], spans, spec.unanswerable)
    return answers, [answer["text"] for answer in examples["answers"]]
