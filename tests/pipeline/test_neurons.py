"""Methods that prune neurons: what a ratio buys, the pruners, and runs of LoSparse and its baselines to a reload."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, TrainerState

from lpaf.errors import InputError, TrainingDivergedError
from lpaf.models.count import encoder_params, matrix_shapes
from lpaf.models.neurons import low_rank_ranks, neuron_budget, proportional_ranks, row_cost, rows_per_matrix
from lpaf.models.targets import encoder_linears
from lpaf.prune import ImportancePruner, NeuronMovementPruner
from lpaf.prune.importance import sparse_linears
from lpaf.prune.masks import masked_linears
from lpaf.prune.neurons import select_neurons
from lpaf.recipes.compress import compress
from lpaf.recipes.options import CompressOptions
from lpaf.recipes.pruning import make_pruner
from lpaf_kernels import LowRankSparseLinear
from tiny import build

#: BERT-base and MiniLM-L6, one layer of each
BASE = {f"{kind}": (768, 768) for kind in "qkvo"} | {"up": (3072, 768), "down": (768, 3072)}
MINI = {f"{kind}": (384, 384) for kind in "qkvo"} | {"up": (1536, 384), "down": (384, 1536)}


class TestBudget:
    def test_ranks_are_the_papers_and_rows_get_the_rest(self):
        budget = neuron_budget(BASE, 0.2, 0.05)
        assert budget.ranks["q"] == math.ceil(0.05 * 768 * 768 / 1536)
        assert budget.ranks["up"] == math.ceil(0.05 * 3072 * 768 / 3840)
        dense = sum(rows * columns for rows, columns in BASE.values())
        factors = sum(budget.ranks[name] * sum(shape) for name, shape in BASE.items())
        assert factors + budget.rows == int(0.2 * dense)
        assert budget.keep == budget.rows / sum(shape[0] * (shape[1] + 1) for shape in BASE.values())

    @pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.5])
    def test_low_rank_alone_comes_within_half_a_percent(self, ratio):
        ranks = low_rank_ranks(MINI, ratio)
        dense = sum(rows * columns for rows, columns in MINI.values())
        spent = sum(ranks[name] * sum(shape) for name, shape in MINI.items())
        smallest = min(sum(shape) for shape in MINI.values())
        assert ratio * dense - smallest < spent <= ratio * dense
        for name, shape in MINI.items():
            assert abs(ranks[name] - ratio * math.prod(shape) / sum(shape)) <= 1

    def test_no_row_is_above_the_share_and_none_is_left_out_for_rounding(self):
        counts = rows_per_matrix(MINI, 0.137)
        spent = sum(counts[name] * row_cost(shape) for name, shape in MINI.items())
        whole = 0.137 * sum(shape[0] * row_cost(shape) for shape in MINI.values())
        assert whole - 385 < spent <= whole
        assert all(abs(counts[name] - 0.137 * shape[0]) <= 1 for name, shape in MINI.items())

    def test_without_low_rank_part_everything_is_rows(self):
        budget = neuron_budget(MINI, 0.2, 0.0)
        assert set(budget.ranks.values()) == {0}
        assert budget.rows == int(0.2 * sum(math.prod(shape) for shape in MINI.values()))

    def test_low_rank_part_alone_keeps_no_row(self):
        budget = neuron_budget(MINI, 0.2, 0.2)
        assert (budget.rows, budget.keep) == (0, 0.0)
        assert budget.ranks == proportional_ranks(MINI, 0.2)

    @pytest.mark.parametrize(
        ("ratio", "share", "message"),
        [
            (0.1, 0.3, r"--low-rank-share 0.3: .* above --ratio 0.1, which leaves S 0.1 - 0.3 = -0.2"),
            (0.0502, 0.05, r"--ratio 0.0502: .* take 92160, which leaves -3333 for S, where a row takes 385"),
        ],
    )
    def test_arithmetic_is_in_the_message(self, ratio, share, message):
        with pytest.raises(InputError, match=message):
            neuron_budget(MINI, ratio, share)

    def test_a_ratio_without_a_rank_is_refused(self):
        with pytest.raises(InputError, match=r"--ratio 0.002: buys no rank of .*; pass at least --ratio 0.0053"):
            low_rank_ranks(MINI, 0.002)


class TestSelection:
    def test_global_ranks_all_neurons_by_score(self):
        shapes = {"a": (4, 10), "b": (3, 20)}
        scores = {"a": torch.tensor([9.0, 1.0, 8.0, 2.0]), "b": torch.tensor([7.0, 6.0, 0.0])}
        # rows cost 11 and 21: 11 + 11 + 21 = 43 of 107; the next would be 64
        kept = select_neurons(scores, shapes, 50 / 107, "global")
        assert kept["a"].mask(scores["a"]).tolist() == [True, False, True, False]
        assert kept["b"].mask(scores["b"]).tolist() == [True, False, False]

    def test_matrix_scope_keeps_the_share_of_each(self):
        generator = torch.Generator().manual_seed(0)
        scores = {name: torch.rand(shape[0], generator=generator) for name, shape in MINI.items()}
        kept = select_neurons(scores, MINI, 0.2, "matrix")
        counts = rows_per_matrix(MINI, 0.2)
        for name, threshold in kept.items():
            mask = threshold.mask(scores[name])
            assert int(mask.sum()) == counts[name]
            assert scores[name][mask].min() > scores[name][~mask].max()


class TestNeuronMovement:
    @pytest.fixture
    def model(self):
        return build("bert").eval()

    def test_score_is_the_mean_movement_of_the_row(self, model):
        pruner = NeuronMovementPruner(0.5)
        pruner.attach(model)
        expected = {name: 0.0 for name, _ in masked_linears(model)}
        for seed in range(2):
            ids = torch.randint(5, 20, (4, 6), generator=torch.Generator().manual_seed(seed))
            model.zero_grad()
            model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
            for name, module in masked_linears(model):
                expected[name] = expected[name] - (module.weight.detach() * module.weight.grad).mean(1)
            pruner.accumulate(model)
            assert all(module.scores.grad is None for _, module in masked_linears(model))
        for name, module in masked_linears(model):
            torch.testing.assert_close(module.scores.detach()[:, 0], expected[name])

    def test_masked_rows_keep_their_values_and_go_on_being_scored(self, model):
        pruner = NeuronMovementPruner(0.5)
        pruner.attach(model)
        for _, module in masked_linears(model):
            module.scores.data.uniform_()
        before = {name: module.weight.detach().clone() for name, module in masked_linears(model)}
        pruner.update_masks(model, 0.5)
        scores = {name: module.scores.detach().clone() for name, module in masked_linears(model)}
        ids = torch.randint(5, 20, (4, 6))
        model(input_ids=ids, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        pruner.accumulate(model)
        moved = 0
        for name, module in masked_linears(model):
            assert torch.equal(module.weight, before[name])
            masked = ~module.mask().any(1)
            moved += int((module.scores != scores[name])[masked].sum())
        assert moved > 0

    def test_detach_leaves_the_rows_alone(self, model):
        pruner = NeuronMovementPruner(0.4)
        pruner.attach(model)
        for _, module in masked_linears(model):
            module.scores.data.uniform_()
        pruner.update_masks(model, 0.4)
        ids = torch.randint(5, 20, (2, 6))
        before = model(input_ids=ids).logits
        scores = pruner.detach(model)
        layers = encoder_linears(model)
        assert all(isinstance(layer, LowRankSparseLinear) and layer.rank == 0 for layer in layers.values())
        torch.testing.assert_close(model(input_ids=ids).logits, before)
        for name, layer in layers.items():
            dropped = torch.ones_like(scores[name], dtype=torch.bool)
            dropped[layer.kept.long()] = False
            assert not layer.weight[dropped].any()

    def test_nan_movement_stops_the_run(self, model):
        pruner = NeuronMovementPruner(0.4)
        pruner.attach(model)
        next(iter(masked_linears(model)))[1].scores.data[0] = float("nan")
        with pytest.raises(TrainingDivergedError, match="the scores are not numbers any more"):
            pruner.detach(model)

    def test_selects_between_warmup_and_end(self, model):
        pruner = NeuronMovementPruner(0.4, interval=10)
        pruner.attach(model)
        callback, state = pruner.callback(steps=100), TrainerState(global_step=0)
        selected = []
        pruner.update_masks = lambda model, keep: selected.append(state.global_step)
        for step in range(100):
            state.global_step = step
            callback.on_step_begin(None, state, None, model=model)
        assert selected == [*range(20, 70, 10), *range(70, 100)]

    @pytest.mark.parametrize(
        ("options", "text"),
        [({"scope": "row"}, "scope: expected"), ({"interval": 0}, "interval"), ({"keep": 2}, "keep")],
    )
    def test_bad_input(self, options, text):
        with pytest.raises(ValueError, match=text):
            NeuronMovementPruner(**{"keep": 0.5, **options})


def test_importance_without_low_rank_part_is_the_dense_function():
    model = build("bert").eval()
    ids = torch.randint(5, 20, (2, 6))
    before = model(input_ids=ids).logits
    ImportancePruner(0.5, rank=0).attach(model)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_importance_takes_a_rank_for_every_matrix():
    model = build("bert")
    ranks = {name: index % 3 for index, name in enumerate(encoder_linears(model))}
    ImportancePruner(0.5, rank=ranks).attach(model)
    assert {name: layer.rank for name, layer in encoder_linears(model).items()} == ranks


@pytest.mark.parametrize("scope", ["global", "matrix"])
@pytest.mark.parametrize(("ratio", "share"), [(0.2, 0.05), (0.1, 0.05), (0.1, 0.0), (0.1, 0.01)])
def test_what_is_stored_is_within_half_a_percent_of_the_ratio(scope, ratio, share):
    model = build("bert", hidden_size=192, intermediate_size=768, num_hidden_layers=6)
    dense = encoder_params(model)
    budget = neuron_budget(matrix_shapes(model), ratio, share)
    pruner = ImportancePruner(budget.keep, budget.ranks, scope=scope)
    pruner.attach(model)
    for _, module in sparse_linears(model):
        module.importance.uniform_()
    pruner.detach(model)
    assert 0.995 * ratio < encoder_params(model) / dense <= ratio


def test_options_reach_the_pruner(tiny_options):
    options = CompressOptions(**tiny_options | {"rank": None, "ratio": 0.2, "uncertainty": 0.9, "scope": "matrix"})
    pruner = make_pruner("importance", options, neuron_budget(MINI, 0.2, 0.05))
    assert (pruner.beta2, pruner.scope, pruner.interval) == (0.9, "matrix", options.prune_interval)
    assert pruner.rank == neuron_budget(MINI, 0.2, 0.05).ranks


# whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def options(tiny_options) -> dict:
    return tiny_options | {"rank": None, "ratio": 0.3, "retrain_lr": 2e-3, "checkpoint_steps": 0}


def sizes_in_file(output: Path) -> int:
    """Numbers of the encoder's weights in the saved file, indices counted."""
    tensors = load_file(output / "model.safetensors")
    return sum(tensor.numel() for name, tensor in tensors.items() if name.endswith((".down", ".up", ".kept")))


@pytest.mark.parametrize(
    ("method", "low_rank", "sparse"),
    [
        ("losparse", True, True),
        ("itp", False, True),
        ("movement-structured", False, True),
        ("low-rank-1", True, False),
        ("low-rank-2", True, False),
    ],
)
def test_run_meets_the_ratio_and_reloads_bitwise(options, method, low_rank, sparse):
    model, report = compress(CompressOptions(**options | {"method": method}))
    output = Path(options["output"])
    entries = json.loads((output / "config.json").read_text())["quantization_config"]["modules"].values()
    assert any(entry["rank"] for entry in entries) == low_rank
    assert any(entry["kept"] for entry in entries) == sparse
    dense = report["encoder_params"]["dense"]
    assert sizes_in_file(output) == report["encoder_params"]["compressed"] == encoder_params(model)
    largest = max(sum(shape) for shape in matrix_shapes(model).values())  # a row or rank is the smallest step
    assert 0.3 * dense - largest < sizes_in_file(output) <= 0.3 * dense
    assert report["file_bytes"]["compressed"] == (output / "model.safetensors").stat().st_size
    assert report["training"].keys() == {"finetune", "retrain"} | ({"prune"} if method != "low-rank-1" else set())
    reloaded = AutoModelForSequenceClassification.from_pretrained(output).eval()
    ids = torch.randint(5, 20, (3, 7))
    assert torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits)
    for name, layer in encoder_linears(model).items():
        again = reloaded.get_submodule(name)
        x = torch.randn(5, layer.in_features)
        assert torch.equal(again(x), layer(x))
        assert torch.equal(again.kept, layer.kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prune_warmup": 0.5, "prune_cooldown": 0.6},
            r"--prune-warmup 0.5 and --prune-cooldown 0.6: .*T - t_f = 0.4 T is not after t_i = 0.5 T",
        ),
        ({"low_rank_share": 0.3}, r"--low-rank-share 0.3: .* above --ratio 0.2, which leaves S 0.2 - 0.3 = -0.1"),
        ({"ratio": 0.01, "low_rank_share": 0.009}, r"--ratio 0.01: 0.01 of \d+ weights is \d+, and U V of ranks 1 to"),
        ({"low_rank_share": 0.0}, r"--low-rank-share 0: must be in \(0, 1\)"),
        ({"ratio": None, "rank": 4}, "--method losparse: its size is a share, .*; pass --ratio R"),
        ({"rank": "auto"}, "--method losparse: its size is a share"),
        ({"prune": False}, "--no-prune: --method losparse makes the model smaller by its own pruning"),
        ({"pruner": "movement"}, "--pruner: --method losparse makes the model smaller by its own pruning"),
        ({"hard_pruning": True}, "--hard-pruning: is for movement pruning"),
        ({"keep": 0.3}, "--keep: is for --pruner sensitivity, .*; --method losparse does not prune that way"),
        ({"weighting": "mask"}, "--weighting: is for matrices that are factorised"),
        ({"mixed_rank": False}, "--no-mixed-rank: is for matrices that are factorised"),
        ({"method": "itp", "low_rank_share": 0.1}, "--low-rank-share: is for --method losparse; --method itp fixes it"),
        ({"method": "svd", "low_rank_share": 0.1}, "--low-rank-share: is for --method losparse; --method svd does"),
        ({"method": "movement-structured", "uncertainty": 0.9}, "--uncertainty: is for --method losparse"),
        ({"method": "low-rank-1", "ratio": 0.001}, r"--ratio 0.001: buys no rank of .*; pass at least --ratio 0.0625"),
    ],
)
def test_bad_configurations_are_refused_with_the_arithmetic(options, changes, message):
    with pytest.raises(InputError, match=message):
        compress(CompressOptions(**options | {"method": "losparse", "ratio": 0.2} | changes))
    assert not Path(options["output"]).exists()
