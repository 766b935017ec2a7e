"""Time keep_threshold over a model's matrices against torch.kthvalue and torch.topk per matrix, interleaved, after
checking that they agree.

python benchmarks/keep_threshold.py [--matrices minilm|bert-base|N] [--device cpu|cuda] [--threads 2] [--rounds 15]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from matrices import MODELS, encoder_shapes, timed

import lpaf_kernels
from lpaf_kernels import keep_threshold


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", default="minilm", help="minilm, bert-base, or a number of scores")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    named = arguments.matrices in MODELS
    shapes = encoder_shapes(arguments.matrices) if named else [(int(arguments.matrices),)]
    normal = [torch.randn(shape, generator=generator).to(arguments.device) for shape in shapes]
    sizes = [scores.numel() for scores in normal]
    print(f"torch {torch.__version__}, {lpaf_kernels.build_info()}")
    if arguments.device == "cuda":
        print(torch.cuda.get_device_name())
    print(
        f"{len(sizes)} matrices, {sum(sizes)} float32 scores, {arguments.threads} threads,"
        f" ms: minimum / median of {arguments.rounds} rounds"
    )
    inputs = {
        "normal": normal,
        "magnitude": [4 * scores.abs() / scores.abs().mean() for scores in normal],
        "zeros": [torch.zeros_like(scores) for scores in normal],
    }
    for name, scores in inputs.items():
        for keep in (0.9, 0.5, 0.1):
            kept = [int(keep * size + 0.5) for size in sizes]
            flat = [tensor.view(-1) for tensor in scores]
            providers = {
                "keep_threshold": lambda s=scores, k=keep: keep_threshold(s, k),
                "kthvalue": lambda s=flat, k=kept: [torch.kthvalue(t, t.numel() - n + 1) for t, n in zip(s, k)],
                "topk": lambda s=flat, k=kept: [torch.topk(t, n, sorted=False) for t, n in zip(s, k)],
                "global": lambda s=scores, k=keep: keep_threshold(s, k, "global"),
            }
            for threshold, tensor, count, other in zip(
                providers["keep_threshold"](), scores, kept, providers["kthvalue"](), strict=True
            ):
                assert int(threshold.count(tensor)) == count
                assert threshold.value == other.values
            times: dict[str, list[float]] = {provider: [] for provider in providers}
            for _ in range(arguments.rounds):
                for provider, run in providers.items():
                    times[provider].append(timed(run, arguments.device))
            best = {provider: (min(values), statistics.median(values)) for provider, values in times.items()}
            cells = "  ".join(f"{provider} {low:.2f} / {mid:.2f}" for provider, (low, mid) in best.items())
            ratios = "  ".join(
                f"{other} / ours {best[other][1] / best['keep_threshold'][1]:.1f}x" for other in ("kthvalue", "topk")
            )
            print(f"{name:9} keep {keep:.1f}  {cells}  {ratios}", flush=True)


if __name__ == "__main__":
    main()
