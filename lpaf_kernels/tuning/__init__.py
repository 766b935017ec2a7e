"""Which way an operator runs: measured tables per GPU, their lookup, and the measurement."""

from __future__ import annotations

from .dispatch import Choice, Gpu, explain, use_provider
from .table import Plan, Shape, Table
from .tune import tune_linear

__all__ = ["Choice", "Gpu", "Plan", "Shape", "Table", "explain", "tune_linear", "use_provider"]
