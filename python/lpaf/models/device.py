"""Devices by the names that ``--device`` takes."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from ..errors import InputError


def resolve_device(device: str | None) -> str:
    """ "cpu" or "cuda"; None takes a GPU if there is one. InputError for a device this machine does not have."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: expected cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this torch sees no NVIDIA GPU; pass --device cpu")
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
