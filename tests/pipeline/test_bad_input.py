"""Every bad input: exit status 2, one line on stderr that names the argument, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

import lpaf
from lpaf.cli import main
from lpaf.data import get_task
from lpaf.errors import InputError
from lpaf.models.checkpoint import load_config, load_dense, load_tokenizer, save_compressed
from lpaf.models.positions import most_tokens, resolve_length
from lpaf.models.targets import encoder_linears
from lpaf.recipes.methods import get_method
from lpaf.recipes.options import CompressOptions
from lpaf.recipes.prepare import check_pruner_task
from lpaf_kernels import swap_linears
from tiny import build, questions, sentences, write_model, write_rows


@pytest.fixture
def base(tiny_model, tiny_data, tmp_path) -> dict:
    """Options of a good run, as the command line spells them."""
    return {
        "--model": str(tiny_model),
        "--task": "text-classification",
        "--data-dir": str(tiny_data),
        "--output": str(tmp_path / "out"),
        "--rank": "4",
        "--finetune-epochs": "1",
        "--prune-epochs": "1",
        "--retrain-epochs": "1",
        "--max-length": "16",
        "--bench-length": "16",
        "--checkpoint-steps": "2",
        "--batch-size": "16",
    }


def words(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in ((name,) if value is True else (name, str(value)))]


def refused(capsys, arguments: list[str], *fragments: str) -> str:
    """Run the command line in this process and check how it refuses."""
    capsys.readouterr()  # what preparing it said
    try:
        status = main(arguments)
    except SystemExit as exit_:  # argparse's own errors
        status = exit_.code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert status == 2, captured.err
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    for fragment in fragments:
        assert fragment in lines[0], lines[0]
    return lines[0]


def nothing_written(tmp_path: Path, before: set[str] = frozenset()) -> None:
    found = {path.name for path in tmp_path.iterdir()} - set(before)
    assert not found, found


CASES = {
    "unknown task": ({"--task": "sst3"}, ("--task sst3", "sst2")),
    "unknown method": ({"--method": "magic"}, ("--method magic", "lpaf, svd")),
    "unknown model": ({"--model": "no-such-model-anywhere"}, ("--model no-such-model-anywhere",)),
    "missing model directory": ({"--model": "/no/such/dir"}, ("--model /no/such/dir", "no such directory")),
    "rank 0": ({"--rank": "0"}, ("--rank 0", "at least 1")),
    "negative rank": ({"--rank": "-2"}, ("--rank -2", "at least 1")),
    "rank above min(n, m)": ({"--rank": "33"}, ("--rank 33", "min(n, m) = 32")),
    "rank above break-even": ({"--rank": "17"}, ("--rank 17", "break-even 16", "--force")),
    "rank is no number": ({"--rank": "many"}, ("--rank", "auto", "many")),
    "ratio 0": ({"--rank": None, "--ratio": "0"}, ("--ratio 0", "(0, 1]")),
    "ratio above 1": ({"--rank": None, "--ratio": "1.01"}, ("--ratio 1.01", "(0, 1]")),
    "rank and ratio": ({"--ratio": "0.2"}, ("--rank", "--ratio", "exactly one")),
    "neither rank nor ratio": ({"--rank": None}, ("--rank", "--ratio", "exactly one")),
    "auto without a ratio": ({"--rank": "auto"}, ("--rank auto", "--ratio R")),
    "auto with an error": ({"--rank": "auto", "--rank-error": "0.2"}, ("--rank auto", "--rank-error")),
    "rank and error": ({"--rank-error": "0.2"}, ("--rank-error", "exactly one")),
    "ratio and error": ({"--rank": None, "--ratio": "0.2", "--rank-error": "0.2"}, ("--rank-error", "exactly one")),
    "error 0": ({"--rank": None, "--rank-error": "0"}, ("--rank-error 0", "(0, 1)")),
    "error no number": ({"--rank": None, "--rank-error": "low"}, ("--rank-error", "low")),
    "ratio below rank 1": ({"--rank": None, "--ratio": "0.01"}, ("--ratio 0.01", "rank 1", "--ratio 0.05")),
    "auto ratio below rank 1": ({"--rank": "auto", "--ratio": "0.01"}, ("--ratio 0.01", "rank 1", "--ratio 0.05")),
    "auto ratio above break-even": ({"--rank": "auto", "--ratio": "1"}, ("--rank auto --ratio 1", "--force")),
    "no data": ({"--data-dir": None}, ("--data-dir",)),
    "missing data directory": ({"--data-dir": "/no/such/data"}, ("--data-dir", "/no/such/data")),
    "keep above 1": ({"--keep": "1.5"}, ("--keep 1.5", "(0, 1]")),
    "keep 0": ({"--keep": "0"}, ("--keep 0", "(0, 1]")),
    "no update to prune in": ({"--prune-warmup": "0.5", "--prune-cooldown": "0.5"}, ("--prune-warmup", "below 1")),
    "hard pruning of nothing": ({"--hard-pruning": True, "--method": "svd"}, ("--hard-pruning", "--method svd")),
    "hard pruning without pruning": ({"--hard-pruning": True, "--no-prune": True}, ("--hard-pruning", "--no-prune")),
    "hard pruning's scores": ({"--hard-pruning": True, "--score-init": "1"}, ("--score-init", "--hard-pruning")),
    "unknown pruner": ({"--pruner": "wanda"}, ("--pruner", "'wanda'", "lottery-ticket")),
    "pruner of nothing": ({"--pruner": "cap", "--method": "svd"}, ("--pruner cap", "--method svd")),
    "pruner without pruning": ({"--pruner": "cap", "--no-prune": True}, ("--pruner cap", "--no-prune")),
    "hard pruning by magnitude": ({"--hard-pruning": True, "--pruner": "magnitude"}, ("--hard-pruning", "magnitude")),
    "soft pruning to a share": ({"--pruner": "soft-movement", "--keep": "0.3"}, ("--keep", "movement", "ignore")),
    "threshold of movement": ({"--threshold": "0.2"}, ("--threshold", "--pruner soft-movement", "sensitivity would")),
    "rounds of nothing": ({"--rounds": "2", "--method": "svd"}, ("--rounds", "lottery-ticket", "--method svd")),
    "rates of one-shot pruning": ({"--pruner": "magnitude", "--prune-lr": "1"}, ("--prune-lr", "magnitude would")),
    "scores of magnitude": ({"--pruner": "gradual-magnitude", "--score-lr": "1"}, ("--score-lr", "movement")),
    "where sensitivity starts": ({"--score-init": "1"}, ("--score-init", "--pruner movement", "sensitivity would")),
    "warm-up of a ticket": (
        {"--pruner": "lottery-ticket", "--prune-warmup": "0.2"},
        ("--prune-warmup", "ticket would"),
    ),
    "threshold 1": ({"--pruner": "soft-movement", "--threshold": "1"}, ("--threshold 1", "(0, 1)")),
    "negative penalty": ({"--pruner": "soft-movement", "--penalty": "-1"}, ("--penalty -1", "0 or more")),
    "no rounds": ({"--pruner": "lottery-ticket", "--rounds": "0"}, ("--rounds 0", "above 0")),
    "batch size 0": ({"--batch-size": "0"}, ("--batch-size 0", "above 0")),
    "negative epochs": ({"--retrain-epochs": "-1"}, ("--retrain-epochs -1",)),
    "distillation weight": ({"--distill": "2"}, ("--distill 2", "[0, 1]")),
    "distillation in no known way": ({"--distill": "logits"}, ("--distill", "layer", "logits")),
    "layers of no layer-wise distillation": (
        {"--distill": "0.3", "--distill-layer": "1"},
        ("--distill-layer", "--distill layer", "--distill 0.3 would ignore"),
    ),
    "logits of no layer-wise distillation": ({"--distill-output": "1"}, ("--distill-output", "--distill layer")),
    "negative weight of layers": (
        {"--distill": "layer", "--distill-layer": "-1"},
        ("--distill-layer -1", "0 or more"),
    ),
    "nothing to distil": ({"--distill": "layer", "--distill-layer": "0"}, ("--distill layer", "--distill 0")),
    "layers without a teacher": (
        {"--distill": "layer", "--method": "truncate", "--rank": None, "--ratio": "0.5"},
        ("--distill layer", "--method truncate", "--method kd"),
    ),
    "unknown scope": ({"--scope": "layer"}, ("--scope", "matrix, global")),
    "unknown weighting": ({"--weighting": "fisher"}, ("--weighting", "scores")),
    "unknown device": ({"--device": "tpu"}, ("--device tpu", "cpu or cuda")),
    "text longer than the model": ({"--max-length": "4096"}, ("--max-length 4096", "32")),
    "window of a classifier": ({"--doc-stride": "4"}, ("--doc-stride", "question answering", "text-classification")),
    "answers of no length": ({"--task": "squad", "--max-answer-length": "0"}, ("--max-answer-length 0", "at least 1")),
    "threshold where all have answers": (
        {"--task": "squad", "--null-threshold": "1"},
        ("--null-threshold", "squad_v2"),
    ),
    "rows without questions": ({"--task": "squad"}, ("--data-dir", "train.jsonl: line 1", "'question' is missing")),
    "unknown option": ({"--colour": "blue"}, ("--colour",)),
    "missing option": ({"--output": None}, ("--output",)),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_argument_is_refused(name, base, capsys, tmp_path):
    changes, fragments = CASES[name]
    options = {key: value for key, value in (base | changes).items() if value is not None}
    refused(capsys, ["compress", *words(options)], *fragments)
    nothing_written(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused(base, capsys, tmp_path):
    refused(capsys, ["compress", *words(base | {"--device": "cuda"})], "--device cuda", "--device cpu")
    nothing_written(tmp_path)


@pytest.mark.parametrize("pruner", ["lottery-ticket", "cap"])
def test_pruners_that_look_back_want_a_pretrained_model(pruner, base, tiny_model, capsys, tmp_path):
    dense = AutoModelForSequenceClassification.from_pretrained(tiny_model, label2id={"0": 0, "1": 1})
    dense.save_pretrained(tmp_path / "dense")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "dense")
    options = base | {"--model": tmp_path / "dense", "--pruner": pruner}
    del options["--finetune-epochs"]
    refused(capsys, ["compress", *words(options)], f"--pruner {pruner}", "pre-trained")
    nothing_written(tmp_path, {"dense"})


def test_cap_is_for_sentences():
    options = CompressOptions("m", "squad", "out", pruner="cap")
    method = get_method("lpaf").with_options(options)
    data = SimpleNamespace(spec=get_task("squad"))
    with pytest.raises(InputError, match="--pruner cap: contrasts sentences"):
        check_pruner_task(method, data, 1.0, options, None, None)


@pytest.mark.parametrize(
    ("configured", "tokenized", "fits"),
    [
        ({}, {}, True),
        ({"is_decoder": True}, {}, False),
        ({"architectures": ["GPT2LMHeadModel"]}, {}, False),
        ({}, {"cls_token": None}, False),
        ({}, {"padding_side": "left"}, False),
    ],
)
def test_cap_is_for_models_whose_first_token_sees_the_sentence(tiny_model, configured, tokenized, fits):
    options = CompressOptions("here", "sst2", "out", pruner="cap")
    method = get_method("lpaf").with_options(options)
    data = SimpleNamespace(spec=get_task("sst2"))
    config, tokenizer = load_config(str(tiny_model)), load_tokenizer(str(tiny_model))
    for part, changes in ((config, configured), (tokenizer, tokenized)):
        for name, value in changes.items():
            setattr(part, name, value)
    with nullcontext() if fits else pytest.raises(InputError, match=r"--pruner cap: .* first token, .* --model here"):
        check_pruner_task(method, data, 1.0, options, config, tokenizer)


# models -------------------------------------------------------------------------------------------------------------


def without_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def truncated(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_weights(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"")


def broken_config(directory: Path) -> None:
    (directory / "config.json").write_text("{")


def without_config(directory: Path) -> None:
    (directory / "config.json").unlink()


def foreign_weights(directory: Path) -> None:
    from safetensors.torch import save_file

    save_file({"something": torch.zeros(3)}, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (without_weights, "no weights"),
        (truncated, "truncated"),
        (empty_weights, "truncated"),
        (broken_config, "config.json is not valid JSON"),
        (without_config, "no config.json"),
        (foreign_weights, "missing from the weights"),
    ],
)
def test_damaged_model_directory_is_refused(damage, fragment, base, tiny_model, capsys, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    damage(copy)
    refused(capsys, ["compress", *words(base | {"--model": copy})], f"--model {copy}", fragment)
    nothing_written(tmp_path, {"copy"})


def test_file_instead_of_directory_is_refused(base, tiny_model, capsys, tmp_path):
    file = tiny_model / "model.safetensors"
    refused(capsys, ["compress", *words(base | {"--model": file})], "--model", "is a file")
    nothing_written(tmp_path)


def test_compressed_model_is_refused(base, tmp_path, capsys):
    source = write_model(tmp_path / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(source)
    swap_linears(model, rank=4, names=list(encoder_linears(model)))
    save_compressed(model, load_tokenizer(str(source)), tmp_path / "small", "svd")
    options = base | {"--model": tmp_path / "small"}
    refused(capsys, ["compress", *words(options)], "already compressed")
    nothing_written(tmp_path, {"dense", "small"})


def test_fine_tuning_cannot_be_skipped_without_a_head(base, capsys, tmp_path):
    refused(capsys, ["compress", *words(base | {"--finetune-epochs": "0"})], "--finetune-epochs 0", "no trained head")
    nothing_written(tmp_path)


# data ---------------------------------------------------------------------------------------------------------------

GOOD_ROWS = sentences(8, seed=3)
DATA_CASES = {
    "missing file": (None, ("validation",)),
    "empty file": ("", ("validation.jsonl", "empty")),
    "unreadable row": (json.dumps(GOOD_ROWS[0]) + '\n{"sentence": "broken\n', ("validation.jsonl", "line 2")),
    "missing text column": ('{"words": "a", "label": 0}\n{"words": "b", "label": 1}\n', ("validation.jsonl", "column")),
    "missing label column": ('{"sentence": "a"}\n{"sentence": "b"}\n', ("validation.jsonl", "label")),
    "label outside the classes": ('{"sentence": "a", "label": 7}\n', ("validation.jsonl", "7")),
    "label null": ('{"sentence": "a", "label": null}\n', ("validation.jsonl", "line 1", "label")),
}


@pytest.mark.parametrize("name", DATA_CASES)
def test_bad_data_is_refused(name, base, capsys, tmp_path):
    content, fragments = DATA_CASES[name]
    data = tmp_path / "data"
    write_rows(data / "train.jsonl", GOOD_ROWS)
    if content is not None:
        (data / "validation.jsonl").write_text(content)
    refused(capsys, ["compress", *words(base | {"--data-dir": data})], *fragments)
    nothing_written(tmp_path, {"data"})


def test_one_class_only_is_refused(base, capsys, tmp_path):
    data = tmp_path / "data"
    for name in ("train", "validation"):
        write_rows(data / f"{name}.jsonl", [row | {"label": 0} for row in GOOD_ROWS])
    refused(capsys, ["compress", *words(base | {"--data-dir": data})], "class")
    nothing_written(tmp_path, {"data"})


def test_hub_task_without_network_says_what_to_pass(base, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = {key: value for key, value in base.items() if key != "--data-dir"} | {"--task": "mrpc"}
    refused(capsys, ["compress", *words(options)], "mrpc", "--data-dir")
    nothing_written(tmp_path)


def test_labels_outside_the_models_classes_are_refused(tiny_model, tmp_path, capsys):
    dense = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    dense.save_pretrained(tmp_path / "two")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "two")
    rows = [row | {"label": index % 3} for index, row in enumerate(GOOD_ROWS)]
    write_rows(tmp_path / "data" / "validation.jsonl", rows)
    arguments = [
        "evaluate",
        "--model",
        tmp_path / "two",
        "--task",
        "text-classification",
        "--data-dir",
        tmp_path / "data",
    ]
    refused(capsys, [str(word) for word in arguments], "class")


def test_head_for_other_labels_is_refused(base, tiny_model, tmp_path, capsys):
    dense = AutoModelForSequenceClassification.from_pretrained(tiny_model, id2label={0: "red", 1: "green", 2: "blue"})
    dense.save_pretrained(tmp_path / "three")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "three")
    rows = [row | {"label": "sour" if row["label"] else "sweet"} for row in GOOD_ROWS]
    for name in ("train", "validation"):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows)
    options = base | {"--model": tmp_path / "three", "--data-dir": tmp_path / "data"}
    del options["--finetune-epochs"]
    refused(capsys, ["compress", *words(options)], "sour", "red", "--finetune-epochs")
    nothing_written(tmp_path, {"three", "data"})


# output -------------------------------------------------------------------------------------------------------------


def test_output_in_use_is_refused(base, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(capsys, ["compress", *words(base)], "--output", "--overwrite")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_output_that_is_a_file_is_refused(base, capsys, tmp_path):
    (tmp_path / "out").write_text("mine")
    refused(capsys, ["compress", *words(base | {"--overwrite": True})], "--output", "is a file")
    assert (tmp_path / "out").read_text() == "mine"


def test_output_below_a_file_is_refused(base, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(capsys, ["compress", *words(base | {"--output": tmp_path / "file" / "out"})], "--output", "not a directory")


def test_output_not_writable_is_refused(base, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    refused(capsys, ["compress", *words(base)], "--output", "not writable")
    nothing_written(tmp_path)


def test_full_disk_is_refused_before_anything_is_written(base, capsys, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    refused(capsys, ["compress", *words(base)], "--output", "disk full")
    nothing_written(tmp_path)


def test_disk_that_fills_up_during_the_run_can_be_resumed(base, tmp_path):
    """A real write error (a limit on the size of files), not a simulated one."""
    import resource

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    script = (
        "import signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from lpaf.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", script, "compress", *words(base)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, preexec_fn=limit, env=environment)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert "disk full" in run.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
    again = [sys.executable, "-m", "lpaf", "compress", *words(base), "--resume"]
    assert subprocess.run(again, capture_output=True, cwd=tmp_path).returncode == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


# divergence ---------------------------------------------------------------------------------------------------------


def test_nan_loss_stops_and_keeps_the_last_checkpoint(base, capsys, tmp_path, monkeypatch):
    from lpaf.retrain.objective import Objective

    honest = Objective.task_loss
    calls = []

    def poisoned(self, logits, labels):
        calls.append(1)
        return honest(self, logits, labels) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setattr(Objective, "task_loss", poisoned)
    status = main(["compress", *words(base)])
    message = capsys.readouterr().err.splitlines()[-1]
    assert status == 2
    assert "finetune: the loss became NaN or infinite at update 4" in message
    assert "checkpoint-2" in message
    assert (tmp_path / ".out.lpaf-work" / "finetune" / "checkpoint-2" / "complete").is_file()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Objective, "task_loss", honest)
    assert main(["compress", *words(base), "--resume"]) == 0


# Python and the other commands --------------------------------------------------------------------------------------


def test_python_raises_value_error_with_the_same_text(tiny_options):
    with pytest.raises(ValueError, match="--method magic: unknown; expected one of lpaf, svd"):
        lpaf.compress(lpaf.CompressOptions(**tiny_options | {"method": "magic"}))
    with pytest.raises(ValueError, match="--rank 0: must be at least 1"):
        lpaf.compress(lpaf.CompressOptions(**tiny_options | {"rank": 0}))
    with pytest.raises(ValueError, match="--task: is required"):
        lpaf.CompressOptions(model="m", output="o")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["evaluate", "--model", "/no/such/dir", "--task", "docstrings"], ("--model /no/such/dir",)),
        (["bench", "--model", "/no/such/dir"], ("--model /no/such/dir",)),
        (["bench", "--model", "m", "--batch", "eight"], ("--batch", "eight")),
        (["bench", "--model", "m", "--batch", "0"], ("--batch", "at least 1")),
        (["bench", "--model", "m", "--rounds", "1"], ("--rounds 1", "at least 2")),
        (["evaluate", "--model", "m", "--task", "sst2", "--batch-size", "0"], ("--batch-size 0", "at least 1")),
        (
            ["evaluate", "--model", "m", "--task", "sst2", "--predictions", "/no/such/dir/rows.jsonl"],
            ("--predictions /no/such/dir/rows.jsonl", "folder does not exist"),
        ),
        (["evaluate", "--model", "m", "--task", "sst2", "--predictions", "/"], ("--predictions /", "is a directory")),
        (["inspect", "--model", "/no/such/dir"], ("/no/such/dir",)),
        (["squash"], ("squash",)),
        ([], ("COMMAND",)),
    ],
)
def test_other_commands_refuse_in_one_line(arguments, fragments, capsys):
    refused(capsys, arguments, *fragments)


def test_body_without_head_cannot_be_evaluated(tiny_model, tiny_data, capsys):
    arguments = ["evaluate", "--model", str(tiny_model), "--task", "text-classification", "--data-dir", str(tiny_data)]
    refused(capsys, arguments, "--model", "no trained task head")


def test_evaluation_longer_than_the_model_is_refused(tiny_model, tiny_data, capsys):
    arguments = ["evaluate", "--model", str(tiny_model), "--task", "text-classification", "--data-dir", str(tiny_data)]
    refused(capsys, [*arguments, "--max-length", "33"], "--max-length 33", "at most 32 tokens")


@pytest.mark.parametrize(
    ("model_type", "limit"), [("bert", 40), ("roberta", 38), ("xlm-roberta", 38), ("mpnet", 38), ("layoutlmv3", 38)]
)
def test_positions_that_a_model_can_use(model_type, limit):
    config = AutoConfig.for_model(model_type, max_position_embeddings=40, pad_token_id=1)
    assert most_tokens(config) == limit
    assert resolve_length(None, 128, config) == limit
    assert resolve_length(None, 16, config) == 16
    with pytest.raises(InputError, match=f"--max-length {limit + 1}: the model takes at most {limit} tokens"):
        resolve_length(limit + 1, 128, config)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "mpnet"])
def test_the_longest_input_runs(architecture):
    model = build(architecture, pad_token_id=1).eval()
    ids = torch.full((1, most_tokens(model.config)), 7)
    assert bool(model(input_ids=ids).logits.isfinite().all())
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, ids.shape[1] + 1), 7))


@pytest.mark.parametrize("task", ["text-classification", "question-answering"])
def test_models_whose_outputs_are_nan_are_refused(task, tiny_model, tiny_data, tmp_path, capsys):
    labels = ["0", "1"] if task == "text-classification" else None
    model = load_dense(str(tiny_model), labels, task.removeprefix("text-"))[0]
    next(iter(encoder_linears(model).values())).weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "nan")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "nan")
    data = tiny_data
    if labels is None:
        data = write_rows(tmp_path / "data" / "validation.jsonl", questions(4, seed=0)).parent
    arguments = ["evaluate", "--model", str(tmp_path / "nan"), "--task", task, "--data-dir", str(data)]
    refused(capsys, arguments, f"--model {tmp_path / 'nan'}", "not numbers")


def test_bench_longer_than_the_model_is_refused(tiny_model, capsys):
    refused(capsys, ["bench", "--model", str(tiny_model), "--length", "512"], "--length 512", "32")


def test_bench_modes_that_do_not_exist_are_refused(tiny_model, capsys):
    refused(capsys, ["bench", "--model", str(tiny_model), "--mode", "eager,fast"], "--mode fast", "graphed")
    graphed = ["bench", "--model", str(tiny_model), "--mode", "graphed", "--device", "cpu"]
    refused(capsys, graphed, "--mode graphed", "NVIDIA GPU")


def test_a_real_process_exits_with_2(tmp_path):
    command = [sys.executable, "-m", "lpaf", "compress", "--model", "m", "--task", "t", "--output", "o", "--rank", "0"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
