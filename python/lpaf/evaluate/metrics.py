"""The tasks' metrics, and tests of whether two models differ on the same examples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats
import sklearn.metrics
from numpy.typing import ArrayLike

from ..data.tasks import TaskSpec
from .answers import Answer
from .rouge import rouge
from .squad_metrics import exact_match, f1


def predictions_of(spec: TaskSpec, outputs: ArrayLike | Sequence[Answer | str]) -> np.ndarray:
    """Classes (int64 [B], the largest logit), numbers (float64 [B]) or texts (object [B]) of a model's outputs; for
    running text there is nothing to choose.

    Args:
        outputs: logits [B, C], or [B, 1] or [B] for regression, or B ``Answer``; predictions [B] are returned as
            they are.

    Raises:
        ValueError: ``outputs`` has another shape.
    """
    if spec.is_question_answering or spec.is_summarization:
        return np.array([getattr(output, "text", output) for output in outputs], dtype=object)
    array = np.asarray(outputs)
    if spec.is_regression:
        if array.ndim == 2 and array.shape[1] == 1:
            array = array[:, 0]
        if array.ndim != 1:
            raise ValueError(f"outputs has shape {array.shape}: expected [B] or [B, 1] for task {spec.name}")
        return array.astype(np.float64)
    if array.ndim == 2 and array.shape[1] > 1:
        array = array.argmax(axis=1)
    if array.ndim != 1:
        raise ValueError(f"outputs has shape {array.shape}: expected logits [B, C] or classes [B] for task {spec.name}")
    return array.astype(np.int64)


def compute_metrics(
    spec: TaskSpec, outputs: ArrayLike | Sequence[Answer | str], labels: ArrayLike | Sequence[Sequence[str]]
) -> dict[str, float]:
    """The task's metrics, in its order, all in [0, 1] or [-1, 1] but perplexity, which is 1 or more.

    f1 is that of class 1 for GLUE's two-class tasks, SQuAD's for question answering, and the mean over the classes
    (macro) for all other tasks. A correlation with constant predictions or labels is 0. Where questions may have no
    answer, exact_match and f1 of those with and of those without one follow, as far as there are any. ROUGE is the mean
    F-measure over the examples. Perplexity is exp(sum of the losses / number of tokens): every token that is predicted
    (all of them, or those of hidden words) weighs the same.

    Args:
        outputs: logits [B, C] or predictions [B]; for question answering B ``Answer`` or texts; for summarisation B
            texts; for running text the loss of each block in nats [B].
        labels: class indices or numbers [B]; for question answering the true answers of each question; for
            summarisation the true texts; for running text the number of predicted tokens of each block [B], of which
            some may be 0, but not all.

    Raises:
        ValueError: the lengths differ or are 0, or an output is NaN.
    """
    if spec.is_question_answering:
        return _answer_metrics(spec, predictions_of(spec, outputs), labels)
    if spec.is_summarization:
        return {name: float(scores.mean()) for name, scores in _rouge(spec.metrics, outputs, labels).items()}
    if spec.is_running_text:
        losses, tokens = _losses(outputs, labels)
        return {"perplexity": math.exp(min(losses.sum() / tokens.sum(), MOST_NATS))}
    predictions, truth = predictions_of(spec, outputs), np.asarray(labels)
    if truth.shape != predictions.shape or truth.size == 0:
        raise ValueError(f"labels has shape {truth.shape}: expected {predictions.shape}, one per output, at least one")
    if np.isnan(np.asarray(outputs, dtype=np.float64)).any():
        raise ValueError("outputs contains NaN: expected finite numbers")
    binary = spec.labels is not None and len(spec.labels) == 2
    functions: dict[str, Callable[[], float]] = {
        "accuracy": lambda: sklearn.metrics.accuracy_score(truth, predictions),
        "f1": lambda: sklearn.metrics.f1_score(
            truth, predictions, average="binary" if binary else "macro", zero_division=0.0
        ),
        "matthews_correlation": lambda: sklearn.metrics.matthews_corrcoef(truth, predictions),
        "pearson": lambda: _correlation(scipy.stats.pearsonr, predictions, truth),
        "spearmanr": lambda: _correlation(scipy.stats.spearmanr, predictions, truth),
    }
    return {name: float(functions[name]()) for name in spec.metrics}


#: exp of more is no float64
MOST_NATS = 700.0


def _rouge(names: Sequence[str], texts: Sequence[str], truth: Sequence[str]) -> dict[str, np.ndarray]:
    _check_answers(texts, truth)
    return rouge(texts, truth, names)


def _losses(outputs: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    losses, tokens = np.asarray(outputs, dtype=np.float64), np.asarray(labels)
    _check_answers(losses, tokens)
    if np.isnan(losses).any():
        raise ValueError("outputs contains NaN: expected finite numbers")
    if not tokens.any():
        raise ValueError("labels are all 0: expected the numbers of tokens that were predicted")
    return losses, tokens


def _answer_metrics(spec: TaskSpec, texts: np.ndarray, answers: Sequence[Sequence[str]]) -> dict[str, float]:
    _check_answers(texts, answers)
    functions = {"exact_match": exact_match, "f1": f1}
    scores = {name: np.array([functions[name](*pair) for pair in zip(texts, answers)]) for name in spec.metrics}
    metrics = {name: float(values.mean()) for name, values in scores.items()}
    if spec.unanswerable:
        answered = np.array([bool(truth) for truth in answers])
        for group, chosen in (("answered", answered), ("unanswered", ~answered)):
            if chosen.any():
                metrics |= {f"{name}_{group}": float(values[chosen].mean()) for name, values in scores.items()}
    return metrics


def _check_answers(texts: Sequence, answers: Sequence) -> None:
    if len(texts) != len(answers) or not len(texts):
        raise ValueError(f"labels has length {len(answers)}: expected {len(texts)}, one per output, at least one")


def example_scores(
    spec: TaskSpec, outputs: ArrayLike | Sequence[Answer | str], labels: ArrayLike | Sequence[Sequence[str]]
) -> np.ndarray:
    """How well each example is done, float32 [B]: 1 or 0 for right or wrong classes, minus the squared error for
    numbers, F1 for answers, the main metric for summaries, minus the mean loss of each block of running text (0, which
    no two models differ by, where nothing in it is predicted); arguments as for :func:`compute_metrics`."""
    if spec.is_summarization:
        return _rouge([spec.main_metric], outputs, labels)[spec.main_metric].astype(np.float32)
    if spec.is_running_text:
        losses, tokens = _losses(outputs, labels)
        return (-losses / np.maximum(tokens, 1)).astype(np.float32)
    if spec.is_question_answering:
        texts = predictions_of(spec, outputs)
        _check_answers(texts, labels)
        return np.array([f1(*pair) for pair in zip(texts, labels)], dtype=np.float32)
    predictions, truth = predictions_of(spec, outputs), np.asarray(labels)
    scores = -((predictions - truth) ** 2) if spec.is_regression else predictions == truth
    return scores.astype(np.float32)


def _correlation(function: Callable, predictions: np.ndarray, truth: np.ndarray) -> float:
    if len(truth) < 2:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        value = function(predictions, truth).statistic
    return 0.0 if math.isnan(value) else value


@dataclass(frozen=True)
class PairedTest:
    """Outcome of a paired test.

    Args:
        test: "mcnemar" or "paired-t".
        p_value: two-sided; 1.0 where the two models do the same.
        difference: a's advantage over b, the difference of the mean scores.
        only_a: examples that a alone has right, or that a does better.
        only_b: the same for b.
        examples: number of examples.
    """

    test: str
    p_value: float
    difference: float
    only_a: int
    only_b: int
    examples: int


def paired_scores(a: ArrayLike, b: ArrayLike) -> PairedTest:
    """Whether two models differ by their ``example_scores`` [B] on the same examples.

    Where every score is 0 or 1 (right or wrong) the exact McNemar test: of the examples that exactly one has right,
    each is the winner with probability 1/2 under the null hypothesis. Else the paired t-test. Both are two-sided.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    a, b = (np.asarray(scores, dtype=np.float64) for scores in (a, b))
    if a.shape != b.shape or a.ndim != 1 or a.size == 0:
        raise ValueError(f"a, b have shapes {a.shape}, {b.shape}: expected each to be [B] with B >= 1")
    return _mcnemar(a == 1, b == 1) if np.isin((a, b), (0, 1)).all() else _paired_t(a, b)


def _mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> PairedTest:
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    discordant = only_a + only_b
    p_value = float(scipy.stats.binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0
    return PairedTest("mcnemar", p_value, float(right_a.mean() - right_b.mean()), only_a, only_b, len(right_a))


def _paired_t(a: np.ndarray, b: np.ndarray) -> PairedTest:
    gain = a - b
    if len(gain) < 2 or np.ptp(gain) == 0:
        # Constant differences have no variance: t is 0/0 if they are all zero and infinite otherwise.
        p_value = 1.0 if len(gain) < 2 or gain[0] == 0 else 0.0
    else:
        p_value = float(scipy.stats.ttest_rel(a, b).pvalue)
    return PairedTest("paired-t", p_value, float(gain.mean()), int((gain > 0).sum()), int((gain < 0).sum()), len(gain))
