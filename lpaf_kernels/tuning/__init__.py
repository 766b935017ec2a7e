"""Which way an operator runs: measured tables per GPU, their lookup, and the measurement."""

from __future__ import annotations

from .dispatch import Choice, Gpu, explain, use_provider
from .table import AttentionShape, FfnShape, MaskedShape, Plan, Shape, Table
from .tune import tune_linear
from .tune_lowrank_attention import tune_attention
from .tune_lowrank_ffn import tune_ffn
from .tune_masked_linear import tune_masked

__all__ = [
    "AttentionShape",
    "Choice",
    "FfnShape",
    "Gpu",
    "MaskedShape",
    "Plan",
    "Shape",
    "Table",
    "explain",
    "tune_attention",
    "tune_ffn",
    "tune_linear",
    "tune_masked",
    "use_provider",
]
