"""Time the updates of pruning steps on BERT-base's matrices against torch, interleaved, after checking agreement.

python benchmarks/pruning_updates.py [--device cuda] [--dtype bfloat16] [--layers 12] [--threads 2] [--rounds 15]

GB/s counts what an update must read and write, once.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from matrices import encoder_shapes
from torch import Tensor

import lpaf_kernels
from lpaf_kernels import (
    accumulate_movement_,
    keep_threshold,
    sparsity_statistics,
    update_importance_,
    update_sensitivity_,
    zero_pruned_,
)

LR, BETA1, BETA2 = 0.5, 0.85, 0.95
Runner = Callable[["State"], object]


class State:
    """The matrices of an encoder with what the updates keep; every provider has its own."""

    def __init__(self, layers: int, dtype: torch.dtype, device: str) -> None:
        generator = torch.Generator(device).manual_seed(0)

        def draw(to: torch.dtype) -> list[Tensor]:
            return [
                torch.randn(shape, generator=generator, device=device).to(to)
                for shape in encoder_shapes("bert-base", layers)
            ]

        self.weights, self.grads = draw(dtype), draw(dtype)
        self.scores = draw(torch.float32)
        self.sensitivity = [torch.zeros_like(scores) for scores in self.scores]
        self.uncertainty = [torch.zeros_like(scores) for scores in self.scores]
        self.importance = [torch.zeros(scores.shape[0], device=device) for scores in self.scores]
        self.row_scores = [scores[:, 0].clone() for scores in self.scores]
        self.thresholds = keep_threshold(self.scores, 0.5)
        self.row_thresholds = keep_threshold(self.row_scores, 0.5)


def changes(state: State) -> list[Tensor]:
    return [(weight.float() * grad).abs_() for weight, grad in zip(state.weights, state.grads)]


def foreach_changes(state: State) -> list[Tensor]:
    products = torch._foreach_mul([weight.float() for weight in state.weights], state.grads)
    torch._foreach_abs_(products)
    return products


def movement_by_matrix(state: State) -> list[Tensor]:
    for scores, weight, grad in zip(state.scores, state.weights, state.grads):
        scores.addcmul_(weight, grad, value=-LR)
    return state.scores


def movement_foreach(state: State) -> list[Tensor]:
    torch._foreach_addcmul_(state.scores, state.weights, state.grads, value=-LR)
    return state.scores


def importance_by_matrix(state: State) -> list[Tensor]:
    for importance, weight, grad in zip(state.importance, state.weights, state.grads):
        importance.lerp_((weight.float() * grad).abs_().mean(1), 1 - BETA1)
    return state.importance


def importance_foreach(state: State) -> list[Tensor]:
    torch._foreach_lerp_(state.importance, [change.mean(1) for change in foreach_changes(state)], 1 - BETA1)
    return state.importance


def sensitivity_by_matrix(state: State) -> list[Tensor]:
    rows = []
    for i, u, change in zip(state.sensitivity, state.uncertainty, changes(state)):
        i.lerp_(change, 1 - BETA1)
        u.lerp_((change - i).abs_(), 1 - BETA2)
        rows.append((i * u).mean(1))
    return rows


def sensitivity_foreach(state: State) -> list[Tensor]:
    change = foreach_changes(state)
    torch._foreach_lerp_(state.sensitivity, change, 1 - BETA1)
    torch._foreach_sub_(change, state.sensitivity)
    torch._foreach_abs_(change)
    torch._foreach_lerp_(state.uncertainty, change, 1 - BETA2)
    return [product.mean(1) for product in torch._foreach_mul(state.sensitivity, state.uncertainty)]


def zero_entries_by_matrix(state: State) -> list[Tensor]:
    for weight, threshold, scores in zip(state.weights, state.thresholds, state.scores):
        weight.masked_fill_(~threshold.mask(scores), 0)
    return state.weights


def zero_rows_by_matrix(state: State) -> list[Tensor]:
    for weight, threshold, scores in zip(state.weights, state.row_thresholds, state.row_scores):
        weight.masked_fill_(~threshold.mask(scores)[:, None], 0)
    return state.weights


def statistics_by_matrix(state: State) -> list[Tensor]:
    nonzero = [weight != 0 for weight in state.weights]
    return [torch.stack([mask.sum(), mask.any(1).sum(), mask.any(0).sum()]) for mask in nonzero]


def updates(weight_bytes: int) -> dict[str, tuple[float, dict[str, Runner]]]:
    """Of each update the bytes per weight that must move, and the providers; the first is ours."""
    return {
        "movement": (
            2 * weight_bytes + 8,
            {
                "ours": lambda s: accumulate_movement_(s.scores, s.weights, s.grads, LR) or s.scores,
                "by matrix": movement_by_matrix,
                "foreach": movement_foreach,
            },
        ),
        "importance": (
            2 * weight_bytes,
            {
                "ours": lambda s: update_importance_(s.importance, s.weights, s.grads, BETA1) or s.importance,
                "by matrix": importance_by_matrix,
                "foreach": importance_foreach,
            },
        ),
        "sensitivity": (
            2 * weight_bytes + 16,
            {
                "ours": lambda s: update_sensitivity_(s.sensitivity, s.uncertainty, s.weights, s.grads, BETA1, BETA2),
                "by matrix": sensitivity_by_matrix,
                "foreach": sensitivity_foreach,
            },
        ),
        "zero entries": (
            2 * weight_bytes + 4,
            {
                "ours": lambda s: zero_pruned_(s.weights, s.thresholds, s.scores) or s.weights,
                "by matrix": zero_entries_by_matrix,
            },
        ),
        "zero rows": (
            weight_bytes / 2,
            {
                "ours": lambda s: zero_pruned_(s.weights, s.row_thresholds, s.row_scores) or s.weights,
                "by matrix": zero_rows_by_matrix,
            },
        ),
        "statistics": (
            weight_bytes,
            {"ours": lambda s: list(sparsity_statistics(s.weights)), "by matrix": statistics_by_matrix},
        ),
    }


def timed(run: Runner, state: State) -> float:
    synchronize = torch.cuda.synchronize if state.weights[0].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    run(state)
    synchronize()
    return time.perf_counter() - start


def check_agreement(providers: dict[str, Runner], states: dict[str, State]) -> None:
    results = {provider: [t.clone() for t in run(states[provider])] for provider, run in providers.items()}
    for tensors in results.values():
        torch.testing.assert_close(tensors, results["ours"], rtol=1e-4, atol=1e-5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--layers", type=int, default=12, help="of BERT-base's 12")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    names = ("ours", "by matrix", "foreach")
    with torch.no_grad():
        states = {name: State(arguments.layers, dtype, arguments.device) for name in names}
        entries = sum(weight.numel() for weight in states["ours"].weights)
        place = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads"
        print(f"torch {torch.__version__}, {lpaf_kernels.build_info()}")
        print(f"{place}, {entries} {arguments.dtype} weights, minimum / median ms of {arguments.rounds} rounds, GB/s")
        for update, (entry_bytes, providers) in updates(dtype.itemsize).items():
            check_agreement(providers, states)
            times: dict[str, list[float]] = {provider: [] for provider in providers}
            for _ in range(arguments.rounds):
                for provider, run in providers.items():
                    times[provider].append(timed(run, states[provider]))
            cells = []
            for provider, values in times.items():
                low, middle = min(values), statistics.median(values)
                rate = 1e-9 * entry_bytes * entries / middle
                cells.append(f"{provider} {1e3 * low:8.3f} / {1e3 * middle:8.3f} {rate:6.1f} GB/s")
            print(f"{update:12}  " + "  ".join(cells))


if __name__ == "__main__":
    main()
