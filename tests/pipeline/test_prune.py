"""The schedule's shape and the pruner's selection."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lpaf.models.checkpoint import load_dense
from lpaf.models.targets import encoder_linears
from lpaf.prune import CubicSchedule, MovementPruner
from lpaf.prune.movement import masked_linears
from tiny import write_model


def test_cubic_schedule_follows_equation_5():
    schedule = CubicSchedule(keep=0.1, steps=100, warmup=0.1, cooldown=0.2)
    assert [schedule(t) for t in (0, 9)] == [1.0, 1.0]
    assert schedule(10) == 1.0
    assert schedule(45) == pytest.approx(0.1 + 0.9 * ((100 - 20 - 45) / (100 - 20 - 10)) ** 3)
    assert [schedule(t) for t in (80, 99, 1000)] == [0.1, 0.1, 0.1]
    values = [schedule(t) for t in range(100)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    "options", [{"keep": 0.0}, {"keep": 1.1}, {"keep": 0.5, "steps": 0}, {"keep": 0.5, "warmup": 0.6, "cooldown": 0.4}]
)
def test_schedule_refuses_what_cannot_be(options):
    with pytest.raises(ValueError, match=r"keep|steps|warmup"):
        CubicSchedule(**{"steps": 10, **options})


@pytest.fixture
def model(tmp_path):
    return load_dense(str(write_model(tmp_path / "m")), ["neg", "pos"], "classification")[0].eval()


def test_attach_changes_no_output(model):
    ids = torch.randint(5, 20, (2, 6))
    before = model(input_ids=ids).logits
    MovementPruner(0.5).attach(model)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_masks_keep_the_top_scores(model, scope):
    pruner = MovementPruner(0.3, scope=scope)
    pruner.attach(model)
    generator = torch.Generator().manual_seed(0)
    modules = [module for _, module in masked_linears(model)]
    for index, module in enumerate(modules):
        module.scores.data = torch.randn(module.scores.shape, generator=generator) + index
    pruner.update_masks(model, 0.3)
    if scope == "matrix":
        for module in modules:
            mask = module.mask()
            assert int(mask.sum()) == int(0.3 * mask.numel() + 0.5)
            assert module.scores[mask].min() > module.scores[~mask].max()
    else:
        scores = torch.cat([module.scores.detach().flatten() for module in modules])
        mask = torch.cat([module.mask().flatten() for module in modules])
        assert int(mask.sum()) == int(0.3 * mask.numel() + 0.5)
        assert scores[mask].min() > scores[~mask].max()


def test_detach_zeroes_exactly_the_pruned_weights(model):
    dense = {name: linear.weight.detach().clone() for name, linear in encoder_linears(model).items()}
    pruner = MovementPruner(0.4)
    pruner.attach(model)
    for _, module in masked_linears(model):
        module.scores.data.uniform_(-1, 1)
    scores = pruner.detach(model)
    for name, linear in encoder_linears(model).items():
        assert type(linear) is nn.Linear
        kept = linear.weight != 0
        assert int(kept.sum()) == int(0.4 * kept.numel() + 0.5)
        assert torch.equal(linear.weight[kept], dense[name][kept])
        assert scores[name][kept].min() >= scores[name][~kept].max()


def test_scores_accumulate_movement(model):
    """With plain SGD on the scores, S = -lr * sum W dL/dW_eff (Eq. 4), pruned entries included."""
    pruner = MovementPruner(0.5)
    pruner.attach(model)
    for _, module in masked_linears(model):
        module.scores.data.uniform_(-1, 1)
    pruner.update_masks(model, 0.5)
    name, module = next(iter(masked_linears(model)))
    ids, labels = torch.randint(5, 20, (4, 6)), torch.tensor([0, 1, 0, 1])
    model(input_ids=ids, labels=labels).loss.backward()
    effective = nn.Parameter((module.weight * module.mask()).detach())
    plain = nn.Linear(module.in_features, module.out_features)
    plain.weight, plain.bias = effective, module.bias
    model.set_submodule(name, plain)
    model(input_ids=ids, labels=labels).loss.backward()
    torch.testing.assert_close(module.scores.grad, module.weight.detach() * effective.grad)
    torch.testing.assert_close(module.weight.grad, module.mask() * effective.grad)
