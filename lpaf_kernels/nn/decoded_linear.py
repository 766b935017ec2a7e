"""stand-in until the branch with the real ones is merged"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.decoded_embedding import decoded_embedding
from .decoded_embedding import DecodedEmbedding


class DecodedLinear(nn.Module):
    def __init__(
        self,
        in_features,
        out_features,
        latent_dim,
        hidden=(),
        decoder_bias=True,
        norms=False,
        bias=True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        rows = DecodedEmbedding(
            out_features, in_features, latent_dim, hidden, decoder_bias, norms, device=device, dtype=dtype
        )
        self._fill(
            rows.latent,
            rows.decoder,
            rows.norms,
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None,
        )

    def _fill(self, latent, decoder, norms, bias, owner=None):
        self.latent = latent
        self._owner = [owner]
        if owner is None:
            self.decoder = decoder
        self.register_buffer("norms", norms)
        self.bias = bias

    def __getattr__(self, name):
        if name == "decoder" and self.__dict__.get("_owner", [None])[0] is not None:
            return self._owner[0].decoder
        return super().__getattr__(name)

    @classmethod
    def sharing(cls, owner, out_features, norms=False, bias=True, device=None, dtype=None):
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        like = {"device": device, "dtype": dtype}
        self._fill(
            nn.Parameter(torch.zeros(out_features, owner.latent.shape[1], **like)),
            None,
            torch.zeros(out_features, **like) if norms else None,
            nn.Parameter(torch.zeros(out_features, **like)) if bias else None,
            owner,
        )
        return self

    @classmethod
    def from_parts(cls, latent, decoder, norms=None, bias=None):
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        bias = None if bias is None else nn.Parameter(bias.detach().clone())
        if isinstance(decoder, DecodedLinear):
            self._fill(nn.Parameter(latent), None, norms, bias, decoder)
        else:
            rows = DecodedEmbedding.from_parts(latent, decoder, norms)
            self._fill(rows.latent, rows.decoder, rows.norms, bias)
        return self

    @property
    def owner(self):
        return self._owner[0]

    @property
    def out_features(self):
        return self.latent.shape[0]

    @property
    def in_features(self):
        return self.decoder[-1].weight.shape[1]

    @property
    def weight(self):
        layers = [(layer.weight, layer.bias) for layer in self.decoder]
        return decoded_embedding(
            torch.arange(len(self.latent), device=self.latent.device), self.latent, layers, self.norms
        )

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class DecodedOutput(nn.Module):
    def __init__(self, embedding, bias=None):
        super().__init__()
        self._embedding = [embedding]
        self.register_parameter("bias", bias)

    @property
    def embedding(self):
        return self._embedding[0]

    def forward(self, x):
        return F.linear(x, self.embedding.weight, self.bias)
