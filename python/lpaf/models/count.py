"""Parameter and multiply-accumulate counting, and the rank that a parameter ratio buys.

Conventions (docs/counting.md says where the paper differs):

* encoder parameters are the weights of the encoder linears (:mod:`lpaf.models.targets`); biases, LayerNorms,
  embeddings, pooler and head are not counted. Rank 260/130/80 gives 50.8/25.4/15.6 % of BERT-base;
* FLOPs are multiply-accumulates of the encoder linears plus the two attention products (Q K^T and P V) for one
  sequence. BERT-base at length 384 gives 35.3 G, the paper's dense SQuAD figure;
* "encoder" stands for all layers: a decoder's count in the same way, and an encoder-decoder reads and writes as many
  tokens. Causal attention counts whole, though half of its products are masked; query heads that share keys and values
  count each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lpaf_kernels import LowRankPlusSparseLinear, LowRankSparseLinear, MixedRankLinear

from ..errors import InputError
from .blocks import removable_layers
from .decoded import STORED, stored_params
from .targets import encoder_linears, find_targets

Shape = tuple[int, int]

#: the ``--rank`` that gives every matrix its own
AUTO = "auto"


def _as_stored(module: nn.Module) -> nn.Module:
    """The layer that stays of one that trains."""
    if isinstance(module, MixedRankLinear):
        return module.lowrank
    return module.to_lowrank_sparse() if isinstance(module, LowRankPlusSparseLinear) else module


def linear_params(module: nn.Module) -> int:
    """Stored weights of one linear; indices of kept columns, norms and decoders are counted, biases of the linear are
    not."""
    module = _as_stored(module)
    return stored_params(module) if isinstance(module, STORED) else module.weight.numel()


def linear_macs(module: nn.Module) -> int:
    """Multiply-accumulates of one linear for one token."""
    module = _as_stored(module)
    if isinstance(module, LowRankSparseLinear):
        return module.down.numel() + module.up.numel()
    return module.weight.numel()


def encoder_params(model: nn.Module) -> int:
    """Weights stored by the encoder linears of ``model``."""
    return sum(linear_params(module) for module in encoder_linears(model).values())


def total_params(model: nn.Module) -> int:
    """All parameters of ``model``, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def attention_width(config: Any) -> int:
    """Features of all query heads together."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads * head


def attention_blocks(model: nn.Module) -> int:
    """Attention blocks that one forward pass runs through: one per layer, two per decoder layer that looks at an
    encoder."""
    config = model.config
    if not config.is_encoder_decoder:
        return config.num_hidden_layers
    layers = {(target.stack, target.layer) for target in find_targets(model)}
    decoders = sum("decoder" in stack.split(".") for stack, _ in layers)
    return len(layers) + decoders


def forward_macs(model: nn.Module, sequence_length: int) -> int:
    """Multiply-accumulates of the layers for one sequence of ``sequence_length`` tokens; an encoder-decoder reads so
    many and writes so many.

    Linears are counted once per call, so layers that share their weights (ALBERT) count as often as they run.
    """
    config = model.config
    layers = config.num_hidden_layers
    linears = encoder_linears(model)
    calls = layers // getattr(config, "num_hidden_groups", layers)
    per_token = sum(linear_macs(module) for module in linears.values()) * calls
    prunable = removable_layers(model)
    widths = [layer.sizes.heads * layer.head_size for layer in prunable if layer.sizes.heads]
    features = sum(widths) if prunable else attention_blocks(model) * attention_width(config)
    attention = 2 * sequence_length**2 * features
    return per_token * sequence_length + attention


def break_even_rank(shape: Shape) -> int:
    """Largest rank at which a low-rank pair holds no more weights than the dense [out, in] matrix."""
    rows, columns = shape
    return rows * columns // (rows + columns)


def rank_for_ratio(shapes: Iterable[Shape], ratio: float) -> int:
    """Largest uniform rank whose factors hold at most ``ratio`` of the dense weights of ``shapes``."""
    shapes = list(shapes)
    dense = sum(rows * columns for rows, columns in shapes)
    per_rank = sum(rows + columns for rows, columns in shapes)
    return int(ratio * dense / per_rank + 1e-9)


def ratio_for_rank(shapes: Iterable[Shape], rank: int) -> float:
    """Share of the dense weights that factors of uniform ``rank`` hold."""
    shapes = list(shapes)
    return rank * sum(r + c for r, c in shapes) / sum(r * c for r, c in shapes)


def check_size(rank: int | str | None, ratio: float | None, rank_error: float | None = None) -> None:
    """InputError unless exactly one size is asked for, in its range.

    Args:
        rank: at least 1, or "auto", which shares out ``ratio``.
        ratio: share of encoder weights in (0, 1].
        rank_error: relative weighted error of every matrix in (0, 1).
    """
    if isinstance(rank, bool) or not (rank is None or rank == AUTO or isinstance(rank, int)):
        raise InputError(f"--rank {rank}: expected a whole number, or {AUTO}")
    if rank == AUTO and rank_error is not None:
        raise InputError(
            f"--rank {AUTO}: shares out a --ratio, --rank-error picks every rank by itself; pass one of them"
        )
    if rank == AUTO and ratio is None:
        raise InputError(f"--rank {AUTO}: shares out a number of weights; pass --ratio R, the share of them to keep")
    if [rank in (None, AUTO), ratio is None, rank_error is None].count(False) != 1:
        raise InputError(
            "--rank/--ratio/--rank-error: pass exactly one of them (--rank auto goes with --ratio, and is not counted)"
        )
    if ratio is not None and not 0.0 < ratio <= 1.0:
        raise InputError(f"--ratio {ratio:g}: must be in (0, 1]")
    if rank_error is not None and not 0.0 < rank_error < 1.0:
        raise InputError(f"--rank-error {rank_error:g}: must be in (0, 1)")
    if isinstance(rank, int) and rank < 1:
        raise InputError(f"--rank {rank}: must be at least 1")


def check_least_ratio(shapes: Mapping[str, Shape], ratio: float) -> None:
    """InputError when rank 1 everywhere holds more than ``ratio`` of the dense weights."""
    least = ratio_for_rank(shapes.values(), 1)
    if ratio < least:
        shown = math.ceil(least * 1e4) / 1e4
        raise InputError(
            f"--ratio {ratio:g}: rank 1 already needs {shown:.4f} of the encoder; pass --ratio {shown:.4f} or more"
        )


def largest_ranks(shapes: Mapping[str, Shape], force: bool = False) -> dict[str, int]:
    """Matrix name -> the largest rank it may get: break-even (at least 1), or min(n, m) with ``force``."""
    return {name: min(shape) if force else max(break_even_rank(shape), 1) for name, shape in shapes.items()}


def resolve_budget(shapes: Mapping[str, Shape], ratio: float, force: bool = False) -> int:
    """The number of weights that ``--rank auto --ratio`` may spend, or InputError.

    Args:
        shapes: matrix name -> (out_features, in_features).
        ratio: share of encoder weights in (0, 1].
        force: let ranks go above break-even.
    """
    check_least_ratio(shapes, ratio)
    dense = sum(rows * columns for rows, columns in shapes.values())
    most = sum(rank * sum(shapes[name]) for name, rank in largest_ranks(shapes, force).items())
    budget = int(ratio * dense * (1 + 1e-12))
    if budget - most >= min(map(sum, shapes.values())):
        share = math.floor(most / dense * 1e4) / 1e4
        raise InputError(
            f"--rank {AUTO} --ratio {ratio:g}: above break-even, where factors hold more weights than their matrix; "
            f"pass at most --ratio {share:.4f}, or --force"
        )
    return budget


def resolve_rank(shapes: dict[str, Shape], rank: int | None, ratio: float | None, force: bool = False) -> int:
    """The uniform rank that ``rank`` or ``ratio`` asks for, or InputError.

    Args:
        shapes: matrix name -> (out_features, in_features).
        rank: rank >= 1; exactly one of ``rank`` and ``ratio`` must be given.
        ratio: share of encoder weights in (0, 1].
        force: accept ranks above break-even, where the factors hold more weights than the matrix.
    """
    check_size(rank, ratio)
    if ratio is not None:
        asked = f"--ratio {ratio:g}"
        check_least_ratio(shapes, ratio)
        rank = rank_for_ratio(shapes.values(), ratio)
    else:
        asked = f"--rank {rank}"
    tightest = min(shapes, key=lambda name: min(shapes[name]))
    if rank > min(shapes[tightest]):
        rows, columns = shapes[tightest]
        raise InputError(f"{asked}: above min(n, m) = {min(rows, columns)} of {tightest} [{rows}, {columns}]")
    limit_name = min(shapes, key=lambda name: break_even_rank(shapes[name]))
    limit = break_even_rank(shapes[limit_name])
    if rank > limit and not force:
        rows, columns = shapes[limit_name]
        raise InputError(
            f"{asked}: rank {rank} is above break-even {limit} of {limit_name} [{rows}, {columns}], where factors hold "
            f"more weights than the matrix; pass at most --rank {limit} "
            f"(--ratio {ratio_for_rank(shapes.values(), limit):.3f}), or --force"
        )
    return rank


def matrix_shapes(model: nn.Module) -> dict[str, Shape]:
    """Encoder matrix name -> (out_features, in_features)."""
    return {name: (module.out_features, module.in_features) for name, module in encoder_linears(model).items()}


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared storage once."""
    tensors: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        tensors[tensor.data_ptr() or id(tensor)] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
