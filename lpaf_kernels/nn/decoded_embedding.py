"""nn.Embedding stored as latent rows and a decoder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..ops._checks import check_integer
from ..ops.decoded_embedding import Layer
from ._decoded import DecodedMatrix


class DecodedEmbedding(DecodedMatrix):
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
        sizes = {"num_embeddings": num_embeddings, "embedding_dim": embedding_dim}
        super().__init__(sizes, latent_dim, hidden, bias, norms, device, dtype)
        self._pad(padding_idx)
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
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold(latent, decoder, norms)
        layer._pad(padding_idx)
        return layer

    def _pad(self, padding_idx: int | None) -> None:
        if padding_idx is not None:
            check_integer("padding_idx", padding_idx, -self.num_embeddings, self.num_embeddings - 1)
            padding_idx %= self.num_embeddings
        self.padding_idx = padding_idx

    @property
    def num_embeddings(self) -> int:
        """Rows: the vocabulary's size."""
        return self.latent.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Columns of a decoded row."""
        return self.decoder[-1].weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        """[...] integers -> [..., dim]."""
        return self.decode(ids, self.padding_idx)

    @torch.no_grad()
    def to_dense(self) -> nn.Embedding:
        """The nn.Embedding of the decoded rows."""
        dense = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        dense.weight = nn.Parameter(self.weight, requires_grad=self.latent.requires_grad)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        """Sizes, and padding_idx and norms where there are any."""
        text = f"{self.num_embeddings}, {self.embedding_dim}, latent_dim={self.latent.shape[1]}"
        if self.norms is not None:
            text += ", norms=True"
        return text if self.padding_idx is None else f"{text}, padding_idx={self.padding_idx}"
