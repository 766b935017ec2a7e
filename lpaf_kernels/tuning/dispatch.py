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
from ..triton.launch import GRANULE, HEAD_DIMS, LAUNCHES, candidates
from .table import (
    ATTENTION,
    FFN,
    LINEAR,
    MASKED,
    AnyShape,
    AttentionShape,
    FfnShape,
    MaskedShape,
    Plan,
    Resolved,
    Shape,
    Table,
)

TABLES = Path(__file__).parent / "tables"
DEFAULT_TABLE = TABLES / "default.json"

# Operators on whole blocks of layers.
BLOCKS = (FFN, ATTENTION)
# Those of masked_linear, in both directions.
MASKED_PROVIDERS = ("kernels", "cast")
# Forward providers: the first is the blocks', whose chain is their layers one by one; then those of a linear layer.
PROVIDERS = ("block", "one_kernel", "two_kernels", "chain", "dense", *MASKED_PROVIDERS)
# What stands for a layer's providers in its backward.
BACKWARD = {"one_kernel": "kernels", "two_kernels": "kernels", "chain": "chain", "dense": "chain"}
TRITON_PROVIDERS = ("block", "one_kernel", "two_kernels", "kernels")
# The kernels of a feed-forward block whose launches must hold its rank columns, by direction.
BLOCK_KERNELS = {"forward": ("ffn",), "backward": ("ffn", "ffn_rows", "ffn_weights")}
_CHAIN = Plan("chain")
_CAST = Plan("cast")


@dataclass(frozen=True)
class Gpu:
    """What a table is chosen by: the device's name, its compute capability times ten, Triton's major.minor."""

    name: str
    arch: int
    triton: str | None


@dataclass(frozen=True)
class Choice:
    """How an operator runs at one shape and row count, and why. ``print`` it."""

    shape: AnyShape
    rows: int
    plan: Plan
    reason: str
    alternatives: tuple[Plan, ...] = ()

    def __str__(self) -> str:
        shape = self.shape
        text = (
            f"{shape.op} {shape.direction} {shape.text} {shape.dtype}, {self.rows} rows:"
            f" {_plan_text(self.plan)} ({self.reason})"
        )
        return "\n  or ".join([text, *(_plan_text(plan) for plan in self.alternatives)])


def _plan_text(plan: Plan) -> str:
    text = plan.provider
    if plan.launches:
        text += f" [{', '.join(plan.launches)}]"
    return text if plan.microseconds is None else f"{text} {plan.microseconds:.1f} us"


def baseline(op: str) -> Plan:
    """By torch's products: what always runs, and what the others must beat."""
    return _CAST if op == MASKED else _CHAIN


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


_resolved: dict[tuple[AnyShape, Gpu], Resolved] = {}
_forced: str | None = None
_broken: set[tuple[str, Plan]] = set()


def resolve(shape: AnyShape, gpu: Gpu) -> Resolved:
    """The plans of ``shape`` on ``gpu``; the baseline alone if no table knows better. Kept for the next call."""
    key = (shape, gpu)
    found = _resolved.get(key)
    if found is None:
        hits = (table.resolve(shape, gpu.arch) for table in tables(gpu))
        nothing = Resolved((), ((baseline(shape.op),),), (), "no table has a plan for it")
        found = _resolved[key] = next((hit for hit in hits if hit is not None), nothing)
    return found


def choose(shape: AnyShape, rows: int, gpu: Gpu, inference: bool = True) -> Plan:
    """The plan for one call. Not in ``inference``: never dense. Under two microseconds once a shape was seen."""
    if is_forced(shape.op):
        return _force(shape, rows, gpu, inference)
    found = _resolved.get((shape, gpu))
    if found is None:
        found = resolve(shape, gpu)
    for plan in found.at(rows):
        if plan.provider in ("chain", "cast"):
            return plan
        if plan.provider == "dense":
            if inference:
                return plan
        elif gpu.triton is not None and (shape.op, plan) not in _broken and _holds(plan, shape, gpu.arch):
            return plan
    return baseline(shape.op)


def _holds(plan: Plan, shape: AnyShape, arch: int) -> bool:
    """Whether the plan's kernels, which may have been measured on a near shape, can hold this one's rank columns."""
    if shape.op == MASKED:
        return True
    width, dtype = shape.width, getattr(torch, shape.dtype)
    if shape.op == ATTENTION:
        return plan.provider != "block" or _holds_attention(plan, shape, arch, dtype)
    if plan.provider == "block":
        kernels = BLOCK_KERNELS["backward" if shape.direction == "backward" else "forward"]
    elif plan.provider == "one_kernel":
        kernels = ("one_kernel",)
    else:
        return True
    if not plan.launches:
        return all(candidates(kernel, width, arch, dtype) for kernel in kernels)
    return all(LAUNCHES[name].holds(width, dtype) for name in plan.launches if name in LAUNCHES)


def _holds_attention(plan: Plan, shape: AttentionShape, arch: int, dtype: torch.dtype) -> bool:
    """Of the block's kernels only "attend" must hold its columns: o may run as a layer, without "close"."""
    if shape.direction == "backward" or shape.head_dim not in HEAD_DIMS:
        return False
    if not plan.launches:
        return bool(candidates("attend", shape.width, arch, dtype, shape.head))
    known = [LAUNCHES[name] for name in plan.launches if name in LAUNCHES]
    return all(
        launch.holds(shape.out_width if launch.kernel == "close" else shape.width, dtype)
        and (launch.kernel != "attend" or shape.head <= launch.block_k)
        for launch in known
    )


def _force(shape: AnyShape, rows: int, gpu: Gpu, inference: bool) -> Plan:
    if shape.op in BLOCKS:
        # Another name than "block" is one for its layers.
        provider = _forced if _forced == "block" else "chain"
    elif shape.op == MASKED:
        provider = _forced
    else:
        provider = BACKWARD[_forced] if shape.direction == "backward" else _forced
    if provider == "dense" and not inference:
        return _CHAIN
    if provider in TRITON_PROVIDERS and gpu.triton is None:
        raise RuntimeError(f"provider {_forced!r} was forced: {missing()}")
    # A feed-forward block's forward takes further passes over its rank columns, nothing else does.
    passes = shape.op == FFN and shape.direction != "backward"
    if provider == "block" and not passes and not _holds(Plan("block"), shape, gpu.arch):
        return _CHAIN
    ranked = resolve(shape, gpu).at(rows)
    return next(
        (plan for plan in ranked if plan.provider == provider and _holds(plan, shape, gpu.arch)), Plan(provider)
    )


def forget() -> None:
    """Read the tables anew at the next call (after one was written)."""
    tables.cache_clear()
    _resolved.clear()
    _broken.clear()


def report_broken(op: str, plan: Plan, error: Exception) -> None:
    """A kernel of ``op`` failed to compile or launch: warn once and leave it out from now on; the baseline serves."""
    if (op, plan) not in _broken:
        _broken.add((op, plan))
        message = str(error).strip().splitlines() or [type(error).__name__]
        warnings.warn(f"{_plan_text(plan)} failed and is not used again: {message[0]}", stacklevel=2)


def is_broken(op: str, plan: Plan) -> bool:
    """Whether ``plan`` was reported so."""
    return (op, plan) in _broken


def is_forced(op: str) -> bool:
    """Whether :func:`use_provider` decides how ``op`` runs; "block" leaves single layers to the tables, and
    masked_linear and the others know nothing of each other's providers."""
    if _forced is None or (op == MASKED) != (_forced in MASKED_PROVIDERS):
        return False
    return _forced != "block" or op in BLOCKS


@contextmanager
def use_provider(name: str | None) -> Iterator[None]:
    """Run every operator on CUDA tensors inside the block by one provider, for comparisons and debugging.

    Args:
        name: for linear layers "one_kernel" (Triton, the intermediate stays on chip), "two_kernels" (Triton), "chain"
            (cuBLAS on the packed weights), "dense" (the dense weight, rebuilt once; inference only) or None (by the
            tables). In a backward the first two mean its Triton kernels, the others cuBLAS. With any of them
            ``lowrank_ffn`` and ``lowrank_attention`` run their layers one by one, by that provider. "block": these two
            by their own kernels (Triton), in training too; float64, the backward of attention, that of a feed-forward
            block of more rank columns than its launches hold (272 of 2 bytes, 68 of 4), and attention that no launch
            holds run layer by layer all the same, and single layers go by the tables. "kernels" (Triton) or "cast" (the
            mask is folded into the weight's cast, then cuBLAS): ``masked_linear`` in both directions, everything else
            by the tables. A forced provider that fails raises.

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


def explain(
    layer: torch.nn.Module,
    rows: int,
    direction: str = "forward",
    gpu: Gpu | None = None,
    *,
    length: int | None = None,
) -> Choice:
    """How ``layer`` runs on an input of ``rows`` rows, and why.

    Args:
        layer: a LowRankSparseLinear (anything with its ``down``, ``up`` and ``kept``), a feed-forward block of them
            (anything with layers ``first`` and ``second``, and ``gate``, a layer or None), an attention block of
            them without rotary embeddings (anything with layers ``q``, ``k``, ``v`` and ``o``, and ``num_heads``), or a
            MaskedLinear (anything with ``weight`` and ``scores``), of the autocast dtype where CUDA's is enabled.
        rows: the product of the input's leading sizes.
        direction: "forward" (inference), "training" (a forward that autograd records) or "backward".
        gpu: the device to explain for. Default: that of the layer's parameters.
        length: of an attention block's sequences. Default: ``rows``, one sequence.

    Returns:
        A :class:`Choice`; its ``plan.provider`` is the one used, printing it tells the whole story.

    Raises:
        TypeError: another kind of layer.
        ValueError: another direction, a negative row count or length.

    Example:
        >>> from lpaf_kernels import LowRankSparseLinear
        >>> explain(LowRankSparseLinear(768, 768, 80), rows=4096).plan.provider
        'cpu'
    """
    if direction not in ("forward", "training", "backward"):
        raise ValueError(f"direction: expected forward, training or backward, got {direction!r}")
    if rows < 0:
        raise ValueError(f"rows: expected at least 0, got {rows}")
    if length is not None and length < 0:
        raise ValueError(f"length: expected at least 0, got {length}")
    shape, down = _shape(layer, direction, rows if length is None else length)
    dtype, device = down.dtype, down.device
    if gpu is None:
        if not down.is_cuda:
            return Choice(shape, rows, Plan("cpu"), f"the parameters are on {device}")
        gpu = current_gpu(down.get_device())
    if shape.op == MASKED:
        unfit = "one score stands for a block" if layer.scores.shape != layer.weight.shape else unfit_masked(shape)
        if unfit is not None:
            return Choice(shape, rows, _CAST, unfit)
    elif not takes(shape.op, dtype, shape.width, gpu):
        return Choice(shape, rows, _CHAIN, f"{shape.dtype} products are cuBLAS's here, at torch's precision setting")
    if is_forced(shape.op):
        return Choice(shape, rows, _force(shape, rows, gpu, direction == "forward"), "forced by use_provider")
    found = resolve(shape, gpu)
    plan = choose(shape, rows, gpu, inference=direction == "forward")
    others = tuple(other for other in found.at(rows) if other != plan)
    nearest = f", nearest of {', '.join(map(str, found.rows))} rows" if found.rows else ""
    return Choice(shape, rows, plan, f"{found.reason}{nearest}", others)


def _shape(layer: torch.nn.Module, direction: str, length: int) -> tuple[AnyShape, torch.Tensor]:
    """What the plans of ``layer`` depend on, and one of its tensors."""
    if _is_linear(layer):
        (in_features, out_features, rank, kept), down = _sizes(layer), layer.down
        return Shape(LINEAR, direction, _name(down), in_features, out_features, rank, kept), down
    if all(isinstance(getattr(layer, name, None), torch.Tensor) for name in ("weight", "scores")):
        weight, dtype = layer.weight, _name(layer.weight)
        if torch.is_autocast_enabled("cuda") and dtype != "float64":
            dtype = str(torch.get_autocast_dtype("cuda")).removeprefix("torch.")
        return MaskedShape(MASKED, direction, dtype, *reversed(weight.shape), _name(weight)), weight
    if all(_is_linear(getattr(layer, name, None)) for name in "qkvo"):
        return _attention_shape(layer, direction, length), layer.q.down
    gate = getattr(layer, "gate", None)
    layers = [getattr(layer, name, None) for name in ("first", "second")]
    if not all(_is_linear(part) for part in layers) or not (gate is None or _is_linear(gate)):
        raise TypeError(
            f"layer: expected a LowRankSparseLinear, a block of them or a MaskedLinear, got {type(layer).__name__}"
        )
    (in_features, hidden, rank1, kept1), (_, out_features, rank2, kept2) = map(_sizes, layers)
    rank_gate = 0 if gate is None else gate.up.shape[0]
    down = layers[0].down
    sizes = (in_features, hidden, out_features, (rank1, rank2), (kept1, kept2), rank_gate)
    return FfnShape(FFN, direction, _name(down), *sizes), down


def _attention_shape(block: torch.nn.Module, direction: str, length: int) -> AttentionShape:
    (in_features, inner, *_), (_, kv_inner, *_), _, (_, out_features, *_) = found = [
        _sizes(getattr(block, name)) for name in "qkvo"
    ]
    head_dim = inner // block.num_heads
    ranks, kept = zip(*((rank, kept) for _, _, rank, kept in found), strict=True)
    sizes = (in_features, block.num_heads, kv_inner // head_dim, head_dim, out_features, ranks, kept)
    return AttentionShape(ATTENTION, direction, _name(block.q.down), *sizes, False, max(length, 1))


def _is_linear(layer: object) -> bool:
    return all(isinstance(getattr(layer, name, None), torch.Tensor) for name in ("down", "up"))


def _sizes(layer: torch.nn.Module) -> tuple[int, int, int, int]:
    """(in, out, rank, kept)."""
    (rank, out_features), (width, in_features) = layer.up.shape, layer.down.shape
    return in_features, out_features, rank, width - rank


def _name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def takes(op: str, dtype: torch.dtype, width: int, gpu: Gpu) -> bool:
    """Whether ``op`` of ``width`` rank columns is chosen for at all. Forced kernels take exact float32 too, so that
    they can be compared."""
    return width > 0 and (matrix_unit(dtype, gpu.arch) or (is_forced(op) and dtype == torch.float32))


def unfit_masked(shape: MaskedShape) -> str | None:
    """Why masked_linear's kernels do not take ``shape``, or None."""
    if shape.dtype not in ("float16", "bfloat16") or shape.weight == "float64":
        return "the kernels multiply float16 and bfloat16"
    if shape.in_features % GRANULE or shape.out_features % GRANULE:
        return f"the kernels take sizes that are multiples of {GRANULE}"
    return None


def matrix_unit(dtype: torch.dtype, arch: int) -> bool:
    """Whether products of ``dtype`` are for our kernels: 16-bit types, and float32 where torch allows TF32.

    Exact float32 and float64 products are cuBLAS's: a kernel of ours has nothing to add to them. So are TF32's on
    sm_100, where some launches would spill.
    """
    if dtype == torch.float32:
        return arch < 100 and torch.get_float32_matmul_precision() != "highest"
    return dtype in (torch.float16, torch.bfloat16)
