"""Factorisers: ``FACTORIZERS[name](rank=..., weighting=...)(model, scores, moments) -> Factorized``; choosers of ranks;
what enters the matrices."""

from .activations import InputMoments
from .ranks import allocate_ranks, comparable, rank_for_error, rank_params, relative
from .svd import WEIGHTINGS, Factorized, SVDFactorizer, mask_row_weights, score_row_weights, weighted_spectra

FACTORIZERS = {"svd": SVDFactorizer}

__all__ = [
    "FACTORIZERS",
    "WEIGHTINGS",
    "Factorized",
    "InputMoments",
    "SVDFactorizer",
    "allocate_ranks",
    "comparable",
    "mask_row_weights",
    "rank_for_error",
    "rank_params",
    "relative",
    "score_row_weights",
    "weighted_spectra",
]
