"""The error that a kernel may have: at most twice that of torch's own chain in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def check_accurate(actual: Tensor, chain: Tensor, exact: Tensor) -> None:
    """The error to float64 is at most twice that of torch's own chain.

    The floor of one rounding of the largest entry covers chains that happen to be exact. A float64 chain is
    the truth itself and shows no error of its own: there the floor is that of a short sum in another order.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == chain.dtype
    if exact.numel() == 0:
        return
    roundings = 16 if actual.dtype == torch.float64 else 1
    floor = roundings * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (chain.double() - exact).abs().max().item() + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def on_one_scale(actual: Tensor, chain: Tensor, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All three times the power of two that brings the largest entry of ``exact`` to 1/2 to 1: nothing is rounded.

    Of draws that are compared together, the one with the largest entries would decide alone.
    """
    if exact.numel() == 0:
        return actual, chain, exact
    exponent = -int(exact.detach().abs().max().frexp().exponent)
    return tuple(tensor.detach() * 2.0**exponent for tensor in (actual, chain, exact))
