"""Metrics against hand-made numbers, and the paired tests against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from lpaf.data import TASKS, get_task
from lpaf.evaluate.metrics import (
    compute_metrics,
    example_scores,
    paired_scores,
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
    if task.is_summarization:
        outputs, labels = ["a word"] * 30, ["a word", "words", ""] * 10
    if task.is_language_modeling:
        outputs, labels = generator.random(30), generator.integers(1, 9, 30)
    metrics = compute_metrics(task, outputs, labels)
    if task.unanswerable:
        metrics = {name: value for name, value in metrics.items() if not name.endswith("_answered")}
    assert tuple(metrics) == task.metrics
    assert all(type(value) is float for value in metrics.values())


def test_rouge_of_a_known_pair():
    """Lin (2004), section 3: S1 "police killed the gunman", S2 "police kill the gunman"; without stems ROUGE-L is
    3/4, with them (ours) all four words agree."""
    metrics = compute_metrics(get_task("summarization"), ["police kill the gunman"], ["police killed the gunman"])
    assert metrics == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0}
    metrics = compute_metrics(get_task("summarization"), ["the gunman saw police"], ["police saw the gunman"])
    assert metrics == {"rouge1": 1.0, "rouge2": pytest.approx(1 / 3), "rougeL": 0.5}
    scores = example_scores(get_task("xsum"), ["the gunman saw police", "x"], ["police saw the gunman", "y"])
    assert scores.tolist() == pytest.approx([1 / 3, 0])


def test_perplexity_weighs_tokens_not_blocks():
    spec, losses, tokens = get_task("language-modeling"), [2.0, 9.0], [1, 3]
    assert compute_metrics(spec, losses, tokens) == {"perplexity": pytest.approx(math.exp(11 / 4))}
    assert example_scores(spec, losses, tokens).tolist() == [-2.0, -3.0]
    assert spec.lower_is_better
    assert math.isfinite(compute_metrics(spec, [1e6], [1])["perplexity"])
    with pytest.raises(ValueError, match="NaN"):
        compute_metrics(spec, [math.nan], [1])
    with pytest.raises(ValueError, match="labels has length 1"):
        compute_metrics(spec, losses, [1])


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


def test_scores_of_examples():
    assert example_scores(get_task("sst2"), logits([1, 0, 1], 2), [1, 1, 1]).tolist() == [1, 0, 1]
    assert example_scores(get_task("stsb"), [[1.0], [0.5]], [1.0, 2.0]).tolist() == [0, -2.25]


def test_right_and_wrong_answers_take_the_exact_binomial_test():
    a, b = np.ones(20), np.ones(20)
    b[:8] = 0  # a alone is right 8 times
    a[8:10] = 0  # b alone twice
    a[10], b[10] = 0, 0  # both wrong
    result = paired_scores(a, b)
    both_tails = 2 * sum(math.comb(10, k) for k in (0, 1, 2)) / 2**10
    assert (result.test, result.only_a, result.only_b, result.examples) == ("mcnemar", 8, 2, 20)
    assert result.p_value == pytest.approx(both_tails)
    assert result.difference == pytest.approx(6 / 20)
    assert paired_scores(b, a).difference == pytest.approx(-6 / 20)


def test_equal_models_do_not_differ():
    assert paired_scores([1, 0], [1, 0]).p_value == 1.0
    assert paired_scores([-1.0, -0.5], [-1.0, -0.5]).p_value == 1.0
    assert paired_scores([-1.0], [-2.0]).p_value == 1.0


def test_squared_errors_take_the_paired_t_test():
    generator = np.random.default_rng(0)
    a, b = -((0.1 * generator.standard_normal(200)) ** 2), -((0.5 * generator.standard_normal(200)) ** 2)
    result = paired_scores(a, b)
    assert result.test == "paired-t"
    assert result.p_value == pytest.approx(scipy.stats.ttest_1samp(a - b, 0.0).pvalue)
    assert result.p_value < 1e-6
    assert result.difference == pytest.approx(np.mean(a - b))
    assert result.only_a + result.only_b == 200
    assert paired_scores([-1.0, -2.0], [-2.0, -3.0]).p_value == 0.0


@pytest.mark.parametrize("arrays", [([1], [1, 0]), ([], []), ([[1]], [[1]])])
def test_paired_scores_check_lengths(arrays):
    with pytest.raises(ValueError, match="a, b have shapes"):
        paired_scores(*arrays)
