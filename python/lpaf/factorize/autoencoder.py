"""An autoencoder whose code and decoder stand in for a matrix (Banaei et al., 2023, section 3).

The rows x_i of a matrix W [n, m] are the examples. An encoder h gives each a latent row l_i = h(x_i) of k numbers, and
a decoder g rebuilds it: what is stored is the latent rows [n, k] and g (Figure 1a), and the encoder is dropped. The
loss is that of Eq. 2,

    (1 - beta) RMSE(W, W') + beta mean_i (1 - cos(x_i, x'_i)),

where rows may have weights w_i of mean 1, such as their Fisher information: the mean of w_i |x_i - x'_i|^2 / m is under
the root, that of w_i (1 - cos) is added. Where norms are kept, x'_i = |x_i| g(l_i) / |g(l_i)|; rows that an output
layer is tied to are compared as they are decoded even then, because that layer takes them so (``DecodedOutput``).

Sizes follow from one unit x, as the paper's do: latent x, hidden layers of the decoder 2x and then 4x, of the encoder
8x and then 4x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lpaf_kernels import decoded_embedding, weighted_svd

from ..processes import is_main

#: --decoder -> multiples of the unit x that the hidden layers of (decoder, encoder) have
DECODERS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "linear": ((), ()),
    "mlp1": ((2,), (8,)),
    "mlp2": ((2, 4), (8, 4)),
}
#: updates after which the loss of the whole matrix is looked at, and a checkpoint is written
WINDOW = 500
#: the learning rate halves so many times over a whole run
HALVINGS = 5
#: share by which the loss has to fall to count as better
PROGRESS = 1e-4

Layers = list[tuple[torch.Tensor, torch.Tensor | None]]


def decoder_params(columns: int, unit: int, decoder: str, bias: bool) -> int:
    """Numbers that a decoder from ``unit`` to ``columns`` holds."""
    widths = decoder_widths(columns, unit, decoder)
    return sum((inputs + bias) * outputs for inputs, outputs in pairwise(widths))


def decoder_widths(columns: int, unit: int, decoder: str) -> tuple[int, ...]:
    """Latent, hidden layers and output of a decoder."""
    return (unit, *(multiple * unit for multiple in DECODERS[decoder][0]), columns)


def stored_params(rows: int, columns: int, unit: int, decoder: str, norms: bool, bias: bool) -> int:
    """Numbers that stand in for a matrix [rows, columns]: latent rows, decoder, and norms where they are stored."""
    return rows * unit + decoder_params(columns, unit, decoder, bias) + (rows if norms else 0)


def largest_unit(rows: int, columns: int, budget: float, decoder: str, norms: bool, bias: bool) -> int:
    """The largest unit x whose numbers fit ``budget``; 0 if none does."""

    def fits(unit: int) -> bool:
        return stored_params(rows, columns, unit, decoder, norms, bias) <= budget

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class AutoencoderOptions:
    """How an autoencoder is built and trained.

    Args:
        decoder: "linear", "mlp1" or "mlp2": a decoder with none, one or two hidden layers. Default: linear.
        bias: whether its layers have a bias. Default: True.
        cosine: beta of Eq. 2, in [0, 1]. Default: 0.
        keep_norms: give every row the norm of its original. Default: False.
        tied: whether an output layer takes the rows as they are decoded, without their norms. Default: False.
        learning_rate: of Adam; it halves ``HALVINGS`` times over the run. Default: 5e-4.
        updates: at most so many. Default: 10,000.
        batch_size: rows per update. Default: 256.
        patience: stop after so many windows of ``WINDOW`` updates without a better loss. Default: 4.
        seed: of the first weights and the order of the rows. Default: 0.
    """

    decoder: str = "linear"
    bias: bool = True
    cosine: float = 0.0
    keep_norms: bool = False
    tied: bool = False
    learning_rate: float = 5e-4
    updates: int = 10_000
    batch_size: int = 256
    patience: int = 4
    seed: int = 0


@dataclass
class Decoded:
    """What stands in for a matrix: latent rows [n, k], the decoder's layers (weight [in, out], bias or None), norms [n]
    or None; and the loss after every window."""

    latent: torch.Tensor
    layers: Layers
    norms: torch.Tensor | None
    losses: list[float] = field(default_factory=list)

    def weight(self) -> torch.Tensor:
        """The matrix [n, m] that they stand for."""
        return self.decode(self.norms)

    def decode(self, norms: torch.Tensor | None) -> torch.Tensor:
        """The matrix with rows of these lengths, or as the decoder makes them."""
        rows = torch.arange(len(self.latent), device=self.latent.device)
        return decoded_embedding(rows, self.latent, self.layers, norms)

    def balanced(self) -> Decoded:
        """The same matrix; latent rows and a linear decoder share its singular values evenly, as the factors of a
        truncated SVD do. Else a learning rate that suits one of the two is too small for the other."""
        if len(self.layers) > 1:
            return self
        ((weight, bias),) = self.layers
        left, right = torch.linalg.qr(self.latent.double()), torch.linalg.qr(weight.t().double())
        u, s, v = torch.linalg.svd(left.R @ right.R.t())
        latent, weight = left.Q @ (u * s.sqrt()), (s.sqrt()[:, None] * v) @ right.Q.t()
        return replace(self, latent=latent.to(self.latent.dtype), layers=[(weight.to(self.latent.dtype), bias)])


class Autoencoder(nn.Module):
    """Encoder and decoder for rows of ``columns`` numbers; ``unit`` is the latent's size."""

    def __init__(self, columns: int, unit: int, options: AutoencoderOptions) -> None:
        super().__init__()
        hidden = [multiple * unit for multiple in DECODERS[options.decoder][1]]
        self.encoder = _linears((columns, *hidden, unit), bias=True)
        self.decoder = _linears(decoder_widths(columns, unit, options.decoder), options.bias)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Latent rows [b, k] of ``rows`` [b, m]."""
        for index, layer in enumerate(self.encoder):
            rows = layer(rows if index == 0 else nn.functional.leaky_relu(rows))
        return rows

    def layers(self) -> Layers:
        """The decoder as the operator takes it."""
        return [(layer.weight.t(), layer.bias) for layer in self.decoder]

    def decode(self, latent: torch.Tensor, norms: torch.Tensor | None) -> torch.Tensor:
        """Rows [b, m] of latent rows [b, k]; ``norms`` [b] are those that they are given."""
        rows = torch.arange(len(latent), device=latent.device)
        return decoded_embedding(rows, latent, self.layers(), norms)

    @torch.no_grad()
    def start_from_svd(self, weight: torch.Tensor, row_weights: torch.Tensor | None) -> None:
        """Begin a linear autoencoder at the best of all for RMSE: the (row-weighted) truncated SVD."""
        (encoder,), (decoder,) = self.encoder, self.decoder
        _, b = weighted_svd(weight, decoder.in_features, row_weights)
        basis = torch.linalg.qr(b.double().t()).Q.to(weight.dtype)  # of the right singular vectors, [m, k]
        encoder.weight.copy_(basis.t())
        decoder.weight.copy_(basis)
        for layer in (encoder, decoder):
            if layer.bias is not None:
                layer.bias.zero_()


def _linears(widths: tuple[int, ...], bias: bool) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(inputs, outputs, bias=bias) for inputs, outputs in pairwise(widths))


def reconstruction_loss(
    rows: torch.Tensor, rebuilt: torch.Tensor, cosine: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Eq. 2 of rows [b, m] and what stands in for them; ``weights`` [b] of the rows have a mean of 1 over the matrix.

    A row of zeros has no direction, and no cosine distance.
    """
    squared = (rows - rebuilt).square().mean(dim=1)
    if weights is not None:
        squared = weights * squared
    # a root has no gradient at 0, where everything is rebuilt exactly
    loss = (1.0 - cosine) * squared.mean().clamp_min(torch.finfo(rows.dtype).tiny).sqrt()
    if cosine:
        distance = torch.where(rows.norm(dim=1) > 0, 1.0 - torch.cosine_similarity(rows, rebuilt, dim=1), 0.0)
        loss = loss + cosine * (distance if weights is None else weights * distance).mean()
    return loss


class DivergedError(RuntimeError):
    """The loss is not a number any more."""


class AutoencoderTraining:
    """Trains the autoencoder of one matrix; resumes from ``checkpoint``.

    Args:
        weight: W [n, m], float32.
        unit: size of a latent row.
        row_weights: weights [n] of the rows in the loss, mean 1. Default: none.
        checkpoint: file that is written after every window, read when there is one, and removed at the end. Default:
            none.
        score: what is to fall, of what stands in for the matrix, such as a model's perplexity. Default: the loss.
        description: of the progress bar.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        unit: int,
        options: AutoencoderOptions,
        row_weights: torch.Tensor | None = None,
        checkpoint: Path | None = None,
        score: Callable[[Decoded], float] | None = None,
        description: str = "autoencoder",
    ) -> None:
        self.weight, self.options, self.checkpoint = weight, options, checkpoint
        self.row_weights, self.description = row_weights, description
        self.norms = weight.norm(dim=1) if options.keep_norms else None
        #: those of the rows that are compared
        self.compared_norms = None if options.tied else self.norms
        self.score = score or (lambda decoded: decoded.losses[-1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.model = Autoencoder(weight.shape[1], unit, options).to(weight.device)
        if options.decoder == "linear":
            self.model.start_from_svd(weight, None if row_weights is None else row_weights.sqrt())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=options.learning_rate)
        self.update, self.waited, self.best = 0, 0, math.inf
        self.losses: list[float] = []
        self.kept = self._copy()

    def run(self) -> Decoded:
        """Train until the updates are spent or nothing improves; what was best stands in for the matrix.

        Raises:
            DivergedError: the loss became NaN or infinite.
        """
        options = self.options
        self._resume()
        if not self.losses:
            self._look()
        batches = self._batches()
        with tqdm(
            total=options.updates,
            initial=self.update,
            desc=self.description,
            unit="update",
            delay=2,
            leave=False,
            disable=not is_main(),
        ) as bar:
            while self.update < options.updates and self.waited < options.patience:
                self._step(next(batches))
                bar.update()
                if self.update % WINDOW == 0 or self.update == options.updates:
                    self._look()
                    bar.set_postfix(loss=f"{self.losses[-1]:.4g}")
                    self._save()
        self.model.load_state_dict(self.kept)
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)
        return self._decoded().balanced()

    def _batches(self) -> Iterator[torch.Tensor]:
        """Numbers of the rows of every update that is left; a function of the seed and the update alone."""
        size = min(self.options.batch_size, len(self.weight))
        per_epoch = len(self.weight) // size
        generator, update, order = torch.Generator(), self.update, torch.empty(0)
        while True:
            epoch, place = divmod(update, per_epoch)
            if place == 0 or update == self.update:
                generator.manual_seed(self.options.seed * 1_000_003 + epoch)
                order = torch.randperm(len(self.weight), generator=generator)
            yield order[place * size : (place + 1) * size].to(self.weight.device)
            update += 1

    def _step(self, rows: torch.Tensor) -> None:
        rate = self.options.learning_rate * 0.5 ** (HALVINGS * self.update // self.options.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self._loss(rows).backward()
        self.optimizer.step()
        self.update += 1

    def _loss(self, rows: torch.Tensor) -> torch.Tensor:
        chosen = self.weight[rows]
        norms = None if self.compared_norms is None else self.compared_norms[rows]
        weights = None if self.row_weights is None else self.row_weights[rows]
        rebuilt = self.model.decode(self.model.encode(chosen), norms)
        return reconstruction_loss(chosen, rebuilt, self.options.cosine, weights)

    @torch.no_grad()
    def _look(self) -> None:
        """Note the loss of the whole matrix, and keep the autoencoder if it is the best so far."""
        rebuilt = self._decoded().decode(self.compared_norms)
        loss = float(reconstruction_loss(self.weight, rebuilt, self.options.cosine, self.row_weights))
        if not math.isfinite(loss):
            raise DivergedError(f"{self.description}: the loss is {loss} after {self.update} updates")
        self.losses.append(loss)
        score = self.score(self._decoded())
        if score < self.best - PROGRESS * abs(self.best) or self.best == math.inf:
            self.best, self.waited, self.kept = score, 0, self._copy()
        else:
            self.waited += 1

    @torch.no_grad()
    def _decoded(self) -> Decoded:
        layers = [
            (weight.detach().clone(memory_format=torch.contiguous_format), None if bias is None else bias.clone())
            for weight, bias in self.model.layers()
        ]
        return Decoded(self.model.encode(self.weight), layers, self.norms, list(self.losses))

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def _save(self) -> None:
        if self.checkpoint is None:
            return
        state: dict[str, Any] = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {name: getattr(self, name) for name in ("update", "waited", "best", "losses", "kept")}
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        staged = self.checkpoint.with_suffix(".staged")
        torch.save(state, staged)
        staged.replace(self.checkpoint)

    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, map_location=self.weight.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("update", "waited", "best", "losses", "kept"):
            setattr(self, name, state[name])
