"""Second moments of what enters every encoder linear, added up while the model runs over calibration examples.

For a linear whose inputs on the calibration data are the rows of X [tokens, in] (padding left out) the moment is
M = X^T X [in, in]: all that the error of its outputs, ||(W - A B) X^T||_F, needs to know of them (Wang et al., 2024,
SVD-LLM, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..models.targets import encoder_linears
from ..processes import process_place

Batch = Mapping[str, torch.Tensor]
#: what a hook is told: (name of the linear, its input [..., in])
Seen = Callable[[str, torch.Tensor], None]


class InputMoments:
    """Adds up the moments of every encoder linear's inputs over all forward passes inside a ``with`` block.

    Linears that get the same tensor (query, key and value; gate and up; the keys and values of all layers' attention
    to the encoder) share one moment: one float64 matrix of 8 in^2 bytes for each tensor that enters linears. Which do
    is found by one pass over ``example``.

    Rows where the batch's ``attention_mask`` is 0 do not count. In the decoder of an encoder-decoder those of
    ``decoder_attention_mask`` do not, or without one those whose label is -100; what the decoder takes from the encoder
    has the encoder's mask. Inputs that are not one row per token (embeddings of relative positions) count whole.

    Args:
        model: in eval mode; runs by keyword arguments.
        example: one batch of it, best of one example.

    Attributes:
        sums: name of the first linear of those that share it -> moment, float64 [in, in] on the model's device.
            Products are float64 on a CPU and float32 elsewhere.
        rows: the same names -> number of rows that count.
        owners: name of every encoder linear that runs -> whose moment is its own.
    """

    def __init__(self, model: nn.Module, example: Batch) -> None:
        self.model, self.linears = model, encoder_linears(model)
        encoder = model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else None
        inside = set() if encoder is None else set(encoder.modules())
        entering, encoded = self._trace(example, encoder)
        self.owners: dict[str, str] = {}
        self.sums: dict[str, torch.Tensor] = {}
        #: owner -> whether its rows are those of the encoder
        self.of_encoder: dict[str, bool] = {}
        first: dict[tuple[int, ...], str] = {}
        for name, inputs in entering.items():
            owner = self.owners[name] = first.setdefault(inputs, name)
            if owner == name:
                linear = self.linears[name]
                width = linear.in_features
                self.sums[name] = linear.weight.new_zeros(width, width, dtype=torch.float64)
                self.of_encoder[name] = encoder is None or linear in inside or encoded in inputs
        self.rows = dict.fromkeys(self.sums, 0)
        self.masks: dict[bool, torch.Tensor | None] = {}

    @torch.no_grad()
    def _trace(self, example: Batch, encoder: nn.Module | None) -> tuple[dict[str, tuple[int, ...]], int | None]:
        """The tensors that enter every linear in one pass, numbered, and the number of the encoder's output."""
        held: list[torch.Tensor] = []  # kept, so that no other tensor takes the place of one
        entering: dict[str, list[int]] = {}

        def number(tensor: torch.Tensor) -> int:
            for place, other in enumerate(held):
                if other is tensor:
                    return place
            held.append(tensor)
            return len(held) - 1

        def see(name: str, tensor: torch.Tensor) -> None:
            entering.setdefault(name, []).append(number(tensor))

        handles = hook_inputs({name: self.linears[name] for name in self.linears}, see)
        leaving: list[int] = []
        if encoder is not None:
            handles.append(encoder.register_forward_hook(lambda _, inputs, output: leaving.append(number(output[0]))))
        try:
            self.model(**example)
        finally:
            for handle in handles:
                handle.remove()
        return {name: tuple(inputs) for name, inputs in entering.items()}, leaving[0] if leaving else None

    def __enter__(self) -> InputMoments:
        self.handles = hook_inputs({name: self.linears[name] for name in self.sums}, self._add)
        self.handles.append(self.model.register_forward_pre_hook(self._read_masks, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _read_masks(self, model: nn.Module, args: tuple, batch: Batch) -> None:
        """The masks [B, T] of the batch that is about to run."""
        mask, decoder = batch.get("attention_mask"), batch.get("decoder_attention_mask")
        labels = batch.get("labels")
        if decoder is None:  # a decoder that repeats the encoder's tokens has none of its own
            decoder = mask if labels is None or labels.dim() != 2 else labels != -100
        self.masks = {True: mask, False: decoder}

    @torch.no_grad()
    def _add(self, name: str, inputs: torch.Tensor) -> None:
        rows, mask = inputs.reshape(-1, inputs.shape[-1]), self.masks[self.of_encoder[name]]
        one_per_token = mask is not None and inputs.shape[:-1] in (mask.shape, (mask.numel(),))
        if one_per_token:
            rows = rows[mask.reshape(-1) != 0]
        rows = rows.double() if rows.device.type == "cpu" else rows.float()
        self.sums[name] += rows.mT @ rows
        self.rows[name] += len(rows)

    def sum_over_processes(self) -> None:
        """Add up what the processes of a group have seen, each of its own batches; all end with the same sums."""
        if process_place()[1] == 1:
            return
        for moment in self.sums.values():
            dist.all_reduce(moment)
        counts = torch.tensor(list(self.rows.values()), device=next(iter(self.sums.values())).device)
        dist.all_reduce(counts)
        self.rows = dict(zip(self.rows, counts.tolist(), strict=True))

    def by_linear(self) -> dict[str, torch.Tensor]:
        """Name of every encoder linear that runs -> its moment; those that share one hold the same tensor."""
        return {name: self.sums[owner] for name, owner in self.owners.items()}

    @property
    def bytes(self) -> int:
        """Memory that the moments take."""
        return sum(moment.numel() * moment.element_size() for moment in self.sums.values())


def hook_inputs(linears: Mapping[str, nn.Module], see: Seen) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that call ``see(name, input)`` before each of ``linears`` runs."""

    def hook(name: str) -> Callable[..., None]:
        def before(module: nn.Module, args: tuple, kwargs: dict[str, torch.Tensor]) -> None:
            see(name, args[0] if args else next(iter(kwargs.values())))

        return before

    return [linear.register_forward_pre_hook(hook(name), with_kwargs=True) for name, linear in linears.items()]
