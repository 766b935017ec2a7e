"""kill -9 anywhere in a run, then ``--resume``: the weights and the report of the run that nobody disturbed."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import DEATHS, launch
from lpaf.recipes.methods import METHODS

RUN = {
    "task": "text-classification", "finetune-epochs": 1, "prune-epochs": 2, "retrain-epochs": 2, "batch-size": 16,
    "checkpoint-steps": 3, "bench-batch": 2, "bench-length": 16, "max-length": 16, "finetune-lr": 2e-3,
    "prune-lr": 2e-3, "retrain-lr": 2e-3, "keep": 0.3, "max-train-samples": 90,
}  # fmt: skip


def command(model: Path, data: Path, output: Path, *more: str, **options: str) -> list[str]:
    """A compression of the tiny model."""
    values = RUN | {"model": model, "data-dir": data, "output": output} | options
    return ["compress", *(str(word) for name, value in values.items() for word in (f"--{name}", value)), *more]


def size(method: str) -> list[str]:
    """What a method is told of the size."""
    return ["--ratio", "0.5"] if METHODS[method].factorizer is None else ["--rank", "4"]


def happens(death: str, method: str) -> bool:
    """Whether a run of the method passes there."""
    chain = METHODS[method]
    absent = {
        "prune": chain.pruner is None,
        "teacher": not chain.distill,
        "factorize": chain.factorizer is None,
        "truncate": chain.factorizer is not None,
    }
    return not absent.get(death.split()[0], False)


def story(output: Path) -> dict:
    """Of a report what does not depend on the clock."""
    report = json.loads((output / "report.json").read_text())
    return {name: report[name] for name in ("metric", "training", "encoder_params", "rank", "data")}


def assert_same_run(found: Path, expected: Path) -> None:
    first, second = (load_file(output / "model.safetensors") for output in (found, expected))
    assert first.keys() == second.keys()
    assert [name for name in second if not torch.equal(first[name], second[name])] == []
    assert story(found) == story(expected)
    scores = [load_file(output / "analysis.safetensors") for output in (found, expected)]
    assert scores[0].keys() == scores[1].keys()


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tiny_data, tmp_path_factory):
    """(method, processes) -> output of a run that nobody disturbed."""
    done: dict = {}

    def run(method: str, *more: str, processes: int = 1) -> Path:
        key = (method, processes, *more)
        if key not in done:
            output = tmp_path_factory.mktemp("undisturbed") / "out"
            words = command(tiny_model, tiny_data, output, "--method", method, *size(method), *more)
            statuses, said = launch(words, output.parent / "log", processes)
            assert statuses == [0] * processes, said
            done[key] = output
        return done[key]

    return run


def kill_and_resume(words: list[str], output: Path, death: str, processes: int = 1, victim: int = 0) -> None:
    statuses, said = launch(words, output.parent / "killed", processes, {victim: death})
    assert statuses[victim] == -signal.SIGKILL, said
    if death != "discard":
        assert not output.exists(), "a run that dies leaves no output directory"
    if death == "prune":
        statuses, said = launch(words, output.parent / "again", processes)
        assert (statuses, "--resume" in said[0] + said[-1]) == ([2] * processes, True), "refused unless asked to go on"
    statuses, said = launch([*words, "--resume"], output.parent / "resumed", processes)
    assert statuses == [0] * processes, said
    assert sorted(path.name for path in output.parent.iterdir() if path.is_dir()) == ["out"], "nothing is left behind"


GRID = [
    pytest.param(
        method,
        death,
        marks=() if method == "lpaf" and death != "prune checkpoint" else pytest.mark.slow,
        id=f"{method}-{death.replace(' ', '-')}",
    )
    for method in METHODS
    for death in DEATHS
    if happens(death, method)
]


@pytest.mark.parametrize(("method", "death"), GRID)
def test_killed_run_resumes_to_the_same_weights(undisturbed, tiny_model, tiny_data, tmp_path, method, death):
    words = command(tiny_model, tiny_data, tmp_path / "out", "--method", method, *size(method))
    kill_and_resume(words, tmp_path / "out", death)
    assert_same_run(tmp_path / "out", undisturbed(method))
