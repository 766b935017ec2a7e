"""Time decoded_embedding against gather and decode in eager torch, interleaved, after comparing both with float64.

python benchmarks/decoded_embedding.py [--dims 384 768] [--tokens 8x128] [--ids text] [--direction forward+backward]
    [--threads 2] [--rounds 50] [--only linear] [--cpu-clock] [--compile] [--device cuda --dtype bfloat16]

Widths follow from a compression ratio and one unit x, the largest that meets it: latent x, hidden layers 2x and 4x.
The ratio counts latent, decoder with biases and, where they are kept, norms. "eager" is what one writes by hand:
F.embedding, F.linear of weights as nn.Linear stores them, F.leaky_relu, tanh, and a multiplication by norms / lengths.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from matrices import timed
from torch import Tensor

import lpaf_kernels
from lpaf_kernels import DecodedEmbedding
from lpaf_kernels.ops.decoded_embedding import decoded_embedding_reference

RATIOS = (3, 10, 25)
DECODERS = {"linear": (), "mlp1": (2,), "mlp2": (2, 4)}


@dataclass(frozen=True)
class Case:
    """An embedding of ``vocabulary`` rows at one compression ratio."""

    vocabulary: int
    dim: int
    ratio: int
    decoder: str
    norms: bool

    def widths(self) -> tuple[int, ...]:
        """Latent, hidden layers, dim."""
        unit = 1
        while self._numbers(self._widths(unit + 1)) * self.ratio <= self.vocabulary * self.dim:
            unit += 1
        return self._widths(unit)

    def _widths(self, unit: int) -> tuple[int, ...]:
        return (unit, *(factor * unit for factor in DECODERS[self.decoder]), self.dim)

    def _numbers(self, widths: tuple[int, ...]) -> int:
        return self.vocabulary * (widths[0] + self.norms) + sum(a * b + b for a, b in pairwise(widths))

    def layer(self, **make: object) -> DecodedEmbedding:
        latent, *hidden, dim = self.widths()
        return DecodedEmbedding(self.vocabulary, dim, latent, hidden, norms=self.norms, **make)


def eager(ids: Tensor, latent: Tensor, weights: list[Tensor], biases: list[Tensor], norms: Tensor | None) -> Tensor:
    """Gather and decode by hand; weights [out, in]."""
    y = F.embedding(ids, latent)
    if len(weights) > 1:
        y = F.leaky_relu(y)
    for weight, bias in zip(weights[:-1], biases[:-1]):
        y = F.leaky_relu(F.linear(y, weight, bias))
    y = F.linear(y, weights[-1], biases[-1])
    if len(weights) > 1:
        y = torch.tanh(y)
    if norms is not None:
        y = y * (norms[ids] / torch.linalg.vector_norm(y, dim=-1).clamp_min(1e-12))[..., None]
    return y


def draw_ids(kind: str, shape: tuple[int, ...], vocabulary: int) -> Tensor:
    """Ids of equal chance, which hardly repeat, or as in text: number r by frequency has a chance of 1 / (r + 2.7)."""
    if kind == "uniform":
        return torch.randint(vocabulary, shape)
    ranks = torch.arange(1, vocabulary + 1, dtype=torch.float64)
    drawn = torch.multinomial(1 / (ranks + 2.7), math.prod(shape), replacement=True)
    return torch.randperm(vocabulary)[drawn].view(shape)


def runner(function: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor | None) -> Callable[[], list[Tensor]]:
    """A call of ``function``, with the gradients of ``leaves`` where ``grad`` is one."""
    if grad is not None:

        def train() -> list[Tensor]:
            y = function()
            return [y, *torch.autograd.grad(y, leaves, grad)]

        return train

    @torch.no_grad()
    def run() -> list[Tensor]:
        return [function()]

    return run


def check(found: dict[str, list[Tensor]], exact: list[Tensor]) -> None:
    """Raise unless ours is within twice the error of eager and one rounding of the largest entry."""
    for ours, chain, truth in zip(found["ours"], found["eager"], exact, strict=True):
        floor = torch.finfo(ours.dtype).eps * truth.abs().max().item()
        error, other = ((result.double() - truth).abs().max().item() for result in (ours, chain))
        if not error <= 2 * other + floor:
            raise RuntimeError(f"error {error:.3g}, allowed {2 * other + floor:.3g}")


def cpu_timed(run: Callable[[], object], device: str) -> float:
    """Milliseconds of processor time of one call, all threads together."""
    start = time.process_time()
    run()
    return 1e3 * (time.process_time() - start)


def providers(
    layer: DecodedEmbedding, ids: Tensor, grad: Tensor | None, compiled: bool
) -> tuple[dict[str, Callable[[], list[Tensor]]], Callable[[], list[Tensor]]]:
    """What is timed, by name, and the same in float64. Gradients come in the order of the layer's parameters."""
    weights = [part.weight.detach().t().contiguous().requires_grad_() for part in layer.decoder]
    biases = [part.bias.detach().clone().requires_grad_() for part in layer.decoder]
    latent = layer.latent.detach().clone().requires_grad_()
    leaves = [latent, *(tensor for pair in zip(weights, biases) for tensor in pair)]

    def by_hand(function: Callable = eager) -> Callable[[], list[Tensor]]:
        run = runner(lambda: function(ids, latent, weights, biases, layer.norms), leaves, grad)
        # The gradient of a weight as ours stores it; a view, it costs nothing.
        return lambda: [t if i < 2 or i % 2 else t.t() for i, t in enumerate(run())]

    wide = [parameter.detach().double().requires_grad_() for parameter in layer.parameters()]

    def exact() -> Tensor:
        norms = None if layer.norms is None else layer.norms.double()
        return decoded_embedding_reference(ids, wide[0], list(zip(wide[1::2], wide[2::2])), norms)

    found = {"ours": runner(lambda: layer(ids), list(layer.parameters()), grad), "eager": by_hand()}
    if compiled:
        found["compile"] = by_hand(torch.compile(eager, dynamic=False))
    return found, runner(exact, wide, None if grad is None else grad.double())


def line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", default="8x128", help="batch x length")
    parser.add_argument("--ids", choices=("uniform", "text"), default="uniform")
    parser.add_argument("--direction", choices=("forward", "forward+backward"), default="forward")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--only", choices=tuple(DECODERS), help="one kind of decoder")
    parser.add_argument("--compile", action="store_true", help="torch.compile of eager too")
    parser.add_argument(
        "--cpu-clock", action="store_true", help="processor time in place of elapsed time, where others use the machine"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = tuple(map(int, arguments.tokens.split("x")))
    make = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    clock = cpu_timed if arguments.cpu_clock else timed
    print(f"torch {torch.__version__}, {lpaf_kernels.build_info()}")
    print(torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads")
    ids = draw_ids(arguments.ids, shape, arguments.vocabulary).to(arguments.device)
    distinct, unit = ids.unique().numel(), "ms of processor time" if arguments.cpu_clock else "ms"
    about = f"{arguments.tokens} ids of {arguments.vocabulary}, {distinct} distinct"
    print(f"{about}; {arguments.dtype}, {arguments.direction}")
    print(f"{unit}: minimum / median of {arguments.rounds} rounds")
    cases = [
        Case(arguments.vocabulary, dim, ratio, decoder, norms)
        for dim in arguments.dims
        for ratio in RATIOS
        for decoder in DECODERS
        for norms in (False, True)
        if arguments.only in (None, decoder)
    ]
    names = ("ours", "eager", *(["compile"] if arguments.compile else []))
    print(line("decoder", "widths", "norms", *names, *(f"{name} / ours" for name in names[1:])))
    for case in cases:
        grad = torch.randn(*shape, case.dim, **make) if arguments.direction != "forward" else None
        runs, exact = providers(case.layer(**make), ids, grad, arguments.compile)
        check({name: run() for name, run in runs.items()}, exact())
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(arguments.rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                times[name].append(clock(runs[name], arguments.device))
        middle = {name: statistics.median(values) for name, values in times.items()}
        cells = [f"CR {case.ratio}, {case.decoder}", "-".join(map(str, case.widths())), "yes" if case.norms else "no"]
        cells += [f"{min(values):.2f} / {middle[name]:.2f}" for name, values in times.items()]
        cells += [f"{middle[name] / middle['ours']:.2f}x" for name in names[1:]]
        print(line(*cells), flush=True)


if __name__ == "__main__":
    main()
