"""Linears and embeddings whose weight is built from few numbers at every call: what the baselines of offline
compression leave behind.

A source stores the numbers and builds the weight [n, m]; gradients flow to its parameters. They save space, not time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Entry = dict[str, Any]
#: what a description calls a source
SOURCES = ("sparse", "kronecker", "tucker")


class Source(nn.Module, ABC):
    """Numbers that a weight is built from; ``owner`` is the source that stores what several have in common."""

    def __init__(self, owner: Source | None = None) -> None:
        super().__init__()
        self._owner = [owner]  # in a list: not registered, stored once

    @property
    def owner(self) -> Source | None:
        """The source that stores what is common, None where that is this one."""
        return self._owner[0]

    @property
    def common(self) -> Source:
        """Where the common part lies."""
        return self.owner or self

    @abstractmethod
    def weight(self) -> torch.Tensor:
        """The weight [n, m]."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """[n, m] of the weight."""

    @abstractmethod
    def describe(self) -> Entry:
        """What :func:`make_source` makes an empty one from."""


class Sparse(Source):
    """The weights that are not zero, in the order of the rows, and where they stand.

    Their places take n m / 32 numbers of 4 bytes (``packed``: a bit for each weight), or count / 2 + n (a column of 2
    bytes for each that stays, and how many a row has).

    Parameters: values [count]. Buffers: ``bits`` uint8 [ceil(n m / 8)], or ``columns`` int16 [count] and ``counts``
    int32 [n].
    """

    def __init__(self, rows: int, columns: int, count: int, packed: bool, **like: Any) -> None:
        super().__init__()
        self.rows, self.width, self.packed = rows, columns, packed
        self.values = nn.Parameter(torch.zeros(count, **like))
        device = like.get("device")
        if packed:
            self.register_buffer("bits", torch.zeros(-(-rows * columns // 8), dtype=torch.uint8, device=device))
        else:
            self.register_buffer("columns", torch.zeros(count, dtype=torch.int16, device=device))
            self.register_buffer("counts", torch.zeros(rows, dtype=torch.int32, device=device))

    @classmethod
    def of(cls, weight: torch.Tensor, kept: torch.Tensor, packed: bool) -> Sparse:
        """The entries of ``weight`` [n, m] where ``kept`` [n, m] is true."""
        source = cls(*weight.shape, int(kept.sum()), packed, dtype=weight.dtype, device=weight.device)
        source.values.data.copy_(weight[kept])
        if packed:
            flat = F.pad(kept.flatten(), (0, -kept.numel() % 8)).view(-1, 8)
            source.bits.copy_((flat << torch.arange(8, device=flat.device)).sum(dim=1))
        else:
            source.columns.copy_(kept.nonzero()[:, 1])
            source.counts.copy_(kept.sum(dim=1))
        return source

    def places(self) -> torch.Tensor:
        """Which weights [n, m] are stored."""
        if self.packed:
            flat = (self.bits[:, None] >> torch.arange(8, device=self.bits.device)) & 1
            return flat.flatten()[: self.rows * self.width].view(self.rows, self.width).bool()
        kept = torch.zeros(self.rows, self.width, dtype=torch.bool, device=self.counts.device)
        row = torch.arange(self.rows, device=self.counts.device).repeat_interleave(self.counts)
        kept[row, self.columns.long()] = True
        return kept

    def weight(self) -> torch.Tensor:
        return self.values.new_zeros(self.rows, self.width).masked_scatter(self.places(), self.values)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.width

    def describe(self) -> Entry:
        return {"sparse": [self.rows, self.width, self.values.numel()], "packed": self.packed}


class Kronecker(Source):
    """W = A (x) B with A [n1, m1] and B [n2, m2]; matrices on top of each other share B.

    Parameters: a, and b where it is not the owner's.
    """

    def __init__(self, a: tuple[int, int], b: tuple[int, int], owner: Source | None = None, **like: Any) -> None:
        super().__init__(owner)
        self.sizes = (*a, *b)
        self.a = nn.Parameter(torch.zeros(a, **like))
        if owner is None:
            self.b = nn.Parameter(torch.zeros(b, **like))

    def weight(self) -> torch.Tensor:
        return torch.kron(self.a, self.common.b)

    @property
    def shape(self) -> tuple[int, int]:
        n1, m1, n2, m2 = self.sizes
        return n1 * n2, m1 * m2

    def describe(self) -> Entry:
        return {"kronecker": list(self.sizes)}


class Tucker(Source):
    """W = L (sum_i w_i C_i) R^T with a core C [r0, r1, r2], L [n, r1] and R [m, r2]; layers share all but w [r0].

    Parameters: mixture (w), and core, left, right where they are not the owner's.
    """

    def __init__(self, core: tuple[int, int, int], shape: tuple[int, int], owner: Source | None = None, **like: Any):
        super().__init__(owner)
        self.sizes = (*core, *shape)
        self.mixture = nn.Parameter(torch.zeros(core[0], **like))
        if owner is None:
            self.core = nn.Parameter(torch.zeros(core, **like))
            self.left = nn.Parameter(torch.zeros(shape[0], core[1], **like))
            self.right = nn.Parameter(torch.zeros(shape[1], core[2], **like))

    def weight(self) -> torch.Tensor:
        common = self.common
        return common.left @ torch.tensordot(self.mixture, common.core, 1) @ common.right.T

    @property
    def shape(self) -> tuple[int, int]:
        return self.sizes[3:]

    def describe(self) -> Entry:
        return {"tucker": list(self.sizes)}


def make_source(entry: Entry, owner: Source | None, **like: Any) -> Source:
    """The empty source of a description."""
    if "sparse" in entry:
        return Sparse(*entry["sparse"], entry["packed"], **like)
    if "kronecker" in entry:
        n1, m1, n2, m2 = entry["kronecker"]
        return Kronecker((n1, m1), (n2, m2), owner, **like)
    r0, r1, r2, rows, columns = entry["tucker"]
    return Tucker((r0, r1, r2), (rows, columns), owner, **like)


class ReconstructedLinear(nn.Module):
    """y = x W^T + b with W from a source."""

    def __init__(self, source: Source, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.source = source
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.out_features, self.in_features = source.shape

    @property
    def weight(self) -> torch.Tensor:
        """[out, in], built at every reading."""
        return self.source.weight()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class ReconstructedEmbedding(nn.Module):
    """Rows of W from a source."""

    def __init__(self, source: Source, padding_idx: int | None = None) -> None:
        super().__init__()
        self.source, self.padding_idx = source, padding_idx

    @property
    def weight(self) -> torch.Tensor:
        """[vocab, dim], built at every reading."""
        return self.source.weight()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight, self.padding_idx)


class ReconstructedOutput(nn.Module):
    """logits = h W^T + b with the W of an embedding that stores it."""

    def __init__(self, embedding: ReconstructedEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        object.__setattr__(self, "embedding", embedding)  # beside the modules: its numbers are stored once
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """[vocab, dim], the embedding's."""
        return self.embedding.weight

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return F.linear(h, self.weight, self.bias)


RECONSTRUCTED = (ReconstructedLinear, ReconstructedEmbedding)
