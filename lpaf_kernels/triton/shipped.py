"""Every shipped launch at representative sizes, recorded on meta tensors: what is compiled before it ships."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch

from .launch import (
    LAUNCHES,
    MAX_SPLIT_ROWS,
    MAX_WIDTH,
    Call,
    Launch,
    candidates,
    default_launch,
    head_columns,
    pitch,
    recording,
)

SHAPES = [  # rows, in, out, rank, kept: divisible by 16 or not, parts of 64 + 16, 128 + 16, 256 + 16, several programs
    (4096, 768, 3072, 80, 154),
    (4096, 768, 768, 130, 38),
    (4096, 3072, 768, 260, 0),
    (16, 768, 768, 20, 77),
    (128, 4096, 4096, 1024, 410),
]
# (shape, dtype, activation): the fewest that meet every branch, and all of them.
CORE_CASES = [(SHAPES[0], torch.bfloat16, "none"), (SHAPES[2], torch.bfloat16, "gelu")]
ALL_CASES = [
    *((shape, torch.bfloat16, activation) for shape in SHAPES for activation in ("none", "gelu")),
    (SHAPES[1], torch.float16, "silu"),
]
# Products of 4-byte numbers where torch allows TF32; one_kernel holds fewer columns of them.
TF32_SHAPES = [SHAPES[1], (4096, 768, 3072, 80, 41), (512, 768, 768, 41, 8), (16, 768, 768, 16, 8)]
# The same for lowrank_ffn, as (rows, in, hidden, rank, kept); silu stands for a gated block.
FFN_SHAPES = [
    (65536, 768, 3072, 80, 0),
    (65536, 768, 3072, 130, 0),
    (65536, 768, 3072, 260, 0),
    (4096, 768, 3072, 80, 38),
    (4096, 768, 3072, 80, 64),
    (4096, 768, 3072, 130, 77),
    (4096, 768, 3072, 200, 72),
    (128, 384, 1536, 41, 19),
    (16, 1000, 2730, 20, 0),
    (1, 768, 3072, 80, 13),
]
GATED_SHAPES = [(4096, 4096, 11008, 72, 0), (4096, 768, 3072, 130, 0), (1, 768, 2048, 40, 0)]
# Ranks that only the passes hold.
WIDE_SHAPES = [(4096, 768, 3072, 384, 0), (4096, 768, 3072, 768, 77), (16, 1000, 2730, 1024, 0)]
FFN_CORE_CASES = [(shape, torch.bfloat16, "gelu") for shape in (FFN_SHAPES[3], FFN_SHAPES[2], WIDE_SHAPES[0])]
FFN_ALL_CASES = [
    *((shape, torch.bfloat16, "gelu") for shape in (*FFN_SHAPES, *WIDE_SHAPES)),
    (FFN_SHAPES[1], torch.float16, "gelu_tanh"),
    *((shape, torch.bfloat16, "silu") for shape in (*GATED_SHAPES, WIDE_SHAPES[0])),
]
FFN_KERNELS = ("ffn", "ffn_wide", "ffn_rows", "ffn_weights")
FFN_TF32_SHAPES = [(4096, 768, 3072, 41, 8), (65536, 768, 3072, 68, 0), (1, 384, 1536, 16, 4), WIDE_SHAPES[0]]
# The same for lowrank_attention, as (sequences, length, heads, heads of K and V, head, rank, kept) and what is masked:
# "padding" [B, 1, 1, L], "pairs" [B, 1, L, L], "causal", "rotary" (and causal), "variable" lengths.
ATTENTION_SHAPES = [
    *((32, 128, 12, 12, 64, rank, 0) for rank in (16, 32, 48, 64, 80, 130, 260)),
    (32, 128, 12, 12, 64, 80, 38),
    (32, 100, 12, 12, 64, 130, 77),
    (16, 1024, 12, 12, 64, 80, 0),
    (32, 384, 12, 12, 32, 41, 19),
    (32, 384, 8, 8, 96, 80, 0),
    (8, 1024, 32, 8, 128, 80, 0),
]
ATTENTION_CORE_CASES = [
    (ATTENTION_SHAPES[4], torch.bfloat16, "padding"),
    (ATTENTION_SHAPES[6], torch.bfloat16, "padding"),
]
ATTENTION_ALL_CASES = [
    *((shape, torch.bfloat16, "padding") for shape in ATTENTION_SHAPES),
    *((ATTENTION_SHAPES[4], torch.bfloat16, variant) for variant in ("pairs", "causal", "rotary", "variable")),
    *((shape, torch.bfloat16, "rotary") for shape in ATTENTION_SHAPES[-4:]),
    *(((8, 1024, 32, 8, 128, rank, 0), torch.bfloat16, "causal") for rank in (130, 260)),
    ((8, 1024, 32, 8, 128, 260, 0), torch.bfloat16, "rotary"),
    (ATTENTION_SHAPES[6], torch.bfloat16, "rotary"),
    (ATTENTION_SHAPES[4], torch.float16, "padding"),
]
ATTENTION_KERNELS = ("attend", "close")
# The same for masked_linear, as (rows, in, out), multiples of 16, and the dtype of weight and scores.
MASKED_SHAPES = [(4096, 768, 3072), (4096, 3072, 768), (16384, 768, 768), (1, 1024, 4096)]
MASKED_CORE_CASES = [(MASKED_SHAPES[0], torch.bfloat16, torch.float32)]
MASKED_ALL_CASES = [
    *((shape, torch.bfloat16, torch.float32) for shape in MASKED_SHAPES),
    (MASKED_SHAPES[0], torch.float16, torch.float32),
    *((shape, torch.bfloat16, torch.bfloat16) for shape in (MASKED_SHAPES[0], MASKED_SHAPES[3])),
]
MASKED_KERNELS = ("masked", "masked_grads")
# The same for decoded_embedding, as (ids, vocabulary, latent, hidden layers, dim), and whether norms are kept.
DECODED_SHAPES = [
    (4096, 30522, 80, (), 768),
    (4096, 30522, 64, (128,), 768),
    (4096, 30522, 48, (96, 192), 768),
    (128, 30522, 249, (), 768),
    (16, 32000, 75, (150, 301), 1000),
]
DECODED_CORE_CASES = [(DECODED_SHAPES[0], torch.bfloat16, False), (DECODED_SHAPES[2], torch.bfloat16, True)]
DECODED_ALL_CASES = [
    *((shape, torch.bfloat16, norms) for shape in DECODED_SHAPES for norms in (False, True)),
    (DECODED_SHAPES[1], torch.float16, True),
]
DECODED_KERNELS = ("decode", "decode_grad")


def calls(
    launch: Launch, shape: tuple[int, ...], dtype: torch.dtype, activation: str | torch.dtype | bool
) -> list[Call]:
    """What ``launch`` launches in a forward and a backward of one shape; nothing where it cannot hold the rank.

    ``activation`` of an attention block: what is masked. Of masked_linear: the dtype of weight and scores. Of
    decoded_embedding: whether norms are kept.
    """
    if launch.kernel in DECODED_KERNELS:
        return _decoded_calls(launch, shape, dtype, activation)
    if launch.kernel in MASKED_KERNELS:
        return _masked_calls(launch, shape, dtype, activation)
    if launch.kernel in ATTENTION_KERNELS:
        return _attention_calls(launch, shape, dtype, activation)
    if launch.kernel in FFN_KERNELS:
        return _ffn_calls(launch, shape, dtype, activation)
    from . import lowrank_sparse_linear as kernels

    rows, d_in, d_out, rank, kept = shape

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, device="meta", dtype=dtype)

    x, down, up, bias = empty(rows, d_in), empty(rank + kept, d_in), empty(rank, d_out), empty(d_out)
    grad, z = empty(rows, d_out), empty(rows, pitch(rank + kept))
    positions = torch.empty(kept, device="meta", dtype=torch.int32) if kept else None
    saved = None if activation == "none" else grad
    with recording() as recorded:
        if launch.kernel == "project":
            kernels.project(x, down, launch)
            kernels.project(grad, up, launch, positions, saved, activation, keep_splits=False)
        elif launch.kernel == "expand":
            kernels.expand(z, 1, up, dtype, launch, positions, bias, activation, activation != "none")
            kernels.expand(z, 1, down, dtype, launch)
            if launch.block_m <= MAX_SPLIT_ROWS:
                parts = torch.empty(4, *z.shape, device="meta")
                kernels.expand(parts, 4, up, dtype, launch, positions, bias)
        elif launch.kernel == "outer":
            kernels.outer(z, rank + kept, x, launch)
            kernels.outer(z, rank, grad, launch, True)
        elif launch.holds(rank + kept, dtype):
            kernels.one_kernel(x, down, up, launch, positions, bias, activation)
            kernels.one_kernel(x, down, up, launch, positions, bias, activation, True, activation != "none")
    return recorded


def _ffn_calls(launch: Launch, shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> list[Call]:
    from . import lowrank_ffn as kernels

    rows, d, hidden, rank, kept = shape

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, device="meta", dtype=dtype)

    def factors(d_in: int, d_out: int) -> kernels.Factors:
        positions = torch.empty(kept, device="meta", dtype=torch.int32) if kept else None
        return kernels.Factors(empty(rank + kept, d_in), empty(rank, d_out), positions, empty(d_out))

    x, z = empty(rows, d), empty(rows, pitch(rank + kept))
    first, second = factors(d, hidden), factors(hidden, d)
    gate = first if activation == "silu" else None
    width = (rank + kept) * (1 if gate is None else 2)
    if launch.kernel == "ffn_wide":
        if width <= MAX_WIDTH:
            return []
        around = (default_launch(kernel, rows, width, launch.archs[0]) for kernel in ("project", "expand"))
        launches = kernels.WideLaunches(next(around), launch, next(around))
        with recording() as recorded:
            kernels.forward_wide(x, first, second, launches, gate=gate, activation=activation)
        return [call for call in recorded if call.kernel is kernels._ffn_wide]
    norm = kernels.Norm("layer", empty(d), empty(d)) if gate is None else kernels.Norm("rms", empty(d))
    with recording() as recorded:
        if not launch.holds(width, dtype):
            pass
        elif launch.kernel == "ffn_rows":
            kernels.hidden_rows(z, z, z, first, second, launch, gate, activation)
        elif launch.kernel == "ffn_weights":
            kernels.hidden_weights(z, z, z, first, second, launch, gate, activation)
        else:
            kernels.forward(x, first, second, launch, gate=gate, activation=activation, residual=x, norm=norm)
            # z is saved only where there is a backward.
            if all(candidates("ffn_rows", width, arch, dtype) for arch in launch.archs):
                kernels.forward_with_z(x, first, second, launch, gate=gate, activation=activation)
    return recorded


def _attention_calls(launch: Launch, shape: tuple[int, ...], dtype: torch.dtype, variant: str) -> list[Call]:
    from . import lowrank_attention as kernels

    batch, length, heads, kv_heads, head_dim, rank, kept = shape
    rows, width, d = batch * length, rank + kept, heads * head_dim

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(*size, device="meta", dtype=dtype)

    def integers(size: int) -> torch.Tensor:
        return torch.empty(size, device="meta", dtype=torch.int32)

    positions = integers(kept) if kept else None
    q, k, v = (
        kernels.Projection(index * width, empty(rank, count * head_dim), positions, empty(count * head_dim))
        for index, count in enumerate((heads, kv_heads, kv_heads))
    )
    masks = {"padding": (batch, 1, 1, length), "pairs": (batch, 1, length, length)}
    with recording() as recorded:
        if not launch.holds(max(width, q.width, k.width, v.width), dtype):
            pass
        elif launch.kernel == "close":
            out = kernels.Factors(empty(width, d), empty(rank, d), positions, empty(d))
            norm = kernels.Norm("layer", empty(d), empty(d))
            kernels.close(empty(rows, d), out, launch, empty(rows, d), norm)
        elif head_columns(head_dim, variant == "rotary") <= launch.block_k:
            kernels.attend(
                empty(rows, pitch(3 * width)), q, k, v, launch,
                num_heads=heads, num_kv_heads=kv_heads, length=length, scale=head_dim**-0.5,
                cu_seqlens=integers(batch + 1) if variant == "variable" else None,
                mask=torch.empty(masks[variant], device="meta", dtype=torch.bool) if variant in masks else None,
                is_causal=variant in ("causal", "rotary"),
                rotary=(empty(length, head_dim), empty(length, head_dim)) if variant == "rotary" else None,
            )  # fmt: skip
    return recorded


def _masked_calls(launch: Launch, shape: tuple[int, ...], dtype: torch.dtype, stored: torch.dtype) -> list[Call]:
    from . import masked_linear as kernels

    rows, d_in, d_out = shape

    def empty(*size: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(size, device="meta", dtype=of)

    x, grad, weight = empty(rows, d_in), empty(rows, d_out), empty(d_out, d_in, of=stored)
    selection = kernels.Selection(empty(d_out, d_in, of=stored), empty(of=torch.float32), empty(of=torch.int64))
    with recording() as recorded:
        if launch.kernel == "masked":
            kernels.product(x, weight, selection, launch, transposed=True, bias=empty(d_out))
            kernels.product(grad, weight, selection, launch)
        else:
            kernels.weight_grads(grad, x, weight, selection, launch)
    return recorded


def _decoded_calls(launch: Launch, shape: tuple, dtype: torch.dtype, has_norms: bool) -> list[Call]:
    from . import decoded_embedding as kernels

    rows, vocabulary, latent, hidden, dim = shape

    def empty(*size: int) -> torch.Tensor:
        return torch.empty(size, device="meta", dtype=dtype)

    widths = (latent, *hidden, dim)
    layers = [(empty(a, b), empty(b)) for a, b in pairwise(widths)]
    ids = torch.empty(rows, device="meta", dtype=torch.int64)
    stored = (empty(vocabulary, latent), layers, empty(vocabulary) if has_norms else None)
    with recording() as recorded:
        if launch.kernel == "decode":
            kernels.decode(ids, *stored, launch)
        elif has_norms or hidden:
            kernels.last_gradient(empty(rows, dim), ids, *stored, 0, launch)
    return recorded


def faults(name: str, arch: int, cases: Iterable[tuple] | None = None) -> Iterator[tuple[Call, list[str]]]:
    """Each kernel that launch ``name`` needs for ``cases``, compiled for ``arch``, and why it must not ship."""
    from .resources import compile_calls

    launch = LAUNCHES[name]
    if cases is None:
        cases = CORE_CASES
        for kernels, own in (
            (FFN_KERNELS, FFN_CORE_CASES),
            (ATTENTION_KERNELS, ATTENTION_CORE_CASES),
            (MASKED_KERNELS, MASKED_CORE_CASES),
            (DECODED_KERNELS, DECODED_CORE_CASES),
        ):
            cases = own if launch.kernel in kernels else cases
    recorded = [call for case in cases for call in calls(launch, *case)]
    for call, used in compile_calls(recorded, (arch,)):
        # Products of 4-byte numbers may use another instruction than those of 2-byte ones.
        exact = call.constants["PRECISION"] == "tf32"
        # `_finish` has row tiles of its own.
        wanted = launch.instruction[arch] if call.kernel.__name__ != "_finish" else "mma.sync"
        yield call, used.faults(None if exact else wanted)
