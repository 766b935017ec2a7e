"""The registry of compression methods: which pruner, factoriser and retrainer each one chains."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import InputError
from .calibrate import check_calibration, check_retraining
from .options import CompressOptions
from .pruning import check_pruner_options


@dataclass(frozen=True)
class Method:
    """One ``--method``.

    Args:
        name: its name on the command line.
        summary: one line for ``lpaf compress --help``.
        pruner: name in ``lpaf.prune.PRUNERS``, or None.
        factorizer: name in ``lpaf.factorize.FACTORIZERS``; None leaves layers out instead.
        weighting: row weights of the factoriser: "none", "mask" or "scores".
        retrainer: name in ``lpaf.retrain.RETRAINERS``.
        consistency: whether retraining compares two passes.
        distill: whether the dense model teaches.
    """

    name: str
    summary: str
    pruner: str | None
    factorizer: str | None
    weighting: str = "none"
    retrainer: str = "plain"
    consistency: bool = False
    distill: bool = True

    def with_options(self, options: CompressOptions) -> Method:
        """The method with the pruner that ``options`` name and without the steps that they switch off."""
        pruner = self.pruner if options.prune else None
        if options.pruner is not None:
            if pruner is None:
                without = f"--method {self.name}" if self.pruner is None else "--no-prune"
                raise InputError(f"--pruner {options.pruner}: {without} does not prune")
            pruner = options.pruner
        if options.hard_pruning:
            if pruner is None:
                raise InputError(f"--hard-pruning: is for movement pruning, which --method {self.name} does not do")
            pruner = "hard-movement"
        check_pruner_options(pruner, options)
        weighting = self.weighting
        if weighting != "none":
            weighting = options.weighting if pruner else "none"
        method = replace(
            self,
            pruner=pruner,
            weighting=weighting,
            retrainer=self.retrainer if options.mixed_rank else "plain",
            consistency=self.consistency and options.consistency,
        )
        check_calibration(method, options)
        check_retraining(method, options)
        return method


METHODS = {
    method.name: method
    for method in (
        Method(
            "lpaf",
            "first-order pruning, row-weighted SVD, mixed-rank fine-tuning (Ren and Zhu, 2024)",
            pruner="sensitivity",
            factorizer="svd",
            weighting="scores",
            retrainer="mixed-rank",
            consistency=True,
        ),
        Method(
            "svd",
            "truncated SVD of the fine-tuned model, then as many updates of retraining (Ben Noach and Goldberg, 2020)",
            pruner=None,
            factorizer="svd",
        ),
        Method(
            "truncate",
            "the first layers of the fine-tuned model, retrained without a teacher",
            pruner=None,
            factorizer=None,
            distill=False,
        ),
        Method(
            "kd",
            "the first layers of the fine-tuned model, taught by it (Hinton et al., 2015)",
            pruner=None,
            factorizer=None,
        ),
    )
}


def get_method(name: str) -> Method:
    """The method called ``name``, or InputError with the known names."""
    if name not in METHODS:
        raise InputError(f"--method {name}: unknown; expected one of {', '.join(METHODS)}")
    return METHODS[name]
