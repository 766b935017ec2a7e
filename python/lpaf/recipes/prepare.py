"""Check a run before anything is written: options, data, tokenizer, model, size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import set_seed

from ..data import TaskData, check_labels, get_task, load_task
from ..data.spans import SpanOptions, span_options
from ..data.texts import TextOptions, text_options
from ..errors import InputError
from ..factorize.offline import ModulePlan
from ..models.blocks import check_removable, least_ratio
from ..models.checkpoint import check_kind, is_compressed, load_config, load_dense, load_tokenizer
from ..models.count import AUTO, check_size, matrix_shapes, resolve_budget, resolve_rank
from ..models.device import resolve_device
from ..models.neurons import NeuronBudget, low_rank_ranks
from ..models.positions import most_tokens, resolve_length
from ..models.truncate import layers_for_ratio
from ..processes import main_first, process_place, start, together
from ..prune import PRUNERS
from .calibrate import load_calibration
from .fisher import load_fisher
from .methods import Method, get_method
from .modules import module_plans
from .options import CALIBRATE_ON_TRAINING, CompressOptions, answer_fields, text_fields
from .pruning import budget_of
from .workspace import check_output, is_published

#: ends of the names of architectures that look back only
CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")


@dataclass
class Prepared:
    """A validated run: nothing has been written yet.

    ``rank`` is that of every matrix; None where each gets its own after pruning: by ``budget``, the number of weights
    they share, or by the error asked for. ``ranks``: those of a method that fixes them in proportion to the matrices.
    ``layers``: how many a method that leaves layers out keeps. ``neurons``: what a method that prunes neurons spends.
    ``modules``: what becomes of those that ``--modules`` names, alone. ``untaught``: whether the dense model's head is
    new when the matrices are compressed, so that it has nothing to teach.
    ``bench_length``: the length of the latency and FLOP figures, as far as the model takes so many tokens.
    ``calibration``: the examples of the file that ``--calibration`` names. ``fisher``: row sums and record of the file
    that ``--fisher`` names.
    """

    options: CompressOptions
    method: Method
    data: TaskData
    max_length: int
    spans: SpanOptions
    texts: TextOptions
    tokenizer: Any
    model: nn.Module
    rank: int | None
    budget: int | None
    ranks: dict[str, int] | None
    layers: int | None
    neurons: NeuronBudget | None
    modules: list[ModulePlan] | None
    untaught: bool
    finetune_epochs: float
    device: str
    bench_length: int
    calibration: Dataset | None = None
    fisher: tuple[dict[str, torch.Tensor], dict[str, Any]] | None = None


def default_mixed_rank_p(ratio: float) -> float:
    """First probability of the sparse path when ``--mixed-rank-p`` is silent: smaller ranks want larger ones (Table
    7)."""
    return 0.3 if ratio > 0.35 else 0.5 if ratio > 0.2 else 0.7


def prepare(options: CompressOptions) -> Prepared:
    """Check everything that can be checked before anything is written, cheapest first.

    Joins the group of the processes that a launcher started, if there is one.
    """
    start()
    with together():
        method, device = check_options(options)
    with main_first():
        return load(options, method, device)


def check_options(options: CompressOptions) -> tuple[Method, str]:
    """The method and the device of a run whose options fit each other, this machine and the number of processes."""
    processes = process_place()[1]
    if options.batch_size % processes:
        raise InputError(
            f"--batch-size {options.batch_size}: {processes} processes share a batch out evenly; pass a multiple of "
            f"{processes}"
        )
    if processes > 1 and options.stop_on == "metric":
        raise InputError("--stop-on metric: runs in one process, whose decisions are its own; leave it out")
    method = get_method(options.method).with_options(options)
    device = resolve_device(options.device)
    check_method_size(method, options)
    output = Path(options.output)
    check_output(output, options.overwrite or (options.resume and is_published(output)))
    if options.save_dense is not None:
        # an interrupted run may have written it
        check_output(Path(options.save_dense), options.overwrite or options.resume, flag="--save-dense")
    if options.stages is not None:
        check_output(Path(options.stages), overwrite=True, flag="--stages")
    return method, device


def check_method_size(method: Method, options: CompressOptions) -> None:
    """InputError unless the one size that is asked for is of a kind that the method knows."""
    if options.modules is not None:
        return
    by_ratio = method.factorizer is None or method.proportional
    if by_ratio and (options.ratio is None or options.rank is not None):
        raise InputError(
            f"--method {method.name}: its size is a share, of layers or of weights; pass --ratio R, the share to keep"
        )
    check_size(options.rank, options.ratio, options.rank_error)


def load(options: CompressOptions, method: Method, device: str) -> Prepared:
    """Data, tokenizer and model of a run, checked against each other and the size asked for."""
    spec = get_task(options.task)
    spans = span_options(spec, {name: getattr(options, name) for name in answer_fields()})
    config = load_config(options.model)
    if is_compressed(config):
        raise InputError(
            f"--model {options.model}: is already compressed by lpaf; pass the dense model that it was made from"
        )
    check_kind(config, spec.problem, options.model)
    texts = {name: getattr(options, name) for name in text_fields()}
    texts = text_options(spec, texts, config, most_tokens(config))
    truncates = method.factorizer is None and not method.compact and not method.modules_only
    if config.is_encoder_decoder and truncates:
        raise InputError(
            f"--method {method.name}: leaves layers out of one stack, and --model {options.model} has two, encoder and "
            "decoder; pass --method lpaf or svd"
        )
    max_length = resolve_length(options.max_length, spec.max_length, config)
    data = load_task(
        spec,
        data_dir=options.data_dir,
        train_file=options.train_file,
        validation_file=options.validation_file,
        test_file=options.test_file,
        max_train_samples=options.max_train_samples,
        seed=options.seed,
        evaluation_only=not reads_training_data(options, method),
    )
    calibration = load_calibration(data, options)
    tokenizer = load_tokenizer(options.model)
    set_seed(options.seed)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        data = in_order_of_head(data, config, options)
    model, head_trained = load_dense(options.model, data.labels, data.spec.problem)
    shapes = matrix_shapes(model)
    rank = budget = ranks = layers = neurons = modules = None
    if options.modules is not None:
        modules = module_plans(model, options)
    elif method.compact:
        if PRUNERS[method.pruner].structured:
            check_structures(model, method, options)
        if PRUNERS[method.pruner].budgeted:
            neurons = budget_of(shapes, method.pruner, options, method.low_rank_share)
    elif method.factorizer is None:
        layers = layers_for_ratio(model, options.ratio)
    elif method.proportional:
        ranks = low_rank_ranks(shapes, options.ratio)
    elif options.rank == AUTO:
        budget = resolve_budget(shapes, options.ratio, options.force)
    elif options.rank_error is None:
        rank = resolve_rank(shapes, options.rank, options.ratio, options.force)
    fisher = None
    if options.fisher_file is not None:
        wanted = (
            shapes
            if modules is None
            else {name: of[name] for plan in modules for of in [plan.group.shapes] for name in of}
        )
        fisher = load_fisher(Path(options.fisher_file), {name: shape[0] for name, shape in wanted.items()})
    epochs = options.finetune_epochs
    if epochs is None:
        if modules is not None:  # offline: the model as it is, to be fine-tuned afterwards if at all
            epochs = 0.0 if head_trained or options.retrain_epochs > 0 else 3.0
        else:  # a language model's head is trained whatever it was trained on
            epochs = 0.0 if head_trained and not spec.predicts_tokens else 3.0
    untaught = epochs == 0 and not head_trained
    if untaught and not (modules is not None and options.retrain_epochs > 0):
        raise InputError(
            f"--finetune-epochs 0: {options.model} has no trained head for task {options.task}; pass a fine-tuned "
            "model, or leave the option out"
        )
    check_pruner_task(method, data, epochs, options, config, tokenizer)
    return Prepared(
        options=options,
        method=method,
        data=data,
        max_length=max_length,
        spans=spans,
        texts=texts,
        tokenizer=tokenizer,
        model=model,
        rank=rank,
        budget=budget,
        ranks=ranks,
        layers=layers,
        neurons=neurons,
        modules=modules,
        untaught=untaught,
        finetune_epochs=epochs,
        device=device,
        bench_length=min(options.bench_length, most_tokens(config) or options.bench_length),
        calibration=calibration,
        fisher=fisher,
    )


def check_structures(model: nn.Module, method: Method, options: CompressOptions) -> None:
    """InputError unless structures of ``model`` can be removed until ``--ratio`` is left."""
    check_removable(model.config.model_type, f"--method {method.name}")
    least = least_ratio(model)
    if options.ratio < least:
        raise InputError(
            f"--ratio {options.ratio:g}: one feed-forward neuron is {math.ceil(least * 1e4) / 1e4:g} of the encoder "
            "already; pass at least that"
        )


def reads_training_data(options: CompressOptions, method: Method) -> bool:
    """Whether anything is trained on the training set, calibrated, or asked for its Fisher information."""
    pruned = method.pruner is not None and PRUNERS[method.pruner].trains
    informs = method.weighs_by_fisher(options) and options.fisher_file is None
    return options.trains or pruned or informs or options.calibration == CALIBRATE_ON_TRAINING


def needs_pretrained(method: Method, prune_from: str) -> bool:
    """Whether pruning needs the weights that the model had before fine-tuning."""
    return method.pruner is not None and (prune_from == "pretrained" or PRUNERS[method.pruner].looks_back)


def check_pruner_task(
    method: Method, data: TaskData, finetune_epochs: float, options: CompressOptions, config: Any, tokenizer: Any
) -> None:
    """InputError where the pruner cannot do its work on this task or from this model."""
    if method.pruner is None:
        return
    prune_from = options.prune_from
    if method.pruner == "cap" and data.spec.problem not in ("classification", "regression"):
        raise InputError("--pruner cap: contrasts sentences; pass a task with one label or score for each example")
    if method.pruner == "cap" and not first_token_sees_all(config, tokenizer):
        raise InputError(
            f"--pruner cap: compares sentences by their first token, which in --model {options.model} does not stand "
            "for the sentence (causal attention, no [CLS], or padding on the left); pass a model such as BERT"
        )
    if needs_pretrained(method, prune_from) and finetune_epochs == 0:
        asking = "--prune-from pretrained" if prune_from == "pretrained" else f"--pruner {method.pruner}"
        raise InputError(
            f"{asking}: needs the pre-trained weights, which a fine-tuned --model does not hold; pass "
            "the pre-trained model, or --finetune-epochs to fine-tune this one"
        )


def first_token_sees_all(config: Any, tokenizer: Any) -> bool:
    """Whether the first token of a batch's rows is one that attends to the whole sentence."""
    names = config.architectures or ()
    causal = getattr(config, "is_decoder", False) or any(name.endswith(CAUSAL_HEADS) for name in names)
    return not causal and tokenizer.cls_token is not None and tokenizer.padding_side == "right"


def in_order_of_head(data: TaskData, config: Any, options: CompressOptions) -> TaskData:
    """``data`` with its labels in the order of a trained head's classes.

    A head for other labels is an InputError, unless the run fine-tunes on purpose: then it gets a new head.
    """
    try:
        return check_labels(data, config)
    except InputError as error:
        if options.finetune_epochs:
            return data
        raise InputError(f"{error}; or pass --finetune-epochs to train a new head") from None
