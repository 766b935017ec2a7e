"""The best rank-k product of a matrix for the inputs that it really gets.

With M = X^T X the second moment of the inputs (:mod:`activations`) and L its Cholesky factor, M = L L^T, the squared
error of the outputs is ||(W - A B) X^T||_F = ||(W - A B) L||_F: a row of W L is a row of W seen through the inputs.
Its best rank-k approximation is the truncated SVD, W L = U S V^T (Eckart and Young), so that A B L = U_k U_k^T W L.
SVD-LLM (Wang et al., 2024, section 3.2) solves that for B = S V^T L^-1. Since U_k U_k^T stands on the left, the same
product is A = U_k, B = U_k^T W without an inverse of L: the inputs say which outputs matter, and W is projected onto
them. It stays what it is where M is singular, where L^-1 does not exist, and A B is never larger than W.

Row weights D stand on the other side: D W L = U S V^T, A = D^-1 U_k, B = U_k^T D W.
"""

from __future__ import annotations

import torch

#: What is added to M's diagonal, as a share of its mean: nothing to directions that the inputs have, but ranks beyond
#: those (more ranks than calibration tokens, inputs that are always 0) go to the largest rest of W.
DAMPING = 1e-8


def input_factor(moment: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(L, c): the lower Cholesky factor of M + c mean(diag M) I, float64 [m, m].

    c is ``DAMPING``, or as many times ten times that as rounding has left M indefinite. No inputs at all, M = 0: L is
    the identity, under which W L is W, and c is infinite.

    Args:
        moment: M [m, m], symmetric, positive semi-definite up to rounding.

    Raises:
        ValueError: M has NaN or infinite entries.
    """
    moment = moment.double()
    if not moment.isfinite().all():
        raise ValueError("moment: expected finite values, got NaN or infinity")
    scale = moment.diagonal().mean()
    if not scale > 0:
        return torch.eye(len(moment), dtype=torch.float64, device=moment.device), float("inf")
    damping = DAMPING
    while True:
        damped = moment / scale
        damped.diagonal().add_(damping)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return factor * scale.sqrt(), damping
        damping *= 10


def project(weight: torch.Tensor, a: torch.Tensor, d: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The A, B with A's column space that are the best for every L: Q an orthonormal basis of D A, A = D^-1 Q and
    B = Q^T D W.

    Args:
        weight: W [n, m].
        a: A [n, k] of D W L's best product.
        d: row weights [n], above 0; None for all 1.
    """
    rows = weight.new_ones(1, dtype=torch.float64) if d is None else d.double()[:, None]
    basis = torch.linalg.qr(rows * a.double()).Q
    return (basis / rows).to(weight.dtype), (basis.mT @ (rows * weight.double())).to(weight.dtype)
