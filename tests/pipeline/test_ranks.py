"""Ranks per matrix: the best of all allocations within a budget, the fewest for an error, on one and many processes."""

from __future__ import annotations

import copy
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpaf.errors import InputError
from lpaf.factorize import (
    SVDFactorizer,
    allocate_ranks,
    comparable,
    rank_for_error,
    rank_params,
    weighted_spectra,
)
from lpaf.factorize.processes import eigen_cost, share_out
from lpaf.models.count import check_size, largest_ranks, matrix_shapes, resolve_budget
from lpaf.models.targets import encoder_linears
from tiny import build

BERT = {
    f"{layer}.{role}": shape
    for layer in range(12)
    for role, shape in {
        "query": (768, 768), "key": (768, 768), "value": (768, 768), "attention": (768, 768),
        "up": (3072, 768), "down": (768, 3072),
    }.items()
}  # fmt: skip


def falling(shapes: dict[str, tuple[int, int]], seed: int) -> dict[str, torch.Tensor]:
    """Spectra of random steepness."""
    generator = torch.Generator().manual_seed(seed)
    spectra = {}
    for name, shape in shapes.items():
        steepness = 4 * torch.rand((), generator=generator, dtype=torch.float64)
        noise = torch.rand(min(shape), generator=generator, dtype=torch.float64)
        spectra[name] = (noise * torch.exp(-steepness * torch.linspace(0, 1, min(shape)))).sort(descending=True).values
    return spectra


def total_error(spectra, ranks) -> float:
    return sum(float(spectra[name][rank:].square().sum()) for name, rank in ranks.items())


# for an error -------------------------------------------------------------------------------------------------------


def test_rank_for_error_is_the_smallest():
    weight = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    for error in (0.05, 0.3, 0.5, 0.9):
        k = rank_for_error(s, error)
        found = [float((weight - (u[:, :r] * s[:r]) @ v[:r]).norm() / weight.norm()) for r in (k - 1, k)]
        assert found[0] > error >= found[1]


def test_rank_for_error_at_its_ends():
    values = torch.tensor([4.0, 2.0, 1.0])
    assert rank_for_error(values, 0.0) == 3
    assert rank_for_error(values, 1.0) == 0
    assert rank_for_error(torch.zeros(4), 0.1) == 0
    assert rank_for_error(torch.tensor([5.0, 0.0, 0.0]), 1e-9) == 1


# for a budget -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
    share=st.floats(0.0, 1.2),
)
def test_no_allocation_within_the_budget_is_better(sizes, seed, share):
    shapes = {str(i): size for i, size in enumerate(sizes)}
    spectra = falling(shapes, seed)
    least = sum(map(sum, sizes))
    most = sum(min(size) * sum(size) for size in sizes)
    budget = least + int(share * (most - least))
    found = allocate_ranks(spectra, shapes, budget)
    assert least <= rank_params(found, shapes) <= budget
    assert not [
        n for n, k in found.items() if k < min(shapes[n]) and rank_params(found, shapes) + sum(shapes[n]) <= budget
    ]
    every = itertools.product(*(range(1, min(size) + 1) for size in sizes))
    ranks = [dict(zip(shapes, choice, strict=True)) for choice in every]
    best = min(total_error(spectra, choice) for choice in ranks if rank_params(choice, shapes) <= budget)
    assert total_error(spectra, found) == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("ratio", [0.5, 0.25, 0.156, 0.1])
def test_budget_of_bert_base_is_hit_within_one_rank(ratio):
    spectra, largest = falling(BERT, seed=3), largest_ranks(BERT)
    dense = sum(n * m for n, m in BERT.values())
    ranks = allocate_ranks(spectra, BERT, resolve_budget(BERT, ratio), largest)
    assert 0 <= ratio * dense - rank_params(ranks, BERT) < min(map(sum, BERT.values()))
    assert all(1 <= rank <= largest[name] for name, rank in ranks.items())
    uniform = dict.fromkeys(BERT, int(ratio * dense / sum(map(sum, BERT.values()))))
    assert total_error(spectra, ranks) < total_error(spectra, uniform)


@pytest.mark.parametrize(
    "shapes",
    [
        BERT,
        {str(i): ((31, 17), (40, 23))[i % 2] for i in range(80)},
        {str(i): ((20, 22), (16, 80))[i % 2] for i in range(60)},
    ],
    ids=["bert", "48 and 63", "42 and 96"],
)
@pytest.mark.parametrize("ratio", [0.15, 0.33])
def test_optimum_of_many_matrices(shapes, ratio):
    """Two costs leave one choice: how many ranks of the one; the rest buys the other. All of them are tried."""
    spectra = falling(shapes, seed=4)
    budget = resolve_budget(shapes, ratio)
    ranks = allocate_ranks(spectra, shapes, budget)
    low, high = sorted({sum(shape) for shape in shapes.values()})
    sums = []
    for cost in (low, high):
        names = [name for name in shapes if sum(shapes[name]) == cost]
        gains = torch.cat([spectra[name][1:].square() for name in names]).sort(descending=True).values
        sums.append(torch.cat([torch.zeros(1, dtype=torch.float64), gains.cumsum(0)]))
    room = budget - sum(map(sum, shapes.values()))
    counts = torch.arange(min(room // high, len(sums[1]) - 1) + 1)
    best = (sums[1][counts] + sums[0][((room - high * counts) // low).clamp(max=len(sums[0]) - 1)]).max()
    found = sum(float(spectra[name][1:rank].square().sum()) for name, rank in ranks.items())
    assert found == pytest.approx(float(best), rel=1e-12)


def test_ranks_stop_at_the_largest_allowed():
    shapes = {"steep": (8, 8), "flat": (8, 8), "wide": (8, 24)}
    spectra = {"steep": torch.full((8,), 100.0), "flat": torch.ones(8), "wide": torch.ones(8)}
    largest = largest_ranks(shapes)
    assert largest == {"steep": 4, "flat": 4, "wide": 6}
    most = rank_params(largest, shapes)
    assert allocate_ranks(spectra, shapes, 10 * most, largest) == largest
    assert allocate_ranks(spectra, shapes, most - 32, largest)["steep"] == 4
    assert largest_ranks(shapes, force=True) == {"steep": 8, "flat": 8, "wide": 8}


def test_ranks_without_gain_still_fill_the_budget():
    shapes = {"zero": (6, 6), "half": (6, 6)}
    spectra = {"zero": torch.zeros(6), "half": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])}
    ranks = allocate_ranks(spectra, shapes, 8 * 12)
    assert ranks["half"] >= 3
    assert rank_params(ranks, shapes) == 8 * 12


def test_comparable_spectra_forget_the_scale_of_row_weights():
    shapes = {"query": (8, 8), "up": (32, 8), "zero": (8, 8)}
    spectra = falling(shapes, seed=6) | {"zero": torch.zeros(8)}
    scaled = comparable({name: 10.0**i * values for i, (name, values) in enumerate(spectra.items())}, shapes)
    for name, values in comparable(spectra, shapes).items():
        torch.testing.assert_close(scaled[name], values)
    assert [round(float(values.square().sum()), 9) for values in scaled.values()] == [8.0, 16.0, 0.0]


def test_budget_below_rank_1_is_refused():
    with pytest.raises(ValueError, match="budget: expected at least 24 parameters"):
        allocate_ranks({"a": torch.ones(6), "b": torch.ones(6)}, {"a": (6, 6), "b": (6, 6)}, 23)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ({"rank": "auto"}, "--rank auto: .* pass --ratio"),
        ({"rank": "auto", "rank_error": 0.2}, "--rank auto: .* --rank-error"),
        ({"rank": "auto", "ratio": 0.2, "rank_error": 0.2}, "--rank auto: .* --rank-error"),
        ({"ratio": 0.2, "rank_error": 0.2}, "exactly one"),
        ({"rank": 4, "rank_error": 0.2}, "exactly one"),
        ({"rank": "4"}, "--rank 4: expected a whole number, or auto"),
        ({"rank": 4.0}, "--rank 4.0: expected a whole number, or auto"),
        ({"rank_error": 0.0}, r"--rank-error 0: must be in \(0, 1\)"),
        ({"rank_error": 1.0}, r"--rank-error 1: must be in \(0, 1\)"),
    ],
)
def test_contradictory_sizes_are_refused(size, message):
    with pytest.raises(InputError, match=message):
        check_size(size.get("rank"), size.get("ratio"), size.get("rank_error"))


def test_impossible_budgets_are_refused():
    with pytest.raises(InputError, match=r"--ratio 0.001: rank 1 already needs 0.0020"):
        resolve_budget(BERT, 0.001)
    with pytest.raises(
        InputError, match=r"--rank auto --ratio 1: above break-even.* at most --ratio 0.9995, or --force"
    ):
        resolve_budget(BERT, 1.0)
    dense = sum(n * m for n, m in BERT.values())
    assert resolve_budget(BERT, 0.9995) == int(0.9995 * dense)
    assert resolve_budget(BERT, 1.0, force=True) == dense


# factorising --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build("bert")


def drawn_scores(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(linear.weight.shape, generator=generator) for name, linear in encoder_linears(model).items()
    }


def test_spectra_tell_the_errors_of_the_factors(model):
    scores = drawn_scores(model)
    spectra = weighted_spectra(model, scores, "scores")
    ranks = {name: 2 + i for i, name in enumerate(spectra)}
    small = copy.deepcopy(model)
    factorized = SVDFactorizer(ranks, "scores")(small, scores)
    assert list(factorized.errors) == list(spectra) == list(encoder_linears(model))
    for name, values in spectra.items():
        assert small.get_submodule(name).rank == ranks[name]
        expected = values[ranks[name] :].norm() / values.norm()
        assert factorized.errors[name] == pytest.approx(float(expected), rel=1e-4)


def test_chunks_change_nothing(model, monkeypatch):
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    SVDFactorizer(3)(whole)
    monkeypatch.setattr("lpaf.factorize.svd.CHUNK", 1)
    SVDFactorizer(3)(parts)
    for (name, one), other in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_unknown_weighting_is_refused(model):
    for call in (lambda: SVDFactorizer(3, "columns"), lambda: weighted_spectra(model, weighting="columns")):
        with pytest.raises(ValueError, match="weighting: expected one of none, mask, scores, fisher, got 'columns'"):
            call()


def test_matrix_without_a_rank_is_refused(model):
    with pytest.raises(ValueError, match="rank: has none for bert"):
        SVDFactorizer({"elsewhere": 3})(copy.deepcopy(model))


# many processes -----------------------------------------------------------------------------------------------------


def test_shares_are_even_and_whole():
    costs = {name: eigen_cost(shape) for name, shape in BERT.items()}
    shares = share_out(costs, 8)
    assert sorted(name for share in shares for name in share) == sorted(BERT)
    work = [sum(costs[name] for name in share) for share in shares]
    assert max(work) - min(work) <= max(costs.values())
    assert share_out({"a": 1, "b": 5}, 4) == [["b"], ["a"], [], []]


WORKER = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
sys.path.insert(0, {tests!r})
from lpaf.factorize import SVDFactorizer, weighted_spectra
from tiny import build

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:{port}", rank=rank, world_size=2)
model = build("bert")
spectra = weighted_spectra(model)
ranks = {{name: 2 + i for i, name in enumerate(spectra)}}
factorized = SVDFactorizer(ranks)(model)
errors = {{f"error.{{name}}": torch.tensor(error, dtype=torch.float64) for name, error in factorized.errors.items()}}
spectra = {{f"spectrum.{{name}}": values for name, values in spectra.items()}}
save_file(model.state_dict() | errors | spectra, f"{{sys.argv[2]}}/{{rank}}.safetensors")
if rank == 1:  # a matrix of its share that cannot be factorised
    broken = build("bert")
    broken.bert.encoder.layer[0].intermediate.dense.weight.data.fill_(float("nan"))
    broken.bert.encoder.layer[0].output.dense.weight.data.fill_(float("nan"))
else:
    broken = build("bert")
try:
    SVDFactorizer(3)(broken)
except Exception as error:
    print(type(error).__name__, error)
dist.destroy_process_group()
"""


def test_two_processes_end_with_the_same_factors(model, tmp_path):
    from safetensors.torch import load_file

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        script = WORKER.format(tests=str(Path(__file__).parent), port=free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        results = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], results
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []

    alone = copy.deepcopy(model)
    names = list(matrix_shapes(model))
    factorized = SVDFactorizer({name: 2 + i for i, name in enumerate(names)})(alone)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(first[name], tensor)
    for name in names:
        assert float(first[f"error.{name}"]) == pytest.approx(factorized.errors[name])

    said = [output.strip() for output, _ in results]
    assert said[1].startswith("ValueError weights: expected finite values")
    assert said[0].startswith("RuntimeError process 1 failed (ValueError: weights: expected finite values")
