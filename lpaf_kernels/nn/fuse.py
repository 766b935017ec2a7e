"""Run the blocks of a transformers encoder through lowrank_attention and lowrank_ffn, and back."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .lowrank_attention import PackedProjections, run_attention
from .lowrank_ffn import run_ffn
from .lowrank_sparse_linear import LowRankSparseLinear


@dataclass(frozen=True)
class AttentionPaths:
    """Where an attention block keeps its parts.

    ``inner`` has the configuration and the probabilities' dropout; ``skipped`` are modules that the operator runs
    without calling them.
    """

    q: str
    k: str
    v: str
    o: str
    norm: str
    dropout: str | None
    inner: str
    heads: str
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class FeedForwardPaths:
    """Where a feed-forward block keeps its parts; ``skipped`` as for attention."""

    first: str
    activation: str
    second: str
    norm: str
    dropout: str
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerPaths:
    """The fusible blocks of a layer.

    ``attention`` names the module that becomes an attention block, ``whole`` says that the layer itself is one block of
    both kinds, else ``first`` and ``second`` name the two modules that are called in turn as second(first(x), x).
    """

    attention_parts: AttentionPaths | None
    feed_forward_parts: FeedForwardPaths
    attention: str | None = None
    first: str | None = None
    second: str | None = None
    whole: bool = False


_BERT_ATTENTION = AttentionPaths(
    q="self.query",
    k="self.key",
    v="self.value",
    o="output.dense",
    norm="output.LayerNorm",
    dropout="output.dropout",
    inner="self",
    heads="self.num_attention_heads",
    skipped=("self", "output"),
)
# The paths inside the two modules, first and second, not inside the layer.
_BERT_FEED_FORWARD = FeedForwardPaths(
    first="dense", activation="intermediate_act_fn", second="dense", norm="LayerNorm", dropout="dropout"
)
_BERT = LayerPaths(_BERT_ATTENTION, _BERT_FEED_FORWARD, "attention", "intermediate", "output")
# Their attention reads relative positions.
_DEBERTA = LayerPaths(None, _BERT_FEED_FORWARD, None, "intermediate", "output")

#: module and class of an encoder layer in transformers -> where its parts are
LAYERS = {
    "modeling_bert.BertLayer": _BERT,
    "modeling_roberta.RobertaLayer": _BERT,
    "modeling_xlm_roberta.XLMRobertaLayer": _BERT,
    "modeling_camembert.CamembertLayer": _BERT,
    "modeling_electra.ElectraLayer": _BERT,
    "modeling_ernie.ErnieLayer": _BERT,
    "modeling_deberta.DebertaLayer": _DEBERTA,
    "modeling_deberta_v2.DebertaV2Layer": _DEBERTA,
    "modeling_distilbert.TransformerBlock": LayerPaths(
        AttentionPaths(
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            o="attention.out_lin",
            norm="sa_layer_norm",
            dropout=None,
            inner="attention",
            heads="attention.n_heads",
            skipped=("attention",),
        ),
        FeedForwardPaths(
            first="ffn.lin1",
            activation="ffn.activation",
            second="ffn.lin2",
            norm="output_layer_norm",
            dropout="ffn.dropout",
            skipped=("ffn",),
        ),
        whole=True,
    ),
}

#: class of an activation module -> the operators' name for it
ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "ReLU": "relu",
    "Tanh": "tanh",
    "LinearActivation": "none",
}
_NORMS = ("LayerNorm", "DebertaLayerNorm")
# What a caller may pass down that no attention reads.
_UNREAD = ("position_ids", "output_hidden_states", "return_dict", "num_items_in_batch")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fuse(model: nn.Module) -> list[str]:
    """Let the attention and feed-forward blocks of ``model`` run as one operator each, in place.

    BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ERNIE and DistilBERT are known, and the feed-forward blocks of
    DeBERTa and DeBERTa-v2/v3. A block is fused if its linears are all :class:`LowRankSparseLinear` (compress first)
    without parametrisation or activation of their own. MixedRankLinear, and hooks of any kind on a layer inside the
    block (peft, accelerate), leave it as it is.

    Modules, parameters and state_dict stay the same: only the class of a block changes, so hooks on the block itself,
    checkpoints and optimisers go on. The modules inside are no longer called. A hook put on one of them later, or
    another module in its place, sends the block back to its original forward; so does every call that the operators do
    not cover: attention weights asked for, a cache, cross-attention, a decoder, attention implementations other than
    "eager" and "sdpa". Training works, with the model's dropouts.

    Args:
        model: a transformers model, or anything that holds encoder layers of one.

    Returns:
        The names of all blocks that are fused now, in the order of the model. Where a feed-forward block is two
        modules, it goes by the second's.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: it has no block that can be fused.
    """
    _check_module(model)
    for layer in list(model.modules()):
        paths = LAYERS.get(_key(type(layer)))
        if paths is not None:
            _fuse_layer(layer, paths)
    fused = _fused_names(model)
    if not fused:
        raise ValueError(
            f"model: expected encoder layers (BERT, RoBERTa, ELECTRA, DistilBERT, DeBERTa) whose linears are all "
            f"LowRankSparseLinear, without hooks, found none in {type(model).__name__}"
        )
    return fused


def unfuse(model: nn.Module) -> list[str]:
    """Give every block that :func:`fuse` changed its own forward back, in place.

    Returns:
        The names of the blocks, as :func:`fuse` gave them; none if ``model`` is not fused.

    Raises:
        TypeError: ``model`` is no nn.Module.
    """
    _check_module(model)
    names = _fused_names(model)
    for module in model.modules():
        if isinstance(module, _Fused):
            module._restore()
    return names


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def _fused_names(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, _Fused) and not isinstance(module, _FusedFirst)
    ]


def _key(cls: type) -> str:
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__qualname__}"


def _fuse_layer(layer: nn.Module, paths: LayerPaths) -> None:
    if paths.whole:
        attention, feed_forward = AttentionParts(layer, paths), FeedForwardParts(layer, layer, paths)
        if attention.ready() and feed_forward.ready():
            _change_class(layer, _FusedLayer, paths)
        return
    if paths.attention is not None:
        attention = getattr(layer, paths.attention)
        if not isinstance(attention, _Fused) and AttentionParts(attention, paths).ready():
            _change_class(attention, _FusedAttention, paths)
    first, second = getattr(layer, paths.first), getattr(layer, paths.second)
    if not isinstance(first, _Fused) and _unhooked(first) and FeedForwardParts(first, second, paths).ready():
        _change_class(first, _FusedFirst, paths)
        _change_class(second, _FusedSecond, paths)
        second.__dict__["_first"] = (first,)  # in a tuple it is no second owner of its parameters


class AttentionParts:
    """The modules of an attention block, looked up anew for each call: anyone may replace them."""

    def __init__(self, block: nn.Module, paths: LayerPaths) -> None:
        where = paths.attention_parts
        self.projections = attrgetter(where.q, where.k, where.v)(block)
        self.o = attrgetter(where.o)(block)
        self.norm, self.inner, self.heads = attrgetter(where.norm, where.inner, where.heads)(block)
        self.dropout = None if where.dropout is None else attrgetter(where.dropout)(block)
        self.skipped = [attrgetter(path)(block) for path in where.skipped]

    def ready(self) -> bool:
        """Whether the operator computes what these modules do."""
        inner = self.inner
        dropouts = [dropout for dropout in (self.dropout, inner.dropout) if dropout is not None]
        return (
            _plain_linears((*self.projections, self.o))
            and _plain(self.norm, dropouts)
            and all(map(_unhooked, self.skipped))
            and not getattr(inner, "is_decoder", False)
            and not getattr(inner, "is_causal", True)
            and getattr(inner, "position_embedding_type", None) in (None, "absolute")
        )

    def covers(self, x: Tensor, mask: Any, options: dict[str, Any]) -> bool:
        """Whether the operator takes a call with these arguments."""
        config = self.inner.config
        if config._attn_implementation not in ("eager", "sdpa") or getattr(config, "output_attentions", False):
            return False
        if any(value is not None and value is not False and name not in _UNREAD for name, value in options.items()):
            return False
        if x.dim() != 3:
            return False
        if mask is None:
            return True
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            return False
        # The eager implementation adds the mask, whatever its type.
        if mask.dtype == torch.bool:
            return config._attn_implementation == "sdpa"
        return mask.dtype in (x.dtype, torch.float32)

    def run(self, x: Tensor, mask: Tensor | None, packed: PackedProjections) -> Tensor:
        """norm(dropout(attention(x)) + x)."""
        return run_attention(
            x,
            self.projections,
            self.o,
            packed,
            num_heads=self.heads,
            attn_mask=mask,
            scale=self.inner.scaling,
            residual=x,
            norm=self.norm,
            dropout=self.dropout,
            attention_dropout=self.inner.dropout,
        )


class FeedForwardParts:
    """The modules of a feed-forward block, looked up anew for each call."""

    def __init__(self, first: nn.Module, second: nn.Module, paths: LayerPaths) -> None:
        where = paths.feed_forward_parts
        self.first, self.activation = attrgetter(where.first, where.activation)(first)
        self.second, self.norm, self.dropout = attrgetter(where.second, where.norm, where.dropout)(second)
        self.skipped = [attrgetter(path)(second) for path in where.skipped]

    def ready(self) -> bool:
        """Whether the operator computes what these modules do."""
        return (
            type(self.activation).__name__ in ACTIVATIONS
            and _plain_linears((self.first, self.second))
            and _plain(self.norm, [self.dropout])
            and all(map(_unhooked, (self.activation, *self.skipped)))
        )

    def run(self, x: Tensor, residual: Tensor) -> Tensor:
        """norm(dropout(second(act(first(x)))) + residual)."""
        return run_ffn(
            x,
            self.first,
            self.second,
            activation=ACTIVATIONS[type(self.activation).__name__],
            residual=residual,
            norm=self.norm,
            dropout=self.dropout,
        )


def _plain_linears(linears: tuple[nn.Module, ...]) -> bool:
    """Whether these are low-rank layers and nothing else: a parametrisation changes the class."""
    return all(
        type(linear) is LowRankSparseLinear and linear.activation is None and _unhooked(linear) for linear in linears
    )


def _plain(norm: nn.Module, dropouts: list[nn.Module]) -> bool:
    return (
        type(norm).__name__ in _NORMS
        and norm.weight is not None
        and _unhooked(norm)
        and all(type(dropout) is nn.Dropout and dropout.p < 1 and _unhooked(dropout) for dropout in dropouts)
    )


def _unhooked(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs its class's forward and nothing besides.

    transformers' own hooks, which collect attention weights, do not count: they wait until somebody asks for them.
    """
    if "forward" in module.__dict__:
        return False
    return not any(
        getattr(hook, "__name__", "") != "output_capturing_hook"
        for kind in _HOOKS
        for hook in getattr(module, kind).values()
    )


class _Fused:
    """Goes before a block's class; everything but forward stays that of the block.

    Changing the class and not the module (as parametrisations and FSDP2 do) keeps hooks, training mode and whoever
    holds a reference to the module.
    """

    _original: type
    _form: type
    _paths: LayerPaths

    def _restore(self) -> None:
        self.__class__ = self._original

    def __reduce_ex__(self, protocol):
        # The class is made at run time, so pickle cannot find it by name.
        return _empty, (self._original, self._form, self._paths), self.__dict__


class _Packed(_Fused):
    """With attention in it: its three matrices stay together in memory."""

    def _parts(self) -> AttentionParts:
        return AttentionParts(self, self._paths)

    def _pack(self) -> None:
        projections = self._parts().projections
        if _plain_linears(projections):
            self._packed.pack(*projections)

    def _restore(self) -> None:
        projections = self._parts().projections
        if _plain_linears(projections):
            self._packed.unpack(*projections)
        super()._restore()
        del self._packed

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._pack()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self._pack()


class _FusedAttention(_Packed):
    """attention(x, mask) -> (output, None)."""

    def forward(self, hidden_states, attention_mask=None, *arguments, **options):
        parts = self._parts()
        extra = {str(index): value for index, value in enumerate(arguments)} | options
        if not parts.ready() or not parts.covers(hidden_states, attention_mask, extra):
            return super().forward(hidden_states, attention_mask, *arguments, **options)
        return parts.run(hidden_states, attention_mask, self._packed), None


class _FusedLayer(_Packed):
    """layer(x, mask) -> output."""

    def forward(self, hidden_states, attention_mask=None, **options):
        attention, feed_forward = self._parts(), FeedForwardParts(self, self, self._paths)
        ready = attention.ready() and feed_forward.ready()
        if not ready or not attention.covers(hidden_states, attention_mask, options):
            return super().forward(hidden_states, attention_mask, **options)
        x = attention.run(hidden_states, attention_mask, self._packed)
        return feed_forward.run(x, x)


class _FusedFirst(_Fused):
    """Hands its input on to the second module of the block, which runs both."""

    def forward(self, hidden_states):
        return hidden_states if _unhooked(self) else super().forward(hidden_states)


class _FusedSecond(_Fused):
    """second(x, residual): the whole block."""

    def forward(self, hidden_states, input_tensor):
        first = self._first[0]
        if not _unhooked(first):
            return super().forward(hidden_states, input_tensor)
        parts = FeedForwardParts(first, self, self._paths)
        if parts.ready():
            return parts.run(hidden_states, input_tensor)
        return super().forward(first._original.forward(first, hidden_states), input_tensor)

    def _restore(self) -> None:
        super()._restore()
        del self.__dict__["_first"]


def _change_class(module: nn.Module, form: type[_Fused], paths: LayerPaths) -> None:
    module.__class__ = _fused_class(type(module), form, paths)
    if isinstance(module, _Packed):
        module._packed = PackedProjections()
        module._pack()


@functools.cache
def _fused_class(original: type, form: type[_Fused], paths: LayerPaths) -> type:
    body = {"_original": original, "_form": form, "_paths": paths, "__module__": __name__, "__doc__": form.__doc__}
    return type(f"Fused{original.__name__}", (form, original), body)


def _empty(original: type, form: type[_Fused], paths: LayerPaths) -> _Fused:
    cls = _fused_class(original, form, paths)
    return cls.__new__(cls)
