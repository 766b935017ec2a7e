"""A masked language model with no network: the built-in MiniLM with a head that tells hidden words.

    python -m benchmarks.studies.masked_lm --text FOLDER/wikitext2 --body --output runs/mlm
    lpaf evaluate --task mlm --data-dir FOLDER/wikitext2 --model runs/mlm

The checkpoint of MiniLM is a sentence encoder without such a head. It gets BERT's (a dense layer, its norm, and a
decoder tied to the word embeddings), trained on train.txt of ``--text``; ``--body`` trains everything below as well.
The head starts with the words' frequencies as the bias of its decoder: what there is to know without looking at a
text takes no training. A run that was interrupted goes on with ``--resume``, to the same weights.

The perplexity before and after is that of ``--validation-blocks`` blocks of validation.txt. The model is for studies
of compression, whose methods need one whose perplexity means something; it is no good language model.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from torch import nn
from transformers import set_seed

from lpaf.data import get_task, load_task, sampled, tokenize
from lpaf.data.texts import IGNORED
from lpaf.errors import InputError
from lpaf.evaluate.metrics import compute_metrics
from lpaf.evaluate.predict import task_outputs
from lpaf.models.checkpoint import load_dense, load_tokenizer, save_model
from lpaf.models.device import resolve_device
from lpaf.recipes.fingerprints import weights_fingerprint
from lpaf.recipes.workspace import Workspace
from lpaf.retrain.objective import Objective
from lpaf.retrain.trainer import TrainOptions, train_stage

TASK = get_task("mlm")
STAGE = "masked-lm"


@torch.no_grad()
def bias_of_frequencies(model: nn.Module, blocks: Dataset) -> None:
    """Set the bias of the output of ``model`` to log((n + 1) / (N + V)) for tokens that occur n times among the N of
    ``blocks``: add-one smoothed relative frequencies."""
    decoder = model.get_output_embeddings()
    counts = torch.ones(decoder.out_features, dtype=torch.float64)
    for ids, labels in zip(blocks["input_ids"], blocks["labels"], strict=True):
        ids, labels = torch.tensor(ids), torch.tensor(labels)
        counts += torch.bincount(torch.where(labels == IGNORED, ids, labels), minlength=len(counts))
    decoder.bias.copy_((counts / counts.sum()).log())


def perplexity(model: nn.Module, tokenizer, blocks: Dataset) -> float:
    """Of the hidden words of ``blocks``."""
    return compute_metrics(TASK, *task_outputs(model, TASK, blocks, blocks, tokenizer, None))["perplexity"]


def make(
    text: Path,
    output: Path,
    body: bool = False,
    model: str = "minilm-l6",
    epochs: float = 4.0,
    learning_rate: float = 5e-4,
    batch_size: int = 16,
    max_length: int = 128,
    validation_blocks: int = 256,
    checkpoint_steps: int = 50,
    seed: int = 0,
    device: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, float]:
    """Write a masked language model to ``output``.

    Args:
        text: folder with train.* and validation.* as ``--task mlm`` reads them.
        body: train the word embeddings and layers too, not the head alone.
        model: a BERT, with or without a head.
        epochs, learning_rate, batch_size, seed: as in ``TrainOptions``.
        max_length: tokens of a block.
        validation_blocks: how many the perplexities are of, a seeded choice.
        checkpoint_steps: updates between checkpoints; 0 writes none.
        resume, overwrite: what to do about an interrupted run, or an output that is there.

    Returns:
        Perplexity "before" and "after" training, and the "seconds" of it (of a resumed run, of what was left).

    Raises:
        InputError: bad data, an output that is in the way, or another run's checkpoints.
    """
    data, target = load_task(TASK, data_dir=text), resolve_device(device)
    tokenizer = load_tokenizer(model)
    set_seed(seed)
    masked_lm, _ = load_dense(model, None, TASK.problem)
    train = tokenize(data.train, tokenizer, TASK, max_length)
    validation = tokenize(data.validation[data.main_split], tokenizer, TASK, max_length)
    validation = sampled(validation, validation_blocks, seed)
    settings = {"model": weights_fingerprint(model), "data": data.fingerprint, "body": body, "epochs": epochs}
    settings |= {"learning_rate": learning_rate, "batch_size": batch_size, "max_length": max_length, "seed": seed}
    workspace = Workspace(output, settings, resume, overwrite)
    bias_of_frequencies(masked_lm, train)
    masked_lm.to(target)
    found = {"before": perplexity(masked_lm, tokenizer, validation)}
    print(f"before: perplexity {found['before']:.1f} of {len(validation)} blocks", flush=True)
    masked_lm.base_model.requires_grad_(body)
    options = TrainOptions(epochs, learning_rate, batch_size, seed, checkpoint_steps=checkpoint_steps, device=target)
    start = time.perf_counter()
    train_stage(
        STAGE,
        masked_lm,
        tokenizer,
        train,
        Objective(TASK.problem),
        options,
        workspace.stage(STAGE),
        resume=workspace.resuming,
    )
    found["seconds"] = time.perf_counter() - start
    found["after"] = perplexity(masked_lm, tokenizer, validation)
    print(f"after: perplexity {found['after']:.1f}, {found['seconds']:.0f} s of training", flush=True)
    staged = workspace.directory / "output"
    save_model(masked_lm.eval(), tokenizer, staged)
    workspace.publish(staged)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder with train.txt and validation.txt")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--body", action="store_true", help="train the word embeddings and layers too")
    parser.add_argument("--model", default="minilm-l6", help="a BERT (default: the built-in MiniLM)")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a block")
    parser.add_argument("--validation-blocks", type=int, default=256, help="blocks that the perplexities are of")
    parser.add_argument("--checkpoint-steps", type=int, default=50, help="updates between checkpoints; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run of the same options")
    parser.add_argument("--overwrite", action="store_true", help="replace an output, or discard an interrupted run")
    try:
        make(**vars(parser.parse_args(arguments)))
    except InputError as error:
        print(f"masked_lm: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
