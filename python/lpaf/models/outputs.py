"""What a task model takes of a batch, and what its output is scored on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

#: logit of positions that are padding: finite, so that 0 * log 0 never turns up, and nothing in a softmax
PADDING = -1e9
#: columns of a batch that no model takes
NOT_INPUTS = ("labels", "teacher_logits", "index", "words")


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
    """Logits [B, C] of a classifier, [B, T, V] of a model of tokens, or a question answerer's float32 [B, 2, T]: start
    and end over the positions.

    Args:
        outputs: of a transformers model.
        attention_mask: [B, T]; where it is 0 the positions' logits become ``PADDING``. Classifiers need none.
    """
    if "start_logits" not in outputs:
        return outputs.logits
    logits = torch.stack((outputs.start_logits, outputs.end_logits), dim=1).float()
    return logits.masked_fill(attention_mask[:, None] == 0, PADDING)


@contextmanager
def head_at(model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """While this lasts, the head of ``model`` reads the hidden states at ``positions`` only.

    What a masked language model says of any other token is asked by nobody, and a row of the vocabulary's size for each
    would be most of its memory and, in a small model, half of its work. Its logits become [1, R, V] for the R positions
    in row-major order; hidden states that it returns besides stay whole. Where the body does not end in hidden states
    [B, T, hidden], nothing changes; :func:`logits_at` takes either.

    Args:
        model: a transformers model, not wrapped.
        positions: bool [B, T].
    """

    def select(_module: nn.Module, _arguments: Any, outputs: Any) -> Any:
        states = getattr(outputs, "last_hidden_state", None)
        if states is not None and states.shape[:-1] == positions.shape:
            outputs.last_hidden_state = states[positions][None]
        return outputs

    handle = model.base_model.register_forward_hook(select)
    try:
        yield
    finally:
        handle.remove()


def logits_at(logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits [R, V] at the R ``positions``, bool [B, T], of what a model gave under :func:`head_at`, or of all logits
    [B, T, V]."""
    if logits.shape[:-1] == positions.shape:
        return logits[positions]
    return logits.flatten(0, -2)
