"""Studies: what a file means, what is run and what is skipped, shared stages, tables and tests."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import save_file

from lpaf.cli import main
from lpaf.errors import InputError
from lpaf.evaluate.metrics import paired_scores
from lpaf.recipes import study as recipe
from lpaf.recipes.study import Study, read_study, study
from lpaf.report.study import Outcome, table, trade_off
from tiny import sentences, write_rows

FILE = """
title = "Tiny"
against = "svd"
scored = ["factorized", "compressed"]

[options]
task = "text-classification"
finetune_epochs = 1
prune_epochs = 1
retrain_epochs = 1
batch_size = 16
checkpoint_steps = 2
bench_batch = 2
bench_length = 16
max_length = 16

[grid]
rank = [2, 4]
seed = [0, 1]

[methods.lpaf]
keep = 0.3
[methods.svd]
method = "svd"
"""


def written(path, text=FILE, *changes):
    """A study file with (old, new) replacements."""
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def done(tiny_model, tiny_data, tmp_path_factory):
    """(study.json's content, folder, changes) of a finished study."""
    root = tmp_path_factory.mktemp("study")
    write_rows(root / "test.jsonl", sentences(50, seed=5))
    changes = {"model": str(tiny_model), "data_dir": str(tiny_data), "test_file": str(root / "test.jsonl")}
    result = study(str(written(root / "tiny.toml")), str(root / "out"), changes=changes, command="lpaf study")
    return result, root, changes


def test_every_combination_is_run_once(done):
    result, root, _ = done
    runs = {(run["method"], run["rank"], run["seed"]) for run in result["runs"]}
    assert runs == {(method, rank, seed) for method in ("lpaf", "svd") for rank in (2, 4) for seed in (0, 1)}
    assert len(list((root / "out" / "runs").glob("*/report.json"))) == 8
    assert not result["failed"]


def test_stages_are_made_once_for_all_that_share_them(done):
    _, root, _ = done
    names = [path.name.partition("-")[0] for path in (root / "out" / "runs" / "stages").glob("*/")]
    assert sorted(names) == ["finetune", "finetune", "prune", "prune", "teacher", "teacher"], "one per seed"


def test_a_run_of_the_study_is_the_run_of_the_command(done, tmp_path):
    result, root, changes = done
    (run,) = [r for r in result["runs"] if (r["method"], r["rank"], r["seed"]) == ("lpaf", 4, 1)]
    words = ["--task", "text-classification", "--rank", "4", "--seed", "1", "--keep", "0.3", "--output", tmp_path / "o"]
    for name in ("finetune_epochs", "prune_epochs", "retrain_epochs"):
        words += ["--" + name.replace("_", "-"), "1"]
    words += ["--batch-size", "16", "--max-length", "16", "--bench-batch", "2", "--bench-length", "16"]
    words += [word for name, value in changes.items() for word in ("--" + name.replace("_", "-"), value)]
    assert main(["compress", *map(str, words)]) == 0
    alone = json.loads((tmp_path / "o" / "report.json").read_text())
    together = json.loads((root / "out" / "runs" / run["run"] / "report.json").read_text())
    assert together["metric"] == alone["metric"]
    assert together["training"] == alone["training"]


def test_what_is_finished_is_skipped(done, monkeypatch):
    result, root, changes = done
    monkeypatch.setattr(recipe, "compress", lambda *_: pytest.fail("nothing is left to run"))
    again = study(str(root / "tiny.toml"), str(root / "again"), runs=str(root / "out" / "runs"), changes=changes)
    assert again == result


def test_table_holds_means_deviations_and_tests_of_the_runs(done):
    result, root, _ = done
    runs = list(csv.DictReader((root / "out" / "study.csv").open()))
    (entry,) = [
        entry
        for entry in result["tables"]
        if (entry["split"], entry["stage"], entry["method"], entry["cell"])
        == ("test", "compressed", "lpaf", {"rank": 4})
    ]
    own = [run for run in runs if run["method"] == "lpaf" and run["rank"] == "4"]
    values = [float(run["compressed.test"]) for run in own]
    assert entry["mean"] == pytest.approx(np.mean(values))
    assert entry["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert entry["seeds"] == 2
    assert entry["test"]["examples"] == 50
    text = (root / "out" / "study.md").read_text()
    assert text.index("validation, before") < text.index("validation, after") < text.index("test, before")
    assert f"{100 * np.mean(values):.2f} ± {100 * np.std(values, ddof=1):.2f}" in text
    assert (root / "out" / "trade_off.png").stat().st_size > 5000


def test_baseline_is_not_tested_against_itself(done):
    assert all((entry["test"] is None) == (entry["method"] == "svd") for entry in done[0]["tables"])


def test_binary_scores_take_mcnemar_and_others_the_t_test():
    generator = np.random.default_rng(0)
    a, b = (generator.integers(0, 2, 200).astype(float) for _ in range(2))
    exact = scipy.stats.binomtest(int((a > b).sum()), int((a != b).sum())).pvalue
    assert paired_scores(a, b).p_value == pytest.approx(exact)
    assert paired_scores(a / 2, b).p_value == pytest.approx(scipy.stats.ttest_rel(a / 2, b).pvalue)
    assert paired_scores(a, b).difference == pytest.approx(float(np.mean(a - b)))


def test_interrupted_study_goes_on_where_it_stopped(done, tmp_path, monkeypatch):
    result, _, changes = done
    original, count = recipe.compress, iter(range(1))

    def die(options, command):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return original(options, command)

    path = written(tmp_path / "tiny.toml", FILE, ("[0, 1]", "[0]"), ("[2, 4]", "[4]"))
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "compress", die)
        with pytest.raises(KeyboardInterrupt):
            study(str(path), str(tmp_path / "out"), changes=changes)
    early = study(str(path), str(tmp_path / "out"), changes=changes, table_only=True)
    finished = study(str(path), str(tmp_path / "out"), changes=changes)
    expected = [run for run in result["runs"] if (run["rank"], run["seed"]) == (4, 0)]
    assert [run["compressed.test"] for run in early["runs"]] == [run["compressed.test"] for run in expected][:1]
    assert [run["compressed.test"] for run in finished["runs"]] == [run["compressed.test"] for run in expected]


@pytest.mark.slow
def test_two_processes_share_the_work(done, tmp_path):
    result, _, changes = done
    path = written(tmp_path / "tiny.toml", FILE, ("[0, 1]", "[0]"), ("[2, 4]", "[4]"))
    words = [sys.executable, "-m", "lpaf", "study", str(path), "--output", str(tmp_path / "out")]
    words += [word for name, value in changes.items() for word in ("--set", f"{name}={value}")]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    runs = json.loads((tmp_path / "out" / "study.json").read_text())["runs"]
    expected = [run["compressed.test"] for run in result["runs"] if (run["rank"], run["seed"]) == (4, 0)]
    assert [run["compressed.test"] for run in runs] == expected
    started = [line for _, errors in outputs for line in errors.splitlines() if "left] " in line]
    assert {line.partition("] ")[2].partition(" ")[0] for line in started} == {"lpaf", "svd"}


def test_tuning_picks_the_best_on_validation_where_it_is_told_to(done, tmp_path, monkeypatch):
    text = FILE + "[tune]\nretrain_lr = [1e-4, 1e-3, 1e-2]\n[tune.at]\nrank = 4\n"
    file = read_study(written(tmp_path / "s.toml", text), done[2])
    work = Study(file, tmp_path, "lpaf study")
    metrics = {}

    def finish(run, left):
        directory = tmp_path / run.name
        directory.mkdir()
        metric = metrics[run.label, run.cell, run.seed, run.tuned["retrain_lr"]] = 1 - abs(
            run.tuned["retrain_lr"] - 1e-3
        )
        (directory / "report.json").write_text(json.dumps({"metric": {"compressed": metric}}))
        return True

    monkeypatch.setattr(work, "attempt", finish)
    work.work()
    tried = [key for key in metrics if key[3] != 1e-3]
    assert {(cell, seed) for _, cell, seed, _ in tried} == {((("rank", 4),), 0)}
    assert len(metrics) == 2 * (3 + 3), "three rates at one cell, the best one in the other three cells"


def test_tuning_takes_the_least_perplexity(tiny_model, tmp_path, monkeypatch):
    changes = [('task = "text-classification"', 'task = "language-modeling"'), ("rank = [2, 4]", "rank = [2]")]
    text = FILE + "[tune]\nretrain_lr = [1e-4, 1e-3, 1e-2]\n"
    (tmp_path / "train.txt").write_text("text")
    paths = {"model": str(tiny_model), "data_dir": str(tmp_path)}
    work = Study(read_study(written(tmp_path / "s.toml", text, *changes), paths), tmp_path, "lpaf study")

    def finish(run, left):
        directory = tmp_path / run.name
        directory.mkdir()
        perplexity = 20 + abs(run.tuned["retrain_lr"] - 1e-3)
        (directory / "report.json").write_text(json.dumps({"metric": {"compressed": perplexity}}))
        return True

    monkeypatch.setattr(work, "attempt", finish)
    work.work()
    assert {run.tuned["retrain_lr"] for run in work.final()} == {1e-3}


def test_methods_may_not_repeat_the_grid(tmp_path):
    path = written(tmp_path / "s.toml", FILE, ("keep = 0.3", "rank = 3"))
    with pytest.raises(InputError, match=r"rank is in \[methods.lpaf\] and in \[grid\]"):
        read_study(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("[grid]", "[gird]"), r"gird is unknown; did you mean grid\?"),
        (("keep = 0.3", "kep = 0.3"), r"\[methods.lpaf\]: kep is unknown; did you mean keep\?"),
        (("keep = 0.3", "keep = 3.0"), r"--keep 3: must be in \(0, 1\]"),
        (("keep = 0.3", 'keep = "much"'), "keep = 'much': expected float"),
        (("[0, 1]", "[]"), r"\[grid\] seed = \[\]: expected a list of values"),
        (("rank = [2, 4]", "rank = 2"), r"\[grid\] rank = 2: expected a list of values"),
        (('against = "svd"', 'against = "kd"'), r"against = 'kd' is not one of the methods \(lpaf, svd\)"),
        (('"factorized", ', '"pruned", '), "scored = .*: expected a list out of factorized, compressed"),
        (("batch_size = 16", "batch_size = 16\nresume = true"), "resume is unknown"),
        (("[options]", "[options]\nsave_dense = 'x'"), "save_dense is unknown"),
        (("[options]", "[options"), "cannot be read"),
        (("[0, 1]", "[0, 0]"), r"\[grid\] seed = \[0, 0\]: has a value twice"),
        (("[0, 1]", '[0, "a"]'), "seed = 'a': expected int"),
        (("[0, 1]", "[0, -1]"), "study .*: --seed -1: must be 0 or more"),
        (("keep = 0.3", "seed = 3"), r"seed is in \[methods.lpaf\]"),
        (('against = "svd"', 'against = ["svd"]'), "against = .* is not one of the methods"),
        (('"factorized", "compressed"', '["compressed"]'), "scored = .*: expected a list"),
        (('method = "svd"', 'method = "svdd"'), "--method svdd: unknown"),
        (('title = "Tiny"', 'keep_models = "false"'), "keep_models = 'false': expected true or false"),
        (("[methods.svd]", "[tune]\nat = 5\n[methods.svd]"), "tune.at = 5: expected a table"),
        (("[methods.svd]", "[tune]\nseed = [0]\n[methods.svd]"), r"seed is in \[tune\]"),
        (("[methods.svd]", "[tune]\nrank = [3]\n[methods.svd]"), r"rank is in \[tune\] and in \[grid\]"),
        (("batch_size = 16", "retrain_lr = inf"), "--retrain-lr inf: must be a finite number"),
    ],
)
def test_bad_files_are_one_clear_error(tmp_path, change, message):
    changes = {"model": "m"}
    with pytest.raises(InputError, match=message):
        read_study(written(tmp_path / "s.toml", FILE, change), changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"foo": 1}, "--set: foo is unknown"),
        ({"output": "x"}, "--set: output is unknown"),
        ({"rank": 3}, r"rank is in --set and in \[grid\]"),
        ({"keep": 0.5}, r"keep is in --set and in \[methods.lpaf\]"),
    ],
)
def test_bad_changes_are_one_clear_error(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_study(written(tmp_path / "s.toml"), {"model": "m"} | changes)


def test_a_run_is_named_by_what_it_reads(tiny_model, tmp_path):
    """Other content under the same path is another run; the same content elsewhere is the same."""
    names = []
    for place, seed in (("a", 1), ("b", 1), ("a", 2)):
        (tmp_path / place).mkdir(exist_ok=True)
        write_rows(tmp_path / place / "train.jsonl", sentences(20, seed=seed))
        changes = {"model": str(tiny_model), "data_dir": str(tmp_path / place)}
        file = read_study(written(tmp_path / "s.toml"), changes)
        names.append(next(Study(file, tmp_path, "").final()).name)
    assert names[0] == names[1] != names[2]


def test_a_run_is_named_by_its_module_settings(tiny_model, tiny_data, tmp_path):
    names, settings = [], tmp_path / "modules.toml"
    changes = {"model": str(tiny_model), "data_dir": str(tiny_data)}
    text = f'''
[options]
task = "text-classification"
method = "autoencoder"
modules = "key"
module_settings = "{settings}"
[methods.autoencoder]
'''
    for ratio in (3, 3, 5):
        settings.write_text(f"[key]\ncompression-ratio = {ratio}\n")
        file = read_study(written(tmp_path / "s.toml", text), changes)
        names.append(next(Study(file, tmp_path, "").final()).name)
    assert names[0] == names[1] != names[2]


def test_how_others_prune_is_no_part_of_the_name_of_a_run_that_does_not(tiny_model, tmp_path):
    text = FILE + "[methods.unpruned]\nprune = false\n"
    changes = ({}, {"prune_lr": 1e-4}, {"pruner": "cap", "contrastive": 0.2})
    files = [read_study(written(tmp_path / "s.toml", text), {"model": str(tiny_model)} | more) for more in changes]
    names = [{run.label: run.name for run in Study(file, tmp_path, "").final()} for file in files]
    assert len({name["svd"] for name in names}) == 1
    assert len({name["unpruned"] for name in names}) == 1
    assert len({name["lpaf"] for name in names}) == 3


def test_a_method_that_does_not_prune_takes_no_pruner_of_its_own(tmp_path):
    text = FILE.replace('method = "svd"', 'method = "svd"\npruner = "cap"')
    with pytest.raises(InputError, match="--pruner cap: --method svd does not prune"):
        read_study(written(tmp_path / "s.toml", text), {"model": "m"})


def test_force_is_part_of_a_name_where_it_decides(tiny_model, tmp_path):
    text = FILE.replace("rank = [2, 4]", "ratio = [0.3]").replace("keep = 0.3", 'rank = "auto"')
    text += '[methods.forced]\nrank = "auto"\nforce = true\n'
    file = read_study(written(tmp_path / "s.toml", text), {"model": str(tiny_model)})
    assert len({run.name for run in Study(file, tmp_path, "").final()}) == 6


def test_whole_and_broken_numbers_are_the_same_run(tiny_model, tmp_path):
    changes = {"model": str(tiny_model)}
    files = [
        written(tmp_path / "a.toml"),
        written(tmp_path / "b.toml", FILE, ("prune_epochs = 1", "prune_epochs = 1.0")),
    ]
    names = [next(Study(read_study(file, changes), tmp_path, "").final()).name for file in files]
    assert names[0] == names[1]


def test_an_error_of_one_run_does_not_stop_the_others(done, tmp_path, monkeypatch):
    _, _, changes = done
    original = recipe.compress

    def fail(options, command):
        if options.method == "lpaf":
            raise RuntimeError("out of memory")
        return original(options, command)

    monkeypatch.setattr(recipe, "compress", fail)
    path = written(tmp_path / "s.toml", FILE, ("[2, 4]", "[3]"), ("[0, 1]", "[0]"))
    result = study(str(path), str(tmp_path / "out"), changes=changes)
    assert [run["method"] for run in result["runs"]] == ["svd"]
    assert [*result["failed"].values()] == ["lpaf rank=3 seed=0: out of memory"]


def outcome(directory, label, seed, metric, scores, split="test"):
    """A finished run whose report and scores are given."""
    directory.mkdir()
    details = {stage: {split: {"pearson": metric}} for stage in ("dense", "compressed")}
    report = {"metric": {"name": "pearson", "details": details}, "problem": "regression"}
    (directory / "report.json").write_text(json.dumps(report))
    save_file({f"scores.compressed.{split}": torch.tensor(scores)}, directory / "analysis.safetensors")
    return Outcome(label, (("ratio", 0.5),), seed, {}, directory)


def test_difference_is_that_of_the_metric_and_p_that_of_the_examples(tmp_path):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 40, generator=generator) for _ in range(2))
    runs = [outcome(tmp_path / f"a{i}", "a", i, 0.8 + i / 10, ours[i].tolist()) for i in range(2)]
    runs += [outcome(tmp_path / f"b{i}", "b", i, 0.5, theirs[i].tolist()) for i in range(2)]
    first, second = table(runs, "compressed", "test", "b")
    p = scipy.stats.ttest_rel(ours.mean(0), theirs.mean(0)).pvalue
    assert first.test.p_value == pytest.approx(p, rel=1e-5)
    assert str(first) == f"85.00 ± 7.07 (+35.00, p = {p:.2g})"
    assert str(second) == "50.00 ± 0.00"


def test_missing_seeds_are_told(tmp_path):
    runs = [outcome(tmp_path / f"a{i}", "a", i, 0.8, [0.0, 1.0]) for i in range(2)]
    runs.append(outcome(tmp_path / "b0", "b", 0, 0.5, [0.0, 0.5]))
    assert str(table(runs, "compressed", "test", None)[1]) == "50.00 [1 of 2 seeds missing]"
    assert table(runs, "compressed", "validation", None) == []


def test_a_file_extends_another(tmp_path):
    (tmp_path / "below").mkdir()
    written(tmp_path / "base.toml")
    path = tmp_path / "below" / "more.toml"
    path.write_text(
        'extends = "../base.toml"\ntitle = "More"\n[options]\nmax_length = 8\n[methods.kd]\nmethod = "svd"\n'
    )
    file, base = read_study(path, {"model": "m"}), read_study(tmp_path / "base.toml", {"model": "m"})
    assert (file.title, file.against) == ("More", "svd")
    assert file.options == base.options | {"max_length": 8}
    assert list(file.methods) == ["lpaf", "svd", "kd"]
    path.write_text('extends = "more.toml"')
    with pytest.raises(InputError, match="extends itself"):
        read_study(path)


def test_missing_model_is_named(tmp_path, capsys):
    path = written(tmp_path / "s.toml")
    assert main(["study", str(path), "--output", str(tmp_path / "out")]) == 2
    assert "--model: is required" in capsys.readouterr().err


def test_one_bad_method_does_not_stop_the_others(done, tmp_path):
    _, root, changes = done
    text = FILE.replace("rank = [2, 4]", "ratio = [0.25]") + '[methods.kd]\nmethod = "kd"\n'
    path = written(tmp_path / "s.toml", text, ("[0, 1]", "[0]"))
    result = study(str(path), str(tmp_path / "out"), runs=str(root / "out" / "runs"), changes=changes)
    assert {run["method"] for run in result["runs"]} == {"lpaf", "svd"}
    (reason,) = result["failed"].values()
    assert "one of 2 layers is 50.0% of the encoder" in reason


def test_models_are_dropped_when_they_are_not_wanted(done, tmp_path):
    text = "keep_models = false\n" + FILE.replace("rank = [2, 4]", "rank = [3]").replace("[0, 1]", "[0]")
    result = study(str(written(tmp_path / "s.toml", text)), str(tmp_path / "out"), changes=done[2])
    assert len(result["runs"]) == 2
    assert not list((tmp_path / "out" / "runs").glob("*/model.safetensors"))


def test_runs_that_calibrate_on_other_data_are_other_runs(tmp_path):
    file = write_rows(tmp_path / "a.jsonl", sentences(4, seed=1))
    other = write_rows(tmp_path / "b.jsonl", sentences(4, seed=2))
    base = {"model": "m", "task": "text-classification", "method": "svd", "rank": 4, "data_dir": str(tmp_path / "d")}
    names = [
        recipe.Run("x", (), 0, {}, base | more).name
        for more in ({}, {"calibration": "train"}, {"calibration": str(file)}, {"calibration": str(other)})
    ]
    names.append(recipe.Run("x", (), 0, {}, base | {"test_file": str(file)}).name)
    assert len(set(names)) == len(names)


def test_modules_have_columns_of_their_own(tiny_model, tiny_data, tmp_path):
    """Sizes and seconds of every module, and a picture over the whole model, whose encoder stays what it was."""
    text = """
    [options]
    task = "text-classification"
    finetune_epochs = 0.5
    max_length = 16
    bench_batch = 1
    bench_length = 8
    modules = "embeddings"
    [grid]
    compression_ratio = [3, 5]
    [methods.svd]
    method = "svd"
    [methods.fwsvd]
    method = "fwsvd"
    fisher = "compute"
    """
    changes = {"model": str(tiny_model), "data_dir": str(tiny_data)}
    result = study(str(written(tmp_path / "m.toml", text)), str(tmp_path / "out"), changes=changes)
    assert [run["compression_ratio"] for run in result["runs"]] == [3, 5, 3, 5]
    for run in result["runs"]:
        assert run["compression_ratio"] <= run["embeddings_ratio"]
        assert run["embeddings_seconds"] >= 0
        assert run["encoder_ratio"] == 1
        assert ("fisher_seconds" in run) == (run["method"] == "fwsvd")
    assert "embeddings_ratio" in (tmp_path / "out" / "study.md").read_text()
    outcomes = [Outcome(run["method"], (), 0, {}, tmp_path / "out" / "runs" / run["run"]) for run in result["runs"]]
    figure = trade_off(outcomes, outcomes[0].splits[0])
    assert figure.axes[0].get_xlabel() == "model parameters left"
