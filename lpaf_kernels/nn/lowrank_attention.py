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
    are laid one below the other in memory, so that inference takes them as one; where they lie apart (another module or
    tensor was put in one's place), each call copies them together.

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
        self._packed = PackedProjections()
        self._packed.pack(q, k, v)

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
            (self.q, self.k, self.v),
            self.o,
            self._packed,
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
        self._packed.pack(self.q, self.k, self.v)
        return self

    def __setstate__(self, state):
        super().__setstate__(state)
        self._packed.pack(self.q, self.k, self.v)

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
    projections: Sequence[LowRankSparseLinear],
    o: LowRankSparseLinear,
    packed: PackedProjections,
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
    """:func:`lowrank_attention` with the parameters of these modules (``projections``: q, k, v), as they are now."""
    apart = finish_apart(x)
    y = lowrank_attention(
        x,
        packed.down(*projections),
        *(layer.up for layer in projections),
        packed.bias(*projections),
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
        kept=tuple(kept_columns(layer) for layer in (*projections, o)),
        residual=None if apart else residual,
        norm=None if apart and not norm_first else norm_arguments(norm),
        norm_first=norm_first,
        dropout_p=dropout_p(dropout),
        attention_dropout_p=dropout_p(attention_dropout),
    )
    return finish(y, residual, None if norm_first else norm) if apart else y


class PackedProjections:
    """The ``down`` matrices of several layers one below the other in memory, and their biases.

    The parameters stay the layers' own: each keeps its identity and a storage of its own size, so that whoever saves or
    moves them notices nothing. Only the memory behind is one piece. A copy of this object starts empty.
    """

    def __init__(self) -> None:
        self._down: Tensor | None = None
        self._bias: Tensor | None = None

    def __reduce__(self):
        return PackedProjections, ()

    def pack(self, *layers: LowRankSparseLinear) -> None:
        """Move what is not yet in place; different dtypes, devices or tensor subclasses stay where they are."""
        self._down = _lay_out(self._down, [layer.down for layer in layers])
        self._bias = _lay_out(self._bias, [layer.bias for layer in layers])

    def unpack(self, *layers: LowRankSparseLinear) -> None:
        """Give every parameter memory of its own."""
        for whole, tensors in (
            (self._down, [layer.down for layer in layers]),
            (self._bias, [layer.bias for layer in layers]),
        ):
            if _is_laid_out(whole, tensors):
                for tensor in tensors:
                    tensor.data = tensor.detach().clone()
        self._down = self._bias = None

    def down(self, *layers: LowRankSparseLinear) -> Tensor:
        """The matrices as one; a copy only if a gradient is wanted or they lie apart."""
        return _joined(self._down, [layer.down for layer in layers])

    def bias(self, *layers: LowRankSparseLinear) -> Tensor | None:
        """The biases as one, or None if no layer has one."""
        biases = [layer.bias for layer in layers]
        if all(bias is None for bias in biases):
            return None
        if any(bias is None for bias in biases):
            biases = [
                layer.up.new_zeros(layer.out_features) if bias is None else bias
                for layer, bias in zip(layers, biases, strict=True)
            ]
        return _joined(self._bias, biases)


def _lay_out(whole: Tensor | None, tensors: Sequence[Tensor | None]) -> Tensor | None:
    """The memory that the tensors now lie in, one after the other; None if they cannot."""
    if _is_laid_out(whole, tensors):
        return whole
    if not _is_movable(tensors):
        return None
    with torch.no_grad():
        whole = torch.cat(tensors)
        for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
            tensor.data = torch.from_dlpack(part)  # a storage of this size: a view would show the whole one
    return whole


def _is_movable(tensors: Sequence[Tensor | None]) -> bool:
    """Whether these are different parameters in plain memory of one kind."""
    return (
        all(type(tensor) is nn.Parameter and type(tensor.data) is Tensor for tensor in tensors)
        and len({id(tensor) for tensor in tensors}) == len(tensors)
        and len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1
        and tensors[0].device.type in ("cpu", "cuda")
        and all(tensor.numel() and not tensor.is_inference() for tensor in tensors)
        # What other processes see must not move away.
        and not any(tensor.device.type == "cpu" and tensor.is_shared() for tensor in tensors)
        and not torch.is_inference_mode_enabled()
    )


def _is_laid_out(whole: Tensor | None, tensors: Sequence[Tensor | None]) -> bool:
    """Whether the tensors fill ``whole`` one after the other.

    While ``whole`` is there, nothing else can have an address inside it.
    """
    if whole is None:
        return False
    begin, size, end = whole.data_ptr(), whole.element_size(), 0
    for tensor in tensors:
        if type(tensor) is not nn.Parameter or tensor.data_ptr() != begin + size * end:
            return False
        if tensor.dtype != whole.dtype or not tensor.is_contiguous():
            return False
        end += tensor.numel()
    return end == whole.numel()


def _joined(whole: Tensor | None, tensors: Sequence[Tensor]) -> Tensor:
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return torch.cat(tensors) if tracing or wanted or not _is_laid_out(whole, tensors) else whole
