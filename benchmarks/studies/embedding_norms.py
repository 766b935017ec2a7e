"""Where norms help: perplexity with low-rank token embeddings that keep the norms of the dense ones, or do not.

    python -m benchmarks.studies.embedding_norms --model runs/mlm/model --data-dir runs/mlm/data

The embeddings of a masked language model are looked up, and give the logits of its tied output layer. Both uses take
the same truncated SVD of them, at the size that each compression ratio leaves; each use has its rows as they are
rebuilt, or lengthened to the norms of the dense ones. ("dense": the output layer keeps its own.)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from lpaf.data import get_task, load_task, tokenize
from lpaf.factorize.autoencoder import largest_unit
from lpaf.models.checkpoint import load_dense, load_tokenizer
from lpaf.report.study import markdown_table
from lpaf_kernels import weighted_svd

from .masked_lm import perplexity

#: what is looked up, and what the output layer has
USES = (
    ("rebuilt", "rebuilt"),
    ("norms", "rebuilt"),
    ("rebuilt", "norms"),
    ("norms", "norms"),
    ("rebuilt", "dense"),
    ("norms", "dense"),
)


def tables(weight: torch.Tensor, ratio: float) -> dict[str, torch.Tensor]:
    """The dense table [V, d], its truncated SVD within ``ratio``, and that with the dense norms."""
    rank = largest_unit(*weight.shape, weight.numel() / ratio, "linear", norms=False, bias=False)
    a, b = weighted_svd(weight, rank)
    rebuilt = a @ b
    lengths = weight.norm(dim=1) / rebuilt.norm(dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
    return {"dense": weight, "rebuilt": rebuilt, "norms": rebuilt * lengths[:, None]}


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a masked language model whose output layer is tied")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder with validation.txt and train.txt")
    parser.add_argument("--ratios", type=float, nargs="+", default=[3.0, 10.0, 25.0], help="compression ratios")
    parser.add_argument("--max-length", type=int, default=128, help="tokens of a block")
    arguments = parser.parse_args(argv)
    task = get_task("mlm")
    tokenizer = load_tokenizer(arguments.model)
    model, _ = load_dense(arguments.model, None, task.problem)
    data = load_task(task, data_dir=arguments.data_dir)
    validation = tokenize(data.validation[data.main_split], tokenizer, task, arguments.max_length)
    inputs, output = model.get_input_embeddings(), model.get_output_embeddings()
    weight = inputs.weight.detach().clone()
    output.weight = nn.Parameter(weight.clone())  # tied no more: each use has its own
    rows = []
    for looked_up, logits in USES:
        row = []
        for ratio in arguments.ratios:
            found = tables(weight, ratio)
            inputs.weight.copy_(found[looked_up])
            output.weight.copy_(found[logits])
            row.append(f"{perplexity(model, tokenizer, validation):.0f}")
        rows.append([looked_up, logits, *row])
    print(markdown_table(["looked up", "output layer", *(f"{ratio:g}x" for ratio in arguments.ratios)], rows))


if __name__ == "__main__":
    main()
