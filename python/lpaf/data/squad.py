"""Questions, contexts and answers: the SQuAD format (1.1 and 2.0), and flat rows with the Hub's columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from ..errors import InputError
from .files import read_rows
from .tasks import TaskSpec

FEATURES = Features(
    {
        "id": Value("string"),
        "question": Value("string"),
        "context": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int64"))},
    }
)

_SHOWN = 40

# (argument, file and where in it; the question's own columns)
Question = tuple[str, Mapping[str, Any]]


class _BadQuestion(Exception):
    """What is wrong with a question, and what to do about it."""

    def __init__(self, fault: str, remedy: str = "fix or remove it") -> None:
        super().__init__(f"{fault}; {remedy}")


def read_questions(path: Path, argument: str, spec: TaskSpec) -> Dataset:
    """All questions of a file, checked, with ``FEATURES``.

    Args:
        path: a .json file in SQuAD's format (articles with paragraphs with questions), or .json, .jsonl or .parquet
            rows with question, context, answers ({"text": [...], "answer_start": [...]}) and, if there is one, id.
        argument: the option that named the file, for messages.
        spec: says whether a question may have no answer.

    Raises:
        InputError: the file cannot be read or is csv; a question lacks something, or an answer is not where
            ``answer_start`` says (the place in the file is named).
    """
    if path.suffix.lower() == ".csv":
        raise InputError(f"{argument} {path}: csv cannot hold answers; pass a .json, .jsonl or .parquet file")
    content: dict[str, list[Any]] = {name: [] for name in FEATURES}
    seen: set[str] = set()
    for place, question in _questions(path, argument):
        try:
            checked = _checked(question, spec, seen)
        except _BadQuestion as error:
            raise InputError(f"{place}: {error}") from None
        seen.add(checked["id"])
        for name, value in checked.items():
            content[name].append(value)
    if not content["id"]:
        raise InputError(f"{argument} {path}: has no questions; pass a file with at least one")
    content["id"] = _all_named(content["id"])
    return Dataset.from_dict(content, features=FEATURES)


def check_answerable(questions: Dataset, argument: str) -> None:
    """Raise InputError unless some question has an answer."""
    if not any(answers["text"] for answers in questions["answers"]):
        raise InputError(
            f"{argument}: no question has an answer; nothing can be learned from it, pass training data with answers"
        )


def _questions(path: Path, argument: str) -> Iterator[Question]:
    for number, (place, row) in enumerate(read_rows(path, argument), start=1):
        if "paragraphs" in row:
            yield from _article(row, f"{argument} {path}: article {number}")
        else:
            yield f"{argument} {path}: {place}", row


def _article(article: Mapping[str, Any], place: str) -> Iterator[Question]:
    for p, paragraph in _objects(article, "paragraphs", place, "paragraph"):
        for q, question in _objects(paragraph, "qas", p, "question"):
            yield q, {"context": paragraph.get("context"), **question}


def _objects(parent: Mapping[str, Any], key: str, place: str, name: str) -> Iterator[Question]:
    """The objects in the list ``parent[key]``, each with its place."""
    items = parent.get(key)
    if not isinstance(items, list):
        fault = "is missing" if items is None else f"is a {type(items).__name__}, expected a list"
        raise InputError(f"{place}: {key!r} {fault}; pass a file in SQuAD's format")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise InputError(
                f"{place}, {name} {number}: is a {type(item).__name__}, expected an object; fix or remove it"
            )
        yield f"{place}, {name} {number}", item


def _checked(question: Mapping[str, Any], spec: TaskSpec, seen: Set[str]) -> dict[str, Any]:
    """The question with ``FEATURES``; its id is None where it has none. ``seen`` are the ids before it."""
    texts = {name: _text(question.get(name), name) for name in ("question", "context")}
    if not texts["context"].strip():
        raise _BadQuestion("'context' is empty")
    identity = question.get("id")
    if identity is not None:
        if isinstance(identity, bool) or not isinstance(identity, str | int):
            raise _BadQuestion(f"'id' is a {type(identity).__name__}, expected text")
        identity = str(identity)
        if identity in seen:
            raise _BadQuestion(f"id {identity!r} occurs twice", "rename one of the two")
    answers = [_answer(text, start, texts["context"]) for text, start in _pairs(question.get("answers"))]
    impossible = question.get("is_impossible")
    if isinstance(impossible, bool) and impossible != (not answers):
        raise _BadQuestion(f"'is_impossible' is {impossible} but there are {len(answers)} answers")
    if not answers and not spec.unanswerable:
        raise _BadQuestion(f"task {spec.name}: the question has no answer", "remove it, or pass --task squad_v2")
    found = {"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]}
    return {"id": identity, **texts, "answers": found}


def _all_named(ids: Sequence[str | None]) -> list[str]:
    """``ids`` with a question's number where it has none, and underscores after it where that is another's id."""
    taken, named = set(ids), []
    for number, identity in enumerate(ids):
        if identity is None:
            identity = str(number)
            while identity in taken:
                identity += "_"
        named.append(identity)
    return named


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        fault = "is missing" if value is None else f"is a {type(value).__name__}, expected text"
        raise _BadQuestion(f"{name!r} {fault}", "a question needs question, context and answers")
    return value


def _pairs(answers: Any) -> list[tuple[Any, Any]]:
    """(text, answer_start) of every answer: of a list of objects (SQuAD's files) or an object of lists (the Hub)."""
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts):
            return list(zip(texts, starts, strict=True))
    elif isinstance(answers, list) and all(isinstance(answer, dict) for answer in answers):
        return [(answer.get("text"), answer.get("answer_start")) for answer in answers]
    fault = "is missing" if answers is None else "is not of this form"
    raise _BadQuestion(f"'answers' {fault}", 'pass {"text": [...], "answer_start": [...]}, both of the same length')


def _answer(text: Any, start: Any, context: str) -> tuple[str, int]:
    if not isinstance(text, str) or not text.strip():
        raise _BadQuestion(f"answer {text!r} is no text")
    if isinstance(start, bool) or not isinstance(start, int) or start < 0:
        raise _BadQuestion(f"answer_start {start!r} is not a character's index")
    there = context[start : start + len(text)]
    if there != text:
        raise _BadQuestion(f"at answer_start {start} the context has {_short(there)}, the answer is {_short(text)}")
    return text, start


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")
