"""swap_linears."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lpaf_kernels import LowRankSparseLinear, swap_linears


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.classifier = nn.Linear(16, 2)
        self.decoder = nn.Linear(16, 30, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.classifier(x), self.decoder(x)


INNER = ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]


def test_default_takes_what_gets_smaller():
    model = Encoder().eval()
    before = sum(parameter.numel() for parameter in model.parameters())
    assert swap_linears(model, rank=4) == INNER
    assert isinstance(model.blocks[0][0], LowRankSparseLinear)
    assert isinstance(model.classifier, nn.Linear)
    assert model.decoder.weight is model.embedding.weight
    assert sum(parameter.numel() for parameter in model.parameters()) < before
    assert not model.blocks[0][0].training
    assert all(out.isfinite().all() for out in model(torch.arange(6)))


def test_full_rank_keeps_the_function():
    model = Encoder()
    ids = torch.arange(12).view(3, 4)
    expected = model(ids)
    assert swap_linears(model, rank=16, names=INNER) == INNER
    for actual, wanted in zip(model(ids), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_names_and_keep():
    model = Encoder()
    assert swap_linears(model, rank=2, keep=0.25, names=lambda name: name.endswith(".0")) == INNER[::2]
    assert model.blocks[0][0].kept.shape == (8,)
    assert swap_linears(model, rank=2, names=["blocks.1.2"]) == ["blocks.1.2"]


def test_shared_layers_stay_shared():
    model = nn.Module()
    model.first = nn.Linear(16, 16)
    model.second = model.first
    assert swap_linears(model, rank=2) == ["first", "second"]
    assert model.first is model.second


def test_subclasses_and_attention_are_left_alone():
    layer = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    assert swap_linears(layer, rank=4) == ["linear1", "linear2"]
    assert layer(torch.randn(2, 5, 16)).shape == (2, 5, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"rank": 0}, ValueError, "rank: expected at least 1, got 0"),
        ({"rank": 2.0}, TypeError, "rank: expected an integer, got 2.0"),
        ({"rank": 2, "keep": 2}, ValueError, "keep: .*got 2"),
        ({"rank": 2, "names": ["blocks.0"]}, ValueError, "names: .*got 'blocks.0'"),
        ({"rank": 2, "names": "blocks.0.0"}, TypeError, "names: .*the string 'blocks.0.0'"),
        ({"rank": 2, "names": ["decoder"]}, ValueError, "names: 'decoder' shares its weight"),
        ({"rank": 4, "names": ["classifier"]}, ValueError, "rank: expected 1 to 2 for 'classifier'"),
        ({"rank": 99}, ValueError, "names: expected at least one nn.Linear that rank 99 makes smaller"),
    ],
)
def test_bad_input(arguments, error, text):
    model = Encoder()
    with pytest.raises(error, match=text):
        swap_linears(model, **arguments)
    assert not any(isinstance(module, LowRankSparseLinear) for module in model.modules())
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        swap_linears(3, rank=2)
    with pytest.raises(ValueError, match="names: expected at least one"):
        swap_linears(nn.Linear(16, 16), rank=2)
