"""Every provider that a CPU can run is right, and one that is wrong gets no time."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import exported, measure, timing
from benchmarks.cases import AttentionCase, EncoderCase, FfnCase, LinearCase, MaskedCase
from benchmarks.environment import Ceilings, describe
from benchmarks.errors import InputError
from benchmarks.gate import Gate
from benchmarks.measure import Measurement, Session
from benchmarks.problem import make_problem
from benchmarks.providers import PROVIDERS, Provider, Runner, choose
from benchmarks.rows import REQUIRED

CPU = torch.device("cpu")
ENCODER = EncoderCase(hidden=24, intermediate=48, heads=3, layers=2, rank=5, batch=2, length=8)
CASES = (
    LinearCase(40, 24, 5, 0, 17),
    LinearCase(40, 24, 5, 6, 17),
    LinearCase(40, 24, 5, 6, 17, direction="forward+backward"),
    LinearCase(24, 40, 5, 0, 16, direction="forward+backward"),
    LinearCase(64, 96, 16, 10, 33, "bfloat16"),
    LinearCase(64, 96, 16, 10, 33, "bfloat16", "forward+backward"),
    MaskedCase(40, 24, 17),
    MaskedCase(40, 24, 17, direction="forward"),
    MaskedCase(64, 96, 33, "bfloat16"),
    FfnCase(hidden=24, intermediate=48, rank=5, batch=2, length=8),
    AttentionCase(hidden=24, heads=3, rank=5, batch=2, length=8),
    ENCODER,
    dataclasses.replace(ENCODER, dtype="bfloat16"),
)


# Of the dense weight, and of what the others hold.
GRADIENTS = {"linear": ({"d_weight"}, {"d_down", "d_up"}), "masked": ({"d_pruned"}, {"d_weight", "d_scores"})}


def session(*names: str, extra: dict[str, Provider] | None = None) -> Session:
    return Session(CPU, describe(CPU), Ceilings(1e10, 1e11), choose(names, CPU, extra or {}))


def test_the_registry_has_all_that_speed_is_claimed_against():
    onnx = {"dense_onnxruntime", "onnxruntime"}
    baselines = {"dense", "dense_compile", "chain", "chain_graph", "compile", "compile_b2b"} | onnx
    linears = {"ours", "ours_graph", "ours_one_kernel", "ours_two_kernels", "ours_chain", "ours_dense"}
    masked = {"ours_cast", "ours_kernels"}
    assert set(PROVIDERS) == baselines | linears | masked | {"ours_layers", "ours_block"}
    blocks = {"ffn", "attention", "encoder"}
    runs = {name: {"linear"} | blocks for name in PROVIDERS}
    runs |= dict.fromkeys(("dense_compile", "ours_layers", "ours_block", *onnx), blocks)
    runs |= {name: {"masked"} for name in masked}
    for name in ("dense", "chain", "chain_graph", "compile", "ours", "ours_graph"):
        runs[name] = runs[name] | {"masked"}
    assert {name: set(provider.builds) for name, provider in PROVIDERS.items()} == runs
    assert all(name == provider.name and provider.summary for name, provider in PROVIDERS.items())
    assert set(choose(["default"], CPU, {})) == {"dense", "chain", "ours"}
    assert set(choose(["all"], torch.device("cuda"), {})) == set(PROVIDERS) - onnx
    assert {"chain_graph", "ours_graph", "ours_one_kernel"} <= set(choose(["default"], torch.device("cuda"), {}))
    # max-autotune takes minutes a cell: only when asked for.
    assert "compile" not in choose(["default"], torch.device("cuda"), {})


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["dense", "chain", "ours", "ours_layers"])
def test_every_eager_provider_passes_the_gate(name, case):
    if case.op not in PROVIDERS[name].builds:
        assert PROVIDERS[name].unavailable(case, CPU) == f"does not run {case.op}"
        return
    problem = make_problem(case, CPU)
    runner = PROVIDERS[name].build(problem)
    verdict = Gate(problem).check(runner)
    assert verdict.failed is None
    assert 0 <= verdict.error <= verdict.allowed
    outputs = runner.run()
    expected = {"y"}
    if case.direction == "forward+backward":
        dense, factors = GRADIENTS[case.op]
        expected |= {"d_x", "d_bias"} | (dense if name == "dense" else factors)
    assert set(outputs) == expected
    assert not outputs["y"].is_inference()
    assert outputs["y"].requires_grad == (case.direction == "forward+backward")


def test_the_reference_is_autograds_derivative():
    problem = make_problem(LinearCase(10, 7, 3, 2, 5, direction="forward+backward"), CPU)
    x, down, up, bias = (
        tensor.double().requires_grad_() for tensor in (problem.x[0], problem.down, problem.up, problem.bias)
    )
    weight = (up.t() @ down[:3]).index_add(0, problem.kept, down[3:])
    y = x @ weight.t() + bias
    grads = torch.autograd.grad(y, (x, down, up, bias, weight), problem.grad[0].double())
    expected = dict(zip(("y", "d_x", "d_down", "d_up", "d_bias", "d_weight"), (y, *grads)))
    reference = problem.reference()
    assert reference.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(reference[name], value.detach())


def test_the_masked_reference_is_the_definition():
    problem = make_problem(MaskedCase(10, 7, 5, "bfloat16"), CPU)
    assert problem.weight.dtype == problem.scores.dtype == torch.float32
    assert problem.x[0].dtype == torch.bfloat16
    x, grad, weight = problem.x[0].double(), problem.grad[0].double(), problem.weight.double()
    mask = problem.scores >= 0
    assert torch.equal(problem.masked_weight, problem.weight * mask + 0.0)
    assert 0.2 < mask.double().mean() < 0.8
    g = grad.t() @ x
    expected = {"y": x @ (weight * mask).t() + problem.bias.double(), "d_x": grad @ (weight * mask)}
    expected |= {"d_weight": mask * g, "d_scores": weight * g, "d_bias": grad.sum(0), "d_pruned": g}
    reference = problem.reference()
    assert reference.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(reference[name], value)


def test_inputs_are_random_and_repeatable():
    case = LinearCase(40, 24, 5, 6, 400)
    one, two = make_problem(case, CPU), make_problem(case, CPU)
    assert torch.equal(one.x[0], two.x[0])
    assert one.x[0].std() == pytest.approx(1, abs=0.05)
    assert one.reference()["y"].std() == pytest.approx(2**0.5, rel=0.2)
    assert one.kept.dtype == torch.int32
    assert bool((one.kept[1:] > one.kept[:-1]).all())
    assert len(make_problem(case, CPU, sets=3).x) == 3


def changed(scale: float) -> Provider:
    """Ours, with y multiplied."""

    def build(problem):
        right = PROVIDERS["ours"].build(problem)
        return dataclasses.replace(right, outputs=lambda raw: {"y": right.outputs(raw)["y"] * scale})

    return Provider("changed", "wrong on purpose", {"linear": build})


@pytest.mark.parametrize(("scale", "word"), [(1 + 1e-4, "error"), (float("nan"), "nan")])
def test_a_wrong_provider_has_no_time(scale, word):
    measurement = Measurement(CASES[1], session("chain", "ours", extra={"changed": changed(scale)}))
    measurement.time(0.01)
    rows = {row["provider"]: row for row in measurement.rows()}
    assert word in rows["changed"]["failed"]
    for key in ("median_us", "p20_us", "p80_us", "roofline_share"):
        assert rows["changed"][key] is None
        assert rows["ours"][key] > 0
    assert rows["changed"]["rounds"] == 0
    assert rows["ours"]["failed"] is None
    assert rows["ours"]["max_error"] <= rows["ours"]["max_error_allowed"]
    assert (rows["changed"]["max_error"] is None) == (word == "nan")


def test_a_wrong_gradient_fails_the_gate():
    problem = make_problem(CASES[2], CPU)
    outputs = PROVIDERS["chain"].build(problem).run()
    gate = Gate(problem)
    assert gate.judge(outputs).failed is None
    outputs["d_down"] = outputs["d_down"].roll(1, 0)
    verdict = gate.judge(outputs)
    assert verdict.output == "d_down"
    assert verdict.failed.startswith("d_down: error")
    assert "shape" in gate.judge({"y": torch.zeros(3)}).failed


def test_a_provider_that_raises_or_refuses_leaves_the_others_alone():
    def breaks(problem):
        raise RuntimeError("out of shared memory\nand more")

    extra = {
        "broken": Provider("broken", "raises", {"linear": breaks}),
        "picky": Provider("picky", "refuses", {"linear": breaks}, refuse=lambda case: "only even M"),
        "other": Provider("other", "another operation", {"ffn": breaks}),
        "gpu": Provider("gpu", "another device", {"linear": breaks}, devices=("cuda",)),
    }
    measurement = Measurement(CASES[0], session("chain", extra=extra))
    assert measurement.failed == {
        "broken": "RuntimeError: out of shared memory",
        "picky": "not run: only even M",
        "other": "not run: does not run linear",
        "gpu": "not run: runs on cuda only",
    }
    measurement.time(0.01)
    rows = measurement.rows()
    assert [row["provider"] for row in rows if row["median_us"] is not None] == ["chain"]
    assert all(set(REQUIRED) <= set(row) for row in rows)


def test_a_case_that_does_not_fit_in_memory_has_no_times(monkeypatch):
    def too_large(problem):
        raise torch.OutOfMemoryError("tried to allocate 90 GiB")

    monkeypatch.setattr(measure, "Gate", too_large)
    measurement = Measurement(CASES[0], session("chain", "ours"))
    measurement.time(0.01)
    rows = measurement.rows()
    assert [row["median_us"] for row in rows] == [None, None]
    assert all("90 GiB" in row["failed"] for row in rows)


def test_a_row_says_what_was_measured():
    case = CASES[1]
    measurement = Measurement(case, session("dense", "chain"))
    measurement.time(0.01)
    dense, chain = measurement.rows()
    assert chain["bytes"] == case.bytes()
    assert dense["bytes"] == case.bytes("dense")
    least = max(case.flops() / 1e11, case.bytes() / 1e10)
    assert chain["roofline_share"] == pytest.approx(1e6 * least / chain["median_us"])
    assert chain["p20_us"] <= chain["median_us"] <= chain["p80_us"]
    assert isinstance(chain["peak_bytes"], int) == timing.CLEAR_REFS.exists()
    assert chain["run"] == dense["run"] == measurement.session.run
    assert chain["torch"] == torch.__version__


def test_calls_run_in_the_runners_context():
    entered = []

    class Context:
        def __enter__(self):
            entered.append("in")

        def __exit__(self, *_):
            entered.append("out")

    Runner(lambda index: entered.append("call"), lambda raw: {}, Context).run()
    assert entered == ["in", "call", "out"]


@pytest.mark.parametrize("name", ["fastest", "chain_graph"])
def test_bad_provider_names_are_refused(name):
    with pytest.raises(InputError, match=f"--providers {name}"):
        choose([name], CPU, {})


@pytest.mark.slow
def test_the_compiled_chain_passes_the_gate():
    for case in (CASES[1], CASES[2], ENCODER):
        problem = make_problem(case, CPU)
        assert Gate(problem).check(PROVIDERS["compile"].build(problem)).failed is None


@pytest.mark.skipif(exported.missing(ENCODER) is not None, reason=str(exported.missing(ENCODER)))
@pytest.mark.parametrize("name", ["dense_onnxruntime", "onnxruntime"])
def test_the_exported_encoder_passes_the_gate(name):
    problem = make_problem(ENCODER, CPU)
    assert Gate(problem).check(PROVIDERS[name].build(problem)).failed is None


def test_what_onnxruntime_cannot_run_is_said(monkeypatch):
    monkeypatch.setattr(exported, "PACKAGES", ())
    assert exported.missing(ENCODER) is None
    assert exported.missing(dataclasses.replace(ENCODER, dtype="bfloat16")) == "measured in float32 only"
    monkeypatch.setattr(exported, "PACKAGES", ("no_such_package",))
    assert "no_such_package not installed" in exported.missing(ENCODER)
