"""keep_threshold: exact against a sort."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lpaf_kernels import KeepThreshold, keep_threshold
from lpaf_kernels.ops.keep_threshold import _keep_threshold, _select, keep_threshold_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHARES = [0.0, 0.1, 1 / 3, 0.5, 0.9, 0.999, 1.0]
NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the tensors of a test are made."""
    with torch.device(request.param):
        yield request.param


def patterns(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tiny = torch.finfo(dtype).smallest_normal
    ties = torch.randint(-2, 3, (301,)).to(dtype)
    return {
        "random": torch.randn(17, 31).to(dtype),
        "ties": ties,
        "all equal": torch.zeros(64, dtype=dtype),
        "signed zeros": torch.tensor([0.0, -0.0, 0.0, -0.0, -0.0, 1.0, -1.0], dtype=dtype),
        "infinities": torch.tensor([math.inf, -math.inf, 0.0, math.inf, -math.inf, 2.0], dtype=dtype),
        "all infinite": torch.full((9,), math.inf, dtype=dtype),
        "all minus infinite": torch.full((9,), -math.inf, dtype=dtype),
        "denormals": torch.tensor([tiny / 2, -tiny / 2, tiny / 4, 0.0, -0.0, tiny / 4, tiny], dtype=dtype),
        "extremes": torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min, 1.0, -1.0], dtype=dtype),
        "one": torch.tensor([3.0], dtype=dtype),
        "scalar": torch.tensor(3.0, dtype=dtype),
        "strided": torch.randn(14, 10).to(dtype)[::2, 1::3],
        "empty": torch.empty(0, dtype=dtype),
    }


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", SHARES)
def test_matches_the_sort(dtype, keep):
    for name, scores in patterns(dtype).items():
        threshold = keep_threshold(scores, keep)
        expected = keep_threshold_reference([scores], keep)[0]
        assert torch.equal(threshold.mask(scores), expected), name
        assert threshold.count(scores).item() == math.floor(keep * scores.numel() + 0.5), name
        assert threshold.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert threshold.value.shape == threshold.tie_index.shape == ()
        assert threshold.tie_index.dtype == torch.int64


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["matrix", "global"])
@pytest.mark.parametrize("weighted", [False, True])
def test_lists(dtype, scope, weighted):
    tensors = list(patterns(dtype).values())
    weights = [torch.randint(1, 9, tensor.shape) for tensor in tensors] if weighted else None
    for keep in SHARES:
        thresholds = keep_threshold(tensors, keep, scope, weights)
        expected = keep_threshold_reference(tensors, keep, scope, weights)
        for threshold, scores, mask in zip(thresholds, tensors, expected, strict=True):
            assert torch.equal(threshold.mask(scores), mask)
        if scope == "global":
            assert len({threshold.value.item() for threshold in thresholds}) == 1


entries = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, 1e-40, -1e-40]) | st.floats(
    width=32, allow_nan=False
)


@pytest.mark.parametrize("place", DEVICES)
@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.tuples(entries, st.integers(1, 2000)), min_size=1, max_size=30), min_size=1, max_size=3),
    keep=st.floats(0, 1),
    scope=st.sampled_from(["matrix", "global"]),
    weighted=st.booleans(),
)
def test_matches_the_sort_on_anything(rows, keep, scope, weighted, place):
    scores = [torch.tensor([score for score, _ in row], dtype=torch.float32, device=place) for row in rows]
    weights = [torch.tensor([weight for _, weight in row], device=place) for row in rows] if weighted else None
    thresholds = keep_threshold(scores, keep, scope, weights)
    for threshold, tensor, mask in zip(
        thresholds, scores, keep_threshold_reference(scores, keep, scope, weights), strict=True
    ):
        assert torch.equal(threshold.mask(tensor).cpu(), mask)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_large_tensors_match_a_stable_sort(weighted, threads):
    torch.set_num_threads(threads)
    scores = [torch.randn(700, 600).round(decimals=2), torch.zeros(300, 500), torch.randn(5)]
    weights = [torch.randint(1, 800, tensor.shape) for tensor in scores] if weighted else None
    for across in (False, True):
        actual = torch.ops.lpaf_kernels.keep_threshold(scores, 0.37, across, weights)
        value, tie_index = _keep_threshold(scores, 0.37, across, weights)
        for i, tensor in enumerate(scores):
            expected = KeepThreshold(value[i], tie_index[i]).mask(tensor)
            assert torch.equal(KeepThreshold(actual[0][i], actual[1][i]).mask(tensor), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_sample_decides_nothing(dtype, threads):
    """Sizes that are bracketed by a sample: smooth, tied, clustered and adversarial scores, at every kept share."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(150, 200, generator=generator)
    spikes = torch.where(torch.rand(150, 200, generator=generator) < 0.999, 0.0, normal)
    runs = torch.arange(30_000.0).view(150, 200)
    clusters = torch.randint(0, 9, (150, 200), generator=generator) + (normal > 2) * normal
    matrices = [scores.to(dtype) for scores in (normal, spikes, runs, -runs, clusters, torch.zeros(150, 200))]
    for keep in (1e-4, 0.01, 0.1, 1 / 3, 0.5, 0.9, 0.9995, 1 - 1e-5):
        for scores in (matrices, matrices[:2]):
            for scope in ("matrix", "global"):
                thresholds = keep_threshold(scores, keep, scope)
                value, tie_index = _keep_threshold(scores, keep, scope == "global", None)
                for i, tensor in enumerate(scores):
                    expected = KeepThreshold(value[i], tie_index[i]).mask(tensor)
                    assert torch.equal(thresholds[i].mask(tensor), expected), (i, keep, scope)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_ten_million_scores(keep):
    torch.set_num_threads(2)
    for scores in (torch.randn(10_000_000), torch.randn(10_000_000).round(decimals=1), torch.zeros(10_000_000)):
        threshold = keep_threshold(scores, keep)
        value, tie_index = _keep_threshold([scores], keep, False, None)
        assert torch.equal(threshold.mask(scores), KeepThreshold(value[0], tie_index[0]).mask(scores))
        assert threshold.count(scores) == round(keep * scores.numel())


def test_nan_is_found_among_many_matrices():
    torch.set_num_threads(2)
    scores = [torch.randn(100, 100) for _ in range(12)]
    scores[7][50, 50] = math.nan
    scores[9][0, 0] = math.nan
    for scope in ("matrix", "global"):
        with pytest.raises(ValueError, match=r"^scores\[7\] holds NaN"):
            keep_threshold(scores, 0.5, scope)


@pytest.mark.usefixtures("device")
def test_nothing_and_everything():
    scores = torch.randn(6)
    assert keep_threshold(scores, 0.0) == (math.inf, 0)
    assert keep_threshold(scores, 1.0) == (-math.inf, 6)
    assert keep_threshold(scores, 0.1, weights=torch.full((6,), 100)) == (math.inf, 0)


@pytest.mark.usefixtures("device")
def test_same_result_every_time():
    scores = torch.randint(0, 5, (1000, 300)).float()
    first = keep_threshold(scores, 0.5)
    assert all(keep_threshold(scores, 0.5) == first for _ in range(3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_fallback_gives_where_nothing_is_raised(dtype):
    scores, ones = torch.randn(20).to(dtype), torch.ones(20, dtype=torch.int64)
    assert not _select(scores, 0.5, ones)[0].isnan()
    for count in (0, -1, 1 << 58):
        weights = ones.clone()
        weights[3] = count
        value, tie_index = _select(scores, 0.5, weights)
        assert value.isnan()
        assert tie_index == 0
    scores[7] = math.nan
    for weights in (None, ones):
        value, tie_index = _select(scores, 0.5, weights)
        assert value.isnan()
        assert tie_index == 0


@pytest.mark.usefixtures("device")
def test_is_not_differentiated():
    scores = torch.randn(6, requires_grad=True)
    threshold = keep_threshold(scores, 0.5)
    assert not threshold.value.requires_grad
    value, tie_index = torch.ops.lpaf_kernels.keep_threshold([scores], 0.5, False, None)
    assert not value.requires_grad
    assert not tie_index.requires_grad


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("across", [False, True])
def test_opcheck(across, weighted):
    scores = [torch.randn(4, 3), torch.randn(5)]
    weights = [torch.randint(1, 5, tensor.shape) for tensor in scores] if weighted else None
    torch.library.opcheck(torch.ops.lpaf_kernels.keep_threshold, (scores, 0.5, across, weights))


def test_compiles_whole():
    def prune(scores: list[torch.Tensor], keep: float) -> list[torch.Tensor]:
        return [t.mask(s) for t, s in zip(keep_threshold(scores, keep, "global"), scores, strict=True)]

    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")
    for keep in (0.2, 0.5, 0.7):
        scores = [torch.randn(4, 3), torch.randn(5)]
        for actual, expected in zip(compiled(scores, keep), prune(scores, keep), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("x", 0.5), TypeError, "scores: expected a tensor or a list of tensors, got str"),
        (([], 0.5), ValueError, "scores: expected at least one tensor"),
        (
            (torch.ones(3, dtype=torch.int64), 0.5),
            TypeError,
            r"scores\[0\]: expected float32.*got torch.int64",
        ),
        (([torch.ones(3), torch.ones(3).half()], 0.5), TypeError, r"scores\[1\]: expected torch.float32"),
        (([torch.ones(3), 1.0], 0.5), TypeError, r"scores\[1\]: expected a torch.Tensor, got float"),
        (
            ([torch.ones(3), torch.ones(3, device="meta")], 0.5),
            ValueError,
            r"scores\[1\]: expected device cpu",
        ),
        ((torch.ones(3), 1.5), ValueError, r"keep: expected a number in \[0, 1\], got 1.5"),
        ((torch.ones(3), -0.1), ValueError, "keep: .*got -0.1"),
        ((torch.ones(3), math.nan), ValueError, "keep: .*got nan"),
        ((torch.ones(3), "half"), TypeError, "keep: .*got 'half'"),
        ((torch.ones(3), True), TypeError, "keep: .*got True"),
        ((torch.ones(3), 0.5, "row"), ValueError, "scope: expected one of matrix, global, got 'row'"),
        (([torch.ones(3)], 0.5, "matrix", []), ValueError, "weights: expected at least one tensor"),
        (
            ([torch.ones(3)], 0.5, "matrix", [torch.ones(3).long()] * 2),
            ValueError,
            r"weights: expected 1 tensors \(one per tensor of scores\), got 2",
        ),
        ((torch.ones(3), 0.5, "matrix", torch.ones(3)), TypeError, r"weights\[0\]: expected int64"),
        (
            (torch.ones(3), 0.5, "matrix", torch.ones(2).long()),
            ValueError,
            r"weights\[0\]: expected shape \[3\]",
        ),
        ((torch.ones(3), 0.5, "matrix", torch.tensor([1, 0, 1])), ValueError, r"weights\[0\] .*not positive"),
        (
            ([torch.ones(3), torch.tensor([1.0, math.nan])], 0.5),
            ValueError,
            r"^scores\[1\] holds NaN, expected numbers",
        ),
        (([torch.ones(3), torch.tensor([math.nan])], 0.5, "global"), ValueError, r"scores\[1\] holds NaN"),
        ((torch.full((3,), math.nan, dtype=torch.float64), 0.5), ValueError, r"scores\[0\] holds NaN"),
        ((torch.full((3,), math.nan, dtype=torch.bfloat16), 1.0), ValueError, r"scores\[0\] holds NaN"),
    ],
)
def test_bad_input(arguments, error, text):
    with pytest.raises(error, match=text):
        keep_threshold(*arguments)
