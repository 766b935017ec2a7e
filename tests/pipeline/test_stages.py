"""Stages kept and shared between runs: what their keys depend on, and that a shared stage is not made again."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from lpaf.errors import InputError
from lpaf.recipes.compress import Compression, compress
from lpaf.recipes.fingerprints import weights_fingerprint
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
        ({"scope": "global"}, ("prune",)),
        ({"prune_epochs": 2.0}, ("prune",)),
        ({"hard_pruning": True}, ("prune",)),
        ({"distill": 0.1}, ("prune",)),
        ({"distill": "layer"}, ("prune",)),
        ({"pruner": "cap"}, ("prune",)),
        ({"pruner": "movement"}, ("prune",)),
        ({"pruner": "movement", "score_init": 0.0}, ("prune",)),
        ({"pruner": "sensitivity"}, ()),
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


def test_every_byte_of_the_weights_and_the_tokenizer_count(tiny_options, tiny_model, tmp_path):
    """A change behind the first megabyte, or in the vocabulary, makes other stages."""
    names = [weights_fingerprint(str(tiny_model))]
    for change in ("weights", "tokenizer"):
        copy = tmp_path / change
        shutil.copytree(tiny_model, copy)
        assert weights_fingerprint(str(copy)) == names[0], "the place does not count"
        file = copy / {"weights": "model.safetensors", "tokenizer": "tokenizer.json"}[change]
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        names.append(weights_fingerprint(str(copy)))
    assert len(set(names)) == 3


def test_a_stage_that_cannot_be_read_is_made_again(tmp_path, capsys):
    store = StageStore(tmp_path)
    store.store("prune", "k", {"a": torch.ones(2)}, {"n": 1})
    tensors, record = store.load("prune", "k")
    assert (tensors["a"].tolist(), record) == ([1.0, 1.0], {"n": 1})
    (tmp_path / "prune-k" / "tensors.safetensors").write_bytes(b"")
    assert store.load("prune", "k") is None
    assert "is made again" in capsys.readouterr().err
    store.store("prune", "k", {"a": torch.zeros(2)}, {"n": 2})
    assert store.load("prune", "k")[1] == {"n": 2}


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    half = tmp_path / ".prune-k.12345"
    half.mkdir()
    with StageStore(tmp_path).claim("prune", "k"):
        assert not half.exists()


def test_a_folder_for_stages_must_be_one(tiny_options, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--stages .*file: is a file"):
        prepare(CompressOptions(**tiny_options | {"stages": str(tmp_path / "file")}))


def test_a_work_directory_without_settings_is_no_run_to_resume(tiny_options, tmp_path):
    """The first start died before it wrote them."""
    (tmp_path / ".out.lpaf-work").mkdir()
    run = Compression(prepare(CompressOptions(**tiny_options | {"resume": True})), command="")
    assert not run.workspace.resuming
    assert (tmp_path / ".out.lpaf-work" / "settings.json").is_file()


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
