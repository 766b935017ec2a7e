"""Tables of plans, dispatch by them, and what explain and use_provider say."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from lpaf_kernels import LowRankSparseLinear, explain, use_provider
from lpaf_kernels.triton.launch import LAUNCHES
from lpaf_kernels.tuning import Gpu, Plan, Shape, Table, dispatch, tune, tune_linear
from lpaf_kernels.tuning import lowrank_sparse_linear as plans

GPU = Gpu("NVIDIA Test GPU", 90, "3.6")
SHAPE = Shape("lowrank_sparse_linear", "forward", "bfloat16", 768, 3072, 80, 38)
ONE = Plan("one_kernel", ("one_kernel-16x64x64-w4-s3-p0-r144",), 2.0)
CHAIN = Plan("chain", (), 3.0)
DENSE = Plan("dense", (), 1.5)


def test_user_table_lies_in_the_cache(write, tmp_path: Path) -> None:
    assert write({}) == tmp_path / "lpaf-kernels" / "tuning" / "nvidia-test-gpu.json"


def test_table_round_trip(write) -> None:
    entries = {SHAPE: {16: (ONE, CHAIN), 4096: (CHAIN,)}, SHAPE._replace(kept=0): {1: (CHAIN,)}}
    table = Table.load(write(entries))
    assert table.entries == entries
    assert table.gpu == GPU.name


def test_nearest_rows_in_log_space(write) -> None:
    write({SHAPE: {16: (ONE,), 1024: (CHAIN,)}})
    for rows, plan in ((1, ONE), (16, ONE), (127, ONE), (128, ONE), (129, CHAIN), (10**6, CHAIN)):
        assert dispatch.choose(SHAPE, rows, GPU) == plan, rows


def test_nearest_shape_serves_within_a_factor(write) -> None:
    write({SHAPE: {16: (ONE, CHAIN)}})
    assert dispatch.choose(SHAPE._replace(rank=60), 16, GPU) == ONE
    # Twice the width, no kept columns, another type: a different matter, so the default table's rule.
    for other in (SHAPE._replace(in_features=1600), SHAPE._replace(kept=0), SHAPE._replace(dtype="float16")):
        assert dispatch.choose(other, 16, GPU).microseconds is None


def test_one_kernel_of_a_near_shape_must_hold_the_rank(write) -> None:
    near = SHAPE._replace(kept=60)
    write({near: {16: (ONE, CHAIN)}})
    assert dispatch.choose(near, 16, GPU) == ONE
    assert dispatch.choose(near._replace(kept=65), 16, GPU) == CHAIN


def test_dense_serves_inference_only(write) -> None:
    write({SHAPE: {16: (DENSE, CHAIN)}})
    assert dispatch.choose(SHAPE, 16, GPU, inference=True) == DENSE
    assert dispatch.choose(SHAPE, 16, GPU, inference=False) == CHAIN
    assert dispatch.choose(SHAPE._replace(direction="training"), 16, GPU, inference=False) == CHAIN


def test_without_triton_the_chain_serves(write) -> None:
    bare = Gpu(GPU.name, 90, None)
    assert dispatch.choose(SHAPE, 16, bare).provider == "chain"
    with use_provider("one_kernel"), pytest.raises(RuntimeError, match="'one_kernel' was forced"):
        dispatch.choose(SHAPE, 16, bare)


@pytest.mark.parametrize(
    ("meta", "message"), [({"gpu": "Another GPU"}, "measured on Another GPU"), ({"triton": "3.8"}, "with Triton 3.8")]
)
def test_foreign_tables_are_left_out_with_a_warning(write, meta: dict, message: str) -> None:
    write({SHAPE: {16: (ONE,)}}, **meta)
    with pytest.warns(UserWarning, match=message):
        assert dispatch.choose(SHAPE, 16, GPU).provider == "two_kernels"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting"),
        ("[]", "list indices"),
        ('{"format": 2}', "format 2, expected 1"),
        ('{"format": 1}', "missing 'gpu'"),
        ('{"format": 1, "gpu": "x", "rules": [{"direction": "forward", "plans": [], "when": 1}]}', "unknown fields"),
    ],
)
def test_malformed_tables_name_the_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        Table.load(path)
    assert str(path) in str(error.value)


def test_malformed_user_table_does_not_stop_the_operator(write) -> None:
    write({SHAPE: {16: (ONE,)}}).write_text("{")
    with pytest.warns(UserWarning, match="is not used"):
        assert dispatch.choose(SHAPE, 16, GPU).provider == "two_kernels"


def test_shipped_tables_load_and_name_launches_that_exist() -> None:
    paths = sorted(dispatch.TABLES.glob("*.json"))
    assert dispatch.DEFAULT_TABLE in paths
    for path in paths:
        table = Table.load(path)
        ranked = [plan for rows in table.entries.values() for found in rows.values() for plan in found]
        ranked += [plan for rule in table.rules for plan in rule.plans]
        assert ranked
        for plan in ranked:
            assert plan.provider in (*dispatch.PROVIDERS, "kernels")
            assert all(name in LAUNCHES for name in plan.launches)


@pytest.mark.parametrize("direction", ["forward", "training", "backward"])
@pytest.mark.parametrize("kept", [0, 38])
@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_default_table_serves_every_gpu(write, direction: str, kept: int, arch: int) -> None:
    shape = SHAPE._replace(direction=direction, kept=kept)
    for rows in (0, 1, 100000):
        plan = dispatch.choose(shape, rows, Gpu("Some GPU", arch, "3.6"))
        assert plan.provider == ("two_kernels" if kept and direction != "backward" else "chain")


def test_broken_kernels_warn_once_and_the_chain_serves(write) -> None:
    write({SHAPE: {16: (ONE, CHAIN)}})
    with pytest.warns(UserWarning, match=r"one_kernel .* failed and is not used again: no C compiler"):
        dispatch.report_broken(SHAPE.op, ONE, RuntimeError("no C compiler\nmore"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.report_broken(SHAPE.op, ONE, RuntimeError("no C compiler"))
    assert dispatch.choose(SHAPE, 16, GPU) == CHAIN


def test_use_provider_nests_and_names_what_it_knows(write) -> None:
    write({SHAPE: {16: (CHAIN, ONE)}})
    with use_provider("one_kernel"):
        assert dispatch.choose(SHAPE, 16, GPU) == ONE
        with use_provider(None):
            assert dispatch.choose(SHAPE, 16, GPU) == CHAIN
        assert dispatch.choose(SHAPE._replace(direction="backward"), 16, GPU).provider == "kernels"
    with use_provider("dense"):
        assert dispatch.choose(SHAPE, 16, GPU, inference=False).provider == "chain"
    with pytest.raises(ValueError, match="name: expected None or one of block, one_kernel, two_kernels, chain"):
        use_provider("cublas").__enter__()


def test_explain(write) -> None:
    layer = LowRankSparseLinear(768, 3072, 80, 38, dtype=torch.bfloat16)
    assert explain(layer, 16).plan.provider == "cpu"
    write({SHAPE: {16: (ONE, CHAIN)}})
    choice = explain(layer, 20, gpu=GPU)
    assert choice.plan == ONE
    assert choice.alternatives == (CHAIN,)
    assert "768->3072 rank 80 kept 38 bfloat16, 20 rows: one_kernel" in str(choice)
    assert "measured, nearest of 16 rows" in str(choice)
    assert "or chain 3.0 us" in str(choice)
    with use_provider("chain"):
        assert explain(layer, 20, gpu=GPU).reason == "forced by use_provider"
    assert explain(layer.float(), 20, gpu=GPU).plan.provider == "chain"
    with pytest.raises(ValueError, match="direction: expected forward, training or backward, got 'up'"):
        explain(layer, 1, "up")
    with pytest.raises(ValueError, match="rows: expected at least 0, got -1"):
        explain(layer, -1)


def test_plans_to_measure_hold_the_rank() -> None:
    for width in (16, 118, 260, 300):
        for arch in (80, 90, 100):
            found = tune.forward_plans(width, arch)
            assert {"chain", "dense", "two_kernels"} <= {plan.provider for plan in found}
            for plan in found:
                assert all(arch in LAUNCHES[name].archs for name in plan.launches)
                if plan.provider == "one_kernel":
                    assert width <= LAUNCHES[plan.launches[0]].max_width
            assert any(plan.provider == "kernels" for plan in tune.backward_plans(width, arch))


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ranking_drops_what_is_wrong_and_sorts_by_time(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, without kernels: the chain, the dense weight, and one planted wrong plan."""
    wrong = Plan("two_kernels") if direction == "forward" else Plan("kernels")
    others = [Plan("chain"), Plan("dense")] if direction == "forward" else [Plan("chain")]
    monkeypatch.setattr(tune, f"{direction}_plans", lambda *_: [wrong, *others])
    forward = plans.forward

    def broken(plan, problem, training, save_pre, arch):
        if plan.provider == "two_kernels":
            return torch.zeros(problem.x.shape[0], problem.up.shape[1]), None, None
        return forward(plan, problem, training, save_pre, arch)

    monkeypatch.setattr(tune, "forward", broken)
    monkeypatch.setattr(tune, "backward", lambda *_: tune.chain_backward(*_[1:3], torch.zeros_like(_[3])))
    problem = tune.make_problem(33, 24, 40, 6, 5, torch.float32, "cpu")
    timed = []

    def times(calls):
        for call in calls:
            timed.append(call())
        return [float(len(calls) - i) for i in range(len(calls))]

    with pytest.warns(UserWarning, match="is wrong"):
        ranked = tune.rank_plans(problem, direction, GPU, times)
    assert [plan.provider for plan in ranked] == [plan.provider for plan in reversed(others)]
    assert [plan.microseconds for plan in ranked] == [float(i + 1) for i in range(len(others))]
    assert len(timed) == len(others)


def test_the_dense_weight_is_rebuilt_when_a_factor_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = LowRankSparseLinear(24, 40, 6, 5)
    with torch.no_grad():
        layer.down[6:].normal_()
        arguments = (layer.down, layer.up, layer.kept)
        first = plans.dense_weight(*arguments)
        torch.testing.assert_close(first, layer.weight)
        assert plans.dense_weight(*arguments) is first
        layer.up.mul_(2)
        second = plans.dense_weight(*arguments)
        torch.testing.assert_close(second, layer.weight)
        assert second is not first
    key = id(layer.down)
    assert key in plans._dense
    del layer, arguments
    assert key not in plans._dense


def test_z_is_kept_iff_its_rows_are_shorter_than_those_of_x() -> None:
    assert plans.saves_z(234, 768)
    assert not plans.saves_z(768, 768)


def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so nothing is refused")
    with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
        tune_linear([(768, 768, 80, 0)], output=tmp_path / "table.json")
    assert not list(tmp_path.iterdir())


def test_tables_are_json_with_one_line_per_row_count(write) -> None:
    text = write({SHAPE: {16: (ONE, CHAIN), 4096: (CHAIN,)}}).read_text()
    assert json.loads(text)["entries"][0]["rows"]["16"][0] == ["one_kernel", list(ONE.launches), 2.0]
    assert sum('"chain"' in line for line in text.splitlines()) == 2


def test_float32_is_ours_only_as_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    for precision, expected in (("highest", False), ("high", True), ("medium", True)):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        assert dispatch.matrix_unit(torch.float32, 90) == expected
        assert not dispatch.matrix_unit(torch.float32, 100)
        assert not dispatch.matrix_unit(torch.float64, 90)
        assert dispatch.matrix_unit(torch.bfloat16, 100)


def test_one_kernel_holds_a_quarter_of_4_byte_columns() -> None:
    launch = next(launch for launch in LAUNCHES.values() if launch.kernel == "one_kernel" and launch.max_width == 144)
    assert [launch.holds(width) for width in (144, 145)] == [True, False]
    assert [launch.holds(width, torch.float32) for width in (36, 37)] == [True, False]
    other = next(launch for launch in LAUNCHES.values() if launch.kernel == "project")
    assert other.holds(4096, torch.float32)


@pytest.mark.parametrize(
    "error", [PermissionError("/root/.cache"), RuntimeError("Could not determine home directory.")]
)
def test_without_a_readable_home_the_other_tables_serve(error, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(gpu: str):
        raise error

    dispatch.forget()
    monkeypatch.setattr(dispatch, "user_table", fail)
    assert [Path(table.path).name for table in dispatch.tables(GPU)] == ["default.json"]
    dispatch.forget()


def test_another_gpus_table_is_not_replaced(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"format": 1, "gpu": "another GPU", "triton": "*", "entries": []}')
    with pytest.raises(ValueError, match=r"output: .*would be replaced: it was measured on another GPU"):
        tune._known(other, GPU)
    other.write_text("no table")
    with pytest.raises(ValueError, match="not a tuning table"):
        tune._known(other, GPU)
    # The user's own table that cannot be read is written anew, as the warning about it advises.
    monkeypatch.setattr(dispatch, "user_table", lambda gpu: other)
    assert tune._known(other, GPU) == {}


def test_explain_says_what_runs() -> None:
    layer = LowRankSparseLinear(768, 768, 80, 8)
    with dispatch.use_provider("two_kernels"):
        assert dispatch.explain(layer.bfloat16(), 512, gpu=GPU).plan.provider == "two_kernels"
        assert dispatch.explain(layer.float(), 512, gpu=GPU).plan.provider == "two_kernels"
        assert dispatch.explain(layer.double(), 512, gpu=GPU).plan.provider == "chain"
    with pytest.raises(
        TypeError, match="layer: expected a LowRankSparseLinear, a block of them or a MaskedLinear, got L"
    ):
        dispatch.explain(torch.nn.Linear(3, 3), 512, gpu=GPU)
