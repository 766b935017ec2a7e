"""How masked_linear is chosen for, measured and explained: by its own kernels, or by the weight's cast."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from lpaf_kernels import LowRankSparseLinear, MaskedLinear, explain, use_provider
from lpaf_kernels.ops import masked_linear as op
from lpaf_kernels.triton.launch import LAUNCHES
from lpaf_kernels.tuning import Gpu, MaskedShape, Plan, Table, dispatch, tune_masked
from lpaf_kernels.tuning import masked_linear as plans
from lpaf_kernels.tuning import tune_masked_linear as tune

GPU = Gpu("NVIDIA Test GPU", 90, "3.6")
SHAPE = MaskedShape("masked_linear", "forward", "bfloat16", 768, 3072, "float32")
KERNELS = Plan("kernels", ("masked-128x128x64-w8-s3-p1-r272",), 2.0)
CAST = Plan("cast", (), 3.0)
SMALL = SHAPE._replace(in_features=16, out_features=32)
NEEDS = [True, True, True, True]


def small(rows: int = 6, shape: MaskedShape = SMALL) -> plans.Problem:
    return tune.make_masked_problem(rows, shape, "cpu")


def by_cast(problem: plans.Problem, grad: torch.Tensor, needs: list[bool] = NEEDS) -> tuple[torch.Tensor, ...]:
    return op.cast_backward(grad, *problem[:5], needs)


def test_table_round_trip(write) -> None:
    other = SHAPE._replace(weight="bfloat16", direction="backward")
    entries = {SHAPE: {16: (KERNELS, CAST), 4096: (CAST,)}, other: {512: (CAST,)}}
    assert Table.load(write(entries)).entries == entries


@pytest.mark.parametrize("direction", ["forward", "training", "backward"])
@pytest.mark.parametrize("arch", [75, 80, 90, 100, 120])
def test_the_rule_takes_the_cast(write, direction: str, arch: int) -> None:
    for gpu in (Gpu("Some GPU", arch, "3.6"), Gpu("Some GPU", arch, None)):
        assert dispatch.choose(SHAPE._replace(direction=direction), 4096, gpu) == Plan("cast")


def test_a_table_chooses(write) -> None:
    write({SHAPE: {16: (CAST, KERNELS), 4096: (KERNELS, CAST)}}, triton="*")
    for shape, rows, plan in (
        (SHAPE, 16, CAST),
        (SHAPE, 4096, KERNELS),
        (SHAPE._replace(direction="training"), 4096, KERNELS),
        (SHAPE._replace(out_features=2304), 4096, KERNELS),
        (SHAPE._replace(out_features=1536), 4096, Plan("cast")),
        (SHAPE._replace(weight="bfloat16"), 4096, Plan("cast")),
    ):
        assert dispatch.choose(shape, rows, GPU) == plan
    assert dispatch.choose(SHAPE, 4096, Gpu(GPU.name, 90, None)) == CAST


def test_providers_are_known_by_their_own_operators_only(write) -> None:
    write({SHAPE: {16: (CAST, KERNELS)}})
    linear = dispatch.Shape("lowrank_sparse_linear", "backward", "bfloat16", 768, 3072, 80, 38)
    with use_provider("kernels"):
        assert dispatch.choose(SHAPE, 16, GPU) == KERNELS
        assert dispatch.choose(SHAPE._replace(direction="backward"), 16, GPU) == Plan("kernels")
        assert dispatch.choose(linear, 16, GPU).provider == "chain"
        assert not dispatch.is_forced("lowrank_ffn")
        with pytest.raises(RuntimeError, match="'kernels' was forced"):
            dispatch.choose(SHAPE, 16, Gpu(GPU.name, 90, None))
    with use_provider("cast"):
        assert dispatch.choose(SHAPE, 16, GPU) == CAST
    write({SHAPE: {16: (KERNELS, CAST)}})
    for name in ("chain", "block", "one_kernel"):
        with use_provider(name):
            assert dispatch.choose(SHAPE, 16, GPU) == KERNELS


def test_explain(write, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MaskedLinear(768, 3072)
    assert explain(layer, 16).plan.provider == "cpu"
    write({SHAPE: {16: (KERNELS, CAST)}, SHAPE._replace(weight="bfloat16"): {16: (CAST,)}})
    assert explain(layer, 16, gpu=GPU).reason == "the kernels multiply float16 and bfloat16"
    with monkeypatch.context() as autocast:
        # torch disables CUDA's autocast where there is no CUDA.
        autocast.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        autocast.setattr(torch, "get_autocast_dtype", lambda kind: torch.bfloat16)
        choice = explain(layer, 20, gpu=GPU)
        assert choice.plan == KERNELS
        assert choice.alternatives == (CAST,)
        assert "masked_linear forward 768->3072 weight float32 bfloat16, 20 rows: kernels" in str(choice)
        assert explain(layer.double(), 16, gpu=GPU).plan == Plan("cast")
    assert explain(layer.bfloat16(), 16, gpu=GPU).plan == CAST
    with use_provider("kernels"):
        assert explain(layer, 16, gpu=GPU).reason == "forced by use_provider"
        assert explain(MaskedLinear(768, 20, dtype=torch.bfloat16), 16, gpu=GPU).reason.endswith("multiples of 16")
        assert explain(MaskedLinear(768, 32, block=(2, 1)), 16, gpu=GPU).reason == "one score stands for a block"
        assert explain(LowRankSparseLinear(768, 768, 80, dtype=torch.bfloat16), 16, gpu=GPU).plan.provider == "chain"


def test_broken_kernels_warn_once_and_the_cast_serves(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "current_gpu", lambda index: GPU)
    backward = SMALL._replace(direction="backward")
    write({SMALL: {16: (KERNELS, CAST)}, backward: {16: (Plan("kernels", (), 1.0), CAST)}})
    tried = []

    def fail(plan, *_):
        tried.append(plan.launches)
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(plans, "forward", fail)
    monkeypatch.setattr(plans, "backward", fail)
    given, grad = small(), torch.randn(6, 32).bfloat16()
    with use_provider("kernels"):
        with pytest.raises(RuntimeError, match="no C compiler"):
            op._cuda_forward(*given)
        with pytest.raises(RuntimeError, match="no C compiler"):
            op._cuda_backward(grad, *given[:5], NEEDS)
    with pytest.warns(UserWarning, match=r"kernels .* failed and is not used again: no C compiler"):
        y = op._cuda_forward(*given)
    assert torch.equal(y, op.cast_forward(*given))
    with pytest.warns(UserWarning, match="failed and is not used again"):
        op._cuda_backward(grad, *given[:5], NEEDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(op._cuda_forward(*given), y)
        found = op._cuda_backward(grad, *given[:5], NEEDS)
    assert all(map(torch.equal, found, by_cast(given, grad)))
    assert len(tried) == 4


def test_what_the_kernels_do_not_give_the_cast_does(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "current_gpu", lambda index: GPU)
    given, grad = small(), torch.randn(2, 3, 32).bfloat16()
    given = given._replace(x=given.x.view(2, 3, 16).transpose(0, 1).contiguous().transpose(0, 1))
    expected = by_cast(given, grad)
    marked = torch.full((6, 16), 7.0).bfloat16(), (torch.full((32, 16), 8.0), torch.full((32, 16), 9.0))
    for found in ((None, None), (marked[0], None), (None, marked[1]), marked):
        monkeypatch.setattr(plans, "backward", lambda *_, found=found: found)
        with use_provider("kernels"):
            d_x, d_weight, d_scores, d_bias = op._cuda_backward(grad, *given[:5], NEEDS)
        assert torch.equal(d_x, expected[0] if found[0] is None else marked[0].view(2, 3, 16))
        for actual, cast, own in zip((d_weight, d_scores), expected[1:3], marked[1], strict=True):
            assert torch.equal(actual, cast if found[1] is None else own)
        assert torch.equal(d_bias, expected[3])


@pytest.mark.parametrize("change", ["float64", "float32", "float64 scores", "no rows", "odd sizes"])
def test_what_the_kernels_never_get(change: str, write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "current_gpu", lambda index: GPU)
    for name in ("forward", "backward"):
        monkeypatch.setattr(plans, name, lambda *_: pytest.fail("the kernels were called"))
    given = {
        "float64": lambda: tune.double(small()),
        "float32": lambda: small(shape=SMALL._replace(dtype="float32")),
        "float64 scores": lambda: small()._replace(scores=small().scores.double(), value=torch.zeros(()).double()),
        "no rows": lambda: small(0),
        "odd sizes": lambda: small(shape=SMALL._replace(in_features=20)),
    }[change]()
    grad = torch.randn(given.rows, 32).to(given.x.dtype)
    with use_provider("kernels"):
        assert torch.equal(op._cuda_forward(*given), op.cast_forward(*given))
        found = op._cuda_backward(grad, *given[:5], NEEDS)
    assert all(map(torch.equal, found, by_cast(given, grad)))


def test_without_score_gradients_the_cast_masks_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    given = small()
    plan = Plan("kernels", ("masked_grads-64x64x64-w4-s3-p1-r272",))
    assert plans.backward(plan, given.prepared(), torch.randn(6, 32), [True, True, False, True], 90) == (None, None)


def test_unknown_launches_are_named() -> None:
    with pytest.raises(ValueError, match="launches: expected one of masked each, got masked-1x1"):
        plans.forward(Plan("kernels", ("masked-1x1",)), small().prepared(), 90)
    with pytest.raises(ValueError, match="launches: expected one of masked each, got close"):
        plans.launches(Plan("kernels", ("close-16x64x64-w4-s2-p1-r144",)), plans.FORWARD, [(1, 1)], 90)


def test_plans_to_measure() -> None:
    for arch in (80, 90, 100):
        for direction, kernels in (("forward", {plans.FORWARD}), ("backward", {plans.BACKWARD, plans.WEIGHTS})):
            first, *others = tune.masked_plans(direction, arch)
            assert first == Plan("cast")
            assert {plan.provider for plan in others} == {"kernels"}
            assert all(arch in LAUNCHES[name].archs for plan in others for name in plan.launches)
            assert {tuple(LAUNCHES[name].kernel for name in plan.launches) for plan in others} == kernels


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ranking_drops_what_is_wrong_and_sorts_by_time(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU: the cast, and kernels that are the cast again or wrong."""
    right, wrong = (Plan("kernels", (name,)) for name in list(LAUNCHES)[:2])
    monkeypatch.setattr(tune, "masked_plans", lambda *_: [Plan("cast"), right, wrong])
    problem = small(80)

    def forward(plan, given, arch):
        return op.cast_forward(*given) * (1 if plan == right else 2)

    def backward(plan, given, grad, needs, arch):
        d_x, *both, _ = by_cast(given, grad)
        return (d_x if plan == right else 2 * d_x), tuple(both)

    monkeypatch.setattr(tune, "forward", forward)
    monkeypatch.setattr(tune, "backward", backward)
    with pytest.warns(UserWarning, match="is wrong"):
        ranked = tune.rank_masked_plans(problem, direction, GPU, lambda calls: [float(-i) for i in range(len(calls))])
    assert ranked == (right._replace(microseconds=-1.0), Plan("cast", (), -0.0))


def test_tuning_needs_a_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so nothing is refused")
    with pytest.raises(RuntimeError, match="torch finds no CUDA device"):
        tune_masked([(768, 768)], output=tmp_path / "table.json")


def test_measurements_are_written_one_by_one(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "this_gpu", lambda: GPU)
    monkeypatch.setattr(tune, "make_masked_problem", lambda rows, shape: rows)
    monkeypatch.setattr(tune, "rank_masked_plans", lambda *_: (KERNELS, CAST))
    path, lines = write({}), []
    assert tune_masked([(768, 3072)], rows=[16, 128], directions=["forward"], report=lines.append) == path
    assert Table.load(path).entries == {SHAPE: {16: (KERNELS, CAST), 128: (KERNELS, CAST)}}
    assert lines[0] == "forward 768->3072 weight float32 16 rows: kernels 2.0 us, cast 3.0 us"
    assert dispatch.choose(SHAPE, 100, GPU) == KERNELS
    for shapes, options, message in (
        ([(768,)], {}, "shapes: expected"),
        ([(768, 20)], {}, "multiples of 16, got 768->20"),
        ([(768, 768)], {"dtype": torch.float32}, "the kernels multiply float16 and bfloat16"),
        ([(768, 768)], {"directions": ["up"]}, "directions: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            tune_masked(shapes, **options)
