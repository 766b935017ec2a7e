"""The registry of compression methods: which pruner, factoriser and retrainer each one chains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import InputError
from ..prune import PRUNERS
from .calibrate import check_calibration, check_retraining
from .fisher import check_fisher
from .modules import check_modules
from .options import FISHER_OPTIONS, LAYER_WISE, CompressOptions, given_flags
from .pruning import PRUNER_OPTIONS, check_pruner_options, takes

#: the weighting by Fisher information
FISHER = "fisher"
#: options of what follows pruning where matrices are factorised
FACTORING = ("weighting", "mixed_rank", "mixed_rank_p", "consistency")


@dataclass(frozen=True)
class Method:
    """One ``--method``.

    Args:
        name: its name on the command line.
        summary: one line for ``lpaf compress --help``.
        pruner: name in ``lpaf.prune.PRUNERS``, or None.
        factorizer: name in ``lpaf.factorize.FACTORIZERS``; None leaves layers out instead, unless ``compact``.
        compact: whether the pruner leaves the final layers behind, so that nothing is factorised.
        modules_only: whether it compresses the modules that ``--modules`` names, and nothing else.
        proportional: whether ``--ratio`` gives every matrix ranks in proportion to its size, instead of one rank.
        low_rank_share: share of the weights for U V: None takes that of ``--low-rank-share``, 0 leaves U V out, 1
            gives it all of ``--ratio``. For a pruner that takes it.
        weighting: row weights of the factoriser: "none", "mask", "scores", or "fisher", which no option changes.
        takes_fisher: whether Fisher information weighs rows where ``--fisher`` asks for it.
        retrainer: name in ``lpaf.retrain.RETRAINERS``.
        consistency: whether retraining compares two passes.
        distill: whether the dense model teaches.
    """

    name: str
    summary: str
    pruner: str | None
    factorizer: str | None
    compact: bool = False
    modules_only: bool = False
    proportional: bool = False
    low_rank_share: float | None = None
    weighting: str = "none"
    takes_fisher: bool = False
    retrainer: str = "plain"
    consistency: bool = False
    distill: bool = True

    def with_options(self, options: CompressOptions) -> Method:
        """The method with the pruner that ``options`` name and without the steps that they switch off."""
        check_modules(options, self.modules_only)
        if self.compact:
            for name, given in (("--no-prune", not options.prune), ("--pruner", options.pruner is not None)):
                if given:
                    raise InputError(f"{name}: --method {self.name} makes the model smaller by its own pruning")
            for name in given_flags(options, FACTORING):
                raise InputError(f"{name}: is for matrices that are factorised, as by --method lpaf")
        pruner = self.pruner if options.prune else None
        if options.pruner is not None:
            if pruner is None:
                without = f"--method {self.name}" if self.pruner is None else "--no-prune"
                raise InputError(f"--pruner {options.pruner}: {without} does not prune")
            pruner = options.pruner
        if options.hard_pruning:
            if pruner is None or self.compact:
                raise InputError(f"--hard-pruning: is for movement pruning, which --method {self.name} does not do")
            pruner = "hard-movement"
        check_pruner_options(pruner, options, self.low_rank_share)
        if options.layer_wise and not self.distill:
            raise InputError(f"--distill layer: --method {self.name} has no teacher; leave it out, or pass --method kd")
        weighting = self.weighting
        if weighting not in ("none", FISHER):
            weighting = options.weighting if pruner else "none"
        check_calibration(options, self.factorizer is not None)
        check_fisher(options, self.by_fisher, self.takes_fisher)
        check_retraining(options, pruner)
        return replace(
            self,
            pruner=pruner,
            weighting=weighting,
            retrainer=self.retrainer if options.mixed_rank else "plain",
            consistency=self.consistency and options.consistency,
        )

    @property
    def by_fisher(self) -> bool:
        """Whether the factoriser weighs rows by their Fisher information."""
        return self.weighting == FISHER

    def weighs_by_fisher(self, options: CompressOptions) -> bool:
        """Whether a run with ``options`` weighs rows by their Fisher information."""
        return self.by_fisher or (self.takes_fisher and options.fisher is not None)

    def idle(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """The options about pruning, the teacher and Fisher information that mean nothing to a run of this method with
        ``settings``."""
        untaught = () if self.distill else ("distill", *LAYER_WISE)
        weighs = self.by_fisher or self.takes_fisher
        unused = (*untaught, *(("weighting",) if weighs else FISHER_OPTIONS))
        if self.pruner is None or settings.get("prune") is False:
            return (*PRUNER_OPTIONS, *unused)
        pruner = settings.get("pruner") or self.pruner
        if self.compact:
            pruner = self.pruner
        elif settings.get("hard_pruning"):
            pruner = "hard-movement"
        if pruner not in PRUNERS:
            return ()  # what is wrong with it is found later
        chosen = ("pruner", "hard_pruning")
        idle = [name for name in PRUNER_OPTIONS if name not in chosen and not takes(pruner, name)]
        if self.compact:
            idle += (*chosen, *FACTORING)
        if self.low_rank_share is not None and "low_rank_share" not in idle:
            idle.append("low_rank_share")
        return (*idle, *unused)


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
            "fwsvd",
            "svd with the rows of every matrix weighted by their Fisher information (Hsu et al., 2022)",
            pruner=None,
            factorizer="svd",
            weighting=FISHER,
        ),
        Method(
            "losparse",
            "W = U V + S, the neurons of S pruned by importance (Li et al., 2023)",
            pruner="importance",
            factorizer=None,
            compact=True,
        ),
        Method(
            "itp",
            "iterative structured pruning: losparse without U V",
            pruner="importance",
            factorizer=None,
            compact=True,
            low_rank_share=0.0,
        ),
        Method(
            "movement-structured",
            "neurons pruned by their movement (Sanh et al., 2020)",
            pruner="neuron-movement",
            factorizer=None,
            compact=True,
            low_rank_share=0.0,
        ),
        Method(
            "low-rank-1",
            "U V alone from the start, at a share of every matrix (LoSparse's Low-rank I)",
            pruner=None,
            factorizer="svd",
            proportional=True,
        ),
        Method(
            "low-rank-2",
            "U V + S with S pruned to nothing (LoSparse's Low-rank II)",
            pruner="importance",
            factorizer=None,
            compact=True,
            low_rank_share=1.0,
        ),
        Method(
            "cofi",
            "blocks, heads and neurons removed by gates that learn, for a Lagrangian target (Xia et al., 2022)",
            pruner="cofi",
            factorizer=None,
            compact=True,
        ),
        Method(
            "cofi+losparse",
            "losparse with blocks and heads removed as cofi does (Li et al., 2023, section 4.6)",
            pruner="cofi+losparse",
            factorizer=None,
            compact=True,
        ),
        Method(
            "autoencoder",
            "offline: latent rows and a decoder for token embeddings and other matrices (Banaei et al., 2023)",
            pruner=None,
            factorizer=None,
            modules_only=True,
            takes_fisher=True,
        ),
        *(
            Method(name, f"offline: {summary}", pruner=None, factorizer=None, modules_only=True)
            for name, summary in (
                ("prune-l1", "the largest weights of chosen matrices, and where they stand"),
                ("kronecker", "the nearest Kronecker product to each of them"),
                ("tucker", "their Tucker decomposition, of all layers at once with --concatenate"),
            )
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
