"""The table of compressed linears against the models that it names."""

from __future__ import annotations

import pytest
from torch import nn

from lpaf.errors import InputError
from lpaf.models.targets import LAYER_LINEARS, encoder_linears, find_targets
from tiny import LAYERS, build


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
