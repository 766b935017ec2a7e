"""What LPAF rests on: first-order pruning lowers the rank of the matrices, zero-order pruning does not (Figure 2)."""

from __future__ import annotations

import copy

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, set_seed

from lpaf.evaluate.predict import predict
from lpaf.evaluate.spectra import numerical_rank, singular_values
from lpaf.models.targets import encoder_linears
from lpaf.prune import MagnitudePruner, MovementPruner, SensitivityPruner
from lpaf.retrain.objective import Objective
from lpaf.retrain.trainer import TrainOptions, train_stage
from tiny import sentences

#: wide enough for a tenth of a row, kept anywhere, to leave the rank nearly full
HIDDEN = 80
SHARES = (0.5, 0.25, 0.1)


def mean_rank(model) -> float:
    weights = {name: linear.weight for name, linear in encoder_linears(model).items()}
    ranks = [numerical_rank(values, tuple(weights[name].shape)) for name, values in singular_values(weights).items()]
    return sum(ranks) / len(ranks)


class Task:
    """The sentences of tiny.py, a small BERT fine-tuned on them, and ways to go on."""

    def __init__(self, tokenizer, directory, seed: int) -> None:
        self.tokenizer, self.directory, self.seed = tokenizer, directory, seed
        self.train, self.validation = self.rows(640, 1), self.rows(200, 2)
        torch.manual_seed(seed)
        config = BertConfig(
            hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=2 * HIDDEN,
            vocab_size=len(tokenizer), max_position_embeddings=32, pad_token_id=0,
        )  # fmt: skip
        self.dense = BertForSequenceClassification(config)
        self.fit(self.dense, epochs=4)

    def rows(self, count: int, seed: int) -> Dataset:
        found = sentences(count, seed)
        ids = self.tokenizer([row["sentence"] for row in found])["input_ids"]
        labels, lengths = [row["label"] for row in found], [len(row) for row in ids]
        masks = [[1] * length for length in lengths]
        return Dataset.from_dict({"input_ids": ids, "attention_mask": masks, "labels": labels, "length": lengths})

    def fit(self, model, epochs: int, pruner=None) -> None:
        set_seed(self.seed)
        options = TrainOptions(epochs, learning_rate=1e-3, batch_size=16, seed=self.seed)
        callbacks = [pruner.callback(options.updates(len(self.train)))] if pruner else []
        objective = Objective("classification")
        train_stage("fit", model, self.tokenizer, self.train, objective, options, self.directory, callbacks=callbacks)

    def accuracy(self, model) -> float:
        found = predict(model, self.validation, self.tokenizer).argmax(1)
        return float((found == torch.tensor(self.validation["labels"])).float().mean())

    def ranks(self, make_pruner) -> list[float]:
        """Mean rank after pruning to every share; a pruner that trains must leave a model that does its task."""
        found = []
        for share in SHARES:
            model, pruner = copy.deepcopy(self.dense), make_pruner(share)
            pruner.attach(model)
            if pruner.trains:
                self.fit(model, epochs=8, pruner=pruner)
            pruner.detach(model)
            assert not pruner.trains or self.accuracy(model) > 0.95
            found.append(mean_rank(model))
        return found


FIRST_ORDER = {
    "sensitivity": SensitivityPruner,
    # As in the papers: scores start at zero. From the weights' magnitude they keep what magnitude keeps.
    "movement": lambda share: MovementPruner(share, score_init=0.0),
}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_first_order_pruning_lowers_the_rank_and_magnitude_does_not(tiny_model, tmp_path, seed):
    task = Task(AutoTokenizer.from_pretrained(tiny_model), tmp_path, seed)
    assert task.accuracy(task.dense) > 0.95
    assert mean_rank(task.dense) > 0.99 * HIDDEN
    for make_pruner in FIRST_ORDER.values():
        half, quarter, tenth = task.ranks(make_pruner)
        assert half > quarter > tenth
        assert tenth < 0.8 * HIDDEN
    for rank in task.ranks(MagnitudePruner):
        assert rank > 0.95 * HIDDEN
