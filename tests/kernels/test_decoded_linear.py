"""DecodedLinear."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from lpaf_kernels import DecodedEmbedding, DecodedLinear, LowRankSparseLinear
from lpaf_kernels.ops.decoded_embedding import decoded_embedding_reference

HIDDEN = [(), (9,), (9, 17)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def make(out_features=11, in_features=13, hidden=(), decoder_bias=True, norms=True, bias=True, dtype=torch.float32):
    layer = DecodedLinear(in_features, out_features, 7, hidden, bias, decoder_bias, norms, dtype=dtype)
    if norms:
        layer.norms.uniform_(0.5, 1.5)
    if hidden and not decoder_bias:
        # A row whose latent is negative would be so short that a chain in float16 cannot divide by the square.
        nn.init.uniform_(layer.latent, 0.5, 2)
    return layer


def by_table(layer, x, dtype=None):
    """y and the gradients of x and every parameter by the decoded weight, in plain torch."""
    dtype = dtype or x.dtype
    x, *parameters = (t.detach().to(dtype).requires_grad_() for t in (x, *layer.parameters()))
    named = dict(zip([name for name, _ in layer.named_parameters()], parameters))
    bias = named.pop("bias", None)
    latent = named.pop("latent")
    pairs = [(named[f"decoder.{i}.weight"], named.get(f"decoder.{i}.bias")) for i in range(len(layer.decoder))]
    norms = None if layer.norms is None else layer.norms.to(dtype)
    weight = decoded_embedding_reference(torch.arange(latent.shape[0]), latent, pairs, norms)
    return x, parameters, F.linear(x, weight, bias)


def gradients(x, parameters, y, grad):
    return [y, *torch.autograd.grad(y, [x, *parameters], grad.to(y.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(("decoder_bias", "norms"), [(True, True), (False, False), (True, False), (False, True)])
@pytest.mark.parametrize("out_features", [11, 300])  # the last with lengths in a basis
def test_forward_and_backward(dtype, hidden, decoder_bias, norms, out_features, assert_accurate):
    draws = []  # measured together: the largest error of a few entries is a matter of luck
    for _ in range(12):
        layer = make(out_features, hidden=hidden, decoder_bias=decoder_bias, norms=norms, bias=norms, dtype=dtype)
        x = torch.randn(2, 5, 13, dtype=dtype, requires_grad=True)
        grad = torch.randn(2, 5, out_features, dtype=dtype)
        actual = gradients(x, list(layer.parameters()), layer(x), grad)
        chain = gradients(*by_table(layer, x), grad)
        exact = gradients(*by_table(layer, x, torch.float64), grad)
        draws.append(list(zip(actual, chain, exact, strict=True)))
    for same in zip(*draws, strict=True):
        assert_accurate(*map(torch.stack, zip(*same, strict=True)))


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("out_features", [4, 40])
def test_gradcheck(hidden, out_features):
    layer = make(out_features, in_features=4, hidden=hidden, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters)), (x,))

    assert torch.autograd.gradcheck(function, (x, *layer.parameters()))


@pytest.mark.parametrize("out_features", [11, 300])
def test_lengths_survive_a_decoder_of_dependent_rows(out_features, assert_accurate):
    """Rows of the decoder that nearly cancel, or repeat: lengths are as exact as those of decoded rows."""
    layer = make(out_features, decoder_bias=False, bias=False)
    with torch.no_grad():
        weight = layer.decoder[0].weight
        weight[1] = weight[0]
        weight[2] = weight[0] + 1e-4 * weight[2]
        layer.latent[:, 0] = -layer.latent[:, 1]
        x = torch.randn(5, 13)
        assert_accurate(layer(x), by_table(layer, x)[2], by_table(layer, x, torch.float64)[2])


@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_row_of_zeros_has_no_direction(hidden):
    layer = make(hidden=hidden, decoder_bias=False, bias=False)
    with torch.no_grad():
        layer.latent[3] = 0
    y = layer(torch.randn(5, 13))
    y.sum().backward()
    assert not y[:, 3].any()
    assert y[:, [2, 4]].all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("norms", [True, False])
def test_stands_for_a_linear(hidden, norms):
    layer = make(hidden=hidden, norms=norms).eval()
    assert (layer.in_features, layer.out_features) == (13, 11)
    dense, x = layer.to_linear(), torch.randn(2, 5, 13)
    assert type(dense) is nn.Linear
    assert not dense.training
    torch.testing.assert_close(dense(x), layer(x))
    torch.testing.assert_close(layer.weight, dense.weight)
    if norms:
        torch.testing.assert_close(layer.weight.norm(dim=1), layer.norms)
    assert dense.bias.data_ptr() != layer.bias.data_ptr()


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("decoder_bias", [True, False])
def test_becomes_a_low_rank_layer(norms, decoder_bias):
    layer = make(norms=norms, decoder_bias=decoder_bias)
    low, x = layer.to_lowrank(), torch.randn(5, 13)
    assert type(low) is LowRankSparseLinear
    assert low.rank == 7 + decoder_bias
    torch.testing.assert_close(low(x), layer(x))
    with pytest.raises(ValueError, match="decoder: expected a linear one, got 2 layers"):
        make(hidden=(9,)).to_lowrank()


def test_names():
    layer = make(hidden=(9,))
    names = ["latent", "bias", "decoder.0.weight", "decoder.0.bias", "decoder.1.weight", "decoder.1.bias"]
    assert [name for name, _ in layer.named_parameters()] == names
    assert set(layer.state_dict()) == {*names, "norms"}
    assert set(make(decoder_bias=False, norms=False, bias=False).state_dict()) == {"latent", "decoder.0.weight"}
    assert "in_features=13, out_features=11, latent_dim=7, bias=True, norms=True" in repr(layer)
    other = make(hidden=(9,))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(5, 13)
    assert other(x).equal(layer(x))
    assert copy.deepcopy(layer)(x).equal(layer(x))


@pytest.mark.parametrize("hidden", HIDDEN)
def test_concatenated_matrices_share_a_decoder(hidden):
    whole = make(22, hidden=hidden)
    parts = [
        DecodedLinear.from_parts(
            whole.latent[rows].detach(), whole.decoder, whole.norms[rows], whole.bias[rows].detach()
        )
        for rows in (slice(0, 11), slice(11, 22))
    ]
    assert parts[0].decoder is parts[1].decoder is whole.decoder
    decoder = len(list(whole.decoder.parameters()))
    assert len(list(nn.ModuleList(parts).parameters())) == 2 * 2 + decoder
    x = torch.randn(5, 13)
    torch.testing.assert_close(torch.cat([part(x) for part in parts], 1), whole(x))
    sum(part(x).square().sum() for part in parts).backward()
    found = [parameter.grad.clone() for parameter in whole.decoder.parameters()]
    whole.zero_grad()
    whole(x).square().sum().backward()
    torch.testing.assert_close(found, [parameter.grad for parameter in whole.decoder.parameters()])


def test_shares_with_an_embedding():
    embedding = DecodedEmbedding(11, 13, 7, (9,))
    layer = DecodedLinear.from_parts(embedding.latent, embedding.decoder)
    assert layer.latent is embedding.latent
    torch.testing.assert_close(layer(torch.eye(13)).t(), embedding.weight)


@pytest.mark.parametrize("hidden", [(), (9,)])
def test_trains(hidden):
    layer = make(hidden=hidden)
    before = copy.deepcopy(layer.state_dict())
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    x, target, losses = torch.randn(20, 13), torch.randn(20, 11), []
    for _ in range(30):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, tensor in layer.state_dict().items() if not tensor.equal(before[name])}
    assert moved == set(before) - {"norms"}


@pytest.mark.parametrize("hidden", [(), (9,)])
@pytest.mark.parametrize("norms", [True, False])
def test_autocast(hidden, norms):
    layer, x = make(hidden=hidden, norms=norms), torch.randn(5, 13)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("hidden", [(), (9,)])
def test_compiles_whole_without_recompilation(hidden):
    layer = make(out_features=300, hidden=hidden)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for rows in (4, 9, 33):
        x = torch.randn(rows, 13)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x).sum().backward()
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == 1


@pytest.mark.parametrize("hidden", [(), (9,)])
def test_exports(hidden):
    layer = make(hidden=hidden)
    program = torch.export.export(layer, (torch.randn(4, 13),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    x = torch.randn(9, 13)
    torch.testing.assert_close(program.module()(x), layer(x))


def test_meta():
    layer = make().to("meta")
    assert layer(torch.randn(2, 5, 13, device="meta")).shape == (2, 5, 11)
    assert make(hidden=(9,)).to("meta")(torch.randn(5, 13, device="meta")).shape == (5, 11)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, 11, 7), ValueError, "in_features: expected at least 1, got 0"),
        ((13, 11.0, 7), TypeError, "out_features: expected an integer, got 11.0"),
        ((13, 11, 0), ValueError, "latent_dim: expected at least 1, got 0"),
        ((13, 11, 7, (1, 2, 3)), ValueError, "hidden: expected at most 2 widths, got 3"),
    ],
)
def test_bad_input(arguments, error, text):
    with pytest.raises(error, match=text):
        DecodedLinear(*arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"latent": torch.ones(11)}, ValueError, r"latent: expected shape \[vocab, k\]"),
        ({"decoder": [(torch.ones(6, 13), None)]}, ValueError, r"decoder\[0\] weight: expected shape \[7, out\]"),
        ({"norms": torch.ones(7)}, ValueError, r"norms: expected shape \[11\]"),
        ({"norms": torch.ones(11).double()}, TypeError, "norms: expected torch.float32"),
        ({"bias": torch.ones(13)}, ValueError, r"bias: expected shape \[11\]"),
    ],
)
def test_bad_parts(change, error, text):
    parts = {"latent": torch.ones(11, 7), "decoder": [(torch.ones(7, 13), None)]}
    with pytest.raises(error, match=text):
        DecodedLinear.from_parts(**{**parts, **change})
