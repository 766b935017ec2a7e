"""Choose how an operator runs: a forced provider, else the user's table, the shipped one of this GPU, the default."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ..triton import missing
from ..triton.launch import LAUNCHES, candidates
from .table import Plan, Resolved, Shape, Table

TABLES = Path(__file__).parent / "tables"
DEFAULT_TABLE = TABLES / "default.json"

# Forward providers, and the one that stands for them in a backward.
PROVIDERS = ("one_kernel", "two_kernels", "chain", "dense")
BACKWARD = {"one_kernel": "kernels", "two_kernels": "kernels", "chain": "chain", "dense": "chain"}
TRITON_PROVIDERS = ("one_kernel", "two_kernels", "kernels")
_CHAIN = Plan("chain")


@dataclass(frozen=True)
class Gpu:
    """What a table is chosen by: the device's name, its compute capability times ten, Triton's major.minor."""

    name: str
    arch: int
    triton: str | None


@dataclass(frozen=True)
class Choice:
    """How an operator runs at one shape and row count, and why. ``print`` it."""

    shape: Shape
    rows: int
    plan: Plan
    reason: str
    alternatives: tuple[Plan, ...] = ()

    def __str__(self) -> str:
        shape = self.shape
        text = (
            f"{shape.op} {shape.direction} {shape.in_features}->{shape.out_features} rank {shape.rank}"
            f" kept {shape.kept} {shape.dtype}, {self.rows} rows: {_plan_text(self.plan)} ({self.reason})"
        )
        return "\n  or ".join([text, *(_plan_text(plan) for plan in self.alternatives)])


def _plan_text(plan: Plan) -> str:
    text = plan.provider
    if plan.launches:
        text += f" [{', '.join(plan.launches)}]"
    return text if plan.microseconds is None else f"{text} {plan.microseconds:.1f} us"


def slug(gpu: str) -> str:
    """The file name of a GPU's table, without the suffix: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def user_table(gpu: str) -> Path:
    """Where ``lpaf tune`` writes the table of ``gpu``: under $XDG_CACHE_HOME, by default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    root = Path(base) if base else Path.home() / ".cache"
    return root / "lpaf-kernels" / "tuning" / f"{slug(gpu)}.json"


@cache
def current_gpu(index: int) -> Gpu:
    """The CUDA device ``index``."""
    properties = torch.cuda.get_device_properties(index)
    version = None
    if missing() is None:
        import triton

        version = ".".join(triton.__version__.split(".")[:2])
    return Gpu(properties.name, properties.major * 10 + properties.minor, version)


def _own_table(gpu: Gpu) -> tuple[Path, ...]:
    """The user's table, if there is one and it may be read: containers often have no home, or somebody else's."""
    try:
        path = user_table(gpu.name)
        return (path,) if path.is_file() else ()
    except (OSError, RuntimeError):
        return ()


@cache
def tables(gpu: Gpu) -> tuple[Table, ...]:
    """The tables that serve ``gpu``, in order. One that was measured elsewhere is left out with a warning."""
    found = []
    for path in (*_own_table(gpu), TABLES / f"{slug(gpu.name)}.json", DEFAULT_TABLE):
        if not path.is_file():
            continue
        try:
            table = Table.load(path)
            reason = table.rejects(gpu.name, gpu.triton or "none")
        except ValueError as error:
            reason = str(error)
        if reason is None:
            found.append(table)
        elif gpu.triton is not None or path != DEFAULT_TABLE:
            warnings.warn(f"{path} is not used: {reason}. Write a new one with lpaf tune.", stacklevel=2)
    return tuple(found)


_resolved: dict[tuple[Shape, Gpu], Resolved] = {}
_forced: str | None = None
_broken: set[Plan] = set()


def resolve(shape: Shape, gpu: Gpu) -> Resolved:
    """The plans of ``shape`` on ``gpu``; the chain alone if no table knows better. Kept for the next call."""
    key = (shape, gpu)
    found = _resolved.get(key)
    if found is None:
        if shape.direction == "training":
            shape = shape._replace(direction="forward")
        candidates = (table.resolve(shape, gpu.arch) for table in tables(gpu))
        nothing = Resolved((), ((_CHAIN,),), (), "no table has a plan for it")
        found = _resolved[key] = next((hit for hit in candidates if hit is not None), nothing)
    return found


def choose(shape: Shape, rows: int, gpu: Gpu, inference: bool = True) -> Plan:
    """The plan for one call. Not in ``inference``: never dense. Under two microseconds once a shape was seen."""
    if _forced is not None:
        return _force(shape, rows, gpu, inference)
    found = _resolved.get((shape, gpu))
    if found is None:
        found = resolve(shape, gpu)
    for plan in found.at(rows):
        if plan.provider == "chain":
            return plan
        if plan.provider == "dense":
            if inference:
                return plan
        elif gpu.triton is not None and plan not in _broken and _holds(plan, shape, gpu.arch):
            return plan
    return _CHAIN


def _holds(plan: Plan, shape: Shape, arch: int) -> bool:
    """Whether one_kernel, which may have been measured on a near shape, can hold this one's rank columns."""
    width, dtype = shape.rank + shape.kept, getattr(torch, shape.dtype)
    if plan.provider != "one_kernel":
        return True
    if not plan.launches:
        return bool(candidates("one_kernel", width, arch, dtype))
    return all(LAUNCHES[name].holds(width, dtype) for name in plan.launches if name in LAUNCHES)


def _force(shape: Shape, rows: int, gpu: Gpu, inference: bool) -> Plan:
    provider = BACKWARD[_forced] if shape.direction == "backward" else _forced
    if provider == "dense" and not inference:
        return _CHAIN
    if provider in TRITON_PROVIDERS and gpu.triton is None:
        raise RuntimeError(f"provider {_forced!r} was forced: {missing()}")
    ranked = resolve(shape, gpu).at(rows)
    return next(
        (plan for plan in ranked if plan.provider == provider and _holds(plan, shape, gpu.arch)), Plan(provider)
    )


def forget() -> None:
    """Read the tables anew at the next call (after one was written)."""
    tables.cache_clear()
    _resolved.clear()
    _broken.clear()


def report_broken(plan: Plan, error: Exception) -> None:
    """A kernel failed to compile or launch: warn once and leave it out from now on; the chain serves instead."""
    if plan not in _broken:
        _broken.add(plan)
        message = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"{_plan_text(plan)} failed and is not used again: {message[0]}", stacklevel=2)


def is_forced() -> bool:
    return _forced is not None


@contextmanager
def use_provider(name: str | None) -> Iterator[None]:
    """Run every operator on CUDA tensors inside the block by one provider, for comparisons and debugging.

    Args:
        name: "one_kernel" (Triton, the intermediate stays on chip), "two_kernels" (Triton), "chain" (cuBLAS on the
            packed weights), "dense" (the dense weight, rebuilt once; inference only) or None (by the tables). In a
            backward the first two mean its Triton kernels, the others cuBLAS. A forced provider that fails raises.

    Raises:
        ValueError: another name.

    Example:
        >>> with use_provider("chain"):
        ...     pass
    """
    global _forced
    if name is not None and name not in PROVIDERS:
        raise ValueError(f"name: expected None or one of {', '.join(PROVIDERS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def explain(layer: torch.nn.Module, rows: int, direction: str = "forward", gpu: Gpu | None = None) -> Choice:
    """How ``layer`` runs on an input of ``rows`` rows, and why.

    Args:
        layer: a LowRankSparseLinear (anything with its ``down``, ``up`` and ``kept``).
        rows: the product of the input's leading sizes.
        direction: "forward" (inference), "training" (a forward that autograd records) or "backward".
        gpu: the device to explain for. Default: that of the layer's parameters.

    Returns:
        A :class:`Choice`; its ``plan.provider`` is the one used, printing it tells the whole story.

    Raises:
        TypeError: another kind of layer.
        ValueError: another direction, or a negative row count.

    Example:
        >>> from lpaf_kernels import LowRankSparseLinear
        >>> explain(LowRankSparseLinear(768, 768, 80), rows=4096).plan.provider
        'cpu'
    """
    if not all(isinstance(getattr(layer, name, None), torch.Tensor) for name in ("down", "up")):
        raise TypeError(f"layer: expected a LowRankSparseLinear, got {type(layer).__name__}")
    if direction not in ("forward", "training", "backward"):
        raise ValueError(f"direction: expected forward, training or backward, got {direction!r}")
    if rows < 0:
        raise ValueError(f"rows: expected at least 0, got {rows}")
    rank, out_features = layer.up.shape
    width, in_features = layer.down.shape
    dtype = str(layer.down.dtype).removeprefix("torch.")
    shape = Shape("lowrank_sparse_linear", direction, dtype, in_features, out_features, rank, width - rank)
    if gpu is None:
        if not layer.down.is_cuda:
            return Choice(shape, rows, Plan("cpu"), f"the parameters are on {layer.down.device}")
        gpu = current_gpu(layer.down.get_device())
    if not takes(layer.down.dtype, width, gpu):
        return Choice(shape, rows, _CHAIN, f"{dtype} products are cuBLAS's here, at torch's precision setting")
    if _forced is not None:
        return Choice(shape, rows, _force(shape, rows, gpu, direction == "forward"), "forced by use_provider")
    found = resolve(shape, gpu)
    plan = choose(shape, rows, gpu, inference=direction == "forward")
    others = tuple(other for other in found.at(rows) if other != plan)
    nearest = f", nearest of {', '.join(map(str, found.rows))} rows" if found.rows else ""
    return Choice(shape, rows, plan, f"{found.reason}{nearest}", others)


def takes(dtype: torch.dtype, width: int, gpu: Gpu) -> bool:
    """Whether a layer of ``width`` rank columns is chosen for at all. Forced kernels take exact float32 too, so that
    they can be compared."""
    return width > 0 and (matrix_unit(dtype, gpu.arch) or (is_forced() and dtype == torch.float32))


def matrix_unit(dtype: torch.dtype, arch: int) -> bool:
    """Whether products of ``dtype`` are for our kernels: 16-bit types, and float32 where torch allows TF32.

    Exact float32 and float64 products are cuBLAS's: a kernel of ours has nothing to add to them. So are TF32's on
    sm_100, where some launches would spill.
    """
    if dtype == torch.float32:
        return arch < 100 and torch.get_float32_matmul_precision() != "highest"
    return dtype in (torch.float16, torch.bfloat16)
