"""kill -9 anywhere in a run, then ``--resume``: the weights and the report of the run that nobody disturbed."""

from __future__ import annotations

import functools
import json
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch import DEATHS, launch
from lpaf.prune import PRUNERS
from lpaf.recipes.methods import METHODS
from lpaf.recipes.options import PRUNER_CHOICES, flag

RUN = {
    "task": "text-classification", "finetune-epochs": 1, "prune-epochs": 2, "retrain-epochs": 2, "batch-size": 16,
    "checkpoint-steps": 3, "bench-batch": 2, "bench-length": 16, "max-length": 16, "finetune-lr": 2e-3,
    "retrain-lr": 2e-3, "max-train-samples": 90,
}  # fmt: skip


#: one death for each kind of stage
QUICK = ("finetune", "teacher", "prune", "prune store", "factorize", "retrain", "measure", "publish", "discard")


def command(model: Path, data: Path, output: Path, *more: str, **options: str) -> list[str]:
    """A compression of the tiny model."""
    values = RUN | {"model": model, "data-dir": data, "output": output} | options
    return ["compress", *(str(word) for name, value in values.items() for word in (f"--{name}", value)), *more]


#: (method, pruner) of every chain that the command line can ask for; None: the method's own
CHAINS = [(method, None) for method in METHODS] + [
    ("lpaf", pruner) for pruner in PRUNER_CHOICES if pruner != "movement"
]


def chosen(method: str, pruner: str | None = None, keep: float = 0.3) -> list[str]:
    """The options that choose a chain, its size, and what its pruner is told."""
    words = ["--method", method, *(["--pruner", pruner] if pruner else [])]
    if METHODS[method].modules_only:
        words += ["--modules", "embeddings,key", "--compression-ratio", "3", "--concatenate"]
        return [*words, *(["--decoder", "mlp1", "--module-updates", "1200"] if method == "autoencoder" else ())]
    by_ratio = METHODS[method].factorizer is None or METHODS[method].proportional
    structured = METHODS[method].compact and PRUNERS[METHODS[method].pruner].structured
    ratio = "1.0" if structured and keep == 1.0 else "0.5"
    words += ["--ratio", ratio] if by_ratio else ["--rank", "4"]
    for field, value in {"keep": keep, "prune_lr": 2e-3}.items():
        if field not in METHODS[method].idle({"pruner": pruner}):
            words += [flag(field), str(value)]
    return words


def happens(death: str, method: str, pruner: str | None = None) -> bool:
    """Whether a run of the chain passes there."""
    chain = METHODS[method]
    name = pruner or chain.pruner
    absent = {
        "teacher": not chain.distill,
        "prune": not name or not PRUNERS[name].trains,
        "prune store": not name,
        "round": name != "lottery-ticket",
        "fisher": not chain.by_fisher,
        "factorize": not chain.factorizer,
        "truncate": bool(chain.factorizer) or chain.compact or chain.modules_only,
        "module store": not chain.modules_only,
        "module": method != "autoencoder",
    }
    return not absent.get(death, absent.get(death.split()[0], False))


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
    """(method, pruner) -> output of a run that nobody disturbed."""

    @functools.cache
    def run(*chain: str | None) -> Path:
        output = tmp_path_factory.mktemp("undisturbed") / "out"
        statuses, said = launch(command(tiny_model, tiny_data, output, *chosen(*chain)), output.parent / "log")
        assert statuses == [0], said
        return output

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
        chain,
        death,
        marks=() if chain == ("lpaf", None) and death in QUICK else pytest.mark.slow,
        id="-".join(filter(None, (*chain, death.replace(" ", "-")))),
    )
    for chain in CHAINS
    for death in DEATHS
    if happens(death, *chain)
]


@pytest.mark.parametrize(("chain", "death"), GRID)
def test_killed_run_resumes_to_the_same_weights(undisturbed, tiny_model, tiny_data, tmp_path, chain, death):
    kill_and_resume(command(tiny_model, tiny_data, tmp_path / "out", *chosen(*chain)), tmp_path / "out", death)
    assert_same_run(tmp_path / "out", undisturbed(*chain))
