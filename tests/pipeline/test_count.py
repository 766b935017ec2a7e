"""Counts against the paper's figures and against the modules themselves."""

from __future__ import annotations

import pytest
import torch
import transformers

from lpaf.errors import InputError
from lpaf.models.count import (
    break_even_rank,
    encoder_params,
    forward_macs,
    matrix_shapes,
    rank_for_ratio,
    ratio_for_rank,
    resolve_rank,
)
from lpaf_kernels import swap_linears


@pytest.fixture(scope="module")
def bert_base():
    with torch.device("meta"):
        return transformers.AutoModelForSequenceClassification.from_config(transformers.BertConfig())


def test_bert_base_flops_at_384_are_the_papers(bert_base):
    assert forward_macs(bert_base, 384) == pytest.approx(35.4e9, rel=0.01)


@pytest.mark.parametrize(("rank", "percent"), [(260, 50), (130, 25), (80, 16)])
def test_ranks_give_the_papers_shares(bert_base, rank, percent):
    assert 100 * ratio_for_rank(matrix_shapes(bert_base).values(), rank) == pytest.approx(percent, abs=0.9)


def test_encoder_params_of_bert_base(bert_base):
    assert encoder_params(bert_base) == 12 * (4 * 768 * 768 + 2 * 768 * 3072)


def test_counts_of_a_compressed_model_are_those_of_its_tensors():
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    names = swap_linears(model, rank=4, keep=0.25, names=list(matrix_shapes(model)))
    stored = sum(
        model.get_submodule(name).get_parameter(key).numel() for name in names for key in ("down", "up")
    ) + sum(model.get_submodule(name).kept.numel() for name in names)
    assert encoder_params(model) == stored
    length = 10
    attention = 2 * 2 * length**2 * 32
    products = sum(model.get_submodule(n).down.numel() + model.get_submodule(n).up.numel() for n in names)
    assert forward_macs(model, length) == products * length + attention


def test_shared_layers_count_as_often_as_they_run():
    config = transformers.AlbertConfig(
        vocab_size=40,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    once = encoder_params(model)
    assert forward_macs(model, 1) == 6 * once + 6 * 2 * 32


def test_ratio_picks_the_largest_rank_within_it():
    shapes = {"a": (384, 384), "b": (1536, 384)}
    for ratio in (0.1, 0.16, 0.25, 0.5):
        rank = rank_for_ratio(shapes.values(), ratio)
        assert ratio_for_rank(shapes.values(), rank) <= ratio < ratio_for_rank(shapes.values(), rank + 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "--rank 0: must be at least 1"),
        ({"rank": -3}, "--rank -3: must be at least 1"),
        ({"rank": 400}, r"--rank 400: above min\(n, m\) = 384"),
        ({"rank": 193}, "--rank 193: rank 193 is above break-even 192"),
        ({"ratio": 0.0}, r"--ratio 0: must be in \(0, 1\]"),
        ({"ratio": 1.5}, r"--ratio 1.5: must be in \(0, 1\]"),
        ({"ratio": 0.9}, "above break-even"),
        ({"ratio": 1e-4}, "rank 1 already needs"),
        ({}, "exactly one"),
        ({"rank": 4, "ratio": 0.5}, "exactly one"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    shapes = {"query": (384, 384), "up": (1536, 384)}
    with pytest.raises(InputError, match=message):
        resolve_rank(shapes, arguments.get("rank"), arguments.get("ratio"))


def test_force_accepts_ranks_above_break_even():
    assert break_even_rank((384, 384)) == 192
    assert resolve_rank({"query": (384, 384)}, 193, None, force=True) == 193
