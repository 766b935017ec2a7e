"""Soft movement, magnitude, lottery-ticket and contrastive pruning: their rules by hand, and resuming each of them."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState, get_linear_schedule_with_warmup

from lpaf.errors import InputError, TrainingDivergedError
from lpaf.models.checkpoint import load_dense
from lpaf.models.targets import encoder_linears
from lpaf.prune import (
    PRUNERS,
    ContrastivePruner,
    CubicSchedule,
    GradualMagnitudePruner,
    LotteryTicketPruner,
    MagnitudePruner,
    MovementPruner,
    Pruner,
    SoftMovementPruner,
    Surroundings,
    contrastive,
)
from lpaf.prune.contrastive import contrastive_loss, draw_candidates, encode
from lpaf.prune.masks import kept_share, masked_linears
from lpaf.prune.soft_movement import mean_sigmoid, rate_sum
from lpaf.recipes.compress import Compression, compress
from lpaf.recipes.options import PRUNER_CHOICES, CompressOptions
from lpaf.recipes.prepare import prepare
from lpaf.retrain.trainer import ProgressBar, train_stage
from lpaf_kernels import keep_threshold
from tiny import sentences, write_model, write_rows


@pytest.fixture
def model(tmp_path):
    return load_dense(str(write_model(tmp_path / "m")), ["neg", "pos"], "classification")[0].eval()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 20, (4, 6), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.tensor([0, 1, 0, 1])}


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: linear.weight.detach().clone() for name, linear in encoder_linears(model).items()}


def test_every_choice_is_a_pruner():
    assert set(PRUNER_CHOICES) < PRUNERS.keys()


@pytest.mark.parametrize("cls", PRUNERS.values(), ids=PRUNERS)
def test_every_pruner_has_what_the_recipes_ask_for(cls):
    assert issubclass(cls, Pruner)
    methods = ["attach", "detach"]
    methods += ["callback"] * cls.trains + ["look_around"] * cls.looks_back
    if cls.rounds or "rounds" in inspect.signature(cls).parameters:
        methods += ["end_round", "next_round"]
    assert all(callable(getattr(cls, name)) for name in methods)
    assert all(isinstance(getattr(cls, name), bool) for name in ("trains", "learned_scores", "looks_back"))
    assert cls.distill is None or 0 <= cls.distill <= 1


@pytest.mark.parametrize("cls", [MovementPruner, SoftMovementPruner])
def test_scores_of_a_zero_matrix_start_at_zero(model, cls):
    name, linear = next(iter(encoder_linears(model).items()))
    linear.weight.data.zero_()
    options = {} if cls is SoftMovementPruner else {"keep": 0.5}
    cls(**options, score_init=4.0).attach(model)
    modules = dict(masked_linears(model))
    assert not bool(modules.pop(name).scores.any())
    assert all(module.scores.mean().item() == pytest.approx(4.0, rel=1e-4) for module in modules.values())


def test_a_schedule_may_rise_from_zero():
    schedule = CubicSchedule(0.1, steps=100, warmup=0.1, cooldown=0.2, start=0.0)
    assert [schedule(t) for t in (0, 9, 10)] == [0.0, 0.0, 0.0]
    assert schedule(45) == pytest.approx(0.1 * (1 - ((100 - 20 - 45) / (100 - 20 - 10)) ** 3))
    assert [schedule(t) for t in (80, 99)] == [0.1, 0.1]


class TestSoftMovement:
    """sigmoid(S) > tau."""

    def test_keeps_what_is_above_the_threshold_and_half_a_percent(self, model):
        pruner = SoftMovementPruner()
        pruner.attach(model)
        modules = [module for _, module in masked_linears(model)]
        generator = torch.Generator().manual_seed(0)
        for index, module in enumerate(modules):
            module.scores.data = torch.randn(module.scores.shape, generator=generator) - (100 if index == 3 else 2)
        pruner.update_masks(model, 0.1)
        for index, module in enumerate(modules):
            mask, scores = module.mask(), module.scores.detach()
            if index == 3:
                assert torch.equal(mask, keep_threshold(scores, 0.005).mask(scores))
                assert int(mask.sum()) == int(0.005 * mask.numel() + 0.5)
            else:
                assert torch.equal(mask, scores.sigmoid() > 0.1)
                assert 0.2 < mask.float().mean() < 0.8

    def test_scores_that_tie_at_the_threshold_go_but_for_the_floor(self, model):
        pruner = SoftMovementPruner()
        pruner.attach(model)
        for _, module in masked_linears(model):
            module.scores.data.zero_()
        pruner.update_masks(model, 0.5)
        for _, module in masked_linears(model):
            assert int(module.mask().sum()) == int(0.005 * module.scores.numel() + 0.5)

    def test_everything_is_kept_at_tau_0(self, model):
        pruner = SoftMovementPruner()
        pruner.attach(model)
        pruner.update_masks(model, 0.0)
        assert kept_share(model) == 1.0

    def test_callback_raises_threshold_and_penalty_together(self, model):
        pruner = SoftMovementPruner(threshold=0.2, penalty=30.0, warmup=0.1, cooldown=0.2)
        pruner.attach(model)
        callback = pruner.callback(steps=100)
        for step, share in ((5, 0.0), (45, 1 - 0.5**3), (90, 1.0)):
            callback.on_step_begin(None, TrainerState(global_step=step), None, model=model)
            assert callback.tau == pytest.approx(0.2 * share)
            assert callback.weight == pytest.approx(30.0 * share)
            assert callback.progress == {"keep": 1.0, "threshold": callback.tau}
            penalty = callback.penalty(model, None, {})
            assert penalty == {} if step == 5 else penalty["penalty"].item() == pytest.approx(30.0 * share * 0.5)

    def test_gradient_of_the_penalty(self, model):
        pruner = SoftMovementPruner()
        pruner.attach(model)
        modules = [module for _, module in masked_linears(model)]
        for module in modules:
            module.scores.data = torch.randn_like(module.scores)
        mean_sigmoid(model).backward()
        total = sum(module.scores.numel() for module in modules)
        for module in modules:
            sigmoid = module.scores.detach().double().sigmoid()
            torch.testing.assert_close(module.scores.grad.double(), sigmoid * (1 - sigmoid) / total, rtol=1e-5, atol=0)

    def test_gradient_of_the_task_passes_straight_through(self, model):
        pruner = SoftMovementPruner()
        pruner.attach(model)
        name, module = next(iter(masked_linears(model)))
        module.scores.data = torch.randn_like(module.scores) - 2
        pruner.update_masks(model, 0.1)
        model(**batch()).loss.backward()
        plain = nn.Linear(module.in_features, module.out_features)
        plain.weight, plain.bias = nn.Parameter((module.weight * module.mask()).detach()), module.bias
        model.set_submodule(name, plain)
        model(**batch()).loss.backward()
        torch.testing.assert_close(module.scores.grad, module.weight.detach() * plain.weight.grad)

    def test_rates_are_summed_as_the_optimizer_steps_them(self):
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
        groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 1e-2), strict=True)]
        optimizer = torch.optim.SGD(groups)
        scheduler = get_linear_schedule_with_warmup(optimizer, 6, 100)
        total = 0.0
        for _ in range(100):
            total += optimizer.param_groups[-1]["lr"]
            optimizer.step()
            scheduler.step()
        assert rate_sum(scheduler, 100) == pytest.approx(total)

    @pytest.mark.parametrize(
        ("steps", "start", "warns"), [(430, 0.0, True), (450, 0.0, False), (450, 1.0, True), (650, 1.0, False)]
    )
    def test_warns_of_a_run_too_short(self, model, steps, start, warns, capsys):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-2)
        scheduler = get_linear_schedule_with_warmup(optimizer, int(0.06 * steps), steps)
        pruner = SoftMovementPruner()
        pruner.attach(model)
        for _, module in masked_linears(model):
            module.scores.data.fill_(start)
        state = TrainerState(max_steps=steps)
        pruner.callback(steps).on_train_begin(None, state, None, model=model, lr_scheduler=scheduler)
        assert ("before they are pruned" in capsys.readouterr().err) == warns

    @pytest.mark.parametrize(("penalty", "step", "warns"), [(0.0, 0, True), (0.0, 3, False), (1.0, 0, False)])
    def test_warns_where_nothing_pushes_the_scores_down(self, model, penalty, step, warns, capsys):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = get_linear_schedule_with_warmup(optimizer, 0, 10)
        pruner = SoftMovementPruner(penalty=penalty)
        pruner.attach(model)
        state = TrainerState(max_steps=10, global_step=step)
        pruner.callback(10).on_train_begin(None, state, None, model=model, lr_scheduler=scheduler)
        assert ("--penalty 0" in capsys.readouterr().err) == warns

    def test_nan_scores_stop_the_run(self, model):
        pruner = SoftMovementPruner()
        pruner.attach(model)
        next(iter(masked_linears(model)))[1].scores.data[0, 0] = float("nan")
        with pytest.raises(TrainingDivergedError, match="the scores are not numbers any more"):
            pruner.detach(model)

    @pytest.mark.parametrize("options", [{"threshold": 0.0}, {"threshold": 1.0}, {"penalty": -1.0}, {"score_init": -1}])
    def test_bad_input(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            SoftMovementPruner(**options)


class TestMagnitude:
    """One shot, and step by step."""

    @pytest.mark.parametrize("scope", ["matrix", "global"])
    def test_the_smallest_weights_go_at_once(self, model, scope):
        dense = weights_of(model)
        pruner = MagnitudePruner(0.3, scope=scope)
        pruner.attach(model)
        scores = pruner.detach(model)
        pruned = weights_of(model)
        assert all(torch.equal(scores[name], dense[name].abs()) for name in dense)
        groups = [[name] for name in dense] if scope == "matrix" else [list(dense)]
        for names in groups:
            magnitude = torch.cat([dense[name].abs().flatten() for name in names])
            kept = torch.cat([(pruned[name] != 0).flatten() for name in names])
            assert int(kept.sum()) == int(0.3 * kept.numel() + 0.5)
            assert magnitude[kept].min() >= magnitude[~kept].max()
        assert all(torch.equal(pruned[name], torch.where(pruned[name] != 0, dense[name], 0.0)) for name in dense)

    def test_nan_weights_are_refused(self, model):
        next(iter(encoder_linears(model).values())).weight.data[0, 0] = float("nan")
        before = weights_of(model)
        with pytest.raises(TrainingDivergedError, match="not numbers"):
            MagnitudePruner(0.5).detach(model)
        after = weights_of(model)
        assert all(torch.equal(after[name].nan_to_num(7), before[name].nan_to_num(7)) for name in before)

    def test_gradual_follows_the_schedule_at_intervals(self, model):
        pruner = GradualMagnitudePruner(0.4, warmup=0.1, cooldown=0.3, interval=10)
        pruner.attach(model)
        callback, shares = pruner.callback(steps=100), {}
        for step in range(100):
            callback.on_step_begin(None, TrainerState(global_step=step), None, model=model)
            shares[step] = kept_share(model)
        schedule = CubicSchedule(0.4, 100, 0.1, 0.3)
        assert [step for step in range(1, 100) if shares[step] != shares[step - 1]] == [20, 30, 40, 50, 60, 70]
        for step in range(20, 71, 10):
            assert shares[step] == pytest.approx(schedule(step), abs=1e-3)
        assert callback.progress == {"keep": shares[99]} == {"keep": pytest.approx(0.4, abs=1e-3)}

    def test_gradual_logs_the_share_of_the_last_selection(self, model):
        pruner = GradualMagnitudePruner(0.4, warmup=0.1, cooldown=0.3, interval=10)
        pruner.attach(model)
        callback = pruner.callback(steps=100)
        for step in range(20, 30):
            callback.on_step_begin(None, TrainerState(global_step=step), None, model=model)
        assert callback.progress == {"keep": pytest.approx(callback.schedule(20), abs=1e-3)}

    def test_gradual_masks_let_weights_return_until_they_stand(self, model):
        pruner = GradualMagnitudePruner(0.5, cooldown=0.3, interval=1)
        pruner.attach(model)
        callback = pruner.callback(steps=10)
        _, module = next(iter(masked_linears(model)))
        callback.on_step_begin(None, TrainerState(global_step=5), None, model=model)
        first = module.mask()
        value = module.weight[~first][0].item()
        module.weight.data[first] *= 1e-3
        callback.on_step_begin(None, TrainerState(global_step=6), None, model=model)
        assert not torch.equal(module.mask(), first)
        assert bool((module.mask() & (module.weight == value)).any()), "a masked weight keeps its value and may return"
        callback.on_step_begin(None, TrainerState(global_step=7), None, model=model)
        final = module.mask()
        module.weight.data[final] *= 1e-3
        for step in (8, 9):
            callback.on_step_begin(None, TrainerState(global_step=step), None, model=model)
            assert torch.equal(module.mask(), final), "from the first step at the final share on, the mask stands"
        name = next(iter(encoder_linears(model)))
        pruner.detach(model)
        assert torch.equal(model.get_submodule(name).weight != 0, final)

    def test_gradual_without_cooldown_ends_at_the_share(self, model):
        pruner = GradualMagnitudePruner(0.25, warmup=0.0, cooldown=0.0)
        pruner.attach(model)
        callback = pruner.callback(steps=25)
        for step in range(25):
            callback.on_step_begin(None, TrainerState(global_step=step), None, model=model)
        masks = {name: module.mask() for name, module in masked_linears(model)}
        scores = pruner.detach(model)
        for name, linear in encoder_linears(model).items():
            kept = linear.weight != 0
            assert int(kept.sum()) == int(0.25 * kept.numel() + 0.5)
            assert not bool((kept & ~masks[name]).any())
            assert torch.equal(scores[name][kept], linear.weight[kept].abs())

    def test_masked_weights_get_no_gradient(self, model):
        pruner = GradualMagnitudePruner(0.5)
        pruner.attach(model)
        pruner.callback(10).on_step_begin(None, TrainerState(global_step=7), None, model=model)
        model(**batch()).loss.backward()
        for _, module in masked_linears(model):
            assert module.scores.grad is None
            assert not bool(module.weight.grad[~module.mask()].any())

    @pytest.mark.parametrize("options", [{"keep": 0.0}, {"scope": "row"}, {"interval": 0}])
    def test_bad_input(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            GradualMagnitudePruner(**{"keep": 0.5, **options})


class TestLotteryTicket:
    """Prune, rewind, repeat."""

    def test_shares_are_geometric(self):
        pruner = LotteryTicketPruner(0.2, rounds=3)
        shares = [1.0, *(pruner.share(number) for number in (1, 2, 3))]
        ratios = [after / before for before, after in itertools.pairwise(shares)]
        assert ratios == pytest.approx([0.2 ** (1 / 3)] * 3)
        assert shares[-1] == 0.2

    def test_rounds_nest_their_masks_and_rewind_everything_else(self, model):
        before = {name: part.clone() for name, part in model.state_dict().items()}
        pruner = LotteryTicketPruner(0.2, rounds=2)
        pruner.look_around(Surroundings(before, model, None, None))
        for part in model.parameters():
            part.data.normal_()
        pruner.attach(model)
        previous = {name: torch.ones_like(module.mask()) for name, module in masked_linears(model)}
        for number in (1, 2):
            state = model.state_dict()
            assert all(torch.equal(state[name], part) for name, part in before.items())
            for name in before:
                state[name].normal_() if state[name].is_floating_point() else None
            trained = {name: module.weight.detach().clone() for name, module in masked_linears(model)}
            masks = pruner.end_round(model, number)
            pruner.next_round(model, masks)
            for name, module in masked_linears(model):
                mask = module.mask()
                assert torch.equal(mask, masks[name])
                assert int(mask.sum()) == int(pruner.share(number) * mask.numel() + 0.5)
                assert not bool((mask & ~previous[name]).any()), "what is pruned stays pruned"
                gone = previous[name] & ~mask
                assert trained[name][mask].abs().min() >= trained[name][gone].abs().max()
            previous = masks
        pruner.detach(model)
        for name, linear in encoder_linears(model).items():
            assert torch.equal(linear.weight, torch.where(previous[name], before[f"{name}.weight"], 0.0))

    def test_weights_of_zero_do_not_let_masked_ones_back(self, model):
        pruner = LotteryTicketPruner(0.25, rounds=2)
        pruner.look_around(Surroundings(copy.deepcopy(model.state_dict()), model, None, None))
        pruner.attach(model)
        pruner.next_round(model, pruner.end_round(model, 1))
        first = {name: module.mask() for name, module in masked_linears(model)}
        for _, module in masked_linears(model):
            module.weight.data.zero_()
        second = pruner.end_round(model, 2)
        assert not any(bool((second[name] & ~first[name]).any()) for name in first)

    @pytest.mark.parametrize("options", [{"keep": 1.5}, {"scope": "row"}, {"rounds": 0}])
    def test_bad_input(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            LotteryTicketPruner(**{"keep": 0.5, **options})


class TestContrastive:
    """CAP's losses and banks."""

    def test_info_nce_is_the_plain_loop(self):
        generator = torch.Generator().manual_seed(0)
        queries = nn.functional.normalize(torch.randn(3, 5, generator=generator, dtype=torch.float64), dim=-1)
        keys = nn.functional.normalize(torch.randn(8, 5, generator=generator, dtype=torch.float64), dim=-1)
        own, label, key_labels = [1, 4, 6], [0, 1, 1], [0, 0, 1, 0, 1, 1, 1, 0]
        example = torch.tensor([[c in (own[b], own[b] - 1) for c in range(8)] for b in range(3)])
        same = torch.tensor([[key_labels[c] == label[b] for c in range(8)] for b in range(3)])
        found = {}
        for name, mask in (("both", same), ("unsupervised", None)):
            found[name] = contrastive_loss(queries, keys, example, mask, temperature=0.1).item()
        unsupervised = supervised = 0.0
        for b in range(3):
            cosines = [sum(float(q) * float(k) for q, k in zip(queries[b], keys[c], strict=True)) for c in range(8)]
            denominator = sum(math.exp(cosine / 0.1) for cosine in cosines)
            logs = [-math.log(math.exp(cosine / 0.1) / denominator) for cosine in cosines]
            positives = [logs[c] for c in (own[b], own[b] - 1)]
            unsupervised += sum(positives) / len(positives) / 3
            positives = [logs[c] for c in range(8) if key_labels[c] == label[b]]
            supervised += sum(positives) / len(positives) / 3
        assert found["unsupervised"] == pytest.approx(unsupervised, rel=1e-12)
        assert found["both"] == pytest.approx(unsupervised + supervised, rel=1e-12)

    def test_gradient_of_info_nce(self):
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        keys = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        example, label = torch.eye(3, 6, dtype=torch.bool), torch.ones(3, 6, dtype=torch.bool)
        assert torch.autograd.gradcheck(lambda q: contrastive_loss(q, keys, example, label, 0.5), (queries,))

    def test_candidates(self):
        own = torch.tensor([7, 900])

        def draw(seed: int) -> torch.Tensor:
            return draw_candidates(own, 1000, 40, torch.Generator().manual_seed(seed))

        found = draw(0)
        assert set(own.tolist()) <= set(found.tolist())
        assert len(found.unique()) == len(found) <= 42
        assert torch.equal(found, draw(0))
        assert not torch.equal(found, draw(1))
        assert torch.equal(draw_candidates(own, 40, 40, torch.Generator()), torch.arange(40))

    @pytest.fixture
    def run(self, tiny_options):
        """A Compression that is about to prune, and its dense model and training set."""
        options = tiny_options | {"pruner": "cap", "prune_epochs": 3, "checkpoint_steps": 0}
        run = Compression(prepare(CompressOptions(**options)), "")
        dense = run.finetune()
        return run, dense, run.with_teacher(dense)

    def test_loss_against_every_bank(self, run):
        run, dense, train = run
        pruner = ContrastivePruner(0.5, contrastive=0.25)
        pruner.look_around(Surroundings(run.pretrained, dense, train, run.prepared.tokenizer))
        callback = pruner.callback(18)
        callback.generator = torch.Generator()
        index = torch.tensor([5, 17, 3])
        hidden = torch.randn(3, 4, dense.config.hidden_size)
        outputs = SimpleNamespace(hidden_states=(torch.zeros_like(hidden), hidden))
        losses = callback.contrast(dense, outputs, {"index": index})
        assert losses.keys() == {"contrast_pretrained", "contrast_dense"}
        callback.snapshots = [torch.randn(96, dense.config.hidden_size) for _ in range(2)]
        losses = callback.contrast(dense, outputs, {"index": index})
        labels = torch.tensor(train["labels"])
        queries = nn.functional.normalize(hidden[:, 0], dim=-1)
        for name, (bank,) in pruner.banks.items():
            expected = contrastive_loss(
                queries, bank, index[:, None] == torch.arange(96), labels[index][:, None] == labels, 0.1
            )
            torch.testing.assert_close(losses[f"contrast_{name}"], 0.25 * expected)
        keys = torch.cat(callback.snapshots)
        places = torch.arange(96).repeat(2)
        expected = contrastive_loss(
            queries, keys, index[:, None] == places, labels[index][:, None] == labels[places], 0.1
        )
        torch.testing.assert_close(losses["contrast_snapshots"], 0.25 * expected)

    def test_processes_contrast_with_the_same_candidates_and_the_whole_batch(self, monkeypatch):
        shares = [torch.tensor([3, 11]), torch.tensor([7])]
        pruner = ContrastivePruner(0.5)
        pruner.train = range(40)
        found = []
        monkeypatch.setattr(contrastive, "CANDIDATES", 5)
        monkeypatch.setattr(contrastive, "exchange", lambda mine: shares)
        for mine in shares:
            callback = pruner.callback(10)
            callback.generator = torch.Generator().manual_seed(0)
            found.append(callback.candidates(mine))
        assert torch.equal(*found)
        assert {3, 7, 11} <= set(found[0].tolist())

    def test_banks_are_the_models_own_sentences(self, run):
        run, dense, train = run
        bank = encode(dense, train, run.prepared.tokenizer)
        ids = torch.tensor([train[11]["input_ids"]])
        with torch.no_grad():
            first = dense.eval()(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, 0]
        torch.testing.assert_close(bank[11], first / first.norm())
        pruner = ContrastivePruner(0.5)
        pruner.look_around(Surroundings(run.pretrained, dense, train, run.prepared.tokenizer))
        assert torch.equal(pruner.banks["dense"][0], bank)
        assert not torch.allclose(pruner.banks["pretrained"][0], bank)

    def test_a_snapshot_in_eval_mode_when_an_epoch_begins(self, run, monkeypatch):
        run, dense, train = run
        taken = []
        encoded = ContrastivePruner.encode

        def watch(self, model):
            mode = model.training
            bank = encoded(self, model)
            taken.append((mode, model.training, bank))
            return bank

        monkeypatch.setattr(ContrastivePruner, "encode", watch)
        run.prune(copy.deepcopy(dense), train, dense)
        assert [mode for mode, _, _ in taken[2:]] == [True, True], "one at the start of epochs 2 and 3"
        assert [mode for _, mode, _ in taken[2:]] == [True, True], "and training goes on"
        assert not torch.equal(taken[2][2], taken[3][2])
        history = run.findings.history["prune"]
        assert {"contrast_pretrained", "contrast_dense", "task", "distillation"} <= history[0].keys()
        assert "contrast_snapshots" not in history[0]
        assert "contrast_snapshots" in history[-1]
        last = history[-1]
        parts = [0.1 * last["task"], 0.9 * last["distillation"]]
        parts += [value for name, value in last.items() if name.startswith("contrast_")]
        assert last["loss"] == pytest.approx(sum(parts), rel=1e-4)

    def test_regression_has_no_supervised_term(self, tiny_options, tmp_path):
        data = tmp_path / "stars"
        for name, seed, count in (("train", 1, 64), ("validation", 2, 32)):
            rows = [{"text": row["sentence"], "label": 1.5 + 2.0 * row["label"]} for row in sentences(count, seed)]
            write_rows(data / f"{name}.jsonl", rows)
        options = tiny_options | {"task": "text-regression", "data_dir": str(data), "pruner": "cap", "distill": 0.0}
        run = Compression(prepare(CompressOptions(**options | {"prune_epochs": 2})), "")
        dense = run.finetune()
        train = run.with_teacher(dense)
        pruner = ContrastivePruner(0.5)
        pruner.look_around(Surroundings(run.pretrained, dense, train, run.prepared.tokenizer))
        assert pruner.labels is None
        run.prune(copy.deepcopy(dense), train, dense)
        assert {"contrast_dense", "distillation"} <= run.findings.history["prune"][-1].keys()

    def test_bad_input(self):
        with pytest.raises(ValueError, match="contrastive: must be 0 or more"):
            ContrastivePruner(0.5, contrastive=-1)
        with pytest.raises(ValueError, match="temperature: must be above 0"):
            ContrastivePruner(0.5, temperature=0)


def test_terms_see_batch_and_outputs_and_are_added_and_logged(tiny_options, tmp_path):
    run = Compression(prepare(CompressOptions(**tiny_options | {"checkpoint_steps": 0})), "")
    model, seen = run.prepared.model, []

    def term(model, outputs, batch):
        rows = run.train[batch["index"].tolist()]
        assert batch["labels"].tolist() == rows["labels"]
        assert batch["attention_mask"].sum(1).tolist() == rows["length"]
        assert outputs.hidden_states[-1].shape[:2] == batch["input_ids"].shape
        seen.extend(batch["index"].tolist())
        return {"three": outputs.logits.new_tensor(3.0), "norm": 0.5 * model.classifier.weight.square().sum()}

    before = model.classifier.weight.square().sum().item()
    objective, options = run.objective(), run.train_options(1, 1e-9, 0)
    arguments = (model, run.prepared.tokenizer, run.train, objective, options, tmp_path / "stage")
    history = train_stage("terms", *arguments, terms=[term])
    assert sorted(seen) == list(range(len(run.train)))
    assert all(entry["three"] == 3.0 for entry in history)
    assert history[0]["norm"] == pytest.approx(0.5 * before, rel=1e-3)
    assert history[0]["loss"] == pytest.approx(history[0]["task"] + 3.0 + 0.5 * before, rel=1e-3)


# the recipe ----------------------------------------------------------------------------------------------------------

PRUNED = {
    "sensitivity": {"keep": 0.3},
    "soft-movement": {"score_lr": 0.5, "penalty": 3.0},
    "cap": {"keep": 0.3},
    "gradual-magnitude": {"keep": 0.3, "prune_interval": 2},
    "lottery-ticket": {"keep": 0.3, "rounds": 2},
}


def prune_run(options: dict) -> dict[str, torch.Tensor]:
    """Weights and scores of a run that ends after pruning."""
    run = Compression(prepare(CompressOptions(**options)), "")
    dense = run.finetune()
    model = copy.deepcopy(dense)
    scores = run.prune(model, run.with_teacher(dense), dense)
    return model.state_dict() | {f"scores.{name}": score for name, score in scores.items()}


def interrupt(monkeypatch, options: dict, stage: str, step: int) -> None:
    """Run until ``step`` of ``stage`` has been made."""
    on_step_end = ProgressBar.on_step_end

    def die(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if (self.stage, state.global_step) == (stage, step):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ProgressBar, "on_step_end", die)
        with pytest.raises(KeyboardInterrupt):
            prune_run(options)


#: checkpoints come every 2 updates, epochs have 6
@pytest.mark.parametrize(
    ("pruner", "places"),
    [
        ("sensitivity", [("prune", 9)]),
        ("soft-movement", [("prune", 9)]),
        ("gradual-magnitude", [("prune", 9)]),
        ("cap", [("prune", 9)]),
        ("lottery-ticket", [("round-2", 5)]),
        pytest.param("cap", [("prune", 5), ("prune", 12), ("prune", 13)], marks=pytest.mark.slow),
        pytest.param("lottery-ticket", [("round-1", 5), ("round-2", 1), ("prune", 7)], marks=pytest.mark.slow),
    ],
)
def test_interrupted_pruning_resumes_to_the_same_weights(tiny_options, tmp_path, monkeypatch, pruner, places):
    options = tiny_options | {"pruner": pruner, "prune_epochs": 3, "prune_lr": 1e-3, **PRUNED[pruner]}
    expected = prune_run(options)
    for number, (stage, step) in enumerate(places):
        again = options | {"output": str(tmp_path / f"again-{number}")}
        interrupt(monkeypatch, again, stage, step)
        found = prune_run(again | {"resume": True})
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_a_resumed_run_reads_the_snapshots_of_the_epochs_before(tiny_options, tmp_path, monkeypatch):
    options = tiny_options | {"pruner": "cap", "prune_epochs": 3}
    interrupt(monkeypatch, options, "prune", 14)
    work = tmp_path / ".out.lpaf-work" / "prune"
    files = sorted(path.name for path in work.glob("snapshot-*"))
    assert files == ["snapshot-1.safetensors", "snapshot-2.safetensors"]
    assert load_file(work / files[0])["bank"].shape == (96, 32)
    encoded = []
    monkeypatch.setattr(
        ContrastivePruner,
        "encode",
        lambda self, model: encoded.append(1) or encode(model, self.train, self.tokenizer),
    )
    prune_run(options | {"resume": True})
    assert len(encoded) == 2, "the pre-trained and the fine-tuned model's banks, no snapshots"
    assert not work.exists()


def test_every_round_of_a_lottery_ticket_starts_from_the_pretrained_weights(tiny_options, monkeypatch):
    options = tiny_options | {"pruner": "lottery-ticket", "rounds": 2, "keep": 0.25, "checkpoint_steps": 0}
    run = Compression(prepare(CompressOptions(**options)), "")
    pretrained = {name: part.clone() for name, part in run.prepared.model.state_dict().items()}
    starts = []
    run_stage = Compression.run_stage

    def watch(self, stage, model, *args, **kwargs):
        if stage != "finetune":
            starts.append((stage, copy.deepcopy(model)))
        run_stage(self, stage, model, *args, **kwargs)

    monkeypatch.setattr(Compression, "run_stage", watch)
    dense = run.finetune()
    model = copy.deepcopy(dense)
    run.prune(model, run.with_teacher(dense), dense)
    assert [stage for stage, _ in starts] == ["round-1", "round-2", "prune"]
    for (_, start), share in zip(starts, (1.0, 0.5, 0.25), strict=True):
        state = start.state_dict()
        assert all(torch.equal(state[name], part) for name, part in pretrained.items())
        assert kept_share(start) == share
    moved = [name for name, part in model.state_dict().items() if not torch.equal(part, pretrained[name])]
    assert "classifier.weight" in moved, "and the ticket is trained"
    assert [run.findings.history[stage][-1]["keep"] for stage in ("round-1", "round-2", "prune")] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("pruner", ["magnitude", "soft-movement"])
def test_compress_with_another_pruner(tiny_options, pruner, capsys):
    options = tiny_options | {"pruner": pruner, "checkpoint_steps": 0, "prune_epochs": 2, **PRUNED.get(pruner, {})}
    _, report = compress(CompressOptions(**options), command="")
    config = report["config"]
    assert config["pruner"] == pruner
    assert report["config"]["weighting"] == "scores"
    kept = [entry["kept_share"] for entry in report["rank"]["per_matrix"].values()]
    err = capsys.readouterr().err
    assert "of the encoder's weights are kept" in err
    if pruner == "magnitude":
        assert kept == [0.5] * len(kept)
        assert "prune" not in report["training"]
        assert report["training"]["retrain"][-1]["step"] == 6 * (2 + 1), "its updates go to retraining"
    else:
        assert config["keep"] is None
        assert min(kept) < 1.0
        assert report["training"]["prune"][-1]["keep"] < 1.0
        assert report["training"]["prune"][-1]["threshold"] == 0.1
        assert report["training"]["prune"][-1]["penalty"] > 0
    json.dumps(report)


@pytest.mark.parametrize(("pruner", "start"), [("movement", 4.0), ("cap", 4.0), ("soft-movement", 0.0)])
def test_where_scores_start(tiny_options, pruner, start):
    from lpaf.recipes.pruning import make_pruner

    options = tiny_options | {"pruner": pruner}
    assert make_pruner(pruner, CompressOptions(**options)).score_init == start
    assert make_pruner(pruner, CompressOptions(**options | {"score_init": 1.5})).score_init == 1.5


@pytest.mark.parametrize("start", ["finetuned", "pretrained"])
def test_pruning_starts_from_the_weights_asked_for(tiny_options, monkeypatch, start):
    """With everything kept and hardly any learning rate, pruning ends where it starts."""
    options = tiny_options | {"prune_from": start, "keep": 1.0, "prune_lr": 1e-30, "finetune_lr": 1e-2}
    run = Compression(prepare(CompressOptions(**options)), command="")
    before = {name: value.clone() for name, value in run.prepared.model.state_dict().items()}
    found = {}

    def stop(sparse, *_):
        found.update(sparse.state_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "shrink", stop)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    dense = run.prepared.model.state_dict()  # fine-tuned in place
    expected = before if start == "pretrained" else dense
    assert all(torch.allclose(found[name], expected[name]) for name in expected)
    assert not all(torch.allclose(before[name], dense[name]) for name in before)


def test_pretrained_weights_are_not_in_a_fine_tuned_model(tiny_options, tmp_path):
    dense = str(tmp_path / "dense")
    compress(CompressOptions(**tiny_options | {"method": "svd", "save_dense": dense}))
    options = tiny_options | {"model": dense, "output": str(tmp_path / "again"), "finetune_epochs": None}
    with pytest.raises(InputError, match="--prune-from pretrained: needs the pre-trained weights"):
        prepare(CompressOptions(**options | {"prune_from": "pretrained"}))


@pytest.mark.parametrize("change", [{"method": "svd"}, {"pruner": "magnitude"}])
def test_without_training_there_is_nothing_to_start_from(tiny_options, change):
    if "pruner" in change:
        with pytest.raises(InputError, match="--prune-from: is for --pruner sensitivity, movement"):
            prepare(CompressOptions(**tiny_options | {"prune_from": "pretrained"} | change))
        return
    _, report = compress(CompressOptions(**tiny_options | {"prune_from": "pretrained"} | change))
    assert report["metric"]["pruned"] is None
