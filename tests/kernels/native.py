"""Native CPU kernels on drawn problems, in a process of their own: the instruction set is chosen once."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from accuracy import check_accurate
from lpaf_kernels.ops import lowrank_sparse_linear as op

# Around the ends of tiles, passes and tasks: csrc/cpu/lowrank_sparse_linear_kernels.cpp.
ROWS = (0, 1, 2, 3, 4, 11, 12, 13, 25, 47, 48, 49, 130, 131, 330, 1100)
IN_FEATURES = (2, 3, 15, 16, 17, 31, 48, 100, 257, 1376, 1377, 2800)
OUT_FEATURES = (2, 3, 15, 16, 31, 32, 33, 127, 128, 129, 300)
RANKS = (0, 1, 3, 4, 5, 16, 41, 80, 129, 130, 131, 330)


def start_process() -> None:
    """What the child process does first: memory starts as NaN, and there are threads to share out work to."""
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(4).isnan().all()


def check_linear(seed: int) -> None:
    """y, z and all gradients of one drawn shape against float64, within twice the error of torch's own products."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, rank = draw.choice(ROWS), draw.choice(RANKS)
    d_in, d_out = draw.choice(IN_FEATURES), draw.choice(OUT_FEATURES)
    kept = draw.choice([0, 0, 1, d_out // 2, d_out])
    index = draw.choice([torch.int32, torch.int64])
    biased, transposed = draw.random() < 0.7, draw.random() < 0.2
    needs = [draw.random() < 0.8 for _ in range(4)]
    # The largest error of a handful of entries is a matter of luck: several draws are measured together.
    draws = []
    for _ in range(4):
        x = torch.randn(d_in, rows).t() if transposed else torch.randn(rows, d_in)
        down, up = torch.randn(rank + kept, d_in) / d_in**0.5, torch.randn(rank, d_out) / max(rank, 1) ** 0.5
        positions = torch.randperm(d_out)[:kept].sort().values.to(index) if kept else None
        bias = torch.randn(d_out) if biased else None
        draws.append(list(_results((x, down, up, positions, bias), torch.randn(rows, d_out), needs)))
    for results in zip(*draws, strict=True):
        check_accurate(*(torch.stack(same) for same in zip(*results, strict=True)))


def check_decoded_embedding(seed: int) -> None:
    """decoded_embedding_forward on one drawn shape against float64, within twice the error of torch's chain."""
    from lpaf_kernels.ops import decoded_embedding as op

    draw = random.Random(seed)
    torch.manual_seed(seed)
    rows, vocabulary = draw.choice([1, 2, 11, 12, 13, 49, 255, 256, 257, 515, 1100]), draw.choice([1, 10, 2000])
    hidden = [draw.choice([1, 3, 16, 80, 131, 260]) for _ in range(draw.choice([0, 0, 1, 2]))]
    widths = (draw.choice([1, 3, 16, 41, 80, 131, 330]), *hidden, draw.choice(OUT_FEATURES))
    biases, has_norms = draw.random() < 0.7, draw.random() < 0.5
    index = draw.choice([torch.int32, torch.int64])
    draws = []
    # The error of a single row is a matter of luck.
    for _ in range(4 if vocabulary > 1 else 24):
        layers = [(torch.randn(a, b) / a**0.5, torch.randn(b) if biases else None) for a, b in pairwise(widths)]
        tensors = [tensor for layer in layers for tensor in layer]
        tensors += [None] * (6 - len(tensors))
        norms = torch.rand(vocabulary) if has_norms else None
        ids = torch.randint(vocabulary, (rows,), dtype=index)
        arguments = (ids, torch.randn(vocabulary, widths[0]), *tensors, norms)
        y = torch.ops.lpaf_kernels.decoded_embedding_forward(*arguments)
        draws.append((y, op._forward_by_torch(*arguments), op._forward_by_torch(*_double(*arguments))))
        torch.set_num_threads(1)
        assert torch.ops.lpaf_kernels.decoded_embedding_forward(*arguments).equal(y)
        torch.set_num_threads(2)
    check_accurate(*(torch.stack(same) for same in zip(*draws, strict=True)))


def check_feed_forward(seed: int) -> None:
    """lowrank_ffn without gradients on one drawn shape against float64, within twice the error of torch's chain."""
    import test_lowrank_ffn as block

    draw = random.Random(seed)
    torch.manual_seed(seed)
    hidden, d_out = draw.choice(OUT_FEATURES), draw.choice(OUT_FEATURES)
    first, second = ((draw.choice(RANKS), draw.choice([0, 1, size // 2])) for size in (hidden, d_out))
    gate, biases = draw.choice([0, 0, 5]), draw.random() < 0.7
    # Without a residual, or with two entries, a row may be normalised by almost nothing, which magnifies every
    # rounding before it.
    norm = draw.choice(["none", "layer", "rms"]) if d_out > 3 else "none"
    residual = norm != "none" or draw.random() < 0.5
    case = ((draw.choice(ROWS),), draw.choice(IN_FEATURES), hidden, d_out, first, second, gate, biases, residual, norm)
    activation = draw.choice(block.ACTIVATIONS)
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16])
    draws = []
    for _ in range(4):
        tensors, kept, norm = block.make(*case, dtype=dtype)
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        with torch.no_grad():
            actual = block.run(block.lowrank_ffn, tensors, kept, norm, activation)
            chain = block.run(block.chain, tensors, kept, norm, activation)
            draws.append((actual, chain, block.run(block.chain, wide, kept, norm, activation)))
    check_accurate(*(torch.stack(same) for same in zip(*draws, strict=True)))


def check_attention(seed: int) -> None:
    """lowrank_attention without gradients on one drawn shape against float64, within twice the error of torch's."""
    import test_lowrank_attention as block

    draw = random.Random(seed)
    torch.manual_seed(seed)
    kv_heads = draw.choice([1, 2, 3])
    heads = (kv_heads * draw.choice([1, 1, 2]), kv_heads)
    head_dim, d = draw.choice([2, 4, 30, 32, 64, 96]), draw.choice([4, 15, 64, 129])
    batch, length = draw.choice([1, 2, 3]), draw.choice([1, 2, 12, 25, 61, 130, 330])
    lead, lengths = (batch, length), None
    if draw.random() < 0.2:
        lengths = (draw.randint(0, length), length, 1)
        lead = (sum(lengths),)
    widths = (heads[0] * head_dim, kv_heads * head_dim, kv_heads * head_dim, d)
    kept = tuple(draw.choice([0, 0, 1, width // 2]) for width in widths)
    case = block.Case(
        lead, d, heads, head_dim, tuple(draw.choice([0, 1, 5, 41, 80, 131]) for _ in range(4)), kept,
        biases=draw.random() < 0.7, mask="none" if lengths else draw.choice(["none", "padding", "rows", "bias"]),
        is_causal=draw.random() < 0.3, rotary=draw.choice(["none", "none", "shared" if not lengths else "own", "own"]),
        residual=True, norm=draw.choice(["none", "layer", "rms"]), lengths=lengths,
    )  # fmt: skip
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16])
    draws = []
    for _ in range(4):
        tensors, rest = block.make(case, dtype)
        wide = {name: tensor.double() for name, tensor in tensors.items()}
        with torch.no_grad():
            actual, chain = (block.run(function, tensors, rest) for function in (block.lowrank_attention, block.chain))
            draws.append((actual, chain, block.run(block.chain, wide, rest)))
    check_accurate(*(torch.stack(same) for same in zip(*draws, strict=True)))


def _results(
    layer: tuple[Tensor | None, ...], grad: Tensor, needs: list[bool]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(native, by torch in float32, in float64) of every output."""
    torch_forward, torch_gradients = op._lowrank_sparse_linear_forward, op._lowrank_sparse_linear_gradients
    y, z = op._native_forward(*layer, True)
    yield from zip((y, z), torch_forward(*layer, True), torch_forward(*_double(*layer), True), strict=True)
    assert op._native_forward(*layer, False)[0].equal(y)
    arguments = (grad, *layer[:4], z)
    gradients = op._native_gradients(*arguments, *needs)
    by_torch, exact = torch_gradients(*arguments, *needs), torch_gradients(*_double(*arguments), *needs)
    yield from zip(gradients, by_torch, exact, strict=True)
    # The order of every sum follows from the sizes alone, not from the threads.
    torch.set_num_threads(1)
    for alone, shared in zip(op._native_gradients(*arguments, *needs), gradients, strict=True):
        assert alone.equal(shared)
    torch.set_num_threads(2)


def _double(*tensors: Tensor | None) -> list[Tensor | None]:
    return [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
