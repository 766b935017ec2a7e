"""Objective, batches and mixed-rank paths."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from lpaf.factorize import SVDFactorizer
from lpaf.models.checkpoint import load_dense, load_tokenizer
from lpaf.models.outputs import PADDING, task_logits
from lpaf.retrain import MixedRank, Objective
from lpaf.retrain.batches import Collator, LengthGroupedSampler
from lpaf_kernels import MixedRankLinear, draw_paths
from tiny import write_model


def test_objective_without_extras_is_cross_entropy():
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    loss, parts = Objective("classification")(logits, labels, None)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert set(parts) == {"task"}


def test_objective_adds_distillation_and_consistency():
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 0])
    teacher, logits = torch.randn(4, 3), torch.randn(8, 3)
    loss, parts = Objective("classification", distill=0.3, temperature=2.0, consistency=0.5)(logits, labels, teacher)
    first, second = logits.chunk(2)
    task = (F.cross_entropy(first, labels) + F.cross_entropy(second, labels)) / 2

    def kl(p, q):
        return (p.exp() * (p - q)).sum(-1).mean()

    soft = [(x / 2).log_softmax(-1) for x in (first, second)]
    target = (teacher / 2).log_softmax(-1)
    distill = 4 * (kl(target, soft[0]) + kl(target, soft[1])) / 2
    a, b = first.log_softmax(-1), second.log_softmax(-1)
    consistency = (kl(a, b) + kl(b, a)) / 2
    torch.testing.assert_close(loss, 0.7 * task + 0.3 * distill + 0.5 * consistency)
    assert set(parts) == {"task", "distillation", "consistency"}


def test_regression_objective_is_mean_squared_error():
    logits, labels = torch.randn(8, 1), torch.randn(4)
    teacher = torch.randn(4, 1)
    loss, _ = Objective("regression", distill=0.5, consistency=1.0)(logits, labels, teacher)
    a, b = logits.chunk(2)
    task = (F.mse_loss(a[:, 0], labels) + F.mse_loss(b[:, 0], labels)) / 2
    distill = (F.mse_loss(a, teacher) + F.mse_loss(b, teacher)) / 2
    torch.testing.assert_close(loss, 0.5 * task + 0.5 * distill + F.mse_loss(a, b))


def test_identical_passes_have_no_consistency_loss():
    logits = torch.randn(4, 3).repeat(2, 1)
    _, parts = Objective("classification", consistency=1.0)(logits, torch.tensor([0, 1, 2, 0]), None)
    assert parts["consistency"] == pytest.approx(0.0, abs=1e-6)


def test_sampler_covers_everything_once_in_batches_of_like_length():
    lengths = torch.randint(5, 60, (1003,), generator=torch.Generator().manual_seed(0)).tolist()
    epoch = [0]
    sampler = LengthGroupedSampler(lengths, 8, seed=1, epoch=lambda: epoch[0])
    order = list(sampler)
    assert sorted(order) == list(range(1003))
    assert order == list(sampler), "the same epoch gives the same order"
    epoch[0] = 1
    assert order != list(sampler)
    spread = [max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in zip(*[iter(order)] * 8, strict=False)]
    assert sum(spread) / len(spread) < 10, "random batches would span about 45"


def test_probability_falls_to_zero_at_half_of_the_steps():
    mixed = MixedRank(0.6)
    assert mixed.probability(0, 100) == 0.6
    assert mixed.probability(25, 100) == pytest.approx(0.3)
    assert mixed.probability(50, 100) == mixed.probability(99, 100) == 0.0


@pytest.fixture
def mixed_model(tmp_path):
    model = load_dense(str(write_model(tmp_path / "m")), ["neg", "pos"], "classification")[0].eval()
    dense_logits = model(input_ids=_ids()).logits
    factorized = SVDFactorizer(3)(model)
    low_logits = model(input_ids=_ids()).logits
    mixed = MixedRank(0.5, seed=3)
    mixed.attach(model, factorized.weights)
    return model, mixed, dense_logits, low_logits


def _ids() -> torch.Tensor:
    return torch.randint(5, 20, (3, 7), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_paths_choose_between_sparse_and_low_rank(mixed_model):
    model, _, dense_logits, low_logits = mixed_model
    draw_paths(model, 1.0, passes=1)
    torch.testing.assert_close(model(input_ids=_ids()).logits, dense_logits)
    draw_paths(model, 0.0, passes=1)
    torch.testing.assert_close(model(input_ids=_ids()).logits, low_logits)


@torch.no_grad()
def test_doubled_batch_equals_two_passes(mixed_model):
    model = mixed_model[0]
    draw_paths(model, 0.5, torch.Generator().manual_seed(5), passes=2)
    modules = [m for m in model.modules() if isinstance(m, MixedRankLinear)]
    paths = [module.paths for module in modules]
    assert len(set(paths)) > 2, "matrices and passes are drawn independently"
    both = model(input_ids=_ids().repeat(2, 1)).logits.chunk(2)
    for turn in (0, 1):
        for module, path in zip(modules, paths, strict=True):
            module.paths = (path[turn],)
        torch.testing.assert_close(model(input_ids=_ids()).logits, both[turn])


def test_detach_leaves_the_low_rank_model(mixed_model):
    model, mixed, _, low_logits = mixed_model
    mixed.detach(model)
    assert not any(isinstance(module, MixedRankLinear) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=_ids()).logits, low_logits)


def test_draws_follow_p():
    draws = []
    model = torch.nn.ModuleList()
    from lpaf_kernels import LowRankSparseLinear

    for _ in range(50):
        model.append(MixedRankLinear(LowRankSparseLinear(4, 4, 2), torch.zeros(4, 4)))
    for step in range(40):
        draw_paths(model, 0.3, torch.Generator().manual_seed(step), passes=2)
        draws += [z for module in model for z in module.paths]
    mean = sum(draws) / len(draws)
    assert abs(mean - 0.3) < 4 * math.sqrt(0.21 / len(draws))


# question answering -------------------------------------------------------------------------------------------------


def test_questions_are_two_classifications_over_positions():
    torch.manual_seed(0)
    labels, teacher, logits = torch.tensor([[0, 2], [3, 3]]), torch.randn(2, 2, 5), torch.randn(4, 2, 5)
    terms = {"distill": 0.3, "consistency": 0.5}
    loss, parts = Objective("question-answering", **terms)(logits, labels, teacher)
    sides = [Objective("classification", **terms)(logits[:, at], labels[:, at], teacher[:, at]) for at in (0, 1)]
    torch.testing.assert_close(loss, (sides[0][0] + sides[1][0]) / 2)
    for name, part in parts.items():
        torch.testing.assert_close(part, (sides[0][1][name] + sides[1][1][name]) / 2)


def test_padding_of_windows_counts_for_nothing():
    torch.manual_seed(0)
    start, end = torch.randn(2, 4, 6, requires_grad=True)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]] * 4)
    logits = task_logits(QuestionAnsweringModelOutput(start_logits=start, end_logits=end), mask)
    labels, teacher = torch.tensor([[0, 2], [3, 3]]), torch.randn(2, 2, 4)
    objective = Objective("question-answering", distill=0.5, temperature=4.0, consistency=1.0)
    loss, parts = objective(logits, labels, F.pad(teacher, (0, 2), value=PADDING))
    shorter, shorter_parts = objective(torch.stack((start, end), 1)[..., :4], labels, teacher)
    torch.testing.assert_close(loss, shorter)
    torch.testing.assert_close(parts, shorter_parts)
    gradient, other = (torch.autograd.grad(value, start, retain_graph=True)[0] for value in (loss, shorter))
    torch.testing.assert_close(gradient, other)
    assert not gradient[:, 4:].any()


def test_windows_are_padded_at_the_end_whatever_the_tokenizer_prefers(tmp_path):
    tokenizer = load_tokenizer(str(write_model(tmp_path / "m")))
    tokenizer.padding_side = "left"
    rows = [
        {"input_ids": [2, 7, 3], "attention_mask": [1] * 3, "labels": [1, 1], "teacher_logits": [1.0, 2, 3, 4, 5, 6]},
        {"input_ids": [2, 7, 8, 3], "attention_mask": [1] * 4, "labels": [1, 2], "teacher_logits": [0.0] * 8},
    ]
    batch = Collator(tokenizer, "question-answering")(rows)
    assert batch["input_ids"].tolist() == [[2, 7, 3, 0], [2, 7, 8, 3]]
    assert batch["labels"].tolist() == [[1, 1], [1, 2]]
    assert batch["teacher_logits"][0].tolist() == [[1, 2, 3, PADDING], [4, 5, 6, PADDING]]
