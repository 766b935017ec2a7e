"""Whether the Hub has something: one request with a time limit, where its client's loaders retry for half a minute."""

from __future__ import annotations

from collections.abc import Callable

from huggingface_hub import HfApi

#: seconds that the Hub may take to answer
HUB_TIMEOUT = 10


def hub_has_model(name: str) -> bool:
    """Whether the Hub answers and has the model."""
    return _answers(HfApi().model_info, name)


def hub_has_dataset(name: str) -> bool:
    """Whether the Hub answers and has the data set."""
    return _answers(HfApi().dataset_info, name)


def _answers(ask: Callable[..., object], name: str) -> bool:
    try:
        ask(name, timeout=HUB_TIMEOUT)
    except Exception:  # any failure means the same here: this machine gets nothing from the Hub
        return False
    return True
