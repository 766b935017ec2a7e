"""Stages kept and shared between runs: what their keys depend on, and that a shared stage is not made again."""

from __future__ import annotations

import dataclasses
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from lpaf.recipes.compress import Compression, compress
from lpaf.recipes.options import PRUNE_OPTIONS, RETRAIN_OPTIONS, RUN_OPTIONS, CompressOptions
from lpaf.recipes.prepare import prepare
from lpaf.recipes.stages import StageStore, stage_key
from tiny import sentences, write_rows

ORDER = ("finetune", "teacher", "prune")


def keys(options):
    run = Compression(prepare(CompressOptions(**options)), command="")
    return {stage: run.key(stage) for stage in ORDER}


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"seed": 1}, ORDER),
        ({"finetune_lr": 1e-3}, ORDER),
        ({"max_length": 12}, ORDER),
        ({"bf16": True}, ORDER),
        ({"max_train_samples": 40}, ORDER),
        ({"keep": 0.3}, ("prune",)),
        ({"score_init": 0.0}, ("prune",)),
        ({"prune_epochs": 2.0}, ("prune",)),
        ({"hard_pruning": True}, ("prune",)),
        ({"distill": 0.1}, ("prune",)),
        ({"pruner": "cap"}, ("prune",)),
        ({"pruner": "movement"}, ()),
        ({"rank": 3}, ()),
        ({"weighting": "mask"}, ()),
        ({"mixed_rank": False}, ()),
        ({"retrain_lr": 1e-3}, ()),
        ({"bench_batch": 1}, ()),
    ],
)
def test_a_key_changes_with_what_decides_the_stage(tiny_options, tmp_path, change, changed):
    before = keys(tiny_options)
    after = keys(tiny_options | {"output": str(tmp_path / "other")} | change)
    assert {stage for stage in ORDER if before[stage] != after[stage]} == set(changed)


def test_other_data_and_weights_have_other_keys(tiny_options, tiny_model, tmp_path):
    before = keys(tiny_options)
    other = tmp_path / "data"
    other.mkdir()
    write_rows(other / "train.jsonl", sentences(96, seed=7))
    write_rows(other / "validation.jsonl", sentences(40, seed=2))
    assert not set(before.values()) & set(keys(tiny_options | {"data_dir": str(other), "overwrite": True}).values())


def test_lists_of_options_name_options_once():
    fields = {field.name for field in dataclasses.fields(CompressOptions)}
    listed = [*RUN_OPTIONS, *RETRAIN_OPTIONS, *PRUNE_OPTIONS]
    assert len(listed) == len(set(listed))
    assert set(listed) <= fields


def test_runs_that_share_stages_end_with_the_weights_of_a_run_alone(tiny_options, tmp_path, monkeypatch):
    shared = tiny_options | {"stages": str(tmp_path / "stages")}
    compress(CompressOptions(**shared | {"output": str(tmp_path / "first"), "rank": 6}))
    trained = []
    recipe = sys.modules["lpaf.recipes.compress"]  # the package has the function under this name
    original = recipe.train_stage
    monkeypatch.setattr(recipe, "train_stage", lambda stage, *a, **k: trained.append(stage) or original(stage, *a, **k))
    _, report = compress(CompressOptions(**shared | {"output": str(tmp_path / "second")}))
    assert trained == ["retrain"]
    _, alone = compress(CompressOptions(**tiny_options))
    assert trained[1:] == ["finetune", "prune", "retrain"]
    assert report["metric"] == alone["metric"]
    assert report["training"] == alone["training"]
    first, second = (load_file(f"{path}/model.safetensors") for path in (tmp_path / "second", tiny_options["output"]))
    assert all(torch.equal(first[name], second[name]) for name in first)
    kept = [load_file(f"{path}/analysis.safetensors") for path in (tmp_path / "second", tiny_options["output"])]
    assert kept[0].keys() == kept[1].keys()
    assert kept[0]["scores.dense.validation"].mean() == pytest.approx(alone["metric"]["dense"])


def test_without_checkpoints_nothing_is_kept(tiny_options, tmp_path):
    run = Compression(prepare(CompressOptions(**tiny_options | {"checkpoint_steps": 0})), command="")
    assert run.once("finetune", lambda: {"a": torch.ones(1)})["a"] == 1
    assert run.once("finetune", lambda: {"a": torch.zeros(1)})["a"] == 0


def test_a_claimed_stage_waits(tmp_path):
    store, order = StageStore(tmp_path), []

    def other():
        with StageStore(tmp_path).claim("prune", "k"):
            order.append("other")

    thread = threading.Thread(target=other)
    with store.claim("prune", "k"):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_key_does_not_depend_on_the_order_of_settings():
    assert stage_key({"a": 1, "b": None}) == stage_key({"b": None, "a": 1}) != stage_key({"a": 1, "b": 0})


def test_test_file_is_scored_but_is_no_validation(tiny_options, tmp_path):
    write_rows(tmp_path / "test.jsonl", sentences(30, seed=9))
    _, with_test = compress(CompressOptions(**tiny_options | {"test_file": str(tmp_path / "test.jsonl")}))
    details = with_test["metric"]["details"]
    assert list(details["compressed"]) == ["validation", "test"]
    assert with_test["metric"]["compressed"] == details["compressed"]["validation"]["accuracy"]
    scores = load_file(f"{tiny_options['output']}/analysis.safetensors")["scores.compressed.test"]
    assert scores.shape == (30,)
    assert float(scores.mean()) == pytest.approx(details["compressed"]["test"]["accuracy"])
