"""Time decoded_embedding against gather and decode in eager torch, interleaved, after checking that they agree.

python benchmarks/decoded_embedding.py [--vocabulary 30522] [--dim 768] [--tokens 8x128] [--device cpu|cuda]
    [--dtype float32] [--threads 2] [--rounds 50] [--backward]

Latent widths are those of BERT-base's token embeddings at compression ratios 3, 10 and 25, see `decoders`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from itertools import pairwise

import torch
from matrices import timed
from torch import Tensor

import lpaf_kernels
from lpaf_kernels import DecodedEmbedding
from lpaf_kernels.ops.decoded_embedding import decoded_embedding_reference

RATIOS = (3, 10, 25)


def decoders(vocabulary: int, dim: int) -> list[tuple[str, int, tuple[int, ...]]]:
    """(name, latent, hidden widths) of every ratio: linear, hidden layers of 2x and 4x for a latent of x."""
    found = []
    for ratio in RATIOS:
        for name, factors in (("linear", ()), ("mlp1", (2,)), ("mlp2", (2, 4))):

            def numbers(x: int, factors: tuple[int, ...] = factors) -> int:
                widths = (x, *(factor * x for factor in factors), dim)
                return vocabulary * x + sum(a * b + b for a, b in pairwise(widths))

            x = 1
            while numbers(x + 1) * ratio <= vocabulary * dim:
                x += 1
            found.append((f"CR {ratio} {name}", x, tuple(factor * x for factor in factors)))
    return found


def runner(function: Callable[[], Tensor], leaves: list[Tensor], grad: Tensor | None) -> Callable[[], object]:
    """A call of ``function``, with the gradients of ``leaves`` where ``grad`` is one."""
    if grad is not None:
        return lambda: torch.autograd.grad(function(), leaves, grad)

    @torch.no_grad()
    def run() -> Tensor:
        return function()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--tokens", default="8x128", help="batch x length")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--backward", action="store_true", help="forward and backward")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    shape = tuple(map(int, arguments.tokens.split("x")))
    make = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    print(f"torch {torch.__version__}, {lpaf_kernels.build_info()}")
    print(torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} threads")
    print(f"{arguments.tokens} ids of {arguments.vocabulary}, ms: minimum / median of {arguments.rounds} rounds")
    ids = torch.randint(arguments.vocabulary, shape, device=arguments.device)
    grad = torch.randn(*shape, arguments.dim, **make) if arguments.backward else None
    for name, latent, hidden in decoders(arguments.vocabulary, arguments.dim):
        for norms in (False, True):
            layer = DecodedEmbedding(arguments.vocabulary, arguments.dim, latent, hidden, norms=norms, **make)
            layers = [(part.weight, part.bias) for part in layer.decoder]
            leaves = list(layer.parameters())

            def eager(layer: DecodedEmbedding = layer, layers: list = layers) -> Tensor:
                return decoded_embedding_reference(ids, layer.latent, layers, layer.norms)

            providers = {
                "ours": runner(lambda layer=layer: layer(ids), leaves, grad),
                "eager": runner(eager, leaves, grad),
            }
            torch.testing.assert_close(providers["ours"](), providers["eager"](), rtol=2e-2, atol=1e-3)
            times: dict[str, list[float]] = {provider: [] for provider in providers}
            for _ in range(arguments.rounds):
                for provider, run in providers.items():
                    times[provider].append(timed(run, arguments.device))
            cells = "  ".join(f"{p} {min(t):.3f} / {statistics.median(t):.3f}" for p, t in times.items())
            ratio = statistics.median(times["eager"]) / statistics.median(times["ours"])
            text = f"{name}, latent {latent}{', norms' if norms else ''}"
            print(f"{text:32} {cells}  eager / ours {ratio:.2f}x", flush=True)


if __name__ == "__main__":
    main()
