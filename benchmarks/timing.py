"""Interleaved timing: every round runs one sample of every provider, so that a ratio compares the same moments.

A sample is as many calls as last a millisecond or more, on a CPU by its clock, on CUDA between two events; its
figure is the time of one call. CUDA calls walk over the problem's copies of x, and a CUDA graph holds one call for
each. The provider that a round begins with moves on by one each round.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .providers import Runner

SAMPLE_SECONDS = 1e-3
MOST_CALLS = 10_000
LEAST_ROUNDS, MOST_ROUNDS = 7, 100
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over the rounds of a run."""

    median: float
    p20: float
    p80: float


def summarise(samples: list[float]) -> Timing:
    """Median and quantiles of at least two samples."""
    tenths = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(statistics.median(samples), tenths[1], tenths[7])


class Rounds:
    """The interleaved samples of several runners of one problem.

    Args:
        runners: name -> runner, in the order of the first round.
        device: where they run.
        sets: copies of x that the runners may be called with.
        sample_seconds: the least length of a sample. Default: a millisecond.
    """

    def __init__(
        self,
        runners: Mapping[str, Runner],
        device: torch.device,
        sets: int,
        sample_seconds: float = SAMPLE_SECONDS,
    ) -> None:
        self.runners = dict(runners)
        self.samples: dict[str, list[float]] = {name: [] for name in runners}
        self._device = device
        self._sets = sets
        self._done = 0
        self._calls: dict[str, int] = {}
        self.round_seconds = 0.0
        for name, runner in self.runners.items():
            self._calls[name] = self._warm_up(runner, sample_seconds)
            self.round_seconds += self._sample(runner, self._calls[name])

    def _warm_up(self, runner: Runner, sample_seconds: float) -> int:
        """Run it until it is warm; returns the calls of a sample."""
        self._sample(runner, 1)
        calls = 1
        while (took := self._sample(runner, calls)) < sample_seconds and calls < MOST_CALLS:
            # At most ten times as many at once: the first guess may be off.
            calls = min(int(calls * min(1.2 * sample_seconds / max(took, 1e-9), 10.0)) + 1, MOST_CALLS)
        return calls

    def _sample(self, runner: Runner, calls: int) -> float:
        """Seconds that ``calls`` calls take together."""
        call, sets = runner.call, self._sets
        with runner.context():
            if self._device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize(self._device)
                start.record()
                for index in range(calls):
                    call(index % sets)
                end.record()
                end.synchronize()
                return 1e-3 * start.elapsed_time(end)
            begin = time.perf_counter()
            for index in range(calls):
                call(index % sets)
            return time.perf_counter() - begin

    def round(self) -> dict[str, float]:
        """One sample of every runner; returns and keeps the seconds of a call."""
        names = list(self.runners)
        first = self._done % max(len(names), 1)
        taken = {}
        for name in names[first:] + names[:first]:
            runner, calls = self.runners[name], self._calls[name]
            taken[name] = self._sample(runner, calls) / (calls * runner.repeats)
            self.samples[name].append(taken[name])
        self._done += 1
        return taken

    def affordable(self, seconds: float) -> int:
        """Rounds that fit in ``seconds``, at least 7 and at most 100."""
        return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / max(self.round_seconds, 1e-9))))

    def timings(self) -> dict[str, Timing]:
        """Of every runner; those with fewer than two rounds have none."""
        return {name: summarise(samples) for name, samples in self.samples.items() if len(samples) > 1}


def peak_bytes(runner: Runner, device: torch.device) -> int | None:
    """The most memory that one call takes beyond what is held before it.

    On CUDA as torch's allocator counts it, on the CPU as Linux counts the process's pages, whoever asked for them.
    None for CUDA graphs and where the system does not tell.
    """
    if device.type != "cuda":
        return _peak_pages(runner)
    if runner.graphed:
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    with runner.context():
        result = runner.call(0)
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def _peak_pages(runner: Runner) -> int | None:
    """By /proc/self: the peak is reset, after freed memory has gone back to the system."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
        with runner.context():
            runner.call(0)  # what is made once is there
            trim(0)
            CLEAR_REFS.write_text("5")
            before = _status_bytes("VmRSS")
            result = runner.call(0)
            peak = _status_bytes("VmHWM")
    except (OSError, AttributeError):
        return None
    del result
    return max(peak - before, 0)


def _status_bytes(name: str) -> int:
    """A line of /proc/self/status such as "VmRSS:  123 kB"."""
    lines = STATUS.read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
