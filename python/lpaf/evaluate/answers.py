"""From the start and end logits of a context's windows to one answer per question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset

from ..data.spans import OUTSIDE, SpanOptions


class Answer(NamedTuple):
    """One question's answer.

    Args:
        text: a part of the context, "" for no answer.
        score: start logit plus end logit of the best span; -inf where no span could be tried.
        null_score: the same of [CLS], the least of the question's windows.
    """

    text: str
    score: float
    null_score: float


class _Spans(NamedTuple):
    """The best span of every window: score [F] (-inf for none), first and last token [F]."""

    score: np.ndarray
    first: np.ndarray
    last: np.ndarray


def best_answers(
    logits: np.ndarray, windows: Dataset, contexts: Sequence[str], options: SpanOptions, unanswerable: bool
) -> list[Answer]:
    """The best span over all windows of each question.

    A span starts at one of the ``n_best`` starts of its window, ends at one of its ``n_best`` ends, lies in the
    context and has at most ``max_answer_length`` tokens. Where questions may have no answer, it must also reach the
    null score less ``null_threshold``.

    Args:
        logits: float [F, 2, L], start and end of every window, padded at the end.
        windows: what ``tokenize_questions`` made of the questions, F rows.
        contexts: the context of every question.
        unanswerable: whether "" may be the answer.

    Raises:
        ValueError: ``logits`` contains NaN or has another number of windows.
    """
    if logits.ndim != 3 or logits.shape[:2] != (len(windows), 2):
        raise ValueError(f"logits has shape {logits.shape}: expected [{len(windows)}, 2, L]")
    if np.isnan(logits).any():
        raise ValueError("logits contains NaN: expected finite numbers")
    starts, ends = (_padded(windows[name], logits.shape[2]) for name in ("starts", "ends"))
    spans = _best_spans(logits[:, 0], logits[:, 1], starts != OUTSIDE, options)
    owners, rows = np.asarray(windows["example"]), np.arange(len(windows))
    null = logits[rows, :, np.asarray(windows["cls"])].sum(axis=1)
    # Of each question's windows, sorted by score, the first.
    order = np.lexsort((-spans.score, owners))
    _, at = np.unique(owners[order], return_index=True)
    null_scores = np.minimum.reduceat(null[order], at)
    answers = []
    for context, window, null_score in zip(contexts, order[at], null_scores, strict=True):
        score = spans.score[window]
        begin, stop = starts[window, spans.first[window]], ends[window, spans.last[window]]
        found = np.isfinite(score) and not (unanswerable and null_score - score > options.null_threshold)
        text = context[begin:stop].strip() if found else ""
        answers.append(Answer(text, float(score), float(null_score)))
    return answers


def _padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """int32 [F, length], ``OUTSIDE`` after the end of a row."""
    padded = np.full((len(rows), length), OUTSIDE, dtype=np.int32)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def _best_spans(start: np.ndarray, end: np.ndarray, context: np.ndarray, options: SpanOptions) -> _Spans:
    """The best span of every window, length by length; of equal ones the shortest, and of those the first."""
    start = np.where(context & _among_best(start, options.n_best), start, -np.inf)
    end = np.where(context & _among_best(end, options.n_best), end, -np.inf)
    windows, length = start.shape
    rows = np.arange(windows)
    score, first, last = np.full(windows, -np.inf), np.zeros(windows, dtype=int), np.zeros(windows, dtype=int)
    for extra in range(min(options.max_answer_length, length)):
        total = start[:, : length - extra] + end[:, extra:]
        column = total.argmax(axis=1)
        better = total[rows, column] > score
        score[better] = total[rows, column][better]
        first[better], last[better] = column[better], column[better] + extra
    return _Spans(score, first, last)


def _among_best(logits: np.ndarray, count: int) -> np.ndarray:
    """bool, which logits are among the ``count`` largest of their row (or equal to the last of these)."""
    at = max(logits.shape[1] - count, 0)
    return logits >= np.partition(logits, at, axis=1)[:, at, None]
