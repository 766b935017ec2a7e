"""``lpaf compress``: fine-tune, prune, factorise, retrain, measure, publish."""

from __future__ import annotations

import copy
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import nn
from transformers import TrainerCallback, set_seed

import lpaf_kernels
from lpaf_kernels import sparsity_statistics

from ..data import sampled, tokenize
from ..evaluate.metrics import compute_metrics
from ..evaluate.predict import add_teacher_logits, predict, task_outputs
from ..factorize import (
    FACTORIZERS,
    Factorized,
    allocate_ranks,
    comparable,
    rank_for_error,
    rank_params,
    weighted_spectra,
)
from ..factorize.offline import ModulePlan, Part, compress_module, relative_error
from ..models.checkpoint import save_compressed, save_model
from ..models.count import encoder_params, largest_ranks, matrix_shapes, weight_bytes
from ..models.decoded import build_layers, describe, install, layer_tensors, remake
from ..models.t5 import leave_out_casts
from ..models.targets import encoder_linears
from ..models.truncate import truncate
from ..processes import from_main, is_main, process_place, say
from ..prune import PRUNERS, Pruner, Surroundings
from ..report.write import write_report
from ..retrain import RETRAINERS
from ..retrain.layer_distillation import LayerDistillation
from ..retrain.objective import Objective
from ..retrain.trainer import Term, TrainOptions, train_stage
from .calibrate import calibration_fingerprint, choose, input_moments
from .fingerprints import weights_fingerprint
from .fisher import SAMPLES, fisher_fingerprint, row_fisher, save_fisher
from .modules import module_settings_fingerprint
from .options import COMPUTE, INDEPENDENT, RUN_OPTIONS, CompressOptions
from .prepare import Prepared, default_mixed_rank_p, needs_pretrained, prepare
from .pruning import make_pruner, score_init, score_lr
from .record import Findings, run_record
from .stages import StageStore, Tensors, stage_key
from .workspace import Workspace, explain_os_error


class Compression:
    """One run: the stages in order, each skipped when the work directory says it is done.

    Args:
        prepared: what :func:`prepare` returned.
        command: the command line, for the report.
    """

    def __init__(self, prepared: Prepared, command: str) -> None:
        self.prepared, self.options, self.command = prepared, prepared.options, command
        options, data = prepared.options, prepared.data
        self.train = None if data.train is None else self.tokenize(data.train)
        if self.train is not None and data.spec.is_running_text:  # whose examples are the blocks
            self.train = sampled(self.train, options.max_train_samples, options.seed)
        self.validation = {name: self.tokenize(split) for name, split in data.validation.items()}
        self.calibration = None
        if options.calibration is not None:
            given = prepared.calibration
            self.calibration = choose(self.train if given is None else self.tokenize(given), options)
        #: what decides the weights beside the options
        self.sources = {
            "data": data.fingerprint,
            "weights": weights_fingerprint(options.model),
            "version": lpaf_kernels.__version__,
        }
        processes = process_place()[1]
        settings = options.to_dict(without=RUN_OPTIONS) | self.sources
        settings |= {"processes": processes, "force": options.forced}
        settings |= {
            "calibration_data": calibration_fingerprint(options),
            "fisher_data": fisher_fingerprint(options),
            "module_settings_data": module_settings_fingerprint(options),
        }
        if processes > 1:
            self.sources["processes"] = processes  # each draws dropout of its own
        checkpoint = weight_bytes(prepared.model) * (5 if options.checkpoint_steps else 1)
        self.workspace = Workspace(
            Path(options.output), settings, options.resume, options.overwrite, bytes_needed=checkpoint * 2
        )
        kept = self.workspace.directory / "stages" if options.checkpoint_steps else None
        self.stages = StageStore(Path(options.stages) if options.stages else kept)
        logits = options.distill_output if options.layer_wise else options.distill
        self.distill = logits if prepared.method.distill and not prepared.untaught else 0.0
        #: weight of the task loss, if it is not what distillation leaves it
        self.task = 1.0 if options.layer_wise else None
        #: what the teacher adds to the loss of pruning and retraining
        self.terms: list[Term] = []
        pruner = PRUNERS[prepared.method.pruner] if prepared.method.pruner else Pruner
        self.prune_distill = self.distill if pruner.distill is None else pruner.distill
        self.mixed_rank_p = options.mixed_rank_p
        #: the dense model, where it runs beside the student because its logits are too many to be kept
        self.teacher: nn.Module | None = None
        self.findings = Findings(data.spec)

    def tokenize(self, examples: Dataset) -> Dataset:
        """Token ids of a split."""
        prepared, data = self.prepared, self.prepared.data
        return tokenize(
            examples,
            prepared.tokenizer,
            data.spec,
            prepared.max_length,
            data.labels,
            spans=prepared.spans,
            texts=prepared.texts,
        )

    # measuring ------------------------------------------------------------------------------------------------------

    def evaluate(self, stage: str, model: nn.Module) -> None:
        """Score ``model`` on every split that is held out, under ``stage`` in the report."""
        prepared, spec = self.prepared, self.prepared.data.spec
        with self.findings.timed("evaluate"):
            for name, split in prepared.data.validation.items():
                encoded = self.validation[name]
                outputs, labels = task_outputs(
                    model, spec, split, encoded, prepared.tokenizer, prepared.spans, prepared.texts
                )
                self.findings.score(stage, name, outputs, labels)
        say(f"{stage}: {spec.main_metric} {self.findings.metric(stage):.4f}")

    def validation_metric(self, model: nn.Module) -> float:
        """The main metric of ``model`` on the main validation split."""
        prepared, spec = self.prepared, self.prepared.data.spec
        name = prepared.data.main_split
        outputs, labels = task_outputs(
            model,
            spec,
            prepared.data.validation[name],
            self.validation[name],
            prepared.tokenizer,
            prepared.spans,
            prepared.texts,
        )
        return compute_metrics(spec, outputs, labels)[spec.main_metric]

    # training -------------------------------------------------------------------------------------------------------

    def objective(self, **terms: Any) -> Objective:
        return Objective(self.prepared.data.spec.problem, temperature=self.options.temperature, **terms)

    def train_options(self, epochs: float, learning_rate: float, offset: int) -> TrainOptions:
        options = self.options
        return TrainOptions(
            epochs=epochs,
            learning_rate=learning_rate,
            score_learning_rate=score_lr(self.prepared.method.pruner, options),
            batch_size=options.batch_size,
            seed=options.seed + offset,
            checkpoint_steps=options.checkpoint_steps,
            device=self.prepared.device,
            bf16=options.bf16,
        )

    def run_stage(
        self,
        stage: str,
        model: nn.Module,
        dataset: Dataset,
        objective: Objective,
        train: TrainOptions,
        callbacks: list[TrainerCallback],
        terms: Sequence[Term] = (),
    ) -> None:
        """Train one stage from its start or from its last checkpoint."""
        set_seed(train.seed)
        with self.findings.timed(stage):
            self.findings.history[stage] = train_stage(
                stage,
                model,
                self.prepared.tokenizer,
                dataset,
                objective,
                train,
                directory=self.workspace.stage(stage),
                callbacks=callbacks,
                resume=self.workspace.resuming,
                terms=terms,
                teacher=self.teacher,
            )

    def once(self, stage: str, work: Callable[[], Tensors]) -> Tensors:
        """The tensors of ``stage``: those that a run of the same settings left, else what ``work`` makes."""
        key = self.key(stage)
        with self.stages.claim(stage, key):
            kept = self.stages.load(stage, key)
            if kept is None:
                tensors = work()
                examples = _prefixed("examples", self.findings.examples)
                self.stages.store(stage, key, tensors | examples, self.findings.to_json())
                if is_main():
                    shutil.rmtree(self.workspace.stage(stage), ignore_errors=True)
                return tensors
        tensors, record = kept
        self.findings.restore(record, _taken(tensors, "examples"))
        return tensors

    def key(self, stage: str) -> str:
        """The key of ``stage`` in the store: equal in runs whose weights are the same up to there."""
        kind = stage.partition("-")[0]
        method, settings = self.prepared.method, self.options.to_dict(without=INDEPENDENT[kind])
        settings |= self.sources | {
            "finetune_epochs": self.prepared.finetune_epochs,
            "device": self.prepared.device,
            "max_length": self.prepared.max_length,
        }
        if kind == "module":
            plans = {plan.group.name: plan.to_json() for plan in self.prepared.modules}
            name = stage.partition("-")[2]
            if self.options.stop_on == "metric":  # seen beside the groups that came before
                before = list(plans)[: list(plans).index(name)]
                settings |= {"stop_on": "metric", "before": [plans[other] for other in before]}
            settings |= {"plan": plans[name], "fisher": None}
            if self.prepared.method.weighs_by_fisher(self.options):
                samples = None if self.options.fisher_file else self.options.fisher_samples or SAMPLES
                settings |= {"fisher": fisher_fingerprint(self.options) or COMPUTE, "fisher_samples": samples}
        if kind in ("prune", "round"):
            settings |= {"pruner": method.pruner, "score_init": score_init(method.pruner, self.options)}
            if PRUNERS[method.pruner].structured:
                settings |= {"ratio": self.options.ratio}
            if self.prepared.neurons is not None:
                settings |= {"ranks": self.prepared.neurons.ranks, "keep": self.prepared.neurons.keep}
        if kind == "fisher":
            settings |= {"fisher_samples": self.options.fisher_samples or SAMPLES}
        return stage_key(settings)

    # stages ---------------------------------------------------------------------------------------------------------

    def finetune(self) -> nn.Module:
        """The dense fine-tuned model."""
        model = self.prepared.model.to(self.prepared.device)
        if needs_pretrained(self.prepared.method, self.options.prune_from):
            self.pretrained = _cloned_state(model)

        def work() -> Tensors:
            epochs = self.prepared.finetune_epochs
            if epochs > 0:
                train = self.train_options(epochs, self.options.finetune_lr, offset=0)
                self.run_stage("finetune", model, self.train, self.objective(), train, callbacks=[])
            self.evaluate("dense", model)
            return _cloned_state(model)

        model.load_state_dict(self.once("finetune", work))
        return model

    def with_teacher(self, dense: nn.Module) -> Dataset:
        """The training set with the dense model's logits as a column, if they are wanted; each example is run once.

        Where every token has a row of the vocabulary's size, nothing is kept and the dense model becomes ``teacher``,
        which runs beside the model in training. So does one that teaches layer by layer.
        """
        trains_pruner = self.prepared.method.pruner is not None and PRUNERS[self.prepared.method.pruner].trains
        retrains = self.options.retrain_epochs > 0
        if self.options.distill_layer and (trains_pruner or retrains):
            self.terms = [LayerDistillation(dense, self.options.distill_layer, self.options.bf16)]
        taught = {self.distill if retrains else 0.0, self.prune_distill if trains_pruner else 0.0}
        if taught == {0.0}:
            return self.train
        if self.prepared.data.spec.predicts_tokens:
            self.teacher = dense
            return self.train

        def work() -> Tensors:
            with self.findings.timed("teacher"):
                prepared = self.prepared
                logits = predict(
                    dense,
                    self.train,
                    prepared.tokenizer,
                    description="teacher logits",
                    problem=prepared.data.spec.problem,
                )
                return {"logits": logits}

        return add_teacher_logits(self.train, self.once("teacher", work)["logits"])

    def prune(self, model: nn.Module, train_set: Dataset, dense: nn.Module) -> dict[str, torch.Tensor] | None:
        """Prune ``model`` in place; returns the scores, or None for methods without a pruner."""
        if self.prepared.method.pruner is None:
            return None
        pruner = make_pruner(self.prepared.method.pruner, self.options, self.prepared.neurons)

        def work() -> Tensors:
            if pruner.looks_back:
                pruner.look_around(Surroundings(self.pretrained, dense, train_set, self.prepared.tokenizer))
            pruner.attach(model)
            leave_out_casts(model)
            for number in range(1, pruner.rounds + 1):
                masks = self.once(f"round-{number}", partial(self.round, pruner, number, model, train_set))
                pruner.next_round(model, masks)
            if pruner.trains:
                self.train_pruned("prune", pruner, model, train_set)
            scores = pruner.detach(model)
            if self.prepared.method.compact:
                kept = encoder_params(model) / encoder_params(dense)
            else:
                weights = [linear.weight for linear in encoder_linears(model).values()]
                kept = int(sparsity_statistics(weights)[:, 0].sum()) / sum(weight.numel() for weight in weights)
            say(f"pruned: {kept:.1%} of the encoder's weights are kept")
            self.evaluate("pruned", model)
            return _cloned_state(model) | _prefixed("scores", scores)

        state = self.once("prune", work)
        scores = _taken(state, "scores")
        pruner.rebuild(model, state)
        leave_out_casts(model)
        model.load_state_dict(state)
        return scores

    def round(self, pruner: Pruner, number: int, model: nn.Module, train_set: Dataset) -> Tensors:
        """One round of a pruner that trains several times."""
        self.train_pruned(f"round-{number}", pruner, model, train_set)
        return pruner.end_round(model, number)

    def train_pruned(self, stage: str, pruner: Pruner, model: nn.Module, train_set: Dataset) -> None:
        """Train ``model`` under its pruner."""
        train = self.train_options(self.options.prune_epochs, self.options.prune_lr, offset=1)
        callback = pruner.callback(train.updates(len(train_set)))
        terms = [*getattr(callback, "terms", ()), *self.terms]
        objective = self.objective(distill=self.prune_distill, task=self.task if pruner.distill is None else None)
        self.run_stage(stage, model, train_set, objective, train, callbacks=[callback], terms=terms)

    def calibrate(self, model: nn.Module) -> None:
        """Find what enters the matrices of ``model`` on the calibration data: ``self.moments``, None without any."""
        self.moments, self.calibrated = None, None
        if self.calibration is not None:
            prepared = self.prepared
            with self.findings.timed("calibrate"):
                problem = prepared.data.spec.problem
                self.moments, found = input_moments(model, self.calibration, prepared.tokenizer, problem)
            self.calibrated = {"source": self.options.calibration, **found}

    def fisher(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The Fisher information of the rows of ``model``'s encoder matrices and token embeddings, given or computed:
        name -> row sums [n]."""
        prepared, options = self.prepared, self.options
        if prepared.fisher is not None:
            rows, record = prepared.fisher
            self.findings.fisher = record | {"source": options.fisher}
            if record.get("model") not in (None, self.sources["weights"]):
                say(f"--fisher {options.fisher}: was computed with another --model")
        else:

            def work() -> Tensors:
                chosen = sampled(self.train, options.fisher_samples or SAMPLES, options.seed)
                with self.findings.timed("fisher"):
                    rows, found = row_fisher(model, chosen, prepared.tokenizer, prepared.data.spec.problem)
                origin = {"task": options.task, "model": self.sources["weights"]}
                origin |= {"finetune_epochs": prepared.finetune_epochs}
                self.findings.fisher = {"source": COMPUTE, **found, **origin}
                return rows

            rows = self.once("fisher", work)
            if options.save_fisher is not None:
                record = {name: value for name, value in self.findings.fisher.items() if name != "source"}
                from_main(lambda: save_fisher(Path(options.save_fisher), rows, record))
        return {name: values.to(prepared.device) for name, values in rows.items()}

    def ranks(self, model: nn.Module, scores: dict[str, torch.Tensor] | None) -> dict[str, int]:
        """The rank of every matrix of the pruned ``model``: the same whenever it is asked for the same model."""
        prepared, shapes = self.prepared, matrix_shapes(model)
        if prepared.ranks is not None:
            return prepared.ranks
        if prepared.rank is not None:
            return dict.fromkeys(shapes, prepared.rank)
        with self.findings.timed("factorize"):
            spectra = weighted_spectra(model, scores, prepared.method.weighting, moments=self.moments)
        largest = largest_ranks(shapes, self.options.force)
        if prepared.budget is not None:
            return allocate_ranks(comparable(spectra, shapes), shapes, prepared.budget, largest)
        asked = {name: max(rank_for_error(values, self.options.rank_error), 1) for name, values in spectra.items()}
        above = sum(asked[name] > largest[name] for name in asked)
        if above:
            say(
                f"--rank-error {self.options.rank_error:g}: {above} of {len(asked)} matrices would need more than "
                "their break-even rank, stay there and miss it; --force gives them what they need"
            )
        return {name: min(asked[name], largest[name]) for name in asked}

    def factorize(
        self,
        model: nn.Module,
        scores: dict[str, torch.Tensor] | None,
        ranks: Mapping[str, int],
        stage: str,
    ) -> Factorized:
        """Replace the encoder linears of ``model`` by factors of ``ranks``, in place."""
        method = self.prepared.method
        with self.findings.timed("factorize"):
            factorizer = FACTORIZERS[method.factorizer](rank=ranks, weighting=method.weighting)
            factorized = factorizer(model, scores, self.moments)
        leave_out_casts(model)
        self.evaluate(stage, model)
        return factorized

    def compress_modules(self, model: nn.Module, fisher: Mapping[str, torch.Tensor] | None) -> Factorized:
        """Put what stands in for them in place of the matrices that ``--modules`` names, in ``model`` itself.

        Args:
            fisher: matrix name -> Fisher information of its rows, if it weighs them.
        """
        errors, weights = {}, {}
        for plan in self.prepared.modules:
            name = plan.group.name
            before = plan.group.weights(model)
            tensors = self.once(f"module-{name}", partial(self.solve, plan, model, fisher))
            found = self.findings.modules[name]
            install(model, remake(model, found.pop("entries"), tensors))
            found["seconds"] = round(self.findings.seconds[f"module {name}"], 2)
            errors |= found["errors"]
            weights |= before
            mean = sum(found["errors"].values()) / len(before)
            say(f"{name}: {plan.ratio:.2f}x smaller, relative error {mean:.3f}")
        if self.options.freeze_embeddings:
            model.get_input_embeddings().requires_grad_(False)
        self.evaluate("factorized", model)
        linears = encoder_linears(model)
        return Factorized(*({name: of[name] for name in of if name in linears} for of in (errors, weights)))

    def solve(self, plan: ModulePlan, model: nn.Module, fisher: Mapping[str, torch.Tensor] | None) -> Tensors:
        """What stands in for the matrices of one group of ``model``."""
        label = f"module {plan.group.name}"
        kept = self.workspace.stage(label.replace(" ", "-")) if self.options.checkpoint_steps else None
        score = partial(self.score_modules, plan, model) if self.options.stop_on == "metric" else None

        def work() -> tuple[Tensors, dict[str, Any]]:
            weights = plan.group.weights(model)
            layers = build_layers(model, compress_module(plan, weights, fisher, kept, score), plan.joint)
            entries = describe({layer: name for name, layer in layers.items()})
            errors = {name: relative_error(weights[name], layer.weight) for name, layer in layers.items()}
            return layer_tensors(layers), plan.record() | {"errors": errors, "entries": entries}

        with self.findings.timed(label):
            tensors, self.findings.modules[plan.group.name] = from_main(work)
        return tensors

    def score_modules(self, plan: ModulePlan, model: nn.Module, parts: Mapping[str, Part]) -> float:
        """The metric of ``model`` on the main validation split, the less the better, with what stands in for some of a
        group's matrices."""
        before = {name: weight.clone() for name, weight in plan.group.weights(model).items()}
        with torch.no_grad():
            for name, part in parts.items():
                model.get_submodule(name).weight.copy_(part.weight())
            metric = self.validation_metric(model)
            for name, weight in before.items():
                model.get_submodule(name).weight.copy_(weight)
        return metric if self.prepared.data.spec.lower_is_better else -metric

    def truncate(self, model: nn.Module) -> tuple[nn.Module, Factorized]:
        """The first layers of ``model``, in whose matrices there is no error."""
        student = truncate(model, self.prepared.layers)
        weights = {name: linear.weight.detach().clone() for name, linear in encoder_linears(student).items()}
        self.evaluate("factorized", student)
        return student, Factorized(dict.fromkeys(weights, 0.0), weights)

    def compacted(self, model: nn.Module, dense: nn.Module) -> Factorized:
        """What pruning has left of every matrix of ``model``, and how far it is from that of ``dense``."""
        before = {name: linear.weight.detach() for name, linear in encoder_linears(dense).items()}
        weights = {name: layer.weight.detach() for name, layer in encoder_linears(model).items()}
        errors = {
            name: float((before[name] - weight).norm() / before[name].norm())
            if weight.shape == before[name].shape
            else None  # rows or columns are gone: there is nothing to hold against each other
            for name, weight in weights.items()
        }
        return Factorized(errors, weights)

    def retrain(self, model: nn.Module, factorized: Factorized, train_set: Dataset, stage: str = "retrain") -> None:
        """Retrain the factorised ``model`` in place."""
        method, options = self.prepared.method, self.options
        epochs = options.retrain_epochs
        offline = self.prepared.modules is not None
        if not offline and (method.pruner is None or not PRUNERS[method.pruner].trains):
            epochs += options.prune_epochs  # methods that do not train while pruning get the same number of updates
        train = self.train_options(epochs, options.retrain_lr, offset=2)
        consistency = 1.0 if method.consistency else 0.0
        objective = self.objective(distill=self.distill, consistency=consistency, task=self.task)
        settings = {"p_init": self.mixed_rank_p, "seed": train.seed} if method.retrainer == "mixed-rank" else {}
        retrainer = RETRAINERS[method.retrainer](**settings)
        retrainer.attach(model, factorized.weights)
        callbacks = retrainer.callbacks(train.updates(len(train_set)), objective.passes)
        self.run_stage(stage, model, train_set, objective, train, callbacks=callbacks, terms=self.terms)
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
            from_main(lambda: save_model(dense, self.prepared.tokenizer, Path(self.options.save_dense)))
        train_set = self.with_teacher(dense)
        sparse = copy.deepcopy(dense)
        if self.options.freeze_embeddings:
            embeddings = [module for module in sparse.modules() if isinstance(module, nn.Embedding)]
            nn.ModuleList(embeddings).requires_grad_(False)
        if self.prepared.method.pruner and self.options.prune_from == "pretrained":
            sparse.load_state_dict(self.pretrained)
        scores = self.prune(sparse, train_set, dense)
        self.calibrate(sparse)
        weighs = self.prepared.method.weighs_by_fisher(self.options)
        information = self.fisher(sparse) if weighs else scores
        if self.prepared.method.compact:
            model, factorized = self.retrained(sparse, self.compacted(sparse, dense), train_set, before="pruned")
        elif self.prepared.modules is not None:
            factorized = self.compress_modules(sparse, information)
            model, factorized = self.retrained(sparse, factorized, train_set, before="factorized")
        elif self.prepared.layers is not None:
            model, factorized = self.retrained(*self.truncate(sparse), train_set, before="factorized")
        else:
            ranks = self.ranks(sparse, information)
            if self.mixed_rank_p is None:
                ratio = rank_params(ranks, matrix_shapes(sparse)) / encoder_params(dense)
                self.mixed_rank_p = default_mixed_rank_p(ratio)
            model, factorized = self.shrink(sparse, information, train_set, ranks)
        others = {
            name: self.shrink(sparse, information, train_set, dict.fromkeys(matrix_shapes(sparse), rank), f"-{name}")[0]
            for name, rank in (controls or {}).items()
        }

        def finish() -> dict[str, Any]:
            report, analysis = run_record(
                self.prepared,
                self.findings,
                self.command,
                self.mixed_rank_p,
                dense,
                model,
                factorized,
                scores,
                others,
                self.calibrated,
            )
            self.publish(model, report, analysis)
            return report

        return model, from_main(finish)

    def shrink(
        self,
        sparse: nn.Module,
        scores: dict[str, torch.Tensor] | None,
        train_set: Dataset,
        ranks: Mapping[str, int],
        suffix: str = "",
    ) -> tuple[nn.Module, Factorized]:
        """Factorise a copy of ``sparse`` and retrain it; ``suffix`` tells its records apart."""
        model = copy.deepcopy(sparse)
        factorized = self.factorize(model, scores, ranks, stage=f"factorized{suffix}")
        return self.retrained(model, factorized, train_set, f"factorized{suffix}", suffix)

    def retrained(
        self, model: nn.Module, factorized: Factorized, train_set: Dataset, before: str, suffix: str = ""
    ) -> tuple[nn.Module, Factorized]:
        """``model`` in eval mode, retrained if epochs are asked for, and ``factorized``; ``before`` is the stage that
        it comes from."""
        if self.options.retrain_epochs:
            self.retrain(model, factorized, train_set, stage=f"retrain{suffix}")
            self.evaluate(f"compressed{suffix}", model)
        else:
            self.findings.repeat(before, f"compressed{suffix}")
        return model.eval(), factorized

    def publish(self, model: nn.Module, report: dict[str, Any], analysis: dict[str, torch.Tensor]) -> None:
        """Write the output directory beside its place, then rename it there."""
        staged = self.workspace.directory / "output"
        shutil.rmtree(staged, ignore_errors=True)
        if self.prepared.layers is None:
            save_compressed(model, self.prepared.tokenizer, staged, self.prepared.method.name)
        else:
            save_model(model, self.prepared.tokenizer, staged)
        report["file_bytes"]["compressed"] = (staged / "model.safetensors").stat().st_size
        write_report(staged, report, analysis)
        self.workspace.publish(staged)


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


def _prefixed(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def _taken(tensors: Tensors, prefix: str) -> Tensors:
    """Those of ``prefix``, taken out of ``tensors``."""
    names = [name for name in tensors if name.startswith(f"{prefix}/")]
    return {name.removeprefix(f"{prefix}/"): tensors.pop(name) for name in names}


def _cloned_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
