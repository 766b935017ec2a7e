"""Tasks and their data: specifications, loading with checks, tokenisation, the built-in docstrings task."""

from __future__ import annotations

from .load import check_labels, load_task, load_texts, sampled, tokenize
from .task_data import TaskData, make_task_data
from .tasks import TASKS, TaskSpec, get_task

__all__ = [
    "TASKS",
    "TaskData",
    "TaskSpec",
    "check_labels",
    "get_task",
    "load_task",
    "load_texts",
    "make_task_data",
    "sampled",
    "tokenize",
]
