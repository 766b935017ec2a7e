"""The encoder matrices that the scripts for one operation each run on, and how they time a call."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

# (layers, hidden, intermediate)
MODELS = {"minilm": (6, 384, 1536), "bert-base": (12, 768, 3072)}


def encoder_shapes(model: str, layers: int | None = None) -> list[tuple[int, int]]:
    """[out, in] of every encoder matrix of one of ``MODELS``, with its own number of layers or another."""
    own, hidden, intermediate = MODELS[model]
    layers = own if layers is None else layers
    return [*[(hidden, hidden)] * 4, (intermediate, hidden), (hidden, intermediate)] * layers


def timed(run: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)
