"""``lpaf compress``: fine-tune, prune, factorise, retrain, measure, publish."""

from __future__ import annotations

import copy
import hashlib
import shlex
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import set_seed

from ..data import TaskData, check_labels, load_task, tokenize
from ..errors import InputError
from ..evaluate.metrics import compute_metrics
from ..evaluate.predict import predict
from ..factorize import (
    FACTORIZERS,
    Factorized,
    allocate_ranks,
    comparable,
    rank_for_error,
    rank_params,
    weighted_spectra,
)
from ..models.checkpoint import (
    is_compressed,
    load_config,
    load_dense,
    load_tokenizer,
    resolve_model,
    save_compressed,
    save_model,
)
from ..models.count import (
    AUTO,
    check_size,
    encoder_params,
    forward_macs,
    largest_ranks,
    matrix_shapes,
    resolve_budget,
    resolve_rank,
    total_params,
    weight_bytes,
)
from ..models.device import resolve_device
from ..models.targets import encoder_linears
from ..prune import PRUNERS
from ..report.write import write_report
from ..retrain import RETRAINERS
from ..retrain.objective import Objective
from ..retrain.trainer import TrainOptions, train_stage
from .measure import latency_record, rank_record, versions
from .methods import Method, get_method
from .options import RUN_OPTIONS, CompressOptions
from .workspace import Workspace, check_output, explain_os_error

REPORT_SCHEMA = 1


@dataclass
class Prepared:
    """A validated run: nothing has been written yet.

    ``rank`` is that of every matrix; None where each gets its own after pruning: by ``budget``, the number of weights
    they share, or by the error asked for.
    """

    options: CompressOptions
    method: Method
    data: TaskData
    tokenizer: Any
    model: nn.Module
    rank: int | None
    budget: int | None
    finetune_epochs: float
    device: str


def default_mixed_rank_p(ratio: float) -> float:
    """First probability of the sparse path when ``--mixed-rank-p`` is silent: smaller ranks want larger ones (Table
    7)."""
    return 0.3 if ratio > 0.35 else 0.5 if ratio > 0.2 else 0.7


def prepare(options: CompressOptions) -> Prepared:
    """Check everything that can be checked before anything is written, cheapest first."""
    method = get_method(options.method).with_options(options)
    device = resolve_device(options.device)
    check_size(options.rank, options.ratio, options.rank_error)
    check_output(Path(options.output), options.overwrite)
    if options.save_dense is not None:
        # an interrupted run may have written it
        check_output(Path(options.save_dense), options.overwrite or options.resume, flag="--save-dense")
    config = load_config(options.model)
    if is_compressed(config):
        raise InputError(
            f"--model {options.model}: is already compressed by lpaf; pass the dense model that it was made from"
        )
    data = load_task(
        options.task,
        data_dir=options.data_dir,
        train_file=options.train_file,
        validation_file=options.validation_file,
        max_train_samples=options.max_train_samples,
        seed=options.seed,
    )
    tokenizer = load_tokenizer(options.model)
    limit = getattr(config, "max_position_embeddings", None)
    if limit and options.max_length > limit:
        raise InputError(f"--max-length {options.max_length}: the model takes at most {limit} tokens")
    set_seed(options.seed)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        data = in_order_of_head(data, config, options)
    model, head_trained = load_dense(options.model, data.labels, data.spec.problem)
    shapes = matrix_shapes(model)
    rank = budget = None
    if options.rank == AUTO:
        budget = resolve_budget(shapes, options.ratio, options.force)
    elif options.rank_error is None:
        rank = resolve_rank(shapes, options.rank, options.ratio, options.force)
    epochs = options.finetune_epochs
    if epochs is None:
        epochs = 0.0 if head_trained else 3.0
    if epochs == 0 and not head_trained:
        raise InputError(
            f"--finetune-epochs 0: {options.model} has no trained head for task {options.task}; pass a fine-tuned "
            "model, or leave the option out"
        )
    return Prepared(
        options=options,
        method=method,
        data=data,
        tokenizer=tokenizer,
        model=model,
        rank=rank,
        budget=budget,
        finetune_epochs=epochs,
        device=device,
    )


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


class Compression:
    """One run: the stages in order, each skipped when the work directory says it is done.

    Args:
        prepared: what :func:`prepare` returned.
        command: the command line, for the report.
    """

    def __init__(self, prepared: Prepared, command: str) -> None:
        self.prepared, self.options, self.command = prepared, prepared.options, command
        options, data = prepared.options, prepared.data
        settings = {k: v for k, v in options.to_dict().items() if k not in RUN_OPTIONS}
        if options.rank == "auto" or options.rank_error is not None:
            settings["force"] = options.force  # decides how large ranks may become
        settings["data"] = data.fingerprint
        settings["weights"] = _fingerprint(options.model)
        checkpoint = weight_bytes(prepared.model) * (5 if options.checkpoint_steps else 1)
        self.workspace = Workspace(
            Path(options.output), settings, options.resume, options.overwrite, bytes_needed=checkpoint * 2
        )
        length, tokenizer, spec = options.max_length, prepared.tokenizer, data.spec
        self.train = tokenize(data.train, tokenizer, spec, length, data.labels)
        self.validation = {
            name: tokenize(split, tokenizer, spec, length, data.labels) for name, split in data.validation.items()
        }
        self.mixed_rank_p = options.mixed_rank_p
        self.seconds: dict[str, float] = {}
        self.details: dict[str, dict[str, dict[str, float]]] = {}
        self.history: dict[str, list[dict[str, float]]] = {}

    # measuring ------------------------------------------------------------------------------------------------------

    @contextmanager
    def timed(self, stage: str):
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start

    def evaluate(self, stage: str, model: nn.Module) -> dict[str, dict[str, float]]:
        """Metrics of ``model`` on every validation split, under ``stage`` in the report."""
        spec = self.prepared.data.spec
        with self.timed("evaluate"):
            self.details[stage] = {
                name: compute_metrics(spec, predict(model, split, self.prepared.tokenizer).numpy(), split["labels"])
                for name, split in self.validation.items()
            }
        main = next(iter(self.details[stage].values()))[spec.main_metric]
        print(f"{stage}: {spec.main_metric} {main:.4f}", file=sys.stderr)
        return self.details[stage]

    def metric(self, stage: str) -> float | None:
        """Main metric of ``stage``, the mean over validation splits; None when the stage did not run."""
        if stage not in self.details:
            return None
        name = self.prepared.data.spec.main_metric
        return float(np.mean([split[name] for split in self.details[stage].values()]))

    # training -------------------------------------------------------------------------------------------------------

    def objective(self, **terms: Any) -> Objective:
        return Objective(self.prepared.data.spec.problem, temperature=self.options.temperature, **terms)

    def train_options(self, epochs: float, learning_rate: float, offset: int) -> TrainOptions:
        options = self.options
        return TrainOptions(
            epochs=epochs,
            learning_rate=learning_rate,
            score_learning_rate=options.score_lr,
            batch_size=options.batch_size,
            seed=options.seed + offset,
            checkpoint_steps=options.checkpoint_steps,
            device=self.prepared.device,
            bf16=options.bf16,
        )

    def run_stage(
        self, stage: str, model: nn.Module, dataset: Dataset, objective: Objective, train: TrainOptions, callbacks=None
    ) -> None:
        """Train one stage from its start or from its last checkpoint."""
        set_seed(train.seed)
        with self.timed(stage):
            self.history[stage] = train_stage(
                stage,
                model,
                self.prepared.tokenizer,
                dataset,
                objective,
                train,
                directory=self.workspace.stage(stage),
                callbacks=callbacks,
                resume=self.workspace.resuming,
            )

    def finished(self, stage: str) -> dict[str, torch.Tensor] | None:
        """The tensors that :meth:`finish` stored for ``stage`` in an earlier session, or None; restores its records."""
        record = self.workspace.load(stage)
        if record is None:
            return None
        self.details |= record["details"]
        self.history |= record["history"]
        self.seconds |= record["seconds"]
        return load_file(self.workspace.stage(stage) / "state.safetensors")

    def finish(self, stage: str, tensors: dict[str, torch.Tensor]) -> None:
        """Store the result of ``stage``, so that a later session starts after it."""
        if not self.options.checkpoint_steps:
            return
        directory = self.workspace.stage(stage)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "state.safetensors")
        record = {"details": self.details, "history": self.history, "seconds": self.seconds}
        self.workspace.store(stage, record)
        for checkpoint in directory.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)

    # stages ---------------------------------------------------------------------------------------------------------

    def finetune(self) -> nn.Module:
        """The dense fine-tuned model."""
        model = self.prepared.model.to(self.prepared.device)
        state = self.finished("finetune")
        if state is not None:
            model.load_state_dict(state)
            return model
        epochs = self.prepared.finetune_epochs
        if epochs > 0:
            train = self.train_options(epochs, self.options.finetune_lr, offset=0)
            self.run_stage("finetune", model, self.train, self.objective(), train)
        self.evaluate("dense", model)
        self.finish("finetune", _cloned_state(model))
        return model

    def with_teacher(self, dense: nn.Module) -> Dataset:
        """The training set with the dense model's logits as a column; each example is run once."""
        if self.options.distill == 0:
            return self.train
        with self.timed("teacher"):
            logits = predict(dense, self.train, self.prepared.tokenizer, description="teacher logits")
        return self.train.add_column("teacher_logits", logits.numpy().tolist())

    def prune(self, model: nn.Module, train_set: Dataset) -> dict[str, torch.Tensor] | None:
        """Prune ``model`` in place; returns the scores, or None for methods without a pruner."""
        method, options = self.prepared.method, self.options
        if method.pruner is None:
            return None
        state = self.finished("prune")
        if state is None:
            learned = {"score_init": options.score_init} if method.pruner == "movement" else {}
            pruner = PRUNERS[method.pruner](
                keep=options.keep,
                scope=options.scope,
                warmup=options.prune_warmup,
                cooldown=options.prune_cooldown,
                **learned,
            )
            pruner.attach(model)
            train = self.train_options(options.prune_epochs, options.prune_lr, offset=1)
            objective = self.objective(distill=options.distill)
            callback = pruner.callback(train.updates(len(train_set)))
            self.run_stage("prune", model, train_set, objective, train, callbacks=[callback])
            scores = pruner.detach(model)
            self.evaluate("pruned", model)
            tensors = _cloned_state(model) | {f"scores.{name}": score for name, score in scores.items()}
            self.finish("prune", tensors)
            return scores
        scores = {key.removeprefix("scores."): state.pop(key) for key in list(state) if key.startswith("scores.")}
        model.load_state_dict(state)
        return scores

    def ranks(self, model: nn.Module, scores: dict[str, torch.Tensor] | None) -> dict[str, int]:
        """The rank of every matrix of the pruned ``model``: the same whenever it is asked for the same model."""
        prepared, shapes = self.prepared, matrix_shapes(model)
        if prepared.rank is not None:
            return dict.fromkeys(shapes, prepared.rank)
        with self.timed("factorize"):
            spectra = weighted_spectra(model, scores, prepared.method.weighting)
        largest = largest_ranks(shapes, self.options.force)
        if prepared.budget is not None:
            return allocate_ranks(comparable(spectra, shapes), shapes, prepared.budget, largest)
        asked = {name: max(rank_for_error(values, self.options.rank_error), 1) for name, values in spectra.items()}
        above = sum(asked[name] > largest[name] for name in asked)
        if above:
            print(
                f"--rank-error {self.options.rank_error:g}: {above} of {len(asked)} matrices would need more than "
                "their break-even rank, stay there and miss it; --force gives them what they need",
                file=sys.stderr,
            )
        return {name: min(asked[name], largest[name]) for name in asked}

    def factorize(
        self,
        model: nn.Module,
        scores: dict[str, torch.Tensor] | None,
        rank: int | Mapping[str, int],
        stage: str = "factorized",
    ) -> Factorized:
        """Replace the encoder linears of ``model`` by factors of ``rank``, in place."""
        method = self.prepared.method
        with self.timed("factorize"):
            factorized = FACTORIZERS[method.factorizer](rank=rank, weighting=method.weighting)(model, scores)
        self.evaluate(stage, model)
        return factorized

    def retrain(self, model: nn.Module, factorized: Factorized, train_set: Dataset, stage: str = "retrain") -> None:
        """Retrain the factorised ``model`` in place."""
        method, options = self.prepared.method, self.options
        epochs = options.retrain_epochs
        if method.pruner is None:
            epochs += options.prune_epochs  # methods without pruning get the same number of updates
        train = self.train_options(epochs, options.retrain_lr, offset=2)
        objective = self.objective(distill=options.distill, consistency=1.0 if method.consistency else 0.0)
        settings = {"p_init": self.mixed_rank_p, "seed": train.seed} if method.retrainer == "mixed-rank" else {}
        retrainer = RETRAINERS[method.retrainer](**settings)
        retrainer.attach(model, factorized.weights)
        callbacks = retrainer.callbacks(train.updates(len(train_set)), objective.passes)
        self.run_stage(stage, model, train_set, objective, train, callbacks=callbacks)
        retrainer.detach(model)

    # the whole run --------------------------------------------------------------------------------------------------

    def run(self, controls: Mapping[str, int] | None = None) -> tuple[nn.Module, dict[str, Any]]:
        """All stages; the output directory exists when this returns.

        Args:
            controls: name -> rank of further models made from the same pruned model with the same retraining, for
                comparison; they are measured beside the others and not saved.

        Returns:
            (compressed model, report).
        """
        dense = self.finetune()
        if self.options.save_dense is not None:
            save_model(dense, self.prepared.tokenizer, Path(self.options.save_dense))
        train_set = self.with_teacher(dense)
        sparse = copy.deepcopy(dense)
        if self.options.freeze_embeddings:
            embeddings = [module for module in sparse.modules() if isinstance(module, nn.Embedding)]
            nn.ModuleList(embeddings).requires_grad_(False)
        scores = self.prune(sparse, train_set)
        ranks = self.ranks(sparse, scores)
        if self.mixed_rank_p is None:
            ratio = rank_params(ranks, matrix_shapes(sparse)) / encoder_params(dense)
            self.mixed_rank_p = default_mixed_rank_p(ratio)
        model, factorized = self.shrink(sparse, scores, train_set, ranks)
        others = {
            name: self.shrink(sparse, scores, train_set, rank, suffix=f"-{name}")[0]
            for name, rank in (controls or {}).items()
        }
        report, analysis = self.report(dense, model, factorized, others)
        self.publish(model, report, analysis)
        return model, report

    def shrink(
        self,
        sparse: nn.Module,
        scores: dict[str, torch.Tensor] | None,
        train_set: Dataset,
        rank: int | Mapping[str, int],
        suffix: str = "",
    ) -> tuple[nn.Module, Factorized]:
        """Factorise a copy of ``sparse`` at ``rank`` and retrain it; ``suffix`` tells its records apart."""
        model = copy.deepcopy(sparse)
        factorized = self.factorize(model, scores, rank, stage=f"factorized{suffix}")
        self.retrain(model, factorized, train_set, stage=f"retrain{suffix}")
        self.evaluate(f"compressed{suffix}", model)
        return model.eval(), factorized

    def publish(self, model: nn.Module, report: dict[str, Any], analysis: dict[str, torch.Tensor]) -> None:
        """Write the output directory beside its place, then rename it there."""
        staged = self.workspace.directory / "output"
        shutil.rmtree(staged, ignore_errors=True)
        save_compressed(model, self.prepared.tokenizer, staged, self.prepared.method.name)
        report["file_bytes"]["compressed"] = (staged / "model.safetensors").stat().st_size
        write_report(staged, report, analysis)
        self.workspace.publish(staged)

    def report(
        self, dense: nn.Module, model: nn.Module, factorized: Factorized, controls: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """report.json's content and the tensors behind its pictures."""
        options, prepared = self.options, self.prepared
        before = {name: linear.weight.detach() for name, linear in encoder_linears(dense).items()}
        with self.timed("measure"):
            models = {"dense": dense, "compressed": model, **controls}
            times = latency_record(models, options.bench_batch, options.bench_length)
            ranks, analysis = rank_record(before, factorized, model, pruned=prepared.method.pruner is not None)
        dense_params, compressed_params = encoder_params(dense), encoder_params(model)
        length = options.bench_length
        return {
            "schema": REPORT_SCHEMA,
            "method": prepared.method.name,
            "model": options.model,
            "task": options.task,
            "seed": options.seed,
            "command": self.command,
            "metric": {
                "name": prepared.data.spec.main_metric,
                **{stage: self.metric(stage) for stage in ("dense", "pruned", "factorized", "compressed")},
                "details": self.details,
            },
            "encoder_params": {
                "dense": dense_params,
                "compressed": compressed_params,
                "ratio": compressed_params / dense_params,
            },
            "total_params": {"dense": total_params(dense), "compressed": total_params(model)},
            "file_bytes": {"dense": weight_bytes(dense), "compressed": weight_bytes(model)},
            "flops": {
                "dense": forward_macs(dense, length),
                "compressed": forward_macs(model, length),
                "sequence_length": length,
            },
            "latency_ms": times,
            "controls": {
                name: {
                    "metric": self.metric(f"compressed-{name}"),
                    "encoder_ratio": encoder_params(control) / dense_params,
                    "file_bytes": weight_bytes(control),
                    "flops": forward_macs(control, length),
                    "latency_ms": times["median"][name],
                }
                for name, control in controls.items()
            },
            "rank": ranks,
            "training": self.history,
            "seconds": {stage: round(value, 2) for stage, value in self.seconds.items()},
            "versions": versions(),
            "config": options.to_dict()
            | {
                "rank": options.rank if prepared.rank is None else prepared.rank,
                "keep": options.keep if prepared.method.pruner else None,
                "score_init": options.score_init if prepared.method.pruner == "movement" else None,
                "mixed_rank_p": self.mixed_rank_p if prepared.method.retrainer == "mixed-rank" else None,
                "finetune_epochs": prepared.finetune_epochs,
                "weighting": prepared.method.weighting,
                "device": prepared.device,
            },
            "data": {
                "train": len(self.train),
                "validation": {name: len(split) for name, split in self.validation.items()},
                "fingerprint": prepared.data.fingerprint,
            },
        }, analysis


def compress(options: CompressOptions, command: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Compress a model as ``options`` say and write ``options.output``.

    Args:
        options: validated options.
        command: how the run was started, for the report. Default: the process's command line.

    Returns:
        (compressed model in eval mode, report as written to report.json).

    Raises:
        InputError: bad input (nothing is written), a full or read-only disk, or a loss that became NaN (the work
            directory keeps the last good checkpoint).
    """
    prepared = prepare(options)
    try:
        return Compression(prepared, command or shlex.join(["lpaf", *sys.argv[1:]])).run()
    except (OSError, RuntimeError, SafetensorError) as error:
        explained = explain_os_error(error, Path(options.output))
        if explained is None:
            raise
        raise explained from error


def _fingerprint(model: str) -> str:
    """Names, sizes and first megabyte of a local model's weight files; the name of a Hub model."""
    path = Path(resolve_model(model))
    if not path.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) + sorted(path.glob("*.bin")) + [path / "config.json"]:
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
    return digest.hexdigest()


def _cloned_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
