"""Finished training stages, each under a key made of everything that decides it, so that runs can share them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ..processes import from_main

Tensors = dict[str, torch.Tensor]


def stage_key(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits for JSON-able ``settings``, the same on every machine; those that are None do not count."""
    text = json.dumps({name: value for name, value in settings.items() if value is not None}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class StageStore:
    """A folder of finished stages: tensors and a record of each. Of many processes the main one writes.

    Args:
        directory: made when the first stage is stored; None keeps nothing.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory

    def path(self, stage: str, key: str) -> Path:
        """Where the stage is kept."""
        return self.directory / f"{stage}-{key}"

    @contextmanager
    def claim(self, stage: str, key: str) -> Iterator[None]:
        """Hold the stage: another run that needs it waits until this one has stored it or has ended."""
        if self.directory is None:
            yield
            return
        with ExitStack() as held:
            from_main(lambda: self._lock(stage, key, held))
            yield

    def _lock(self, stage: str, key: str, held: ExitStack) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = held.enter_context((self.directory / f"{stage}-{key}.lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{stage}: waiting for another run that makes it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        for leftover in self.directory.glob(f".{stage}-{key}.*"):  # of a run that died while it wrote
            shutil.rmtree(leftover, ignore_errors=True)

    def load(self, stage: str, key: str) -> tuple[Tensors, Any] | None:
        """(tensors, record) of a stored stage, or None; one that cannot be read is removed, to be made again."""
        if self.directory is None or not from_main(lambda: self._readable(self.path(stage, key))):
            return None
        path = self.path(stage, key)
        record = json.loads((path / "record.json").read_text(encoding="utf-8"))
        return load_file(path / "tensors.safetensors"), record

    def _readable(self, path: Path) -> bool:
        if not path.is_dir():
            return False
        try:
            json.loads((path / "record.json").read_text(encoding="utf-8"))
            with safe_open(path / "tensors.safetensors", framework="pt"):
                return True
        except (OSError, ValueError, SafetensorError) as error:
            print(f"{path}: cannot be read ({error}) and is made again", file=sys.stderr)
            shutil.rmtree(path)
            return False

    def store(self, stage: str, key: str, tensors: Tensors, record: Any) -> None:
        """Keep a stage; it is there whole or not at all."""
        if self.directory is not None:
            from_main(lambda: self._write(self.path(stage, key), tensors, record))

    def _write(self, path: Path, tensors: Tensors, record: Any) -> None:
        staged = path.parent / f".{path.name}.{os.getpid()}"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staged / "tensors.safetensors")
        (staged / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        staged.rename(path)
