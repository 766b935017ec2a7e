"""Metrics against hand-made numbers, and the paired tests against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from lpaf.data import TASKS, get_task
from lpaf.evaluate.metrics import (
    compute_metrics,
    main_metric,
    mcnemar,
    paired_t,
    paired_test,
    predictions_of,
)

TRUTH = [1, 1, 1, 0, 0, 1]
GUESS = [1, 1, 0, 0, 1, 1]  # 3 true positives, 1 false positive, 1 false negative, 1 true negative


def logits(classes, count):
    return np.eye(count)[classes] * 3 - 1


def test_accuracy_f1_and_matthews():
    assert compute_metrics(get_task("sst2"), logits(GUESS, 2), TRUTH) == {"accuracy": pytest.approx(4 / 6)}
    mrpc = compute_metrics(get_task("mrpc"), logits(GUESS, 2), TRUTH)
    assert mrpc == {"accuracy": pytest.approx(4 / 6), "f1": pytest.approx(6 / 8)}
    assert list(mrpc) == ["accuracy", "f1"]
    cola = compute_metrics(get_task("cola"), GUESS, TRUTH)
    assert cola["matthews_correlation"] == pytest.approx((3 * 1 - 1 * 1) / math.sqrt(4 * 4 * 2 * 2))
    assert main_metric(get_task("cola"), cola) == cola["matthews_correlation"]


def test_f1_of_own_classes_is_macro():
    truth, guess = [0, 0, 1, 2], [0, 1, 1, 1]
    metrics = compute_metrics(get_task("text-classification"), logits(guess, 3), truth)
    assert metrics == {"accuracy": pytest.approx(0.5), "f1": pytest.approx((2 / 3 + 2 / 4 + 0) / 3)}


def test_correlations():
    truth = np.array([0.0, 1.0, 2.0, 5.0])
    exact = compute_metrics(get_task("stsb"), (truth * 2 + 1)[:, None], truth)
    assert exact == {"pearson": pytest.approx(1.0), "spearmanr": pytest.approx(1.0)}
    curved = compute_metrics(get_task("stsb"), -(truth**3), truth)
    assert curved["spearmanr"] == pytest.approx(-1.0)
    assert -1.0 < curved["pearson"] < -0.8
    assert compute_metrics(get_task("stsb"), np.ones(4), truth) == {"pearson": 0.0, "spearmanr": 0.0}
    assert compute_metrics(get_task("stsb"), [1.0], [2.0]) == {"pearson": 0.0, "spearmanr": 0.0}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_reports_its_metrics(task):
    generator = np.random.default_rng(0)
    count = 1 if task.is_regression else len(task.labels or "abc")
    labels = generator.random(30) if task.is_regression else generator.integers(0, count, 30)
    outputs = generator.standard_normal((30, count))
    if task.is_question_answering:
        outputs, labels = ["a word"] * 30, [["a word", "words"]] * 30
    metrics = compute_metrics(task, outputs, labels)
    if task.unanswerable:
        metrics = {name: value for name, value in metrics.items() if not name.endswith("_answered")}
    assert tuple(metrics) == task.metrics
    assert all(type(value) is float for value in metrics.values())
    assert main_metric(task, metrics) == metrics[task.main_metric]


@pytest.mark.parametrize(
    ("task", "outputs", "labels", "message"),
    [
        ("sst2", [0, 1], [0], "labels has shape"),
        ("sst2", np.zeros((0, 2)), [], "at least one"),
        ("sst2", [[math.nan, 1.0]], [1], "outputs contains NaN"),
        ("stsb", np.zeros((2, 2)), [1.0, 2.0], "outputs has shape"),
        ("sst2", np.zeros((2, 2, 2)), [1, 0], "outputs has shape"),
    ],
)
def test_bad_outputs(task, outputs, labels, message):
    with pytest.raises(ValueError, match=message):
        compute_metrics(get_task(task), outputs, labels)


def test_predictions_of_keeps_predictions():
    assert predictions_of(get_task("sst2"), [1, 0]).tolist() == [1, 0]
    assert predictions_of(get_task("stsb"), [[0.5], [1.5]]).tolist() == [0.5, 1.5]


def test_mcnemar_is_the_exact_binomial_test():
    labels = np.zeros(20, int)
    a, b = np.zeros(20, int), np.zeros(20, int)
    b[:8] = 1  # a alone is right 8 times
    a[8:10] = 1  # b alone twice
    a[10], b[10] = 1, 1  # both wrong
    result = mcnemar(a, b, labels)
    both_tails = 2 * sum(math.comb(10, k) for k in (0, 1, 2)) / 2**10
    assert (result.only_a, result.only_b, result.examples) == (8, 2, 20)
    assert result.p_value == pytest.approx(both_tails)
    assert result.difference == pytest.approx(6 / 20)
    assert mcnemar(b, a, labels).difference == pytest.approx(-6 / 20)


def test_equal_models_do_not_differ():
    assert mcnemar([1, 0], [1, 0], [1, 1]).p_value == 1.0
    assert paired_t([1.0, 0.5], [1.0, 0.5], [1.0, 1.0]).p_value == 1.0
    assert paired_t([1.0], [2.0], [1.0]).p_value == 1.0


def test_paired_t():
    generator = np.random.default_rng(0)
    labels = generator.standard_normal(200)
    a, b = labels + 0.1 * generator.standard_normal(200), labels + 0.5 * generator.standard_normal(200)
    result = paired_t(a, b, labels)
    expected = scipy.stats.ttest_1samp((b - labels) ** 2 - (a - labels) ** 2, 0.0).pvalue
    assert result.p_value == pytest.approx(expected)
    assert result.p_value < 1e-6
    assert result.difference > 0
    assert result.only_a + result.only_b == 200
    assert paired_t([1.0, 2.0], [2.0, 3.0], [1.0, 2.0]).p_value == 0.0


def test_paired_test_picks_by_task():
    assert paired_test(get_task("sst2"), logits([1, 0], 2), [1, 1], [1, 1]).test == "mcnemar"
    assert paired_test(get_task("stsb"), [[1.0], [0.0]], [1.0, 1.0], [1.0, 1.0]).test == "paired-t"


@pytest.mark.parametrize("test", [mcnemar, paired_t])
@pytest.mark.parametrize("arrays", [([1], [1, 0], [1, 0]), ([], [], []), ([[1]], [[1]], [[1]])])
def test_paired_tests_check_lengths(test, arrays):
    with pytest.raises(ValueError, match="a, b, labels have shapes"):
        test(*arrays)
