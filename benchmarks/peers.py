"""Other people's kernels, timed beside ours from a checkout that the user names; none of their code is here.

``--peer losparse=PATH``: github.com/yxli2123/LoSparse, class LinearLoSparse of utils.py, on linear cases.
``--peer flashsvd=PATH`` and ``--peer flashsvd_v1=PATH``: github.com/Zishan-Shao/FlashSVD, flashsvd_ffn of
kernels/mlp/prefill/flashsvdffn.py and its two-stage predecessor, on ffn cases.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import Case
from .errors import InputError
from .problem import BlockProblem, LinearProblem
from .providers import Outputs, Provider, Runner, block_runner, linear_runner


@dataclass(frozen=True)
class Peer:
    """Where a peer's code is in its repository, and how it becomes a provider.

    Args:
        repository: its address.
        file: the module in it.
        attribute: what is taken from the module.
        make: (attribute, name) -> provider.
    """

    repository: str
    file: str
    attribute: str
    make: Callable[[Any, str], Provider]


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _losparse(layer_class: Any, name: str) -> Provider:
    """LinearLoSparse(in, out, rank, has_bias, has_sparse) on x [2, M / 2, in], pruned to its non-zero rows."""

    def build(problem: LinearProblem) -> Runner:
        case = problem.case
        inputs, outputs, rank = case.in_features, case.out_features, case.rank
        layer = layer_class(inputs, outputs, rank, has_bias=True, has_sparse=case.kept > 0)
        sparse = torch.zeros(outputs, inputs, dtype=problem.dtype, device=problem.device)
        sparse[problem.kept.long()] = problem.down[rank:]
        left, right = problem.up.t().contiguous(), problem.down[:rank].clone()
        layer.to(device=problem.device, dtype=problem.dtype)
        layer.initialize_weight(left, right, sparse, problem.bias.clone())
        leaves = {"left": layer.left.weight, "right": layer.right.weight, "d_bias": layer.bias}
        if case.kept:
            layer.prune_sparse()
            leaves["sparse"] = layer.sparse_weight_pruned

        def collect(named: Outputs) -> Outputs:
            if problem.training:
                parts = [named.pop(key) for key in ("right", "sparse") if key in named]
                named |= {"d_down": torch.cat(parts), "d_up": named.pop("left").t()}
            return named

        def halves(tensor: Tensor) -> Tensor:
            return tensor.view(2, case.rows // 2, -1)

        # It makes its buffer in torch's default dtype and cannot scatter another dtype into it.
        return linear_runner(problem, layer, leaves, collect, halves, lambda: _default_dtype(problem.dtype))

    def refuse(case: Case) -> str | None:
        return "needs an even M, it is given x as [2, M / 2, in]" if case.rows % 2 else None

    return Provider(name, "LoSparse's LinearLoSparse", {"linear": build}, refuse=refuse)


def _flashsvd(function: Any, name: str) -> Provider:
    """function(P [B, L, r1], V1 [r1, D], U2 [D, r2], V2 [r2, H], b1, b2); P = x U1 is part of what is timed."""

    def build(problem: BlockProblem) -> Runner:
        first, second = problem.layers[0].ffn
        u2 = second.down.t().contiguous()

        def forward(x: Tensor) -> Tensor:
            return function(F.linear(x, first.down), first.up, u2, second.up, first.bias, second.bias)

        return block_runner(problem, forward)

    return Provider(name, "FlashSVD's feed-forward kernel", {"ffn": build}, devices=("cuda",))


PEERS: dict[str, Peer] = {
    "losparse": Peer("github.com/yxli2123/LoSparse", "utils.py", "LinearLoSparse", _losparse),
    "flashsvd": Peer(
        "github.com/Zishan-Shao/FlashSVD", "kernels/mlp/prefill/flashsvdffn.py", "flashsvd_ffn", _flashsvd
    ),
    "flashsvd_v1": Peer(
        "github.com/Zishan-Shao/FlashSVD",
        "src/legacy/FlashSVD-V1/src/kernels/flashsvdffnv1.py",
        "flashsvd_ffn_v1",
        _flashsvd,
    ),
}


def _load(name: str, file: Path) -> ModuleType:
    """Run a module from its file, without putting its folder on the import path."""
    unique = f"lpaf_benchmark_peer_{name}"
    spec = importlib.util.spec_from_file_location(unique, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[unique]
        raise InputError(f"--peer {name}: {file} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def load_peers(arguments: Sequence[str]) -> dict[str, Provider]:
    """Providers from ``NAME=PATH`` arguments, PATH the root of a checkout.

    Raises:
        InputError: an unknown name, a missing file, or a file that lacks what is expected of it.
    """
    providers = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or name not in PEERS:
            raise InputError(f"--peer {argument}: expected NAME=PATH with NAME one of {', '.join(PEERS)}")
        peer = PEERS[name]
        file = Path(path) / peer.file
        if not file.is_file():
            raise InputError(f"--peer {argument}: {file} is missing; PATH must be a checkout of {peer.repository}")
        found = getattr(_load(name, file), peer.attribute, None)
        if not callable(found):
            raise InputError(f"--peer {argument}: {file} has no {peer.attribute}, as {peer.repository} has")
        providers[name] = peer.make(found, name)
    return providers
