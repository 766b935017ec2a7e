"""Fisher information of a run: which examples it is computed on, the file it is kept in, and what it may be asked for
with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import InputError
from ..evaluate.predict import default_batch, run_over
from ..factorize.fisher import RowFisher, examples_separate
from ..models.outputs import forward_inputs, task_logits
from ..processes import from_main, process_place, say
from ..retrain.batches import Collator
from ..retrain.objective import example_losses
from .fingerprints import content_fingerprint
from .options import COMPUTE, FISHER_OPTIONS, CompressOptions, given_flags
from .workspace import check_new_file

#: training examples that the Fisher information is computed on when ``--fisher-samples`` is silent
SAMPLES = 256
#: layout of the file
SCHEMA = 1
#: key of the file's metadata: what the information is of, as JSON
METADATA = "lpaf_fisher"


def check_fisher(options: CompressOptions, weighs: bool, may: bool = False) -> None:
    """InputError for options of Fisher information that the run would ignore, or a file that cannot be written.

    Args:
        weighs: whether the method weighs rows by Fisher information.
        may: whether it does where ``--fisher`` asks for it.
    """
    if may and options.fisher is None:
        for name in given_flags(options, FISHER_OPTIONS):
            raise InputError(f"{name}: is for Fisher information; pass --fisher FILE or {COMPUTE} as well")
        return
    if not (weighs or may):
        for name in given_flags(options, FISHER_OPTIONS):
            raise InputError(
                f"{name}: --method {options.method} has no use for Fisher information; leave it out, or pass "
                "--method fwsvd"
            )
        return
    for name in given_flags(options, ("weighting",)):
        raise InputError(f"{name}: --method {options.method} weighs rows by their Fisher information; leave it out")
    if options.fisher_file is not None:
        for name in given_flags(options, ("fisher_samples", "save_fisher")):
            raise InputError(f"{name}: --fisher {options.fisher} leaves nothing to compute; pass --fisher {COMPUTE}")
    if options.save_fisher is not None:
        path, output = Path(options.save_fisher), Path(options.output)
        if output.absolute() in path.absolute().parents:
            raise InputError(f"--save-fisher {path}: lies in --output, which is made as a whole; pass another place")
        # an interrupted run may have written it
        check_new_file(path, options.overwrite or options.resume, flag="--save-fisher")


def fisher_fingerprint(options: CompressOptions) -> str | None:
    """Content of the file of Fisher information, which decides the factors; None where it is computed."""
    path = options.fisher_file
    return None if path is None else content_fingerprint([Path(path)])


def row_fisher(
    model: nn.Module, encoded: Dataset, tokenizer: Any, problem: str, batch_size: int | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Row sums of the empirical Fisher information of ``model``'s encoder linears and word embeddings, and a record.

    The loss of an example is -log P of its labels (:func:`example_losses`): of a text that of all its labelled tokens
    together, since the information of independent observations adds up. Many processes share the batches of one and
    add up.

    Args:
        encoded: tokenised examples with ``labels``; no others are read.
        problem: that of the task.
        batch_size: examples whose gradients are computed at once, on models where a batch tells them apart. Default: a
            quarter of evaluation's.

    Returns:
        (matrix name -> float64 [rows], mean over the examples of the row sums of the squared gradients; the numbers of
        examples and tokens, the mean loss in nats, and whether gradients were computed by batches).

    Raises:
        InputError: gradients that are not finite, or zero everywhere in a matrix.
    """
    device, collate = next(model.parameters()).device, Collator(tokenizer, problem)

    def losses(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        outputs = model(**forward_inputs(model, batch))
        return example_losses(task_logits(outputs, batch.get("attention_mask")), batch["labels"], problem)

    def batched() -> bool:
        """Compared on the shortest and the longest example."""
        lengths = list(encoded["length"])
        places = [min(range(len(lengths)), key=lengths.__getitem__), max(range(len(lengths)), key=lengths.__getitem__)]
        rows = [encoded[place] for place in places]
        batches = [collate(part) for part in (rows, rows[:1], rows[1:])]
        batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
        return examples_separate(model, losses, batches[0], batches[1:])

    was_training = model.training
    model.eval()
    by_batches = from_main(batched)
    if not by_batches:
        say("fisher: a batch does not tell this model's examples apart; their gradients are computed one by one")
    size = (batch_size or max(1, default_batch(problem) // 4)) if by_batches else 1
    with RowFisher(model, losses, by_batches) as fisher:
        found, _ = run_over(model, encoded, tokenizer, fisher.add, size, "fisher", problem, labelled=True)
    model.train(was_training)
    totals = {id(total): total for total in fisher.sums.values()}  # matrices that share a weight share the tensor
    for total in totals.values():
        if process_place()[1] > 1:
            dist.all_reduce(total)
        total /= len(encoded)
    for name, rows in fisher.sums.items():
        wrong = fault(rows, len(rows))
        if wrong:
            raise InputError(
                f"--fisher {COMPUTE}: the squared gradients of {name} on {len(encoded)} examples: {wrong}; check "
                "--model, or pass more --fisher-samples"
            )
    record = {
        "examples": len(encoded),
        "tokens": sum(encoded["length"]),
        "loss": float(torch.cat(found).double().mean()),
        "batched": by_batches,
    }
    say(f"fisher: {record['examples']} examples, {record['tokens']} tokens, mean loss {record['loss']:.4f}")
    return {name: rows.cpu() for name, rows in fisher.sums.items()}, record


def fault(rows: torch.Tensor, size: int) -> str | None:
    """What row sums of a matrix with ``size`` rows must be and are not; None where nothing is wrong."""
    if list(rows.shape) != [size]:
        return f"expected shape [{size}], a sum for every row of the matrix, got {list(rows.shape)}"
    if not rows.is_floating_point():
        return f"expected floating-point numbers, got {str(rows.dtype).removeprefix('torch.')}"
    for wrong, expected in ((~rows.isfinite(), "finite numbers"), (rows < 0, "numbers of 0 or more")):
        if wrong.any():
            row = int(wrong.nonzero()[0])
            return f"expected {expected}, got {float(rows[row]):g} in row {row}"
    if not rows.any():
        return "expected a number above 0 in some row, got 0 in all"
    return None


def save_fisher(path: Path, rows: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
    """Write row sums as safetensors: matrix name -> float64 [rows], and ``record`` as JSON in the metadata.

    The file appears in one rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.staged")
    # matrices that share a weight have one tensor, which the format does not
    tensors = {name: values.double().clone() for name, values in rows.items()}
    save_file(tensors, staged, metadata={METADATA: json.dumps({"schema": SCHEMA, **record})})
    staged.replace(path)


def load_fisher(path: Path, sizes: Mapping[str, int]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What :func:`save_fisher` wrote, checked.

    Args:
        path: the file.
        sizes: names of the matrices that are wanted -> their rows. What else the file holds is not read.

    Returns:
        (matrix name -> float64 [rows]; the record, empty if the file has none).

    Raises:
        InputError: no such file, one of another kind or layout, a matrix missing, or what :func:`fault` finds.
    """
    where = f"--fisher {path}"
    if not path.is_file():
        raise InputError(f"{where}: no such file; pass one that --save-fisher wrote, or {COMPUTE}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata, names = file.metadata() or {}, set(file.keys())
            rows = {name: file.get_tensor(name) for name in sizes if name in names}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{where}: cannot be read as safetensors ({error}); pass a file of --save-fisher") from None
    try:
        record = json.loads(metadata.get(METADATA, "{}"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise InputError(f"{where}: its metadata {METADATA} is no JSON object; pass a file of --save-fisher")
    schema = record.pop("schema", SCHEMA)
    if schema != SCHEMA:
        raise InputError(f"{where}: has schema {schema}, expected {SCHEMA}; compute it again with --save-fisher")
    for name, size in sizes.items():
        if name not in rows:
            raise InputError(
                f"{where}: has no tensor {name}; expected one of shape [{size}] for every encoder matrix of --model"
            )
        wrong = fault(rows[name], size)
        if wrong:
            raise InputError(f"{where}: {name}: {wrong}")
    return {name: values.double() for name, values in rows.items()}, record
