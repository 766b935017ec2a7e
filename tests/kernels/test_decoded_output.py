"""DecodedOutput, tied to a DecodedEmbedding."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import nn

from lpaf_kernels import DecodedEmbedding, DecodedOutput, decoded_embedding

HIDDEN = [(), (9,), (9, 17)]


class LanguageModel(nn.Module):
    """An embedding and the output layer that is tied to it."""

    def __init__(self, vocabulary=200, hidden=(), norms=True, bias=True, decoder_bias=True, dtype=torch.float32):
        super().__init__()
        self.embedding = DecodedEmbedding(vocabulary, 13, 7, hidden, decoder_bias, norms, padding_idx=0, dtype=dtype)
        self.output = DecodedOutput(self.embedding, bias)
        if norms:
            self.embedding.norms.uniform_(0.5, 1.5)

    def forward(self, ids):
        return self.output(torch.sin(self.embedding(ids)))


def rows_as_decoded(embedding):
    """The table without norms, from the operator."""
    layers = [(layer.weight, layer.bias) for layer in embedding.decoder]
    return decoded_embedding(torch.arange(embedding.num_embeddings), embedding.latent, layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize(("norms", "bias"), [(True, True), (False, False), (True, False), (False, True)])
def test_is_the_product_with_the_table(dtype, hidden, norms, bias, assert_accurate):
    """Logits and gradients, against the decoded table in the same dtype and in float64."""
    model = LanguageModel(hidden=hidden, norms=norms, bias=bias, decoder_bias=bias, dtype=dtype)
    if bias:
        nn.init.normal_(model.output.bias)
    wide = copy.deepcopy(model).double()
    h = torch.randn(2, 5, 13, dtype=dtype, requires_grad=True)
    grad = torch.randn(2, 5, 200, dtype=dtype)

    def results(model, function, h):
        y = function(model, h)
        leaves = [h, *model.parameters()]
        return [y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))]

    def by_table(model, h):
        return F.linear(h, rows_as_decoded(model.embedding), model.output.bias)

    actual = results(model, lambda model, h: model.output(h), h)
    chain = results(model, by_table, h)
    exact = results(wide, by_table, h.detach().double().requires_grad_())
    for same in zip(actual, chain, exact, strict=True):
        assert_accurate(*same)


@pytest.mark.parametrize("hidden", [(), (9,)])
def test_gradcheck(hidden):
    model = LanguageModel(vocabulary=120, hidden=hidden, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    ids = torch.tensor([1, 5])  # not the padding: differences would see what its gradient does not

    def logits(*parameters):
        return torch.func.functional_call(model, dict(zip(names, parameters)), (ids,))

    leaves = [parameter.detach().requires_grad_() for parameter in model.parameters()]
    assert torch.autograd.gradcheck(logits, leaves, fast_mode=True)


def test_has_the_tensors_once():
    model = LanguageModel(hidden=(9,))
    decoder = [f"embedding.decoder.{i}.{name}" for i in range(2) for name in ("weight", "bias")]
    assert set(model.state_dict()) == {"embedding.latent", "embedding.norms", *decoder, "output.bias"}
    assert [name for name, _ in model.output.named_parameters()] == ["bias"]
    assert "output" in dict(model.named_modules())
    assert not list(model.output.children())
    assert set(LanguageModel(bias=False).output.state_dict()) == set()
    other = LanguageModel(hidden=(9,))
    other.load_state_dict(model.state_dict())
    ids = torch.randint(200, (2, 5))
    assert other(ids).equal(model(ids))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_tie(duplicate):
    model, h = LanguageModel(), torch.randn(3, 13)
    other, before = duplicate(model), model.output(h)
    assert other.output.embedding is other.embedding
    assert other.output.embedding is not model.embedding
    with torch.no_grad():
        other.embedding.latent.zero_()
    assert model.output(h).equal(before)
    torch.testing.assert_close(other.output(h), F.linear(h, rows_as_decoded(other.embedding), other.output.bias))
    assert not torch.allclose(other.output(h), before)


def test_follows_its_embedding():
    model = LanguageModel().double()
    assert model.output(torch.randn(3, 13).double()).dtype == torch.float64
    model.requires_grad_(False)
    assert not model.output(torch.randn(3, 13).double()).requires_grad
    assert (model.output.in_features, model.output.out_features) == (13, 200)
    assert model.output.weight.equal(rows_as_decoded(model.embedding))
    assert not torch.allclose(model.output.weight, model.embedding.weight), "norms are for looking up"
    assert "in_features=13, out_features=200, bias=True" in repr(model.output)


def test_a_bias_stays_the_same_parameter():
    embedding, bias = DecodedEmbedding(11, 13, 7), nn.Parameter(torch.randn(11))
    assert DecodedOutput(embedding, bias).bias is bias
    assert not DecodedOutput(embedding, True).bias.any()
    assert DecodedOutput(embedding).bias is None


@pytest.mark.parametrize("hidden", HIDDEN)
def test_unties(hidden):
    model = LanguageModel(hidden=hidden).eval()
    dense, h = model.output.to_linear(), torch.randn(5, 13)
    assert type(dense) is nn.Linear
    assert not dense.training
    torch.testing.assert_close(dense(h), model.output(h))


@pytest.mark.parametrize("hidden", [(), (9,)])
def test_both_ends_train_one_latent(hidden):
    model = LanguageModel(vocabulary=30, hidden=hidden)
    ids = torch.randint(1, 30, (40,))
    optimizer, losses = torch.optim.Adam(model.parameters(), 0.03), []
    for _ in range(30):
        loss = F.cross_entropy(model(ids[:-1]), ids[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert model.embedding.latent.grad.any(1).all()  # the padding's row too, from the logits


@pytest.mark.parametrize("hidden", [(), (9,)])
def test_autocast(hidden):
    model, h = LanguageModel(hidden=hidden), torch.randn(5, 13)
    expected = model.output(h)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model.output(h)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("hidden", [(), (9,)])
def test_compiles_whole_without_recompilation(hidden):
    model = LanguageModel(hidden=hidden)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for rows in (4, 9, 33):
        ids = torch.randint(200, (rows, 2))
        torch._dynamo.mark_dynamic(ids, 0)
        compiled(ids).sum().backward()
        torch.testing.assert_close(compiled(ids), model(ids))
    assert counter.frame_count == 1


@pytest.mark.parametrize("hidden", [(), (9,)])
def test_exports(hidden):
    model = LanguageModel(hidden=hidden)
    ids = torch.randint(200, (4, 2))
    program = torch.export.export(model, (ids,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert {name.removeprefix("p_") for name in program.state_dict} <= set(model.state_dict())
    ids = torch.randint(200, (9, 2))
    torch.testing.assert_close(program.module()(ids), model(ids))


def test_bad_input():
    embedding = DecodedEmbedding(11, 13, 7)
    with pytest.raises(TypeError, match="embedding: expected a DecodedEmbedding, got Embedding"):
        DecodedOutput(nn.Embedding(11, 13))
    with pytest.raises(ValueError, match=r"bias: expected shape \[11\]"):
        DecodedOutput(embedding, torch.zeros(13))
    with pytest.raises(TypeError, match=r"bias: expected torch\.float32"):
        DecodedOutput(embedding, torch.zeros(11).double())
    with pytest.raises(TypeError, match=r"bias: expected a torch\.Tensor, got str"):
        DecodedOutput(embedding, "yes")
