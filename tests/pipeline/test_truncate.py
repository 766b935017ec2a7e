"""Students of fewer layers: what is copied, how many layers a share buys, and the methods made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lpaf.errors import InputError
from lpaf.models.truncate import layers_for_ratio, truncate
from lpaf.recipes.compress import compress
from lpaf.recipes.options import CompressOptions
from tiny import LAYERS, build


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "deberta-v2", "modernbert", "electra"])
def test_first_layers_are_copied(model_type):
    model = build(model_type)
    student = truncate(model, 1)
    assert student.config.num_hidden_layers == 1
    whole, kept = model.state_dict(), student.state_dict()
    assert set(kept) < set(whole)
    assert all(torch.equal(kept[name], whole[name]) for name in kept)
    assert student(torch.tensor([[2, 5, 7]])).logits.shape == (1, 2)


def test_all_layers_are_the_same_function():
    model = build("bert").eval()
    ids = torch.tensor([[2, 5, 7, 3]])
    assert torch.equal(truncate(model, LAYERS).eval()(ids).logits, model(ids).logits)


def test_frozen_parameters_stay_frozen():
    model = build("bert")
    model.bert.embeddings.requires_grad_(False)
    trained = {name for name, parameter in truncate(model, 1).named_parameters() if parameter.requires_grad}
    assert trained
    assert not [name for name in trained if "embeddings" in name]


@pytest.mark.parametrize(
    ("layers", "ratio", "kept"), [(12, 0.5, 6), (12, 0.25, 3), (12, 0.16, 2), (6, 0.16, 1), (6, 0.25, 1), (6, 1.0, 6)]
)
def test_layers_for_the_papers_ratios(layers, ratio, kept):
    assert layers_for_ratio(build("bert", num_hidden_layers=layers), ratio) == kept


def test_a_share_below_one_layer_is_refused():
    with pytest.raises(InputError, match=r"--ratio 0.4: one of 2 layers is 50.0% of the encoder already"):
        layers_for_ratio(build("bert"), 0.4)


def test_shared_layers_are_refused():
    with pytest.raises(InputError, match="share their weights"):
        truncate(build("albert"), 1)


@pytest.mark.parametrize("method", ["truncate", "kd"])
def test_run_and_reload_without_lpaf(method, tiny_options, tiny_data):
    options = tiny_options | {"method": method, "rank": None, "ratio": 0.5, "freeze_embeddings": True}
    model, report = compress(CompressOptions(**options))
    saved = json.loads((Path(options["output"]) / "report.json").read_text())
    assert saved["encoder_params"]["ratio"] == 0.5
    assert ("distillation" in report["training"]["retrain"][0]) == (method == "kd")
    assert len(saved["rank"]["per_matrix"]) == 6, "the matrices of the one layer that is left"
    reloaded = AutoModelForSequenceClassification.from_pretrained(options["output"]).eval()
    assert not hasattr(reloaded.config, "quantization_config")
    ids = torch.tensor([[2, 5, 7, 3]])
    assert torch.equal(reloaded(ids).logits, model(ids).logits)


def test_rank_is_refused(tiny_options):
    with pytest.raises(InputError, match="--method kd: its size is a share, of layers or of weights; pass --ratio R"):
        compress(CompressOptions(**tiny_options | {"method": "kd"}))
