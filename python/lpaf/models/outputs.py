"""What a task model takes of a batch, and what its output is scored on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

#: logit of positions that are padding: finite, so that 0 * log 0 never turns up, and nothing in a softmax
PADDING = -1e9
#: columns of a batch that no model takes
NOT_INPUTS = ("labels", "teacher_logits", "index")


def forward_inputs(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The tensors of ``batch`` that ``model`` takes, apart from labels.

    An encoder-decoder also gets ``decoder_input_ids``, which its own rule makes of the labels (shifted by one), unless
    the batch has them. Whatever can generate keeps no cache of keys and values.

    Args:
        model: a transformers model, not wrapped.
        batch: what a ``Collator`` made.
    """
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    if not model.can_generate():
        return inputs
    if model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    return inputs | {"use_cache": False}


def task_logits(outputs: ModelOutput, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Logits [B, C] of a classifier, [B, T, V] of a language model, or a question answerer's float32 [B, 2, T]: start
    and end over the positions.

    Args:
        outputs: of a transformers model.
        attention_mask: [B, T]; where it is 0 the positions' logits become ``PADDING``. Classifiers need none.
    """
    if "start_logits" not in outputs:
        return outputs.logits
    logits = torch.stack((outputs.start_logits, outputs.end_logits), dim=1).float()
    return logits.masked_fill(attention_mask[:, None] == 0, PADDING)
