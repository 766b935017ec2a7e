"""CoFi: hard-concrete gates, the parts of layers that go, and runs of ``cofi`` and ``cofi+losparse`` to a reload."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, TrainerState

from lpaf.cli import main
from lpaf.errors import InputError, TrainingDivergedError
from lpaf.evaluate.bench import bench
from lpaf.evaluate.tune import block_shapes, layer_shapes
from lpaf.models.blocks import (
    LAYER_PARTS,
    Sizes,
    check_removable,
    least_ratio,
    removable_layers,
    removed_sizes,
    shrink_to,
)
from lpaf.models.count import encoder_params, forward_macs, total_params
from lpaf.models.quantizer import CompressionConfig, compression_config
from lpaf.models.targets import encoder_linears
from lpaf.prune import CofiLoSparsePruner, CofiPruner
from lpaf.prune.cofi import Block, Multipliers, decide, likeliest
from lpaf.prune.cofi_losparse import losparse_ratio
from lpaf.prune.gates import add_gates, all_gates, block_gates, fix_gates, gated_params, remove_closed, unit_params
from lpaf.prune.hard_concrete import LIMIT, START, HardConcrete, open_probability, sample, without_noise
from lpaf.prune.importance import sparse_linears
from lpaf.recipes.compress import compress
from lpaf.recipes.options import CompressOptions
from lpaf_kernels import LowRankSparseLinear
from tiny import build, sentences, write_model, write_rows

IDS = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 4 + [0] * 5])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=MASK).logits


def move_gates(model, seed: int = 0) -> None:
    """Give every gate a log alpha of its own, some of them far out."""
    generator = torch.Generator().manual_seed(seed)
    for gates in all_gates(model):
        gates.log_alpha.data = (2.5 * torch.randn(len(gates.log_alpha), generator=generator)).clamp(-LIMIT, LIMIT)


# gates ----------------------------------------------------------------------------------------------------------------


class TestHardConcrete:
    def test_values_by_hand(self):
        log_alpha, u = torch.tensor([0.3, -1.0, 4.0, -6.0]).double(), torch.tensor([0.2, 0.6, 0.9, 0.5]).double()
        for a, draw, z in zip(log_alpha.tolist(), u.tolist(), sample(log_alpha, u).tolist(), strict=True):
            s = 1 / (1 + math.exp(-(math.log(draw) - math.log(1 - draw) + a) / (2 / 3)))
            assert z == pytest.approx(min(1.0, max(0.0, s * 1.2 - 0.1)), abs=1e-12)
        for a, z in zip(log_alpha.tolist(), without_noise(log_alpha).tolist(), strict=True):
            assert z == pytest.approx(min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)), abs=1e-12)

    def test_share_of_open_samples_is_the_probability(self):
        for a in (-3.0, -1.0, 0.0, 2.0):
            u = torch.rand(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            share = float((sample(torch.full_like(u, a), u) > 0).double().mean())
            expected = float(open_probability(torch.tensor(a).double()))
            assert share == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / len(u)))

    def test_gradients(self):
        u = torch.tensor([0.2, 0.6, 0.45]).double()
        log_alpha = torch.tensor([0.3, -0.4, 0.1]).double().requires_grad_()
        assert torch.autograd.gradcheck(lambda a: sample(a, u), log_alpha)
        assert torch.autograd.gradcheck(without_noise, log_alpha)
        assert torch.autograd.gradcheck(open_probability, log_alpha)
        sample(log_alpha, u).sum().backward()
        s = ((u / (1 - u)).log() + log_alpha.detach()).div(2 / 3).sigmoid()
        torch.testing.assert_close(log_alpha.grad, 1.2 * s * (1 - s) / (2 / 3))

    def test_new_gates_are_open_and_draws_repeat(self):
        gates = HardConcrete(50)
        assert torch.equal(gates.eval()(), torch.ones(50))
        gates.train()
        found = []
        for seed in (1, 1, 2):
            gates.draw(torch.Generator().manual_seed(seed))
            found.append(gates())
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])
        assert all(bool(((z >= 0) & (z <= 1)).all()) for z in found)

    def test_limits(self):
        gates = HardConcrete(3)
        gates.log_alpha.data = torch.tensor([-100.0, 1.0, 100.0])
        gates.constrain()
        assert gates.log_alpha.tolist() == pytest.approx([-LIMIT, 1.0, LIMIT])
        assert START < LIMIT


# parts of layers ------------------------------------------------------------------------------------------------------

TYPES = list(LAYER_PARTS)


@pytest.mark.parametrize("model_type", TYPES)
class TestParts:
    def test_open_gates_change_nothing(self, model_type):
        model = build(model_type).eval()
        before, names = logits(model), list(encoder_linears(model))
        add_gates(model, neurons=True)
        assert torch.equal(logits(model), before)
        assert list(encoder_linears(model)) == names
        assert gated_params(model) == encoder_params(model)

    def test_expected_weights_by_hand(self, model_type):
        """As many as the gates are open, summed over each weight."""
        model = build(model_type)
        add_gates(model, neurons=True)
        move_gates(model)
        found = 0.0
        for layer, role, gates in block_gates(model):
            block = float(gates.block.open_probability().detach())
            for chance in gates.units.open_probability().tolist():
                per_unit = 4 * 16 * 32 if role == "attention_output" else 2 * 32
                assert unit_params(layer, role) == per_unit
                found += block * chance * per_unit
        total = sum(gates.expected_units() * unit_params(layer, role) for layer, role, gates in block_gates(model))
        assert float(total.detach()) == pytest.approx(found, rel=1e-5)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("seed", range(3))
    def test_what_is_left_computes_what_the_gates_did(self, model_type, seed, attention):
        """In float64, where only the order of sums differs."""
        model = build(model_type, num_hidden_layers=3, num_attention_heads=4) if model_type != "distilbert" else None
        model = (model or build(model_type)).double().eval()
        model.set_attn_implementation(attention)
        add_gates(model, neurons=True)
        move_gates(model, seed)
        generator = torch.Generator().manual_seed(seed)
        for _, _, gates in block_gates(model):
            kept = torch.rand(gates.count, generator=generator) < 0.6
            fix_gates(gates, kept & (torch.rand((), generator=generator) < 0.8))
        gated, masks = logits(model), [gates.kept for _, _, gates in block_gates(model)]
        dense = encoder_params(model)
        remove_closed(model)
        torch.testing.assert_close(logits(model), gated, rtol=1e-10, atol=1e-12)
        sizes = [(layer.sizes.heads, layer.sizes.neurons) for layer in removable_layers(model)]
        assert [size for pair in sizes for size in pair] == [int(mask.sum()) for mask in masks]
        units = sum(h * 4 * 32 * (32 // 4 if model_type != "distilbert" else 16) + n * 64 for h, n in sizes)
        assert encoder_params(model) == units < dense
        assert not [name for name, _ in model.named_modules() if "gates" in name]
        hidden = model(input_ids=IDS, attention_mask=MASK, output_hidden_states=True).hidden_states
        assert len(hidden) == len(sizes) + 1
        assert all(state.shape == (3, 9, 32) for state in hidden)

    def test_layers_of_norms_alone(self, model_type):
        """Both blocks of a layer gone: LayerNorm(LayerNorm(x))."""
        model = build(model_type).eval()
        first, second = removable_layers(model)
        first.shrink(Sizes(0, 0))
        second.shrink(Sizes(1, 48))
        assert [layer.sizes for layer in removable_layers(model)] == [(0, 0), (1, 48)]
        hidden = model(input_ids=IDS, output_hidden_states=True).hidden_states
        norms = [module for module in first.module.modules() if isinstance(module, torch.nn.LayerNorm)]
        torch.testing.assert_close(hidden[1], norms[1](norms[0](hidden[0])))
        assert not [linear for linear in first.module.modules() if isinstance(linear, torch.nn.Linear)]
        assert len(encoder_linears(model)) == 6

    def test_counts_follow(self, model_type):
        model = build(model_type)
        whole, total = encoder_params(model), total_params(model)
        macs = forward_macs(model, 10)
        first, second = removable_layers(model)
        first.shrink(Sizes(1, 20))
        second.shrink(Sizes(0, 48))
        per_layer = whole // 2
        removed = per_layer // 1 * 2 - (4 * 16 * 32 + 2 * 20 * 32) - 2 * 48 * 32
        assert encoder_params(model) == whole - removed
        biases = 3 * 16 + 28 + (4 * 32)  # of q, k, v and neurons in the first layer; all of the second's attention
        assert total_params(model) == total - removed - biases
        assert forward_macs(model, 10) == 10 * encoder_params(model) + 2 * 100 * 16
        assert macs == 10 * whole + 2 * 2 * 100 * 32

    def test_shapes_are_read_from_tensors(self, model_type):
        model = build(model_type).eval()
        dense = copy.deepcopy(model)
        for layer, sizes in zip(removable_layers(model), [(1, 0), (0, 7)], strict=True):
            layer.keep_heads(torch.tensor([1])[: sizes[0]])
            layer.keep_neurons(torch.arange(0, 48, 5)[: sizes[1]])
        state = model.state_dict()
        for _ in range(2):  # a model of that shape already stays as it is
            shrink_to(dense, state)
        dense.load_state_dict(state)
        assert torch.equal(logits(dense), logits(model))
        assert set(removed_sizes(dense).values()) == {(1, 0), (0, 7)}


def test_heads_and_neurons_that_stay_are_those_named():
    model = build("bert", num_attention_heads=4).eval()
    layer = removable_layers(model)[0]
    query, output = layer.linear("query"), layer.linear("attention_output")
    rows, columns = query.weight.detach().clone(), output.weight.detach().clone()
    up, down = (layer.linear(role).weight.detach().clone() for role in ("up", "down"))
    layer.keep_heads(torch.tensor([1, 3]))
    layer.keep_neurons(torch.tensor([5, 40]))
    index = [*range(8, 16), *range(24, 32)]
    assert torch.equal(query.weight, rows[index])
    assert torch.equal(output.weight, columns[:, index])
    assert torch.equal(layer.linear("up").weight, up[[5, 40]])
    assert torch.equal(layer.linear("down").weight, down[:, [5, 40]])
    assert (layer.attention.num_attention_heads, layer.attention.all_head_size) == (2, 16)


def test_frozen_weights_stay_frozen():
    model = build("bert")
    model.requires_grad_(False)
    removable_layers(model)[0].shrink(Sizes(1, 3))
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["deberta-v2", "albert", "modernbert"])
def test_unknown_parts_are_refused(model_type):
    with pytest.raises(
        InputError, match=f"--method cofi: does not know the heads and blocks of .*{model_type}.* bert,"
    ):
        check_removable(build(model_type).config.model_type, "--method cofi")
    with pytest.raises(InputError, match="--method cofi: does not know"):
        CofiPruner(0.5).attach(build(model_type))


# the decision ---------------------------------------------------------------------------------------------------------


def spent(blocks: list[Block], masks: list[torch.Tensor]) -> int:
    return sum(block.cost * int(mask.sum()) for block, mask in zip(blocks, masks, strict=True))


class TestDecision:
    def test_expected_number_of_the_likeliest(self):
        assert likeliest(torch.tensor([0.9, 0.1, 0.8, 0.4])).tolist() == [True, False, True, False]
        assert likeliest(torch.tensor([0.5, 0.5, 0.5, 0.5])).tolist() == [True, True, False, False]
        assert not likeliest(torch.tensor([0.1, 0.2])).any()

    @pytest.mark.parametrize("seed", range(20))
    def test_budget_is_met_to_a_neuron(self, seed):
        generator = torch.Generator().manual_seed(seed)
        blocks = []
        for _ in range(4):
            for heads, count, cost in ((True, 4, 256), (False, 64, 32)):
                chances = torch.rand(count, generator=generator)
                blocks.append(Block(cost, float(torch.rand((), generator=generator)), chances, heads))
        whole = sum(block.cost * len(block.units) for block in blocks)
        for ratio in (0.01, 0.1, 0.5, 0.9, 1.0):
            budget = int(ratio * whole)
            assert budget - 32 < spent(blocks, decide(blocks, budget)) <= budget

    def test_decided_gates_stand(self):
        """Where the gates meet the budget, nothing else is decided."""
        attention = Block(100, 0.99, torch.tensor([0.99, 0.01]), True), Block(100, 0.01, torch.ones(2), True)
        ffn = Block(10, 0.99, torch.tensor([0.99, 0.02, 0.98, 0.01]), False), Block(10, 0.02, torch.ones(4), False)
        masks = decide([*attention, *ffn], budget=100 + 20)
        assert [mask.tolist() for mask in masks] == [
            [True, False],
            [False, False],
            [True, False, True, False],
            [False] * 4,
        ]

    def test_least_likely_heads_go_first_and_return_last(self):
        heads = Block(100, 0.9, torch.tensor([0.95, 0.9, 0.8]), True)
        neurons = Block(10, 0.9, torch.tensor([0.9, 0.1, 0.2]), False)
        assert [mask.tolist() for mask in decide([heads, neurons], 215)] == [[True, True, False], [True, False, False]]
        closed = Block(100, 0.9, torch.tensor([0.05, 0.3, 0.2]), True)
        assert [mask.tolist() for mask in decide([closed, neurons], 235)] == [[False, True, True], [True, True, True]]
        assert [mask.tolist() for mask in decide([closed, neurons], 130)] == [[False, True, False], [True, True, True]]

    def test_neurons_of_closed_blocks_come_back_before_heads(self):
        heads = Block(10, 0.9, torch.tensor([0.99, 0.1]), True)
        blocks = [heads, Block(1, 0.9, torch.rand(5), False), Block(1, 0.1, torch.tensor([0.1, 0.9]), False)]
        blocks += [Block(1, 0.2, torch.tensor([0.1, 0.9]), False)]
        masks = decide(blocks, 10 + 5 + 3)
        assert [mask.tolist() for mask in masks[2:]] == [[False, True], [True, True]]

    def test_blocks_whose_neurons_have_no_gates_go_whole(self):
        blocks = [Block(10, 0.9, torch.ones(4), True)]
        blocks += [Block(1, chance, torch.ones(20), False, whole=True) for chance in (0.9, 0.3, 0.8)]
        assert [int(mask.sum()) for mask in decide(blocks, 80)] == [4, 20, 0, 20]
        assert [int(mask.sum()) for mask in decide(blocks, 60)] == [4, 20, 0, 0]


# the pruner -----------------------------------------------------------------------------------------------------------


def trainer_arguments(rate: float = 0.1) -> tuple[SimpleNamespace, SimpleNamespace]:
    return SimpleNamespace(seed=3), SimpleNamespace(base_lrs=[1e-3, rate])


class TestPruner:
    def test_target_rises_linearly(self):
        pruner = CofiPruner(0.25, warmup=0.1, cooldown=0.3)
        assert [pruner.target(step, 100) for step in (0, 10, 40, 70, 99)] == pytest.approx([0, 0, 0.375, 0.75, 0.75])

    def test_lagrangian_and_its_gradients(self):
        model = build("bert")
        pruner = CofiPruner(0.4)
        pruner.attach(model)
        move_gates(model)
        callback = pruner.callback(100)
        arguments, schedule = trainer_arguments()
        callback.on_train_begin(arguments, None, None, model=model)
        callback.on_step_begin(arguments, TrainerState(global_step=50), None)
        model.multipliers.values.copy_(torch.tensor([-1.5, 2.0]))
        term = callback.lagrangian(model, None, {})["lagrangian"]
        kept = sum(gates.expected_units() * unit_params(layer, role) for layer, role, gates in block_gates(model))
        gap = 1 - kept / encoder_params(model) - pruner.target(50, 100)
        torch.testing.assert_close(term, -1.5 * gap + 2.0 * gap**2)
        term.backward()
        assert all(bool((gates.log_alpha.grad != 0).all()) for gates in all_gates(model))
        before = model.multipliers.values.clone()
        callback.on_pre_optimizer_step(arguments, None, None, lr_scheduler=schedule)
        moved = model.multipliers.values - before  # the first step of Adam: the rate, up the gradients gap and gap^2
        torch.testing.assert_close(moved, torch.tensor([0.1 * float(gap.detach().sign()), 0.1]), rtol=1e-4, atol=1e-6)
        assert callback.progress == pytest.approx(
            {"keep": float(kept.detach()) / encoder_params(model), "target": 0.6}, abs=1e-6
        )

    def test_multipliers_are_adams(self):
        ours, parameter = Multipliers(), torch.nn.Parameter(torch.zeros(2))
        theirs = torch.optim.Adam([parameter], lr=0.1, maximize=True)
        for step in range(5):
            gradient = torch.tensor([0.3 - 0.2 * step, 0.01 * step + 0.1])
            ours.ascend(gradient, 0.1)
            parameter.grad = gradient
            theirs.step()
        torch.testing.assert_close(ours.values, parameter.detach())

    def test_nothing_is_asked_for_in_the_warmup(self):
        model = build("bert")
        pruner = CofiPruner(0.4)
        pruner.attach(model)
        callback = pruner.callback(100)
        arguments, schedule = trainer_arguments()
        callback.on_train_begin(arguments, None, None, model=model)
        callback.on_step_begin(arguments, TrainerState(global_step=5), None)
        assert callback.lagrangian(model, None, {}) == {}
        callback.on_pre_optimizer_step(arguments, None, None, lr_scheduler=schedule)
        assert not model.multipliers.values.any()

    def test_draws_follow_from_seed_and_step(self):
        def draws(step: int, seed: int = 3) -> torch.Tensor:
            model = build("bert")
            pruner = CofiPruner(0.4)
            pruner.attach(model)
            callback = pruner.callback(100)
            callback.on_train_begin(None, None, None, model=model)
            callback.on_step_begin(SimpleNamespace(seed=seed), TrainerState(global_step=step), None)
            return torch.cat([gates.uniform for gates in all_gates(model)])

        assert torch.equal(draws(7), draws(7))
        assert not torch.equal(draws(7), draws(8))
        assert not torch.equal(draws(7), draws(7, seed=4))

    @pytest.mark.parametrize("ratio", [0.02, 0.1, 0.25, 0.5, 0.9])
    @pytest.mark.parametrize("model_type", ["bert", "distilbert"])
    def test_ratio_is_reached_whatever_the_gates_say(self, model_type, ratio):
        for seed in range(3):
            model = build(model_type).eval()
            dense = encoder_params(model)
            pruner = CofiPruner(ratio)
            pruner.attach(model)
            move_gates(model, seed)
            assert pruner.detach(model) == {}
            assert not hasattr(model, "multipliers")
            assert ratio - 64 / dense < encoder_params(model) / dense <= ratio
            assert logits(model).isfinite().all()

    def test_half_a_percent_of_a_small_model(self):
        options = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
        for ratio in (0.1, 0.3, 0.6):
            model = build("bert", **options)
            dense = encoder_params(model)
            pruner = CofiPruner(ratio)
            pruner.attach(model)
            move_gates(model)
            pruner.detach(model)
            assert ratio - 0.005 < encoder_params(model) / dense <= ratio

    def test_nan_gates_are_a_divergence(self):
        model = build("bert")
        pruner = CofiPruner(0.5)
        pruner.attach(model)
        all_gates(model)[2].log_alpha.data[0] = math.nan
        with pytest.raises(TrainingDivergedError, match="not numbers"):
            pruner.detach(model)

    def test_gates_far_from_the_target_are_told_of(self, capsys):
        model = build("bert")
        pruner = CofiPruner(0.5)
        pruner.attach(model)
        pruner.detach(model)
        assert "the gates expect to keep 9" in capsys.readouterr().err


class TestWithLoSparse:
    def pruner(self, model, ratio: float) -> CofiLoSparsePruner:
        pruner = CofiLoSparsePruner(ratio, keep=0.4, rank=2)
        pruner.attach(model)
        move_gates(model)
        generator = torch.Generator().manual_seed(5)
        for _, module in sparse_linears(model):
            module.importance.uniform_(generator=generator)
        return pruner

    def test_shares(self):
        assert losparse_ratio(0.1) == 0.5
        assert CofiLoSparsePruner(0.1, 0.4, 2).coarse_ratio == pytest.approx(0.2), "as in the paper"
        assert losparse_ratio(0.64) == pytest.approx(0.8)
        assert CofiLoSparsePruner(0.64, 0.4, 2).coarse_ratio == pytest.approx(0.8)

    def test_attaching_changes_nothing(self):
        model = build("bert").double().eval()
        before = logits(model)
        CofiLoSparsePruner(0.3, keep=0.4, rank=2).attach(model)
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)  # float32 gates of value 1; an SVD
        assert not any(gates.units is not None for _, role, gates in block_gates(model) if role == "down")

    @pytest.mark.parametrize("model_type", ["bert", "roberta", "electra", "distilbert"])
    @pytest.mark.parametrize("ratio", [0.2, 0.5])
    def test_ratio_counts_everything_that_is_stored(self, model_type, ratio):
        model = build(model_type).eval()
        dense = encoder_params(model)
        self.pruner(model, ratio).detach(model)
        layers = list(encoder_linears(model).values())
        assert all(isinstance(layer, LowRankSparseLinear) for layer in layers)
        stored = sum(layer.down.numel() + layer.up.numel() + layer.kept.numel() for layer in layers)
        assert encoder_params(model) == stored
        assert ratio - 65 / dense < stored / dense <= ratio, "to a row"

    def test_what_is_left_computes_what_the_gates_did(self):
        """With all rows of S kept, in float64."""
        model = build("bert", num_hidden_layers=3, num_attention_heads=4).double().eval()
        pruner = self.pruner(model, 0.5)
        pruner.close(model)
        gated = logits(model)
        again = copy.deepcopy(model)
        remove_closed(again)
        torch.testing.assert_close(logits(again), gated, rtol=1e-10, atol=1e-12)
        assert removed_sizes(again)

    def test_rebuilt_from_tensors(self):
        model = build("bert").eval()
        pruner = self.pruner(model, 0.4)
        pruner.detach(model)
        fresh = build("bert").eval()
        pruner.rebuild(fresh, model.state_dict())
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits(fresh), logits(model))


# runs -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cofi_options(tiny_options) -> dict:
    changes = {"method": "cofi", "rank": None, "ratio": 0.3, "prune_epochs": 4, "finetune_lr": 2e-3, "retrain_lr": 2e-3}
    return tiny_options | changes


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """A model of four layers with four heads each, and its task."""
    directory = tmp_path_factory.mktemp("narrow")
    write_model(directory / "model", layers=4)
    write_rows(directory / "data" / "train.jsonl", sentences(96, seed=1))
    write_rows(directory / "data" / "validation.jsonl", sentences(40, seed=2))
    return directory


@pytest.mark.parametrize("method", ["cofi", "cofi+losparse"])
@pytest.mark.parametrize("architecture", ["bert", "distilbert"])
def test_run_reload_evaluate_bench_inspect_and_tune(method, architecture, cofi_options, tmp_path, tiny_data, capsys):
    source = write_model(tmp_path / "dense", architecture, layers=3)
    options = cofi_options | {"method": method, "model": str(source)}
    model, report = compress(CompressOptions(**options))
    output = Path(options["output"])
    ratio = report["encoder_params"]["ratio"]
    assert 0.3 - 0.005 < ratio <= 0.3
    assert report["encoder_params"]["compressed"] == encoder_params(model)
    assert {"lagrangian", "keep", "target"} <= report["training"]["prune"][-1].keys()
    assert "distillation" in report["training"]["prune"][0]
    stored = json.loads((output / "config.json").read_text())["quantization_config"]
    assert (stored["format_version"], stored["method"]) == (2, method)
    assert bool(stored["modules"]) == (method == "cofi+losparse")
    again = AutoModelForSequenceClassification.from_pretrained(output).eval()
    assert torch.equal(logits(again), logits(model))
    assert encoder_params(again) == encoder_params(model)
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits(third), logits(model))
    body = AutoModel.from_pretrained(output).eval()
    assert encoder_params(body) == encoder_params(model)
    words = ["--task", "text-classification", "--data-dir", str(tiny_data), "--max-length", "16"]
    assert main(["evaluate", "--model", str(output), *words]) == 0
    assert f"{report['metric']['compressed']:.4f}" in capsys.readouterr().out
    assert bench(str(output), batches=[2], lengths=[8], rounds=2)[0]["batch"] == 2
    assert main(["inspect", "--model", str(output)]) == 0
    shapes = layer_shapes(str(output)) if method == "cofi+losparse" else []
    layers = [layer for layer in encoder_linears(model).values() if isinstance(layer, LowRankSparseLinear)]
    sizes = {(layer.in_features, layer.out_features, layer.rank, len(layer.kept)) for layer in layers}
    assert set(shapes) == sizes
    assert len(block_shapes(str(output))) == 2


def test_finished_pruning_is_taken_up(cofi_options, tmp_path, monkeypatch):
    """Another run finds the pruned layers in the store and gives its dense model their shapes."""
    stages = {"stages": str(tmp_path / "stages")}
    first, _ = compress(CompressOptions(**cofi_options | stages))

    def unwanted(*_):
        raise AssertionError("pruning was done before")

    monkeypatch.setattr(CofiPruner, "attach", unwanted)
    second, _ = compress(CompressOptions(**cofi_options | stages | {"output": str(tmp_path / "second")}))
    assert torch.equal(logits(first.eval()), logits(second.eval()))
    with pytest.raises(AssertionError, match="done before"):
        compress(CompressOptions(**cofi_options | stages | {"output": str(tmp_path / "third"), "ratio": 0.4}))


def saved(directory: Path, sizes: list[tuple[int, int]]) -> Path:
    """A pruned model on the disk."""
    model = build("bert")
    for layer, size in zip(removable_layers(model), sizes, strict=True):
        layer.shrink(Sizes(*size))
    model.config.quantization_config = compression_config(model, "cofi")
    model.save_pretrained(directory)
    return directory


class TestCheckpoint:
    def test_layout_one_stays_for_what_it_can_say(self, tmp_path):
        saved(tmp_path, [(2, 48), (2, 48)])
        stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert stored["format_version"] == 1
        assert "layers" not in stored

    def test_newer_layout_is_refused(self):
        with pytest.raises(ValueError, match="layout 4, this lpaf reads up to 3; upgrade"):
            CompressionConfig(modules={}, format_version=4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_dtype(self, tmp_path, dtype):
        directory = saved(tmp_path, [(1, 5), (0, 48)])
        model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert logits(model.eval()).dtype == dtype

    @pytest.mark.parametrize(
        "change",
        [
            lambda layers: layers.update({"encoder.layer.0": [3, 5]}),
            lambda layers: layers.update({"encoder.layer.7": [1, 5]}),
        ],
    )
    def test_more_than_the_model_has_is_refused(self, tmp_path, change):
        directory = saved(tmp_path, [(1, 5), (0, 48)])
        config = json.loads((directory / "config.json").read_text())
        change(config["quantization_config"]["layers"])
        (directory / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="which BertForSequenceClassification does not have"):
            AutoModelForSequenceClassification.from_pretrained(directory)

    def test_wrong_shape_is_refused(self, tmp_path):
        directory = saved(tmp_path, [(1, 5), (0, 48)])
        config = json.loads((directory / "config.json").read_text())
        config["quantization_config"]["layers"]["encoder.layer.0"] = [1, 6]
        (directory / "config.json").write_text(json.dumps(config))
        # transformers' own refusal, or where it lets such tensors pass, ours
        with pytest.raises((InputError, RuntimeError), match=r"ignore_mismatched_sizes|its configuration asks for"):
            AutoModelForSequenceClassification.from_pretrained(directory)

    def test_missing_tensor_is_refused(self, tmp_path):
        directory = saved(tmp_path, [(1, 5), (0, 48)])
        tensors = load_file(directory / "model.safetensors")
        del tensors["bert.encoder.layer.0.intermediate.dense.weight"]
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        with pytest.raises(InputError, match=r"layer.0.intermediate.dense.weight is missing"):
            AutoModelForSequenceClassification.from_pretrained(directory)


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4, "ratio": None}, "--method cofi: its size is a share"),
        ({"prune": False}, "--no-prune: --method cofi makes the model smaller by its own pruning"),
        ({"pruner": "movement"}, "--pruner: --method cofi makes"),
        ({"keep": 0.3}, "--keep: is for --pruner"),
        ({"ratio": 1e-4}, "--ratio 0.0001: one feed-forward neuron is 0.004 of the encoder already"),
        ({"method": "cofi+losparse", "keep": 0.3}, "--keep: is for"),
        ({"method": "cofi+losparse", "ratio": 0.03}, "--ratio 0.03"),
        ({"score_lr": 0.0}, "--score-lr 0: must be above 0"),
    ],
)
def test_bad_options(cofi_options, changes, message):
    with pytest.raises(InputError, match=message):
        compress(CompressOptions(**cofi_options | changes))
    assert not Path(cofi_options["output"]).exists()


def test_unknown_model_type_is_refused_before_anything_is_written(cofi_options, tmp_path):
    source = write_model(tmp_path / "deberta", "deberta-v2")
    with pytest.raises(InputError, match=r"--method cofi: does not know .* of model type 'deberta-v2'"):
        compress(CompressOptions(**cofi_options | {"model": str(source)}))
    assert not list(tmp_path.glob("*out*"))


def test_least_ratio_is_one_neuron():
    model = build("bert")
    assert least_ratio(model) * encoder_params(model) == pytest.approx(64)
