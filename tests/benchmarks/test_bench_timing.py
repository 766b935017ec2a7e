"""Rounds are interleaved, samples are long enough, quantiles are quantiles."""

from __future__ import annotations

import pytest
import torch

from benchmarks import timing
from benchmarks.environment import measure_ceilings
from benchmarks.providers import Runner
from benchmarks.timing import LEAST_ROUNDS, MOST_ROUNDS, Rounds, summarise

CPU = torch.device("cpu")


def recorded(names: str, log: list, sets: int = 3, sample_seconds: float = 0.0) -> Rounds:
    runners = {name: Runner(lambda index, name=name: log.append((name, index)), lambda raw: {}) for name in names}
    rounds = Rounds(runners, CPU, sets, sample_seconds)
    log.clear()
    return rounds


def test_every_round_runs_every_provider_once_and_begins_with_the_next():
    log: list = []
    rounds = recorded("abc", log)
    for _ in range(4):
        rounds.round()
    assert "".join(name for name, _ in log) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(samples) for name, samples in rounds.samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_short_call_is_repeated_and_walks_over_the_inputs(monkeypatch):
    log: list = []
    # A clock by which every call takes 10 microseconds.
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1e-5 * len(log))
    rounds = Rounds({"a": Runner(log.append, lambda raw: {})}, CPU, sets=3, sample_seconds=1e-3)
    before = len(log)
    rounds.round()
    sample = log[before:]
    assert 100 <= len(sample) < 200
    assert sample[:6] == [0, 1, 2, 0, 1, 2]
    # What is kept is the time of one call.
    assert rounds.samples["a"][0] == pytest.approx(1e-5)
    assert rounds.round_seconds == pytest.approx(1e-5 * len(sample))


def test_a_call_that_does_the_work_several_times_counts_so(monkeypatch):
    log: list = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 1e-3 * len(log))
    graph = Runner(log.append, lambda raw: {}, graphed=True, repeats=4)
    rounds = Rounds({"a": Runner(log.append, lambda raw: {}), "graph": graph}, CPU, sets=4, sample_seconds=1e-3)
    assert rounds.round() == pytest.approx({"a": 1e-3, "graph": 0.25e-3})


def test_rounds_fit_the_time_within_bounds():
    rounds = recorded("ab", [])
    rounds.round_seconds = 0.1
    assert rounds.affordable(2.05) == 20
    assert rounds.affordable(0.1) == LEAST_ROUNDS
    assert rounds.affordable(1e6) == MOST_ROUNDS


def test_quantiles():
    found = summarise([float(value) for value in range(11)])
    assert (found.p20, found.median, found.p80) == (2, 5, 8)


def test_without_rounds_there_are_no_timings():
    rounds = recorded("a", [])
    rounds.round()
    assert rounds.timings() == {}
    rounds.round()
    assert set(rounds.timings()) == {"a"}


def test_ceilings_bound_from_both_sides():
    ceilings = measure_ceilings(CPU, torch.float32, small=True)
    assert ceilings.bandwidth > 0
    assert ceilings.seconds(int(ceilings.flops), 0) == pytest.approx(1, rel=1e-3)
    assert ceilings.seconds(0, int(2 * ceilings.bandwidth)) == pytest.approx(2, rel=1e-3)


@pytest.mark.skipif(not timing.CLEAR_REFS.exists(), reason="not Linux: the system does not tell the peak")
def test_the_peak_is_what_one_call_adds(monkeypatch):
    size = 64 * 2**20
    kept = []

    def call(index: int) -> torch.Tensor:
        kept[:] = kept or [torch.zeros(size // 4)]  # made once: it does not count
        held = torch.zeros(size // 4)
        passing = torch.zeros(size // 2)
        del passing
        return held

    peak = timing.peak_bytes(Runner(call, lambda raw: {}), CPU)
    assert 2.9 * size < peak < 3.25 * size  # Linux counts in batches of pages
    monkeypatch.setattr(timing, "CLEAR_REFS", timing.CLEAR_REFS / "missing")
    assert timing.peak_bytes(Runner(call, lambda raw: {}), CPU) is None
