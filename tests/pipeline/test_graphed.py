"""GraphRunner: its buckets on any machine, its graphs on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForTokenClassification

from lpaf.models.targets import encoder_linears
from lpaf_kernels import GraphRunner, fuse, swap_linears
from tiny import build

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def make(model_type: str = "bert", tokens: bool = False) -> nn.Module:
    model = build(model_type)
    if tokens:
        model = AutoModelForTokenClassification.from_config(model.config)
    swap_linears(model, rank=8, names=list(encoder_linears(model)))
    return model.eval()


def ids(rows: int, length: int, device: str = "cpu") -> torch.Tensor:
    return torch.randint(5, 40, (rows, length), generator=torch.Generator().manual_seed(length)).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "deberta-v2"])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_padding_changes_nothing(model_type, fused, device):
    model = make(model_type).to(device)
    if fused:
        fuse(model)
    runner = GraphRunner(model, lengths=(8, 16), batch=3)
    for rows, length in ((1, 5), (3, 8), (2, 9), (1, 5)):
        inputs = ids(rows, length, device)
        mask = torch.ones_like(inputs)
        mask[-1, length - 2 :] = 0
        torch.testing.assert_close(runner(inputs), model(inputs).logits)
        torch.testing.assert_close(runner(inputs, mask), model(inputs, attention_mask=mask).logits)


@torch.no_grad()
def test_only_the_buckets_reach_the_model():
    model = make()
    shapes = []
    model.register_forward_pre_hook(lambda *a: shapes.append(tuple(a[2]["input_ids"].shape)), with_kwargs=True)
    runner = GraphRunner(model, lengths=(16, 8), batch=2)
    for rows, length in ((1, 3), (2, 8), (1, 9), (2, 16)):
        runner(ids(rows, length))
    assert shapes == [(2, 8), (2, 8), (2, 16), (2, 16)]


@torch.no_grad()
def test_token_logits_are_cut_to_the_length():
    model = make(tokens=True)
    runner = GraphRunner(model, lengths=(8,))
    inputs = ids(1, 5)
    types = torch.tensor([[0, 0, 1, 1, 1]])
    found = runner(inputs, token_type_ids=types)
    torch.testing.assert_close(found, model(inputs, token_type_ids=types).logits)


def test_bad_input():
    model = make()
    runner = GraphRunner(model, lengths=(8, 16), batch=2)
    with pytest.raises(ValueError, match=r"input_ids: expected at most 16 tokens .*got 17"):
        runner(ids(1, 17))
    with pytest.raises(ValueError, match=r"input_ids: expected 1 to 2 rows .*got 3"):
        runner(ids(3, 5))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[1, 5\]"):
        runner(ids(1, 5), torch.ones(1, 4))
    with pytest.raises(ValueError, match="lengths: expected whole numbers of at least 1, got"):
        GraphRunner(model, lengths=())
    with pytest.raises(ValueError, match="batch: expected a whole number of at least 1, got 0"):
        GraphRunner(model, batch=0)
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got int"):
        GraphRunner(3)
