"""The training loss: task, logit distillation, and consistency between two passes (LPAF sections 4.3 and 5.1.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..data.tasks import TOKEN_PROBLEMS
from ..data.texts import IGNORED


def distillation_loss(logits: torch.Tensor, teacher: torch.Tensor, problem: str, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) at temperature T over rows [R, C], mean squared error for regression [B, 1]."""
    if problem == "regression":
        return F.mse_loss(logits, teacher)
    student = F.log_softmax(logits / temperature, dim=-1)
    target = F.log_softmax(teacher / temperature, dim=-1)
    return F.kl_div(student, target, log_target=True, reduction="batchmean") * temperature**2


def consistency_loss(first: torch.Tensor, second: torch.Tensor, problem: str) -> torch.Tensor:
    """Eq. 14: symmetric KL between two passes' distributions [R, C], mean squared error for regression."""
    if problem == "regression":
        return F.mse_loss(first, second)
    p, q = F.log_softmax(first, dim=-1), F.log_softmax(second, dim=-1)
    forward = F.kl_div(p, q, log_target=True, reduction="batchmean")
    backward = F.kl_div(q, p, log_target=True, reduction="batchmean")
    return 0.5 * (forward + backward)


def _rows(logits: torch.Tensor) -> torch.Tensor:
    """One row per decision: [B, C] as it is, [B, 2, T] as [2 * B, T], [B, T, V] as [B * T, V]."""
    return logits.flatten(0, -2)


def example_losses(logits: torch.Tensor, labels: torch.Tensor, problem: str) -> torch.Tensor:
    """-log P(labels) of every example in nats, at least float32 [B]: what the task loss is a mean of, summed over an
    example's decisions (start and end of an answer; the tokens that have labels). Squared error for regression: -log P
    of a Gaussian of variance 1/2, up to a constant.

    Args:
        logits: [B, C], [B, 2, T] or [B, T, V]; see :class:`Objective`.
        labels: [B], [B, 2], or [B, T] with ``IGNORED`` where there is none.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if problem == "regression":
        return (logits.squeeze(-1) - labels).square()
    losses = F.cross_entropy(_rows(logits), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(len(labels), -1).sum(dim=1)


@dataclass(frozen=True)
class Objective:
    """Which terms a training stage adds up.

    loss = task * task + distill * distillation + consistency * consistency, with task = 1 - distill unless given

    A question is two classifications over the positions of its window, start and end: all terms are means over both.
    Where labels are tokens, every position that has one is a classification over the vocabulary: all terms are means
    over the tokens of the batch, so that long texts weigh more than short ones; without any label all are 0.

    Args:
        problem: "regression" (mean squared error), or another (cross entropy).
        distill: weight of logit distillation; needs teacher logits. Default: 0.
        temperature: softmax temperature of the distillation. Default: 2.
        consistency: weight of the consistency term; above 0 every batch runs twice. Default: 0.
        task: weight of the task loss. Default: 1 - ``distill``, which is in [0, 1] then.
    """

    problem: str
    distill: float = 0.0
    temperature: float = 2.0
    consistency: float = 0.0
    task: float | None = None

    @property
    def passes(self) -> int:
        """Forward passes per batch."""
        return 2 if self.consistency > 0 else 1

    def task_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.problem == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)

    def __call__(
        self, logits: torch.Tensor, labels: torch.Tensor, teacher: torch.Tensor | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and its parts.

        Args:
            logits: [passes * B, C], [passes * B, 2, T] for question answering (``models.outputs.task_logits``),
                [passes * B, T, V] for tokens, or [passes * R, V] for the R tokens that have labels.
            labels: [B], [B, 2], [B, T] with ``IGNORED`` where there is none, or [R].
            teacher: logits [B, C], [B, 2, T], [B, T, V] or [R, V], or None without distillation.
        """
        outputs, labels = _rows(logits).chunk(self.passes), labels.flatten()
        labelled = labels != IGNORED
        if self.problem in TOKEN_PROBLEMS and not labelled.any():
            return self.nothing(outputs)
        if self.problem in TOKEN_PROBLEMS and not labelled.all():
            outputs, labels = [output[labelled] for output in outputs], labels[labelled]
            teacher = None if teacher is None else _rows(teacher)[labelled]
        outputs = [output.float() for output in outputs]
        loss = torch.stack([self.task_loss(output, labels) for output in outputs]).mean()
        parts = {"task": loss.detach()}
        if self.distill > 0:
            if teacher is None:
                raise ValueError("distill: needs the teacher's logits in every batch")
            target = _rows(teacher).float()
            terms = [distillation_loss(output, target, self.problem, self.temperature) for output in outputs]
            distilled = torch.stack(terms).mean()
            parts["distillation"] = distilled.detach()
            loss = (1 - self.distill if self.task is None else self.task) * loss + self.distill * distilled
        if self.passes == 2:
            consistent = consistency_loss(*outputs, self.problem)
            parts["consistency"] = consistent.detach()
            loss = loss + self.consistency * consistent
        return loss, parts

    def nothing(self, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Loss and parts of a batch without labels: 0, with gradients of 0 for all that made the ``outputs``."""
        loss = 0.0 * torch.stack([output.float().sum() for output in outputs]).sum()
        wanted = {"task": True, "distillation": self.distill > 0, "consistency": self.passes == 2}
        return loss, {name: loss.detach() for name, asked in wanted.items() if asked}
