"""Fingerprints of what a run reads: equal content, equal fingerprint, wherever the files lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from ..data.files import SUFFIXES, TEXT_SUFFIX
from ..models.checkpoint import resolve_model
from .options import CompressOptions

#: what weights, configurations and tokenizers are stored in
MODEL_SUFFIXES = (".safetensors", ".bin", ".json", ".txt", ".model")


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, modified: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_fingerprint(paths: Iterable[Path]) -> str:
    """sha256 of names and content, as 64 hexadecimal digits; a file that is missing counts as such."""
    whole = hashlib.sha256()
    for path in paths:
        content = "missing"
        if path.is_file():
            facts = path.stat()
            content = _digest(path, facts.st_size, facts.st_mtime_ns)
        whole.update(f"{path.name} {content}\n".encode())
    return whole.hexdigest()


def weights_fingerprint(model: str) -> str:
    """Content of a local model's weights, configuration and tokenizer; the name of a Hub model."""
    path = Path(resolve_model(model))
    if not path.is_dir():
        return model
    return content_fingerprint(file for file in sorted(path.iterdir()) if file.suffix in MODEL_SUFFIXES)


def files_fingerprint(options: CompressOptions) -> str | None:
    """Content of the files of the splits that ``options`` name; None for a task's own data."""
    given = [options.train_file, options.validation_file, options.test_file]
    files = [Path(file) for file in given if file is not None]
    if options.data_dir is not None and Path(options.data_dir).is_dir():
        kinds = (*SUFFIXES, TEXT_SUFFIX)
        files += sorted(file for file in Path(options.data_dir).iterdir() if file.suffix in kinds)
    return content_fingerprint(files) if files else None
