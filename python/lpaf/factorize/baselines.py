"""What else could stand in for a matrix: its largest weights, a Kronecker product, a Tucker decomposition (Banaei et
al., 2023, appendix A.7)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator

import torch

from lpaf_kernels import weighted_svd

from ..errors import InputError
from ..models.reconstructed import Kronecker, Source, Sparse, Tucker
from .svd import balance

#: --method -> what it needs beside torch
BASELINES = {"prune-l1": None, "kronecker": None, "tucker": "tensorly"}


def check_baseline(method: str) -> None:
    """InputError where a package that a method needs is not installed."""
    package = BASELINES.get(method)
    if package is not None and importlib.util.find_spec(package) is None:
        raise InputError(f"--method {method}: needs {package}; pip install 'lpaf-kernels[{method}]'")


def sparse_count(rows: int, columns: int, budget: float) -> tuple[int, bool]:
    """(weights that stay, whether their places are bits) of a matrix that may take ``budget`` numbers of 4 bytes."""
    by_bits = math.floor(budget - math.ceil(-(-rows * columns // 8) / 4))
    by_columns = math.floor((budget - rows) / 1.5) if columns <= torch.iinfo(torch.int16).max else 0
    count = min(max(by_bits, by_columns), rows * columns)
    return count, by_bits >= by_columns


def sparse_params(rows: int, columns: int, count: int, packed: bool) -> float:
    """Numbers of 4 bytes that they take."""
    return count + (-(-rows * columns // 8) / 4 if packed else count / 2 + rows)


def prune_l1(weights: list[torch.Tensor], counts: list[tuple[int, bool]], joint: bool) -> list[Source]:
    """The largest weights of every matrix, or of all together (torch.nn.utils.prune's l1_unstructured)."""
    magnitudes = [weight.abs() for weight in weights]
    if joint:
        flat = torch.cat([magnitude.flatten() for magnitude in magnitudes])
        chosen = _largest(flat, sum(count for count, _ in counts))
        masks = [
            mask.view_as(weight)
            for mask, weight in zip(chosen.split([w.numel() for w in weights]), weights, strict=True)
        ]
    else:
        masks = [_largest(m.flatten(), count).view_as(m) for m, (count, _) in zip(magnitudes, counts, strict=True)]
    return [Sparse.of(weight, mask, packed) for weight, mask, (_, packed) in zip(weights, masks, counts, strict=True)]


def _largest(flat: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.topk(count).indices] = True
    return mask


def kronecker_sizes(rows: int, columns: int, budget: float, blocks: int = 1) -> tuple[int, int, int, int] | None:
    """(n1, m1, n2, m2) with n1 n2 = rows and m1 m2 = columns of which the factors A [n1, m1] and B [n2, m2] hold the
    most numbers that ``budget`` allows; None if none fit. ``blocks`` divides n1."""
    sizes = [
        (n1, m1, rows // n1, columns // m1) for n1 in divisors(rows) if n1 % blocks == 0 for m1 in divisors(columns)
    ]
    fitting = [size for size in sizes if kronecker_params(size) <= budget]
    return max(fitting, key=lambda size: (kronecker_params(size), size)) if fitting else None


def kronecker_params(sizes: tuple[int, int, int, int]) -> int:
    """Numbers of the two factors."""
    n1, m1, n2, m2 = sizes
    return n1 * m1 + n2 * m2


def divisors(number: int) -> Iterator[int]:
    """The numbers that divide ``number``."""
    return (candidate for candidate in range(1, number + 1) if number % candidate == 0)


@torch.no_grad()
def kronecker(weights: list[torch.Tensor], sizes: tuple[int, int, int, int]) -> list[Source]:
    """The Kronecker product that is nearest to the matrices on top of each other: the first singular pair of the
    rearranged matrix [n1 m1, n2 m2] (Van Loan and Pitsianis, 1993)."""
    n1, m1, n2, m2 = sizes
    stacked = torch.cat(weights)
    rearranged = stacked.view(n1, n2, m1, m2).permute(0, 2, 1, 3).reshape(n1 * m1, n2 * m2)
    ((a, b),) = zip(*weighted_svd([rearranged], 1), strict=True)
    a, b = balance(a, b)
    sources: list[Source] = []
    for part in a.view(n1, m1).chunk(len(weights)):
        owner = sources[0] if sources else None
        source = Kronecker(tuple(part.shape), (n2, m2), owner, dtype=stacked.dtype, device=stacked.device)
        source.a.copy_(part)
        if owner is None:
            source.b.copy_(b.view(n2, m2))
        sources.append(source)
    return sources


def tucker_params(core: tuple[int, int, int], layers: int, rows: int, columns: int) -> int:
    """Numbers of a core and its three factors."""
    r0, r1, r2 = core
    return r0 * r1 * r2 + layers * r0 + rows * r1 + columns * r2


def tucker_ranks(layers: int, rows: int, columns: int, budget: float) -> tuple[int, int, int] | None:
    """(layers, r1, r2): all layers, which are few and unlike, and the largest equal shares of the other two sides that
    fit ``budget``; None if rank 1 does not."""

    def at(share: int) -> tuple[int, int, int]:
        r1, r2 = (max(1, side * share // 1000) for side in (rows, columns))
        return layers, min(r1, layers * r2), min(r2, layers * r1)

    fitting = [at(share) for share in range(1, 1001) if tucker_params(at(share), layers, rows, columns) <= budget]
    return fitting[-1] if fitting else None


@torch.no_grad()
def tucker(weights: list[torch.Tensor], core: tuple[int, int, int]) -> list[Source]:
    """The Tucker decomposition of the matrices of all layers as a tensor [layers, n, m], by higher-order orthogonal
    iteration (De Lathauwer et al., 2000)."""
    import tensorly
    from tensorly.decomposition import tucker as decompose

    with tensorly.backend_context("pytorch"):
        middle, (layers, left, right) = decompose(torch.stack(weights), rank=list(core), init="svd", random_state=0)
    sources: list[Source] = []
    for mixture in layers:
        owner = sources[0] if sources else None
        like = {"dtype": weights[0].dtype, "device": weights[0].device}
        source = Tucker(core, tuple(weights[0].shape), owner, **like)
        source.mixture.copy_(mixture)
        if owner is None:
            source.core.copy_(middle)
            source.left.copy_(left)
            source.right.copy_(right)
        sources.append(source)
    return sources
