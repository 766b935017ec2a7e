"""What the modules of decoded matrices share: their parts, and products with a matrix that need not be decoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import check_integer
from ..ops.decoded_embedding import MAX_HIDDEN, Layer, check_decoder, check_latent, check_per_row, decoded_embedding

# Rows per column from which lengths are taken in a basis, which costs about as much to make as decoding this many.
_MANY_ROWS = 8


class DecoderLayer(nn.Module):
    """A layer of a decoder, as :func:`decoded_embedding` takes them: weight [in, out] and bias [out] or None."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = parameter(weight)
        self.register_parameter("bias", None if bias is None else parameter(bias))

    def extra_repr(self) -> str:
        """Sizes and whether there is a bias."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}, bias={self.bias is not None}"


class DecodedMatrix(nn.Module):
    """A matrix [rows, columns] of which each row is decoded from a latent row: see :func:`decoded_embedding`.

    Parameters: latent [rows, k], decoder.N.weight [in, out], decoder.N.bias [out]. Buffer, where norms are kept: norms
    [rows], which training leaves as they are. Matrices that were compressed together share ``decoder``, a module.

    Args:
        sizes: rows and columns by the names that the caller has for them.
        latent_dim: k.
        hidden: widths of none (a linear decoder), one or two hidden layers.
        decoder_bias: whether the decoder's layers have one.
        norms: whether rows are given stored lengths (1 at first).
        device, dtype: of all.

    Raises:
        TypeError, ValueError: sizes that are no integers of at least 1, more than two hidden layers.
    """

    norms: Tensor | None

    def __init__(
        self,
        sizes: dict[str, int],
        latent_dim: int,
        hidden: Sequence[int],
        decoder_bias: bool,
        norms: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        hidden_sizes = {f"hidden[{index}]": size for index, size in enumerate(hidden)}
        for name, size in {**sizes, "latent_dim": latent_dim, **hidden_sizes}.items():
            check_integer(name, size, 1, None)
        if len(hidden) > MAX_HIDDEN:
            raise ValueError(f"hidden: expected at most {MAX_HIDDEN} widths, got {len(hidden)}")

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=device, dtype=dtype)

        rows, columns = sizes.values()
        layers = [
            (empty(a, b), empty(b) if decoder_bias else None) for a, b in pairwise((latent_dim, *hidden, columns))
        ]
        self._hold(empty(rows, latent_dim), layers, empty(rows) if norms else None)

    def _hold(self, latent: Tensor, decoder: Sequence[Layer] | nn.ModuleList, norms: Tensor | None) -> None:
        """Take these parts: parameters stay the same, tensors become parameters, a module is shared."""
        shared = isinstance(decoder, nn.ModuleList)
        check_latent(latent)
        check_decoder([(layer.weight, layer.bias) for layer in decoder] if shared else decoder, latent)
        if norms is not None:
            check_per_row("norms", norms, latent)
        self.latent = parameter(latent)
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

    def decode(self, ids: Tensor, padding_idx: int | None = None, norms: bool = True) -> Tensor:
        """The rows ``ids`` [...] of the matrix, [..., columns]; ``norms=False``: as long as the decoder makes them."""
        layers = [(layer.weight, layer.bias) for layer in self.decoder]
        return decoded_embedding(ids, self.latent, layers, self.norms if norms else None, padding_idx)

    @property
    def weight(self) -> Tensor:
        """[rows, columns], decoded anew at each reading; gradients flow to latent and decoder, from all rows."""
        return self.table()

    def table(self, norms: bool = True) -> Tensor:
        """All rows, as :meth:`decode` gives them."""
        return self.decode(torch.arange(self.latent.shape[0], device=self.latent.device), norms=norms)

    def factors(self, norms: bool = True) -> tuple[Tensor, Tensor] | None:
        """(a [rows, r], b [r, columns]) with a b the :meth:`table`, where the decoder is linear; else None.

        A bias is one more row of b, which every row has once. A norm scales a row of a by norm / length.
        """
        if len(self.decoder) > 1:
            return None
        (layer,) = self.decoder
        a, b = self.latent, layer.weight
        if layer.bias is not None:
            a, b = F.pad(a, (0, 1), value=1.0), torch.cat([b, layer.bias[None]])
        if norms and self.norms is not None:
            length = _lengths(a, b)
            a = a * (self.norms / torch.where(length == 0, 1, length).to(a.dtype))[:, None]
        return a, b


def _lengths(a: Tensor, b: Tensor) -> Tensor:
    """[rows] Euclidean lengths of the rows of a b, in float32 at least.

    Of many rows the product is not made: rows of a b are as long in an orthonormal basis of the rows of b, where they
    have r numbers. The basis may count as constant: to first order turning it changes no length.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    kind = a.device.type  # torch has no autocast for the meta device
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        a, b = a.to(wide), b.to(wide)
        if a.shape[0] > _MANY_ROWS * b.shape[1]:
            b = b @ torch.linalg.qr(b.detach().t()).Q
        return torch.linalg.vector_norm(a @ b, dim=1)


def parameter(tensor: Tensor) -> nn.Parameter:
    """``tensor`` itself where it is one, else a parameter of the same memory."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
