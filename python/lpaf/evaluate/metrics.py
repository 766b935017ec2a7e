"""GLUE's metrics, and tests of whether two models differ on the same examples."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.stats
import sklearn.metrics
from numpy.typing import ArrayLike

from ..data.tasks import TaskSpec


def predictions_of(spec: TaskSpec, outputs: ArrayLike) -> np.ndarray:
    """Classes (int64 [B], the largest logit) or numbers (float64 [B]) of a model's outputs.

    Args:
        outputs: logits [B, C], or [B, 1] or [B] for regression; predictions [B] are returned as they are.

    Raises:
        ValueError: ``outputs`` has another shape.
    """
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


def compute_metrics(spec: TaskSpec, outputs: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """The task's metrics, in its order.

    f1 is that of class 1 for GLUE's two-class tasks and the mean over the classes (macro) for all other
    tasks. A correlation with constant predictions or labels is 0.

    Args:
        outputs: logits [B, C] or predictions [B].
        labels: class indices or numbers [B].

    Raises:
        ValueError: the lengths differ or are 0, or an output is NaN.
    """
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


def example_scores(spec: TaskSpec, outputs: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """How well each example is done, float32 [B]: 1 or 0 for right or wrong classes, minus the squared error for
    numbers; arguments as for :func:`compute_metrics`."""
    predictions, truth = predictions_of(spec, outputs), np.asarray(labels)
    scores = -((predictions - truth) ** 2) if spec.is_regression else predictions == truth
    return scores.astype(np.float32)


def main_metric(spec: TaskSpec, metrics: dict[str, float]) -> float:
    """The value that stands for the task."""
    return metrics[spec.main_metric]


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
        difference: a's advantage over b: accuracy difference, or b's mean squared error minus a's.
        only_a: examples that a alone has right, or on which a's error is smaller.
        only_b: the same for b.
        examples: number of examples.
    """

    test: str
    p_value: float
    difference: float
    only_a: int
    only_b: int
    examples: int


def mcnemar(a: ArrayLike, b: ArrayLike, labels: ArrayLike) -> PairedTest:
    """Exact McNemar test of two classifiers on the same examples.

    Of the examples that exactly one has right, each is the winner with probability 1/2 under the null
    hypothesis; the p-value is the two-sided binomial one.

    Args:
        a, b: predicted classes [B].
        labels: true classes [B].

    Raises:
        ValueError: the lengths differ or are 0.
    """
    a, b, labels = _same_length(a, b, labels)
    right_a, right_b = a == labels, b == labels
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    discordant = only_a + only_b
    p_value = float(scipy.stats.binomtest(only_a, discordant, 0.5).pvalue) if discordant else 1.0
    return PairedTest("mcnemar", p_value, float(right_a.mean() - right_b.mean()), only_a, only_b, len(labels))


def paired_t(a: ArrayLike, b: ArrayLike, labels: ArrayLike) -> PairedTest:
    """Paired t-test of two regressors' squared errors on the same examples.

    Args:
        a, b: predicted numbers [B].
        labels: true numbers [B].

    Raises:
        ValueError: the lengths differ or are 0.
    """
    a, b, labels = (array.astype(np.float64) for array in _same_length(a, b, labels))
    return _paired_t(-((a - labels) ** 2), -((b - labels) ** 2))


def paired_test(spec: TaskSpec, a: ArrayLike, b: ArrayLike, labels: ArrayLike) -> PairedTest:
    """``mcnemar`` for classification, ``paired_t`` for regression; a and b are logits or predictions."""
    test = paired_t if spec.is_regression else mcnemar
    return test(predictions_of(spec, a), predictions_of(spec, b), labels)


def paired_scores(a: ArrayLike, b: ArrayLike) -> PairedTest:
    """Paired test of two models' :func:`example_scores` [B]: McNemar's where all are 0 or 1, else a t-test.

    ``difference`` is the mean of a's scores minus b's.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    a, b, _ = (array.astype(np.float64) for array in _same_length(a, b, b))
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        return mcnemar(a, b, np.ones_like(a))
    return _paired_t(a, b)


def _paired_t(a: np.ndarray, b: np.ndarray) -> PairedTest:
    """Paired t-test of scores, of which more is better."""
    gain = a - b
    if len(gain) < 2 or np.ptp(gain) == 0:
        # Constant differences have no variance: t is 0/0 if they are all zero and infinite otherwise.
        p_value = 1.0 if len(gain) < 2 or gain[0] == 0 else 0.0
    else:
        p_value = float(scipy.stats.ttest_rel(a, b).pvalue)
    return PairedTest("paired-t", p_value, float(gain.mean()), int((gain > 0).sum()), int((gain < 0).sum()), len(gain))


def _same_length(a: ArrayLike, b: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    arrays = np.asarray(a), np.asarray(b), np.asarray(labels)
    shapes = [array.shape for array in arrays]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or shapes[0][0] == 0:
        raise ValueError(f"a, b, labels have shapes {shapes}: expected three times [B] with B >= 1")
    return arrays
