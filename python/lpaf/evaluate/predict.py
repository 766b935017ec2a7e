"""Run a classifier over a tokenised dataset."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..processes import exchange, is_main, my_share
from ..retrain.batches import Collator


@torch.no_grad()
def predict(
    model: nn.Module, dataset: Dataset, tokenizer: Any, batch_size: int = 64, description: str = "evaluate"
) -> torch.Tensor:
    """Logits of every example, in the dataset's order.

    Batches are made of examples of similar length, so that little is spent on padding. Many processes share the batches
    out and end with all logits, those that one process would have found.

    Args:
        dataset: tokenised examples with a ``length`` column.

    Returns:
        float32 logits [len(dataset), C] on the CPU.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    collate = Collator(tokenizer, problem="classification")
    inputs = dataset.select_columns([name for name in tokenizer.model_input_names if name in dataset.column_names])
    order = sorted(range(len(dataset)), key=dataset["length"].__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rows: list[torch.Tensor] = []
    for indices in tqdm(my_share(batches), desc=description, unit="batch", delay=2, leave=False, disable=not is_main()):
        batch = collate([inputs[index] for index in indices])
        rows.append(model(**{name: value.to(device) for name, value in batch.items()}).logits.float().cpu())
    model.train(was_training)
    shares = exchange(rows)
    logits = torch.cat([shares[i % len(shares)][i // len(shares)] for i in range(len(batches))])
    return torch.empty_like(logits).index_copy_(0, torch.tensor(order), logits)
