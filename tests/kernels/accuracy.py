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
