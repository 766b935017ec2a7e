"""Compress a Hugging Face transformer: prune, factorise, retrain, save, reload.

Importing this package registers the "lpaf" checkpoint format, after which a compressed directory loads with
``AutoModelFor*.from_pretrained``. The rest is imported on first use.
"""

from __future__ import annotations

from typing import Any

from .errors import InputError
from .models.quantizer import CompressionConfig

__all__ = ["CompressOptions", "CompressionConfig", "InputError", "compress"]


def __getattr__(name: str) -> Any:
    if name in ("compress", "CompressOptions"):
        from . import recipes

        return getattr(recipes, name)
    raise AttributeError(f"module 'lpaf' has no attribute {name!r}")
