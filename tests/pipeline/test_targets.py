"""The table of compressed linears against the models that it names."""

from __future__ import annotations

import pytest
from torch import nn

from lpaf.errors import InputError
from lpaf.models.targets import LAYER_LINEARS, encoder_linears, find_targets
from tiny import LAYERS, SEQ2SEQ, build


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
def test_layers_are_numbered_in_every_stack(model_type):
    targets = find_targets(build(model_type))
    stacks = {target.stack for target in targets}
    assert len(stacks) == (2 if model_type in SEQ2SEQ else 1)
    for stack in stacks:
        assert {target.layer for target in targets if target.stack == stack} == set(range(LAYERS))


@pytest.mark.parametrize("model_type", sorted(set(SEQ2SEQ)))
def test_encoder_and_decoder_are_told_apart(model_type):
    found = [(target.stack, target.layer, target.role) for target in find_targets(build(model_type))]
    gated = 2 if model_type == "mt5" else 1
    assert len(found) == LAYERS * (2 * (5 + gated) + 4)
    roles = {stack.split(".")[-2]: {role for s, _, role in found if s == stack} for stack, _, _ in found}
    assert {role for role in roles["decoder"] if "cross" in role} == roles["decoder"] - roles["encoder"]
    assert len(roles["decoder"] - roles["encoder"]) == 4


@pytest.mark.parametrize(("model_type", "count"), [("opt", 6), ("gpt_neox", 4)])
def test_fallback_takes_all_of_a_decoder_it_does_not_know(model_type, count):
    model = build(model_type)
    assert model_type not in LAYER_LINEARS
    assert len(find_targets(model)) == count * LAYERS
    tied = model.get_input_embeddings().weight
    assert all(linear.weight is not tied for linear in encoder_linears(model).values())


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
