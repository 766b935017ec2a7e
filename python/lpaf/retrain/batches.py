"""Batches of similar length, in an order that depends on the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import BatchSampler, Sampler

from ..data.masking import NO_WORD
from ..data.tasks import RUNNING_TEXT_PROBLEMS, TOKEN_PROBLEMS
from ..data.texts import IGNORED
from ..models.outputs import PADDING


class LengthGroupedSampler(Sampler[int]):
    """Indices shuffled, then sorted by length inside groups of ``window`` batches, batches shuffled again.

    The order is a function of ``seed`` and ``epoch()``, so that a run resumed in the middle of an epoch sees the
    batches that the uninterrupted run would have seen.

    Args:
        lengths: length of every example.
        batch_size: examples per batch.
        seed: seed of the order.
        epoch: returns the number of the epoch that begins.
        window: batches sorted together. Default: 50.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int], window: int = 50
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch, self.window = lengths, batch_size, seed, epoch, window

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 10_007 + self.epoch())
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        span = self.batch_size * self.window
        batches = []
        for start in range(0, len(order), span):
            group = sorted(order[start : start + span], key=lambda index: self.lengths[index])
            batches += [group[at : at + self.batch_size] for at in range(0, len(group), self.batch_size)]
        short = (
            batches.pop(next(i for i, b in enumerate(batches) if len(b) < self.batch_size))
            if (len(order) % self.batch_size)
            else []
        )
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[index]
        yield from short


class BatchShare(Sampler[list[int]]):
    """What one of several processes takes of every batch, so that together they train on the batches of one process.

    Every n-th example, because a batch is sorted by length in parts. A last batch with fewer examples than processes
    leaves some without any: they run its first example and weigh it with 0.

    Args:
        sampler: the examples in their order, the same in every process.
        batch_size: examples of a whole batch.
        process, processes: which share, of how many.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, process: int = 0, processes: int = 1) -> None:
        self.batches = BatchSampler(sampler, batch_size, drop_last=False)
        self.process, self.processes = process, processes

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            yield batch[self.process :: self.processes] or batch[:1]

    def weight(self, index: int) -> float:
        """By what the mean over this share of batch ``index`` counts in the mean of all processes' means."""
        size = self.batches.batch_size
        whole = min(size, len(self.batches.sampler) - index * size)
        mine = len(range(self.process, whole, self.processes))
        return self.processes * mine / whole


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """int64 [B, T], with ``value`` after the end of a row."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


class Collator:
    """Pads a list of tokenised examples to the longest and stacks labels, teacher logits and indices.

    Args:
        tokenizer: pads ``input_ids`` and its companions.
        problem: labels become float32 for "regression", else int64. For "question-answering", where labels are
            positions and teacher logits are those of every position, starts before ends, padding goes to the end
            whatever the tokenizer prefers. So it does where labels are tokens, which are padded with ``IGNORED``;
            blocks of running text need no token for padding. Their ``words`` are padded with ``NO_WORD``.
    """

    def __init__(self, tokenizer: Any, problem: str) -> None:
        self.tokenizer, self.problem = tokenizer, problem

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = [name for name in self.tokenizer.model_input_names if name in examples[0]]
        spans = self.problem == "question-answering"
        rows = [{name: row[name] for name in names} for row in examples]
        if self.problem in RUNNING_TEXT_PROBLEMS:
            fills = {"input_ids": self.tokenizer.pad_token_id or 0, "attention_mask": 0}
            batch = {name: _padded([row[name] for row in rows], fill) for name, fill in fills.items()}
        else:
            side = "right" if spans or self.problem in TOKEN_PROBLEMS else None
            batch = dict(self.tokenizer.pad(rows, padding_side=side, return_tensors="pt"))
        if "labels" in examples[0] and self.problem in TOKEN_PROBLEMS:
            batch["labels"] = _padded([row["labels"] for row in examples], IGNORED)
        elif "labels" in examples[0]:
            dtype = torch.float32 if self.problem == "regression" else torch.int64
            batch["labels"] = torch.tensor([row["labels"] for row in examples], dtype=dtype)
        if "words" in examples[0]:
            batch["words"] = _padded([row["words"] for row in examples], NO_WORD)
        if "index" in examples[0]:
            batch["index"] = torch.tensor([row["index"] for row in examples])
        if "teacher_logits" in examples[0]:
            teacher = [torch.as_tensor(row["teacher_logits"], dtype=torch.float32) for row in examples]
            if spans:
                length = batch["input_ids"].shape[1]
                teacher = [row.view(2, -1) for row in teacher]
                teacher = [F.pad(row, (0, length - row.shape[1]), value=PADDING) for row in teacher]
            batch["teacher_logits"] = torch.stack(teacher)
        return batch
