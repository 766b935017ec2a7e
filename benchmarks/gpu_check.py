"""``make gpu-check``: everything that needs a GPU, in one command that ends in minutes and needs no network.

Each step is a process with a time limit of its own, in a fixed order: what it prints is passed on, a step that fails
does not stop those after it, and the exit status says whether all of them passed. With ``--dry`` every step runs up
to the launch on a machine that has no GPU.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .environment import ROOT
from .rows import RESULTS

if TYPE_CHECKING:
    from .cases import Case

# The environment variable that names a folder for copies of the results.
OUT = "OUT"
# Cells of the dry run's gate: small M only, a CPU computes them.
DRY_ROWS = 16


@dataclass(frozen=True)
class Step:
    """One step of the check.

    Args:
        name: as printed.
        command: (seconds it has) -> program and arguments.
        limit: seconds after which it is ended.
        share: of the time that is left when it begins, instead of all of it. Default: 1.
        least: with less time left than this it is not begun. Default: 1 second.
        environment: variables beside the caller's.
    """

    name: str
    command: Callable[[float], Sequence[str]]
    limit: float
    share: float = 1.0
    least: float = 1.0
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a step ended: ``why`` is None if it passed."""

    name: str
    seconds: float
    why: str | None


def _end(process: subprocess.Popen) -> None:
    """End a step and what it started (compilers, test processes): they are one process group."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except ProcessLookupError:
            process.wait()
        except subprocess.TimeoutExpired:
            pass


def run_step(step: Step, left: float) -> Outcome:
    """Run one step in at most ``left`` seconds, its own limit, and its share of what is left."""
    if left < step.least:
        return Outcome(step.name, 0.0, f"not begun: {left:.0f} s left, it needs {step.least:.0f}")
    seconds = min(step.limit, left * step.share)
    begin = time.monotonic()
    try:
        process = subprocess.Popen(
            list(step.command(seconds)), cwd=ROOT, env=os.environ | step.environment, start_new_session=True
        )
    except OSError as error:
        return Outcome(step.name, 0.0, f"could not be started: {error}")
    try:
        status = process.wait(seconds)
        why = None if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        _end(process)
        why = f"over its limit of {seconds:.0f} s"
    except BaseException:
        _end(process)
        raise
    return Outcome(step.name, time.monotonic() - begin, why)


def run_steps(steps: Sequence[Step], budget: float) -> list[Outcome]:
    """Run steps in order until ``budget`` seconds are spent; says what becomes of each."""
    begin = time.monotonic()
    outcomes = []
    for number, step in enumerate(steps, start=1):
        print(f"== [{number}/{len(steps)}] {step.name}", flush=True)
        outcome = run_step(step, budget - (time.monotonic() - begin))
        outcomes.append(outcome)
        print(f"== {outcome.why or 'ok'} ({outcome.seconds:.1f} s): {step.name}", flush=True)
    return outcomes


def _python(*arguments: str) -> Callable[[float], Sequence[str]]:
    return lambda seconds: (sys.executable, *arguments)


def _internal(function: str) -> Callable[[float], Sequence[str]]:
    return _python("-c", f"import sys; from benchmarks import gpu_check; sys.exit(gpu_check.{function}())")


def _benchmarks(*arguments: str) -> Callable[[float], Sequence[str]]:
    # Ends by itself before the limit would end it.
    return lambda seconds: (sys.executable, "-m", "benchmarks", *arguments, "--budget", f"{max(seconds - 15, 5):.0f}")


BUILD = {"LPAF_NATIVE": "required"}
BLOCK_PROVIDERS = "dense,chain_graph,ours,ours_graph"
TESTS = ("-m", "pytest", "tests/kernels", "-m", "gpu", "-q", "-p", "no:cacheprovider")


def gpu_steps(output: Path, table: Path, skip_build: bool) -> list[Step]:
    """The steps on a GPU; ``output`` takes the rows, ``table`` a copy of what was tuned."""
    core = ("run", "--device", "cuda", "--cases", "core", "--case-seconds", "0.5", "--output", str(output))
    blocks = ("run", "--device", "cuda", "--cases", "core-blocks", "--providers", BLOCK_PROVIDERS)
    blocks += ("--case-seconds", "0.5", "--output", str(block_rows(output)))
    steps = [Step("environment", _internal("report_environment"), 60)]
    if not skip_build:
        build = _python("setup.py", "build_ext", "--inplace")
        steps.append(Step("native build", build, 180, environment=BUILD))
    return [
        *steps,
        Step("GPU tests", _python(*TESTS), 180, share=0.5),
        Step("core cells", _benchmarks(*core), 240, share=0.4, least=30),
        Step("block cells", _benchmarks(*blocks), 90, share=0.35, least=30),
        Step("tuning of the core shapes", _benchmarks("tune", "--device", "cuda", "--cases", "core"), 240, 0.45, 30),
        Step("a copy of the table", _python("-c", _COPY_TABLE.format(str(table))), 30),
        Step("core cells with the new table", _benchmarks(*core), 240, least=45),
    ]


def pruning_steps(output: Path, config: Path) -> list[Step]:
    """What pruning and factorising BERT-base cost on a GPU, and compute-sanitizer over its kernels.

    ``output`` takes the rows of the masked layers; ``config`` is a folder for BERT-base's configuration.
    """
    masked = ("run", "--device", "cuda", "--cases", "masked", "--case-seconds", "0.5", "--output", str(output))
    step = ("bench", "--model", str(config), "--step", "--batch", "32", "--length", "128", "--bf16", "--device", "cuda")
    path = os.pathsep.join(filter(None, (str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH"))))
    sources = {"PYTHONPATH": path}
    steps = [
        Step("environment", _internal("report_environment"), 60),
        Step("thresholds", _python("benchmarks/keep_threshold.py", "--device", "cuda", *BERT), 90, environment=sources),
        Step("updates", _python("benchmarks/pruning_updates.py", "--device", "cuda"), 60, environment=sources),
        Step("configuration", _python("-c", _BERT_CONFIG.format(str(config))), 60),
        Step("training steps", _python("-m", "lpaf", *step), 120, environment=sources),
        Step("compiled", _python("-m", "lpaf", *step, "--mode", "compiled"), 180, environment=sources),
        Step("masked cells", _benchmarks(*masked), 120, least=30),
        Step("tuning of the masked layers", _benchmarks("tune", "--device", "cuda", "--cases", "masked"), 90, least=30),
        Step("factorisation", _python("benchmarks/weighted_svd.py", "--device", "cuda", *BERT, "--ranks", "130"), 150),
    ]
    if shutil.which("compute-sanitizer"):
        tests = ("tests/kernels/test_keep_threshold.py", "tests/kernels/test_pruning_updates.py")
        sanitizer = ("compute-sanitizer", "--error-exitcode", "1", sys.executable, "-m", "pytest", *tests)
        command = (*sanitizer, "-m", "gpu", "-q", "-x", "-p", "no:cacheprovider")
        steps.append(Step("compute-sanitizer", lambda seconds: command, 240, least=30))
    return steps


BERT = ("--matrices", "bert-base")
_BERT_CONFIG = """
import transformers
transformers.BertConfig(architectures=["BertForSequenceClassification"]).save_pretrained({0!r})
"""


def check_pruning(budget: float, output: Path | None) -> int:
    """Run :func:`pruning_steps` in at most ``budget`` seconds; returns 0 if every step passed, otherwise 1."""
    if output is None:
        output = RESULTS / gpu_slug() / "masked.jsonl"
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run_steps(pruning_steps(output.resolve(), Path(scratch)), budget)
    copy_results([output])
    return summarise(outcomes)


def block_rows(output: Path) -> Path:
    """Where the rows of the block cells go, beside those of the core cells."""
    return output.with_name("core-blocks.jsonl")


# The table that tuning wrote is the user's own; the results keep a copy of it.
_COPY_TABLE = """
import shutil, sys, torch
from lpaf_kernels.tuning.dispatch import user_table
source = user_table(torch.cuda.get_device_name())
if not source.is_file():
    sys.exit(f"{{source}} is missing: nothing was tuned")
print(shutil.copy2(source, {0!r}))
"""


def dry_steps(scratch: Path, skip_build: bool) -> list[Step]:
    """The same steps up to the launch, for a machine with no GPU; nothing of the tree is written."""
    steps = [Step("environment", _internal("report_environment"), 60)]
    if not skip_build:
        folders = ("--build-lib", str(scratch / "lib"), "--build-temp", str(scratch / "temp"))
        steps.append(Step("native build", _python("setup.py", "build_ext", *folders), 600, environment=BUILD))
    rows = str(scratch / "rows.jsonl")
    sample = ("run", "--device", "cpu", "--cases", "core", "--dtype", "float32", "--only", "768x768-r41-k38-m1-")
    return [
        *steps,
        Step("collection of the GPU tests", _python(*TESTS, "--collect-only"), 120),
        Step("core cases", _internal("build_core_cases"), 120),
        Step("block cases", _internal("build_block_cases"), 120),
        Step("Triton kernels compiled", _internal("compile_kernels"), 1800),
        Step("rows written", _benchmarks(*sample, "--case-seconds", "0.1", "--threads", "1", "--output", rows), 120),
        Step("rows read", _python("-m", "benchmarks", "table", rows), 60),
    ]


def copy_results(files: Sequence[Path]) -> list[Path]:
    """Copy what exists of ``files`` into the folder that $OUT names, if there is one; returns the copies."""
    folder = os.environ.get(OUT)
    if not folder or not Path(folder).is_dir():
        return []
    return [Path(shutil.copy2(file, folder)) for file in files if file.is_file()]


def check(dry: bool, budget: float, skip_build: bool, output: Path | None) -> int:
    """Run the check; returns 0 if every step passed, otherwise 1.

    Args:
        dry: up to the launch only.
        budget: seconds for all steps. A dry run has no use for it but keeps to each step's own limit.
        skip_build: use the native libraries that are there.
        output: the core cells' file, beside which core-blocks.jsonl takes the block cells. Default:
            benchmarks/results/DEVICE/core.jsonl.
    """
    if dry:
        with tempfile.TemporaryDirectory() as scratch:
            outcomes = run_steps(dry_steps(Path(scratch), skip_build), float("inf"))
    else:
        if output is None:
            output = RESULTS / gpu_slug() / "core.jsonl"
        output.parent.mkdir(parents=True, exist_ok=True)
        table = output.parent / "tuning.json"
        outcomes = run_steps(gpu_steps(output.resolve(), table.resolve(), skip_build), budget)
        for copy in copy_results([output, block_rows(output), table]):
            print(f"copied to {copy}")
    return summarise(outcomes)


def summarise(outcomes: Sequence[Outcome]) -> int:
    """One line per step; returns 0 if every step passed, otherwise 1."""
    print()
    for outcome in outcomes:
        print(f"{'ok    ' if outcome.why is None else 'FAILED'} {outcome.seconds:6.1f} s  {outcome.name}", end="")
        print("" if outcome.why is None else f": {outcome.why}")
    return 0 if all(outcome.why is None for outcome in outcomes) else 1


def gpu_slug() -> str:
    """The folder name of the GPU, "no-gpu" if torch sees none."""
    import torch

    from .environment import describe

    return describe(torch.device("cuda", 0)).slug if torch.cuda.is_available() else "no-gpu"


def report_environment() -> int:
    """Print what is here; fails without the Python packages that the other steps need."""
    import importlib.util
    import platform

    import torch

    import lpaf_kernels

    if shutil.which("nvidia-smi"):
        subprocess.run(["nvidia-smi"], timeout=30)
    else:
        print("nvidia-smi is not on the PATH")
    nvcc = shutil.which("nvcc")
    print(f"python {platform.python_version()} ({sys.executable}), torch {torch.__version__}, nvcc {nvcc}")
    print(f"CUDA devices: {torch.cuda.device_count()}; lpaf_kernels {lpaf_kernels.build_info()}")
    needed = ("triton", "pytest", "hypothesis", "cmake", "ninja", "pybind11", "setuptools")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    # cmake and ninja may be the system's.
    missing = [name for name in missing if shutil.which(name) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}")
    return 1 if missing else 0


def build_core_cases() -> int:
    """Build every core case's layer and run it on the meta device; run the gate on the CPU for the small ones."""
    import torch

    from lpaf_kernels import LowRankSparseLinear

    from .cases import core_cases, cpu_cases

    cases = core_cases("bfloat16")
    for case in cases:
        kept = torch.arange(case.kept, dtype=torch.int32, device="meta")
        layer = LowRankSparseLinear(
            case.in_features, case.out_features, case.rank, kept, device="meta", dtype=torch.bfloat16
        )
        x = torch.empty(case.rows, case.in_features, device="meta", dtype=torch.bfloat16)
        y = layer(x)
        if y.shape != (case.rows, case.out_features):
            print(f"{case}: y has shape {list(y.shape)}")
            return 1
    print(f"{len(cases)} core cases run on the meta device")
    small = [case for case in cases if case.rows <= DRY_ROWS and case.direction == "forward"][:4]
    # One training step, which the core cells have only at large M.
    small.append(dataclasses.replace(cpu_cases("bfloat16")[0], rows=DRY_ROWS, direction="forward+backward"))
    return _gate_on_the_cpu(small)


def build_block_cases() -> int:
    """Run the gate on the CPU for one short sequence and one layer of every core block case."""
    from .cases import core_block_cases

    small = []
    for case in core_block_cases("bfloat16"):
        layers = {"layers": 1} if case.op == "encoder" else {}
        small.append(dataclasses.replace(case, batch=1, length=DRY_ROWS, **layers))
    return _gate_on_the_cpu(dict.fromkeys(small))


def _gate_on_the_cpu(cases: Iterable[Case]) -> int:
    """1 if the gate fails for any of the cases, 0 if not."""
    import torch

    from .gate import Gate
    from .problem import make_problem
    from .providers import PROVIDERS

    failed = 0
    for case in cases:
        problem = make_problem(case, torch.device("cpu"))
        gate = Gate(problem)
        for name in ("dense", "chain", "ours"):
            verdict = gate.check(PROVIDERS[name].build(problem))
            print(f"{case} {name}: {verdict.failed or 'passed'}")
            failed += verdict.failed is not None
    return 1 if failed else 0


def compile_kernels() -> int:
    """Compile every shipped Triton configuration for the architectures that it names."""
    from lpaf_kernels.triton.launch import LAUNCHES
    from lpaf_kernels.triton.shipped import faults

    total = failed = 0
    for name, launch in LAUNCHES.items():
        for arch in launch.archs:
            for call, found in faults(name, arch):
                total += 1
                if found:
                    failed += 1
                    print(f"{name} on sm_{arch}: {'; '.join(found)} ({call.constants})", flush=True)
    print(f"{total} kernels compiled, {failed} not fit to ship")
    return 1 if failed or not total else 0
