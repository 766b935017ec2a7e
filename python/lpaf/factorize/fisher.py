"""Fisher information of weight matrices, by rows: how much the loss of single examples says about every output neuron
and every token.

The empirical Fisher information of a weight w over examples d with losses L(d) is the mean of (dL(d) / dw)^2 (Hsu et
al., 2022, FWSVD, Eq. 3): the gradient of every example is squared by itself, not that of a batch. Kept is its sum over
each row of a matrix, which is what row-weighted factorisation asks for (Eq. 4).

For a linear that sees the inputs x [T, m] of an example and gets the gradients g [T, n] of its outputs, the example's
gradient is g^T x; for an embedding it has g of every position in the row of its token. Both can be read off a batch of
examples, whose rows do not meet in the layers. Where a weight is used several times (word embeddings tied to the output
layer, layers that share their weights) the example's gradients add up before they are squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lpaf_kernels.ops.weighted_svd import ROW_WEIGHT_FLOOR

from ..models.targets import encoder_linears

Batch = Mapping[str, torch.Tensor]
#: a batch -> the loss of every example in it, [B]
Losses = Callable[[Batch], torch.Tensor]

#: entries of per-example gradients that are held at once, beside what a training step holds
ENTRIES = 1 << 23
#: by how much of a matrix's row sums what a batch and single examples give may differ: rounding and padding
AGREEMENT = 1e-3
#: names of :func:`transform_fisher`: powers x^a, logarithms, and x itself
FISHER_TRANSFORMS = ("x^0.1", "x^0.5", "x^0.9", "x^2", "log", "log+10", "raw")


def fisher_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> weight of the matrices whose Fisher information is kept: the word embeddings' [vocabulary, features] and
    every encoder linear's [out, in]."""
    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    return {name: embeddings.weight} | {name: linear.weight for name, linear in encoder_linears(model).items()}


@dataclass
class Use:
    """One use of a weight in a forward pass.

    Args:
        inputs: what entered: [B, ..., m] of a linear, or the tokens [B, ...] of an embedding.
        padding: the token whose row an embedding leaves without a gradient.
        grad: gradient of what left, [B, ..., n] of a linear, [B, ..., m] of an embedding; None before it is known.
    """

    inputs: torch.Tensor
    padding: int | None
    grad: torch.Tensor | None = None

    @property
    def reads(self) -> bool:
        """Whether rows were read by their numbers."""
        return not self.inputs.is_floating_point()


class SharedRowsError(ValueError):
    """What enters or leaves a matrix is not of one example each."""


class RowFisher:
    """Adds up the squared gradients of every example's loss over the batches given to :meth:`add` in a ``with`` block.

    By batches, beside what a training step without weight gradients holds, the inputs and output gradients of the
    matrices are kept for a moment, and ``ENTRIES`` entries of gradients. One example at a time, the gradient of the
    largest matrix; no module is looked into then, so that this way is right for every model.

    Args:
        model: in eval mode.
        losses: the loss of every example of a batch, each by its own example alone.
        batched: many examples at a time; see :func:`examples_separate` for when that is right.

    Attributes:
        sums: name of every matrix of :func:`fisher_weights` -> row sums, float64 [rows] on the model's device, of the
            squared gradients, summed over the examples. Those that share a weight have the same tensor.
        examples: how many.
    """

    def __init__(self, model: nn.Module, losses: Losses, batched: bool = True) -> None:
        self.model, self.losses, self.batched = model, losses, batched
        named = fisher_weights(model)
        self.totals = {
            weight: torch.zeros(len(weight), dtype=torch.float64, device=weight.device) for weight in named.values()
        }
        self.sums = {name: self.totals[weight] for name, weight in named.items()}
        self.examples = 0

    def __enter__(self) -> RowFisher:
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.requires_grad_(False)
        if self.batched:
            users = [module for module in self.model.modules() if getattr(module, "weight", None) in self.totals]
            self.handles = [module.register_forward_hook(self._see, with_kwargs=True) for module in users]
            return self
        for weight in self.totals:
            weight.grad = None
        self.handles = [
            weight.requires_grad_().register_post_accumulate_grad_hook(self._take) for weight in self.totals
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()
        self.model.requires_grad_(False)
        for parameter in self.trained:
            parameter.requires_grad_()

    def add(self, batch: Batch) -> torch.Tensor:
        """Add the examples of ``batch``, tensors [B, ...]; B is 1 unless ``batched``.

        Returns:
            Their losses [B].

        Raises:
            SharedRowsError: batched, and a matrix's rows are not those of one example each.
        """
        self.size = len(next(iter(batch.values())))
        if self.size != 1 and not self.batched:
            raise ValueError(f"batch: expected one example, got {self.size}")
        self.uses: dict[nn.Parameter, list[Use]] = {}
        with torch.enable_grad():
            losses = self.losses(batch)
            losses.sum().backward()
        for weight in list(self.uses):  # used also where no loss depends on it
            self._finish(weight)
        self.examples += self.size
        return losses.detach()

    # one example at a time --------------------------------------------------------------------------------------------

    def _take(self, weight: nn.Parameter) -> None:
        """The whole gradient of a weight, all its uses added up."""
        self.totals[weight] += squares(weight.grad, dim=1)
        weight.grad = None

    # a batch ----------------------------------------------------------------------------------------------------------

    def _see(self, module: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: torch.Tensor) -> Any:
        inputs = args[0] if args else next(iter(kwargs.values()))
        if len(inputs) % self.size or len(output) % self.size:
            raise SharedRowsError(f"{type(module).__name__}: {list(inputs.shape)} is not of {self.size} examples")
        use = Use(inputs.detach(), getattr(module, "padding_idx", None))
        self.uses.setdefault(module.weight, []).append(use)
        if output.requires_grad:
            output.register_hook(partial(self._arrive, module.weight, use))
            return None
        # Nothing before it has a gradient: here the graph begins, with a copy, for it may be written into.
        output = output.detach().requires_grad_()
        output.register_hook(partial(self._arrive, module.weight, use))
        return output.clone()

    def _arrive(self, weight: nn.Parameter, use: Use, grad: torch.Tensor) -> None:
        use.grad = grad
        if all(other.grad is not None for other in self.uses[weight]):
            self._finish(weight)

    @torch.no_grad()
    def _finish(self, weight: nn.Parameter) -> None:
        """Square the gradients of every example, all uses of the weight added up."""
        uses = [use for use in self.uses.pop(weight) if use.grad is not None]
        if uses:
            self.totals[weight] += row_squares(uses, self.size, tuple(weight.shape))


def squares(gradients: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """Sums of the squares over ``dim``, float64."""
    return torch.linalg.vector_norm(gradients, dim=dim, dtype=torch.float64).square()


def row_squares(uses: Sequence[Use], examples: int, shape: tuple[int, int]) -> torch.Tensor:
    """Row sums of the squared gradients of a weight [n, m], summed over the ``examples`` of a batch: float64 [n].

    Args:
        uses: all uses of the weight, one or more, their gradients known.
    """
    n, m = shape
    places, read = token_gradients([use for use in uses if use.reads], examples, shape)
    linear = [use for use in uses if not use.reads]
    total = torch.zeros(n, dtype=torch.float64, device=uses[0].grad.device)
    if not linear:
        return total.index_add_(0, places % n, squares(read, dim=1))
    # Uses one after another are as more positions of one: sum_u g_u^T x_u.
    grads = torch.cat([use.grad.reshape(examples, -1, n) for use in linear], dim=1)
    inputs = torch.cat([use.inputs.reshape(examples, -1, m) for use in linear], dim=1)
    if read is None and short(inputs.shape[1], shape):
        return short_row_squares(grads.double(), inputs.double())
    step = max(1, ENTRIES // (examples * m))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        gradient = grads[..., rows].mT @ inputs  # [B, rows, m]
        if read is not None:
            here = (places % n >= rows.start) & (places % n < rows.stop)
            gradient[places[here] // n, places[here] % n - rows.start] += read[here]
        total[rows] = squares(gradient, dim=(0, 2))
    return total


def short(length: int, shape: tuple[int, int]) -> bool:
    """Whether examples of ``length`` positions are so short that products of positions, in float64, cost less than the
    gradients of a weight [n, m]."""
    return 2 * length * sum(shape) <= math.prod(shape)


def short_row_squares(grads: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Row sums of the squares of g^T x, summed over examples, float64 [n], without forming g^T x.

    A row is sum_t g_ti x_t, its square sum_ts g_ti g_si <x_t, x_s> (Goodfellow, 2015, for one position). Where the
    positions cancel, rounding is that of what cancels: float64.

    Args:
        grads, inputs: g [B, T, n] and x [B, T, m], float64.
    """
    return ((inputs @ inputs.mT @ grads) * grads).sum(dim=(0, 1)).clamp_min(0.0)


def token_gradients(
    reads: Sequence[Use], examples: int, shape: tuple[int, int]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The rows of an embedding's per-example gradients that are not zero: (n times the example plus the row, int64 [R],
    each once; the gradients [R, m]); (None, None) without ``reads``."""
    if not reads:
        return None, None
    n, m = shape
    places, gradients = [], []
    for use in reads:
        tokens = use.inputs.reshape(examples, -1)
        kept = tokens != use.padding if use.padding is not None else torch.ones_like(tokens, dtype=torch.bool)
        first = n * torch.arange(examples, device=tokens.device)[:, None]
        places.append((first + tokens)[kept])
        gradients.append(use.grad.reshape(examples, -1, m)[kept])
    unique, place = torch.cat(places).unique(return_inverse=True)
    gradient = torch.cat(gradients)
    return unique, gradient.new_zeros(len(unique), m).index_add_(0, place, gradient)


def examples_separate(model: nn.Module, losses: Losses, together: Batch, alone: Sequence[Batch]) -> bool:
    """Whether what enters and leaves the matrices in a batch tells the gradients of its examples apart.

    It does not where an input serves all examples at once (DeBERTa's relative positions), where a weight is used
    by other than its module, or where a module scales what it gives. Found by comparing both ways.

    Args:
        model, losses: see :class:`RowFisher`.
        together: a batch of several examples, best of different lengths.
        alone: the same examples one by one.
    """
    batched, single = RowFisher(model, losses), RowFisher(model, losses, batched=False)
    try:
        with batched:
            batched.add(together)
    except SharedRowsError:
        return False
    with single:
        for batch in alone:
            single.add(batch)
    return all(
        bool((batched.sums[name] - rows).norm() <= AGREEMENT * rows.norm()) for name, rows in single.sums.items()
    )


# weights --------------------------------------------------------------------------------------------------------------


def relative_rows(rows: torch.Tensor) -> torch.Tensor:
    """Row sums [n] over their largest, float64, raised to at least ``ROW_WEIGHT_FLOOR``^2, so that no row vanishes: the
    floor that :func:`lpaf_kernels.weighted_svd` has for their roots.

    Raises:
        ValueError: not finite, negative, or zero everywhere.
    """
    rows = rows.double()
    if not (rows.isfinite() & (rows >= 0)).all() or not rows.any():
        raise ValueError("rows: expected finite numbers of 0 or more, not all 0")
    return (rows / rows.max()).clamp_min(ROW_WEIGHT_FLOOR**2)


def fisher_row_weights(rows: torch.Tensor) -> torch.Tensor:
    """Row weights d [n], float32 with maximum 1, from the Fisher information's row sums: their roots (Hsu et al., 2022,
    Eq. 4), so that the squared error is weighted by the sums. Rows without information get ``ROW_WEIGHT_FLOOR``."""
    return relative_rows(rows).sqrt().float()


def transform_fisher(rows: torch.Tensor, name: str) -> torch.Tensor:
    """Weights of a matrix's rows in a loss over rows: the Fisher information's row sums x under one of
    ``FISHER_TRANSFORMS``, float64 [n] with mean 1.

    - "x^0.1", "x^0.5", "x^0.9", "x^2": the power; "raw": x itself.
    - "log": log x + C. Of C the autoencoder paper (A.6) says that all weights are positive with it. Here C = -min log x
      + 1e-3 (max log x - min log x): the least row gets a thousandth of the spread, as in
      :func:`svd.score_row_weights`, and a change of x's unit changes nothing. All rows equal: weights 1.
    - "log+10": log x + C + 10.

    Rows are first raised to 1e-12 of the largest (:func:`relative_rows`), so that tokens that no example has keep a
    weight and a logarithm.

    The authors divide the weights of a batch by their sum, before a loss that is a mean over the batch ("+BN"): that
    shrinks the weighted terms by the size of the batch against unweighted ones. Mean 1 over the whole matrix instead
    keeps the balance of the loss's terms, and a row's weight does not depend on the batch it is in.

    Args:
        rows: row sums [n], finite, 0 or more, not all 0.

    Raises:
        ValueError: an unknown name, or other rows.
    """
    if name not in FISHER_TRANSFORMS:
        raise ValueError(f"name: expected one of {', '.join(FISHER_TRANSFORMS)}, got {name!r}")
    weights = relative_rows(rows)
    if name.startswith("x^"):
        weights = weights ** float(name.removeprefix("x^"))
    elif name != "raw":
        logs = weights.log()
        spread = logs.max() - logs.min()
        weights = logs - logs.min() + 1e-3 * spread + (10.0 if name == "log+10" else 0.0)
        if not spread > 0:
            weights = torch.ones_like(logs)
    return weights / weights.mean()
