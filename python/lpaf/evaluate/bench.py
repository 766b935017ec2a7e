"""``lpaf bench``: latency of a model directory against another, interleaved."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ..errors import InputError
from ..models.checkpoint import load_config, load_task_model, task_class
from ..models.conv1d import use_linears
from ..models.count import encoder_params, forward_macs
from ..models.device import device_name, resolve_device
from ..models.positions import most_tokens
from .latency import MODES, check_counts, interleaved_latency

RANDOM_TWIN = "dense (random weights)"


def dense_twin(model: str, problem: str | None = None) -> torch.nn.Module:
    """A dense model of the same configuration with random weights: its time is that of the original. Its head is for
    ``problem``, by default that of the model's architecture."""
    config = load_config(model)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return use_linears(task_class(config, problem).from_config(config)).eval()


def bench(
    model: str,
    against: str | None = None,
    batches: list[int] | tuple[int, ...] = (1, 8),
    lengths: list[int] | tuple[int, ...] = (128,),
    rounds: int = 20,
    threads: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    fuse: bool = False,
    modes: list[str] | tuple[str, ...] = ("eager",),
) -> list[dict[str, Any]]:
    """One row per (mode, batch, length): milliseconds of both models, and how much faster ``model`` is.

    Both run with scaled-dot-product attention on the same inputs, in turns.

    Args:
        fuse: fuse ``model`` (not ``against``), see :func:`lpaf_kernels.fuse`. Default: False.
        modes: names in ``latency.MODES``. Default: "eager".

    Raises:
        InputError: bad model, device, mode or size.
    """
    check_counts(rounds, threads)
    for mode in modes:
        if mode not in MODES:
            raise InputError(f"--mode {mode}: expected {', '.join(MODES)}")
    target = resolve_device(device)
    if "graphed" in modes and target != "cuda":
        raise InputError("--mode graphed: CUDA graphs need an NVIDIA GPU; leave it out, or pass --device cuda")
    config = load_config(model)
    limit = most_tokens(config)
    if limit and max(lengths) > limit:
        raise InputError(f"--length {max(lengths)}: the model takes at most {limit} tokens")
    models = {
        "against": dense_twin(model) if against is None else load_task_model(against, flag="--against"),
        "model": load_task_model(model, fuse=fuse),
    }
    names = {"against": against or RANDOM_TWIN, "model": f"{model} (fused)" if fuse else model}
    for module in models.values():
        module.to(device=target, dtype=getattr(torch, dtype))
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    rows = []
    try:
        for mode, batch, length in itertools.product(modes, batches, lengths):
            times = interleaved_latency(models, batch, length, rounds=rounds, mode=mode)
            rows.append(
                {
                    **names,
                    "mode": mode,
                    "batch": batch,
                    "length": length,
                    "model_ms": times["model"].median,
                    "against_ms": times["against"].median,
                    "speedup": times["against"].median / times["model"].median,
                    "model_p20_p80": [times["model"].p20, times["model"].p80],
                    "against_p20_p80": [times["against"].p20, times["against"].p80],
                    "model_macs": forward_macs(models["model"], length) * batch,
                    "against_macs": forward_macs(models["against"], length) * batch,
                    "encoder_ratio": encoder_params(models["model"]) / encoder_params(models["against"]),
                    "device": device_name(target),
                    "dtype": dtype,
                    "threads": torch.get_num_threads(),
                    "rounds": rounds,
                }
            )
    finally:
        torch.set_num_threads(before)
    return rows


def bench_lines(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two table lines per row of :func:`bench`: the other model, then the model with its speed-up."""
    lines = []
    for row in rows:
        for role in ("against", "model"):
            p20, p80 = row[f"{role}_p20_p80"]
            line = {key: row[key] for key in ("mode", "batch", "length")}
            line |= {"model": row[role], "latency_ms": row[f"{role}_ms"], "p20": p20, "p80": p80}
            lines.append(line | {"speedup": row["speedup"] if role == "model" else 1.0})
    return lines
