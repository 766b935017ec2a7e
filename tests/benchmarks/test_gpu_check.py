"""The check's steps: each with its limit, none stopping the next; the heavy ones as stand-ins."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import gpu_check
from benchmarks.__main__ import main
from benchmarks.gpu_check import Step, copy_results, dry_steps, gpu_steps, pruning_steps, run_step, run_steps
from benchmarks.providers import PROVIDERS

ROOT = Path(__file__).parents[2]


def step(code: str, **options) -> Step:
    options = {"name": code, "limit": 60} | options
    return Step(command=lambda seconds: (sys.executable, "-S", "-c", code), **options)


def alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be collected does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not (state.exists() and state.read_text().rsplit(") ", 1)[1].startswith("Z"))


def test_a_failed_step_does_not_stop_the_next(tmp_path, capfd):
    steps = [
        step("print('one')"),
        step("raise SystemExit(3)"),
        step(f"open({str(tmp_path / 'three')!r}, 'w')"),
    ]
    outcomes = run_steps(steps, 60)
    assert [outcome.why for outcome in outcomes] == [None, "exit status 3", None]
    assert (tmp_path / "three").exists()
    out = capfd.readouterr().out
    assert "[2/3]" in out
    assert "one" in out


def test_a_step_over_its_limit_is_ended_with_what_it_started(tmp_path):
    code = (
        "import subprocess, sys, time;"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']);"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid));"
        "time.sleep(600)"
    )
    outcome = run_step(step(code, limit=3), left=60)
    assert outcome.why == "over its limit of 3 s"
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not alive(pid):
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} still runs")


def test_a_step_gets_its_share_of_what_is_left():
    seen = []

    def command(seconds):
        seen.append(seconds)
        return (sys.executable, "-S", "-c", "")

    one = Step("one", command, limit=100, share=0.5)
    run_step(one, 40)
    run_step(one, 400)
    assert seen == [20, 100]
    late = run_step(dataclasses.replace(one, least=30), 20)
    assert late.why == "not begun: 20 s left, it needs 30"
    assert len(seen) == 2


def test_a_program_that_is_not_there_is_a_failed_step():
    outcome = run_step(Step("absent", lambda seconds: ("/no/such/program",), 5), 5)
    assert outcome.why.startswith("could not be started")


def test_the_steps_of_both_kinds(tmp_path):
    gpu = [item.name for item in gpu_steps(tmp_path / "rows", tmp_path / "table", skip_build=False)]
    assert gpu == [
        "environment",
        "native build",
        "GPU tests",
        "core cells",
        "block cells",
        "tuning of the core shapes",
        "a copy of the table",
        "core cells with the new table",
    ]
    assert len(dry_steps(tmp_path, skip_build=False)) == 8
    for steps in (gpu_steps(tmp_path, tmp_path, skip_build=True), dry_steps(tmp_path, skip_build=True)):
        assert "native build" not in [item.name for item in steps]


def test_no_step_reaches_for_the_network_or_stops_at_the_first_failure(tmp_path):
    steps = gpu_steps(tmp_path / "rows", tmp_path / "table", False) + dry_steps(tmp_path, False)
    for item in steps:
        words = item.command(100.0)
        assert words[0] == sys.executable
        assert not {"pip", "-x", "--exitfirst"} & set(words)
    core = next(item for item in steps if item.name == "core cells").command(100.0)
    assert core[-2:] == ("--budget", "85")


def test_block_cells_have_rows_and_providers_of_their_own(tmp_path):
    steps = gpu_steps(tmp_path / "core.jsonl", tmp_path / "table", True)
    blocks = next(item for item in steps if item.name == "block cells")
    words = blocks.command(blocks.limit)
    assert words[words.index("--output") + 1] == str(tmp_path / "core-blocks.jsonl")
    assert set(words[words.index("--providers") + 1].split(",")) <= set(PROVIDERS)
    assert words[-2:] == ("--budget", "75")


@pytest.mark.parametrize("build", [20.0, 60.0, 120.0])
def test_every_step_is_begun_within_the_budget(build, tmp_path):
    """Though every step but the build takes all of the time that it is given."""
    left = 540.0
    for item in gpu_steps(tmp_path, tmp_path, skip_build=False):
        assert left >= item.least, item.name
        quick = {"environment": 10.0, "native build": build, "a copy of the table": 3.0}
        left -= quick.get(item.name, min(item.limit, left * item.share))


def test_the_dry_run_takes_the_exit_status_from_its_steps(monkeypatch, capfd):
    monkeypatch.setattr(gpu_check, "dry_steps", lambda scratch, skip: [step("pass"), step("raise SystemExit(1)")])
    assert main(["gpu-check", "--dry"]) == 1
    out = capfd.readouterr().out
    assert "ok" in out
    assert "FAILED" in out
    monkeypatch.setattr(gpu_check, "dry_steps", lambda scratch, skip: [step("pass")])
    assert main(["gpu-check", "--dry", "--skip-build"]) == 0


def test_bad_arguments_are_refused(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["gpu-check", "--budget", "soon"])
    assert exit_.value.code == 2
    assert "--budget" in capsys.readouterr().err


def test_results_are_copied_where_out_says(tmp_path, monkeypatch):
    rows = tmp_path / "core.jsonl"
    rows.write_text("{}\n")
    monkeypatch.delenv("OUT", raising=False)
    assert copy_results([rows]) == []
    monkeypatch.setenv("OUT", str(tmp_path / "absent"))
    assert copy_results([rows]) == []
    (tmp_path / "out").mkdir()
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert copy_results([rows, tmp_path / "never"]) == [tmp_path / "out" / "core.jsonl"]


@pytest.mark.parametrize(
    ("found", "status", "words"),
    [
        ({80: [[]], 90: [[], []]}, 0, "3 kernels compiled, 0 not fit to ship"),
        ({80: [[], ["16 bytes of stack"]], 90: []}, 1, "expand-a on sm_80: 16 bytes of stack"),
        ({80: [], 90: []}, 1, "0 kernels compiled"),
    ],
)
def test_kernels_that_do_not_fit_fail_their_step(found, status, words, monkeypatch, capsys):
    pytest.importorskip("triton")
    from lpaf_kernels.triton import launch, shipped

    monkeypatch.setattr(launch, "LAUNCHES", {"expand-a": SimpleNamespace(archs=(80, 90))})
    call = SimpleNamespace(constants={"BLOCK_M": 16})
    monkeypatch.setattr(shipped, "faults", lambda name, arch: ((call, faults) for faults in found[arch]))
    assert gpu_check.compile_kernels() == status
    assert words in capsys.readouterr().out


def test_core_cases_are_built(capsys):
    assert gpu_check.build_core_cases() == 0
    out = capsys.readouterr().out
    assert "core cases run on the meta device" in out
    assert "train ours: passed" in out


def test_block_cases_are_built(capsys):
    assert gpu_check.build_block_cases() == 0
    out = capsys.readouterr().out
    for op in ("ffn", "attention", "encoder"):
        assert f"{op}-768x" in out
    assert "-r260-b1x16-bfloat16 ours: passed" in out


def test_the_environment_is_reported(capfd):
    assert gpu_check.report_environment() in (0, 1)
    out = capfd.readouterr().out
    assert "torch" in out
    assert "CUDA devices" in out


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gpu-pruning"], "python9 -m benchmarks gpu-pruning"),
        (["gpu-check"], "python9 -m benchmarks gpu-check"),
        (["gpu-check", "DRY=1"], "python9 -m benchmarks gpu-check --dry"),
        (["gpu-bench", "SLICE=2/5"], "--cases full --slice 2/5"),
    ],
)
def test_the_make_targets_use_the_named_python_and_make_no_environment(words, expected):
    done = subprocess.run(
        ["make", "-n", *words, "PYTHON=python9"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert expected in done.stdout
    assert "venv" not in done.stdout
    assert "pip" not in done.stdout


def test_pruning_steps_run_files_that_are_there_with_options_they_know(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    steps = pruning_steps(tmp_path / "masked.jsonl", tmp_path)
    assert steps[-1].name == "compute-sanitizer"
    scripts = [list(step.command(60)) for step in steps]
    for command in scripts:
        for word in command:
            assert not word.endswith(".py") or (ROOT / word).is_file(), word
    for command in scripts:
        if command[1].startswith("benchmarks/"):
            text = subprocess.run([sys.executable, command[1], "--help"], cwd=ROOT, capture_output=True, text=True)
            assert all(word in text.stdout for word in command[2:] if word.startswith("--")), command
    configuration = next(step for step in steps if step.name == "configuration")
    assert run_step(configuration, 60).why is None
    assert (tmp_path / "config.json").is_file()


def test_the_pruning_figures_are_a_command(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_check, "pruning_steps", lambda output, config: asked.append(output) or [step("pass")])
    assert main(["gpu-pruning", "--budget", "30", "--output", str(tmp_path / "rows.jsonl")]) == 0
    assert asked == [tmp_path / "rows.jsonl"]
    monkeypatch.setattr(gpu_check, "pruning_steps", lambda output, config: [step("raise SystemExit(1)")])
    assert main(["gpu-pruning", "--output", str(tmp_path / "rows.jsonl")]) == 1
