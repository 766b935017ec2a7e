"""Factorisers: ``FACTORIZERS[name](rank=..., weighting=...)(model, scores) -> Factorized``."""

from .svd import WEIGHTINGS, Factorized, SVDFactorizer, mask_row_weights, score_row_weights

FACTORIZERS = {"svd": SVDFactorizer}

__all__ = ["FACTORIZERS", "WEIGHTINGS", "Factorized", "SVDFactorizer", "mask_row_weights", "score_row_weights"]
