"""nn.Linear with learned scores that choose which weights are used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops._checks import check_shape
from ..ops.keep_threshold import KeepThreshold
from ..ops.masked_linear import expand_blocks, masked_linear


class MaskedLinear(nn.Linear):
    """nn.Linear whose weight is multiplied by the mask of a :class:`KeepThreshold` over ``scores``.

    Parameters: those of nn.Linear and scores [out / b, in / c], one per block of b x c weights (zeros at the start,
    straight-through gradients). Buffers: threshold_value, threshold_tie_index (0-d); everything is kept until
    :meth:`set_threshold`. Casting the module to a lower precision rounds scores and threshold: select again afterwards.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        block: (b, c), which must divide (out, in); (1, in) prunes rows, (out, 1) columns. Default: single weights.

    Raises:
        TypeError, ValueError: a block that is no pair of numbers, or does not divide the weight.
    """

    threshold_value: Tensor
    threshold_tie_index: Tensor
    block: tuple[int, int]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        block: tuple[int, int] = (1, 1),
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.block = _checked_block(block, out_features, in_features)
        self._add_scores()

    @classmethod
    def from_linear(cls, linear: nn.Linear, block: tuple[int, int] = (1, 1)) -> MaskedLinear:
        """Wrap ``linear``: its weight and bias parameters are shared, not copied. ``block`` as for the class."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta", block=block)
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer._add_scores()
        layer.train(linear.training)
        return layer

    def _add_scores(self) -> None:
        weight = self.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        rows, cols = (size // side for size, side in zip(weight.shape, self.block))
        self.scores = nn.Parameter(weight.new_zeros(rows, cols))
        value = torch.full((), -math.inf, dtype=wide, device=weight.device)
        self.register_buffer("threshold_value", value)
        tie_index = torch.full((), self.scores.numel(), dtype=torch.int64, device=weight.device)
        self.register_buffer("threshold_tie_index", tie_index)

    @property
    def threshold(self) -> KeepThreshold:
        """The current selection."""
        return KeepThreshold(self.threshold_value, self.threshold_tie_index)

    def set_threshold(self, threshold: KeepThreshold) -> None:
        """Copy ``threshold`` into the buffers; it counts for every later call."""
        set_thresholds([self], [threshold])

    def mask(self) -> Tensor:
        """The boolean mask [out, in] of the kept weights."""
        return expand_blocks(self.threshold.mask(self.scores.detach()), self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return masked_linear(x, self.weight, self.scores, self.threshold, self.bias)

    def to_linear(self) -> nn.Linear:
        """Return the pruned nn.Linear: pruned entries are exactly 0, the bias parameter is shared."""
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = torch.where(self.mask(), self.weight.detach(), 0.0)
        linear.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        linear.train(self.training)
        return linear

    def extra_repr(self) -> str:
        """That of nn.Linear, and the block where it is not a single weight."""
        text = super().extra_repr()
        return text if self.block == (1, 1) else f"{text}, block={self.block}"


def _checked_block(block: tuple[int, int], out_features: int, in_features: int) -> tuple[int, int]:
    if not isinstance(block, (tuple, list)) or [type(side) for side in block] != [int, int]:
        raise TypeError(f"block: expected two integers (b, c), got {block!r}")
    b, c = block
    if min(block) < 1 or out_features % b or in_features % c:
        raise ValueError(f"block: expected sides that divide [{out_features}, {in_features}], got {block!r}")
    return b, c


@torch.no_grad()
def set_thresholds(layers: Sequence[MaskedLinear], thresholds: Sequence[KeepThreshold]) -> None:
    """Copy a threshold into every layer's buffers, all in two launches; they count for every later call.

    Args:
        layers: on one device.
        thresholds: one per layer, as :func:`keep_threshold` returns them for a list.
    """
    if len(layers) != len(thresholds):
        raise ValueError(f"thresholds: expected {len(layers)} (one per layer), got {len(thresholds)}")
    for threshold in thresholds:
        if not isinstance(threshold, KeepThreshold):
            raise TypeError(f"threshold: expected a KeepThreshold, got {type(threshold).__name__}")
        check_shape("threshold.value", threshold.value, because="one selection per layer")
        check_shape("threshold.tie_index", threshold.tie_index, because="one selection per layer")
    if layers:
        torch._foreach_copy_([layer.threshold_value for layer in layers], [t.value for t in thresholds])
        torch._foreach_copy_([layer.threshold_tie_index for layer in layers], [t.tie_index for t in thresholds])
