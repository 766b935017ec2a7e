"""``lpaf bench --step``: what one training step of each stage costs, side by side."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_pt_utils import get_parameter_names

from ..errors import InputError
from ..factorize import SVDFactorizer
from ..models.checkpoint import head_problem, load_config
from ..models.count import matrix_shapes, resolve_rank
from ..models.device import device_name, resolve_device
from ..models.positions import most_tokens
from ..models.targets import encoder_linears
from ..prune import HardMovementPruner, ImportancePruner, MovementPruner, Pruner, SensitivityPruner
from ..retrain.mixed_rank import MixedRank
from ..retrain.objective import Objective
from ..retrain.trainer import TrainOptions, make_optimizer
from .bench import dense_twin
from .latency import Latency, check_counts, interleaved_seconds

# The stage of a run that is timed: in the middle of the cubic schedule, of the paths' decay.
STEPS, MIDDLE = 1000, 400
KEEP = 0.5
#: (dense model, rank) -> the callbacks of the stage that the model is in then
Attach = Callable[[nn.Module, int], list[TrainerCallback]]
MIXED_RANK_P = 0.5


class TopShare(torch.autograd.Function):
    """The mask of the top share of the scores as published movement pruning makes it: a sort at every forward."""

    @staticmethod
    def forward(ctx, scores: torch.Tensor, keep: float) -> torch.Tensor:
        order = scores.flatten().sort(descending=True).indices
        mask = torch.zeros_like(scores).flatten()
        mask[order[: int(keep * scores.numel())]] = 1.0
        return mask.view_as(scores)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class SortedMaskLinear(nn.Linear):
    """Published movement pruning: weight * mask in float32, with the mask sorted anew in every forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight * TopShare.apply(self.scores, KEEP), self.bias)


def _finetune(model: nn.Module, rank: int) -> list[TrainerCallback]:
    return []


def _pruned_by(make_pruner: Callable[[int], Pruner]) -> Attach:
    """Prune by what ``make_pruner`` makes of the rank."""

    def attach(model: nn.Module, rank: int) -> list[TrainerCallback]:
        pruner = make_pruner(rank)
        pruner.attach(model)
        return [pruner.callback(STEPS)]

    return attach


def _prune_published(model: nn.Module, rank: int) -> list[TrainerCallback]:
    for linear in encoder_linears(model).values():
        linear.scores = nn.Parameter(torch.zeros_like(linear.weight))
        linear.__class__ = SortedMaskLinear
    return []


def _mixed_rank(model: nn.Module, rank: int) -> list[TrainerCallback]:
    factorized = SVDFactorizer(rank)(model)
    mixed = MixedRank(MIXED_RANK_P)
    mixed.attach(model, factorized.weights)
    return mixed.callbacks(STEPS, passes=2)


#: name -> (what turns a dense model into what is trained and returns the stage's callbacks, passes per batch)
STAGES: dict[str, tuple[Attach, int]] = {
    "fine-tuning": (_finetune, 1),
    "pruning": (_pruned_by(lambda rank: SensitivityPruner(KEEP)), 1),
    "pruning-movement": (_pruned_by(lambda rank: MovementPruner(KEEP, score_init=4.0)), 1),
    "pruning-hard": (_pruned_by(lambda rank: HardMovementPruner(KEEP)), 1),
    "pruning-published": (_prune_published, 1),
    # every step selects, as in the last phase of a run
    "losparse": (_pruned_by(lambda rank: ImportancePruner(KEEP, rank, interval=1)), 1),
    "mixed-rank": (_mixed_rank, 2),
}


class TrainingStep:
    """One update of a stage: the pipeline's forward, backward, clip, AdamW and callbacks on one fixed batch.

    Args:
        stage: a name in ``STAGES``.
        model: a dense classifier; it is copied.
        rank: of the factors.
        inputs: input_ids and attention_mask [batch, length], labels [batch].
        bf16: autocast to bfloat16.
        compiled: run the model through torch.compile.
    """

    def __init__(
        self, stage: str, model: nn.Module, rank: int, inputs: dict[str, torch.Tensor], bf16: bool, compiled: bool
    ) -> None:
        attach, passes = STAGES[stage]
        self.model = copy.deepcopy(model).train()
        self.callbacks = attach(self.model, rank)
        self.objective = Objective("classification", consistency=float(passes == 2))
        self.inputs, self.labels = dict(inputs), inputs["labels"]
        del self.inputs["labels"]
        if passes == 2:
            self.inputs = {name: torch.cat((value, value)) for name, value in self.inputs.items()}
        self.options = TrainOptions(epochs=1, learning_rate=5e-5, batch_size=len(self.labels), seed=0, bf16=bf16)
        decayed = get_parameter_names(self.model, [nn.LayerNorm], ["bias", "layernorm", "rmsnorm"])
        self.optimizer = make_optimizer(self.model, self.options, set(decayed))
        self.state, self.control = TrainerState(max_steps=STEPS, global_step=MIDDLE), TrainerControl()
        self.forward = torch.compile(self.model, dynamic=False) if compiled else self.model

    def _notify(self, event: str) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(None, self.state, self.control, model=self.model)

    def __call__(self) -> None:
        device = self.labels.device.type
        self._notify("on_step_begin")
        with torch.autocast(device, dtype=torch.bfloat16) if self.options.bf16 else nullcontext():
            logits = self.forward(**self.inputs).logits
        loss, _ = self.objective(logits, self.labels, None)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm)
        self._notify("on_pre_optimizer_step")
        self.optimizer.step()
        self._notify("on_optimizer_step")
        self.optimizer.zero_grad()
        self.state.global_step += 1
        self._notify("on_step_end")


def bench_steps(
    model: str,
    batch: int = 32,
    length: int = 64,
    rank: int | None = None,
    ratio: float | None = None,
    stages: Sequence[str] | None = None,
    rounds: int = 20,
    warmup: int = 2,
    threads: int | None = None,
    device: str | None = None,
    bf16: bool = False,
    compiled: bool = False,
) -> list[dict[str, Any]]:
    """One row per stage: milliseconds of one training step, interleaved, and the ratio to the first stage.

    Args:
        model: model directory or name; only its configuration is used, the weights are random.
        batch, length: of one update, without padding.
        rank, ratio: size of the factors, at most one of them. Default: the rank of ratio 0.25.
        stages: names in ``STAGES``; the first is what the others are compared with. Default: all that ``compiled``
            allows. Mixed-rank cannot be compiled: its paths change with every step.
        rounds: timed steps of each stage. Default: 20.
        warmup: untimed steps before them. Default: 2.
        bf16: train under bfloat16 autocast. Default: False.
        compiled: through torch.compile. Default: False.

    Raises:
        InputError: bad model, device, stage or size.
    """
    check_counts(rounds, threads)
    possible = [stage for stage in STAGES if not (compiled and stage == "mixed-rank")]
    stages = possible if stages is None else stages
    for stage in stages:
        if stage not in possible:
            raise InputError(f"--stages {stage}: expected some of {', '.join(possible)}")
    if rank is None and ratio is None:
        ratio = 0.25
    target = resolve_device(device)
    problem = head_problem(load_config(model))
    if problem not in ("classification", "masked-language-modeling"):  # whose head gives way to a classifier's
        raise InputError(f"--step: times the training of classifiers; --model {model} is for {problem}")
    torch.manual_seed(0)
    dense = dense_twin(model, "classification")
    limit = most_tokens(dense.config)
    if limit and length > limit:
        raise InputError(f"--length {length}: the model takes at most {limit} tokens")
    rank = resolve_rank(matrix_shapes(dense), rank, ratio)
    dense.to(target)
    ids = torch.randint(5, dense.config.vocab_size, (batch, length))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs["labels"] = torch.randint(0, dense.config.num_labels, (batch,))
    inputs = {name: value.to(target) for name, value in inputs.items()}
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        steps = {stage: TrainingStep(stage, dense, rank, inputs, bf16, compiled) for stage in stages}
        description = f"step {batch}x{length}"
        seconds = interleaved_seconds(steps, torch.device(target), rounds, warmup, description)
        used = torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
    first = seconds[stages[0]]
    rows = []
    for stage, times in seconds.items():
        latency = Latency.of(times)
        # Of each round, so that a slow minute weighs on both sides.
        ratios = [time / other for time, other in zip(times, first, strict=True)]
        rows.append(
            {
                "stage": stage,
                "step_ms": latency.median,
                "p20": latency.p20,
                "p80": latency.p80,
                "ratio": statistics.median(ratios),
                "model": model,
                "rank": rank,
                "batch": batch,
                "length": length,
                "dtype": "bfloat16 autocast" if bf16 else "float32",
                "mode": "compiled" if compiled else "eager",
                "device": device_name(target),
                "threads": used,
                "rounds": rounds,
            }
        )
    return rows
