"""The attention block of a transformer layer, from low-rank layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops.lowrank_attention import lowrank_attention
from ._block import check_layer, check_norm, dropout_p, finish, finish_apart, kept_columns, norm_arguments
from .lowrank_sparse_linear import LowRankSparseLinear


class LowRankAttention(nn.Module):
    """norm(dropout(o(softmax(q(x) k(x)^T scale + mask) v(x))) + residual) in one operator.

    The layers, the normalisation and their parameters are the given ones, not copies. The three matrices that read x
    are laid side by side in memory (each parameter becomes a view), so that inference takes them as one without a copy;
    moving or loading them apart is allowed and costs a concatenation per call.

    Args:
        q: [in -> num_heads * head_dim], without activation of its own.
        k, v: [in -> num_kv_heads * head_dim], likewise.
        o: [num_heads * head_dim -> out], likewise.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``. Default: ``num_heads``.
        norm: nn.LayerNorm or nn.RMSNorm over the outputs, or over the inputs with ``norm_first``. Default: none.
        norm_first: normalise x, not the result. Default: False.
        dropout: chance of each entry of o's result to become 0 in training mode, in [0, 1). Default: 0.
        attention_dropout: the same for the probabilities. Default: 0.
        is_causal: no position attends to a later one. Default: False.
        scale: of the scores. Default: head_dim ** -0.5.

    Shapes:
        x [B, L, in]; attn_mask boolean (True: attend) or additive, broadcastable to [B, heads, L, L], or None; residual
        [B, L, out] or None; output [B, L, out]. ``cu_seqlens`` and ``rotary`` as for :func:`lowrank_attention`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, or sizes that do not fit.
    """

    def __init__(
        self,
        q: LowRankSparseLinear,
        k: LowRankSparseLinear,
        v: LowRankSparseLinear,
        o: LowRankSparseLinear,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        norm: nn.Module | None = None,
        norm_first: bool = False,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_layer("q", q)
        _check_heads("num_heads", num_heads, q.out_features, "the outputs of q")
        _check_heads("num_kv_heads", kv_heads, num_heads, "num_heads")
        check_layer("k", k, inputs=q.in_features, outputs=q.out_features // num_heads * kv_heads)
        check_layer("v", v, inputs=q.in_features, outputs=k.out_features)
        check_layer("o", o, inputs=q.out_features)
        check_norm(norm, q.in_features if norm_first else o.out_features)
        self.q = q
        self.k = k
        self.v = v
        self.o = o
        self.norm = norm
        self.dropout = nn.Dropout(dropout)
        self.attention_dropout = nn.Dropout(attention_dropout)
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.norm_first = norm_first
        self.is_causal = is_causal
        self.scale = scale
        pack(q, k, v)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        residual: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, L, in] -> [B, L, out]."""
        return run_attention(
            x,
            self.q,
            self.k,
            self.v,
            self.o,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            attn_mask=attn_mask,
            cu_seqlens=cu_seqlens,
            is_causal=self.is_causal,
            rotary=rotary,
            scale=self.scale,
            residual=residual,
            norm=self.norm,
            norm_first=self.norm_first,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
        )

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        pack(self.q, self.k, self.v)
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        pack(self.q, self.k, self.v)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, is_causal={self.is_causal},"
            f" scale={self.scale}, norm_first={self.norm_first}"
        )


def _check_heads(name: str, heads: int, divided: int, of: str) -> None:
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"{name}: expected an integer, got {heads!r}")
    if heads < 1 or divided % heads:
        raise ValueError(f"{name}: expected a divisor of {divided} ({of}), got {heads}")


def run_attention(
    x: Tensor,
    q: LowRankSparseLinear,
    k: LowRankSparseLinear,
    v: LowRankSparseLinear,
    o: LowRankSparseLinear,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_causal: bool = False,
    rotary: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    residual: Tensor | None = None,
    norm: nn.Module | None = None,
    norm_first: bool = False,
    dropout: nn.Dropout | None = None,
    attention_dropout: nn.Dropout | None = None,
) -> Tensor:
    """:func:`lowrank_attention` with the parameters of these modules, as they are now."""
    apart = finish_apart(x)
    y = lowrank_attention(
        x,
        _joined([q.down, k.down, v.down]),
        q.up,
        k.up,
        v.up,
        _joined_biases((q, k, v)),
        o.down,
        o.up,
        o.bias,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        attn_mask=attn_mask,
        cu_seqlens=cu_seqlens,
        is_causal=is_causal,
        rotary=rotary,
        scale=scale,
        kept=tuple(kept_columns(layer) for layer in (q, k, v, o)),
        residual=None if apart else residual,
        norm=None if apart and not norm_first else norm_arguments(norm),
        norm_first=norm_first,
        dropout_p=dropout_p(dropout),
        attention_dropout_p=dropout_p(attention_dropout),
    )
    return finish(y, residual, None if norm_first else norm) if apart else y


def pack(*layers: LowRankSparseLinear) -> None:
    """Lay the layers' ``down`` matrices side by side in one storage, and their biases in another.

    The parameters stay the layers' own and become views. Nothing happens where they already lie so, or cannot
    (different dtypes or devices, tensor subclasses).
    """
    for tensors in _packable(layers):
        if _ordinary(tensors) and not _side_by_side(tensors):
            # Parameters must not become inference tensors.
            with torch.inference_mode(False), torch.no_grad():
                joined = torch.cat([tensor.detach() for tensor in tensors])
                for tensor, part in zip(tensors, joined.split([len(tensor) for tensor in tensors]), strict=True):
                    tensor.data = part


def unpack(*layers: LowRankSparseLinear) -> None:
    """Give every parameter that :func:`pack` has moved a storage of its own."""
    for tensors in _packable(layers):
        if _ordinary(tensors) and _side_by_side(tensors):
            with torch.inference_mode(False), torch.no_grad():
                for tensor in tensors:
                    tensor.data = tensor.detach().clone()


def _packable(layers: Sequence[LowRankSparseLinear]) -> list[list[Tensor]]:
    biases = [layer.bias for layer in layers if layer.bias is not None]
    return [[layer.down for layer in layers], biases if len(biases) == len(layers) else []]


def _ordinary(tensors: Sequence[Tensor]) -> bool:
    """Whether these are parameters in plain memory that one storage could hold."""
    return (
        len({id(tensor) for tensor in tensors}) == len(tensors)
        and all(
            type(tensor) is nn.Parameter and type(tensor.data) is Tensor and not tensor.is_inference()
            for tensor in tensors
        )
        and len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1
        and not tensors[0].is_meta
    )


def _side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether each tensor starts where the one before it ends, in the same storage."""
    storage = tensors[0].untyped_storage().data_ptr()
    end = tensors[0].storage_offset()
    for tensor in tensors:
        if tensor.untyped_storage().data_ptr() != storage or tensor.storage_offset() != end:
            return False
        if not tensor.is_contiguous():
            return False
        end += tensor.numel()
    return True


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one below the other: a view where they lie so and no gradient is wanted, else a new tensor."""
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if tracing or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return torch.cat(tensors)
    if not _ordinary(tensors) or not _side_by_side(tensors):
        return torch.cat(tensors)
    first = tensors[0]
    return first.as_strided((sum(len(tensor) for tensor in tensors), *first.shape[1:]), first.stride())


def _joined_biases(layers: Sequence[LowRankSparseLinear]) -> Tensor | None:
    biases = [layer.bias for layer in layers]
    if all(bias is None for bias in biases):
        return None
    if any(bias is None for bias in biases):
        biases = [
            layer.up.new_zeros(layer.out_features) if bias is None else bias
            for layer, bias in zip(layers, biases, strict=True)
        ]
    return _joined(biases)
