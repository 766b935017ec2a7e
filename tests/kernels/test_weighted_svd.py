"""weighted_svd: as good as LAPACK's SVD in float64, within the documented bound."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing

from lpaf_kernels import weighted_singular_values, weighted_svd
from lpaf_kernels.ops.weighted_svd import ROW_WEIGHT_FLOOR, _floored, weighted_svd_reference

EPS = torch.finfo(torch.float32).eps


def with_spectrum(n: int, m: int, values: torch.Tensor) -> torch.Tensor:
    u = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q[:, : len(values)]
    v = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64)).Q[:, : len(values)]
    return (u * values) @ v.T


def matrices(n: int, m: int) -> dict[str, torch.Tensor]:
    short = min(n, m)
    pruned = torch.randn(n, m, dtype=torch.float64)
    pruned[::2] = 0
    return {
        "random": torch.randn(n, m, dtype=torch.float64),
        "flat spectrum": with_spectrum(n, m, torch.ones(short, dtype=torch.float64)),
        "ill-conditioned": with_spectrum(n, m, torch.logspace(0, -12, short, dtype=torch.float64)),
        "rank 3": with_spectrum(n, m, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)[:short]),
        "pruned rows": pruned,
        "zero": torch.zeros(n, m, dtype=torch.float64),
        "huge": 1e30 * torch.randn(n, m, dtype=torch.float64),
        "tiny": 1e-30 * torch.randn(n, m, dtype=torch.float64),
    }


def row_weights(n: int) -> dict[str, torch.Tensor | None]:
    spread = torch.logspace(0, -4, n)[torch.randperm(n)]
    some_zero = torch.rand(n)
    some_zero[::3] = 0
    return {"none": None, "spread": spread, "some zero": some_zero, "all zero": torch.zeros(n)}


def error(weight, a, b, d) -> float:
    return torch.linalg.norm(d * (weight.double() - a.double() @ b.double())).item()


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (24, 24), (9, 1), (1, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_as_good_as_the_reference(shape, dtype):
    for name, exact in matrices(*shape).items():
        weight = exact.to(dtype)
        for weighting, rows in row_weights(shape[0]).items():
            d = 1.0 if rows is None else _floored(rows)
            for rank in {1, min(3, *shape), min(8, *shape), min(shape)}:
                a, b = weighted_svd(weight, rank, rows)
                assert a.shape == (shape[0], rank)
                assert b.shape == (rank, shape[1])
                assert a.dtype == b.dtype == dtype
                best = error(weight, *weighted_svd_reference(weight, rank, rows), d)
                size = torch.linalg.norm(d * weight.double()).item()
                found = error(weight, a, b, d)
                assert found - best <= 1e-4 * best + 10 * EPS * size, (name, weighting, rank)


@pytest.mark.parametrize("shape", [(301, 258), (258, 600)])
@pytest.mark.parametrize("rank", [40, 200])
def test_float32_is_trusted_only_where_it_is_as_good(shape, rank, monkeypatch):
    """Large enough for the Gram matrix in parts; what float32 cannot tell apart is solved in float64."""
    from lpaf_kernels.ops import weighted_svd as module

    leading, solved = module._leading, []
    monkeypatch.setattr(module, "_leading", lambda dw, k: solved.append(dw.dtype) or leading(dw, k))
    for name, exact in matrices(*shape).items():
        weight = exact.float()
        for rows in (None, torch.rand(shape[0])):
            d = 1.0 if rows is None else _floored(rows)
            solved.clear()
            a, b = weighted_svd(weight, rank, rows)
            best = error(weight, *weighted_svd_reference(weight, rank, rows), d)
            size = torch.linalg.norm(d * weight.double()).item()
            assert error(weight, a, b, d) - best <= 1e-4 * best + 10 * EPS * size, name
            # More rank than the matrix has, or than float32 resolves; between the two, either will do.
            hard = name in ("rank 3", "zero") or (rank == 200 and name in ("ill-conditioned", "pruned rows"))
            easy = name in ("random", "huge", "tiny") or (rank == 40 and name in ("flat spectrum", "pruned rows"))
            assert solved[0] == torch.float32
            assert solved[1:] == [torch.float64] if hard else not (easy and solved[1:]), name


def test_matrices_of_a_list_do_not_depend_on_the_threads():
    weights = [torch.randn(30, 20) for _ in range(5)] + [with_spectrum(20, 30, torch.logspace(0, -12, 20)).float()]
    ranks = [3, 4, 5, 6, 7, 8]
    torch.set_num_threads(3)
    shared = weighted_svd(weights, ranks)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    for i, (weight, rank) in enumerate(zip(weights, ranks, strict=True)):
        alone = weighted_svd(weight, rank)
        assert torch.equal(shared[0][i], alone[0])
        assert torch.equal(shared[1][i], alone[1])


def test_gradients_through_threads():
    torch.set_num_threads(2)
    batch = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)
    rows = (torch.rand(3, 6, dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, d: weighted_svd(w, 2, d), (batch, rows))
    leaves = [weight.clone().requires_grad_() for weight in batch.detach()]
    assert torch.autograd.gradcheck(lambda *w: (*weighted_svd(w, [1, 2, 3])[0], *weighted_svd(w, 2)[1]), tuple(leaves))
    with torch.no_grad():
        assert not weighted_svd(leaves, 2)[0][0].requires_grad
    with torch.inference_mode():
        assert torch.equal(weighted_svd([leaf * 1 for leaf in leaves], 2)[0][0], weighted_svd(leaves[0], 2)[0])


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (2, 9, 5)])
def test_singular_values(shape):
    weight, rows = torch.randn(shape), torch.rand(shape[:-1])
    for d in (None, rows):
        exact = torch.linalg.svdvals(weight.double() if d is None else _floored(d) * weight.double())
        torch.testing.assert_close(weighted_singular_values(weight, d), exact, rtol=1e-7, atol=1e-7)
    first, second = weighted_singular_values([weight.reshape(-1, shape[-1]).requires_grad_()] * 2)
    assert torch.equal(first, second)
    assert not first.requires_grad
    assert (weighted_singular_values(torch.zeros(shape)) == 0).all()


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_lower_matmul_precision_and_autocast_change_nothing(precision):
    weight = torch.randn(300, 260)
    expected = weighted_svd(weight, 20)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = weighted_svd(weight, 20)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))


def test_every_thread_computes_in_full_precision(monkeypatch):
    """The setting is the process's: a thread that is done must not take it from one that is not."""
    from lpaf_kernels.ops import weighted_svd as module

    leading, seen = module._leading, []

    def record(dw, rank):
        before = torch.get_float32_matmul_precision()
        result = leading(dw, rank)
        seen.append((before, torch.get_float32_matmul_precision()))
        return result

    monkeypatch.setattr(module, "_leading", record)
    torch.set_num_threads(2)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        weighted_svd([torch.randn(24, 20), torch.randn(500, 400)] * 2, 8)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [("highest", "highest")] * 4


def test_factors_are_normalised():
    weight = torch.randn(20, 15, dtype=torch.float64)
    a, b = weighted_svd(weight, 6)
    torch.testing.assert_close(b @ b.T, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(a.norm(dim=0), torch.linalg.svdvals(weight)[:6])
    peaks = b.gather(1, b.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()
    # The sign belongs to the matrix, not to the solver's mood.
    flipped = weighted_svd(-weight, 6)
    torch.testing.assert_close(flipped[1], b)
    torch.testing.assert_close(flipped[0], -a)
    assert all(torch.equal(x, y) for x, y in zip(weighted_svd(weight, 6), (a, b), strict=True))


def test_zero_rows_stay_exactly_zero():
    weight = torch.randn(20, 15)
    weight[[3, 7]] = 0
    rows = torch.rand(20)
    rows[3] = 0
    for matrix in (weight, weight.repeat(1, 2)):
        a, _ = weighted_svd(matrix, 4, rows)
        assert (a[[3, 7]] == 0).all()
        assert (a[0] != 0).all()


def test_row_weights_are_floored():
    weight = torch.randn(20, 15, dtype=torch.float64)
    rows = torch.rand(20, dtype=torch.float64)
    rows[4] = 0
    raised = rows.clone()
    raised[4] = ROW_WEIGHT_FLOOR * rows.max()
    for x, y in zip(weighted_svd(weight, 4, rows), weighted_svd(weight, 4, raised), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(weighted_svd(weight, 4, torch.zeros(20)), weighted_svd(weight, 4), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    weight = torch.randn(20, 15).to(dtype)
    a, b = weighted_svd(weight, 4)
    wide = weighted_svd(weight.float(), 4)
    assert torch.equal(a, wide[0].to(dtype))
    assert torch.equal(b, wide[1].to(dtype))


def test_batches_and_lists():
    batch, rows = torch.randn(2, 3, 12, 9), torch.rand(2, 3, 12)
    a, b = weighted_svd(batch, 4, rows)
    assert a.shape == (2, 3, 12, 4)
    assert b.shape == (2, 3, 4, 9)
    for i in range(2):
        for j in range(3):
            one = weighted_svd(batch[i, j], 4, rows[i, j])
            torch.testing.assert_close(one[0] @ one[1], a[i, j] @ b[i, j])
    weights = [torch.randn(12, 9), torch.randn(9, 12), torch.randn(12, 9).double(), torch.randn(12, 9)]
    weights[1] = weights[1].t().contiguous().t()
    vectors = [torch.rand(weight.shape[0]) for weight in weights]
    for d in (None, vectors):
        list_a, list_b = weighted_svd(weights, 4, d)
        for i, weight in enumerate(weights):
            one = weighted_svd(weight, 4, None if d is None else d[i])
            torch.testing.assert_close(list_a[i], one[0])
            torch.testing.assert_close(list_b[i], one[1])
    assert weighted_svd(torch.empty(0, 4, 3), 2)[0].shape == (0, 4, 2)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (2, 4, 4)])
def test_gradcheck(shape):
    weight = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    rows = (torch.rand(shape[:-1], dtype=torch.float64) + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, d: weighted_svd(w, 2, d), (weight, rows))
    assert torch.autograd.gradcheck(lambda w: weighted_svd(w, 3), (weight,))


def test_gradient_of_the_product_with_equal_singular_values():
    weight = with_spectrum(6, 5, torch.tensor([2.0, 2.0, 1.0, 0.5, 0.25], dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: torch.matmul(*weighted_svd(w, 2)), (weight,), atol=1e-4)


def test_opcheck():
    op = torch.ops.lpaf_kernels.weighted_svd
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    rows = (torch.rand(7, dtype=torch.float64) + 0.1).requires_grad_()
    torch.library.opcheck(op, (weight, 3, None))
    torch.library.opcheck(op, (weight, 3, rows))
    torch.library.opcheck(op, (torch.randn(2, 4, 6), 3, torch.rand(2, 4)))


def test_compiles_and_exports_whole():
    def product(weight: torch.Tensor) -> torch.Tensor:
        a, b = weighted_svd(weight, 3)
        return a @ b

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(product, fullgraph=True, backend=counter)
    for rows in (8, 12, 20):
        weight = torch.randn(rows, 6)
        torch._dynamo.mark_dynamic(weight, 0, min=6, max=64)
        torch.testing.assert_close(compiled(weight), product(weight))
    assert counter.frame_count == 1

    class Product(torch.nn.Module):
        def forward(self, weight):
            return product(weight)

    weight = torch.randn(8, 6)
    program = torch.export.export(Product(), (weight,))
    torch.testing.assert_close(program.module()(weight), product(weight))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("x", 2), TypeError, "weights: expected a tensor or a list of tensors, got str"),
        (([], 2), ValueError, "weights: expected at least one matrix"),
        ((torch.ones(4, 3).int(), 2), TypeError, "weights: expected float32.*got torch.int32"),
        ((torch.ones(4), 2), ValueError, r"weights: expected shape \[..., n, m\], got \[4\]"),
        (([torch.ones(2, 4, 3)], 2), ValueError, r"weights\[0\]: expected shape \[n, m\]"),
        ((torch.ones(4, 3), 0), ValueError, r"rank: expected 1 to 3 for weights of shape \[4, 3\], got 0"),
        ((torch.ones(4, 3), 4), ValueError, "rank: expected 1 to 3 .*got 4"),
        (([torch.ones(4, 4), torch.ones(4, 3)], 4), ValueError, r"rank: expected 1 to 3 for weights\[1\]"),
        ((torch.ones(4, 3), 2.0), TypeError, "rank: expected an integer, got 2.0"),
        (([torch.ones(4, 3)], [2, 2]), ValueError, r"rank: expected 1 ranks \(one per matrix\), got 2"),
        (([torch.ones(4, 3)] * 2, [2, 4]), ValueError, r"rank\[1\]: expected 1 to 3 for weights\[1\] .*got 4"),
        ((torch.ones(4, 3), True), TypeError, "rank: expected an integer, got True"),
        ((torch.ones(4, 3), 2, torch.ones(3)), ValueError, r"row_weights: expected shape \[4\]"),
        ((torch.ones(4, 3), 2, torch.ones(4).int()), TypeError, "row_weights: expected float32"),
        ((torch.ones(4, 3), 2, -torch.ones(4)), ValueError, "row_weights: expected finite values >= 0"),
        ((torch.ones(4, 3), 2, torch.full((4,), torch.inf)), ValueError, "row_weights: expected finite"),
        ((torch.full((4, 3), torch.nan), 2), ValueError, "weights: expected finite values"),
        (
            ([torch.ones(4, 3)], 2, [torch.ones(4)] * 2),
            ValueError,
            "row_weights: expected a list of 1 vectors",
        ),
    ],
)
def test_bad_input(arguments, error, text):
    with pytest.raises(error, match=text):
        weighted_svd(*arguments)
