"""Fixed shapes for small batches: CUDA graphs of a model's forward at a few lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import check_shape


def capture(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record the CUDA work of ``function``, which reads and writes the same tensors each time.

    Returns:
        (the graph, whose ``replay`` does the work again; what ``function`` returned: replays write into it).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # lazy set-up and autotuning must not be recorded
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


class GraphRunner:
    """Run a transformers model at a few lengths, each one CUDA graph: no launch cost per call.

    Inputs are padded to the next of ``lengths`` and to ``batch`` rows; what was added is cut off again. On a CPU the
    model runs directly, on the same padded inputs. The graphs read the model's parameters where they lie: change them
    in place, or make a new runner.

    Args:
        model: a transformers model in eval mode, whose output has ``logits`` [rows, ...] or, for each token,
            [rows, length, ...].
        lengths: tokens per sequence, at most what the model takes. Default: 32, 64, 128, 256, 512.
        batch: rows of every call, at most. Default: 1.

    Raises:
        TypeError, ValueError: no nn.Module, or sizes below 1.
    """

    def __init__(self, model: nn.Module, lengths: Iterable[int] = (32, 64, 128, 256, 512), batch: int = 1) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
        lengths = list(lengths) if isinstance(lengths, Iterable) else [lengths]
        if not lengths or not all(type(length) is int and length >= 1 for length in lengths):
            raise ValueError(f"lengths: expected whole numbers of at least 1, got {lengths}")
        if type(batch) is not int or batch < 1:
            raise ValueError(f"batch: expected a whole number of at least 1, got {batch!r}")
        self.model = model
        self.lengths = sorted(set(lengths))
        self.batch = batch
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """The model's logits.

        Args:
            input_ids: [rows, length], on the model's device; rows at most ``batch``, length at most the longest.
            attention_mask: [rows, length]. Default: all tokens count.
            inputs: others of that shape, such as token_type_ids; padded with 0.

        Raises:
            ValueError: a shape that does not fit.
        """
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
            given = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
            raise ValueError(f"input_ids: expected shape [rows, length], got {given}")
        rows, length = input_ids.shape
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        named = {"input_ids": input_ids, "attention_mask": mask, **inputs}
        for name, tensor in named.items():
            check_shape(name, tensor, rows, length, because="that of input_ids")
        bucket = next((size for size in self.lengths if size >= length), None)
        if bucket is None:
            raise ValueError(f"input_ids: expected at most {self.lengths[-1]} tokens (the longest), got {length}")
        if not 1 <= rows <= self.batch:
            raise ValueError(f"input_ids: expected 1 to {self.batch} rows (batch), got {rows}")
        padded = {name: self._pad(name, tensor, bucket) for name, tensor in named.items()}
        padded["attention_mask"][rows:, 0] = 1  # a row that attends to nothing has no softmax
        logits = self._replay(padded) if input_ids.is_cuda else self.model(**padded).logits
        logits = logits[:rows]
        return logits[:, :length] if logits.dim() == 3 and logits.shape[1] == bucket else logits

    def _pad(self, name: str, tensor: Tensor, bucket: int) -> Tensor:
        rows, length = tensor.shape
        token = getattr(self.model.config, "pad_token_id", None) if name == "input_ids" else None
        return F.pad(tensor, (0, bucket - length, 0, self.batch - rows), value=token or 0)

    def _replay(self, inputs: dict[str, Tensor]) -> Tensor:
        key = (*sorted((name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in inputs.items()),)
        if key not in self._graphs:
            static = {name: tensor.clone() for name, tensor in inputs.items()}
            with torch.cuda.device(inputs["input_ids"].device):
                graph, logits = capture(lambda: self.model(**static).logits)
            self._graphs[key] = graph, static, logits
        graph, static, logits = self._graphs[key]
        for name, tensor in inputs.items():
            static[name].copy_(tensor)
        graph.replay()
        return logits.clone()
