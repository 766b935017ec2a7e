"""Interleaved latency of several models on the same inputs, called as they are, compiled, or as CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from lpaf_kernels.nn.graphed import capture

from ..errors import InputError
from ..models.outputs import forward_inputs

#: name -> how a model is called
MODES = {
    "eager": "call the model",
    "compiled": "torch.compile",
    "graphed": "replay a CUDA graph of the call",
}


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call over the rounds of a run."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Latency:
        """From at least two times."""
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(*(1e3 * value for value in (statistics.median(seconds), tenths[1], tenths[7])))


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved_seconds(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, warmup: int, description: str
) -> dict[str, list[float]]:
    """Seconds of every call in ``rounds`` rounds, one call after the other in each, after ``warmup`` untimed rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in tqdm(range(warmup + rounds), desc=description, unit="round", delay=2, leave=False):
        for name, call in calls.items():
            _sync(device)
            start = time.perf_counter()
            call()
            _sync(device)
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def check_counts(rounds: int, threads: int | None) -> None:
    """InputError for fewer rounds than have quantiles, or no thread."""
    for name, value, least in (("--rounds", rounds, 2), ("--threads", threads, 1)):
        if value is not None and value < least:
            raise InputError(f"{name} {value}: must be at least {least}")


def _call(model: nn.Module, inputs: Mapping[str, torch.Tensor], mode: str) -> Callable[[], object]:
    """What is timed: one forward pass on these inputs."""
    if mode == "graphed":
        return capture(lambda: model(**inputs))[0].replay
    if mode == "compiled":
        model = torch.compile(model, dynamic=False)
    return lambda: model(**inputs)


@torch.no_grad()
def interleaved_latency(
    models: Mapping[str, nn.Module],
    batch: int,
    length: int,
    rounds: int = 20,
    warmup: int = 3,
    seed: int = 0,
    mode: str = "eager",
) -> dict[str, Latency]:
    """Time one forward pass of every model, one after the other in each round, on the same random token ids.

    The models keep their device, dtype and attention implementation; they are timed in eval mode without autograd.

    Args:
        models: name -> task model.
        batch: sequences per pass.
        length: tokens per sequence, no padding.
        rounds: timed rounds. Default: 20.
        warmup: untimed rounds before them. Default: 3.
        mode: a name in ``MODES``; "graphed" needs a GPU. Default: "eager".
    """
    first = next(iter(models.values()))
    device = next(first.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, first.config.vocab_size, (batch, length), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if first.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids  # reads and writes as many tokens
    training = {name: model.training for name, model in models.items()}
    for model in models.values():
        model.eval()
    if mode == "compiled":
        torch.compiler.reset()  # every cell compiles for its own shape; the compiler gives up after a few in a row
    calls = {name: _call(model, forward_inputs(model, inputs), mode) for name, model in models.items()}
    seconds = interleaved_seconds(calls, device, rounds, warmup, f"latency {batch}x{length}")
    for name, model in models.items():
        model.train(training[name])
    return {name: Latency.of(values) for name, values in seconds.items()}
