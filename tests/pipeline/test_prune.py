"""The schedule's shape and the pruner's selection."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import TrainerState

from lpaf.errors import TrainingDivergedError
from lpaf.models.checkpoint import load_dense
from lpaf.models.targets import encoder_linears
from lpaf.prune import CubicSchedule, HardMovementPruner, MovementPruner, SensitivityPruner
from lpaf.prune.importance import ImportancePruner, sparse_linears
from lpaf.prune.movement import masked_linears
from lpaf_kernels import LowRankSparseLinear
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
    "options", [{"keep": -0.1}, {"keep": 1.1}, {"keep": 0.5, "steps": 0}, {"keep": 0.5, "warmup": 0.6, "cooldown": 0.4}]
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


class TestHardMovement:
    """Movement pruning without masks: scores accumulate, pruned weights are zero at once."""

    def test_accumulates_movement_and_zeroes(self, model):
        pruner = HardMovementPruner(0.4)
        pruner.attach(model)
        ids, labels = torch.randint(5, 20, (4, 6)), torch.tensor([0, 1, 0, 1])
        model(input_ids=ids, labels=labels).loss.backward()
        linears = encoder_linears(model)
        dense = {name: linear.weight.detach().clone() for name, linear in linears.items()}
        pruner.accumulate(model)
        pruner.zero(model, 0.4)
        for name, linear in linears.items():
            torch.testing.assert_close(linear.movement, -dense[name] * linear.weight.grad)
            kept = linear.weight != 0
            assert int(kept.sum()) == int(0.4 * kept.numel() + 0.5)
            assert torch.equal(linear.weight[kept], dense[name][kept])
            assert f"{name}.movement" in model.state_dict()
        scores = pruner.detach(model)
        assert scores.keys() == linears.keys()
        assert not any(name.endswith("movement") for name in model.state_dict())

    def test_the_score_of_a_zeroed_weight_stands_still(self, model):
        pruner = HardMovementPruner(0.5)
        pruner.attach(model)
        callback = pruner.callback(steps=10)
        state = TrainerState(global_step=9)
        ids, labels = torch.randint(5, 20, (4, 6)), torch.tensor([0, 1, 0, 1])
        for _ in range(2):
            model.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            before = {name: linear.movement.clone() for name, linear in encoder_linears(model).items()}
            zeros = {name: linear.weight == 0 for name, linear in encoder_linears(model).items()}
            callback.on_pre_optimizer_step(None, state, None, model=model)
            callback.on_optimizer_step(None, state, None, model=model)
        for name, linear in encoder_linears(model).items():
            assert zeros[name].float().mean() == 0.5
            assert torch.equal(linear.movement[zeros[name]], before[name][zeros[name]])
        assert callback.progress == {"keep": 0.5}

    def test_bad_scope(self):
        with pytest.raises(ValueError, match="scope: expected 'matrix' or 'global', got 'row'"):
            HardMovementPruner(0.5, scope="row")


class TestSensitivity:
    """Sums of |W dL/dW_eff| in the scores of the masks."""

    def backward(self, model, seed):
        ids = torch.randint(5, 20, (4, 6), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()

    def test_scores_add_up_absolute_products_of_kept_and_pruned_weights(self, model):
        pruner = SensitivityPruner(0.5)
        pruner.attach(model)
        modules = [module for _, module in masked_linears(model)]
        expected = [torch.zeros_like(module.scores) for module in modules]
        callback = pruner.callback(steps=10)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(3):
            callback.on_step_begin(None, TrainerState(global_step=4 * step), None, model=model)
            self.backward(model, seed=step)
            for total, module in zip(expected, modules, strict=True):
                total += module.scores.grad.abs()  # W dL/dW_eff: test_scores_accumulate_movement
            callback.on_pre_optimizer_step(None, TrainerState(global_step=4 * step), None, model=model)
            optimizer.step()
            optimizer.zero_grad()
        assert callback.progress == {"keep": 0.5}
        for total, module in zip(expected, modules, strict=True):
            torch.testing.assert_close(module.scores.detach(), total)
            assert module.scores.detach()[~module.mask()].any(), "pruned weights are scored too"

    def test_keeps_the_weights_that_matter_however_their_gradients_are_signed(self, model):
        """Gradients of alternating sign cancel in movement, and movement against the weight counts as unimportance."""
        pruner = SensitivityPruner(0.25)
        pruner.attach(model)
        generator = torch.Generator().manual_seed(0)
        modules = [module for _, module in masked_linears(model)]
        vital = [torch.rand(module.scores.shape, generator=generator) < 0.25 for module in modules]
        for step in range(6):
            for module, where in zip(modules, vital, strict=True):
                module.scores.grad = torch.where(where, (-1.0) ** step, 0.1)
            pruner.accumulate(model)
        pruner.update_masks(model, 0.2)
        for module, where in zip(modules, vital, strict=True):
            assert where[module.mask()].all()

    def test_nothing_is_scored_where_there_is_no_gradient(self, model):
        pruner = SensitivityPruner(0.5)
        pruner.attach(model)
        pruner.accumulate(model)
        assert not any(module.scores.any() for _, module in masked_linears(model))

    def test_bad_scope(self):
        with pytest.raises(ValueError, match="scope: expected 'matrix' or 'global', got 'row'"):
            SensitivityPruner(0.5, scope="row")


def test_nan_scores_stop_the_run_when_it_logs(model):
    """On a GPU the selection marks NaN scores by a NaN threshold."""
    pruner = MovementPruner(0.5)
    pruner.attach(model)
    callback = pruner.callback(steps=10)
    callback.on_log(None, TrainerState(global_step=3), None, model=model)
    next(iter(masked_linears(model)))[1].threshold_value.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match="the scores are not numbers any more"):
        callback.on_log(None, TrainerState(global_step=3), None, model=model)


@pytest.mark.parametrize(
    "pruner", [MovementPruner(0.5), SensitivityPruner(0.5), HardMovementPruner(0.5), ImportancePruner(0.5, rank=4)]
)
def test_nan_scores_never_prune_in_silence(model, pruner):
    pruner.attach(model)
    state = {HardMovementPruner: "movement", ImportancePruner: "importance"}.get(type(pruner), "scores")
    linear = next(iter(encoder_linears(model).values()))
    getattr(linear, state).data.view(-1)[0] = float("nan")
    if not isinstance(pruner, MovementPruner):
        with pytest.raises(TrainingDivergedError, match="the scores are not numbers any more"):
            pruner.callback(steps=10).on_log(None, TrainerState(), None, model=model)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    with pytest.raises(TrainingDivergedError, match="the scores are not numbers any more"):
        pruner.detach(model)
    assert all(torch.equal(part, before[name]) for name, part in model.state_dict().items() if part.isfinite().all())


class TestImportance:
    """LoSparse's neuron pruning."""

    def test_attach_changes_the_outputs_by_rounding_only(self, model):
        ids = torch.randint(5, 20, (2, 6))
        before = model(input_ids=ids).logits
        ImportancePruner(0.5, rank=4).attach(model)
        torch.testing.assert_close(model(input_ids=ids).logits, before)

    def test_importance_is_the_mean_of_weight_times_gradient(self, model):
        pruner = ImportancePruner(0.5, rank=4, beta1=0.75)
        pruner.attach(model)
        expected = {name: 0.0 for name, _ in sparse_linears(model)}
        for seed in range(2):
            ids = torch.randint(5, 20, (4, 6), generator=torch.Generator().manual_seed(seed))
            model.zero_grad()
            model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            pruner.update_importance(model)
            for name, module in sparse_linears(model):
                now = (module.sparse.detach() * module.sparse.grad).abs().mean(1)
                expected[name] = 0.75 * expected[name] + 0.25 * now
        for name, module in sparse_linears(model):
            torch.testing.assert_close(module.importance, expected[name])
            assert f"{name}.importance" in model.state_dict()

    def test_uncertainty_multiplies_importance(self, model):
        pruner = ImportancePruner(0.5, rank=4, beta1=0.75, beta2=0.9)
        pruner.attach(model)
        ids = torch.randint(5, 20, (4, 6))
        model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        pruner.update_importance(model)
        for _, module in sparse_linears(model):
            now = (module.sparse.detach() * module.sparse.grad).abs()
            smooth = 0.25 * now
            torch.testing.assert_close(module.importance, (smooth * 0.1 * (now - smooth).abs()).mean(1))

    @pytest.mark.parametrize("scope", ["matrix", "global"])
    def test_the_least_important_rows_go(self, model, scope):
        pruner = ImportancePruner(0.3, rank=4, scope=scope)
        pruner.attach(model)
        modules = [module for _, module in sparse_linears(model)]
        for index, module in enumerate(modules):
            module.importance.uniform_().add_(index * (scope == "global"))
        pruner.zero_rows(model, 0.3)
        kept = [module.sparse.detach().any(1) for module in modules]
        if scope == "matrix":
            for module, rows in zip(modules, kept, strict=True):
                assert int(rows.sum()) in (int(0.3 * len(rows)), int(0.3 * len(rows)) + 1)
                assert module.importance[rows].min() > module.importance[~rows].max()
        # a row stores its weights and its index
        numbers = sum(module.out_features * (module.in_features + 1) for module in modules)
        stays = sum(int(rows.sum()) * (module.in_features + 1) for module, rows in zip(modules, kept, strict=True))
        widest = max(module.in_features for module in modules)
        assert 0.3 * numbers - widest - 1 <= stays <= 0.3 * numbers

    def test_detach_leaves_compact_layers_of_the_same_function(self, model):
        pruner = ImportancePruner(0.5, rank=4)
        pruner.attach(model)
        for _, module in sparse_linears(model):
            module.importance.uniform_()
        pruner.zero_rows(model, 0.5)
        ids = torch.randint(5, 20, (2, 6))
        before = model(input_ids=ids).logits
        importance = pruner.detach(model)
        layers = {name: part for name, part in model.named_modules() if isinstance(part, LowRankSparseLinear)}
        assert layers.keys() == importance.keys() == encoder_linears(model).keys()
        assert {layer.rank for layer in layers.values()} == {4}
        torch.testing.assert_close(model(input_ids=ids).logits, before)

    def test_callback_prunes_between_warmup_and_end(self, model):
        pruner = ImportancePruner(0.4, rank=4, warmup=0.1, cooldown=0.3, interval=10)
        pruner.attach(model)
        callback, state = pruner.callback(steps=100), TrainerState(global_step=0)
        zeroed = []
        pruner.zero_rows = lambda model, keep: zeroed.append((state.global_step + 1, keep))
        for step in range(100):
            state.global_step = step
            callback.on_optimizer_step(None, state, None, model=model)
        steps = [step for step, _ in zeroed]
        assert steps == [*range(20, 70, 10), *range(70, 101)]
        shares = [keep for _, keep in zeroed]
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == 0.4

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"rank": -1}, "rank: must be 0 or more"),
            ({"scope": "row"}, "scope: expected"),
            ({"interval": 0}, "interval: must be at least 1"),
            ({"beta1": 1.0}, r"beta1: must be in \[0, 1\)"),
            ({"keep": -0.1}, "keep: must be in"),
        ],
    )
    def test_bad_input(self, options, text):
        with pytest.raises(ValueError, match=text):
            ImportancePruner(**{"keep": 0.5, "rank": 2, **options})
