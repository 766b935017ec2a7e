"""Which linear layers of a model are compressed: one table per model type, with a generic fallback.

The paper (LPAF, section 5.1.4) compresses {query, key, value, attention output, up-projection, down-projection} of
every encoder layer; embeddings, pooler and task head stay dense. A table entry maps each of these roles to the
module's name inside one layer. Models that the table does not know fall back to every ``nn.Linear`` inside a numbered
layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from lpaf_kernels import LowRankPlusSparseLinear, LowRankSparseLinear, MaskedLinear, MixedRankLinear

from ..errors import InputError

_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}

#: model type -> role -> module name inside one encoder layer (a regular expression that must match the whole rest)
LAYER_LINEARS: dict[str, dict[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "ernie": _BERT,
    "layoutlm": _BERT,
    "distilbert": {
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_output": "attention.out_lin",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
    },
    "deberta-v2": {
        **_BERT,
        "query": "attention.self.(pos_)?query_proj",
        "key": "attention.self.(pos_)?key_proj",
        "value": "attention.self.value_proj",
    },
    "deberta": {
        **{role: name for role, name in _BERT.items() if role not in ("query", "key", "value")},
        "query_key_value": "attention.self.in_proj",
        "position": "attention.self.(pos_proj|pos_q_proj)",
    },
    "mpnet": {
        **_BERT,
        "query": "attention.attn.q",
        "key": "attention.attn.k",
        "value": "attention.attn.v",
        "attention_output": "attention.attn.o",
    },
    "albert": {
        "query": "albert_layers.[0-9]+.attention.query",
        "key": "albert_layers.[0-9]+.attention.key",
        "value": "albert_layers.[0-9]+.attention.value",
        "attention_output": "albert_layers.[0-9]+.attention.dense",
        "up": "albert_layers.[0-9]+.ffn",
        "down": "albert_layers.[0-9]+.ffn_output",
    },
    "modernbert": {
        "query_key_value": "attn.Wqkv",
        "attention_output": "attn.Wo",
        "up": "mlp.Wi",
        "down": "mlp.Wo",
    },
}

LAYER_NAME = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)$")
COMPRESSED_TYPES = (LowRankSparseLinear, LowRankPlusSparseLinear, MixedRankLinear)


@dataclass(frozen=True)
class Target:
    """One compressible linear: its qualified name, the layer it stands in and its role there ("query", "up", ...)."""

    name: str
    layer: int
    role: str


def find_targets(model: nn.Module) -> list[Target]:
    """The encoder linears of ``model`` in module order, whether dense, masked or already compressed.

    Raises InputError when there are none.
    """
    roles = LAYER_LINEARS.get(getattr(model.config, "model_type", ""))
    inside: tuple[str, ...] = ()
    targets = []
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue  # the parts of a compressed layer are not targets of their own
        if not isinstance(module, (nn.Linear, MaskedLinear, *COMPRESSED_TYPES)):
            continue
        inside = (f"{name}.",)
        match = LAYER_NAME.match(name)
        if match is None:
            continue
        rest = match["rest"]
        if roles is None:
            targets.append(Target(name, int(match["layer"]), rest))
            continue
        role = next((role for role, pattern in roles.items() if re.fullmatch(pattern, rest)), None)
        if role is not None:
            targets.append(Target(name, int(match["layer"]), role))
    if not targets:
        raise InputError(
            f"model: no encoder linear layer found in {type(model).__name__} "
            f"(model type {getattr(model.config, 'model_type', 'unknown')!r}); pass a transformer encoder"
        )
    return targets


def encoder_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> module for :func:`find_targets`."""
    return {target.name: model.get_submodule(target.name) for target in find_targets(model)}
