"""Argument checks shared by the operators: one line with the argument, its value and what was expected."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a dense floating-point tensor of a supported dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float16, bfloat16 or float64, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got layout {tensor.layout}")


def check_shape(name: str, tensor: Tensor, *expected: int, because: str) -> None:
    """Raise unless ``tensor`` has the shape ``expected``."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected shape {list(expected)} ({because}), got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, x: Tensor, other: str = "x") -> None:
    """Raise unless ``tensor`` lives where ``x`` does."""
    if tensor.device != x.device:
        raise ValueError(f"{name}: expected device {x.device} (that of {other}), got {tensor.device}")


def check_fraction(name: str, value: float) -> float:
    """Return ``value`` as a float, or raise unless it is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number in [0, 1], got {value!r}")
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return float(value)


def check_integer(name: str, value: int, low: int, high: int | None) -> None:
    """Raise unless ``value`` is an integer from ``low`` to ``high`` (None: no end)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        wanted = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")
