"""nn.Linear whose weight is stored as latent rows and a decoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._checks import check_integer
from ..ops.decoded_embedding import Layer, check_decoder, check_per_row
from ..ops.lowrank_sparse_linear import lowrank_sparse_linear
from ._decoded import DecodedMatrix, parameter
from .lowrank_sparse_linear import LowRankSparseLinear


class DecodedLinear(DecodedMatrix):
    """nn.Linear whose weight's rows, its output neurons, are decoded from a latent row each.

    :func:`decoded_embedding` has the equation. A linear decoder makes a low-rank weight: the layer then runs as
    :func:`lowrank_sparse_linear`, and only norms need its rows, for their lengths. With hidden layers every forward
    decodes the weight. Either way gradients reach latent, decoder and bias.

    Parameters: latent [out, k], decoder.N.weight [in, out], decoder.N.bias [out], bias [out]. Buffer, where norms are
    kept: norms [out], which training leaves as they are. Matrices that were compressed together ("concatenated") share
    ``decoder``, a module, and each has its own rows of latent and norms: see :meth:`from_parts`.

    Source: the offline compression of pretrained transformers by autoencoders, section 3.

    Args:
        in_features, out_features, bias, device, dtype: as for nn.Linear.
        latent_dim: k.
        hidden: widths of none (a linear decoder), one or two hidden layers.
        decoder_bias: whether the decoder's layers have one.
        norms: whether rows are given stored lengths (1 at first).

    Raises:
        TypeError, ValueError: sizes that are no integers of at least 1, more than two hidden layers.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        latent_dim: int,
        hidden: Sequence[int] = (),
        bias: bool = True,
        decoder_bias: bool = True,
        norms: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"out_features": out_features, "in_features": in_features}
        super().__init__(sizes, latent_dim, hidden, decoder_bias, norms, device, dtype)
        own = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own)
        self.reset_parameters()

    @classmethod
    def from_parts(
        cls,
        latent: Tensor,
        decoder: Sequence[Layer] | nn.ModuleList,
        norms: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> DecodedLinear:
        """The layer of these tensors; nothing is copied.

        Args:
            latent: [out, k]; a parameter stays the same parameter, a tensor becomes one.
            decoder: pairs (weight, bias or None) likewise, as :func:`decoded_embedding` takes them, or the ``decoder``
                of another layer, to be shared with it.
            norms: [out] or None.
            bias: [out] or None, likewise.

        Raises:
            TypeError, ValueError: as :func:`decoded_embedding`; a bias of another length.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._hold(latent, decoder, norms)
        if bias is not None:
            check_per_row("bias", bias, latent)
        layer.register_parameter("bias", None if bias is None else parameter(bias))
        return layer

    def reset_parameters(self) -> None:
        """As the parts of a DecodedEmbedding, the bias as nn.Linear."""
        super().reset_parameters()
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features)
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.decoder[-1].weight.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.latent.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        factors = self.factors()
        if factors is None:
            return F.linear(x, self.weight, self.bias)
        a, b = factors
        return lowrank_sparse_linear(x, b.t(), a.t(), bias=self.bias)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """The nn.Linear of the decoded weight (everything copied)."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(self.weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    @torch.no_grad()
    def to_lowrank(self) -> LowRankSparseLinear:
        """The low-rank layer of the same function, of rank k, with a decoder's bias k + 1 (everything copied).

        Raises:
            ValueError: a decoder with hidden layers.
        """
        factors = self.factors()
        if factors is None:
            raise ValueError(f"decoder: expected a linear one, got {len(self.decoder)} layers")
        return LowRankSparseLinear.from_factors(*factors, self.bias).train(self.training)

    def extra_repr(self) -> str:
        """Sizes and which biases and norms there are."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, latent_dim={self.latent.shape[1]},"
            f" bias={self.bias is not None}, norms={self.norms is not None}"
        )


class SharedDecodedLinear(DecodedLinear):
    """A DecodedLinear whose decoder is that of another layer: matrices that were compressed together store it once.

    ``owner`` is held beside the modules, not among them: the state_dict of a model that holds both layers has the
    decoder under the owner's name alone, and a copy of that model keeps the two together.

    Parameters: latent [out, k], bias [out]. Buffer, where norms are kept: norms [out].

    Args:
        owner: the layer that stores the decoder; not shared itself.
        out_features, bias, norms, device, dtype: as for :class:`DecodedLinear`.

    Raises:
        TypeError, ValueError: another kind of owner, or sizes that are no integers of at least 1.
    """

    def __init__(
        self,
        owner: DecodedLinear,
        out_features: int,
        bias: bool = True,
        norms: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("out_features", out_features, 1, None)
        like = {"device": device, "dtype": dtype}
        self._share(
            owner,
            torch.empty(out_features, owner.latent.shape[1], **like),
            torch.ones(out_features, **like) if norms else None,
            torch.zeros(out_features, **like) if bias else None,
        )
        nn.init.normal_(self.latent)

    @classmethod
    def of(
        cls, owner: DecodedLinear, latent: Tensor, norms: Tensor | None = None, bias: Tensor | None = None
    ) -> SharedDecodedLinear:
        """The layer of these tensors, not copied, with ``owner``'s decoder: latent [out, k], norms and bias [out]."""
        check_decoder([(layer.weight, layer.bias) for layer in owner.decoder], latent)
        layer = cls.__new__(cls)
        layer._share(owner, latent, norms, bias)
        return layer

    def _share(self, owner: DecodedLinear, latent: Tensor, norms: Tensor | None, bias: Tensor | None) -> None:
        if not isinstance(owner, DecodedLinear) or isinstance(owner, SharedDecodedLinear):
            raise TypeError(f"owner: expected a DecodedLinear that is not shared, got {type(owner).__name__}")
        nn.Module.__init__(self)
        # nn.Module would register it.
        object.__setattr__(self, "owner", owner)
        for name, values in (("norms", norms), ("bias", bias)):
            if values is not None:
                check_per_row(name, values, latent)
        self.latent = parameter(latent)
        self.register_buffer("norms", None if norms is None else norms.detach())
        self.register_parameter("bias", None if bias is None else parameter(bias))

    @property
    def decoder(self) -> nn.ModuleList:
        """The owner's."""
        return self.owner.decoder
