"""Hard-concrete gates: random variables in [0, 1] that are exactly 0 or 1 with a probability that is learned.

Louizos, Welling, Kingma: *Learning Sparse Neural Networks through L0 Regularization* (ICLR 2018). A logistic variable
with location log alpha is squashed, stretched to (gamma, zeta) and clipped, so that gradients reach log alpha although
the gate may be closed.
"""

from __future__ import annotations

import math

import torch
from torch import nn

#: beta, gamma and zeta of the paper
TEMPERATURE = 2 / 3
LEFT, RIGHT = -0.1, 1.1
#: log alpha of a new gate: the probability 0.99 of the unstretched one; without noise it is 1
START = math.log(0.99 / 0.01)
#: where log alpha stays, on both sides of 0, so that no gate is closed or open for good
LIMIT = math.log(100.0)


def sample(log_alpha: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """z for numbers u = ``uniform`` drawn from (0, 1), of the shape of ``log_alpha``: the stretched and clipped
    sigmoid((log u - log(1 - u) + log alpha) / beta)."""
    noise = uniform.log() - (-uniform).log1p()
    return _stretch(((noise + log_alpha) / TEMPERATURE).sigmoid())


def without_noise(log_alpha: torch.Tensor) -> torch.Tensor:
    """z at test time: min(1, max(0, sigmoid(log alpha) (zeta - gamma) + gamma))."""
    return _stretch(log_alpha.sigmoid())


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """P(z > 0) = sigmoid(log alpha - beta log(-gamma / zeta))."""
    return (log_alpha - TEMPERATURE * math.log(-LEFT / RIGHT)).sigmoid()


def _stretch(s: torch.Tensor) -> torch.Tensor:
    return (s * (RIGHT - LEFT) + LEFT).clamp(0.0, 1.0)


class HardConcrete(nn.Module):
    """``size`` independent gates: random in training mode, without noise in evaluation mode, or fixed.

    Parameter ``log_alpha`` float32 [size]; buffer ``uniform`` float32 [size], the draws of this training step. They
    come from :meth:`draw`, so that all forward passes of a step, and all processes, see the same gates.
    """

    def __init__(self, size: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((size,), START, device=device))
        self.register_buffer("uniform", torch.full((size,), 0.5, device=device))
        self.fixed: torch.Tensor | None = None

    def draw(self, generator: torch.Generator) -> None:
        """New draws from ``generator``, on the CPU."""
        eps = torch.finfo(torch.float32).eps
        self.uniform.copy_(torch.rand(len(self.uniform), generator=generator).clamp(eps, 1.0 - eps))

    def fix(self, z: torch.Tensor) -> None:
        """Give the gates the values ``z`` [size] from now on."""
        self.fixed = z.to(self.log_alpha)

    def forward(self) -> torch.Tensor:
        """z [size]."""
        if self.fixed is not None:
            return self.fixed
        return sample(self.log_alpha, self.uniform) if self.training else without_noise(self.log_alpha)

    def open_probability(self) -> torch.Tensor:
        """P(z > 0) [size], differentiable."""
        return open_probability(self.log_alpha)

    @torch.no_grad()
    def constrain(self) -> None:
        """Put log alpha back between its limits."""
        self.log_alpha.clamp_(-LIMIT, LIMIT)

    def extra_repr(self) -> str:
        return f"size={len(self.log_alpha)}"
