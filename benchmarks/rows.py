"""Rows: one JSON object a line for one provider at one case. Files are appended to and never rewritten."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .cases import Case, case_name
from .errors import InputError

Row = dict[str, Any]
Cell = tuple[Any, ...]

RESULTS = Path(__file__).resolve().parent / "results"
SHAPE = ("in", "out", "rank", "kept", "rows")
CELL = ("op", *SHAPE, "batch", "length", "heads", "layers", "dtype", "direction")
MEASURED = ("median_us", "p20_us", "p80_us")
REQUIRED = (
    *("op", *SHAPE, "dtype", "direction", "provider"),
    *(*MEASURED, "rounds", "bytes", "flops", "roofline_share", "peak_bytes"),
    *("max_error", "max_error_allowed", "max_error_of", "failed"),
    *("ceiling_bandwidth", "ceiling_flops", "device", "driver", "cuda", "torch", "triton", "lpaf_kernels", "python"),
    *("threads", "commit", "time", "run"),
)
# Rows with these equal were measured by the same code on the same machine.
SAME_CODE = ("device", "threads", "torch", "triton", "lpaf_kernels", "commit")


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file, in one write that reaches the disk; makes the file and its folder if need be.

    A last line without an end is what an interrupted write left: it is no row and is cut off first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(end - 2**16, 0))
        tail = file.read()
        if tail and not tail.endswith(b"\n"):
            file.truncate(end - len(tail) + tail.rfind(b"\n") + 1)
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file; a last line without an end is left out.

    Raises:
        InputError: no such file, no rows in it, or a line that is none.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as rows: {error}") from error
    lines = text.split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON: {error}") from error
        missing = [key for key in REQUIRED if key not in row] if isinstance(row, dict) else ["everything"]
        if missing:
            raise InputError(f"{path}, line {number}: not a benchmark row, it lacks {', '.join(missing)}")
        rows.append(row)
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def cell_of(row: Row) -> Cell:
    """What was measured, whoever did it: operation, shape, dtype and direction."""
    return tuple(row.get(key) for key in CELL)


def case_cell(case: Case) -> Cell:
    """The cell that rows of ``case`` have."""
    return cell_of({"op": case.op, **case.shape, "dtype": case.dtype, "direction": case.direction})


def cell_name(row: Row) -> str:
    """The case's name."""
    return case_name(row["op"], row, row["dtype"], row["direction"])


def latest(rows: Sequence[Row]) -> dict[Cell, dict[str, Row]]:
    """cell -> provider -> row, of every cell its last run only: a ratio must come from one run."""
    runs: dict[Cell, str] = {cell_of(row): row["run"] for row in rows}
    found: dict[Cell, dict[str, Row]] = {cell: {} for cell in runs}
    for row in rows:
        cell = cell_of(row)
        if row["run"] == runs[cell]:
            found[cell][row["provider"]] = row
    return found


def finished(rows: Sequence[Row], like: Row) -> dict[Cell, set[str]]:
    """cell -> providers that have rows by the same code on the same machine as ``like`` says."""
    found: dict[Cell, set[str]] = {}
    for row in rows:
        if all(row[key] == like[key] for key in SAME_CODE):
            found.setdefault(cell_of(row), set()).add(row["provider"])
    return found
