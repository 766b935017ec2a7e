"""``lpaf demo``: the whole story on a built-in model and task, with a control that shows the task is hard enough."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..models.checkpoint import resolve_model
from ..report.terminal import comparison_row, comparison_table, show
from .compress import Compression
from .options import CompressOptions
from .prepare import prepare

MODEL = "minilm-l6"
CONTROL = "rank-1 control"


def demo_options(output: Path, quick: bool, seed: int) -> CompressOptions:
    """The options of the demo: MiniLM on the docstrings task at 25 % of its encoder."""
    common: dict[str, Any] = {
        "model": MODEL,
        "task": "docstrings",
        "output": str(output),
        "ratio": 0.25,
        "seed": seed,
        "max_length": 32 if quick else 48,
        "freeze_embeddings": True,
        "checkpoint_steps": 0,
        "overwrite": True,
    }
    if quick:
        return CompressOptions(**common, max_train_samples=640, finetune_epochs=1, prune_epochs=1, retrain_epochs=1)
    return CompressOptions(
        **common,
        finetune_epochs=2,
        finetune_lr=2e-4,
        prune_epochs=1,
        prune_lr=1e-4,
        retrain_epochs=4,
        retrain_lr=5e-4,
        distill=0.7,
    )


def demo(output: Path, quick: bool = False, seed: int = 0) -> dict[str, Any]:
    """Fine-tune MiniLM on docstrings, compress it to 25 %, and compare with the dense model and a rank-1 control.

    Args:
        output: directory of the compressed model; replaced if it is an earlier demo.
        quick: a smoke run on a fraction of the data.
        seed: seed of everything.

    Raises:
        InputError: the demo extra is not installed, or output is in use by something else.
    """
    if not Path(resolve_model(MODEL)).is_dir():
        raise InputError("demo: the built-in model is not installed; run pip install 'lpaf-kernels[demo]'")
    if output.exists() and any(output.iterdir()) and not (output / "report.json").is_file():
        raise InputError(f"--output {output}: is not empty and not an earlier demo; pass another directory")
    start = time.perf_counter()
    options = demo_options(output, quick, seed)
    command = shlex.join(["lpaf", *sys.argv[1:]])
    _, report = Compression(prepare(options), command).run(controls={CONTROL: 1})
    show(comparison_table(comparison_rows(report), metric=report["metric"]["name"]))
    minutes = (time.perf_counter() - start) / 60
    print(f"\n{minutes:.1f} minutes; the compressed model is in {output}, its report in {output / 'report.html'}")
    if quick:
        print("a quick run shows that everything works; its accuracies mean nothing")
    return report


def comparison_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """One table line per model: dense, compressed, controls."""
    rows = [comparison_row(stage, report, stage=stage) for stage in ("dense", "compressed")]
    for name, control in report["controls"].items():
        rows.append({"name": name, "speedup": report["latency_ms"]["dense"] / control["latency_ms"], **control})
    return rows
