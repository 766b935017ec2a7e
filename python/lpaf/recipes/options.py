"""Options of ``lpaf compress``, as one validated dataclass; the command line is generated from it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..factorize import FISHER_TRANSFORMS, WEIGHTINGS
from ..models.count import AUTO
from ..models.neurons import LOW_RANK_SHARE

#: values of --pruner: names in lpaf.prune.PRUNERS
PRUNER_CHOICES = ("sensitivity", "movement", "soft-movement", "cap", "magnitude", "gradual-magnitude", "lottery-ticket")
#: value of --distill: layer by layer
LAYER = "layer"
#: options of --distill layer -> LoSparse's choice for most tasks (Tables 12 and 13: alpha_output, alpha_layer)
LAYER_WISE = {"distill_output": 0.0, "distill_layer": 15.0}

#: values of --weighting: those that need no data
ROW_WEIGHTINGS = tuple(name for name in WEIGHTINGS if name != "fisher")
#: the value of --calibration that means the training set
CALIBRATE_ON_TRAINING = "train"
#: the value of --fisher that means on the training set
COMPUTE = "compute"
#: fields about Fisher information
FISHER_OPTIONS = ("fisher", "fisher_samples", "save_fisher")


def option(default: Any, text: str, group: str, **extra: Any) -> Any:
    """A dataclass field with what the command line needs to show it."""
    return dataclasses.field(default=default, metadata={"help": text, "group": group, **extra})


@dataclass(frozen=True)
class CompressOptions:
    """Everything that decides a compression run; see each field's help.

    Raises:
        InputError: an option outside its range; the message names it as the command line does.
    """

    model: str = option("", "model directory, Hub name, or built-in short name (minilm-l6)", "what", metavar="MODEL")
    task: str = option(
        "",
        "task name: sst2, cola, mrpc, ..., squad, squad_v2, cnn_dailymail, xsum, text-classification, text-regression, "
        "question-answering, summarization, language-modeling (causal), mlm (masked), docstrings",
        "what",
    )
    output: str = option("", "directory to write; must not exist or be empty", "what", metavar="DIR")
    method: str = option("lpaf", "compression method", "what")
    save_dense: str | None = option(None, "also save the fine-tuned dense model here", "what", metavar="DIR")
    rank: int | str | None = option(
        None,
        "rank of every encoder matrix; auto: its own for each, with the least weighted error at --ratio",
        "size",
        metavar="K|auto",
    )
    ratio: float | None = option(
        None,
        "share of encoder weights to keep, in (0, 1]; picks one rank, or with --rank auto many; the only size of "
        "methods that remove neurons, blocks or layers",
        "size",
        metavar="R",
    )
    rank_error: float | None = option(
        None,
        "the smallest rank of each matrix that has at most this relative weighted error, in (0, 1)",
        "size",
        metavar="E",
    )
    force: bool = option(False, "accept ranks above break-even, where factors outweigh their matrix", "size")

    modules: str | None = option(
        None,
        "offline compression of these matrices, without training: embeddings, and roles of linears such as key, query, "
        "value, output-dense",
        "modules",
        metavar="NAME,NAME",
    )
    compression_ratio: float | None = option(
        None, "size of the --modules before over their size after, all stored numbers counted", "modules", metavar="CR"
    )
    module_settings: str | None = option(
        None,
        "TOML file with a table [NAME] for modules whose settings differ: the options of this group but the first",
        "modules",
        metavar="FILE",
    )
    concatenate: bool = option(
        False, "the matrices of a role in all layers, on top of each other, share a decoder", "modules"
    )
    decoder: str | None = option(
        None, "autoencoder: its decoder (default: linear)", "modules", choices=("linear", "mlp1", "mlp2")
    )
    cosine: float | None = option(
        None, "autoencoder: share B of the cosine distance in its loss, in [0, 1] (default: 0)", "modules", metavar="B"
    )
    keep_norms: bool = option(
        False, "autoencoder: rebuilt rows get the original norms (not in a tied output layer)", "modules"
    )
    module_lr: float | None = option(None, "autoencoder: learning rate (default: 5e-4)", "modules", metavar="X")
    module_updates: int | None = option(None, "autoencoder: most updates (default: 10000)", "modules", metavar="N")
    module_batch: int | None = option(None, "autoencoder: rows per update (default: 256)", "modules", metavar="N")
    module_patience: int | None = option(
        None, "autoencoder: stop after N times 500 updates without a better loss (default: 4)", "modules", metavar="N"
    )
    fisher_transform: str | None = option(
        None,
        "autoencoder: how the rows' Fisher information x weighs them in its loss: x^0.1, x^0.5 (default), x^0.9, x^2, "
        "log, log+10, raw",
        "modules",
        choices=FISHER_TRANSFORMS,
    )
    stop_on: str | None = option(
        None,
        "autoencoder: what has to get better, the loss of its own, or the model's metric on validation (default: loss)",
        "modules",
        choices=("loss", "metric"),
    )

    data_dir: str | None = option(
        None,
        "folder with train.* and validation.* (csv, json, jsonl, parquet; txt for language-modeling and mlm)",
        "data",
        metavar="DIR",
    )
    train_file: str | None = option(None, "training file, instead of --data-dir", "data", metavar="FILE")
    validation_file: str | None = option(None, "validation file, instead of --data-dir", "data", metavar="FILE")
    test_file: str | None = option(
        None, "file that every stage is also scored on, apart from validation", "data", metavar="FILE"
    )
    max_train_samples: int | None = option(
        None, "use at most N training examples, or blocks of running text (seeded choice)", "data", metavar="N"
    )
    max_length: int | None = option(
        None,
        "tokens per example (default: 384 for questions, 512 for summaries and language-modeling, else 128, or what "
        "the model takes)",
        "data",
        metavar="N",
    )

    calibration: str | None = option(
        None,
        "file of examples on which the factors are to give the matrices' outputs (no labels needed), or train: the "
        "training set",
        "data",
        metavar="FILE|train",
    )
    calibration_samples: int | None = option(
        None, "use at most N examples of --calibration (seeded choice; default: 256)", "data", metavar="N"
    )

    fisher: str | None = option(
        None,
        "fwsvd: file of Fisher information that --save-fisher wrote, or compute (default): on the training set",
        "data",
        metavar="FILE|compute",
    )
    fisher_samples: int | None = option(
        None,
        "fwsvd: compute it on at most N training examples, windows or blocks (seeded choice; default: 256)",
        "data",
        metavar="N",
    )
    save_fisher: str | None = option(
        None, "fwsvd: also write the computed Fisher information here (safetensors)", "data", metavar="FILE"
    )

    doc_stride: int | None = option(
        None,
        "tokens that neighbouring windows of a context share (default: 128, or a third of --max-length if less)",
        "answers",
        metavar="N",
    )
    n_best: int | None = option(
        None, "starts and ends of a window that are tried (default: 20)", "answers", metavar="N"
    )
    max_answer_length: int | None = option(None, "tokens of the longest answer (default: 30)", "answers", metavar="N")
    null_threshold: float | None = option(
        None,
        "squad_v2: how far the score of no answer must be above that of the best answer (default: 0)",
        "answers",
        metavar="X",
    )

    max_target_length: int | None = option(
        None, "tokens of a summary that the model is trained on (default: 128)", "texts", metavar="N"
    )
    num_beams: int | None = option(
        None, "beams of the search for a summary; 1 is greedy (default: 4)", "texts", metavar="N"
    )
    generate_length: int | None = option(
        None, "most tokens of a summary that is written (default: --max-target-length)", "texts", metavar="N"
    )
    length_penalty: float | None = option(
        None, "above 0 favours long summaries, below 0 short ones (default: the model's own)", "texts", metavar="X"
    )
    no_repeat_ngram: int | None = option(
        None, "write no N tokens in a row twice; 0 allows it (default: the model's own)", "texts", metavar="N"
    )

    finetune_epochs: float | None = option(
        None,
        "epochs of dense fine-tuning (default: 0 if the model has a trained head for the task, else 3; 3 for summaries "
        "and running text)",
        "training",
        metavar="F",
    )
    prune_epochs: float = option(2.0, "epochs of pruning", "training", metavar="F")
    retrain_epochs: float | None = option(
        None,
        "epochs of retraining after factorisation; 0: none (default: 3, with --modules 0)",
        "training",
        metavar="F",
    )
    batch_size: int = option(32, "examples per update", "training", metavar="N")
    finetune_lr: float = option(5e-5, "learning rate of dense fine-tuning", "training", metavar="X")
    prune_lr: float = option(5e-5, "learning rate of the weights while pruning", "training", metavar="X")
    score_lr: float | None = option(
        None, "learning rate of the pruning scores (default: 0.01; of cofi's gates 0.1)", "training", metavar="X"
    )
    retrain_lr: float = option(4e-4, "learning rate of retraining", "training", metavar="X")
    freeze_embeddings: bool = option(False, "train no embeddings while pruning and retraining (faster)", "training")
    distill: float | str = option(
        0.5,
        "weight of logit distillation from the dense model, in [0, 1]; layer: its hidden states teach those of "
        "every layer",
        "training",
        metavar="X|layer",
    )
    distill_output: float | None = option(
        None,
        "--distill layer: weight of logit distillation, beside the whole task loss (default: 0)",
        "training",
        metavar="A",
    )
    distill_layer: float | None = option(
        None,
        "--distill layer: weight of the layers' summed mean squared errors (default: 15)",
        "training",
        metavar="A",
    )
    temperature: float = option(2.0, "temperature of the distillation", "training", metavar="X")
    seed: int = option(0, "seed of data order, dropout, draws and new heads", "training", metavar="N")

    keep: float = option(0.5, "share of weights that pruning keeps", "method", metavar="V")
    scope: str | None = option(
        None,
        "where pruning ranks its scores (default: matrix; for neurons global)",
        "method",
        choices=("matrix", "global"),
    )
    low_rank_share: float | None = option(
        None,
        f"losparse, cofi+losparse: share of the encoder weights that U V gets (default: {LOW_RANK_SHARE:g}, at most "
        "half of --ratio); the rows of S get the rest of --ratio",
        "method",
        metavar="P",
    )
    uncertainty: float | None = option(
        None,
        "losparse, itp, low-rank-2, cofi+losparse: multiply importance by its uncertainty, a moving average with this "
        "decay, as PLATON does, such as 0.95 (default: importance alone)",
        "method",
        metavar="B",
    )
    pruner: str | None = option(
        None,
        "how --method lpaf prunes: sensitivity (default: |W dL/dW| added up), movement (the papers' scores, for "
        "long runs), soft-movement, cap (movement with contrastive losses), magnitude (once, without training), "
        "gradual-magnitude, lottery-ticket",
        "method",
        choices=PRUNER_CHOICES,
    )
    prune_from: str = option(
        "finetuned",
        "weights that pruning starts from: finetuned, or pretrained, which it fine-tunes at the same time, taught by "
        "the fine-tuned model",
        "method",
        choices=("finetuned", "pretrained"),
    )
    score_init: float | None = option(
        None,
        "learned scores start at X times |W| / mean |W|; 0 starts them at zero, as the papers do (default: 4 for "
        "movement and cap, 0 for soft-movement)",
        "method",
        metavar="X",
    )
    threshold: float = option(0.1, "soft-movement keeps where sigmoid(score) is above X", "method", metavar="X")
    penalty: float = option(
        100.0, "soft-movement: weight of the mean sigmoid(score); more prunes more", "method", metavar="X"
    )
    contrastive: float = option(0.1, "cap: weight of each contrastive loss", "method", metavar="X")
    prune_interval: int = option(
        10, "updates between the selections of gradual-magnitude, and of neurons", "method", metavar="N"
    )
    rounds: int = option(
        3, "lottery-ticket prunes and rewinds N times, and trains --prune-epochs N + 1 times", "method", metavar="N"
    )
    hard_pruning: bool = option(
        False,
        "prune by movement and zero pruned weights on the spot; scores add it up without an optimizer, from zero, as "
        "the paper's text has it",
        "method",
    )
    prune_warmup: float = option(0.1, "share of pruning updates before it starts", "method", metavar="X")
    prune_cooldown: float = option(0.3, "share of pruning updates at the final share", "method", metavar="X")
    prune: bool = option(True, "skip pruning (its updates go to retraining)", "method", negate=True)
    weighting: str = option("scores", "row weights of the SVD", "method", choices=ROW_WEIGHTINGS)
    mixed_rank: bool = option(True, "retrain the factors alone, without the sparse matrices", "method", negate=True)
    mixed_rank_p: float | None = option(
        None, "first probability of the sparse path (default: by rank)", "method", metavar="P"
    )
    consistency: bool = option(True, "one pass per batch, without the consistency loss", "method", negate=True)

    stages: str | None = option(
        None,
        "keep finished stages (fine-tuning, pruning) here, and start from those that other runs left",
        "running",
        metavar="DIR",
    )
    checkpoint_steps: int = option(200, "updates between checkpoints; 0 writes none", "running", metavar="N")
    resume: bool = option(False, "continue an interrupted run of the same options", "running")
    overwrite: bool = option(False, "replace an existing output, or discard an interrupted run", "running")
    device: str | None = option(None, "cpu or cuda (default: cuda if there is one)", "running")
    bf16: bool = option(False, "train under bfloat16 autocast", "running")
    bench_batch: int = option(8, "batch of the latency measurement", "running", metavar="N")
    bench_length: int = option(128, "sequence length of the latency and FLOP figures", "running", metavar="N")

    def __post_init__(self) -> None:
        if self.retrain_epochs is None:
            object.__setattr__(self, "retrain_epochs", 3.0 if self.modules is None else 0.0)
        for name in ("model", "task", "output"):
            if not getattr(self, name):
                raise InputError(f"{flag(name)}: is required")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "float" in str(field.type) and isinstance(value, int | float):
                if not math.isfinite(value):
                    raise InputError(f"{flag(field.name)} {value}: must be a finite number")
                object.__setattr__(self, field.name, float(value))  # 2 and 2.0 are the same run
        positive = ("batch_size", "max_length", "bench_batch", "bench_length", "max_train_samples")
        positive += ("prune_interval", "rounds", "calibration_samples", "fisher_samples")
        for name in (*positive, "finetune_lr", "prune_lr", "score_lr", "retrain_lr", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{flag(name)} {value:g}: must be above 0")
        not_negative = ("finetune_epochs", "retrain_epochs", "checkpoint_steps", "seed", "score_init", "penalty")
        for name in (*not_negative, "contrastive", *LAYER_WISE):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{flag(name)} {value:g}: must be 0 or more")
        if self.prune and not self.prune_epochs > 0:
            raise InputError(f"--prune-epochs {self.prune_epochs:g}: must be above 0, or pass --no-prune")
        if isinstance(self.distill, str) and self.distill != LAYER:
            raise InputError(f"--distill {self.distill!r}: expected a number in [0, 1] or {LAYER}")
        for name in ("distill", "mixed_rank_p"):
            value = getattr(self, name)
            if isinstance(value, float) and not 0.0 <= value <= 1.0:
                raise InputError(f"{flag(name)} {value:g}: must be in [0, 1]")
        for name, default in LAYER_WISE.items():
            if getattr(self, name) is not None and not self.layer_wise:
                raise InputError(f"{flag(name)}: is for --distill {LAYER}; --distill {self.distill:g} would ignore it")
            if getattr(self, name) is None and self.layer_wise:
                object.__setattr__(self, name, default)  # left out or given, it is the same run
        if self.layer_wise and not self.distill_output + self.distill_layer > 0:
            raise InputError(f"--distill {LAYER}: its weights are both 0; pass --distill 0 to train without a teacher")
        if self.layer_wise and not self.distill_output:
            for name in given_flags(self, ("temperature",)):
                raise InputError(
                    f"{name}: is for logits, which --distill {LAYER} leaves out; pass --distill-output as well"
                )
        if not 0.0 < self.keep <= 1.0:
            raise InputError(f"--keep {self.keep:g}: must be in (0, 1]")
        if not 0.0 < self.threshold < 1.0:
            raise InputError(f"--threshold {self.threshold:g}: must be in (0, 1)")
        if self.hard_pruning:
            if not self.prune:
                raise InputError("--hard-pruning: needs pruning; leave out --no-prune")
            if self.pruner not in (None, "movement"):
                raise InputError(f"--hard-pruning: is for movement pruning, not for --pruner {self.pruner}")
            for field in dataclasses.fields(self):
                if field.name in ("score_init", "score_lr") and getattr(self, field.name) != field.default:
                    raise InputError(f"{flag(field.name)}: is for learned scores, which --hard-pruning does not have")
        for name in ("low_rank_share", "uncertainty"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise InputError(f"{flag(name)} {value:g}: must be in (0, 1)")
        for name in ("prune_warmup", "prune_cooldown"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise InputError(f"{flag(name)} {getattr(self, name):g}: must be in [0, 1)")
        if self.prune_warmup + self.prune_cooldown >= 1.0:
            raise InputError(
                f"--prune-warmup {self.prune_warmup:g} and --prune-cooldown {self.prune_cooldown:g}: leave no update "
                f"to prune in (of T updates, T - t_f = {1 - self.prune_cooldown:g} T is not after t_i = "
                f"{self.prune_warmup:g} T); their sum must be below 1"
            )
        for field in dataclasses.fields(self):
            choices = field.metadata.get("choices")
            if choices and getattr(self, field.name) not in (field.default, *choices):
                raise InputError(
                    f"{flag(field.name)} {getattr(self, field.name)!r}: expected one of {', '.join(choices)}"
                )

    @property
    def layer_wise(self) -> bool:
        """Whether the dense model teaches layer by layer."""
        return self.distill == LAYER

    @property
    def calibration_file(self) -> str | None:
        """The file of ``calibration``, where that is not the training set."""
        return None if self.calibration == CALIBRATE_ON_TRAINING else self.calibration

    @property
    def fisher_file(self) -> str | None:
        """The file of ``fisher``, where it is not to be computed."""
        return None if self.fisher == COMPUTE else self.fisher

    @property
    def trains(self) -> bool:
        """Whether fine-tuning or retraining may train; a pruner may in any case."""
        return self.finetune_epochs != 0 or self.retrain_epochs != 0

    @property
    def forced(self) -> bool | None:
        """``force`` where it decides how large ranks become; None where it only lets a size pass."""
        return self.force if self.rank == AUTO or self.rank_error is not None else None

    def to_dict(self, without: Collection[str] = ()) -> dict[str, Any]:
        """All options but those named, JSON-able."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in without}


#: options that do not change the weights a run ends with; a resumed run may change them
RUN_OPTIONS = (
    "output",
    "save_dense",
    "save_fisher",
    "stages",
    "resume",
    "overwrite",
    "checkpoint_steps",
    "bench_batch",
    "bench_length",
    "force",
)
#: options that name what a run reads: its content counts, not where it lies
PATH_OPTIONS = ("model", "data_dir", "train_file", "validation_file", "test_file", "calibration", "fisher")
PATH_OPTIONS += ("module_settings",)
#: options that only autoencoders have
AUTOENCODER_OPTIONS = (
    "decoder",
    "cosine",
    "keep_norms",
    "module_lr",
    "module_updates",
    "module_batch",
    "module_patience",
    "stop_on",
    "fisher_transform",
)
#: options of what becomes of single modules; what of them decides a module's numbers is in its plan
MODULE_OPTIONS = ("modules", "compression_ratio", "concatenate", *AUTOENCODER_OPTIONS)
#: options that no stage before retraining depends on
RETRAIN_OPTIONS = (
    "method",
    "rank",
    "ratio",
    "rank_error",
    "calibration",
    "calibration_samples",
    "fisher",
    "fisher_samples",
    "retrain_epochs",
    "retrain_lr",
    "weighting",
    "mixed_rank",
    "mixed_rank_p",
    "consistency",
)
#: options that fine-tuning does not depend on, but pruning
PRUNE_OPTIONS = (
    "prune_epochs",
    "prune_lr",
    "score_lr",
    "freeze_embeddings",
    "distill",
    *LAYER_WISE,
    "temperature",
    "keep",
    "scope",
    "low_rank_share",
    "uncertainty",
    "pruner",
    "prune_from",
    "score_init",
    "threshold",
    "penalty",
    "contrastive",
    "prune_interval",
    "rounds",
    "hard_pruning",
    "prune_warmup",
    "prune_cooldown",
    "prune",
)
#: stages whose results are kept -> options that they do not depend on
INDEPENDENT = {
    "finetune": (*RUN_OPTIONS, *PATH_OPTIONS, *MODULE_OPTIONS, *RETRAIN_OPTIONS, *PRUNE_OPTIONS),
    "teacher": (*RUN_OPTIONS, *PATH_OPTIONS, *MODULE_OPTIONS, *RETRAIN_OPTIONS, *PRUNE_OPTIONS),
    "fisher": (*RUN_OPTIONS, *PATH_OPTIONS, *MODULE_OPTIONS, *RETRAIN_OPTIONS, *PRUNE_OPTIONS),
    "prune": (*RUN_OPTIONS, *PATH_OPTIONS, *MODULE_OPTIONS, *RETRAIN_OPTIONS, "pruner"),
    "round": (*RUN_OPTIONS, *PATH_OPTIONS, *MODULE_OPTIONS, *RETRAIN_OPTIONS, "pruner"),
    "module": (*RUN_OPTIONS, *PATH_OPTIONS, *MODULE_OPTIONS, *RETRAIN_OPTIONS, *PRUNE_OPTIONS),
}


def answer_fields() -> dict[str, dataclasses.Field]:
    """The options of question answering, by name."""
    return {field.name: field for field in dataclasses.fields(CompressOptions) if field.metadata["group"] == "answers"}


def text_fields() -> dict[str, dataclasses.Field]:
    """The options of summarisation, by name."""
    return {field.name: field for field in dataclasses.fields(CompressOptions) if field.metadata["group"] == "texts"}


def flag(name: str) -> str:
    """The command line's name of an option field."""
    return "--" + name.replace("_", "-")


def given_flags(options: CompressOptions, names: Collection[str]) -> list[str]:
    """What the command line calls those of the fields ``names`` that differ from their defaults, switched-off steps by
    the switch."""
    return [
        flag(f"no_{field.name}" if field.metadata.get("negate") else field.name)
        for field in dataclasses.fields(options)
        if field.name in names and getattr(options, field.name) != field.default
    ]
