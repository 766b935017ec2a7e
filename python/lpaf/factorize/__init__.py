"""Factorisers: ``FACTORIZERS[name](rank=..., weighting=...)(model, scores, moments) -> Factorized``; choosers of ranks;
what enters the matrices, and what single examples say about their rows."""

from .activations import InputMoments
from .fisher import FISHER_TRANSFORMS, RowFisher, fisher_row_weights, transform_fisher
from .ranks import allocate_ranks, comparable, rank_for_error, rank_params, relative
from .svd import WEIGHTINGS, Factorized, SVDFactorizer, mask_row_weights, score_row_weights, weighted_spectra

FACTORIZERS = {"svd": SVDFactorizer}

__all__ = [
    "FACTORIZERS",
    "FISHER_TRANSFORMS",
    "WEIGHTINGS",
    "Factorized",
    "InputMoments",
    "RowFisher",
    "SVDFactorizer",
    "allocate_ranks",
    "comparable",
    "fisher_row_weights",
    "mask_row_weights",
    "rank_for_error",
    "rank_params",
    "relative",
    "score_row_weights",
    "transform_fisher",
    "weighted_spectra",
]
