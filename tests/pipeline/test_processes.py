"""Many processes: the weights and metrics of one, one voice, and one message when something is wrong."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_kill import CHAINS, assert_same_run, chosen, command, happens, kill_and_resume, story

from launch import DEATHS, launch, spoken
from lpaf.processes import SHARDERS
from lpaf.retrain.batches import BatchShare
from tiny import questions, sentences, write_model, write_rows


@pytest.fixture(scope="module")
def steady_model(tmp_path_factory) -> Path:
    """The tiny model without dropout, whose masks are the one thing that processes draw on their own."""
    directory = write_model(tmp_path_factory.mktemp("steady") / "tiny-bert")
    config = json.loads((directory / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def odd_data(tmp_path_factory) -> Path:
    """99 examples: the last batch holds three, which two processes cannot share evenly and four not at all."""
    directory = tmp_path_factory.mktemp("odd") / "mood"
    write_rows(directory / "train.jsonl", sentences(99, seed=1))
    write_rows(directory / "validation.jsonl", sentences(41, seed=2))
    return directory


def run(words: list[str], output: Path, processes: int = 1, probe: str | None = None) -> list[str]:
    """A run that ends well; what its processes say."""
    probes = dict.fromkeys(range(processes), probe) if probe else {}
    statuses, said = launch(words, output.parent / "log", processes, probes)
    assert statuses == [0] * processes, said
    return said


# shares of a batch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "batch", "processes"), [(97, 16, 2), (96, 16, 4), (90, 16, 8), (3, 16, 8)])
def test_shares_make_up_every_batch_and_their_means_its_mean(examples, batch, processes):
    values = torch.randn(examples, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = [BatchShare(range(examples), batch, process, processes) for process in range(processes)]
    parts = [list(share) for share in shares]
    for index, whole in enumerate(BatchShare(range(examples), batch)):
        weights = [share.weight(index) for share in shares]
        held = [part[index] for part, weight in zip(parts, weights, strict=True) if weight > 0]
        assert sorted(example for part in held for example in part) == whole
        assert all(part[index] for part in parts), "no process is without an example"
        means = [weight * values[part[index]].mean() for part, weight in zip(parts, weights, strict=True)]
        torch.testing.assert_close(torch.stack(means).mean(), values[whole].mean())
    assert len(shares[0]) == len(parts[0]) == index + 1


def test_one_process_has_every_batch_with_weight_one():
    share = BatchShare(range(10), 4)
    assert list(share) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [share.weight(index) for index in range(3)] == [1.0] * 3


# the same weights -----------------------------------------------------------------------------------------------------


#: what every key of a query gets alike, which its softmax does not see
WITHOUT_EFFECT = ("key.bias", "key.lowrank.bias")
#: what every position of a window gets alike
WITHOUT_EFFECT_ON_SPANS = (*WITHOUT_EFFECT, "qa_outputs.bias", "layer.1.output.LayerNorm.bias")


def difference(first: Path, second: Path, without: tuple[str, ...]) -> float:
    """By how much of its size nine tenths of any tensor differ at most.

    Not all: where a gradient is next to zero, AdamW makes whole steps of rounding errors. So it does everywhere in
    tensors ``without`` effect.
    """
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    found = [0.0]
    for name, tensor in one.items():
        apart = (tensor.double() - other[name].double()).abs().flatten()
        if tensor.is_floating_point() and not name.endswith(without) and bool(apart.any()):
            found.append(float(apart.quantile(0.9) / tensor.double().square().mean().sqrt()))
    return max(found)


def assert_same_training(one: dict, other: dict) -> None:
    """The histories of two reports differ by rounding errors."""
    assert other["training"].keys() == one["training"].keys()
    for stage, history in one["training"].items():
        for entry, same in zip(other["training"][stage], history, strict=True):
            assert entry == pytest.approx(same, rel=1e-3, abs=1e-5)


def assert_order_of_sums_is_all(words, directory: Path, processes: int, without=WITHOUT_EFFECT) -> None:
    """Many processes stray from one as far as one does that adds every batch up in the opposite order.

    Ten times as far at most: which of the two strays further is chance. Nothing is to be pruned (scores are learned all
    the same), because a rounding error at the threshold is a weight more or less.
    """
    outputs = {name: directory / name / "out" for name in ("one", "reversed", "many")}
    for output in outputs.values():
        output.parent.mkdir()
    run(words(outputs["one"]), outputs["one"], probe="stages")
    run(words(outputs["reversed"]), outputs["reversed"], probe="reversed")
    said = run(words(outputs["many"]), outputs["many"], processes, probe="stages")
    assert said[1:] == [""] * (processes - 1), "one process speaks"
    assert "written to" in said[0]
    stages = {name: output.parent / "stages" for name, output in outputs.items()}
    files = sorted(path.name for path in stages["one"].iterdir())
    assert len(files) >= 4
    bound = 0.0
    for file in sorted(files, key=lambda file: (stages["one"] / file).stat().st_mtime_ns):
        bound = max(bound, difference(stages["reversed"] / file, stages["one"] / file, without))
        assert difference(stages["many"] / file, stages["one"] / file, without) <= 10 * bound, file
        for process in range(1, processes):
            mine, other = (load_file(stages["many"] / name) for name in (file, file.replace("0.", f"{process}.")))
            assert [name for name in mine if not torch.equal(mine[name], other[name])] == [], file
    assert 0.0 < bound < 5e-3, "an error in the weight of a short batch, or of an unused factor, makes 3e-2"
    one, many = (story(outputs[name]) for name in ("one", "many"))
    assert many["metric"]["details"] == one["metric"]["details"]
    assert_same_training(one, many)


def test_two_processes_end_with_the_weights_of_one(steady_model, odd_data, tmp_path):
    """With paths drawn at p = 1 in the first step, where no factor has a gradient."""

    def words(output: Path) -> list[str]:
        more = {"mixed-rank-p": 1.0, "max-train-samples": 99, "checkpoint-steps": 0}
        return command(steady_model, odd_data, output, *chosen("lpaf", keep=1.0), **more)

    assert_order_of_sums_is_all(words, tmp_path, processes=2)


@pytest.mark.slow
def test_two_processes_prune_the_weights_that_one_prunes(steady_model, odd_data, tmp_path):
    kept = []
    for processes in (1, 2):
        output = tmp_path / str(processes) / "out"
        output.parent.mkdir()
        run(command(steady_model, odd_data, output, *chosen("lpaf")), output, processes, probe="stages")
        state = load_file(output.parent / "stages" / "before-retrain-0.safetensors")
        kept.append(torch.cat([state[name].flatten() != 0 for name in sorted(state) if name.endswith("sparse_weight")]))
    assert 0.29 < float(kept[0].float().mean()) < 0.31
    assert float((kept[0] != kept[1]).float().mean()) < 1e-3, "but for those at the threshold"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3, 4])
@pytest.mark.parametrize("more", [["--hard-pruning"], ["--scope", "global"], ["--freeze-embeddings"]])
def test_more_processes_and_pruners(steady_model, odd_data, tmp_path, processes, more):
    def words(output: Path) -> list[str]:
        return command(
            steady_model,
            odd_data,
            output,
            *chosen("lpaf", keep=1.0),
            *more,
            **{"batch-size": 24, "max-train-samples": 99},
        )

    assert_order_of_sums_is_all(words, tmp_path, processes)


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(filter(None, chain)))
def test_every_chain_ends_with_the_weights_of_one(steady_model, odd_data, tmp_path, chain):
    def words(output: Path) -> list[str]:
        return command(steady_model, odd_data, output, *chosen(*chain, keep=1.0), **{"max-train-samples": 99})

    assert_order_of_sums_is_all(words, tmp_path, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lpaf", "kd"])
def test_layer_wise_distillation_ends_with_the_weights_of_one(steady_model, odd_data, tmp_path, method):
    """A teacher beside the student in every process, and sentences of all lengths in every share of a batch."""

    def words(output: Path) -> list[str]:
        layers = {"distill": "layer", "distill-output": 1, "max-train-samples": 99}
        return command(steady_model, odd_data, output, *chosen(method, keep=1.0), **layers)

    assert_order_of_sums_is_all(words, tmp_path, processes=2)


@pytest.mark.slow
def test_question_answering_ends_with_the_weights_of_one(steady_model, tmp_path):
    """Windows of several lengths, whose logits are padded and put together again."""
    for name, count, seed in (("train", 50, 1), ("validation", 45, 2)):
        write_rows(tmp_path / "data" / f"{name}.jsonl", questions(count, seed))

    def words(output: Path) -> list[str]:
        options = {"task": "question-answering", "max-length": 24, "doc-stride": 6, "max-train-samples": 50}
        return command(steady_model, tmp_path / "data", output, *chosen("lpaf", keep=1.0), **options)

    assert_order_of_sums_is_all(words, tmp_path, processes=2, without=WITHOUT_EFFECT_ON_SPANS)


# launchers ------------------------------------------------------------------------------------------------------------


def started(launcher: list[str], words: list[str], cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command_line = [sys.executable, "-m", *launcher, "-m", "lpaf", *words]
    return subprocess.run(command_line, cwd=cwd, capture_output=True, text=True, env=environment)


def test_torchrun_starts_a_run_and_an_evaluation(tiny_model, tiny_data, tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    output = tmp_path / "out"
    options = {"rank": 4, "finetune-epochs": 1, "prune-epochs": 0.5, "retrain-epochs": 0.5}
    done = started(torchrun, command(tiny_model, tiny_data, output, **options), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert done.stderr.count("compressed: accuracy") == 1
    assert "Warning" not in spoken(done.stderr)
    evaluation = ["evaluate", "--model", output, "--task", "text-classification", "--data-dir", tiny_data]
    evaluation += ["--max-length", "16", "--json", "--predictions", tmp_path / "rows.jsonl"]
    statuses, said = launch(evaluation, tmp_path / "log", processes=2)
    assert (statuses, said[1]) == ([0, 0], "")
    report = json.loads((output / "report.json").read_text())
    assert json.loads(said[0])["metrics"] == report["metric"]["details"]["compressed"]
    many = (tmp_path / "rows.jsonl").read_text()
    assert launch(evaluation, tmp_path / "log")[0] == [0]
    assert many == (tmp_path / "rows.jsonl").read_text(), "the logits of one process, in its order"


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "1"],
        ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"],
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
    ],
)
def test_other_launches(tiny_model, tiny_data, tmp_path, launcher):
    done = started(launcher, command(tiny_model, tiny_data, tmp_path / "out", rank=4), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1


# failures -------------------------------------------------------------------------------------------------------------


def refused(words: list[str], log: Path, *fragments: str, processes: int = 2, **more) -> None:
    """All processes end with status 2, and one of them says why in one line."""
    statuses, said = launch(words, log, processes, **more)
    assert statuses == [2] * processes, said
    lines = "".join(said).splitlines()
    lines = [line for line in lines if not line.startswith(("dense:", "pruned:", "factorized:"))]
    assert len(lines) == 1, said
    assert all(fragment in lines[0] for fragment in fragments), lines


def test_batch_that_processes_cannot_share_is_refused(tiny_model, tiny_data, tmp_path):
    words = command(tiny_model, tiny_data, tmp_path / "out", **{"rank": 4, "batch-size": 15})
    refused(words, tmp_path / "log", "--batch-size 15", "2 processes")
    assert not (tmp_path / "out").exists()


def test_bad_command_line_is_told_once(tmp_path):
    refused(["compress", "--rank", "four"], tmp_path / "log", "--rank")


def test_output_of_another_run_is_told_once(tiny_model, tiny_data, tmp_path):
    """Only the main process finds this."""
    work = tmp_path / ".out.lpaf-work"
    work.mkdir()
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        words = command(tiny_model, tiny_data, tmp_path / "out", "--resume", rank=4)
        refused(words, tmp_path / "log", "--output", "another run is writing it")


def test_full_disk_of_the_main_process_ends_all(tiny_model, tiny_data, tmp_path):
    words = command(tiny_model, tiny_data, tmp_path / "out", rank=4)
    refused(words, tmp_path / "log", "--output", "disk full", "--resume", probes={0: "full disk"})
    assert [path.parent.name for path in tmp_path.glob(".out.lpaf-work/*/*/complete")] == ["checkpoint-3"]


def test_loss_that_is_nan_in_one_process_ends_all(tiny_model, tiny_data, tmp_path):
    words = command(tiny_model, tiny_data, tmp_path / "out", rank=4)
    refused(words, tmp_path / "log", "finetune: the loss became NaN", "checkpoint-3", probes={1: "nan"})


@pytest.mark.parametrize("processes", [1, 2])
def test_models_split_over_processes_are_refused(tiny_model, tiny_data, tmp_path, processes):
    words = command(tiny_model, tiny_data, tmp_path / "out", rank=4)
    for switch, name in list(SHARDERS.items())[:processes]:
        refused(words, tmp_path / "log", switch, name, processes=processes, environment={switch: "true"})


def test_commands_that_time_run_in_one_process(tmp_path):
    refused(["bench", "--model", "minilm-l6"], tmp_path / "log", "one process")


# death ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tiny_model, tiny_data, tmp_path_factory) -> Path:
    """Output of two processes that nobody disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run(command(tiny_model, tiny_data, output, *chosen("lpaf")), output, processes=2)
    return output


def kill(model: Path, data: Path, output: Path, death: str, victim: int, expected: Path) -> None:
    kill_and_resume(command(model, data, output, *chosen("lpaf")), output, death, processes=2, victim=victim)
    assert_same_run(output, expected)


@pytest.mark.parametrize(("death", "victim"), [("prune", 1), ("retrain", 0)])
def test_killed_process_ends_all_and_all_resume(undisturbed, tiny_model, tiny_data, tmp_path, death, victim):
    kill(tiny_model, tiny_data, tmp_path / "out", death, victim, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("death", [death for death in DEATHS if happens(death, "lpaf")])
def test_main_process_killed_anywhere(undisturbed, tiny_model, tiny_data, tmp_path, death):
    kill(tiny_model, tiny_data, tmp_path / "out", death, 0, undisturbed)


def test_resume_with_fewer_processes_is_refused(tiny_model, tiny_data, tmp_path):
    words = command(tiny_model, tiny_data, tmp_path / "out", rank=4)
    statuses, _ = launch(words, tmp_path / "log", 2, {0: "finetune", 1: "finetune"})
    assert statuses == [-signal.SIGKILL] * 2
    refused([*words, "--resume"], tmp_path / "log", "the interrupted run had processes = 2", processes=1)
