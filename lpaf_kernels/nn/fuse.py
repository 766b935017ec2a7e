"""Run the blocks of a transformers encoder through lowrank_attention and lowrank_ffn, and back."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .lowrank_attention import PackedProjections, run_attention
from .lowrank_ffn import run_ffn
from .lowrank_sparse_linear import LowRankSparseLinear

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


def fuse(model: nn.Module) -> list[str]:
    """Let the attention and feed-forward blocks of ``model`` run as one operator each, in place.

    BERT, RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, ERNIE and DistilBERT are known, and the feed-forward blocks of
    DeBERTa and DeBERTa-v2/v3. A block is fused if its linears are all :class:`LowRankSparseLinear` (compress first)
    without parametrisation or activation of their own. MixedRankLinear, and hooks of any kind on a module inside the
    block (peft, accelerate), leave it as it is.

    Modules, parameters and state_dict stay the same: only classes change, that of the attention module and that of the
    layer, so hooks on these two, checkpoints and optimisers go on. The modules inside a block are no longer called. A
    hook put on one of them later, or another module in its place, sends the block back to its original forward; so does
    every call that the operators do not cover: attention weights asked for, a cache, cross-attention, a decoder,
    attention implementations other than "eager" and "sdpa". Training works, with the model's dropouts.

    Args:
        model: a transformers model, or anything that holds encoder layers of one.

    Returns:
        The names of all modules that are fused now, in the order of the model: attention modules ("...attention") and
        layers. A layer of BERT's kind runs its feed-forward block fused, one of DistilBERT both blocks.

    Raises:
        TypeError: ``model`` is no nn.Module.
        ValueError: it has no block that can be fused.
    """
    _check_module(model)
    for layer in list(model.modules()):
        family = LAYERS.get(_key(type(layer)))
        if family is not None:
            _fuse_layer(layer, family)
    fused = _fused_names(model)
    if not fused:
        raise ValueError(
            f"model: expected encoder layers (BERT, RoBERTa, ELECTRA, DistilBERT, DeBERTa) whose linears are all "
            f"LowRankSparseLinear, without hooks, found none in {type(model).__name__}"
        )
    return fused


def unfuse(model: nn.Module) -> list[str]:
    """Give every module that :func:`fuse` changed its own class back, in place.

    Returns:
        The names of these modules, as :func:`fuse` gave them; none if ``model`` is not fused.

    Raises:
        TypeError: ``model`` is no nn.Module.
    """
    _check_module(model)
    names = _fused_names(model)
    for name in names:
        model.get_submodule(name)._restore()
    return names


def fused_blocks(model: nn.Module) -> Iterator[AttentionParts | FeedForwardParts]:
    """What runs as one operator each in a model after :func:`fuse`, in its order."""
    for module in model.modules():
        if isinstance(module, _Fused):
            yield from (parts(module, module._family) for parts in module._blocks)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")


def _fused_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _Fused)]


def _key(cls: type) -> str:
    """The module and name of a class; a fused class has its original's."""
    cls = getattr(cls, "_original", cls)
    return f"{cls.__module__}.{cls.__qualname__}"


def _fuse_layer(layer: nn.Module, family: Family) -> None:
    if family.attention_module is not None:
        attention = getattr(layer, family.attention_module)
        if _stock(attention, family) and AttentionParts(attention, family).ready():
            _change_class(attention, _FusedAttention, family)
    if family.form.fusible(layer, family):
        _change_class(layer, family.form, family)


def _change_class(module: nn.Module, form: type[_Fused], family: Family) -> None:
    if not isinstance(module, _Fused):
        module.__class__ = _fused_class(type(module), form, family)
        module._prepare()


@functools.cache
def _fused_class(original: type, form: type[_Fused], family: Family) -> type:
    body = {"_original": original, "_form": form, "_family": family, "__module__": __name__, "__doc__": form.__doc__}
    return type(f"Fused{original.__name__}", (form, original), body)


def _empty(original: type, form: type[_Fused], layer: str) -> _Fused:
    """For pickle: a fused module without its state."""
    cls = _fused_class(original, form, LAYERS[layer])
    return cls.__new__(cls)


@dataclass(frozen=True)
class AttentionPaths:
    """Where the parts of an attention block are.

    ``inner`` has the configuration, the probabilities' dropout and, as ``heads``, their number; ``skipped`` are modules
    that the operator runs without calling them, ``inner`` among them.
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
    """Where the parts of a feed-forward block are, inside the layer; ``skipped`` as for attention."""

    first: str
    activation: str
    second: str
    norm: str
    dropout: str
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """How the layers of one kind of encoder are fused.

    Args:
        layer: the layer's module and class, its key in ``LAYERS``.
        form: goes before the layer's class.
        feed_forward: paths inside the layer.
        attention: paths inside ``attention_module``, or inside the layer if there is none. Default: not fused.
        attention_module: the child of the layer that is one attention block. Default: none, the layer runs it.
    """

    layer: str
    form: type[_Fused]
    feed_forward: FeedForwardPaths
    attention: AttentionPaths | None = None
    attention_module: str | None = None


class AttentionParts:
    """The modules of an attention block, looked up anew for each call: anyone may replace them."""

    def __init__(self, block: nn.Module, family: Family) -> None:
        paths = family.attention
        self.projections = (_child(block, paths.q), _child(block, paths.k), _child(block, paths.v))
        self.o = _child(block, paths.o)
        self.norm = _child(block, paths.norm)
        self.dropout = None if paths.dropout is None else _child(block, paths.dropout)
        self.inner = _child(block, paths.inner)
        self.heads = getattr(self.inner, paths.heads, None)
        self.skipped = [_child(block, path) for path in paths.skipped]
        self.family = family

    def ready(self) -> bool:
        """Whether the operator computes what these modules do."""
        if not _plain_containers(self.skipped, self.family):
            return False
        inner = self.inner
        dropouts = (inner.dropout,) if self.dropout is None else (inner.dropout, self.dropout)
        return (
            _plain_linears((*self.projections, self.o))
            and _plain(self.norm, dropouts)
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
        if mask.dtype == torch.bool:  # the eager implementation adds the mask, whatever its type
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

    def __init__(self, layer: nn.Module, family: Family) -> None:
        paths = family.feed_forward
        self.first = _child(layer, paths.first)
        self.activation = _child(layer, paths.activation)
        self.second = _child(layer, paths.second)
        self.norm = _child(layer, paths.norm)
        self.dropout = _child(layer, paths.dropout)
        self.skipped = [_child(layer, path) for path in paths.skipped]
        self.family = family

    def ready(self) -> bool:
        """Whether the operator computes what these modules do."""
        return (
            _plain_containers(self.skipped, self.family)
            and _plain_linears((self.first, self.second))
            and _plain(self.norm, (self.dropout,))
            and type(self.activation).__name__ in ACTIVATIONS
            and _unhooked(self.activation)
        )

    def run(self, x: Tensor) -> Tensor:
        """norm(dropout(second(act(first(x)))) + x)."""
        return run_ffn(
            x,
            self.first,
            self.second,
            activation=ACTIVATIONS[type(self.activation).__name__],
            residual=x,
            norm=self.norm,
            dropout=self.dropout,
        )


def _child(module: nn.Module, path: str) -> nn.Module | None:
    """What get_submodule finds, without its checks: this runs at every call."""
    for name in path.split("."):
        module = module._modules.get(name)
    return module


def _plain_linears(linears: Iterable[nn.Module]) -> bool:
    """Whether these are low-rank layers and nothing else: a parametrisation changes the class."""
    return all(
        type(linear) is LowRankSparseLinear and linear.activation is None and _unhooked(linear) for linear in linears
    )


def _plain_containers(modules: Iterable[nn.Module], family: Family) -> bool:
    return all(_stock(module, family) and _unhooked(module) for module in modules)


def _stock(module: nn.Module, family: Family) -> bool:
    """Whether the class of ``module`` is from the file of the layer's: another one's forward may do anything."""
    cls = getattr(type(module), "_original", type(module))
    return cls.__module__ == family.layer.rpartition(".")[0]


def _plain(norm: nn.Module, dropouts: Iterable[nn.Module]) -> bool:
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
    if (
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return False
    return all(
        getattr(hook, "__name__", "") == "output_capturing_hook" and hook.__module__.startswith("transformers.")
        for hook in module._forward_hooks.values()
    )


class _Fused:
    """Goes before a module's class and changes its forward; everything else stays.

    Changing the class and not the module (as parametrisations and FSDP2 do) keeps hooks, training mode, gradient
    checkpointing, and whoever holds a reference to the module or looks for its class.
    """

    _original: type
    _form: type
    _family: Family
    _blocks: tuple[type[AttentionParts] | type[FeedForwardParts], ...]

    def _prepare(self) -> None:
        """After the class has changed."""

    def _restore(self) -> None:
        self.__class__ = self._original

    def __reduce_ex__(self, protocol):
        # The class is made at run time: pickle cannot find it by name.
        return _empty, (self._original, self._form, self._family.layer), self.__dict__


class _Packed(_Fused):
    """With attention in it: its three matrices stay together in memory."""

    def _prepare(self) -> None:
        self._packed = PackedProjections()
        self._pack()

    def _pack(self) -> None:
        projections = AttentionParts(self, self._family).projections
        if _plain_linears(projections):
            self._packed.pack(*projections)

    def _restore(self) -> None:
        projections = AttentionParts(self, self._family).projections
        if _plain_linears(projections):
            self._packed.unpack(*projections)
        del self._packed
        super()._restore()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._pack()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self._pack()


class _FusedAttention(_Packed):
    """attention(x, mask) -> (output, None)."""

    _blocks = (AttentionParts,)

    def forward(self, hidden_states, attention_mask=None, *arguments, **options):
        parts = AttentionParts(self, self._family)
        extra = options | {str(index): value for index, value in enumerate(arguments)}
        if not parts.ready() or not parts.covers(hidden_states, attention_mask, extra):
            return super().forward(hidden_states, attention_mask, *arguments, **options)
        return parts.run(hidden_states, attention_mask, self._packed), None


class _FeedForwardFused(_Fused):
    """A layer whose feed-forward block is fused."""

    _blocks = (FeedForwardParts,)

    @staticmethod
    def fusible(layer: nn.Module, family: Family) -> bool:
        return FeedForwardParts(layer, family).ready()


class _FusedBertLayer(_FeedForwardFused):
    """The feed-forward block is a method, feed_forward_chunk(x) -> output."""

    def feed_forward_chunk(self, attention_output):
        parts = FeedForwardParts(self, self._family)
        return parts.run(attention_output) if parts.ready() else super().feed_forward_chunk(attention_output)


class _FusedDebertaLayer(_FeedForwardFused):
    """layer(x, mask) -> (output, attention weights or None)."""

    def forward(self, hidden_states, attention_mask, *arguments, **options):
        parts = FeedForwardParts(self, self._family)
        if arguments or not parts.ready():
            return super().forward(hidden_states, attention_mask, *arguments, **options)
        attention_output, weights = self.attention(hidden_states, attention_mask, **options)
        return parts.run(attention_output), weights


class _FusedDistilBertLayer(_Packed):
    """layer(x, mask) -> output, both blocks fused."""

    _blocks = (AttentionParts, FeedForwardParts)

    @staticmethod
    def fusible(layer: nn.Module, family: Family) -> bool:
        return AttentionParts(layer, family).ready() and FeedForwardParts(layer, family).ready()

    def forward(self, hidden_states, attention_mask=None, **options):
        attention, feed_forward = AttentionParts(self, self._family), FeedForwardParts(self, self._family)
        ready = attention.ready() and feed_forward.ready()
        if not ready or not attention.covers(hidden_states, attention_mask, options):
            return super().forward(hidden_states, attention_mask, **options)
        return feed_forward.run(attention.run(hidden_states, attention_mask, self._packed))


_BERT_FEED_FORWARD = FeedForwardPaths(
    first="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    second="output.dense",
    norm="output.LayerNorm",
    dropout="output.dropout",
    skipped=("intermediate", "output"),
)
_BERT = functools.partial(
    Family,
    form=_FusedBertLayer,
    feed_forward=_BERT_FEED_FORWARD,
    attention=AttentionPaths(
        q="self.query",
        k="self.key",
        v="self.value",
        o="output.dense",
        norm="output.LayerNorm",
        dropout="output.dropout",
        inner="self",
        heads="num_attention_heads",
        skipped=("self", "output"),
    ),
    attention_module="attention",
)
# Its attention reads relative positions.
_DEBERTA = functools.partial(Family, form=_FusedDebertaLayer, feed_forward=_BERT_FEED_FORWARD)

#: module and class of an encoder layer in transformers -> where its parts are
LAYERS = {
    family.layer: family
    for family in (
        _BERT("transformers.models.bert.modeling_bert.BertLayer"),
        _BERT("transformers.models.roberta.modeling_roberta.RobertaLayer"),
        _BERT("transformers.models.xlm_roberta.modeling_xlm_roberta.XLMRobertaLayer"),
        _BERT("transformers.models.camembert.modeling_camembert.CamembertLayer"),
        _BERT("transformers.models.electra.modeling_electra.ElectraLayer"),
        _BERT("transformers.models.ernie.modeling_ernie.ErnieLayer"),
        _DEBERTA("transformers.models.deberta.modeling_deberta.DebertaLayer"),
        _DEBERTA("transformers.models.deberta_v2.modeling_deberta_v2.DebertaV2Layer"),
        Family(
            "transformers.models.distilbert.modeling_distilbert.TransformerBlock",
            form=_FusedDistilBertLayer,
            attention=AttentionPaths(
                q="attention.q_lin",
                k="attention.k_lin",
                v="attention.v_lin",
                o="attention.out_lin",
                norm="sa_layer_norm",
                dropout=None,
                inner="attention",
                heads="n_heads",
                skipped=("attention",),
            ),
            feed_forward=FeedForwardPaths(
                first="ffn.lin1",
                activation="ffn.activation",
                second="ffn.lin2",
                norm="output_layer_norm",
                dropout="ffn.dropout",
                skipped=("ffn",),
            ),
        ),
    )
}
