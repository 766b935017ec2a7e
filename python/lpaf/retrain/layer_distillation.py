"""Layer-wise distillation: the student's hidden states follow those of its teacher (LoSparse, section 4.5, appendix E).

    loss = task + alpha_output * T^2 KL(teacher || student) + alpha_layer * sum over layers of MSE(hidden states)

This module is the last term. What the paper leaves open is decided like this: the sum is over the outputs of the
layers, without that of the embeddings, which no method compresses; the mean is over the hidden units and the positions
that are not padding of each example, then over the examples, so that every example counts alike however the batch is
padded or shared out among processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..data.texts import IGNORED
from ..models.outputs import forward_inputs

#: fields of a model's outputs with the hidden states of a stack of layers, the embeddings' first
STACKS = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")


def layer_states(outputs: Any) -> dict[str, Sequence[torch.Tensor]]:
    """The outputs of the layers of every stack of a model, [B, T, hidden] each; the embeddings' is left out."""
    return {name: outputs[name][1:] for name in STACKS if outputs.get(name) is not None}


def teaching_layers(student: int, teacher: int) -> list[int]:
    """Which of the teacher's layers each of the student's follows, counted from 0.

    With equally many each its own. A student of fewer layers follows evenly spaced ones, as PKD-skip has it (Sun et
    al., 2019), of which the last is the teacher's last, which its head reads (Jiao et al., 2020).
    """
    if not 0 < student <= teacher:
        raise ValueError(f"student: must have 1 to {teacher} layers, as its teacher, got {student}")
    return [-(-(layer + 1) * teacher // student) - 1 for layer in range(student)]


def real_positions(stack: str, batch: Mapping[str, torch.Tensor], shape: torch.Size) -> torch.Tensor:
    """Which positions of a stack are no padding: bool [B, T].

    Those of a decoder beside an encoder by ``decoder_attention_mask``, or by ``labels`` if there is one for each of
    them (-100 is padding), all others by ``attention_mask``. Where none of these fits there is no padding.

    Args:
        stack: one of ``STACKS``.
        batch: what the collator made.
        shape: [B, T].
    """
    if stack == "decoder_hidden_states":
        if "decoder_attention_mask" in batch:
            return batch["decoder_attention_mask"] != 0
        if "labels" in batch and batch["labels"].shape == shape:
            return batch["labels"] != IGNORED
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == shape:
        return mask != 0
    return torch.ones(shape, dtype=torch.bool, device=next(iter(batch.values())).device)


def hidden_state_loss(student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Mean squared error of one layer, 0-d float32.

    Args:
        student: [passes * B, T, hidden], the passes one after the other.
        teacher: [B, T, hidden].
        real: bool [B, T]; an example without any real position counts as 0.
    """
    passes = student.float().unflatten(0, (-1, len(teacher)))
    difference = (passes - teacher.float()).masked_fill(~real[..., None], 0.0)
    share = real / real.sum(dim=1, keepdim=True).clamp(min=1)
    return (difference.square().mean(dim=-1) * share).sum(dim=-1).mean()


class LayerDistillation:
    """The term of a training stage (``retrain.trainer.Term``) that holds the student's layers to the teacher's.

    The teacher runs beside the student in every step, in eval mode and without gradients: the hidden states of a whole
    training set would fit nowhere. It belongs to this term alone, not to the model that is trained and saved.

    Args:
        teacher: the dense fine-tuned model, on the device of the training.
        weight: alpha_layer.
        bf16: run the teacher under bfloat16 autocast, as the student does. Default: False.
    """

    def __init__(self, teacher: nn.Module, weight: float, bf16: bool = False) -> None:
        self.teacher, self.weight, self.bf16 = teacher, weight, bf16

    @torch.no_grad()
    def states(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Sequence[torch.Tensor]]:
        """:func:`layer_states` of the teacher."""
        self.teacher.eval()
        device = next(self.teacher.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            inputs = forward_inputs(self.teacher, batch)
            return layer_states(self.teacher.base_model(**inputs, output_hidden_states=True))  # without its head

    def __call__(self, model: nn.Module, outputs: Any, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        taught, losses = layer_states(outputs), []
        for stack, teacher in self.states(batch).items():
            real = real_positions(stack, batch, teacher[0].shape[:2])
            layers = teaching_layers(len(taught[stack]), len(teacher))
            pairs = zip(taught[stack], (teacher[layer] for layer in layers), strict=True)
            losses += [hidden_state_loss(student, target, real) for student, target in pairs]
        return {"layer_distillation": self.weight * torch.stack(losses).sum()}
