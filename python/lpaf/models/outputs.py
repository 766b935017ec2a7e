"""What a task model's output is scored on."""

from __future__ import annotations

import torch
from transformers.utils import ModelOutput

#: logit of positions that are padding: finite, so that 0 * log 0 never turns up, and nothing in a softmax
PADDING = -1e9


def task_logits(outputs: ModelOutput, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """A classifier's logits [B, C], or a question answerer's float32 [B, 2, T]: start and end over the positions.

    Args:
        outputs: of a transformers model.
        attention_mask: [B, T]; where it is 0 the positions' logits become ``PADDING``. Classifiers need none.
    """
    if "start_logits" not in outputs:
        return outputs.logits
    logits = torch.stack((outputs.start_logits, outputs.end_logits), dim=1).float()
    return logits.masked_fill(attention_mask[:, None] == 0, PADDING)
