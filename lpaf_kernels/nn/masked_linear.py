"""nn.Linear with learned scores that choose which weights are used."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops._checks import check_shape
from ..ops.keep_threshold import KeepThreshold
from ..ops.masked_linear import masked_linear


class MaskedLinear(nn.Linear):
    """nn.Linear whose weight is multiplied by the mask of a :class:`KeepThreshold` over ``scores``.

    Parameters: those of nn.Linear and scores [out, in] (zeros at the start, straight-through gradients).
    Buffers: threshold_value, threshold_tie_index (0-d); everything is kept until :meth:`set_threshold`.
    Casting the module to a lower precision rounds scores and threshold: select again afterwards.
    """

    threshold_value: Tensor
    threshold_tie_index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._add_scores()

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> MaskedLinear:
        """Wrap ``linear``: its weight and bias parameters are shared, not copied."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected an nn.Linear, got {type(linear).__name__}")
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight = linear.weight
        layer.bias = linear.bias
        layer._add_scores()
        layer.train(linear.training)
        return layer

    def _add_scores(self) -> None:
        weight = self.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.scores = nn.Parameter(torch.zeros_like(weight, memory_format=torch.contiguous_format))
        value = torch.full((), -math.inf, dtype=wide, device=weight.device)
        self.register_buffer("threshold_value", value)
        tie_index = torch.full((), weight.numel(), dtype=torch.int64, device=weight.device)
        self.register_buffer("threshold_tie_index", tie_index)

    @property
    def threshold(self) -> KeepThreshold:
        """The current selection."""
        return KeepThreshold(self.threshold_value, self.threshold_tie_index)

    def set_threshold(self, threshold: KeepThreshold) -> None:
        """Copy ``threshold`` into the buffers; it counts for every later call."""
        if not isinstance(threshold, KeepThreshold):
            raise TypeError(f"threshold: expected a KeepThreshold, got {type(threshold).__name__}")
        check_shape("threshold.value", threshold.value, because="one selection per layer")
        check_shape("threshold.tie_index", threshold.tie_index, because="one selection per layer")
        with torch.no_grad():
            self.threshold_value.copy_(threshold.value)
            self.threshold_tie_index.copy_(threshold.tie_index)

    def mask(self) -> Tensor:
        """The boolean mask [out, in] of the kept weights."""
        return self.threshold.mask(self.scores.detach())

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
