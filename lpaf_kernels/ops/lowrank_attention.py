"""A whole self-attention block of low-rank layers, with residual and normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .._library import has_kernel, library, register_autocast, register_fallback
from ..triton.launch import ALIGNED, pitch
from ..tuning import lowrank_attention as plans
from ..tuning.lowrank_sparse_linear import expand_chain, prefers_chain
from ._blocks import (
    NATIVE_DTYPES,
    Norm,
    check_dropout,
    check_layer,
    check_norm,
    check_residual,
    check_seed,
    normalise,
    reference_norm,
    seeded,
)
from ._checks import check_device, check_floating, check_shape
from .lowrank_sparse_linear import (
    check_kept_type,
    is_eager,
    lowrank_sparse_linear_reference,
    packed_lowrank_sparse_linear,
)

# csrc/cpu/lowrank_attention.cpp, without autograd.
_HAS_NATIVE = has_kernel("lowrank_attention_forward", "CPU")
_native_forward = torch.ops.lpaf_kernels.lowrank_attention_forward.default
NO_KEPT = (None, None, None, None)
# (down, up, kept, bias) of Q, K and V.
Layers = list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


def lowrank_attention(
    x: Tensor,
    down_qkv: Tensor,
    up_q: Tensor,
    up_k: Tensor,
    up_v: Tensor,
    bias_qkv: Tensor | None,
    down_o: Tensor,
    up_o: Tensor,
    bias_o: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    is_causal: bool = False,
    rotary: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    kept: Sequence[Tensor | None] = NO_KEPT,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    norm_first: bool = False,
    dropout_p: float = 0.0,
    attention_dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """norm(dropout(O(softmax(scale Q(x) K(x)^T + mask) V(x))) + residual) with low-rank layers Q, K, V and O.

    With ``norm_first`` the normalisation is that of the input instead. On the CPU in float32 or bfloat16, without
    gradients, Q, K, V and the probabilities exist for one head of one sequence at a time, on a GPU for one tile of it
    where the tables prefer that. With gradients only the arguments are kept for the backward, which computes the block
    again.

    Args:
        x: [..., length, in], sequences of one length, or with ``cu_seqlens`` [tokens, in]. float32, float16, bfloat16
            or float64 (as every other floating argument but the mask).
        down_qkv: [q + k + v, in]: the packed ``down`` of Q (r + kept rows), then of K, then of V.
        up_q: [r, num_heads * head_dim]; up_k, up_v: [r, num_kv_heads * head_dim], each with its own r.
        bias_qkv: the biases of Q, K and V side by side, or None.
        down_o: [r + kept, num_heads * head_dim]; up_o: [r, out]; bias_o: [out] or None.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of ``num_heads``. Default: ``num_heads``.
        attn_mask: bool (True: may attend) or float (added to the scores), broadcastable to
            [batch, num_heads, length, length]. A query that may attend to nothing gives 0. Default: none.
        cu_seqlens: int32 or int64 [sequences + 1], where each sequence begins among the tokens, and their number; not
            together with ``attn_mask``. Default: none.
        max_seqlen: length of the longest of those sequences. Default: looked up, which waits for a GPU, and which
            torch.compile cannot do where there are gradients.
        is_causal: no query attends to later keys. Default: False.
        rotary: (cos, sin), [length, head_dim] or [batch, length, head_dim], with ``cu_seqlens`` [tokens, head_dim]: Q
            and K are turned, the first half of a head's dimensions with the second. Default: none.
        scale: of the scores. Default: head_dim^-0.5.
        kept: positions of the kept columns of S among the outputs of Q, K, V and O, int32 or int64. Default: none.
        residual: [..., length, out]. Default: none.
        norm: a :class:`Norm`. Default: none.
        norm_first: normalise x, not the result. Default: False.
        dropout_p: of O's result, in [0, 1). Default: 0.
        attention_dropout_p: of the probabilities, in [0, 1). Default: 0.
        seed: makes the dropout follow from it alone (not under torch.compile). Default: none.

    Returns:
        [..., length, out].

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or name.
    """
    plain = all(option is None for option in (cu_seqlens, max_seqlen, rotary, seed))
    if plain and not (norm_first or dropout_p or attention_dropout_p):
        projections = (x, down_qkv, up_q, up_k, up_v, bias_qkv, down_o, up_o, bias_o)
        y = _without_checks(projections, num_heads, num_kv_heads, attn_mask, is_causal, scale, kept, residual, norm)
        if y is not None:
            return y
    check_floating("x", x)
    if x.dim() < 2 or (cu_seqlens is not None and x.dim() != 2):
        expected = "[..., length, in]" if cu_seqlens is None else "[tokens, in] with cu_seqlens"
        raise ValueError(f"x: expected shape {expected}, got {list(x.shape)}")
    kept = _check_kept(kept)
    heads = _check_heads(num_heads, num_kv_heads)
    head_dim = _check_projections(x, down_qkv, (up_q, up_k, up_v), kept, bias_qkv, heads)
    out = check_layer(x, num_heads * head_dim, "_o", down_o, up_o, kept[3], bias_o)
    check_dropout("dropout_p", dropout_p)
    check_dropout("attention_dropout_p", attention_dropout_p)
    check_seed(seed)
    check_residual(residual, x, out, "the columns of up_o")
    _check_sequences(x, cu_seqlens, max_seqlen, attn_mask)
    cos, sin = _check_rotary(rotary, x, head_dim)
    kind, weight, bias, eps = check_norm(norm, x.shape[-1] if norm_first else out, x)
    if kind != "none" and norm_first:
        x = normalise(x, kind, weight, bias, eps)
        kind, weight, bias = "none", None, None
    shape = (*x.shape[:-1], out)
    if cu_seqlens is None:
        x = x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])
        attn_mask = _check_mask(attn_mask, x, num_heads)
    projections = (x, down_qkv, up_q, kept[0], up_k, kept[1], up_v, kept[2], bias_qkv)
    output = (down_o, up_o, kept[3], bias_o)
    scale = head_dim**-0.5 if scale is None else float(scale)
    sequences = (attn_mask, cu_seqlens, cos, sin, max_seqlen, *heads, bool(is_causal), scale)
    learns = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (attn_mask, cos, sin))
    if not (dropout_p > 0 or attention_dropout_p > 0 or learns):
        rows = None if residual is None else residual.reshape(*x.shape[:-1], out)
        return torch.ops.lpaf_kernels.lowrank_attention(
            *projections, *output, rows, weight, bias, *sequences, kind, eps
        ).view(shape)
    with seeded(seed, x):
        context = _attend(*projections, *sequences, attention_dropout_p)
        y = F.dropout(packed_lowrank_sparse_linear(context, *output), dropout_p).view(shape)
    return normalise(y if residual is None else y + residual, kind, weight, bias, eps)


def lowrank_attention_reference(
    x: Tensor,
    down_qkv: Tensor,
    up_q: Tensor,
    up_k: Tensor,
    up_v: Tensor,
    bias_qkv: Tensor | None,
    down_o: Tensor,
    up_o: Tensor,
    bias_o: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    attn_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    is_causal: bool = False,
    rotary: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
    kept: Sequence[Tensor | None] = NO_KEPT,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """The same in plain torch, differentiable, without dropout: dense weights are built, and every score."""

    def linear(x: Tensor, down: Tensor, up: Tensor, kept: Tensor | None, bias: Tensor | None) -> Tensor:
        rank = up.shape[0]
        s = None if kept is None else down[rank:].t()
        return lowrank_sparse_linear_reference(x, down[:rank].t(), up, s, kept, bias)

    def attend(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        layers = zip(downs, (up_q, up_k, up_v), kept, biases, strict=False)
        q, k, v = (linear(x, *layer).unflatten(-1, (-1, head_dim)) for layer in layers)
        if cos is not None:
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        q, k, v = (heads.transpose(-3, -2) for heads in (q, k, v))
        k, v = (heads.repeat_interleave(q.shape[-3] // heads.shape[-3], -3) for heads in (k, v))
        scores = q @ k.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
        if attn_mask is not None:
            forbidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -torch.inf) if forbidden else scores + attn_mask
        if is_causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        nothing = (scores == -torch.inf).all(-1, keepdim=True)
        probabilities = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
        return (probabilities @ v).transpose(-3, -2).flatten(-2)

    head_dim = up_q.shape[1] // num_heads
    downs = down_qkv.split(_widths((up_q, up_k, up_v), kept))
    biases = _split_bias(bias_qkv, (up_q, up_k, up_v))
    cos, sin = (None, None) if rotary is None else rotary
    if cu_seqlens is None:
        context = attend(x, cos, sin)
    else:
        context = x.new_empty(0, up_q.shape[1])
        bounds = cu_seqlens.tolist()
        for at in map(slice, bounds[:-1], bounds[1:]):
            piece = attend(x[at], None if cos is None else cos[at], None if sin is None else sin[at])
            context = torch.cat([context, piece])
    y = linear(context, down_o, up_o, kept[3], bias_o)
    return reference_norm(y if residual is None else y + residual, norm)


def _without_checks(
    projections: tuple[Tensor | None, ...],
    num_heads: int,
    num_kv_heads: int | None,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    kept: Sequence[Tensor | None],
    residual: Tensor | None,
    norm: Norm | None,
) -> Tensor | None:
    """The native kernel's result at once, where nothing but it is wanted, or None.

    It checks dtypes and shapes itself, in less time than it takes in Python, which a small block would feel. What it
    refuses comes to the checks, which say why.
    """
    x, down_qkv, up_q, up_k, up_v, bias_qkv, down_o, up_o, bias_o = projections
    if not _HAS_NATIVE or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    try:
        kind, weight, bias, eps = ("none", None, None, 0.0) if norm is None else norm
        kept_q, kept_k, kept_v, kept_o = kept
        if x.dim() != 3 or x.dtype not in NATIVE_DTYPES or not x.is_cpu:
            return None
        if not is_eager(*projections, *kept, attn_mask, residual, weight, bias):
            return None
        batch, length, _ = x.shape
        if attn_mask is not None:
            if attn_mask.dtype not in (torch.bool, torch.float32):
                return None
            attn_mask = attn_mask.expand(batch, num_heads, length, length)
        return _native_forward(
            x, down_qkv, up_q, kept_q, up_k, kept_k, up_v, kept_v, bias_qkv, down_o, up_o, kept_o, bias_o, residual,
            weight, bias, attn_mask, None, None, None, None, num_heads,
            num_heads if num_kv_heads is None else num_kv_heads, is_causal,
            (up_q.shape[1] // num_heads) ** -0.5 if scale is None else scale, kind, eps,
        )  # fmt: skip
    except (RuntimeError, TypeError, ValueError, AttributeError, ZeroDivisionError, IndexError):
        return None


def _check_heads(num_heads: int, num_kv_heads: int | None) -> tuple[int, int]:
    if num_kv_heads is None:
        num_kv_heads = num_heads
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: expected a divisor of {num_heads} (num_heads), got {num_kv_heads}")
    return num_heads, num_kv_heads


def _check_kept(kept: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    if isinstance(kept, Tensor) or len(kept) != 4:
        raise ValueError("kept: expected four entries (those of q, k, v and o), each None or positions")
    for positions in kept:
        if positions is not None:
            check_kept_type(positions)
    return tuple(None if positions is None or positions.shape[0] == 0 else positions for positions in kept)


def _check_projections(
    x: Tensor,
    down: Tensor,
    ups: tuple[Tensor, ...],
    kept: tuple[Tensor | None, ...],
    bias: Tensor | None,
    heads: tuple[int, int],
) -> int:
    """Raise unless Q, K and V fit x and the heads; returns the size of a head."""
    names = ("up_q", "up_k", "up_v")
    check_floating("down_qkv", down)
    for name, up in zip(names, ups, strict=True):
        check_floating(name, up)
        if up.dim() != 2:
            raise ValueError(f"{name}: expected two dimensions, got shape {list(up.shape)}")
    widths = _widths(ups, kept)
    check_shape("down_qkv", down, sum(widths), x.shape[-1], because="the ranks and kept columns of q, k and v, in")
    if bias is not None:
        check_floating("bias_qkv", bias)
        check_shape("bias_qkv", bias, sum(up.shape[1] for up in ups), because="the columns of up_q, up_k and up_v")
    layers = zip("qkv", down.split(widths), ups, kept, _split_bias(bias, ups), strict=False)
    for name, *layer in layers:
        check_layer(x, x.shape[-1], f"_{name}", *layer)
    num_heads, num_kv_heads = heads
    head_dim = ups[0].shape[1] // num_heads
    for name, up, count in zip(names, ups, (num_heads, num_kv_heads, num_kv_heads), strict=True):
        if head_dim == 0 or up.shape[1] != count * head_dim:
            size = f"{head_dim} columns (as those of up_q)" if head_dim else "at least one column"
            raise ValueError(f"{name}: expected {count} heads of {size}, got shape {list(up.shape)}")
    return head_dim


def _check_sequences(x: Tensor, cu_seqlens: Tensor | None, max_seqlen: int | None, attn_mask: Tensor | None) -> None:
    if cu_seqlens is None:
        if max_seqlen is not None:
            raise ValueError(f"max_seqlen: expected None without cu_seqlens, got {max_seqlen!r}")
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens: expected int32 or int64, got {kind}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: expected shape [sequences + 1], got {list(cu_seqlens.shape)}")
    check_device("cu_seqlens", cu_seqlens, x)
    if attn_mask is not None:
        raise ValueError("attn_mask: expected None together with cu_seqlens")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != x.shape[0] or bounds != sorted(bounds):
        expected = f"ascending positions from 0 to {x.shape[0]} (the rows of x)"
        raise ValueError(f"cu_seqlens: expected {expected}, got {bounds}")
    longest = max((end - begin for begin, end in pairwise(bounds)), default=0)
    if max_seqlen is not None and max_seqlen < longest:
        raise ValueError(f"max_seqlen: expected at least {longest} (the longest of cu_seqlens), got {max_seqlen}")


def _check_mask(mask: Tensor | None, x: Tensor, num_heads: int) -> Tensor | None:
    """The mask as a view [batch, num_heads, length, length]."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.float32, x.dtype):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"attn_mask: expected bool, float32 or {x.dtype} (that of x), got {kind}")
    check_device("attn_mask", mask, x)
    batch, length, _ = x.shape
    shape = (batch, num_heads, length, length)
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if len(sizes) > 4 or any(size not in (1, wanted) for size, wanted in zip(sizes, shape, strict=True)):
        raise ValueError(f"attn_mask: expected a shape that broadcasts to {list(shape)}, got {list(mask.shape)}")
    return mask.expand(shape)


def _check_rotary(
    rotary: tuple[Tensor, Tensor] | None, x: Tensor, head_dim: int
) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin as [length or tokens, head_dim] or [batch, length, head_dim], in the dtype of x."""
    if rotary is None:
        return None, None
    if isinstance(rotary, Tensor) or len(rotary) != 2:
        raise ValueError(f"rotary: expected (cos, sin), got {type(rotary).__name__} of length {len(rotary)}")
    if head_dim % 2:
        raise ValueError(f"rotary: expected None for heads of odd size {head_dim}")
    shared, own = (x.shape[-2], head_dim), (*x.shape[:-1], head_dim)
    for name, table in zip(("cos", "sin"), rotary, strict=True):
        check_floating(f"rotary {name}", table)
        check_device(f"rotary {name}", table, x)
        if tuple(table.shape) not in (shared, (1, *shared), own):
            expected = f"{list(shared)} or {list(own)}"
            raise ValueError(f"rotary {name}: expected shape {expected}, got {list(table.shape)}")
    cos, sin = (table.to(x.dtype) for table in rotary)
    if cos.shape == sin.shape == own and x.dim() > 2:
        return cos.reshape(-1, *shared), sin.reshape(-1, *shared)
    if {cos.dim(), sin.dim()} == {2, 3} and own in (tuple(cos.shape), tuple(sin.shape)) and x.dim() > 2:
        raise ValueError(f"rotary: expected cos and sin of one shape, got {list(cos.shape)} and {list(sin.shape)}")
    return cos.reshape(shared), sin.reshape(shared)


def _widths(ups: tuple[Tensor, ...], kept: Sequence[Tensor | None]) -> list[int]:
    """Rows of the packed ``down`` of Q, K and V."""
    layers = zip(ups, kept, strict=False)
    return [up.shape[0] + (0 if positions is None else positions.shape[0]) for up, positions in layers]


def _split_bias(bias: Tensor | None, ups: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return (None, None, None) if bias is None else bias.split([up.shape[1] for up in ups])


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [..., tokens, heads, head_dim], turned."""
    first, second = heads.chunk(2, -1)
    return heads * cos.unsqueeze(-2) + torch.cat([-second, first], -1) * sin.unsqueeze(-2)


def _project_apart(x: Tensor, layers: Layers) -> list[Tensor]:
    """Q, K and V [..., columns], differentiable."""
    return [packed_lowrank_sparse_linear(x, *layer) for layer in layers]


def _project_together(x: Tensor, layers: Layers, down_qkv: Tensor) -> list[Tensor]:
    """The same for inference, x read once for all three, unless a layer has a better way."""
    widths = [down.shape[0] for down, *_ in layers]
    # From columns between the 16-byte pieces of z cuBLAS would take its unaligned kernels.
    aligned = all(first % ALIGNED == 0 for first in accumulate(widths[:2]))
    if not aligned or not all(prefers_chain(x, *layer) for layer in layers):
        return _project_apart(x, layers)
    lead, x = x.shape[:-1], x.reshape(-1, x.shape[-1])
    z = x.new_empty(x.shape[0], pitch(sum(widths)))[:, : sum(widths)]
    torch.mm(x, down_qkv.t(), out=z)
    parts = zip(z.split(widths, 1), layers, strict=True)
    return [expand_chain(part, *layer).view(*lead, layer[0].shape[1]) for part, (_, *layer) in parts]


def _attend(
    x, down_qkv, up_q, kept_q, up_k, kept_k, up_v, kept_v, bias_qkv, attn_mask, cu_seqlens, cos, sin, max_seqlen,
    num_heads, num_kv_heads, is_causal, scale, dropout_p=0.0, together=False,
):  # fmt: skip
    """The context [..., num_heads * head_dim] that O reads: Q, K and V are built once, and torch's attention."""
    ups, kept = (up_q, up_k, up_v), (kept_q, kept_k, kept_v)
    layers = list(zip(down_qkv.split(_widths(ups, kept)), ups, kept, _split_bias(bias_qkv, ups), strict=True))
    head_dim = up_q.shape[1] // num_heads
    rows = _project_together(x, layers, down_qkv) if together else _project_apart(x, layers)
    q, k, v = (columns.unflatten(-1, (-1, head_dim)) for columns in rows)
    if cos is not None:
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        if max_seqlen is None:
            max_seqlen = int(lengths.max()) if lengths.numel() else 0
        sequence = torch.repeat_interleave(lengths, output_size=x.shape[0])
        position = torch.arange(x.shape[0], device=x.device) - cu_seqlens[sequence]
        q, k, v = (_pad(heads, sequence, position, lengths.shape[0], max_seqlen) for heads in (q, k, v))
        attn_mask = (torch.arange(max_seqlen, device=x.device) < lengths[:, None])[:, None, None]
    if is_causal and attn_mask is not None:
        earlier = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=x.device).tril()
        forbids = attn_mask.dtype == torch.bool
        attn_mask = attn_mask & earlier if forbids else attn_mask.masked_fill(~earlier, -torch.inf)
        is_causal = False
    context = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask, dropout_p, is_causal,
        scale=scale, enable_gqa=num_heads != num_kv_heads,
    ).transpose(1, 2)  # fmt: skip
    if cu_seqlens is not None:
        context = context[sequence, position]
    return context.reshape(*x.shape[:-1], num_heads * head_dim)


def _pad(heads: Tensor, sequence: Tensor, position: Tensor, sequences: int, longest: int) -> Tensor:
    """[tokens, ...] as [sequences, longest, ...], 0 where a sequence is shorter."""
    return heads.new_zeros(sequences, longest, *heads.shape[1:]).index_put((sequence, position), heads)


def _compose(
    x, down_qkv, up_q, kept_q, up_k, kept_k, up_v, kept_v, bias_qkv, down_o, up_o, kept_o, bias_o, residual,
    norm_weight, norm_bias, attn_mask, cu_seqlens, cos, sin, max_seqlen, num_heads, num_kv_heads, is_causal, scale,
    norm, eps, together=False,
):  # fmt: skip
    """The whole block, layer by layer, differentiable unless the projections are taken ``together``."""
    context = _attend(
        x, down_qkv, up_q, kept_q, up_k, kept_k, up_v, kept_v, bias_qkv, attn_mask, cu_seqlens, cos, sin, max_seqlen,
        num_heads, num_kv_heads, is_causal, scale, together=together,
    )  # fmt: skip
    y = packed_lowrank_sparse_linear(context, down_o, up_o, kept_o, bias_o)
    return normalise(y if residual is None else y + residual, norm, norm_weight, norm_bias, eps)


@torch.no_grad()
def chain(*arguments):
    return _compose(*arguments, together=True)


def _lowrank_attention_cuda(*arguments):
    """The Triton block where the tables prefer it."""
    problem = plans.Problem(*arguments).with_length()
    y = plans.cuda_forward(problem)
    return chain(*problem) if y is None else y


def _lowrank_attention_cpu(x, *arguments):
    """The native kernel where there is one and it takes this dtype."""
    if not _HAS_NATIVE or x.dtype not in NATIVE_DTYPES:
        return chain(x, *arguments)
    arguments = list(arguments)
    for index in _TABLES:
        table = arguments[index - 1]
        if table is not None and table.dtype == torch.bfloat16:
            arguments[index - 1] = table.float()
    return _native_forward(x, *arguments)


def _lowrank_attention_fake(x, down_qkv, up_q, kept_q, up_k, kept_k, up_v, kept_v, bias_qkv, down_o, up_o, *_):
    return x.new_empty((*x.shape[:-1], up_o.shape[1]))


# Positions in the schema: the floating arguments that have gradients, the mask, it and the rotary tables, and the first
# that is no tensor.
_FLOATING = (0, 1, 2, 4, 6, 8, 9, 10, 12, 13, 14, 15)
_MASK = 16
_TABLES = (16, 18, 19)
_OPTIONS = 20


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:_OPTIONS])
    ctx.options = inputs[_OPTIONS:]


def _backward(ctx, grad):
    """The block again, recorded, and its gradients: every layer and torch's attention bring their own."""
    tensors = list(ctx.saved_tensors)
    needed = [index for index in _FLOATING if ctx.needs_input_grad[index]]
    kind = grad.device.type
    # The backward runs under whatever autocast surrounds it; these products take the forward's dtype.
    with torch.enable_grad(), torch.autocast(kind if kind != "meta" else "cpu", enabled=False):
        for index in needed:
            tensors[index] = tensors[index].detach().requires_grad_()
        found = torch.autograd.grad(_compose(*tensors, *ctx.options), [tensors[index] for index in needed], grad)
    grads: list[Tensor | None] = [None] * (_OPTIONS + len(ctx.options))
    for index, gradient in zip(needed, found, strict=True):
        grads[index] = gradient
    return tuple(grads)


def _cast(dtype, *arguments):
    """All floating arguments but the mask, which torch's attention takes in float32 too."""
    if arguments[0].dtype == torch.float64:
        return arguments
    return tuple(
        argument.to(dtype)
        if isinstance(argument, Tensor) and argument.is_floating_point() and index != _MASK
        else argument
        for index, argument in enumerate(arguments)
    )


register_fallback("lowrank_attention", _lowrank_attention_cpu, ("CPU",))
register_fallback("lowrank_attention", _lowrank_attention_cuda, ("CUDA",))
register_fallback("lowrank_attention_forward", chain)
torch.library.register_fake("lpaf_kernels::lowrank_attention", _lowrank_attention_fake, lib=library)
torch.library.register_fake("lpaf_kernels::lowrank_attention_forward", _lowrank_attention_fake, lib=library)
torch.library.register_autograd("lpaf_kernels::lowrank_attention", _backward, setup_context=_setup_context, lib=library)
register_autocast("lowrank_attention", _cast)
