"""Triton kernels, one module per operator stem. Importable without triton: :func:`missing` says what is missing."""

from __future__ import annotations

import importlib.util


def missing() -> str | None:
    """Why the Triton kernels cannot be used here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    return None
