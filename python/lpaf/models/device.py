"""Devices by the names that ``--device`` takes."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from ..errors import InputError


def resolve_device(device: str | None) -> str:
    """ "cpu" or "cuda", which is the GPU of this process; None takes a GPU if there is one.

    InputError for a device that this machine, or this process of several, does not have.
    """
    if device is None:
        # accelerate launch --cpu
        held = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        device = "cuda" if torch.cuda.is_available() and not held else "cpu"
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no NVIDIA GPU; pass --device cpu")
    mine, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if device == "cuda" and mine >= gpus:
        raise InputError(
            f"--device cuda: process {mine} of this machine has no GPU ({gpus} in all); start as many processes as "
            "there are GPUs, or pass --device cpu"
        )
    return device


def device_name(device: torch.device | str) -> str:
    """The GPU's or the CPU's name."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
