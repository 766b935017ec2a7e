"""The correctness gate: no provider is timed before its outputs have been compared with float64.

An output may differ from the float64 truth by at most twice the error of torch's own chain in the same dtype, plus
one rounding of the truth's largest entry (for chains that happen to be exact). NaN never passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .problem import LinearProblem, MaskedProblem
from .providers import PROVIDERS, Problem, Runner

FACTOR = 2.0


@dataclass(frozen=True)
class Verdict:
    """What the gate found on the output nearest to, or furthest past, its limit.

    Args:
        output: its name.
        error: its largest absolute error.
        allowed: the error that it may have.
        failed: why the gate failed, or None.
    """

    output: str
    error: float
    allowed: float
    failed: str | None


def _error(actual: Tensor, exact: Tensor) -> float:
    return (actual.double() - exact).abs().max().item()


class Gate:
    """The truth of one problem and how far torch's own chain is from it, computed once for all providers."""

    def __init__(self, problem: Problem) -> None:
        self.exact = problem.reference()
        yardstick = PROVIDERS["chain"].build(problem).run()
        if isinstance(problem, LinearProblem) and problem.training:
            # The chain has no dense weight; the gradient of one is this product.
            yardstick["d_weight"] = problem.grad[0].t() @ problem.x[0]
        if isinstance(problem, MaskedProblem) and problem.training:
            yardstick["d_pruned"] = problem.grad[0].t() @ problem.x[0]
        eps = torch.finfo(problem.dtype).eps
        self.allowed = {
            name: FACTOR * _error(yardstick[name], exact) + eps * exact.abs().max().item()
            for name, exact in self.exact.items()
        }

    def check(self, runner: Runner) -> Verdict:
        """Run it once on the first input and compare."""
        return self.judge(runner.run())

    def judge(self, outputs: Mapping[str, Tensor]) -> Verdict:
        """Compare outputs by name with the truth; the worst one decides."""
        worst: Verdict | None = None
        for name, actual in outputs.items():
            exact, allowed = self.exact[name], self.allowed[name]
            if actual.shape != exact.shape:
                failed = f"{name}: expected shape {list(exact.shape)}, got {list(actual.shape)}"
                return Verdict(name, float("nan"), allowed, failed)
            error = _error(actual, exact)
            # Written so that NaN fails.
            failed = None if error <= allowed else f"{name}: error {error:.3g}, allowed {allowed:.3g}"
            if worst is None or (failed and not worst.failed) or error / allowed > worst.error / worst.allowed:
                worst = Verdict(name, error, allowed, failed)
                if failed and error != error:
                    return worst
        if worst is None:
            raise ValueError("outputs: expected at least y, got none")
        return worst
