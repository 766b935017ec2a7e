"""Time keep_threshold against torch.kthvalue and torch.topk on the CPU, interleaved, after checking that they agree.

python benchmarks/keep_threshold.py [--size 2400000] [--threads 2] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import lpaf_kernels
from lpaf_kernels import keep_threshold


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=2_400_000, help="scores")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = arguments.size
    print(f"torch {torch.__version__}, {lpaf_kernels.build_info()}")
    print(f"{size} float32 scores, {arguments.threads} threads, ms: minimum / median of {arguments.rounds} rounds")
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "normal": torch.randn(size, generator=generator),
        "uniform": torch.rand(size, generator=generator),
        "zeros": torch.zeros(size),
    }
    for name, scores in inputs.items():
        for keep in (0.9, 0.5, 0.1):
            kept = int(keep * size + 0.5)
            providers = {
                "keep_threshold": lambda s=scores, k=keep: keep_threshold(s, k),
                "kthvalue": lambda s=scores, k=kept: torch.kthvalue(s, size - k + 1),
                "topk": lambda s=scores, k=kept: torch.topk(s, k, sorted=False),
            }
            threshold = providers["keep_threshold"]()
            assert int(threshold.count(scores)) == kept
            assert threshold.value == providers["kthvalue"]().values
            times: dict[str, list[float]] = {provider: [] for provider in providers}
            for _ in range(arguments.rounds):
                for provider, run in providers.items():
                    times[provider].append(timed(run))
            best = {provider: (min(values), statistics.median(values)) for provider, values in times.items()}
            cells = "  ".join(f"{provider} {low:7.2f} / {mid:7.2f}" for provider, (low, mid) in best.items())
            ratio = best["kthvalue"][1] / best["keep_threshold"][1]
            print(f"{name:8} keep {keep:.1f}  {cells}  kthvalue / ours {ratio:.1f}x")


if __name__ == "__main__":
    main()
