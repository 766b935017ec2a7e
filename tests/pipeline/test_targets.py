"""The table of compressed linears against the models that it names."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lpaf.errors import InputError
from lpaf.models.targets import LAYER_LINEARS, encoder_linears, find_targets

LAYERS = 2
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
# What a model type's configuration wants beyond, or instead of, the usual names.
SPECIAL = {
    "distilbert": {"dim": 32, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 48},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    "albert": {"embedding_size": 16, "num_hidden_groups": 1},
    "layoutlm": {"max_2d_position_embeddings": 64},
    "electra": {"embedding_size": 16},
    "modernbert": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "global_attn_every_n_layers": 1,
    },
}


def build(model_type: str) -> nn.Module:
    options = dict(SMALL)
    if model_type == "distilbert":
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            options.pop(name)
    config = transformers.AutoConfig.for_model(model_type, **options, **SPECIAL.get(model_type, {}))
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("model_type", sorted(LAYER_LINEARS))
def test_table_names_every_linear_of_every_layer(model_type):
    model = build(model_type)
    targets = find_targets(model)
    roles = LAYER_LINEARS[model_type]
    assert {target.role for target in targets} == set(roles), "every role of the table exists in the model"
    inside = [
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and any(p.isdigit() for p in name.split("."))
    ]
    assert sorted(target.name for target in targets) == sorted(inside), "no linear of a layer is left dense"


@pytest.mark.parametrize("model_type", sorted(set(LAYER_LINEARS) - {"albert"}))
def test_layers_are_numbered(model_type):
    assert {target.layer for target in find_targets(build(model_type))} == set(range(LAYERS))


def test_fallback_takes_numbered_linears_and_spares_the_head():
    model = build("bert")
    model.config.model_type = "something-new"
    names = list(encoder_linears(model))
    assert len(names) == 6 * LAYERS
    assert not any("classifier" in name or "pooler" in name for name in names)


def test_model_without_encoder_is_refused():
    model = build("bert")
    model.bert.encoder.layer = nn.ModuleList()
    with pytest.raises(InputError, match="no encoder linear"):
        find_targets(model)
