"""A task's checked examples, as every source of data returns them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from datasets import Dataset

from .tasks import QUESTION_ANSWERING, REGRESSION, TaskSpec

#: the split of ``--test-file``: scored like validation, but no part of it
TEST = "test"


@dataclass(frozen=True)
class TaskData:
    """A task's examples, checked.

    Every dataset has the task's text columns (str) and ``label``: int64 index into ``labels``, or float64 for
    regression. For question answering it has ``squad.FEATURES``; for summarisation the texts and the summaries, for
    language modelling ``text``, one row per document.

    Args:
        spec: the task.
        train: training examples, or None when only validation was asked for.
        validation: split name -> examples, in the task's order; the first is the main one. ``TEST`` is the last,
            where there is one.
        labels: class names in the order of their indices, or None for the other problems.
        num_labels: size of the model's output: number of classes, 1 for regression, 2 (start and end) for question
            answering, 0 for problems whose output is the model's vocabulary.
        fingerprint: sha256 of task, labels and every example, as 64 hexadecimal digits; equal on every
            machine.
    """

    spec: TaskSpec
    train: Dataset | None
    validation: dict[str, Dataset]
    labels: tuple[str, ...] | None
    num_labels: int
    fingerprint: str

    @property
    def main_split(self) -> str:
        """Name of the validation split that stands for the task."""
        return next(iter(self.validation))


def make_task_data(
    spec: TaskSpec, train: Dataset | None, validation: dict[str, Dataset], labels: tuple[str, ...] | None
) -> TaskData:
    """A ``TaskData`` with its fingerprint worked out."""
    digest = hashlib.sha256(json.dumps([spec.name, labels]).encode())
    for name, split in {"train": train, **validation}.items():
        if split is not None:
            digest.update(json.dumps([name, split.column_names, len(split)]).encode())
            for column in split.column_names:
                digest.update(json.dumps(list(split[column])).encode())
    outputs = {REGRESSION: 1, QUESTION_ANSWERING: 2}.get(spec.problem) or len(labels or ())
    return TaskData(spec, train, validation, labels, outputs, digest.hexdigest())
