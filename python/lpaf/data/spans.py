"""Questions and contexts as token windows, and answers as positions in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from ..errors import InputError
from .tasks import TaskSpec

_CHUNK = 1000
#: tokens of the context that neighbouring windows share, where they are long enough
DOC_STRIDE = 128
#: character offset of tokens that are not of the context
OUTSIDE = -1


@dataclass(frozen=True)
class SpanOptions:
    """How contexts are cut into windows and how answers are read from a model's logits.

    Args:
        doc_stride: tokens of the context that two neighbouring windows share. Default: 128, or a third of the
            windows' length if that is less.
        n_best: starts and ends of a window that are tried, the best ones. Default: 20.
        max_answer_length: tokens of the longest answer. Default: 30.
        null_threshold: how far the score of "no answer" must be above that of the best answer. Default: 0.

    Raises:
        InputError: an option outside its range.
    """

    doc_stride: int | None = None
    n_best: int = 20
    max_answer_length: int = 30
    null_threshold: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("doc_stride", 0), ("n_best", 1), ("max_answer_length", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        if not math.isfinite(self.null_threshold):
            raise InputError(f"--null-threshold {self.null_threshold}: must be a finite number")

    def stride(self, length: int) -> int:
        """Tokens that neighbouring windows of ``length`` tokens share."""
        return min(DOC_STRIDE, length // 3) if self.doc_stride is None else self.doc_stride


def span_options(spec: TaskSpec, options: Mapping[str, Any]) -> SpanOptions:
    """``SpanOptions`` of those ``options`` that are not None; InputError for one that the task would ignore."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if not spec.is_question_answering:
            raise InputError(f"--{name.replace('_', '-')}: is for question answering, not for --task {spec.name}")
    if "null_threshold" in given and not spec.unanswerable:
        raise InputError(f"--null-threshold: is for squad_v2; in {spec.name} every question has an answer")
    return SpanOptions(**given)


def tokenize_questions(
    questions: Dataset, tokenizer: Any, max_length: int, spans: SpanOptions, description: str = "tokenize"
) -> Dataset:
    """Windows of every question: the question, then as much of the context as fits.

    Args:
        questions: a dataset with ``squad.FEATURES``.
        tokenizer: a fast transformers tokenizer.
        max_length: tokens per window.
        spans: how many tokens of the context neighbouring windows share.

    Returns:
        One row per window (at least one for every question, in the dataset's order), unpadded: input_ids,
        attention_mask and token_type_ids (as far as the model takes them); labels, the first answer's [start, end],
        or twice the [CLS] position where the window does not hold it; length; example, the question's index; cls,
        the [CLS] position; starts and ends, the characters of the context that each token covers (``OUTSIDE`` for
        other tokens).

    Raises:
        InputError: the tokenizer is not a fast one, or a question leaves too little room for its context.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"--model {tokenizer.name_or_path}: its tokenizer is not a fast one, which question answering needs for "
            "the characters that tokens cover; save the model with tokenizer.json"
        )
    limit = min(max_length, tokenizer.model_max_length)
    chunks = []
    starts = range(0, len(questions), _CHUNK)
    for start in tqdm(starts, desc=description, unit="chunk", delay=2, leave=False, disable=None):
        chunks.append(_windows(questions[start : start + _CHUNK], start, tokenizer, limit, spans.stride(limit)))
    return datasets.concatenate_datasets(chunks)


def _windows(rows: Mapping[str, list], first: int, tokenizer: Any, limit: int, doc_stride: int) -> Dataset:
    """The windows of a chunk of questions, of which the first has index ``first``."""
    texts = [text.strip() for text in rows["question"]]
    _check_room(texts, rows, tokenizer, limit, doc_stride)
    encoded = tokenizer(
        texts,
        rows["context"],
        truncation="only_second",
        max_length=limit,
        stride=max(0, min(doc_stride, limit - tokenizer.num_special_tokens_to_add(pair=True) - 1)),  # more is an error
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    names = [name for name in tokenizer.model_input_names if name in encoded]
    columns: dict[str, list] = {name: encoded[name] for name in names}
    columns |= {name: [] for name in ("labels", "length", "example", "cls", "starts", "ends")}
    for index, (ids, owner) in enumerate(zip(encoded["input_ids"], encoded["overflow_to_sample_mapping"], strict=True)):
        starts, ends = _covered(encoded["offset_mapping"][index], encoded.sequence_ids(index))
        cls = cls_position(ids, tokenizer)
        tokens = _first_answer(rows["answers"][owner], starts, ends)
        columns["labels"].append(list(tokens or (cls, cls)))
        columns["length"].append(len(ids))
        columns["example"].append(first + owner)
        columns["cls"].append(cls)
        columns["starts"].append(starts)
        columns["ends"].append(ends)
    types = dict.fromkeys((*names, "starts", "ends"), List(Value("int32")))
    types |= {"labels": List(Value("int64"))} | dict.fromkeys(("length", "example", "cls"), Value("int64"))
    return Dataset.from_dict(columns, features=Features({name: types[name] for name in columns}))


def _check_room(questions: list[str], rows: Mapping[str, list], tokenizer: Any, limit: int, doc_stride: int) -> None:
    """InputError for the first question whose context does not fit beside it, nor into windows that share
    ``doc_stride`` tokens."""
    taken = tokenizer.num_special_tokens_to_add(pair=True)
    rooms = [limit - taken - count for count in _token_counts(questions, tokenizer)]
    tight = [index for index, room in enumerate(rooms) if room <= doc_stride]
    contexts = _token_counts([rows["context"][index] for index in tight], tokenizer)
    for index, context in zip(tight, contexts, strict=True):
        if context > rooms[index]:
            raise InputError(
                f"--doc-stride {doc_stride}: windows of {limit} tokens share so many, but question "
                f"{rows['id'][index]} leaves {max(rooms[index], 0)} for its context of {context}; pass a smaller "
                "--doc-stride, a larger --max-length or a shorter question"
            )


def _token_counts(texts: list[str], tokenizer: Any) -> list[int]:
    if not texts:
        return []
    return list(map(len, tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]))


def _covered(offsets: list[tuple[int, int]], sequences: list[int | None]) -> tuple[np.ndarray, np.ndarray]:
    """First and one past the last character of every token of the context, ``OUTSIDE`` for all other tokens."""
    starts, ends = np.array(offsets, dtype=np.int32).T
    inside = (np.array(sequences, dtype=np.float32) == 1) & (starts < ends)
    return np.where(inside, starts, OUTSIDE), np.where(inside, ends, OUTSIDE)


def cls_position(ids: list[int], tokenizer: Any) -> int:
    """Where [CLS] is, or <s> for tokenizers without one, or 0."""
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token in ids:
            return ids.index(token)
    return 0


def _first_answer(answers: Mapping[str, list], starts: np.ndarray, ends: np.ndarray) -> tuple[int, int] | None:
    if not answers["text"]:
        return None
    text, begin = answers["text"][0], answers["answer_start"][0]
    begin += len(text) - len(text.lstrip())
    return answer_tokens(starts, ends, begin, begin + len(text.strip()))


def answer_tokens(starts: np.ndarray, ends: np.ndarray, begin: int, stop: int) -> tuple[int, int] | None:
    """First and last token of the context's characters [begin, stop), or None where the window lacks some of them."""
    inside = np.flatnonzero(starts != OUTSIDE)
    if not inside.size or starts[inside[0]] > begin or ends[inside[-1]] < stop:
        return None
    first = inside[np.searchsorted(ends[inside], begin, side="right")]
    last = inside[np.searchsorted(starts[inside], stop, side="left") - 1]
    return (int(first), int(last)) if first <= last else None
