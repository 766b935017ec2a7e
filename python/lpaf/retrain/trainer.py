"""One training stage on the transformers Trainer: objective, parameter groups, checkpoints that survive a kill."""

from __future__ import annotations

import math
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments

from lpaf_kernels import MixedRankLinear

from ..data.masking import WordMasker, step_draws
from ..data.tasks import MASKED_LANGUAGE_MODELING, TOKEN_PROBLEMS
from ..data.texts import IGNORED
from ..errors import TrainingDivergedError
from ..models.outputs import forward_inputs, head_at, logits_at, task_logits
from ..processes import exchange, from_main, launched, process_place, together
from .batches import BatchShare, Collator, LengthGroupedSampler
from .objective import Objective

COMPLETE = "complete"

#: how the names of pruning scores end
SCORES = (".scores", ".log_alpha")

#: (model, outputs, batch) -> {name: 0-d loss}, each added to the loss and logged by its name. The model may be wrapped
#: for many processes; outputs has hidden_states; batch holds what the collator made, and ``index``, the place of each
#: example in the stage's dataset.
Term = Callable[[nn.Module, Any, Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class TrainOptions:
    """How a stage trains.

    Args:
        epochs: passes over the data; fractions allowed.
        learning_rate: peak rate of AdamW; linear warm-up, then linear decay to 0.
        score_learning_rate: peak rate of pruning scores.
        batch_size: examples per update, of all processes together.
        warmup: share of the updates in the warm-up. Default: 0.06.
        weight_decay: AdamW's, not on biases, norms and scores. Default: 0.01.
        max_grad_norm: joint clip of all gradients. Default: 1.
        seed: seed of the data order, dropout and path draws.
        checkpoint_steps: updates between checkpoints; 0 writes none.
        device: "cpu" or "cuda".
        bf16: autocast to bfloat16. Default: False.
    """

    epochs: float
    learning_rate: float
    batch_size: int
    seed: int
    score_learning_rate: float = 1e-2
    warmup: float = 0.06
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    checkpoint_steps: int = 0
    device: str = "cpu"
    bf16: bool = False

    def updates(self, examples: int) -> int:
        """Optimizer updates over ``examples`` examples."""
        return max(1, math.ceil(self.epochs * math.ceil(examples / self.batch_size)))


def make_optimizer(model: nn.Module, options: TrainOptions, decayed: set[str]) -> torch.optim.Optimizer:
    """AdamW with three groups: the weights named in ``decayed``, the others (biases, norms), and pruning scores at
    their own rate."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    scores = [p for name, p in trained if name.endswith(SCORES)]
    rest = [(name, p) for name, p in trained if not name.endswith(SCORES)]
    groups = [
        {"params": [p for name, p in rest if name in decayed], "weight_decay": options.weight_decay},
        {"params": [p for name, p in rest if name not in decayed], "weight_decay": 0.0},
        {"params": scores, "weight_decay": 0.0, "lr": options.score_learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.learning_rate, fused=True)


class StageTrainer(Trainer):
    """Trains ``model`` on ``objective``; every loss term, schedule value and rate lands in the log history.

    ``teacher`` is a model that runs beside the trained one where logits are too many to be kept. ``masker`` hides other
    words of running text in every step; without one they stay as the dataset has them.
    """

    def __init__(
        self,
        *args: Any,
        stage: str,
        objective: Objective,
        options: TrainOptions,
        terms: Sequence[Term] = (),
        teacher: nn.Module | None = None,
        masker: WordMasker | None = None,
        **kwargs: Any,
    ) -> None:
        self.stage, self.objective, self.options, self.terms = stage, objective, options, terms
        self.masker = masker
        self.teacher = teacher if objective.distill > 0 else None
        self._parts: dict[str, list[torch.Tensor]] = {}
        self._diverged: torch.Tensor | None = None
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    # data ------------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """This process's share of every batch; accelerate's own split would fill the last batch up with examples of
        the first."""
        lengths, batch = list(self.train_dataset["length"]), self.options.batch_size
        self.longest = max(lengths)
        per_epoch = math.ceil(len(lengths) / batch)
        sampler = LengthGroupedSampler(
            lengths, batch, self.options.seed, epoch=lambda: self.state.global_step // per_epoch
        )
        self.share = BatchShare(sampler, batch, *process_place())
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.share,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    # optimisation ----------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """See :func:`make_optimizer`."""
        model = self.model if model is None else model
        if self.optimizer is None:
            self.optimizer = make_optimizer(model, self.options, set(self.get_decay_parameter_names(model)))
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """One batch, doubled when the objective compares two passes; the objective plus the terms."""
        batch = inputs if self.masker is None else self.hidden_anew(inputs)
        plain = self.accelerator.unwrap_model(model)
        inputs = forward_inputs(plain, batch)
        labels, teacher = batch["labels"], batch.get("teacher_logits")
        if self.teacher is not None:
            teacher = self.taught(inputs, labels)
        if self.objective.passes == 2:
            inputs |= {name: torch.cat((value, value)) for name, value in inputs.items() if torch.is_tensor(value)}
        options = {"output_hidden_states": True} if self.terms else {}
        if self.objective.problem == MASKED_LANGUAGE_MODELING:
            positions = (labels != IGNORED).repeat(self.objective.passes, 1)
            with head_at(plain, positions):
                outputs = model(**inputs, **options)
            logits, labels = logits_at(outputs.logits, positions), labels[labels != IGNORED]
        else:
            outputs = model(**inputs, **options)
            logits = task_logits(outputs, inputs.get("attention_mask"))
        loss, parts = self.objective(logits, labels, teacher)
        # Gradients and logs are the means over the processes, whose shares of a short batch differ.
        weight = by_example = self.share.weight(self.state.global_step % len(self.share))
        if self.objective.problem in TOKEN_PROBLEMS and process_place()[1] > 1:
            weight = token_weight(int((labels != IGNORED).sum()) if weight else 0)
        loss = weight * loss
        parts = {name: weight * part for name, part in parts.items()}
        for term in self.terms:  # means over examples
            added = {name: by_example * value for name, value in term(model, outputs, batch).items()}
            loss = loss + sum(added.values())
            parts |= {name: value.detach() for name, value in added.items()}
        for name, part in parts.items():
            self._parts.setdefault(name, []).append(part)
        return (loss, outputs) if return_outputs else loss

    def hidden_anew(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch of running text with the words hidden that belong to this step."""
        process, processes = process_place()
        rows, device = self.options.batch_size, batch["input_ids"].device
        draws = step_draws(self.options.seed, self.state.global_step, rows, self.longest, device)
        mine = draws[process::processes][: len(batch["input_ids"])]
        hidden, labels = self.masker.again(batch["input_ids"], batch["labels"], batch["words"], mine)
        return {**batch, "input_ids": hidden, "labels": labels}

    @torch.no_grad()
    def taught(self, inputs: Mapping[str, Any], labels: torch.Tensor) -> torch.Tensor:
        """The teacher's logits of a batch; of hidden words at their positions only."""
        self.teacher.eval()
        with torch.autocast(inputs["input_ids"].device.type, dtype=torch.bfloat16, enabled=self.options.bf16):
            if self.objective.problem != MASKED_LANGUAGE_MODELING:
                return task_logits(self.teacher(**inputs), inputs.get("attention_mask"))
            positions = labels != IGNORED
            with head_at(self.teacher, positions):
                return logits_at(self.teacher(**inputs).logits, positions)

    # divergence ------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        bad = ~torch.isfinite(loss)
        self._diverged = bad if self._diverged is None else self._diverged | bad
        if loss.device.type == "cpu":
            self.check_diverged()
        return loss

    def check_diverged(self) -> None:
        """Raise TrainingDivergedError when a loss since the last check was NaN or infinite in any process
        (synchronises the device)."""
        if self._diverged is None or not any(exchange(bool(self._diverged))):
            return
        last = last_checkpoint(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint had been written yet"
        raise TrainingDivergedError(
            f"{self.stage}: the loss became NaN or infinite at update {self.state.global_step + 1} of "
            f"{self.state.max_steps}; {kept}; pass a smaller learning rate, or check the data"
        )

    # logs and checkpoints --------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.check_diverged()
        if "loss" in logs:
            parts = exchange({name: float(torch.stack(values).mean()) for name, values in self._parts.items()})
            logs |= {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
            for callback in self.callback_handler.callbacks:
                logs |= getattr(callback, "progress", {})
        self._parts.clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, model, trial):
        """Save, mark the checkpoint as complete, and only then drop the older ones."""
        self.check_diverged()
        with together():  # every process adds the state of its random numbers
            super()._save_checkpoint(model, trial)
        if not self.args.should_save:
            return
        directory = Path(self.args.output_dir)
        newest = directory / f"checkpoint-{self.state.global_step}"
        (newest / COMPLETE).touch()
        for other in directory.glob("checkpoint-*"):
            if other != newest:
                shutil.rmtree(other, ignore_errors=True)


def token_weight(tokens: int) -> float:
    """By what the mean over this process's ``tokens`` of a batch counts in the mean of all processes' means; 0 where
    none has any."""
    shares = exchange(tokens)
    return len(shares) * tokens / max(sum(shares), 1)


class ProgressBar(TrainerCallback):
    """One bar per stage with the current loss and schedule values."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.stage,
                unit="step",
                delay=2,
                mininterval=0.2 if sys.stderr.isatty() else 15,
            )

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and logs and "loss" in logs:
            shown = {"loss": "{:.3f}", "keep": "{:.0%}", "mixed_rank_p": "{:.2f}"}
            self.bar.set_postfix({k: form.format(logs[k]) for k, form in shown.items() if k in logs}, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint of ``directory`` that was written whole."""
    done = [path for path in directory.glob("checkpoint-*") if (path / COMPLETE).is_file()]
    return max(done, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def leaves_out(model: nn.Module, batch: dict[str, torch.Tensor]) -> bool:
    """Whether some step leaves trained parameters without a gradient: a model that does not use all of its own, factors
    that give way to their sparse matrix."""
    if any(isinstance(module, MixedRankLinear) for module in model.modules()):
        return True
    device = next(model.parameters()).device
    inputs = forward_inputs(model, {name: value.to(device) for name, value in batch.items()})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng():
        outputs = model(**inputs)
    total = sum(value.float().sum() for value in outputs.values() if torch.is_tensor(value) and value.requires_grad)
    return any(grad is None for grad in torch.autograd.grad(total, trained, allow_unused=True))


def train_stage(
    stage: str,
    model: nn.Module,
    tokenizer: Any,
    dataset: Dataset,
    objective: Objective,
    options: TrainOptions,
    directory: Path,
    callbacks: list[TrainerCallback] | None = None,
    resume: bool = False,
    terms: Sequence[Term] = (),
    teacher: nn.Module | None = None,
) -> list[dict[str, float]]:
    """Train ``model`` in place and return the logged history.

    Args:
        stage: name for progress and messages.
        dataset: tokenised examples with ``length``, ``labels`` and, for distillation, ``teacher_logits``. Of running
            text with ``words`` other words are hidden in every step.
        directory: where checkpoints go.
        callbacks: schedules of the pruner or of mixed-rank training; what they set as ``progress`` is logged.
        resume: continue from the newest whole checkpoint of ``directory`` if there is one.
        terms: further losses; see :data:`Term`. Default: none.
        teacher: model whose logits the objective distils, run on every batch in eval mode, for datasets without
            ``teacher_logits``. Default: none.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
    """
    updates = options.updates(len(dataset))
    process, processes = process_place()
    collate = Collator(tokenizer, objective.problem)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=updates,
        per_device_train_batch_size=options.batch_size // processes,
        learning_rate=options.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=int(options.warmup * updates),
        max_grad_norm=options.max_grad_norm,
        seed=options.seed,
        bf16=options.bf16,
        use_cpu=options.device == "cpu",
        save_strategy="steps" if options.checkpoint_steps else "no",
        save_steps=options.checkpoint_steps or 500,
        logging_steps=max(1, min(20, updates // 20)),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=options.device != "cpu",
        ddp_find_unused_parameters=launched() and leaves_out(model, collate([dataset[0]])),
        # what is in buffers (thresholds, sparse matrices) every process computes for itself
        ddp_broadcast_buffers=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one GPU per process: torch's DataParallel would take all
    arguments.mixed_precision = "bf16" if options.bf16 else "no"  # not what a launcher's configuration says
    trainer = StageTrainer(
        model,
        arguments,
        stage=stage,
        objective=objective,
        options=options,
        terms=terms,
        teacher=teacher,
        masker=WordMasker.of(tokenizer) if "words" in dataset.column_names else None,
        train_dataset=dataset.add_column("index", list(range(len(dataset)))) if terms else dataset,
        data_collator=collate,
        callbacks=[*(callbacks or []), ProgressBar(stage)],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    if process > 0:
        torch.manual_seed(options.seed * 10_007 + process)  # dropout of its own
    checkpoint = from_main(lambda: last_checkpoint(directory) if resume else None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # accelerate knows no other name
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    # accelerate leaves its autocast around forward; the trained model must run as the saved one will.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return [entry for entry in trainer.state.log_history if "loss" in entry]
