"""How many tokens a model takes at most."""

from __future__ import annotations

from typing import Any

from ..errors import InputError

#: model types whose first token has the position after ``pad_token_id``: so many positions are never used
AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def most_tokens(config: Any) -> int | None:
    """The longest input that the model of a transformers configuration takes; None where nothing limits it, such as
    T5's relative positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and config.model_type in AFTER_PADDING:
        positions -= config.pad_token_id + 1
    return positions or None


def resolve_length(asked: int | None, default: int, config: Any) -> int:
    """Tokens per example: ``asked`` (``--max-length``), or the ``default`` as far as the model takes so many.

    Raises:
        InputError: the model does not take as many as were asked for.
    """
    limit = most_tokens(config)
    if asked is None:
        return default if limit is None else min(default, limit)
    if limit is not None and asked > limit:
        raise InputError(f"--max-length {asked}: the model takes at most {limit} tokens")
    return asked
