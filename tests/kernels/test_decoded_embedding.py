"""decoded_embedding and DecodedEmbedding."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import native
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lpaf_kernels import DecodedEmbedding, decoded_embedding
from lpaf_kernels.ops import decoded_embedding as op
from lpaf_kernels.ops.decoded_embedding import decoded_embedding_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HIDDEN = [(), (9,), (9, 17)]
SHAPES = [(5,), (), (2, 3), (0,), (2, 0, 4), (1, 1), (300,)]
needs_native = pytest.mark.skipif(not op._HAS_NATIVE, reason="_ops_cpu.so was not built")


def make(
    shape=(5,), vocabulary=11, latent=7, hidden=(), dim=13, dtype=torch.float32, bias=True, norms=True,
    index=torch.int64,
):  # fmt: skip
    widths = (latent, *hidden, dim)
    parameters = [torch.randn(vocabulary, latent)]
    for a, b in pairwise(widths):
        parameters += [torch.randn(a, b) / a**0.5, torch.randn(b) if bias else None]
    parameters.append(torch.rand(vocabulary) + 0.5 if norms else None)
    parameters = [None if t is None else t.to(dtype).requires_grad_() for t in parameters]
    # The first id twice at least, where there is room.
    ids = torch.randint(vocabulary, shape, dtype=index)
    if ids.numel() > 1:
        ids.view(-1)[-1] = ids.view(-1)[0]
    return ids, parameters


def call(function, ids, parameters, padding_idx=None):
    latent, *layers, norms = parameters
    return function(ids, latent, list(zip(layers[::2], layers[1::2])), norms, padding_idx)


def results(function, ids, parameters, grad, padding_idx=None, dtype=None):
    """y and the gradients of every parameter."""
    leaves = parameters
    if dtype is not None:
        leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in parameters]
    y = call(function, ids, leaves, padding_idx)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], grad.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bias", "norms"), [(True, True), (False, False), (True, False)])
def test_forward_and_backward(dtype, hidden, shape, bias, norms, assert_accurate):
    index = torch.int32 if bias else torch.int64
    padding_idx = 3 if norms else None
    # The largest error of a handful of entries is a matter of luck: several draws are measured together.
    draws = []
    for _ in range(60 if math.prod(shape) < 10 else 12):
        ids, parameters = make(shape, hidden=hidden, dtype=dtype, bias=bias, norms=norms, index=index)
        grad = torch.randn(*shape, 13).to(dtype)
        actual = results(decoded_embedding, ids, parameters, grad, padding_idx)
        chain = results(decoded_embedding_reference, ids, parameters, grad, padding_idx)
        exact = results(decoded_embedding_reference, ids, parameters, grad, padding_idx, torch.float64)
        draws.append(list(zip(actual, chain, exact, strict=True)))
    for same in zip(*draws, strict=True):
        assert_accurate(*map(torch.stack, zip(*same, strict=True)))


@needs_native
@pytest.mark.parametrize("seeds", [range(start, start + 20) for start in range(0, 60, 20)], ids=str)
def test_native_path(seeds, instruction_set):
    for seed in seeds:
        instruction_set(native.check_decoded_embedding, seed)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradcheck(hidden, padding_idx):
    ids, parameters = make((4,), vocabulary=5, hidden=hidden, dtype=torch.float64)
    ids = torch.tensor([2, 0, 4, 0])
    if padding_idx is not None:
        ids = torch.tensor([1, 0, 4, 0])  # differences would see the row that no gradient is to see
    assert torch.autograd.gradcheck(lambda *leaves: call(decoded_embedding, ids, leaves, padding_idx), parameters)


def test_linear_by_hand():
    ids, (latent, weight, bias, norms) = make((4,))
    y = decoded_embedding(ids, latent, [(weight, bias)], norms)
    torch.testing.assert_close(y, F.normalize(latent[ids] @ weight + bias, dim=-1) * norms[ids][:, None])
    torch.testing.assert_close(y.norm(dim=1), norms[ids])


def test_hidden_layers_by_hand():
    ids, (latent, w1, b1, w2, b2, _) = make((4,), hidden=(9,), norms=False)

    def leaky(t):
        return torch.where(t > 0, t, 0.01 * t)

    expected = torch.tanh(leaky(leaky(latent[ids]) @ w1 + b1) @ w2 + b2)
    torch.testing.assert_close(decoded_embedding(ids, latent, [(w1, b1), (w2, b2)]), expected)


def test_backward_sums_repeated_ids():
    ids, parameters = make((1,))
    ids = torch.tensor([4, 1, 4, 4])
    grad = torch.randn(4, 13)
    together = results(decoded_embedding, ids, parameters, grad)[1:]
    alone = [results(decoded_embedding, ids[i : i + 1], parameters, grad[i : i + 1])[1:] for i in range(4)]
    for whole, *parts in zip(together, *alone, strict=True):
        torch.testing.assert_close(whole, sum(parts))
    touched = together[0].any(1)
    assert touched.nonzero().flatten().tolist() == [1, 4]


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_backward_of_few_distinct_ids(hidden, padding_idx, assert_accurate):
    """Gradients are summed per id before they go through the decoder, or not: the same within rounding."""
    ids, parameters = make((1,), vocabulary=400, hidden=hidden)
    few, many = torch.randint(7, (64,)), torch.arange(64) + 3
    for ids, distinct in ((few, True), (many, False)):
        assert (ids.unique().numel() < op._DISTINCT_SHARE * ids.numel()) == distinct
        grad = torch.randn(64, 13)
        found = results(decoded_embedding, ids, parameters, grad, padding_idx)
        chain = results(decoded_embedding_reference, ids, parameters, grad, padding_idx)
        exact = results(decoded_embedding_reference, ids, parameters, grad, padding_idx, torch.float64)
        for same in zip(found, chain, exact, strict=True):
            assert_accurate(*same)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_repeated_ids_have_the_same_row(hidden):
    _, parameters = make((1,), vocabulary=600, hidden=hidden)
    ids = torch.randint(600, (3000,), dtype=torch.int32)
    with torch.no_grad():
        alone = call(decoded_embedding, torch.arange(600), parameters)
        torch.testing.assert_close(call(decoded_embedding, ids, parameters), alone[ids])
        if op._HAS_NATIVE:
            assert call(decoded_embedding, ids, parameters).equal(alone[ids])


def test_padding_contributes_to_no_gradient():
    _, parameters = make((1,))
    grad = torch.randn(3, 13)
    with_padding = results(decoded_embedding, torch.tensor([4, 2, 4]), parameters, grad, padding_idx=2)
    without = results(decoded_embedding, torch.tensor([4, 4]), parameters, grad[[0, 2]])
    for a, b in zip(with_padding[1:], without[1:], strict=True):
        torch.testing.assert_close(a, b)
    # Its row is decoded like every other.
    assert with_padding[0][1].equal(call(decoded_embedding, torch.tensor(2), parameters))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_has_no_direction(dtype):
    ids, parameters = make(bias=False, dtype=dtype)
    with torch.no_grad():
        parameters[0][ids[0]] = 0
    y, *grads = results(decoded_embedding, ids, parameters, torch.ones(5, 13))
    assert not y[0].any()
    assert all(grad.isfinite().all() for grad in grads)


def test_nan_stays_in_its_row():
    ids, parameters = make()
    ids = torch.tensor([0, 1, 2])
    with torch.no_grad():
        parameters[0][1, 0] = torch.nan
    y = call(decoded_embedding, ids, parameters)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("ids", "wrong"), [([0, 11], 11), ([-1, 4], -1), ([2**31 - 1], 2**31 - 1)])
def test_ids_out_of_range(dtype, index, ids, wrong):
    _, parameters = make(dtype=dtype)
    with pytest.raises(IndexError, match=f"ids: expected 0 to 10, got {wrong}"):
        call(decoded_embedding, torch.tensor(ids, dtype=index), parameters)


@needs_native
def test_the_native_kernel_checks_its_own_arguments():
    ids, (latent, weight, bias, norms) = make()
    forward = torch.ops.lpaf_kernels.decoded_embedding_forward
    rest = (bias, None, None, None, None)
    for text, arguments in (
        (r"ids\[1\] is 11, expected 0 to 10", (torch.tensor([0, 11]), latent, weight, *rest, norms)),
        ("weight1 has shape", (ids, latent[:, 1:], weight, *rest, norms)),
        ("bias1 has shape", (ids, latent, weight, bias[1:], *rest[1:], norms)),
        ("norms has shape", (ids, latent, weight, *rest, norms[1:])),
        ("latent has dtype Double", (ids, latent.double(), weight, *rest, norms)),
        ("ids has dtype Short", (ids.short(), latent, weight, *rest, norms)),
    ):
        # Which of the two it becomes is torch's affair.
        with pytest.raises((RuntimeError, ValueError), match=text), torch.no_grad():
            forward(*arguments)


def test_non_contiguous():
    ids, parameters = make((4, 3), hidden=(9,))
    expected = call(decoded_embedding, ids.t().contiguous(), parameters)
    strided = [None if t is None else torch.stack([t.detach()] * 2, -1)[..., 0] for t in parameters]
    assert not strided[0].is_contiguous()
    assert call(decoded_embedding, ids.t(), strided).equal(expected)


@pytest.mark.parametrize("needs", [(0,), (1,), (2,), (3, 4), (5,), (0, 5)])
def test_partial_gradients(needs):
    ids, parameters = make(hidden=(9,))
    expected = results(decoded_embedding, ids, parameters, torch.ones(5, 13))[1:]
    leaves = [t.detach().requires_grad_(index in needs) for index, t in enumerate(parameters)]
    call(decoded_embedding, ids, leaves).sum().backward()
    for index, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is not None) == (index in needs)
        if index in needs:
            assert leaf.grad.equal(gradient)


def test_saves_arguments_only():
    ids, parameters = make(hidden=(9,))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(decoded_embedding, ids, parameters)
    known = {t.untyped_storage().data_ptr() for t in (ids, *parameters)}
    assert {t.untyped_storage().data_ptr() for t in saved} <= known


def test_autocast_leaves_it_alone():
    ids, parameters = make(hidden=(9,))
    grad = torch.randn(5, 13)
    expected = results(decoded_embedding, ids, parameters, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results(decoded_embedding, ids, parameters, grad)
        with torch.no_grad():
            inferred = call(decoded_embedding, ids, parameters)
    assert all(map(torch.equal, actual, expected))
    assert inferred.dtype == expected[0].dtype
    torch.testing.assert_close(inferred, expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_without_the_dispatcher(dtype, hidden):
    """Plain calls go past torch's dispatcher, with and without gradients; the operator gives the same bits."""
    ids, parameters = make((40,), hidden=hidden, dtype=dtype)
    grad = torch.randn(40, 13).to(dtype)
    latent, *layers, norms = parameters
    layers += [None] * (6 - len(layers))
    y = torch.ops.lpaf_kernels.decoded_embedding(ids, latent, *layers, norms, 2)
    through = [y, *torch.autograd.grad(y, [t for t in parameters if t is not None], grad)]
    past = results(decoded_embedding, ids, parameters, grad, padding_idx=2)
    assert type(past[0].grad_fn).__name__ == "_EagerBackward"
    assert all(map(torch.equal, past, through))
    with torch.no_grad():
        assert call(decoded_embedding, ids, parameters, padding_idx=2).equal(y)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant):
    ids, parameters = make(hidden=(9,))
    grad = torch.randn(5, 13)
    expected = results(decoded_embedding, ids, parameters, grad)
    y = checkpoint(lambda *leaves: call(decoded_embedding, ids, leaves), *parameters, use_reentrant=use_reentrant)
    y.backward(grad)
    assert y.equal(expected[0])
    assert all(leaf.grad.equal(gradient) for leaf, gradient in zip(parameters, expected[1:], strict=True))


def test_no_second_derivative():
    ids, parameters = make()
    (d_latent,) = torch.autograd.grad(call(decoded_embedding, ids, parameters).sum(), parameters[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        d_latent.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("norms", [True, False])
def test_opcheck(dtype, hidden, norms):
    ids, parameters = make(hidden=hidden, dtype=dtype, norms=norms, bias=norms)
    latent, *layers, norms = parameters
    layers += [None] * (6 - len(layers))
    ops = torch.ops.lpaf_kernels
    torch.library.opcheck(ops.decoded_embedding, (ids, latent, *layers, norms, 2))
    plain = [None if t is None else t.detach() for t in (latent, *layers, norms)]
    if dtype == torch.float32 or not op._HAS_NATIVE:
        torch.library.opcheck(ops.decoded_embedding_forward, (ids, *plain))
    given = [tensor is not None for tensor in plain]
    for needs in (given, [False, *given[1:2], *[False] * 6]):
        torch.library.opcheck(ops.decoded_embedding_backward, (torch.randn(5, 13).to(dtype), ids, *plain, 2, needs))


def test_compiles_whole_without_recompilation():
    layer = DecodedEmbedding(11, 13, 7, (9,), norms=True, padding_idx=0)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for rows in (4, 9, 33):
        ids = torch.randint(11, (rows, 2))
        torch._dynamo.mark_dynamic(ids, 0)
        compiled(ids).sum().backward()
        assert torch.equal(compiled(ids), layer(ids))
    assert counter.frame_count == 1


def test_exports():
    layer = DecodedEmbedding(11, 13, 7, norms=True)
    program = torch.export.export(layer, (torch.randint(11, (4, 2)),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    ids = torch.randint(11, (9, 2))
    assert torch.equal(program.module()(ids), layer(ids))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"ids": [1]}, TypeError, "ids: expected a torch.Tensor, got list"),
        ({"ids": torch.ones(5)}, TypeError, "ids: expected int32 or int64, got torch.float32"),
        ({"ids": torch.ones(5, device="meta").int()}, ValueError, "ids: expected device cpu"),
        ({"latent": None}, TypeError, "latent: expected a torch.Tensor, got NoneType"),
        ({"latent": torch.ones(11)}, ValueError, r"latent: expected shape \[vocab, k\].*got \[11\]"),
        ({"latent": torch.ones(11, 0)}, ValueError, "with k of at least 1"),
        ({"decoder": torch.ones(7, 13)}, TypeError, "decoder: expected a list of pairs"),
        ({"decoder": []}, ValueError, "decoder: expected 1 to 3 layers, got 0"),
        ({"decoder": [(torch.ones(7, 7), None)] * 4}, ValueError, "decoder: expected 1 to 3 layers, got 4"),
        ({"decoder": [(torch.ones(8, 13), None)]}, ValueError, r"decoder\[0\] weight: expected shape \[7, out\]"),
        ({"decoder": [(torch.ones(7, 0), None)]}, ValueError, r"decoder\[0\] weight: expected shape \[7, out\]"),
        ({"decoder": [(torch.ones(7, 13), None), (None, None)]}, TypeError, r"decoder\[1\] weight: expected a torch"),
        ({"decoder": [(torch.ones(7, 13), torch.ones(12))]}, ValueError, r"decoder\[0\] bias: expected shape \[13\]"),
        ({"decoder": [(torch.ones(7, 13).double(), None)]}, TypeError, r"decoder\[0\] weight: expected torch.float32"),
        ({"norms": torch.ones(10)}, ValueError, r"norms: expected shape \[11\]"),
        ({"norms": torch.ones(11).half()}, TypeError, r"norms: expected torch.float32 \(that of latent\)"),
        ({"padding_idx": 11}, ValueError, "padding_idx: expected 0 to 10, got 11"),
        ({"padding_idx": 1.0}, TypeError, "padding_idx: expected an integer, got 1.0"),
    ],
)
def test_bad_input(change, error, text):
    arguments = {
        "ids": torch.ones(5).long(),
        "latent": torch.ones(11, 7),
        "decoder": [(torch.ones(7, 13), None)],
    }
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, pytest.raises(error, match=text):
            decoded_embedding(**{**arguments, **change})


class TestModule:
    @pytest.mark.parametrize("hidden", HIDDEN)
    @pytest.mark.parametrize("norms", [True, False])
    def test_stands_for_an_embedding(self, hidden, norms):
        layer = DecodedEmbedding(11, 13, 7, hidden, norms=norms, padding_idx=-1)
        assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (11, 13, 10)
        dense = layer.to_dense()
        assert type(dense) is nn.Embedding
        assert dense.padding_idx == 10
        ids = torch.randint(11, (2, 5))
        torch.testing.assert_close(layer(ids), dense(ids))
        torch.testing.assert_close(layer.weight, dense.weight)
        if norms:
            torch.testing.assert_close(layer(ids).norm(dim=-1), torch.ones(2, 5))

    def test_names(self):
        layer = DecodedEmbedding(11, 13, 7, (9,), norms=True)
        names = ["latent", "decoder.0.weight", "decoder.0.bias", "decoder.1.weight", "decoder.1.bias"]
        assert [name for name, _ in layer.named_parameters()] == names
        assert set(layer.state_dict()) == {*names, "norms"}
        assert set(DecodedEmbedding(11, 13, 7, bias=False).state_dict()) == {"latent", "decoder.0.weight"}
        assert "11, 13, latent_dim=7, norms=True" in repr(layer)

    def test_round_trip(self):
        layer, other = (DecodedEmbedding(11, 13, 7, (9,), norms=True) for _ in range(2))
        layer.norms.uniform_()
        other.load_state_dict(layer.state_dict())
        ids = torch.arange(11)
        assert other(ids).equal(layer(ids))
        assert copy.deepcopy(layer)(ids).equal(layer(ids))

    def test_trains_latent_and_decoder(self):
        layer = DecodedEmbedding(11, 13, 7, norms=True, padding_idx=0)
        before = copy.deepcopy(layer.state_dict())
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        ids = torch.tensor([0, 3, 3])
        target = torch.randn(3, 13)
        losses = []
        for _ in range(20):
            loss = F.mse_loss(layer(ids), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        moved = (layer.latent != before["latent"]).any(1)
        assert moved.nonzero().flatten().tolist() == [3]
        assert not layer.decoder[0].weight.equal(before["decoder.0.weight"])
        assert layer.norms.equal(before["norms"])

    def test_from_parts_shares(self):
        latent = nn.Parameter(torch.randn(11, 7))
        first = DecodedEmbedding.from_parts(latent, [(torch.randn(7, 13), None)])
        second = DecodedEmbedding.from_parts(torch.randn(4, 7), first.decoder, torch.rand(4), padding_idx=1)
        assert first.latent is latent
        assert second.decoder is first.decoder
        assert len(list(nn.ModuleList([first, second]).parameters())) == 3
        (first(torch.tensor([1])).sum() + second(torch.tensor([2])).sum()).backward()
        assert first.decoder[0].weight.grad.any()

    def test_the_weight_is_for_tied_outputs(self):
        layer = DecodedEmbedding(11, 13, 7, norms=True)
        logits = F.linear(torch.randn(3, 13), layer.weight)
        logits.logsumexp(1).sum().backward()
        assert logits.shape == (3, 11)
        assert layer.latent.grad.any(1).all()

    def test_the_weight_has_gradients_where_padding_has_none(self):
        """As nn.Embedding's: an output layer that shares it trains the padding's row."""
        layer = DecodedEmbedding(11, 13, 7, padding_idx=4)
        layer(torch.arange(11)).sum().backward()
        assert (~layer.latent.grad.any(1)).nonzero().flatten().tolist() == [4]
        layer.weight.sum().backward()
        assert layer.latent.grad[4].any()

    @pytest.mark.parametrize(
        ("arguments", "error", "text"),
        [
            ((11, 13, 0), ValueError, "latent_dim: expected at least 1, got 0"),
            ((11, 13, 7, (1, 2, 3)), ValueError, "hidden: expected at most 2 widths, got 3"),
            ((11, 13, 7, (0,)), ValueError, r"hidden\[0\]: expected at least 1, got 0"),
            ((11, 13, 7.0), TypeError, "latent_dim: expected an integer, got 7.0"),
            ((11, 13, 7, (), True, False, 11), ValueError, "padding_idx: expected -11 to 10, got 11"),
        ],
    )
    def test_bad_input(self, arguments, error, text):
        with pytest.raises(error, match=text):
            DecodedEmbedding(*arguments)

    def test_bad_parts(self):
        with pytest.raises(ValueError, match=r"decoder\[0\] weight: expected shape \[7, out\]"):
            DecodedEmbedding.from_parts(torch.ones(11, 7), [(torch.ones(6, 13), None)])
        with pytest.raises(ValueError, match=r"norms: expected shape \[11\]"):
            DecodedEmbedding.from_parts(torch.ones(11, 7), [(torch.ones(7, 13), None)], torch.ones(7))
