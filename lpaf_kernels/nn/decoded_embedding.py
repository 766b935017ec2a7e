"""nn.Embedding stored as latent rows and a decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..ops._checks import check_floating, check_integer, check_shape
from ..ops.decoded_embedding import MAX_HIDDEN, Layer, check_decoder, decoded_embedding


class DecoderLayer(nn.Module):
    """A layer of a decoder, as :func:`decoded_embedding` takes them: weight [in, out] and bias [out] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.register_parameter("bias", None if bias is None else _parameter(bias))

    def extra_repr(self) -> str:
        """Sizes and whether there is a bias."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, bias={self.bias is not None}"


class DecodedEmbedding(nn.Module):
    """nn.Embedding whose rows are decoded from a latent row each: see :func:`decoded_embedding` for the equation.

    Parameters: latent [vocab, k], decoder.N.weight [in, out], decoder.N.bias [out]. Buffer, where norms are kept: norms
    [vocab], which training leaves as they are. Matrices that were compressed together share ``decoder``, a module.

    Args:
        num_embeddings, embedding_dim, padding_idx, device, dtype: as for nn.Embedding.
        latent_dim: k.
        hidden: widths of none (a linear decoder), one or two hidden layers.
        bias: whether the decoder's layers have one.
        norms: whether rows are given stored lengths (1 at first).

    Raises:
        TypeError, ValueError: sizes that are no integers of at least 1, more than two hidden layers.
    """

    norms: Tensor | None

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        latent_dim: int,
        hidden: Sequence[int] = (),
        bias: bool = True,
        norms: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("num_embeddings", num_embeddings),
            ("embedding_dim", embedding_dim),
            ("latent_dim", latent_dim),
            *((f"hidden[{index}]", size) for index, size in enumerate(hidden)),
        ):
            check_integer(name, size, 1, None)
        if len(hidden) > MAX_HIDDEN:
            raise ValueError(f"hidden: expected at most {MAX_HIDDEN} widths, got {len(hidden)}")

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        widths = (latent_dim, *hidden, embedding_dim)
        layers = [(empty(a, b), empty(b) if bias else None) for a, b in pairwise(widths)]
        self._set(empty(num_embeddings, latent_dim), layers, empty(num_embeddings) if norms else None, padding_idx)
        self.reset_parameters()

    @classmethod
    def from_parts(
        cls,
        latent: Tensor,
        decoder: Sequence[Layer] | nn.ModuleList,
        norms: Tensor | None = None,
        padding_idx: int | None = None,
    ) -> DecodedEmbedding:
        """The layer of these tensors, as :func:`decoded_embedding` takes them; nothing is copied.

        Args:
            latent: [vocab, k]; a parameter stays the same parameter, a tensor becomes one.
            decoder: pairs (weight, bias or None) likewise, or the ``decoder`` of another layer, to be shared with it.
            norms: [vocab] or None.
            padding_idx: or None.

        Raises:
            TypeError, ValueError: as :func:`decoded_embedding`.
        """
        check_floating("latent", latent)
        if latent.dim() != 2 or latent.shape[1] == 0:
            raise ValueError(f"latent: expected shape [vocab, k] with k of at least 1, got {list(latent.shape)}")
        pairs = [(layer.weight, layer.bias) for layer in decoder] if isinstance(decoder, nn.ModuleList) else decoder
        check_decoder(pairs, latent)
        if norms is not None:
            check_floating("norms", norms)
            check_shape("norms", norms, latent.shape[0], because="the rows of latent")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(latent, decoder, norms, padding_idx)
        return layer

    def _set(
        self, latent: Tensor, decoder: Sequence[Layer] | nn.ModuleList, norms: Tensor | None, padding_idx: int | None
    ) -> None:
        if padding_idx is not None:
            check_integer("padding_idx", padding_idx, -latent.shape[0], latent.shape[0] - 1)
            padding_idx %= latent.shape[0]
        self.padding_idx = padding_idx
        self.latent = _parameter(latent)
        shared = isinstance(decoder, nn.ModuleList)
        self.decoder = decoder if shared else nn.ModuleList(DecoderLayer(*layer) for layer in decoder)
        self.register_buffer("norms", None if norms is None else norms.detach())

    def reset_parameters(self) -> None:
        """Latent rows as nn.Embedding draws its rows, the decoder as nn.Linear, norms of 1."""
        nn.init.normal_(self.latent)
        for layer in self.decoder:
            bound = 1 / math.sqrt(layer.weight.shape[0])
            nn.init.uniform_(layer.weight, -bound, bound)
            if layer.bias is not None:
                nn.init.uniform_(layer.bias, -bound, bound)
        if self.norms is not None:
            self.norms.fill_(1)

    @property
    def num_embeddings(self) -> int:
        """Rows: the vocabulary's size."""
        return self.latent.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Columns of a decoded row."""
        return self.decoder[-1].weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """[vocab, dim], every row decoded anew at each reading; gradients flow to latent and decoder. For readers, and
        for an output layer that shares the latent."""
        return self(torch.arange(self.num_embeddings, device=self.latent.device))

    def forward(self, ids: Tensor) -> Tensor:
        """[...] integers -> [..., dim]."""
        layers = [(layer.weight, layer.bias) for layer in self.decoder]
        return decoded_embedding(ids, self.latent, layers, self.norms, self.padding_idx)

    @torch.no_grad()
    def to_dense(self) -> nn.Embedding:
        """The nn.Embedding of the decoded rows."""
        weight = self.weight
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=self.latent.requires_grad)
        dense.train(self.training)
        return dense

    def extra_repr(self) -> str:
        """Sizes, and padding_idx and norms where there are any."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, latent_dim={self.latent.shape[1]}"
        if self.norms is not None:
            text += ", norms=True"
        return text if self.padding_idx is None else f"{text}, padding_idx={self.padding_idx}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
