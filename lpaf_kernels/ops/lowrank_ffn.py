"""A whole feed-forward block of low-rank layers, with residual and normalisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._library import has_kernel, library, register_autocast, register_fallback
from ..tuning import lowrank_ffn as plans
from ._blocks import (
    NATIVE_DTYPES,
    Norm,
    check_dropout,
    check_layer,
    check_norm,
    check_residual,
    check_seed,
    norm_backward,
    normalise,
    reference_norm,
    refuse_forward_ad,
    seeded,
    unchecked_norm,
)
from ._checks import check_floating
from .lowrank_sparse_linear import ACTIVATIONS, is_eager, kernels, lowrank_sparse_linear_reference

# csrc/cpu/lowrank_ffn.cpp, without autograd.
_HAS_NATIVE = has_kernel("lowrank_ffn_forward", "CPU")
_native_forward = torch.ops.lpaf_kernels.lowrank_ffn_forward.default


def lowrank_ffn(
    x: Tensor,
    down1: Tensor,
    up1: Tensor,
    bias1: Tensor | None,
    down2: Tensor,
    up2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    kept1: Tensor | None = None,
    kept2: Tensor | None = None,
    gate: tuple[Tensor, Tensor, Tensor | None] | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    norm_first: bool = False,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """norm(dropout(F2(act(F1(x)))) + residual), F1 and F2 low-rank layers; gated: F2(act(gate(x)) F1(x)).

    With ``norm_first`` the normalisation is that of the input instead: dropout(F2(act(F1(norm(x))))) + residual. On the
    CPU in float32 or bfloat16, without gradients, the hidden activation never leaves the cache. With gradients only the
    arguments are kept for the backward, which computes the block again.

    Args:
        x: [..., in], float32, float16, bfloat16 or float64 (as every other floating argument).
        down1: [r1 + kept1, in]; up1: [r1, hidden]; bias1: [hidden] or None. Packed as for
            :func:`packed_lowrank_sparse_linear`.
        down2: [r2 + kept2, hidden]; up2: [r2, out]; bias2: [out] or None.
        activation: "none", "gelu", "gelu_tanh", "relu", "silu" or "tanh". Default: "gelu".
        kept1, kept2: int32 or int64, the positions of the kept columns of S among the outputs of F1 and F2. Default:
            none.
        gate: (down, up, bias) of the gate, [r, in], [r, hidden] and [hidden] or None (SwiGLU: activation "silu",
            GEGLU: "gelu"). Default: none.
        residual: [..., out]. Default: none.
        norm: a :class:`Norm`. Default: none.
        norm_first: normalise x, not the result. Default: False.
        dropout_p: chance of each entry of F2's result to become 0, in [0, 1); the others grow accordingly. For
            training; drawn from torch's generator. Default: 0.
        seed: makes the dropout follow from it alone (not under torch.compile). Default: none.

    Returns:
        [..., out].

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or name.
    """
    if gate is None and seed is None and not (norm_first or dropout_p) and activation in ACTIVATIONS:
        first, second = (down1, up1, kept1, bias1), (down2, up2, kept2, bias2)
        y = _without_checks(x, first, second, residual, norm, activation)
        if y is not None:
            return y
    check_floating("x", x)
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, got shape []")
    hidden = check_layer(x, x.shape[-1], "1", down1, up1, kept1, bias1)
    out = check_layer(x, hidden, "2", down2, up2, kept2, bias2)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if gate is not None and (not isinstance(gate, tuple) or len(gate) != 3):
        raise ValueError(f"gate: expected (down, up, bias), got {type(gate).__name__}")
    down_gate, up_gate, bias_gate = gate if gate is not None else (None, None, None)
    if gate is not None and check_layer(x, x.shape[-1], "_gate", down_gate, up_gate, None, bias_gate) != hidden:
        raise ValueError(f"up_gate: expected {hidden} columns (those of up1), got {up_gate.shape[1]}")
    check_dropout("dropout_p", dropout_p)
    check_seed(seed)
    check_residual(residual, x, out, "the columns of up2")
    kind, weight, bias, eps = check_norm(norm, x.shape[-1] if norm_first else out, x)
    if kind != "none" and norm_first:
        x = normalise(x, kind, weight, bias, eps)
        kind, weight, bias = "none", None, None
    apart = dropout_p > 0
    tensors = (
        x, down1, up1, kept1, bias1, down2, up2, kept2, bias2, down_gate, up_gate, bias_gate,
        None if apart else residual, None if apart else weight, None if apart else bias,
    )  # fmt: skip
    refuse_forward_ad("lowrank_ffn", *tensors, residual, weight, bias)
    training = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    y = torch.ops.lpaf_kernels.lowrank_ffn(*tensors, activation, "none" if apart else kind, eps, training)
    if not apart:
        return y
    with seeded(seed, x):
        y = F.dropout(y, dropout_p)
    return normalise(y if residual is None else y + residual, kind, weight, bias, eps)


def lowrank_ffn_reference(
    x: Tensor,
    down1: Tensor,
    up1: Tensor,
    bias1: Tensor | None,
    down2: Tensor,
    up2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "gelu",
    kept1: Tensor | None = None,
    kept2: Tensor | None = None,
    gate: tuple[Tensor, Tensor, Tensor | None] | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
) -> Tensor:
    """The same in plain torch, differentiable, without dropout: dense weights are built and applied."""

    def layer(x, down, up, kept, bias, activation=None):
        rank = up.shape[0]
        s = None if kept is None else down[rank:].t()
        return lowrank_sparse_linear_reference(x, down[:rank].t(), up, s, kept, bias, activation)

    inner = None if activation == "none" else activation
    if gate is None:
        h = layer(x, down1, up1, kept1, bias1, inner)
    else:
        h = layer(x, gate[0], gate[1], None, gate[2], inner) * layer(x, down1, up1, kept1, bias1)
    y = layer(h, down2, up2, kept2, bias2)
    if residual is not None:
        y = y + residual
    return reference_norm(y, norm)


def _without_checks(
    x: Tensor,
    first: tuple[Tensor | None, ...],
    second: tuple[Tensor | None, ...],
    residual: Tensor | None,
    norm: Norm | None,
    activation: str,
) -> Tensor | None:
    """The native kernel's result at once, where nothing but it is wanted, or None: as for lowrank_attention."""
    if not _HAS_NATIVE or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    try:
        kind, weight, bias, eps = unchecked_norm(norm)
        if x.dtype not in NATIVE_DTYPES or not x.is_cpu:
            return None
        if not is_eager(x, *first, *second, residual, weight, bias):
            return None
        return _native_forward(x, *first, *second, None, None, None, residual, weight, bias, activation, kind, eps)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return None


def chain(
    x, down1, up1, kept1, bias1, down2, up2, kept2, bias2, down_gate, up_gate, bias_gate, residual, norm_weight,
    norm_bias, activation, norm, eps,
):  # fmt: skip
    """The layers one by one."""
    forward = kernels(x)[0]
    if down_gate is None:
        h = forward(x, down1, up1, kept1, bias1, activation, False)[0]
    else:
        h = forward(x, down_gate, up_gate, None, bias_gate, activation, False)[0]
        h *= forward(x, down1, up1, kept1, bias1, "none", False)[0]
    y = forward(h, down2, up2, kept2, bias2, "none", False)[0]
    if residual is not None:
        y += residual
    return normalise(y, norm, norm_weight, norm_bias, eps)


def _lowrank_ffn_cuda(*arguments):
    """The Triton block where the tables prefer it."""
    *arguments, training = arguments
    y = plans.cuda_forward(*arguments, training=training)
    return chain(*arguments) if y is None else y


def _lowrank_ffn_cpu(x, *arguments):
    """The native kernel where there is one and it takes this dtype."""
    *arguments, _ = arguments
    if _HAS_NATIVE and x.dtype in NATIVE_DTYPES:
        return _native_forward(x, *arguments)
    return chain(x, *arguments)


def _lowrank_ffn_fake(x, down1, up1, kept1, bias1, down2, up2, *_):
    return x.new_empty((*x.shape[:-1], up2.shape[1]))


def chain_backward(
    grad, x, down1, up1, kept1, bias1, down2, up2, kept2, bias2, down_gate, up_gate, bias_gate, residual, norm_weight,
    norm_bias, activation, norm, eps, needs,
):  # fmt: skip
    """The gradients of the tensors that ``needs`` names, in the order of the arguments; empty where not needed."""
    forward, backward = kernels(x)
    if down_gate is None:
        h, z1, pre = forward(x, down1, up1, kept1, bias1, activation, True)
        saved_first = h if activation in ("relu", "tanh") else pre
    else:
        activated, z_gate, pre = forward(x, down_gate, up_gate, None, bias_gate, activation, True)
        linear, z1, _ = forward(x, down1, up1, kept1, bias1, "none", True)
        h = activated * linear
        saved_first = linear  # not read: this layer has no activation
        saved_gate = activated if activation in ("relu", "tanh") else pre
    s, z2, nothing = forward(h, down2, up2, kept2, bias2, "none", True)
    d_weight = d_bias = nothing
    if norm != "none":
        if residual is not None:
            s += residual
        grad, d_weight, d_bias = norm_backward(grad, s, norm_weight, norm, eps)
    x_, down1_, up1_, bias1_, down2_, up2_, bias2_, down_g_, up_g_, bias_g_, residual_, _, _ = needs
    inner = x_ or down1_ or up1_ or bias1_ or down_g_ or up_g_ or bias_g_
    d_h, d_down2, d_up2, d_bias2 = backward(
        grad, h, down2, up2, kept2, z2, nothing, "none", [inner, down2_, up2_, bias2_]
    )
    d_x = d_down1 = d_up1 = d_bias1 = d_down_gate = d_up_gate = d_bias_gate = nothing
    if inner:
        d_first = d_h if down_gate is None else d_h * activated
        first_needs = [x_, down1_, up1_, bias1_]
        d_x, d_down1, d_up1, d_bias1 = backward(
            d_first, x, down1, up1, kept1, z1, saved_first, activation if down_gate is None else "none", first_needs
        )
        if down_gate is not None:
            gate_needs = [x_, down_g_, up_g_, bias_g_]
            d_x_gate, d_down_gate, d_up_gate, d_bias_gate = backward(
                d_h * linear, x, down_gate, up_gate, None, z_gate, saved_gate, activation, gate_needs
            )
            if x_:
                d_x = d_x + d_x_gate
    found = (
        d_x, d_down1, d_up1, d_bias1, d_down2, d_up2, d_bias2, d_down_gate, d_up_gate, d_bias_gate,
        grad.clone() if residual_ else nothing, d_weight, d_bias,
    )  # fmt: skip
    # An operator's results must not share memory.
    return tuple(gradient if need else grad.new_empty(0) for gradient, need in zip(found, needs, strict=True))


def _lowrank_ffn_backward_cuda(grad, *arguments):
    """The Triton block where the tables prefer it. It runs the forward again, as the chain does."""
    *arguments, needs = arguments
    found = plans.cuda_backward(grad, *arguments, needs=needs)
    return chain_backward(grad, *arguments, needs) if found is None else found


# The floating arguments, in the order of the schema: those that have gradients.
_FLOATING = (0, 1, 2, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14)


def _lowrank_ffn_backward_fake(grad, *arguments):
    *tensors, _, _, _, needs = arguments
    return tuple(
        torch.empty_like(tensors[index], memory_format=torch.contiguous_format) if need else grad.new_empty(0)
        for index, need in zip(_FLOATING, needs, strict=True)
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, activation, norm, eps, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (activation, norm, eps)


@once_differentiable
def _backward(ctx, grad):
    needs = [ctx.needs_input_grad[index] for index in _FLOATING]
    kind = grad.device.type
    # The backward runs under whatever autocast surrounds it; these products take the forward's dtype.
    with torch.autocast(kind if kind != "meta" else "cpu", enabled=False):
        found = torch.ops.lpaf_kernels.lowrank_ffn_backward(grad, *ctx.saved_tensors, *ctx.options, needs)
    grads: list[Tensor | None] = [None] * 19
    for index, need, gradient in zip(_FLOATING, needs, found, strict=True):
        grads[index] = gradient if need else None
    return tuple(grads)


def _cast(dtype, *arguments):
    if arguments[0].dtype == torch.float64:
        return arguments
    return tuple(
        argument.to(dtype) if isinstance(argument, Tensor) and argument.is_floating_point() else argument
        for argument in arguments
    )


register_fallback("lowrank_ffn", _lowrank_ffn_cpu, ("CPU",))
register_fallback("lowrank_ffn", _lowrank_ffn_cuda, ("CUDA",))
register_fallback("lowrank_ffn_forward", chain)
register_fallback("lowrank_ffn_backward", chain_backward, ("CPU",))
register_fallback("lowrank_ffn_backward", _lowrank_ffn_backward_cuda, ("CUDA",))
torch.library.register_fake("lpaf_kernels::lowrank_ffn", _lowrank_ffn_fake, lib=library)
torch.library.register_fake("lpaf_kernels::lowrank_ffn_forward", _lowrank_ffn_fake, lib=library)
torch.library.register_fake("lpaf_kernels::lowrank_ffn_backward", _lowrank_ffn_backward_fake, lib=library)
torch.library.register_autograd("lpaf_kernels::lowrank_ffn", _backward, setup_context=_setup_context, lib=library)
register_autocast("lowrank_ffn", _cast)
