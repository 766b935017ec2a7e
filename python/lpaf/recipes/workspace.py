"""The output directory and the work directory beside it: refuse, resume, and publish in one rename."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..processes import from_main

#: file of the work directory: the output is the finished run's
PUBLISHED = "published"


#: what a resumed run must have in common with the interrupted one
SETTINGS = "settings.json"


class BusyError(InputError):
    """Another process is writing the output."""


class Workspace:
    """Where a run keeps its checkpoints, and how its result appears.

    Everything is written to ``.NAME.lpaf-work`` beside the output. The output directory itself appears in one rename
    when it is complete; a run that dies leaves the work directory, from which ``--resume`` goes on. Of many processes
    the main one writes; all others find its checkpoints here.

    Args:
        output: directory to write in the end.
        settings: what decides the weights; a resumed run must have the same.
        resume: continue an interrupted run.
        overwrite: replace an existing output and discard an interrupted run.
        bytes_needed: estimate of the space that checkpoints and output take.

    Raises:
        InputError: output exists, is not writable or the disk is too full; an interrupted run is in the way or has
            other settings.
    """

    def __init__(
        self, output: Path, settings: dict[str, Any], resume: bool, overwrite: bool, bytes_needed: int = 0
    ) -> None:
        self.output = output
        self.directory = work_directory(output)
        self.resuming = from_main(lambda: self._open(settings, resume, overwrite, bytes_needed))

    def _open(self, settings: dict[str, Any], resume: bool, overwrite: bool, bytes_needed: int) -> bool:
        """Hold the work directory; whether an interrupted run goes on in it."""
        output = self.output
        check_output(output, overwrite or (resume and is_published(output)))
        if self.directory.exists():
            self._lock()
        if self.directory.exists() and not resume:
            if not overwrite:
                raise InputError(
                    f"--output {output}: an interrupted run is in {self.directory}; pass --resume to continue it, or "
                    "--overwrite to start again"
                )
            self._discard()
        resuming = (self.directory / SETTINGS).is_file()
        if resuming:
            self._check_settings(settings)
        free = shutil.disk_usage(_existing_parent(output)).free
        if free < bytes_needed:
            raise InputError(
                f"--output {output}: disk full: {free / 1e6:.0f} MB free, about {bytes_needed / 1e6:.0f} MB needed for "
                "checkpoints and output; free some space, or pass --checkpoint-steps 0"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        if not resuming:
            self._lock()
            self._write_json(SETTINGS, settings)
        return resuming

    def _lock(self) -> None:
        """Hold the work directory until this process ends, however it ends."""
        try:
            self._lock_file = (self.directory / "lock").open("w")
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError):  # held, or renamed away by the run that held it
            raise BusyError(f"--output {self.output}: another run is writing it; wait for it to end") from None

    def _check_settings(self, settings: dict[str, Any]) -> None:
        before = json.loads((self.directory / SETTINGS).read_text(encoding="utf-8"))
        now = json.loads(json.dumps(settings))
        changed = [name for name in now if before.get(name) != now[name]]
        if changed:
            name = changed[0]
            raise InputError(
                f"--resume: the interrupted run had {name} = {before.get(name)!r}, this one has {now[name]!r}; repeat "
                "its options, or pass --overwrite instead of --resume to start again"
            )

    def _write_json(self, name: str, value: Any) -> None:
        temporary = self.directory / f"{name}.tmp"
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
        temporary.replace(self.directory / name)

    def _discard(self) -> None:
        """Remove the work directory in one rename: nothing resumes from half of it."""
        doomed = self.directory.with_name(f"{self.directory.name}.discarded")
        shutil.rmtree(doomed, ignore_errors=True)
        self.directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def stage(self, name: str) -> Path:
        """The folder of one training stage's checkpoints."""
        path = self.directory / name
        path.mkdir(exist_ok=True)
        return path

    def publish(self, staged: Path) -> None:
        """Rename the finished directory to the output and drop the work directory."""
        old = None
        if self.output.exists():
            if any(self.output.iterdir()):
                old = self.directory / "replaced"
                shutil.rmtree(old, ignore_errors=True)
                self.output.rename(old)
            else:
                self.output.rmdir()
        (self.directory / PUBLISHED).touch()
        staged.rename(self.output)
        self._discard()


def work_directory(output: Path) -> Path:
    """Where a run that will write ``output`` works."""
    return output.parent / f".{output.name}.lpaf-work"


def is_published(output: Path) -> bool:
    """Whether ``output`` is that of a run which died while it cleared its work directory away."""
    return (work_directory(output) / PUBLISHED).is_file()


def _existing_parent(path: Path) -> Path:
    for parent in path.absolute().parents:
        if parent.exists():
            return parent
    return Path("/")


def check_output(output: Path, overwrite: bool, flag: str = "--output") -> None:
    """Raise InputError unless ``output`` can become a new directory; writes nothing."""
    if output.exists():
        if not output.is_dir():
            raise InputError(f"{flag} {output}: is a file; pass a directory")
        if any(output.iterdir()) and not overwrite:
            raise InputError(f"{flag} {output}: exists and is not empty; pass --overwrite to replace it")
    _check_parent(output, flag)


def check_new_file(path: Path, overwrite: bool, flag: str) -> None:
    """Raise InputError unless ``path`` can become a new file; writes nothing."""
    if path.is_dir():
        raise InputError(f"{flag} {path}: is a directory; pass a file")
    if path.exists() and not overwrite:
        raise InputError(f"{flag} {path}: exists; pass --overwrite to replace it")
    _check_parent(path, flag)


def _check_parent(path: Path, flag: str) -> None:
    parent = _existing_parent(path)
    if not parent.is_dir():
        raise InputError(f"{flag} {path}: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: {parent} is not writable; pass a place where you may write")


def explain_os_error(error: Exception, output: Path) -> InputError | None:
    """The one-line message for a full or read-only disk met while writing, or None for any other error."""
    text = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        sign in text for sign in ("No space left", "File too large", "quota exceeded", "PytorchStreamWriter failed")
    )
    if full:
        return InputError(f"--output {output}: disk full while writing; free some space and continue with --resume")
    for reason in map(os.strerror, (errno.EACCES, errno.EROFS, errno.EPERM)):
        if reason in text:  # of this process, or told by another
            place = getattr(error, "filename", None) or output
            return InputError(f"--output {output}: {place} is not writable ({reason}); pass another directory")
    return None
