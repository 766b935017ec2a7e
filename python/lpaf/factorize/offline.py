"""Offline compression: what stands in for chosen matrices, with no training of the model (Banaei et al., 2023).

Every method gives each matrix W [n, m] latent rows [n, k] and a decoder: truncated SVD, W = A B, has a linear one, with
A for the latent rows and B for the decoder; so has a linear autoencoder, whose rows' norms cost nothing, because they
go into the latent rows. Matrices of one role may be put on top of each other and share the decoder ("concatenated",
section 4.2).
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
from ..models.count import Shape
from ..models.modules import ModuleGroup
from .autoencoder import (
    DECODERS,
    AutoencoderOptions,
    AutoencoderTraining,
    Decoded,
    DivergedError,
    largest_unit,
    stored_params,
)
from .svd import balance

#: methods that work on chosen modules; "autoencoder" on nothing else
OFFLINE = ("svd", "fwsvd", "autoencoder")
FISHER_TRANSFORM = "x^0.5"


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
        joint: whether its matrices share a decoder.
        units: matrix name -> size of a latent row; of a joint group the same for all.
    """

    group: ModuleGroup
    method: str
    settings: ModuleSettings
    seed: int
    joint: bool
    units: dict[str, int] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether W is a product of two matrices."""
        return self.method != "autoencoder" or self.settings.decoder == "linear"

    @property
    def decoder(self) -> str:
        """Form of the decoder."""
        return "linear" if self.linear else self.settings.decoder

    @property
    def norms(self) -> bool:
        """Whether norms are stored: not where they go into the latent rows."""
        return self.settings.keep_norms and not self.linear

    @property
    def stored(self) -> int:
        """Numbers that stand in for the group's weights."""
        if self.joint:
            rows, columns = self.group.joint_shape
            return self._params((rows, columns), next(iter(self.units.values())))
        return sum(self._params(shape, self.units[name]) for name, shape in self.group.shapes.items())

    def _params(self, shape: Shape, unit: int) -> int:
        return stored_params(*shape, unit, self.decoder, self.norms, bias=not self.linear)

    @property
    def ratio(self) -> float:
        """Size before over size after."""
        return self.group.params / self.stored

    @property
    def autoencoder(self) -> AutoencoderOptions:
        """How its autoencoders are trained."""
        settings = self.settings
        return AutoencoderOptions(
            decoder=settings.decoder,
            bias=not self.linear,
            cosine=settings.cosine,
            keep_norms=settings.keep_norms,
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
            "decoder": self.decoder,
            "latent": max(self.units.values()),
            "joint": self.joint,
            "norms": self.settings.keep_norms,
        }

    def to_json(self) -> dict[str, Any]:
        """What decides the numbers that stand in for its matrices, but the matrices and their Fisher information."""
        decided = {"group": self.group.name, "method": self.method, "joint": self.joint, "units": self.units}
        if self.method == "autoencoder":
            decided |= {"seed": self.seed, "settings": asdict(self.settings)}
        return decided


def plan_module(group: ModuleGroup, method: str, settings: ModuleSettings, seed: int) -> ModulePlan:
    """The largest latent rows that ``settings.compression_ratio`` leaves a group.

    Raises:
        InputError: it leaves less than one number per row, or the matrices cannot be put on top of each other.
    """
    joint = settings.concatenate and not group.embeds
    if joint and not group.joinable:
        widths = sorted({columns for _, columns in group.shapes.values()})
        why = "is one matrix" if len(group.shapes) == 1 else f"has matrices of {', '.join(map(str, widths))} columns"
        raise InputError(f"--concatenate: {group.name} {why}, which cannot share a decoder; leave it out")
    plan = ModulePlan(group, method, settings, seed, joint)
    shapes = dict.fromkeys(group.shapes, group.joint_shape) if joint else group.shapes
    for name, (rows, columns) in shapes.items():
        budget = rows * columns / settings.compression_ratio
        least = plan._params((rows, columns), 1)
        unit = largest_unit(rows, columns, budget, plan.decoder, plan.norms, bias=not plan.linear)
        if unit < 1:
            raise InputError(
                f"--compression-ratio {settings.compression_ratio:g}: leaves {group.name} [{rows}, {columns}] "
                f"{rows * columns} / {settings.compression_ratio:g} = {budget:.0f} numbers, and latent rows of 1 with "
                f"their decoder already take {least}; pass at most {math.floor(rows * columns / least * 100) / 100:g}"
            )
        plan.units[name] = min(unit, rows, columns) if plan.linear else unit
    return plan


def compress_module(
    plan: ModulePlan,
    weights: Mapping[str, torch.Tensor],
    row_weights: Mapping[str, torch.Tensor] | None = None,
    checkpoint: Path | None = None,
    score: Callable[[dict[str, Decoded]], float] | None = None,
) -> dict[str, Decoded]:
    """What stands in for every matrix of a group.

    Args:
        weights: matrix name -> [n, m].
        row_weights: matrix name -> weights [n] of its rows in the squared error, mean 1 over what is compressed
            together. Default: none.
        checkpoint: folder that a training continues from. Default: nothing is kept.
        score: what is to fall instead of an autoencoder's loss, such as the model's perplexity.

    Raises:
        InputError: the training diverged.
    """
    joined = {plan.group.name: list(weights)} if plan.joint else {name: [name] for name in weights}
    found: dict[str, Decoded] = {}
    for label, names in joined.items():
        rows = None if row_weights is None else torch.cat([row_weights[name] for name in names])
        stacked = torch.cat([weights[name].float() for name in names])
        lengths = [len(weights[name]) for name in names]

        scored = None if score is None else partial(_score_among, score, dict(found), names, lengths)
        decoded = _solve(plan, label, stacked, plan.units[names[0]], rows, checkpoint, scored)
        found |= _split(decoded, names, lengths)
    return found


def _score_among(
    score: Callable[[dict[str, Decoded]], float],
    before: dict[str, Decoded],
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
    row_weights: torch.Tensor | None,
    checkpoint: Path | None,
    score: Callable[[Decoded], float] | None,
) -> Decoded:
    if plan.method != "autoencoder":
        a, b = balance(*weighted_svd(weight, unit, None if row_weights is None else row_weights.sqrt()))
        return Decoded(a, [(b, None)], None)
    file = None if checkpoint is None else checkpoint / f"{label}.pt"
    training = AutoencoderTraining(weight, unit, plan.autoencoder, row_weights, file, score, label)
    try:
        decoded = training.run()
    except DivergedError as error:
        raise InputError(f"--module-lr {plan.settings.module_lr:g}: {error}; pass a smaller one") from None
    return fold_norms(decoded) if plan.linear else decoded


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


def module_tensors(plan: ModulePlan, decoded: Mapping[str, Decoded]) -> dict[str, torch.Tensor]:
    """``decoded`` as named tensors, a shared decoder once; :func:`module_decoded` reads them."""
    tensors = {}
    for name, one in decoded.items():
        tensors[f"latent/{name}"] = one.latent
        if one.norms is not None:
            tensors[f"norms/{name}"] = one.norms
        tensors[f"losses/{name}"] = torch.tensor(one.losses, dtype=torch.float64)
        if plan.joint and f"weight/{plan.group.name}/0" in tensors:
            continue
        label = plan.group.name if plan.joint else name
        for index, (weight, bias) in enumerate(one.layers):
            tensors[f"weight/{label}/{index}"] = weight
            if bias is not None:
                tensors[f"bias/{label}/{index}"] = bias
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def module_decoded(plan: ModulePlan, tensors: Mapping[str, torch.Tensor]) -> dict[str, Decoded]:
    """What :func:`module_tensors` was given, on the CPU."""
    decoders: dict[str, list] = {}

    def decoder(label: str) -> list:
        if label not in decoders:
            count = 1 + len(DECODERS[plan.decoder][0])
            decoders[label] = [
                (tensors[f"weight/{label}/{index}"], tensors.get(f"bias/{label}/{index}")) for index in range(count)
            ]
        return decoders[label]

    return {
        name: Decoded(
            tensors[f"latent/{name}"],
            decoder(plan.group.name if plan.joint else name),
            tensors.get(f"norms/{name}"),
            tensors[f"losses/{name}"].tolist(),
        )
        for name in plan.group.shapes
    }
