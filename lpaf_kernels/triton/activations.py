"""Activations and their derivatives inside kernels, in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    t = (1 - e) / (1 + e)
    # 1 - e loses digits near 0, where the series has them all.
    s = x * x
    near = x * (1 + s * (-0.3333333333 + s * (0.1333333333 + s * (-0.05396825397 + s * 0.02186948854))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -t, t))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x), float32 to float32."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "relu":
        # Written so that NaN stays NaN.
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "tanh":
        x = _tanh(x)
    return x


@triton.jit
def derivative(saved, ACTIVATION: tl.constexpr):
    """act' from what the forward saved: the result of relu and tanh, the input of the others."""
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(saved * 0.7071067811865476))
        d = cdf + saved * 0.3989422804014327 * tl.exp(-0.5 * saved * saved)
    elif ACTIVATION == "gelu_tanh":
        t = _tanh(0.7978845608028654 * (saved + 0.044715 * saved * saved * saved))
        inner = 0.7978845608028654 * (1 + 3 * 0.044715 * saved * saved)
        d = 0.5 * (1 + t) + 0.5 * saved * (1 - t * t) * inner
    elif ACTIVATION == "relu":
        d = tl.where(saved > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(saved)
        d = s * (1 + saved * (1 - s))
    else:
        d = 1 - saved * saved
    return d
