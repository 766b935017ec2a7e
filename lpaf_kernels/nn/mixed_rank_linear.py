"""A factorised layer that sometimes runs its sparse original: LPAF's mixed-rank fine-tuning."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import check_device, check_floating, check_fraction, check_shape
from .lowrank_sparse_linear import LowRankSparseLinear


class MixedRankLinear(nn.Module):
    """z * (sparse path) + (1 - z) * (low-rank path) with one z per pass, chosen from outside by
    :func:`draw_paths`.

    The choice is data of the module, not drawn in forward: a recomputed forward (gradient checkpointing)
    takes the same path as long as ``paths`` stands until backward is done.

    Args:
        lowrank: the factorised layer; its bias and activation serve both paths.
        sparse_weight: the pruned weight [out, in] that ``lowrank`` factorises.
        train_sparse: whether the sparse weight is a parameter instead of a buffer. Default: False.

    Attributes:
        paths: None or all False: low rank only. A tuple of n: dim 0 of the input is n equal passes, and
            pass i uses the sparse weight iff paths[i]. Equal neighbours are served by one call. An input of
            size 1 in dim 0 is shared by all passes (DeBERTa's relative positions) and takes the first path.
    """

    def __init__(self, lowrank: LowRankSparseLinear, sparse_weight: Tensor, train_sparse: bool = False) -> None:
        super().__init__()
        if not isinstance(lowrank, LowRankSparseLinear):
            raise TypeError(f"lowrank: expected a LowRankSparseLinear, got {type(lowrank).__name__}")
        check_floating("sparse_weight", sparse_weight)
        check_shape(
            "sparse_weight",
            sparse_weight,
            lowrank.out_features,
            lowrank.in_features,
            because="[out, in] of lowrank",
        )
        check_device("sparse_weight", sparse_weight, lowrank.down, "lowrank")
        self.lowrank = lowrank
        weight = sparse_weight.detach()
        if train_sparse:
            self.sparse_weight = nn.Parameter(weight)
        else:
            self.register_buffer("sparse_weight", weight)
        self.paths: tuple[bool, ...] | None = None

    @property
    def in_features(self) -> int:
        """Size of the input."""
        return self.lowrank.in_features

    @property
    def out_features(self) -> int:
        """Size of the output."""
        return self.lowrank.out_features

    def forward(self, x: Tensor) -> Tensor:
        """[n * batch, ..., in] -> [n * batch, ..., out] for n passes."""
        paths = self.paths
        if paths is None or not any(paths):
            return self.lowrank(x)
        if all(paths) or (x.shape[0] == 1 and paths[0]):
            return self._sparse(x)
        if x.shape[0] == 1:
            return self.lowrank(x)
        if x.shape[0] % len(paths):
            raise ValueError(
                f"x: expected dimension 0 to be {len(paths)} equal passes (the length of paths), got shape"
                f" {list(x.shape)}"
            )
        batch = x.shape[0] // len(paths)
        runs = [(sparse, len(list(run))) for sparse, run in itertools.groupby(paths)]
        parts = x.split([batch * length for _, length in runs])
        return torch.cat(
            [
                self._sparse(part) if sparse else self.lowrank(part)
                for part, (sparse, _) in zip(parts, runs, strict=True)
            ]
        )

    def _sparse(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.sparse_weight, self.lowrank.bias)
        activation = self.lowrank.activation
        if activation is None:
            return y
        if activation == "gelu_tanh":
            return F.gelu(y, approximate="tanh")
        return getattr(torch if activation == "tanh" else F, activation)(y)

    def to_lowrank(self) -> LowRankSparseLinear:
        """Return the factorised layer (not copied); the sparse weight is left behind."""
        return self.lowrank

    def extra_repr(self) -> str:
        return f"train_sparse={isinstance(self.sparse_weight, nn.Parameter)}, paths={self.paths}"


def draw_paths(model: nn.Module, p: float, generator: torch.Generator | None = None, passes: int = 2) -> None:
    """Draw ``paths`` of every MixedRankLinear of ``model``: independent Bernoulli(p) per module and pass.

    Args:
        model: any module.
        p: probability of the sparse path, in [0, 1].
        generator: a CPU generator. Default: torch's global one. One draw of [modules, passes] in the order of
            ``model.modules()``, so that the same state gives the same paths.
        passes: number of equal passes in dim 0 of the batch. Default: 2.

    Raises:
        TypeError, ValueError: an argument of the wrong type or out of range.
    """
    p = check_fraction("p", p)
    if isinstance(passes, bool) or not isinstance(passes, int):
        raise TypeError(f"passes: expected an integer, got {passes!r}")
    if passes < 1:
        raise ValueError(f"passes: expected at least 1, got {passes}")
    modules = [module for module in model.modules() if isinstance(module, MixedRankLinear)]
    drawn = torch.rand(len(modules), passes, generator=generator, device="cpu") < p
    for module, paths in zip(modules, drawn.tolist(), strict=True):
        module.paths = tuple(paths)


def clear_paths(model: nn.Module) -> None:
    """Set every MixedRankLinear of ``model`` to its low-rank path."""
    for module in model.modules():
        if isinstance(module, MixedRankLinear):
            module.paths = None
