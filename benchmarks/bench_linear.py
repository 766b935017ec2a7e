"""The CPU benchmarks, driven by pytest-benchmark: ``make bench``, or pytest benchmarks/bench_linear.py.

Each benchmark is one case, and its timed round is one interleaved round over all providers: pytest-benchmark alone
would time one provider after the other, and a ratio of times of different minutes is none. Its own figure is
therefore that of a whole round; the time of each provider is in its ``extra_info`` and in the rows.
"""

from __future__ import annotations

import pytest

from benchmarks.measure import Measurement
from benchmarks.rows import append_rows


def test_linear(case, benchmark, bench, pytestconfig):
    if not benchmark.enabled:
        pytest.skip("pytest-benchmark is disabled: nothing would be timed")
    measurement = Measurement(case, bench.session)
    rounds = measurement.rounds.affordable(pytestconfig.getoption("--case-seconds"))
    benchmark.pedantic(measurement.rounds.round, rounds=rounds, iterations=1)
    rows = measurement.rows()
    append_rows(bench.output, rows)
    bench.rows += rows
    benchmark.extra_info |= {row["provider"]: row["median_us"] for row in rows}
    if measurement.failed:
        pytest.fail("; ".join(f"{name}: {why}" for name, why in measurement.failed.items()), pytrace=False)
