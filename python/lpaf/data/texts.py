"""Tokens of the problems whose model writes: summaries, and blocks of running text.

``labels`` hold, for every position of the decoder, the token that it is to predict, and ``IGNORED`` where there is
none. (:mod:`.masking` has running text with hidden words.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, List, Value
from tqdm.auto import tqdm

from ..errors import InputError
from ..processes import is_main
from .tasks import TaskSpec

_CHUNK = 1000
#: label of positions that predict nothing; torch's cross entropy leaves them out
IGNORED = -100


@dataclass(frozen=True)
class TextOptions:
    """How summaries are cut for training and written for evaluation.

    Args:
        max_target_length: tokens of a summary that the model is trained on, with its end. Default: 128.
        num_beams: beams of the search; 1 is greedy. Default: 4.
        generate_length: most tokens that are written. Default: ``max_target_length``.
        length_penalty: exponent of the length by which a beam's score is divided. Default: the model's own.
        no_repeat_ngram: words of this many tokens are written once only; 0 allows repeats. Default: the model's own.
        prefix: what stands before every text ("summarize: " of T5); the model's, no option. Default: nothing.

    Raises:
        InputError: an option outside its range.
    """

    max_target_length: int = 128
    num_beams: int = 4
    generate_length: int | None = None
    length_penalty: float | None = None
    no_repeat_ngram: int | None = None
    prefix: str = ""

    def __post_init__(self) -> None:
        leasts = (("max_target_length", 2), ("num_beams", 1), ("generate_length", 1), ("no_repeat_ngram", 0))
        for name, least in leasts:
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        if self.length_penalty is not None and not math.isfinite(self.length_penalty):
            raise InputError(f"--length-penalty {self.length_penalty}: must be a finite number")

    @property
    def written(self) -> int:
        """Most tokens of a summary that is written."""
        return self.max_target_length if self.generate_length is None else self.generate_length


def text_options(spec: TaskSpec, options: Mapping[str, Any], config: Any, limit: int | None) -> TextOptions:
    """``TextOptions`` of those ``options`` that are not None.

    Args:
        config: the model's transformers configuration, whose ``task_specific_params`` may name a prefix.
        limit: most tokens that the model takes, or None.

    Raises:
        InputError: an option that the task would ignore, or that asks for more than the model takes.
    """
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if not spec.is_summarization:
            raise InputError(f"--{name.replace('_', '-')}: is for summarisation, not for --task {spec.name}")
    own = (getattr(config, "task_specific_params", None) or {}).get("summarization") or {}
    found = TextOptions(**given, prefix=own.get("prefix") or "" if spec.is_summarization else "")
    for name in ("max_target_length", "generate_length"):
        asked = getattr(found, name)
        if limit is not None and asked is not None and asked > limit:
            if name in given:
                raise InputError(f"--{name.replace('_', '-')} {asked}: the model takes at most {limit} tokens")
            found = dataclasses.replace(found, **{name: limit})
    return found


def tokenize_summaries(
    examples: Dataset, columns: tuple[str, str], tokenizer: Any, max_length: int, texts: TextOptions, description: str
) -> Dataset:
    """Token ids of texts and of their summaries, unpadded, cut to ``max_length`` and ``texts.max_target_length``.

    Args:
        examples: a dataset with ``columns``, the text and its summary.
        tokenizer: a transformers tokenizer.

    Returns:
        Columns input_ids, attention_mask, labels (the summary's tokens) and length (the text's tokens).
    """
    source, target = columns
    chunks = []
    for rows in chunks_of(examples, description):
        encoded = tokenizer([texts.prefix + text for text in rows[source]], truncation=True, max_length=max_length)
        written = tokenizer(text_target=rows[target], truncation=True, max_length=texts.max_target_length)
        chunks.append(token_rows(encoded["input_ids"], encoded["attention_mask"], written["input_ids"]))
    return datasets.concatenate_datasets(chunks)


def tokenize_blocks(documents: Dataset, column: str, tokenizer: Any, max_length: int, description: str) -> Dataset:
    """The documents as one stream of tokens, cut into blocks of ``max_length``, of which the last may be shorter.

    Between two documents stands the tokenizer's end-of-sequence token, if it has one (once, where it also begins
    documents). Every token is in exactly one block, and is a label once, but for the first of each block, which
    nothing in the block precedes.

    Returns:
        Columns input_ids, attention_mask (ones), labels (the next token; ``IGNORED`` for a block's last) and length.

    Raises:
        InputError: there are no two tokens.
    """
    stream = _stream(documents, column, tokenizer, description)
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    blocks = [block for block in blocks if len(block) > 1]
    if not blocks:
        raise InputError(f"--task language-modeling: {len(documents)} documents hold no two tokens; pass more text")
    labels = [np.append(block[1:], IGNORED) for block in blocks]
    return token_rows(blocks, [np.ones_like(block) for block in blocks], labels)


def _stream(documents: Dataset, column: str, tokenizer: Any, description: str) -> np.ndarray:
    """Token ids of all documents that are not empty, int32 [N]."""
    end = tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    for rows in chunks_of(documents, description):
        texts = [text for text in rows[column] if text]
        # a document is longer than a model's input on purpose: no warning
        for ids in tokenizer(texts, verbose=False)["input_ids"] if texts else ():
            if parts and end is not None:
                if parts[-1][-1:] != end:
                    parts.append(np.array([end], dtype=np.int32))
                if ids[:1] == [end]:
                    ids = ids[1:]
            if ids:
                parts.append(np.array(ids, dtype=np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


def chunks_of(rows: Dataset, description: str) -> Iterator[dict[str, list]]:
    """``rows`` in chunks, each as column -> values, with a progress bar that says ``description``."""
    starts = range(0, len(rows), _CHUNK)
    for start in tqdm(starts, desc=description, unit="chunk", delay=2, leave=False, disable=not is_main() or None):
        yield rows[start : start + _CHUNK]


def token_rows(input_ids: list, attention_mask: list, labels: list) -> Dataset:
    """A dataset with these columns, int32 (labels int64) and unpadded, and ``length``, that of ``input_ids``."""
    names = ("input_ids", "attention_mask")
    features = Features({name: List(Value("int32")) for name in names} | {"labels": List(Value("int64"))})
    features["length"] = Value("int64")
    columns = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    return Dataset.from_dict(columns | {"length": [len(ids) for ids in input_ids]}, features=features)
