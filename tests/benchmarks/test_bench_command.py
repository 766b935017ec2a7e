"""``python -m benchmarks run`` and the CPU benchmarks under pytest-benchmark, on a small cell."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.__main__ import main, tune_cases
from benchmarks.cases import select
from benchmarks.environment import measure_ceilings
from benchmarks.rows import read_rows

ROOT = Path(__file__).parents[2]
CELL = ["run", "--device", "cpu", "--only", "768x768-r41-k77-m16-", "--threads", "1", "--case-seconds", "0.01"]


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch):
    monkeypatch.setattr(run, "measure_ceilings", functools.partial(measure_ceilings, small=True))


def test_run_writes_rows_and_prints_the_table(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert main([*CELL, "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert "768x768-r41-k77-m16-float32" in out
    assert "over chain" in out
    assert f"rows appended to {path}" in out
    rows = read_rows(path)
    assert {row["provider"] for row in rows} == {"dense", "chain", "ours"}
    assert all(row["median_us"] > 0 and row["failed"] is None for row in rows)
    assert {row["threads"] for row in rows} == {1}
    assert main([*CELL, "--output", str(path), "--resume"]) == 0
    assert "1 of 1 cases are in" in capsys.readouterr().out
    assert read_rows(path) == rows


def test_run_takes_dtype_direction_and_providers(tmp_path):
    path = tmp_path / "rows.jsonl"
    options = ["--dtype", "bfloat16", "--direction", "forward+backward", "--providers", "chain,ours"]
    assert main([*CELL, *options, "--output", str(path)]) == 0
    rows = read_rows(path)
    assert [(row["provider"], row["dtype"], row["direction"]) for row in rows] == [
        ("chain", "bfloat16", "forward+backward"),
        ("ours", "bfloat16", "forward+backward"),
    ]


def test_list_measures_nothing(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    assert main([*CELL, "--list", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("768x768-r41-k77-m16-float32\n")
    assert "* ours: " in out
    assert "  compile: " in out
    assert not path.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--device", "cpu", "--slice", "3/2"], "--slice 3/2"),
        (["run", "--device", "cpu", "--cases", "some"], "--cases some"),
        (["run", "--device", "cpu", "--providers", "fast"], "--providers fast"),
        (["run", "--device", "cpu", "--peer", "losparse=/no/such/place"], "/no/such/place/utils.py is missing"),
        (["run", "--device", "cpu", "--only", "nothing"], "--only nothing"),
        (["table", "/no/such/file"], "/no/such/file"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--threads", "0"], "--threads"),
        (["run", "--budget", "-1"], "--budget"),
        (["run", "--dtype", "int8"], "--dtype"),
        (["measure"], "measure"),
    ],
)
def test_bad_options_are_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_without_a_gpu_cuda_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: False)
    assert main(["run", "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err
    assert main(["tune"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_tuning_measures_layers_and_blocks_an_encoder_s_too(monkeypatch, tmp_path, capsys):
    from lpaf_kernels import tuning

    calls = {}

    def fake(name):
        return lambda shapes, **options: calls.setdefault(name, (shapes, options))[1]["output"]

    for name in ("tune_linear", "tune_ffn", "tune_attention", "tune_masked"):
        monkeypatch.setattr(tuning, name, fake(name))
    cases = select(["core-blocks"], "bfloat16", only="r80-")
    tune_cases(cases, torch.bfloat16, 60.0, tmp_path / "table")
    assert set(calls) == {"tune_ffn", "tune_attention"}
    shapes, options = calls["tune_attention"]
    assert shapes == [(768, 12, 12, 64, 768, (80, 80, 80, 80), (0, 0, 0, 0), False)]
    assert options["batches"] == [(1, 128), (32, 128), (128, 128)]
    assert 0 < options["budget_s"] <= 60
    shapes, options = calls["tune_ffn"]
    assert shapes == [(768, 3072, 768, (80, 80), (0, 0), 0)]
    assert options["rows"] == [128, 4096, 16384]
    tune_cases(select(["core"], "bfloat16", only="768x768"), torch.bfloat16, 60.0, None)
    shapes, options = calls["tune_linear"]
    assert shapes == [(768, 768, 41, 38), (768, 768, 130, 0)]
    tune_cases(select(["masked"], "bfloat16"), torch.bfloat16, 60.0, None)
    shapes, options = calls["tune_masked"]
    assert shapes == [(768, 768), (768, 3072), (3072, 768)]
    assert options["rows"] == [4096, 16384]
    assert "1 attention blocks at 1 x 128, 32 x 128, 128 x 128" in capsys.readouterr().out


def test_the_cpu_benchmarks_run_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    rows, report = tmp_path / "rows.jsonl", tmp_path / "report.json"
    options = ["--only", "768x768-r41-k77-m16-", "--threads", "1", "--case-seconds", "0.01", "--rows", str(rows)]
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_linear.py", "-q", "-p", "no:cacheprovider", *options]
    # Where these tests run in parallel the benchmarks must not think that they do.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, f"--benchmark-json={report}", "--benchmark-quiet"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "over chain" in done.stdout
    found = read_rows(rows)
    assert {row["provider"] for row in found} == {"dense", "chain", "ours"}
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    assert benchmark["extra_info"] == {row["provider"]: row["median_us"] for row in found}
    assert benchmark["stats"]["rounds"] == found[0]["rounds"]
