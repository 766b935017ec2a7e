"""``python -m benchmarks run``: measure cases one after the other, each written when it is done."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .cases import Case
from .environment import Environment, describe, measure_ceilings
from .errors import InputError
from .measure import Measurement, Session
from .providers import Provider
from .rows import RESULTS, Row, append_rows, case_cell, finished, read_rows

# A load average above this means that the cores are not free.
BUSY = 0.7


def resolve_device(name: str | None) -> torch.device:
    """cuda if there is one, or what is named.

    Raises:
        InputError: cuda without a CUDA device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def default_output(environment: Environment, name: str) -> Path:
    """benchmarks/results/DEVICE/NAME.jsonl."""
    return RESULTS / environment.slug / f"{name}.jsonl"


def start_session(
    device: torch.device, dtype: str, providers: Mapping[str, Provider], say: Callable[[str], None]
) -> Session:
    """Describe the machine and measure its ceilings."""
    environment = describe(device)
    if device.type == "cpu" and hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY:
        say(f"the load is {os.getloadavg()[0]:.1f}: other programs are running, and these times will not be repeatable")
    ceilings = measure_ceilings(device, getattr(torch, dtype))
    say(f"{environment.device}, torch {environment.torch}, triton {environment.triton}, commit {environment.commit}")
    say(f"ceilings: {ceilings.bandwidth / 1e9:.0f} GB/s, {ceilings.flops / 1e12:.2f} TFLOP/s {dtype}")
    return Session(device, environment, ceilings, providers)


def pending(cases: Sequence[Case], path: Path, session: Session) -> list[Case]:
    """The cases of which ``path`` lacks a row by this code on this machine for some provider."""
    if not path.is_file():
        return list(cases)
    done = finished(read_rows(path), session.environment.columns())
    wanted = set(session.providers)
    return [case for case in cases if not wanted <= done.get(case_cell(case), set())]


def run_cases(
    cases: Sequence[Case],
    session: Session,
    output: Path,
    case_seconds: float,
    budget: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Row]:
    """Measure cases and append the rows of each to ``output`` before the next begins.

    Args:
        cases: what to measure.
        session: where, and with which providers.
        output: the rows' file.
        case_seconds: time for a case's interleaved rounds.
        budget: seconds after which no further case is begun. Default: none.
        say: prints a line.

    Returns:
        The rows of this run.
    """
    begin, longest = time.monotonic(), 0.0
    rows: list[Row] = []
    for number, case in enumerate(cases, start=1):
        started = time.monotonic()
        if budget is not None and started - begin + longest > budget:
            say(f"budget of {budget:.0f} s: {len(cases) - number + 1} of {len(cases)} cases left; --resume goes on")
            break
        measurement = Measurement(case, session)
        measurement.time(case_seconds)
        found = measurement.rows()
        append_rows(output, found)
        rows += found
        longest = max(longest, time.monotonic() - started)
        times = [f"{row['provider']} {row['median_us']:.1f}" for row in found if row["median_us"] is not None]
        say(f"[{number}/{len(cases)}] {case}: {', '.join(times)} us")
        for name, why in measurement.failed.items():
            say(f"    {name}: {why}")
        # Its tensors must be gone before the next case's are made.
        del measurement
    return rows
