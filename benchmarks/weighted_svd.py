"""Time weighted_svd over a model's matrices against torch.linalg.svd in a loop, interleaved, after checking its error.

python benchmarks/weighted_svd.py [--matrices bert-base|minilm] [--ranks 80,130,260] [--device cpu|cuda] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from matrices import MODELS, encoder_shapes, timed
from torch import Tensor

import lpaf_kernels
from lpaf_kernels import weighted_singular_values, weighted_svd


def by_svd(weights: list[Tensor], rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """One decomposition after the other, as published code does it."""
    a, b = [], []
    for weight in weights:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        a.append(u[:, :rank] * s[:rank])
        b.append(vh[:rank])
    return a, b


def check(weights: list[Tensor], factors: tuple[list[Tensor], list[Tensor]], rank: int) -> float:
    """The largest (error - optimum) / optimum of all matrices, both in float64; the documented bound must hold."""
    worst = 0.0
    for weight, a, b, spectrum in zip(weights, *factors, weighted_singular_values(weights), strict=True):
        best = spectrum[rank:].square().sum().sqrt()
        error = torch.linalg.norm(weight.double() - a.double() @ b.double())
        assert error - best <= 1e-4 * best + 10 * torch.finfo(torch.float32).eps * spectrum.norm()
        worst = max(worst, float((error - best) / best))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", default="bert-base", choices=tuple(MODELS))
    parser.add_argument("--ranks", default="80,130,260")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    weights = [
        (0.04 * torch.randn(shape, generator=generator)).to(arguments.device)
        for shape in encoder_shapes(arguments.matrices)
    ]
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} CPU threads"
    print(f"torch {torch.__version__}, lpaf-kernels {lpaf_kernels.__version__}, {name}")
    print(f"{len(weights)} random float32 matrices of {arguments.matrices}, seconds of {arguments.rounds} rounds")
    for rank in map(int, arguments.ranks.split(",")):
        providers: dict[str, Callable] = {
            "weighted_svd": lambda k=rank: weighted_svd(weights, k),
            "linalg.svd": lambda k=rank: by_svd(weights, k),
            "singular values": lambda k=rank: weighted_singular_values(weights),
        }
        excess, theirs = (check(weights, providers[name](), rank) for name in ("weighted_svd", "linalg.svd"))
        times: dict[str, list[float]] = {provider: [] for provider in providers}
        for _ in range(arguments.rounds):
            for provider, run in providers.items():
                times[provider].append(timed(run, arguments.device) / 1e3)
        cells = "  ".join(f"{provider} {statistics.median(values):.2f}" for provider, values in times.items())
        ratios = [other / ours for other, ours in zip(times["linalg.svd"], times["weighted_svd"], strict=True)]
        print(
            f"rank {rank:4}  {cells}  svd / ours {statistics.median(ratios):.2f}x  excess {excess:.1e} / {theirs:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
