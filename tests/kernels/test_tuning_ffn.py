"""How lowrank_ffn is chosen for, measured and explained: as one block, or its layers one by one."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from lpaf_kernels import LowRankSparseLinear, explain, use_provider
from lpaf_kernels.ops import lowrank_ffn as op
from lpaf_kernels.triton.launch import LAUNCHES
from lpaf_kernels.tuning import FfnShape, Gpu, Plan, Shape, Table, dispatch, tune_ffn
from lpaf_kernels.tuning import lowrank_ffn as plans
from lpaf_kernels.tuning import tune_lowrank_ffn as tune

GPU = Gpu("NVIDIA Test GPU", 90, "3.6")
SHAPE = FfnShape("lowrank_ffn", "forward", "bfloat16", 768, 3072, 768, (80, 80), (38, 0), 0)
LINEAR = Shape("lowrank_sparse_linear", "forward", "bfloat16", 768, 3072, 80, 38)
BLOCK = Plan("block", ("ffn-64x32x64-w4-s2-p0-r144",), 2.0)
CHAIN = Plan("chain", (), 3.0)


def choose(shape: FfnShape, rows: int = 4096, gpu: Gpu = GPU) -> str:
    return dispatch.choose(shape, rows, gpu).provider


def directions(shape: FfnShape) -> list[str]:
    return [choose(shape._replace(direction=direction)) for direction in ("forward", "training", "backward")]


def test_table_round_trip(write) -> None:
    gated = SHAPE._replace(direction="backward", kept=(0, 0), gate=64)
    entries = {SHAPE: {16: (BLOCK, CHAIN), 4096: (CHAIN,)}, gated: {1: (CHAIN,)}, LINEAR: {1: (CHAIN,)}}
    assert Table.load(write(entries)).entries == entries


def test_the_rule_takes_the_block_for_inference_only(write) -> None:
    assert directions(SHAPE) == ["block", "chain", "chain"]
    assert dispatch.choose(SHAPE, 1, GPU).microseconds is None


@pytest.mark.parametrize("arch", [75, 80, 86, 90, 100, 103, 120])
def test_the_rule_names_its_architectures(write, arch: int) -> None:
    assert choose(SHAPE, gpu=Gpu("Some GPU", arch, "3.6")) == ("block" if arch in (80, 90, 100, 103) else "chain")


@pytest.mark.parametrize(
    ("change", "provider"),
    [
        ({"ranks": (272, 20), "kept": (0, 252)}, "block"),
        ({"ranks": (273, 20), "kept": (0, 0)}, "chain"),
        ({"ranks": (20, 260), "kept": (0, 13)}, "chain"),
        ({"gate": 154}, "block"),
        ({"gate": 155}, "chain"),
        ({"dtype": "float32"}, "chain"),
        ({"dtype": "float32", "ranks": (41, 68), "kept": (27, 0)}, "block"),
    ],
)
def test_the_rule_takes_what_a_launch_holds(write, change: dict, provider: str) -> None:
    assert choose(SHAPE._replace(**change)) == provider


def test_without_triton_the_chain_serves(write) -> None:
    bare = Gpu(GPU.name, 90, None)
    assert choose(SHAPE, gpu=bare) == "chain"
    with use_provider("block"), pytest.raises(RuntimeError, match="'block' was forced"):
        choose(SHAPE, gpu=bare)


def test_a_measured_forward_serves_training_too(write) -> None:
    write({SHAPE: {4096: (BLOCK, CHAIN)}, SHAPE._replace(direction="backward"): {4096: (CHAIN,)}})
    assert directions(SHAPE) == ["block", "block", "chain"]
    write({SHAPE: {4096: (CHAIN, BLOCK)}})
    assert directions(SHAPE) == ["chain", "chain", "chain"]


def test_nearest_shape_serves_if_its_launch_holds_the_rank(write) -> None:
    write({SHAPE: {4096: (BLOCK, CHAIN)}})
    assert dispatch.choose(SHAPE._replace(ranks=(90, 100), kept=(54, 0)), 4096, GPU) == BLOCK
    assert dispatch.choose(SHAPE._replace(ranks=(90, 100), kept=(55, 0)), 4096, GPU) == CHAIN
    # Other hidden columns, a gate: a different matter, so the rule.
    for other in (SHAPE._replace(hidden=768), SHAPE._replace(gate=20)):
        assert dispatch.choose(other, 4096, GPU).microseconds is None


def test_use_provider(write) -> None:
    with use_provider("block"):
        assert directions(SHAPE) == ["block"] * 3
        assert directions(SHAPE._replace(ranks=(1024, 1024))) == ["block", "block", "chain"]
        assert dispatch.choose(LINEAR, 16, GPU) == Plan("two_kernels")  # by the tables
        with use_provider("two_kernels"):
            assert directions(SHAPE) == ["chain"] * 3
            assert dispatch.choose(LINEAR, 16, GPU).provider == "two_kernels"
    with use_provider("chain"):
        assert directions(SHAPE) == ["chain"] * 3


class Block(torch.nn.Module):
    def __init__(self, rank: int, gate: int = 0) -> None:
        super().__init__()
        self.first = LowRankSparseLinear(768, 3072, rank, 38, dtype=torch.bfloat16)
        self.second = LowRankSparseLinear(3072, 768, rank, dtype=torch.bfloat16)
        self.gate = LowRankSparseLinear(768, 3072, gate, dtype=torch.bfloat16) if gate else None


def test_explain(write) -> None:
    assert explain(Block(80), 16).plan.provider == "cpu"
    choice = explain(Block(80, 64), 16, gpu=GPU)
    assert choice.plan.provider == "block"
    assert "lowrank_ffn forward 768->3072->768 ranks 80, 80 kept 38, 0 gate 64 bfloat16, 16 rows: block" in str(choice)
    assert "default.json, a rule" in str(choice)
    assert explain(Block(80), 16, "training", GPU).plan.provider == "chain"
    assert explain(Block(300), 16, gpu=GPU).plan.provider == "chain"
    assert explain(Block(80).double(), 16, gpu=GPU).plan.provider == "chain"
    with use_provider("block"):
        assert explain(Block(80), 16, "backward", GPU).plan.provider == "block"
        assert explain(Block(80), 16, gpu=GPU).reason == "forced by use_provider"
    broken = Block(80)
    broken.second = torch.nn.Linear(3072, 768)
    with pytest.raises(
        TypeError, match="layer: expected a LowRankSparseLinear, a block of them or a MaskedLinear, got B"
    ):
        explain(broken, 16, gpu=GPU)


def arguments(rows: int = 5, gate: bool = False) -> tuple:
    """The operator's arguments, small and in bfloat16."""
    shape = SHAPE._replace(in_features=7, hidden=11, out_features=6, ranks=(3, 2), kept=(2, 1), gate=4 * gate)
    problem = tune.make_ffn_problem(rows, shape, torch.bfloat16, "cpu")
    return tuple(problem._replace(norm="layer", norm_weight=torch.ones(6).bfloat16(), eps=1e-5))


def test_a_broken_block_warns_once_and_the_layers_serve(write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered for CUDA, on CPU tensors that seem to lie on GPU."""
    monkeypatch.setattr(dispatch, "current_gpu", lambda index: GPU)
    tried = []

    def fail(plan, problem, *_):
        tried.append(plan.provider)
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(plans, "forward", fail)
    given = arguments()
    expected = op.chain(*given)
    with use_provider("block"), pytest.raises(RuntimeError, match="no C compiler"):
        op._lowrank_ffn_cuda(*given, False)
    with pytest.warns(UserWarning, match="block failed and is not used again: no C compiler"):
        assert torch.equal(op._lowrank_ffn_cuda(*given, False), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(op._lowrank_ffn_cuda(*given, False), expected)
        assert torch.equal(op._lowrank_ffn_cuda(*given, True), expected)
    assert tried == ["block", "block"]


def test_what_the_block_gets_and_gives(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "current_gpu", lambda index: GPU)

    def forward(plan, problem, arch):
        assert problem.x.shape == (10, 7)
        assert problem.residual.shape == (10, 6)
        assert all(tensor.is_contiguous() for tensor in problem if isinstance(tensor, torch.Tensor))
        return op.chain(*problem)

    def backward(plan, problem, grad, needs, arch):
        assert grad.shape == (10, 6)
        return op.chain_backward(grad, *problem, needs)

    monkeypatch.setattr(plans, "forward", forward)
    monkeypatch.setattr(plans, "backward", backward)
    x, down1, *others = arguments(10, gate=True)
    others[10] = torch.randn(2, 5, 6).bfloat16()
    given = (x.view(2, 5, 7).transpose(0, 1).contiguous().transpose(0, 1), down1.t().contiguous().t(), *others)
    assert torch.equal(op._lowrank_ffn_cuda(*given, False), op.chain(*given))
    needs = [tensor is not None and index != 1 for index, tensor in enumerate(given[i] for i in op._FLOATING)]
    grad = torch.randn(2, 5, 6).bfloat16()
    with use_provider("block"):
        actual = op._lowrank_ffn_backward_cuda(grad, *given, needs)
    for gradient, expected in zip(actual, op.chain_backward(grad, *given, needs), strict=True):
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_plans_to_measure_hold_the_rank(direction: str) -> None:
    for width in (16, 118, 260, 300):
        for arch in (80, 90, 100):
            found = tune.ffn_plans(direction, 4096, width, arch)
            assert found[0] == Plan("chain")
            # A backward holds 272 columns, 208 on sm_80.
            assert (len(found) > 1) == (direction == "forward" or width <= (208 if arch == 80 else 272))
            for plan in found[1:]:
                assert plan.provider == "block"
                assert all(arch in LAUNCHES[name].archs and LAUNCHES[name].holds(width) for name in plan.launches)
                kernels = plans.BACKWARD if direction == "backward" else plans.FORWARD if width < 273 else plans.WIDE
                assert tuple(LAUNCHES[name].kernel for name in plan.launches) == kernels


@pytest.mark.parametrize("gate", [0, 5])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ranking_drops_what_is_wrong_and_sorts_by_time(direction: str, gate: int, monkeypatch) -> None:
    """On the CPU: the chain, and a block that is the chain again or wrong."""
    right, wrong = (Plan("block", (name,)) for name in list(LAUNCHES)[:2])
    monkeypatch.setattr(tune, "ffn_plans", lambda *_: [Plan("chain"), right, wrong])

    def forward(plan, problem, arch):
        return op.chain(*problem) * (1 if plan == right else 2)

    def backward(plan, problem, grad, needs, arch):
        found = op.chain_backward(grad, *problem, needs)
        return found if plan == right else tuple(2 * gradient for gradient in found)

    monkeypatch.setattr(tune, "forward", forward)
    monkeypatch.setattr(tune, "backward", backward)
    shape = SHAPE._replace(in_features=24, hidden=40, out_features=20, ranks=(6, 7), kept=(5, 0), gate=gate)
    problem = tune.make_ffn_problem(300, shape, torch.float32, "cpu")
    with pytest.warns(UserWarning, match="is wrong"):
        ranked = tune.rank_ffn_plans(problem, direction, GPU, lambda calls: [float(-i) for i in range(len(calls))])
    assert ranked == (right._replace(microseconds=-1.0), Plan("chain", (), -0.0))


def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so nothing is refused")
    with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
        tune_ffn([(768, 3072, 768, (80, 80), (0, 0), 0)], output=tmp_path / "table.json")


def test_measurements_are_written_one_by_one(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "this_gpu", lambda: GPU)
    monkeypatch.setattr(tune, "make_ffn_problem", lambda count, shape, dtype: shape)
    monkeypatch.setattr(tune, "rank_ffn_plans", lambda shape, direction, gpu, times: (BLOCK, CHAIN))
    lines: list[str] = []
    path = tune_ffn([(768, 3072, 768, (80, 80), (38, 0), 0)], rows=(16, 4096), report=lines.append)
    backward = SHAPE._replace(direction="backward")
    assert Table.load(path).entries == {
        shape: {16: (BLOCK, CHAIN), 4096: (BLOCK, CHAIN)} for shape in (SHAPE, backward)
    }
    assert lines[0].endswith("16 rows: block 2.0 us, chain 3.0 us")
    for sizes in ((768, 3072, 768, 80, 80, 0), (768, 3072, 768, (80, 0), (0, 0), 0), (768, 768, 80, 0)):
        with pytest.raises(ValueError, match="shapes: expected"):
            tune_ffn([sizes])
    with pytest.raises(ValueError, match="directions: expected forward or backward, got 'up'"):
        tune_ffn([(768, 3072, 768, (80, 80), (0, 0), 0)], directions=["up"])
