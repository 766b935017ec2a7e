"""The output layer that is tied to a DecodedEmbedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.decoded_embedding import check_per_row
from ._decoded import parameter
from .decoded_embedding import DecodedEmbedding


class DecodedOutput(nn.Module):
    """logits = h E^T + bias, with the rows of E [vocab, dim] decoded from the latent of the model's input embedding.

    Stands for the nn.Linear that shares its weight with nn.Embedding. A linear decoder D (its bias one more row, with 1
    in every row of Z) makes the table E = Z D low-rank, and it is never decoded: logits = (h D^T) Z^T. With hidden
    layers every forward decodes the table.

    The rows are as long as the decoder makes them: norms are for looking rows up. A row that is rebuilt badly is short
    where the decoder was trained to least squares, which keeps the logits of its token small; at full length it would
    give the wrong ones with confidence.

    The embedding is held beside the modules, not among them: it has its parameters, a state_dict has each once, and
    moving or training this layer does not touch it. Copies of the whole model (copy.deepcopy, pickle) keep the tie. As
    for a tied nn.Linear, the embedding's padding_idx does not stop gradients here.

    Parameter: bias [vocab].

    Args:
        embedding: the model's input embedding.
        bias: whether there is one (zeros at first), or the [vocab] tensor itself; a parameter stays the same parameter.

    Raises:
        TypeError, ValueError: no DecodedEmbedding, a bias of another dtype or length.
    """

    embedding: DecodedEmbedding

    def __init__(self, embedding: DecodedEmbedding, bias: bool | Tensor = False) -> None:
        super().__init__()
        if not isinstance(embedding, DecodedEmbedding):
            raise TypeError(f"embedding: expected a DecodedEmbedding, got {type(embedding).__name__}")
        # nn.Module would register it.
        object.__setattr__(self, "embedding", embedding)
        if isinstance(bias, bool):
            bias = embedding.latent.new_zeros(self.out_features) if bias else None
        if bias is not None:
            check_per_row("bias", bias, embedding.latent)
        self.register_parameter("bias", None if bias is None else parameter(bias))

    @property
    def in_features(self) -> int:
        """The embedding's dimension."""
        return self.embedding.embedding_dim

    @property
    def out_features(self) -> int:
        """The vocabulary's size."""
        return self.embedding.num_embeddings

    @property
    def weight(self) -> Tensor:
        """[vocab, dim], the embedding's without its norms, decoded anew at each reading."""
        return self.embedding.table(norms=False)

    def forward(self, h: Tensor) -> Tensor:
        """[..., dim] -> [..., vocab]."""
        factors = self.embedding.factors(norms=False)
        if factors is None:
            return F.linear(h, self.weight, self.bias)
        rows, decoder = factors
        return F.linear(F.linear(h, decoder), rows, self.bias)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The nn.Linear of the decoded table, no longer tied (everything copied)."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    def extra_repr(self) -> str:
        """Sizes and whether there is a bias."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
