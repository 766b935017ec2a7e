"""Options, session and closing table of the CPU benchmarks, see bench_linear.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.cases import select
from benchmarks.rows import Row


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lpaf benchmarks")
    group.addoption("--cases", default="cpu,cpu-training", help="sets of cases (default: cpu,cpu-training)")
    group.addoption("--only", help="cases with this in their names")
    group.addoption("--dtype", default="float32", help="dtype of every case (default: float32)")
    group.addoption("--threads", type=int, default=2, help="CPU threads (default: 2)")
    group.addoption("--case-seconds", type=float, default=6.0, help="rounds per case (default: 6 seconds)")
    group.addoption("--rows", type=Path, help="rows' file (default: benchmarks/results/DEVICE/cpu.jsonl)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        cases = select(option("--cases").split(","), option("--dtype"), only=option("--only"))
        metafunc.parametrize("case", cases, ids=str)


@dataclass
class Bench:
    """What the benchmarks of one pytest run share: the session, where rows go, and the rows so far."""

    session: object
    output: Path
    rows: list[Row] = field(default_factory=list)


BENCH = pytest.StashKey[Bench]()


@pytest.fixture(scope="session")
def bench(pytestconfig: pytest.Config) -> Iterator[Bench]:
    import torch

    from benchmarks.providers import choose
    from benchmarks.run import default_output, start_session

    device = torch.device("cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(pytestconfig.getoption("--threads"))
    session = start_session(device, pytestconfig.getoption("--dtype"), choose(["default"], device, {}), print)
    output = pytestconfig.getoption("--rows") or default_output(session.environment, "cpu")
    pytestconfig.stash[BENCH] = Bench(session, output)
    yield pytestconfig.stash[BENCH]
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    bench = config.stash.get(BENCH, None)
    if bench is None or not bench.rows:
        return
    from benchmarks.tables import failures, run_table, summary

    environment, ceilings = bench.session.environment, bench.session.ceilings
    terminalreporter.section("benchmarks")
    terminalreporter.write_line(
        f"{environment.device}, {environment.threads} threads, torch {environment.torch}, commit {environment.commit};"
        f" ceilings {ceilings.bandwidth / 1e9:.0f} GB/s, {ceilings.flops / 1e12:.2f} TFLOP/s"
    )
    for line in ["", *run_table(bench.rows).splitlines(), "", *failures(bench.rows), *summary(bench.rows)]:
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"rows appended to {bench.output}")
