"""CAP: movement pruning that also learns by contrast (Xu et al., 2022, sections 3.2 to 3.5).

A sentence's representation is the last hidden state of its first token ([CLS]), L2-normalised: every encoder has it,
where a pooler is BERT's alone. Banks hold the representations of the whole training set from the pre-trained model,
from the fine-tuned model, and from snapshots of the model under pruning: one at the start of every epoch but the first,
in eval mode. For each of the three there is one loss: the representation of an example under pruning is pulled towards
its own in the bank (unsupervised), and towards those of its label (supervised; a regression has no labels, and so not
this term).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from ..evaluate.predict import run_over
from ..processes import exchange, from_main
from .movement import MovementPruner, PruningCallback
from .pruner import Surroundings
from .schedule import CubicSchedule

#: examples of the training set that a batch is contrasted with; of fewer, all
CANDIDATES = 4096


class ContrastivePruner(MovementPruner):
    """Movement pruning with 0.1 task loss + 0.9 distillation + contrastive losses.

    Args:
        keep, scope, warmup, cooldown, score_init: as for :class:`MovementPruner`.
        contrastive: weight of each contrastive loss, 0 or more. Default: 0.1.
        temperature: what cosines are divided by. Default: 0.1.
    """

    looks_back = True
    distill = 0.9

    def __init__(
        self,
        keep: float,
        scope: str = "matrix",
        warmup: float = 0.1,
        cooldown: float = 0.3,
        score_init: float = 0.0,
        contrastive: float = 0.1,
        temperature: float = 0.1,
    ) -> None:
        super().__init__(keep, scope, warmup, cooldown, score_init)
        if contrastive < 0:
            raise ValueError(f"contrastive: must be 0 or more, got {contrastive}")
        if not temperature > 0:
            raise ValueError(f"temperature: must be above 0, got {temperature}")
        self.contrastive, self.temperature = contrastive, temperature

    def look_around(self, surroundings: Surroundings) -> None:
        """Encode the training set by the pre-trained and by the fine-tuned model."""
        self.train, self.tokenizer = surroundings.train, surroundings.tokenizer
        dense = surroundings.dense
        classes = dense.config.num_labels > 1
        self.labels = torch.tensor(self.train["labels"]) if classes else None
        pretrained = copy.deepcopy(dense)
        pretrained.load_state_dict(surroundings.pretrained)
        self.banks = {"pretrained": [self.encode(pretrained)], "dense": [self.encode(dense)]}

    def encode(self, model: nn.Module) -> torch.Tensor:
        """The bank of ``model``: float32 [examples, hidden] on the CPU."""
        return encode(model, self.train, self.tokenizer)

    def callback(self, steps: int) -> ContrastiveCallback:
        """The Trainer callback that prunes, keeps the banks and makes the loss term."""
        return ContrastiveCallback(self, CubicSchedule(self.keep, steps, self.warmup, self.cooldown))


def representation(outputs: Any) -> torch.Tensor:
    """The first token's last hidden state, L2-normalised: float32 [B, hidden]."""
    return F.normalize(outputs.hidden_states[-1][:, 0].float(), dim=-1)


def encode(model: nn.Module, dataset: Any, tokenizer: Any, batch_size: int = 64) -> torch.Tensor:
    """Representations of a tokenised ``dataset`` in its order, in eval mode: float32 [examples, hidden] on the CPU."""

    def read(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return representation(model(**batch, output_hidden_states=True))

    rows, places = run_over(model, dataset, tokenizer, read, batch_size, "representations")
    bank = torch.cat(rows)
    return torch.empty_like(bank).index_copy_(0, places, bank)


def contrastive_loss(
    queries: torch.Tensor,
    keys: torch.Tensor,
    same_example: torch.Tensor,
    same_label: torch.Tensor | None,
    temperature: float,
) -> torch.Tensor:
    """Unsupervised plus supervised InfoNCE over one denominator, the mean over the queries.

    l_i = -mean over p in P(i) of log(exp(q_i k_p / T) / sum over all c of exp(q_i k_c / T)), once with the keys of the
    same example as P(i) and once with those of the same label.

    Args:
        queries: [B, hidden], normalised.
        keys: [C, hidden], normalised.
        same_example, same_label: bool [B, C], at least one True in every row; None leaves its term out.
    """
    logs = F.log_softmax(queries @ keys.T / temperature, dim=1)
    loss = logs.new_zeros(())
    for positives in (same_example, same_label):
        if positives is not None:
            loss = loss - ((logs * positives).sum(1) / positives.sum(1)).mean()
    return loss


def draw_candidates(batch: torch.Tensor, examples: int, limit: int, generator: torch.Generator) -> torch.Tensor:
    """Indices of the examples to contrast with: all up to ``limit``, else the batch's own and ``limit`` drawn ones."""
    if examples <= limit:
        return torch.arange(examples)
    return torch.cat((batch, torch.randint(examples, (limit,), generator=generator))).unique()


class ContrastiveCallback(PruningCallback):
    """Prunes by movement; takes a snapshot of the representations when an epoch begins; makes the loss term.

    Snapshots are written beside the stage's checkpoints, so that a resumed run has those of the epochs before.
    """

    def __init__(self, pruner: ContrastivePruner, schedule: CubicSchedule) -> None:
        super().__init__(pruner, schedule)
        self.snapshots: list[torch.Tensor] = []
        self.terms = (self.contrast,)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        super().on_step_begin(args, state, control, model=model, **kwargs)
        per_epoch = math.ceil(len(self.pruner.train) / (args.train_batch_size * args.world_size))
        for epoch in range(len(self.snapshots) + 1, state.global_step // per_epoch + 1):
            self.snapshots.append(self.snapshot(model, epoch, args, state))
        # The draws are a function of the step, so that a resumed run repeats them.
        self.generator = torch.Generator().manual_seed(args.seed * 1_000_003 + state.global_step)

    def snapshot(self, model: nn.Module, epoch: int, args: Any, state: Any) -> torch.Tensor:
        """The bank of the model as it was when ``epoch`` began."""
        file = Path(args.output_dir) / f"snapshot-{epoch}.safetensors"
        # The main process looks for all: the others must not wait for it in encode().
        kept = from_main(lambda: load_file(file)["bank"] if file.is_file() else None)
        if kept is not None:
            return kept
        bank = self.pruner.encode(model)
        if args.save_strategy != "no" and state.is_world_process_zero:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            save_file({"bank": bank}, temporary)
            temporary.replace(file)
        return bank

    def candidates(self, batch: torch.Tensor) -> torch.Tensor:
        """Indices of the examples to contrast with, the same in every process; ``batch`` is this process's share."""
        examples = len(self.pruner.train)
        if examples > CANDIDATES:  # else all, whatever the batch is
            batch = torch.cat(exchange(batch))
        return draw_candidates(batch, examples, CANDIDATES, self.generator)

    def contrast(self, model: nn.Module, outputs: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The three contrastive losses, by the bank they are against; no snapshots, no loss against them."""
        pruner, queries = self.pruner, representation(outputs)
        batch_index = batch["index"].cpu()
        index = self.candidates(batch_index)
        banks = dict(pruner.banks)
        if self.snapshots:
            banks["snapshots"] = self.snapshots
        losses = {}
        for name, held in banks.items():
            keys = torch.cat([bank[index] for bank in held]).to(queries.device)
            same_example = (batch_index[:, None] == index).repeat(1, len(held)).to(queries.device)
            same_label = None
            if pruner.labels is not None:
                same_label = pruner.labels[batch_index][:, None] == pruner.labels[index]
                same_label = same_label.repeat(1, len(held)).to(queries.device)
            loss = contrastive_loss(queries, keys, same_example, same_label, pruner.temperature)
            losses[f"contrast_{name}"] = pruner.contrastive * loss
        return losses
