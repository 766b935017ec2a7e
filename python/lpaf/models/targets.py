"""Which linear layers of a model are compressed: one table per model type, with a generic fallback.

The paper (LPAF, section 5.1.4) compresses {query, key, value, attention output, up-projection, down-projection} of
every encoder layer; embeddings, pooler and task head stay dense. A table entry maps each of these roles to the
module's name inside one layer, of the encoder or of the decoder, whose second attention has roles of its own
("cross_query", ...). Models that the table does not know fall back to every ``nn.Linear`` inside a numbered layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from lpaf_kernels import DecodedLinear, LowRankPlusSparseLinear, LowRankSparseLinear, MaskedLinear, MixedRankLinear

from ..errors import InputError
from .reconstructed import ReconstructedLinear

_BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_output": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}

_BART = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.out_proj",
    "cross_query": "encoder_attn.q_proj",
    "cross_key": "encoder_attn.k_proj",
    "cross_value": "encoder_attn.v_proj",
    "cross_output": "encoder_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}
_T5 = {
    "query": "layer.0.SelfAttention.q",
    "key": "layer.0.SelfAttention.k",
    "value": "layer.0.SelfAttention.v",
    "attention_output": "layer.0.SelfAttention.o",
    "cross_query": "layer.1.EncDecAttention.q",
    "cross_key": "layer.1.EncDecAttention.k",
    "cross_value": "layer.1.EncDecAttention.v",
    "cross_output": "layer.1.EncDecAttention.o",
    "up": "layer.[12].DenseReluDense.wi(_[01])?",  # one, or two of which one is the gate
    "down": "layer.[12].DenseReluDense.wo",
}
_LLAMA = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

#: model type -> role -> module name inside one layer (a regular expression that must match the whole rest)
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
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "blenderbot-small"), _BART),
    **dict.fromkeys(("t5", "mt5"), _T5),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"), _LLAMA),
    "gpt2": {
        "query_key_value": "attn.c_attn",
        "attention_output": "attn.c_proj",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    },
}

LAYER_NAME = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<rest>.+)$")
COMPRESSED_TYPES = (
    LowRankSparseLinear,
    LowRankPlusSparseLinear,
    MixedRankLinear,
    DecodedLinear,
    ReconstructedLinear,
)


@dataclass(frozen=True)
class Target:
    """One compressible linear.

    Args:
        name: its qualified name.
        layer: number of the layer that it stands in.
        role: its role there ("query", "up", ...).
        stack: qualified name of the list that holds the layer; encoder and decoder have one each.
    """

    name: str
    layer: int
    role: str
    stack: str = ""


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
        role = match["rest"]
        if roles is not None:
            role = next((role for role, pattern in roles.items() if re.fullmatch(pattern, match["rest"])), None)
        if role is not None:
            targets.append(Target(name, int(match["layer"]), role, match["stack"]))
    if not targets:
        raise InputError(
            f"model: no encoder linear layer found in {type(model).__name__} "
            f"(model type {getattr(model.config, 'model_type', 'unknown')!r}); pass a transformer"
        )
    return targets


def encoder_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Qualified name -> module for :func:`find_targets`."""
    return {target.name: model.get_submodule(target.name) for target in find_targets(model)}
