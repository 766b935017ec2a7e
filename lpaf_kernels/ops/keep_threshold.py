"""Exact selection of the highest-scoring fraction of entries."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._library import library, register_fallback
from ._checks import FLOATING, check_device, check_floating, check_fraction, check_shape

SCOPES = ("matrix", "global")
_MAX_TOTAL = 1 << 62  # the counts of one selection may add up to this


class PackedMask(NamedTuple):
    """The mask of a selection at one bit per score, as :meth:`KeepThreshold.pack` makes it.

    bits: uint8 [ceil(n / 8)] on the device of the scores; flat entry i is bit i % 8, the lowest first, of byte i // 8,
    and the bits after the last entry are 0. shape: that of the scores.
    """

    bits: Tensor
    shape: tuple[int, ...]

    def unpack(self) -> Tensor:
        """Return the boolean mask, of ``shape``."""
        places = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        flat = ((self.bits[:, None] >> places) & 1).flatten()
        return flat[: math.prod(self.shape)].view(self.shape).bool()


class KeepThreshold(NamedTuple):
    """A selection: an entry is kept iff score > value, or score == value and its flat index < tie_index.

    value: 0-d float32 (float64 for float64 scores). tie_index: 0-d int64. Both live on the device of the
    scores; a bare value could not be exact, because scores that start at zero tie in masses.
    """

    value: Tensor
    tie_index: Tensor

    def mask(self, scores: Tensor) -> Tensor:
        """Return the boolean mask of the kept entries, of the shape of ``scores`` (any floating dtype)."""
        return threshold_mask(scores, self.value, self.tie_index)

    def count(self, scores: Tensor) -> Tensor:  # type: ignore[override]
        """Return the number of kept entries of ``scores``: 0-d int64 on its device, no synchronisation."""
        return self.mask(scores).sum()

    def pack(self, scores: Tensor) -> PackedMask:
        """Return :meth:`mask` at one bit per entry, no synchronisation.

        Raises:
            TypeError, ValueError: ``scores`` is no floating-point tensor, or lives on another device.
        """
        check_floating("scores", scores)
        check_device("scores", scores, self.value, "threshold")
        # Compared in the wider of both dtypes, as in mask().
        if torch.float64 in (scores.dtype, self.value.dtype):
            scores = scores.double()
        value = self.value.to(_value_dtype(scores))
        bits = torch.ops.lpaf_kernels.masked_linear_pack(scores.detach(), value, self.tie_index)
        return PackedMask(bits, tuple(scores.shape))


def threshold_mask(scores: Tensor, value: Tensor, tie_index: Tensor) -> Tensor:
    """The rule of :class:`KeepThreshold`, compared in the wider of both dtypes."""
    wide = scores.to(torch.promote_types(scores.dtype, value.dtype))
    index = torch.arange(scores.numel(), device=scores.device).view(scores.shape)
    return (wide > value) | ((wide == value) & (index < tie_index))


def keep_threshold(
    scores: Tensor | Sequence[Tensor],
    keep: float,
    scope: str = "matrix",
    weights: Tensor | Sequence[Tensor] | None = None,
) -> KeepThreshold | list[KeepThreshold]:
    """Select the top ``keep`` fraction of the entries of ``scores`` exactly, without a host synchronisation
    on CUDA.

    Entries rank by score, then by flat index (lower first; -0.0 equals 0.0). Without ``weights`` exactly
    floor(keep * n + 0.5) entries are kept. With ``weights`` the kept entries are the longest prefix of the
    ranking whose weight does not exceed keep * (total weight).

    Args:
        scores: a tensor of any shape, or a sequence of tensors of one dtype and device; float32, float16,
            bfloat16 or float64. Not differentiated.
        keep: fraction in [0, 1].
        scope: "matrix" selects within each tensor, "global" once over all of them (flat order: the tensors in
            turn).
        weights: how often each entry counts: int64, positive, shaped as ``scores``. Default: every entry
            counts once.

    Returns:
        A :class:`KeepThreshold` for a tensor, a list of them for a sequence. Nothing kept is (+inf, 0),
        everything (-inf, numel). Otherwise the threshold stands behind the last kept entry; with ``weights`` on
        CUDA it may stand before the first that does not fit.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range; on CPU, a NaN score or
            a count that is not positive. CUDA does not wait to find out: the selection that holds one, or a count
            above 2^62 / (entries of the selection), gets value NaN and tie_index 0, which keep nothing and can be
            read when the caller next synchronises.
    """
    single = isinstance(scores, Tensor)
    tensors = [scores] if single else _sequence("scores", scores)
    keep = check_fraction("keep", keep)
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {', '.join(SCOPES)}, got {scope!r}")
    _check_scores(tensors)
    counts = None
    if weights is not None:
        counts = [weights] if isinstance(weights, Tensor) else _sequence("weights", weights)
        _check_weights(counts, tensors)
    tensors = [tensor.detach() for tensor in tensors]
    operator = torch.ops.lpaf_kernels.keep_threshold
    if torch.compiler.is_compiling():
        value, tie_index = operator(tensors, keep, scope == "global", counts)
    else:
        try:
            value, tie_index = operator(tensors, keep, scope == "global", counts)
        except (RuntimeError, ValueError) as error:
            # What a native kernel raises names the operator first, and in some versions of torch is a RuntimeError.
            message = str(error).partition("\n")[0].removeprefix("keep_threshold: ")
            if message.startswith(("scores[", "weights[")):
                raise ValueError(message) from None
            raise
    thresholds = [KeepThreshold(value[i], tie_index[i]) for i in range(len(tensors))]
    return thresholds[0] if single else thresholds


def keep_threshold_reference(
    scores: Sequence[Tensor], keep: float, scope: str = "matrix", weights: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The boolean masks that :func:`keep_threshold` describes, by a stable sort; the public truth."""
    if scope == "global":
        flat = [torch.cat([tensor.reshape(-1) for tensor in scores])]
        counts = None if weights is None else [torch.cat([tensor.reshape(-1) for tensor in weights])]
    else:
        flat = [tensor.reshape(-1) for tensor in scores]
        counts = None if weights is None else [tensor.reshape(-1) for tensor in weights]
    masks = []
    for i, entries in enumerate(flat):
        negated = [-score for score in entries.tolist()]
        order = sorted(range(len(negated)), key=negated.__getitem__)
        kept = math.floor(keep * len(order) + 0.5)
        if counts is not None:
            values = counts[i].tolist()
            kept, used, budget = 0, 0, keep * sum(values)
            while kept < len(order) and used + values[order[kept]] <= budget:
                used += values[order[kept]]
                kept += 1
        mask = torch.zeros(entries.numel(), dtype=torch.bool)
        mask[order[:kept]] = True
        masks.append(mask)
    if scope == "global":
        masks = list(masks[0].split([tensor.numel() for tensor in scores]))
    return [mask.view(tensor.shape) for mask, tensor in zip(masks, scores, strict=True)]


def _sequence(name: str, value: Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a tensor or a list of tensors, got {type(value).__name__}")
    if len(value) == 0:
        raise ValueError(f"{name}: expected at least one tensor, got an empty sequence")
    return list(value)


def _check_scores(tensors: list[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"scores[{i}]: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOATING:
            raise TypeError(f"scores[{i}]: expected float32, float16, bfloat16 or float64, got {tensor.dtype}")
        if tensor.dtype != tensors[0].dtype:
            raise TypeError(f"scores[{i}]: expected {tensors[0].dtype} (that of scores[0]), got {tensor.dtype}")
        check_device(f"scores[{i}]", tensor, tensors[0], "scores[0]")


def _check_weights(counts: list[Tensor], tensors: list[Tensor]) -> None:
    if len(counts) != len(tensors):
        raise ValueError(f"weights: expected {len(tensors)} tensors (one per tensor of scores), got {len(counts)}")
    for i, (count, tensor) in enumerate(zip(counts, tensors, strict=True)):
        if not isinstance(count, Tensor):
            raise TypeError(f"weights[{i}]: expected a torch.Tensor, got {type(count).__name__}")
        if count.dtype != torch.int64:
            raise TypeError(f"weights[{i}]: expected int64, got {count.dtype}")
        check_shape(f"weights[{i}]", count, *tensor.shape, because=f"that of scores[{i}]")
        check_device(f"weights[{i}]", count, tensor, f"scores[{i}]")


def _value_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32


def _select(scores: Tensor, keep: float, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The threshold of one flat tensor by a stable sort: the last kept entry gives the value and the tie."""
    total = scores.numel()
    dtype, device = _value_dtype(scores), scores.device
    if total == 0:
        return torch.full((), math.inf, dtype=dtype, device=device), torch.zeros((), dtype=torch.int64, device=device)
    # Adding 0.0 turns -0.0 into 0.0, which a radix sort would tell apart.
    ranked, order = torch.sort(scores.to(dtype) + 0.0, descending=True, stable=True)
    if weights is None:
        kept = torch.full((), math.floor(keep * total + 0.5), device=device)
    else:
        used = weights[order].cumsum(0)
        kept = (used.double() <= keep * used[-1].double()).sum()
    last = (kept - 1).clamp(min=0)
    value, tie_index = ranked[last], order[last] + 1
    value = torch.where(kept == 0, math.inf, torch.where(kept == total, -math.inf, value)).to(dtype)
    tie_index = torch.where(kept == 0, 0, torch.where(kept == total, total, tie_index))
    invalid = scores.isnan().any()
    if weights is not None:
        invalid = invalid | ((weights < 1) | (weights > _MAX_TOTAL // total)).any()
    return torch.where(invalid, math.nan, value), torch.where(invalid, 0, tie_index)


def _keep_threshold(
    scores: list[Tensor], keep: float, across: bool, weights: list[Tensor] | None
) -> tuple[Tensor, Tensor]:
    if scores[0].device.type == "cpu":
        for i, tensor in enumerate(scores):
            if tensor.isnan().any():
                raise ValueError(f"scores[{i}] holds NaN, expected numbers")
        for i, count in enumerate(weights or ()):
            if (count <= 0).any():
                raise ValueError(f"weights[{i}] holds a count that is not positive, expected positive counts")
    flat = [tensor.reshape(-1) for tensor in scores]
    counts = [None] * len(flat) if weights is None else [count.reshape(-1) for count in weights]
    if not across:
        selected = [_select(entries, keep, count) for entries, count in zip(flat, counts, strict=True)]
        return torch.stack([value for value, _ in selected]), torch.stack([tie for _, tie in selected])
    value, tie_index = _select(torch.cat(flat), keep, None if weights is None else torch.cat(counts))
    sizes = torch.tensor([entries.numel() for entries in flat], device=value.device)
    ends = sizes.cumsum(0)
    local = torch.minimum((tie_index - (ends - sizes)).clamp(min=0), sizes)
    return value.expand(len(flat)).clone(), local


def _keep_threshold_fake(scores, keep, across, weights):
    return (
        scores[0].new_empty(len(scores), dtype=_value_dtype(scores[0])),
        scores[0].new_empty(len(scores), dtype=torch.int64),
    )


def _setup_context(ctx, inputs, output) -> None:
    ctx.mark_non_differentiable(*output)
    ctx.lengths = (len(inputs[0]), None if inputs[3] is None else len(inputs[3]))


def _backward(ctx, *grads):
    scores, weights = ctx.lengths
    return [None] * scores, None, None, None if weights is None else [None] * weights


register_fallback("keep_threshold", _keep_threshold)
torch.library.register_fake("lpaf_kernels::keep_threshold", _keep_threshold_fake, lib=library)
torch.library.register_autograd("lpaf_kernels::keep_threshold", _backward, setup_context=_setup_context, lib=library)
