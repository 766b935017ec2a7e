"""Offline compression: what stands in for chosen matrices, with no training of the model (Banaei et al., 2023).

Most methods give a matrix W [n, m] latent rows [n, k] and a decoder: truncated SVD, W = A B, has a linear one, with A
for the latent rows and B for the decoder; so has a linear autoencoder, whose rows' norms cost nothing, because they go
into the latent rows, except for embeddings that an output layer is tied to, which takes the rows without them. The
baselines have forms of their own (:mod:`.baselines`). Matrices of one role may be put on top of each other
("concatenated", section 4.2), to share what they can: a decoder, a Kronecker factor, the sides of a Tucker
decomposition; pruning then ranks the weights of all together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lpaf_kernels import weighted_svd

from ..errors import InputError
from ..models.modules import ModuleGroup
from ..models.reconstructed import Source
from .autoencoder import (
    DECODERS,
    AutoencoderOptions,
    AutoencoderTraining,
    Decoded,
    DivergedError,
    largest_unit,
    stored_params,
)
from .baselines import (
    BASELINES,
    kronecker,
    kronecker_params,
    kronecker_sizes,
    prune_l1,
    sparse_count,
    sparse_params,
    tucker,
    tucker_params,
    tucker_ranks,
)
from .fisher import FISHER_TRANSFORMS, fisher_row_weights, transform_fisher
from .svd import balance

#: methods that work on chosen modules
OFFLINE = ("svd", "fwsvd", "autoencoder", *BASELINES)
FISHER_TRANSFORM = "x^0.5"

#: what stands in for a matrix: it has ``weight()``
Part = Decoded | Source
#: (layers that are put together, rows and columns of each)
Stack = tuple[int, int, int]


@dataclass(frozen=True)
class ModuleSettings:
    """How the matrices of one group are compressed; every field but the last is an option of ``lpaf compress`` and an
    entry of a ``--module-settings`` file.

    Args:
        compression_ratio: size before over size after, above 1.
        concatenate: put the matrices of all layers on top of each other, to share a decoder. Default: False.
        decoder, cosine, keep_norms, module_lr, module_updates, module_batch, module_patience: see
            :class:`AutoencoderOptions`; for autoencoders.
        fisher_transform: what is done to the rows' Fisher information before it weighs an autoencoder's loss.

    Raises:
        InputError: a value out of its range.
    """

    compression_ratio: float
    concatenate: bool = False
    decoder: str = AutoencoderOptions.decoder
    cosine: float = AutoencoderOptions.cosine
    keep_norms: bool = AutoencoderOptions.keep_norms
    module_lr: float = AutoencoderOptions.learning_rate
    module_updates: int = AutoencoderOptions.updates
    module_batch: int = AutoencoderOptions.batch_size
    module_patience: int = AutoencoderOptions.patience
    fisher_transform: str = FISHER_TRANSFORM

    def __post_init__(self) -> None:
        if not (math.isfinite(self.compression_ratio) and self.compression_ratio > 1.0):
            raise InputError(f"--compression-ratio {self.compression_ratio:g}: must be above 1")
        if self.decoder not in DECODERS:
            raise InputError(f"--decoder {self.decoder}: expected one of {', '.join(DECODERS)}")
        if self.fisher_transform not in FISHER_TRANSFORMS:
            raise InputError(
                f"--fisher-transform {self.fisher_transform}: expected one of {', '.join(FISHER_TRANSFORMS)}"
            )
        if not 0.0 <= self.cosine <= 1.0:
            raise InputError(f"--cosine {self.cosine:g}: must be in [0, 1]")
        if not (math.isfinite(self.module_lr) and self.module_lr > 0):
            raise InputError(f"--module-lr {self.module_lr:g}: must be above 0")
        for name in ("module_updates", "module_batch", "module_patience"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one group.

    Args:
        group: its matrices.
        method: one of ``OFFLINE``.
        settings: how.
        seed: of the autoencoder.
        joint: whether its matrices are put together.
        sizes: matrix name -> size of what stands in for it: of a latent row; of the baselines what their functions
            say. Of a joint group the same for all.
    """

    group: ModuleGroup
    method: str
    settings: ModuleSettings
    seed: int
    joint: bool
    sizes: dict[str, Any] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether W is a product of two matrices."""
        return self.method not in BASELINES and (self.method != "autoencoder" or self.settings.decoder == "linear")

    @property
    def decoder(self) -> str:
        """Form of the decoder."""
        return "linear" if self.linear else self.settings.decoder

    @property
    def norms(self) -> bool:
        """Whether norms are stored: not where they go into the latent rows, as those of a linear decoder do unless an
        output layer takes the rows without them."""
        return self.settings.keep_norms and (self.group.tied or not self.linear)

    @property
    def stacks(self) -> dict[str, Stack]:
        """What is compressed at once: label -> its stack."""
        if self.joint:
            rows, columns = next(iter(self.group.shapes.values()))
            return {self.group.name: (len(self.group.shapes), rows, columns)}
        return {name: (1, *shape) for name, shape in self.group.shapes.items()}

    @property
    def stored(self) -> int:
        """Numbers of 4 bytes that stand in for the group's weights, rounded up."""
        sizes = self.sizes.values()
        return math.ceil(
            sum(self.params(stack, size) for stack, size in zip(self.stacks.values(), sizes, strict=False))
        )

    @property
    def ratio(self) -> float:
        """Size before over size after."""
        return self.group.params / self.stored

    def size(self, stack: Stack, budget: float) -> Any:
        """The largest size whose numbers fit ``budget``; None where none does."""
        layers, rows, columns = stack
        if self.method == "prune-l1":
            count, packed = sparse_count(rows, columns, budget / layers)
            return [count, packed] if count > 0 else None
        if self.method == "kronecker":
            return kronecker_sizes(layers * rows, columns, budget, layers)
        if self.method == "tucker":
            return tucker_ranks(layers, rows, columns, budget)
        unit = largest_unit(layers * rows, columns, budget, self.decoder, self.norms, bias=not self.linear)
        return (min(unit, layers * rows, columns) if self.linear else unit) or None

    def params(self, stack: Stack, size: Any) -> float:
        """Numbers of 4 bytes that stand in for a stack."""
        layers, rows, columns = stack
        if self.method == "prune-l1":
            return layers * sparse_params(rows, columns, *size)
        if self.method == "kronecker":
            return kronecker_params(size)
        if self.method == "tucker":
            return tucker_params(size, layers, rows, columns)
        return stored_params(layers * rows, columns, size, self.decoder, self.norms, bias=not self.linear)

    @property
    def autoencoder(self) -> AutoencoderOptions:
        """How its autoencoders are trained."""
        settings = self.settings
        return AutoencoderOptions(
            decoder=settings.decoder,
            bias=not self.linear,
            cosine=settings.cosine,
            keep_norms=settings.keep_norms,
            tied=self.group.tied,
            learning_rate=settings.module_lr,
            updates=settings.module_updates,
            batch_size=settings.module_batch,
            patience=settings.module_patience,
            seed=self.seed,
        )

    def record(self) -> dict[str, Any]:
        """What a report says of it."""
        return {
            "matrices": len(self.group.shapes),
            "weights": self.group.params,
            "stored": self.stored,
            "ratio": self.ratio,
            "form": self.method if self.method in BASELINES else f"{self.decoder} decoder",
            "size": next(iter(self.sizes.values())),
            "joint": self.joint,
            "norms": self.settings.keep_norms,
        }

    def to_json(self) -> dict[str, Any]:
        """What decides the numbers that stand in for its matrices, but the matrices and their Fisher information."""
        decided = {"group": self.group.name, "method": self.method, "joint": self.joint, "sizes": self.sizes}
        if self.method == "autoencoder":
            decided |= {"seed": self.seed, "settings": asdict(self.settings)}
        return decided


def plan_module(group: ModuleGroup, method: str, settings: ModuleSettings, seed: int) -> ModulePlan:
    """The most that ``settings.compression_ratio`` leaves a group.

    Raises:
        InputError: it leaves nothing, or the matrices cannot be put on top of each other.
    """
    joint = settings.concatenate and not group.embeds
    if joint and not group.joinable:
        shapes = sorted(set(group.shapes.values()))
        why = "is one matrix" if len(group.shapes) == 1 else f"has matrices of unlike shapes, such as {shapes[:2]}"
        raise InputError(f"--concatenate: {group.name} {why}, which cannot be put together; leave it out")
    if method == "autoencoder" and settings.cosine == 1.0 and (group.tied or not settings.keep_norms):
        what = "pass a smaller one" + ("" if group.tied else ", or --keep-norms")
        raise InputError(f"--cosine 1: compares the rows of {group.name} in all but their lengths; {what}")
    plan = ModulePlan(group, method, settings, seed, joint)
    for label, stack in plan.stacks.items():
        layers, rows, columns = stack
        weights = layers * rows * columns
        budget = weights / settings.compression_ratio
        size = plan.size(stack, budget)
        if size is None:
            least = next(cost for cost in range(1, weights + 1) if plan.size(stack, cost) is not None)
            raise InputError(
                f"--compression-ratio {settings.compression_ratio:g}: leaves {group.name} [{layers * rows}, {columns}] "
                f"{weights} / {settings.compression_ratio:g} = {budget:.0f} numbers, and the least that can stand in "
                f"for it takes {least}; pass at most {math.floor(weights / least * 100) / 100:g}"
            )
        plan.sizes.update(dict.fromkeys(group.shapes, size) if joint else {label: size})
    return plan


def compress_module(
    plan: ModulePlan,
    weights: Mapping[str, torch.Tensor],
    fisher: Mapping[str, torch.Tensor] | None = None,
    checkpoint: Path | None = None,
    score: Callable[[dict[str, Part]], float] | None = None,
) -> dict[str, Part]:
    """What stands in for every matrix of a group.

    Args:
        weights: matrix name -> [n, m].
        fisher: matrix name -> Fisher information of its rows [n], by which they are weighted; not for the baselines.
            Default: rows count alike.
        checkpoint: folder that a training continues from. Default: nothing is kept.
        score: what is to fall instead of an autoencoder's loss, such as the model's perplexity.

    Raises:
        InputError: the training diverged.
    """
    joined = {plan.group.name: list(weights)} if plan.joint else {name: [name] for name in weights}
    found: dict[str, Part] = {}
    for label, names in joined.items():
        matrices = [weights[name].float() for name in names]
        if plan.method in BASELINES:
            found |= dict(zip(names, _baseline(plan, matrices, plan.sizes[names[0]]), strict=True))
            continue
        rows = None if fisher is None else torch.cat([fisher[name] for name in names])
        lengths = [len(matrix) for matrix in matrices]
        scored = None if score is None else partial(_score_among, score, dict(found), names, lengths)
        decoded = _solve(plan, label, torch.cat(matrices), plan.sizes[names[0]], rows, checkpoint, scored)
        found |= _split(decoded, names, lengths)
    return found


def _baseline(plan: ModulePlan, matrices: list[torch.Tensor], size: Any) -> list[Source]:
    if plan.method == "prune-l1":
        return prune_l1(matrices, [tuple(size)] * len(matrices), plan.joint)
    return (kronecker if plan.method == "kronecker" else tucker)(matrices, tuple(size))


def _score_among(
    score: Callable[[dict[str, Part]], float],
    before: dict[str, Part],
    names: list[str],
    lengths: list[int],
    decoded: Decoded,
) -> float:
    return score(before | _split(decoded, names, lengths))


def _solve(
    plan: ModulePlan,
    label: str,
    weight: torch.Tensor,
    unit: int,
    fisher: torch.Tensor | None,
    checkpoint: Path | None,
    score: Callable[[Decoded], float] | None,
) -> Decoded:
    if plan.method != "autoencoder":
        a, b = balance(*weighted_svd(weight, unit, None if fisher is None else fisher_row_weights(fisher)))
        return Decoded(a, [(b, None)], None)
    row_weights = None
    if fisher is not None:
        row_weights = transform_fisher(fisher, plan.settings.fisher_transform).to(weight)
    file = None if checkpoint is None else checkpoint / f"{label}.pt"
    training = AutoencoderTraining(weight, unit, plan.autoencoder, row_weights, file, score, label)
    try:
        decoded = training.run()
    except DivergedError as error:
        raise InputError(f"--module-lr {plan.settings.module_lr:g}: {error}; pass a smaller one") from None
    return decoded if plan.norms else fold_norms(decoded)


def fold_norms(decoded: Decoded) -> Decoded:
    """The same matrix with the norms in the latent rows of a linear decoder, which then need no place of their own."""
    if decoded.norms is None:
        return decoded
    plain = Decoded(decoded.latent, decoded.layers, None, decoded.losses)
    length = plain.weight().norm(dim=1)
    scale = torch.where(length > 0, decoded.norms / length, 1.0)
    return Decoded(decoded.latent * scale[:, None], decoded.layers, None, decoded.losses)


def _split(decoded: Decoded, names: list[str], lengths: list[int]) -> dict[str, Decoded]:
    """What stands in for each of the matrices that were on top of each other; they have the same layers."""
    latents = decoded.latent.split(lengths)
    norms = [None] * len(names) if decoded.norms is None else decoded.norms.split(lengths)
    return {
        name: Decoded(latent, decoded.layers, norm, decoded.losses)
        for name, latent, norm in zip(names, latents, norms, strict=True)
    }


@torch.no_grad()
def relative_error(weight: torch.Tensor, other: torch.Tensor) -> float:
    """|W - W'|_F / |W|_F; 0 for a matrix of zeros."""
    return float((weight - other.to(weight)).norm() / weight.norm().clamp_min(torch.finfo(weight.dtype).tiny))
