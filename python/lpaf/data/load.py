"""From files or the Hub to checked, tokenised datasets."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value
from tqdm.auto import tqdm

from ..errors import InputError
from ..hub import hub_has_dataset
from ..processes import is_main
from . import docstrings
from .files import SUFFIXES, TEXT_SUFFIX, Row, bad_row, read_rows, read_text
from .masking import tokenize_masked_blocks
from .spans import SpanOptions, tokenize_questions
from .squad import FEATURES, check_answerable, read_questions
from .task_data import TEST, TaskData, make_task_data
from .tasks import CLASSIFICATION, TaskSpec, get_task
from .texts import TextOptions, tokenize_blocks, tokenize_summaries

_TOKENIZE_CHUNK = 2000
_MIN_LENGTH = 4
_WHOLE = re.compile(r"-?[0-9]+")


def load_task(
    task: str | TaskSpec,
    data_dir: str | Path | None = None,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    max_train_samples: int | None = None,
    seed: int = 0,
    evaluation_only: bool = False,
    test_file: str | Path | None = None,
) -> TaskData:
    """Training and validation examples of a task.

    From ``data_dir`` (train.* and validation.*, or dev.*; for mnli validation_matched.* and
    validation_mismatched.*), from the two files, or, for a task with a name on the Hub without either, from there.
    ``docstrings`` without either is built on the spot. Running text may also be .txt files, each one document.

    Args:
        task: name or specification.
        max_train_samples: keep a seeded choice of so many training examples, in their order. Default: all. For
            running text, whose examples are made by :func:`tokenize`, see :func:`sampled`.
        seed: seed of that choice.
        evaluation_only: leave ``train`` None and need no training file; the classes of a task without fixed
            ones are then those of the validation file (``check_labels`` puts them in a model's order).
        test_file: one more file to score on, as the split ``TEST``; goes with ``data_dir`` or the two files.

    Raises:
        InputError: the task is unknown; the arguments contradict each other; nothing says where the data are,
            or the Hub cannot be reached; a file is missing, empty or of another kind; a row cannot be read,
            lacks a column or has no valid label (file and line are named); the training examples have one
            class, or one value, only, or no answer.
    """
    spec = get_task(task) if isinstance(task, str) else task
    if max_train_samples is not None and max_train_samples < 1:
        raise InputError(f"--max-train-samples {max_train_samples}: pass a number of at least 1")
    if data_dir is None and train_file is None and validation_file is None:
        if test_file is not None:
            raise InputError("--test-file: needs --data-dir, or --train-file and --validation-file, beside it")
        data = _built_in(spec)
        if evaluation_only:
            data = make_task_data(spec, None, data.validation, data.labels)
    else:
        train, held_out = _paths(spec, data_dir, train_file, validation_file, evaluation_only)
        if test_file is not None:
            held_out[TEST] = _Source(Path(test_file), "--test-file")
        data = _from_files(spec, train, held_out)
    chosen = None if spec.is_running_text else max_train_samples
    if data.train is not None and chosen is not None and chosen < len(data.train):
        train = sampled(data.train, chosen, seed)
        _check_training(train, spec, data.labels, f"--max-train-samples {max_train_samples}")
        data = make_task_data(spec, train, data.validation, data.labels)
    return data


def load_texts(data: TaskData, path: str | Path, argument: str) -> Dataset:
    """The texts of one more file, with the text columns of ``data``; labels are neither needed nor read.

    Args:
        data: the task's examples.
        path: a file of the kinds that ``load_task`` reads. Questions need their answers and texts their summaries, as
            in training.
        argument: the option that named the file, for messages.

    Returns:
        What ``tokenize`` takes: the text columns and, where examples have labels, a ``label`` that says nothing.

    Raises:
        InputError: the file is missing, empty or of another kind, or has other columns; a row cannot be read.
    """
    spec, source = data.spec, _Source(Path(path), argument)
    if spec.is_question_answering:
        return read_questions(source.path, argument, spec)
    if spec.is_running_text:
        return _read_documents(source, spec)
    rows = read_rows(source.path, argument)
    columns = _text_columns(rows, spec, source, labelled=False)
    theirs = tuple(name for name in data.validation[data.main_split].column_names if name != "label")
    if columns != theirs:
        raise InputError(
            f"{argument} {path}: its text columns are {', '.join(columns)}, those of the validation data are "
            f"{', '.join(theirs)}; use the same columns in both"
        )
    content = {column: [_text(row, place, column, source) for place, row in rows] for column in columns}
    features = _features(spec, columns)
    return Dataset.from_dict({name: content.get(name, [0] * len(rows)) for name in features}, features=features)


def sampled(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    """A seeded choice of ``count`` rows in their order, or ``dataset`` itself where it has no more."""
    if count is None or count >= len(dataset):
        return dataset
    chosen = sorted(random.Random(seed).sample(range(len(dataset)), count))
    return Dataset.from_dict(dataset[chosen], features=dataset.features)


def check_labels(data: TaskData, config: Any) -> TaskData:
    """The same examples with their labels in the order of a model's classes.

    Names are matched exactly, else without regard to case. Where one side has no names (the model's are
    LABEL_0, ..., or the data's are whole numbers) the number is the index.

    Args:
        data: the task's examples.
        config: the model's configuration (``num_labels`` and ``id2label``).

    Returns:
        ``data`` itself if nothing changes, else a copy with the model's classes as ``labels``.

    Raises:
        InputError: a label outside the model's classes; a classification model for regression data or the
            reverse.
    """
    if data.spec.is_question_answering or data.spec.predicts_tokens:
        return data  # the answers are in the contexts, or texts themselves
    task, outputs = f"--task {data.spec.name}", config.num_labels
    if data.labels is None:
        if outputs != 1:
            raise InputError(
                f"{task}: labels are numbers but the model has {outputs} classes; pass one with one output"
            )
        return data
    if outputs == 1:
        raise InputError(
            f"{task}: there are {data.num_labels} classes but the model predicts a number; pass a classifier"
        )
    names = tuple(str(config.id2label[index]) for index in range(outputs))
    mapping = _match_labels(data.labels, names, task)
    if data.labels == names:
        return data
    splits = {
        name: split and _relabel(split, mapping) for name, split in {"train": data.train, **data.validation}.items()
    }
    return make_task_data(data.spec, splits.pop("train"), splits, names)


def _match_labels(labels: Sequence[str], names: Sequence[str], argument: str) -> tuple[int, ...]:
    """For each of the data's classes, the index of the model's class."""
    exact = {name: index for index, name in enumerate(names)}
    folded = {name.casefold(): index for name, index in exact.items()}
    nameless = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    mapping = []
    for index, label in enumerate(labels):
        number = int(label) if label.isdecimal() else index
        if label in exact:
            mapping.append(exact[label])
        elif label.casefold() in folded:
            mapping.append(folded[label.casefold()])
        elif (nameless or label.isdecimal()) and number < len(names):
            mapping.append(number)
        else:
            raise InputError(
                f"{argument}: label {label!r} is not one of the model's classes ({_listed(names)}); "
                "pass a model trained for these labels, or rename them"
            )
    if len(set(mapping)) < len(mapping):
        raise InputError(
            f"{argument}: labels {_listed(labels)} cannot be told apart among the model's classes "
            f"({_listed(names)}); rename them as the model does"
        )
    return tuple(mapping)


def tokenize(
    dataset: Dataset,
    tokenizer: Any,
    spec: TaskSpec,
    max_length: int = 128,
    labels: Sequence[str] | None = None,
    description: str = "tokenize",
    spans: SpanOptions | None = None,
    texts: TextOptions | None = None,
) -> Dataset:
    """Token ids of every example, unpadded.

    Questions become windows of their contexts, see :func:`spans.tokenize_questions`; summaries and running text are
    cut by :func:`texts.tokenize_summaries`, :func:`texts.tokenize_blocks` and :func:`masking.tokenize_masked_blocks`.

    Args:
        dataset: a split of ``TaskData``.
        tokenizer: a transformers tokenizer.
        max_length: longer examples are cut (the longer text of a pair first).
        labels: class names; every label must be an index into them. Default: not checked.
        description: what the progress bar says.
        spans: for question answering. Default: ``SpanOptions()``.
        texts: for summarisation. Default: ``TextOptions()``.

    Returns:
        Columns input_ids, attention_mask and token_type_ids (as far as the model takes them), length (int64),
        and labels (int64, or float32 for regression), in the dataset's order.

    Raises:
        InputError: ``max_length`` is too small to hold any text, or any of a context.
        ValueError: a label is no index into ``labels``.
    """
    if max_length < _MIN_LENGTH:
        raise InputError(f"--max-length {max_length}: pass a number of at least {_MIN_LENGTH}")
    if spec.is_question_answering:
        return tokenize_questions(dataset, tokenizer, max_length, spans or SpanOptions(), description)
    if labels is not None and not set(dataset.unique("label")) <= set(range(len(labels))):
        raise ValueError(f"labels={tuple(labels)!r}: the dataset has other labels: {sorted(dataset.unique('label'))}")
    columns = next(choice for choice in spec.text_columns if set(choice) <= set(dataset.column_names))
    if spec.is_language_modeling:
        return tokenize_blocks(dataset, *columns, tokenizer, max_length, description)
    if spec.is_masked_language_modeling:
        return tokenize_masked_blocks(dataset, *columns, tokenizer, max_length, description)
    if spec.is_summarization:
        return tokenize_summaries(dataset, columns, tokenizer, max_length, texts or TextOptions(), description)
    limit = min(max_length, tokenizer.model_max_length)
    features = Features({"labels": Value("float32" if spec.is_regression else "int64"), "length": Value("int64")})
    chunks = []
    starts = range(0, len(dataset), _TOKENIZE_CHUNK)
    for start in tqdm(starts, desc=description, unit="chunk", delay=2, leave=False, disable=not is_main() or None):
        rows = dataset[start : start + _TOKENIZE_CHUNK]
        encoded = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=limit)
        chunk = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
        types = Features({name: datasets.List(Value("int32")) for name in chunk})
        chunk["labels"] = rows["label"]
        chunk["length"] = [len(ids) for ids in encoded["input_ids"]]
        chunks.append(Dataset.from_dict(chunk, features=Features({**types, **features})))
    return datasets.concatenate_datasets(chunks)


def _built_in(spec: TaskSpec) -> TaskData:
    if spec.name == "docstrings":
        # Not the run's seed: a model must be evaluated on the split that it was trained on, whatever its seed
        # was.
        return docstrings.build_docstrings()
    if spec.hub is None:
        raise InputError(
            f"--task {spec.name}: needs your data; pass --data-dir with train and validation files, or "
            "--train-file and --validation-file"
        )
    splits = _from_hub(spec)
    return make_task_data(
        spec,
        _hub_split(splits["train"], spec),
        {name: _hub_split(splits[name], spec) for name in spec.validation_splits},
        spec.labels,
    )


def _hub_split(split: Dataset, spec: TaskSpec) -> Dataset:
    if spec.is_running_text:
        # WikiText's rows are the lines of one text, with their line ends
        return _documents(["".join(split[spec.text_columns[0][0]])], spec)
    features = FEATURES if spec.is_question_answering else _features(spec, spec.text_columns[0])
    return split.select_columns(list(features)).cast(features)


def _from_hub(spec: TaskSpec) -> Mapping[str, Dataset]:
    """The Hub's splits, or its copy in the local cache; without a network it gives up at once."""
    repository, configuration = spec.hub
    failure = InputError(
        f"--task {spec.name}: the Hub cannot be reached and {repository} is not in the local cache; pass "
        "--data-dir with train and validation files (csv, json, jsonl or parquet)"
    )
    # `load_dataset` retries for half a minute; one request with a time limit tells whether that can succeed.
    if not datasets.config.HF_HUB_OFFLINE and not hub_has_dataset(repository):
        cached = Path(datasets.config.HF_DATASETS_CACHE) / repository.replace("/", "___") / configuration
        if not cached.is_dir():
            raise failure
    try:
        return datasets.load_dataset(repository, configuration)
    except Exception as error:  # the Hub's client raises its own, its HTTP library's and datasets' errors
        raise failure from error


@dataclass(frozen=True)
class _Source:
    """A file and the option that named it."""

    path: Path
    argument: str


def _paths(
    spec: TaskSpec,
    data_dir: str | Path | None,
    train_file: str | Path | None,
    validation_file: str | Path | None,
    evaluation_only: bool,
) -> tuple[_Source | None, dict[str, _Source]]:
    """The training file (None for evaluation only) and each validation split's file."""
    if data_dir is not None:
        if train_file is not None or validation_file is not None:
            option = "--train-file" if train_file is not None else "--validation-file"
            raise InputError(f"{option}: not together with --data-dir; pass one of them")
        directory = Path(data_dir)
        train = None if evaluation_only else _Source(_one_of(directory, ("train",), spec), "--data-dir")
        return train, {name: _Source(path, "--data-dir") for name, path in _validation_paths(spec, directory).items()}
    if validation_file is None:
        raise InputError("--train-file: needs --validation-file as well; pass both")
    if train_file is None and not evaluation_only:
        raise InputError("--validation-file: needs --train-file as well; pass both")
    train = None if evaluation_only else _Source(Path(train_file), "--train-file")
    return train, {spec.validation_splits[0]: _Source(Path(validation_file), "--validation-file")}


def _from_files(spec: TaskSpec, train: _Source | None, validation: Mapping[str, _Source]) -> TaskData:
    sources = {} if train is None else {"train": train}
    sources |= validation
    if spec.is_question_answering:
        splits = {name: read_questions(source.path, source.argument, spec) for name, source in sources.items()}
        if train is not None:
            _check_training(splits["train"], spec, None, f"{train.argument} {train.path}")
        return make_task_data(spec, splits.pop("train", None), splits, None)
    if spec.is_running_text:
        splits = {name: _read_documents(source, spec) for name, source in sources.items()}
        return make_task_data(spec, splits.pop("train", None), splits, None)
    first = next(iter(sources.values()))
    rows = {name: read_rows(source.path, source.argument) for name, source in sources.items()}
    columns = {name: _text_columns(rows[name], spec, source) for name, source in sources.items()}
    expected = next(iter(columns.values()))
    for name, source in sources.items():
        if columns[name] != expected:
            raise InputError(
                f"{source.argument} {source.path}: its text columns are {', '.join(columns[name])}, those of "
                f"{first.path} are {', '.join(expected)}; use the same columns in both files"
            )
    labels = None
    if spec.problem == CLASSIFICATION:
        labels = spec.labels or _class_names(next(iter(rows.values())), spec, first)
    splits = {}
    for name, source in sources.items():
        splits[name] = _dataset(rows[name], columns[name], labels, spec, source)
        if name == "train":
            _check_training(splits[name], spec, labels, f"{source.argument} {source.path}")
    return make_task_data(spec, splits.pop("train", None), splits, labels)


def _suffixes(spec: TaskSpec) -> tuple[str, ...]:
    return (*SUFFIXES, TEXT_SUFFIX) if spec.is_running_text else SUFFIXES


def _one_of(directory: Path, stems: Sequence[str], spec: TaskSpec) -> Path:
    """The one data file in ``directory`` with one of the stems."""
    if not directory.is_dir():
        raise InputError(f"--data-dir {directory}: no such directory; pass a folder with train and validation files")
    found = [directory / (stem + suffix) for stem in stems for suffix in _suffixes(spec)]
    found = [path for path in found if path.is_file()]
    if not found:
        wanted = " or ".join(f"{stem}.*" for stem in stems)
        raise InputError(f"--data-dir {directory}: no {wanted} in it; add one of {', '.join(_suffixes(spec))}")
    if len(found) > 1:
        raise InputError(
            f"--data-dir {directory}: both {found[0].name} and {found[1].name} in it; remove one, or pass "
            "--train-file and --validation-file"
        )
    return found[0]


def _validation_paths(spec: TaskSpec, directory: Path) -> dict[str, Path]:
    if len(spec.validation_splits) == 1:
        return {spec.validation_splits[0]: _one_of(directory, ("validation", "dev"), spec)}
    paths = {}
    for name in spec.validation_splits:
        # mnli: validation_matched, dev_matched, or (its main split only) plain validation.
        stems = (name, name.replace("validation", "dev"))
        if name == spec.validation_splits[0]:
            paths[name] = _one_of(directory, (*stems, "validation", "dev"), spec)
        elif any((directory / (stem + suffix)).is_file() for stem in stems for suffix in SUFFIXES):
            paths[name] = _one_of(directory, stems, spec)
    return paths


def _text_columns(rows: list[Row], spec: TaskSpec, source: _Source, labelled: bool = True) -> tuple[str, ...]:
    """The first choice of text columns that the first row has; ``_dataset`` checks every row."""
    _, first = rows[0]
    where = f"{source.argument} {source.path}: no column"
    for choice in spec.text_columns:
        if set(choice) <= set(first):
            break
    else:
        missing = next(name for name in spec.text_columns[0] if name not in first)
        wanted = ", or ".join(" and ".join(choice) for choice in spec.text_columns)
        raise InputError(f"{where} {missing!r} (it has {_listed(list(first))}); task {spec.name} needs {wanted}")
    if labelled and not spec.predicts_tokens and spec.label_column not in first:
        raise InputError(f"{where} {spec.label_column!r} (it has {_listed(list(first))}); add or rename it")
    return choice


def _label(row: Mapping[str, Any], place: str, spec: TaskSpec, source: _Source) -> str | int | float:
    """A row's label as it is in the file: a bool is 0 or 1, a float without a fraction a whole number."""
    value = row.get(spec.label_column)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        raise bad_row(source.argument, source.path, place, "label missing")
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    if not isinstance(value, str | int | float):
        fault = f"label is a {type(value).__name__}, expected a number or a name"
        raise bad_row(source.argument, source.path, place, fault)
    return value


def _class_name(row: Mapping[str, Any], place: str, spec: TaskSpec, source: _Source) -> str:
    """The name of a row's class; "1", 1 and 1.0 are the class "1"."""
    value = _label(row, place, spec, source)
    if isinstance(value, float):
        remedy = "pass class names or whole numbers, or use a regression task"
        raise bad_row(source.argument, source.path, place, f"label {value} is not a class", remedy)
    name = str(value).strip()
    return str(int(name)) if _WHOLE.fullmatch(name) else name


def _class_names(rows: list[Row], spec: TaskSpec, source: _Source) -> tuple[str, ...]:
    """The classes of a file: whole numbers by size, names in alphabetical order."""
    names = {_class_name(row, place, spec, source) for place, row in rows}
    return tuple(sorted(names, key=int if all(_WHOLE.fullmatch(name) for name in names) else str))


def _number(row: Mapping[str, Any], place: str, spec: TaskSpec, source: _Source) -> float:
    value = _label(row, place, spec, source)
    try:
        number = float(value)
    except ValueError:
        raise bad_row(source.argument, source.path, place, f"label {value!r} is not a number") from None
    if not math.isfinite(number):
        raise bad_row(source.argument, source.path, place, f"label is {number}, expected a finite number")
    return number


def _features(spec: TaskSpec, columns: Sequence[str]) -> Features:
    features = Features({column: Value("string") for column in columns})
    if not spec.predicts_tokens:
        features["label"] = Value("float64" if spec.is_regression else "int64")
    return features


def _documents(texts: Sequence[str], spec: TaskSpec) -> Dataset:
    columns = spec.text_columns[0]
    return Dataset.from_dict({columns[0]: list(texts)}, features=_features(spec, columns))


def _read_documents(source: _Source, spec: TaskSpec) -> Dataset:
    """The documents of a file: its rows, or all of a text file."""
    path, argument = source.path, source.argument
    if path.suffix.lower() == TEXT_SUFFIX:
        return _documents([read_text(path, argument)], spec)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"{argument} {path}: unknown kind of file; pass one of {', '.join(_suffixes(spec))}")
    rows = read_rows(path, argument)
    documents = _dataset(rows, _text_columns(rows, spec, source), None, spec, source)
    if not any(text.strip() for text in documents[spec.text_columns[0][0]]):
        raise InputError(f"{argument} {path}: every text is empty; pass a file with text")
    return documents


def _dataset(
    rows: list[Row], columns: Sequence[str], labels: Sequence[str] | None, spec: TaskSpec, source: _Source
) -> Dataset:
    """Check every row's texts and label and put them into a dataset."""
    indices = {name: index for index, name in enumerate(labels or ())}
    if spec.labels is not None:
        indices |= {str(index): index for index in range(len(spec.labels))}
    content: dict[str, list[Any]] = {column: [] for column in _features(spec, columns)}
    for place, row in rows:
        for column in columns:
            content[column].append(_text(row, place, column, source))
        if spec.predicts_tokens:
            continue
        if labels is None:
            content["label"].append(_number(row, place, spec, source))
            continue
        name = _class_name(row, place, spec, source)
        if name not in indices:
            fault = f"label {name!r} is not one of the classes ({_listed(labels)})"
            raise bad_row(source.argument, source.path, place, fault)
        content["label"].append(indices[name])
    return Dataset.from_dict(content, features=_features(spec, columns))


def _text(row: Mapping[str, Any], place: str, column: str, source: _Source) -> str:
    """A row's text in one column."""
    text = row.get(column)
    if not isinstance(text, str):
        fault = "is missing" if text is None else f"is a {type(text).__name__}, expected text"
        raise bad_row(source.argument, source.path, place, f"column {column!r} {fault}")
    return text


def _relabel(split: Dataset, mapping: Sequence[int]) -> Dataset:
    columns = {name: list(split[name]) for name in split.column_names}
    columns["label"] = [mapping[label] for label in columns["label"]]
    return Dataset.from_dict(columns, features=Features({**split.features, "label": Value("int64")}))


def _check_training(train: Dataset, spec: TaskSpec, labels: Sequence[str] | None, argument: str) -> None:
    """Raise InputError where there is nothing to learn."""
    if spec.is_question_answering:
        check_answerable(train, argument)
        return
    if spec.is_summarization:
        if not any(summary.strip() for summary in train[train.column_names[1]]):
            raise InputError(f"{argument}: every summary is empty; pass training data with summaries")
        return
    distinct = set(train["label"])
    if len(distinct) < 2:
        only = next(iter(distinct))
        what = f"every label is {only}" if labels is None else f"only the class {labels[only]!r} occurs"
        raise InputError(
            f"{argument}: {what}; nothing can be learned from it, pass training data with other labels too"
        )


def _listed(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
