"""T5's feed-forward block without the question that a compressed layer answers slowly.

transformers casts the block's input to the dtype of ``wo.weight`` and reads that weight up to three times per call. A
``LowRankSparseLinear`` builds its dense weight at each reading, which takes longer than the layer itself. Its
parameters all have the model's dtype, so that there is nothing to cast.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.mt5.modeling_mt5 import MT5DenseActDense, MT5DenseGatedActDense
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from .targets import COMPRESSED_TYPES


class _PlainBlock(T5DenseActDense):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.wo(self.dropout(self.act(self.wi(hidden_states))))


class _GatedBlock(T5DenseGatedActDense):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.wo(self.dropout(self.act(self.wi_0(hidden_states)) * self.wi_1(hidden_states)))


_BLOCKS: dict[type, type] = {
    T5DenseActDense: _PlainBlock,
    MT5DenseActDense: _PlainBlock,
    T5DenseGatedActDense: _GatedBlock,
    MT5DenseGatedActDense: _GatedBlock,
}


def leave_out_casts(model: nn.Module) -> nn.Module:
    """Let the feed-forward blocks of ``model`` whose ``wo`` is compressed run without asking for its weight, in place;
    returns ``model``."""
    for module in model.modules():
        if type(module) in _BLOCKS and isinstance(module.wo, COMPRESSED_TYPES):
            module.__class__ = _BLOCKS[type(module)]
    return model
