"""Compressed checkpoints through plain transformers: bitwise, in a new process, and never silently wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

import lpaf
from lpaf.errors import InputError
from lpaf.models.checkpoint import load_dense, load_tokenizer, save_compressed
from lpaf.models.quantizer import ALIGNMENT
from lpaf.models.targets import encoder_linears
from lpaf.prune import ImportancePruner
from lpaf_kernels import LowRankSparseLinear, swap_linears
from tiny import write_model

IDS = torch.randint(5, 20, (3, 9), generator=torch.Generator().manual_seed(0))


def make_compressed(directory, architecture="bert", keep=0.0):
    """(in-memory model, its saved directory)."""
    source = str(write_model(directory / "dense", architecture))
    model = load_dense(source, ["neg", "pos"], "classification")[0].eval()
    swap_linears(model, rank=4, keep=keep, names=list(encoder_linears(model)))
    save_compressed(model, load_tokenizer(source), directory / "small", "svd")
    return model, directory / "small"


def test_a_model_that_is_being_pruned_is_not_saved(tmp_path):
    source = str(write_model(tmp_path / "dense"))
    model = load_dense(source, ["neg", "pos"], "classification")[0]
    pruner = ImportancePruner(0.5, rank=4)
    pruner.attach(model)
    with pytest.raises(InputError, match="still has a dense S; detach the pruner"):
        save_compressed(model, load_tokenizer(source), tmp_path / "small", "losparse")
    pruner.detach(model)
    save_compressed(model, load_tokenizer(source), tmp_path / "small", "losparse")
    ids = torch.randint(5, 20, (2, 6))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small").eval()
    torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


RELOAD = """
import json, sys, torch, lpaf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
ids = load_file(sys.argv[1])["ids"]
found = {}
for directory in sys.argv[3:]:
    for dtype in ("float32", "bfloat16"):
        for place, options in (("plain", {}), ("mapped", {"device_map": "cpu"})):
            model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype, **options)
            with torch.no_grad():
                found[f"{directory} {dtype} {place}"] = model(input_ids=ids).logits
save_file(found, sys.argv[2])
"""


@torch.no_grad()
def test_logits_are_bitwise_equal_in_a_new_process(tmp_path):
    expected = {}
    for architecture in ("bert", "distilbert", "deberta-v2"):
        for keep in (0.0, 0.2):
            model, directory = make_compressed(tmp_path / f"{architecture}-{keep}", architecture, keep)
            for dtype in ("float32", "bfloat16"):
                logits = model.to(getattr(torch, dtype))(input_ids=IDS).logits
                expected |= {f"{directory} {dtype} {place}": logits for place in ("plain", "mapped")}
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    out = tmp_path / "logits.safetensors"
    directories = sorted({name.split()[0] for name in expected})
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "ids.safetensors"), str(out), *directories]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    found = load_file(out)
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not differing


def test_tensors_lie_where_torch_would_have_put_them(tmp_path):
    """Products of matrices round by the alignment of their operands, and a file aligns its tensors to 8 bytes."""
    _, directory = make_compressed(tmp_path, keep=0.2)
    loaded = AutoModelForSequenceClassification.from_pretrained(directory)
    assert {tensor.data_ptr() % ALIGNMENT for tensor in (*loaded.parameters(), *loaded.buffers())} == {0}


def test_body_loads_without_its_head(tmp_path):
    model, directory = make_compressed(tmp_path)
    body = AutoModel.from_pretrained(directory)
    with torch.no_grad():
        assert torch.equal(body(input_ids=IDS).last_hidden_state, model.bert(input_ids=IDS).last_hidden_state)


def test_only_safetensors_and_compact_tensors_are_saved(tmp_path):
    _, directory = make_compressed(tmp_path, keep=0.2)
    assert not list(directory.glob("*.bin")) + list(directory.glob("*.pt"))
    tensors = load_file(directory / "model.safetensors")
    query = "bert.encoder.layer.0.attention.self.query"
    assert tensors[f"{query}.down"].shape == (4 + 6, 32)
    assert tensors[f"{query}.up"].shape == (4, 32)
    assert tensors[f"{query}.kept"].dtype == torch.int32
    assert f"{query}.weight" not in tensors


def test_second_save_and_load_changes_nothing(tmp_path):
    model, directory = make_compressed(tmp_path, keep=0.2)
    again = AutoModelForSequenceClassification.from_pretrained(directory)
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(third(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_reloaded_model_trains_under_the_trainer(tmp_path):
    _, directory = make_compressed(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    before = model.bert.encoder.layer[0].output.dense.down.detach().clone()
    rows = [{"input_ids": [2, 5 + i, 3], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "t"), max_steps=2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(model.bert.encoder.layer[0].output.dense.down, before)


def test_dense_directory_is_factorised_on_the_fly(tmp_path):
    dense = write_model(tmp_path / "dense")
    model = AutoModel.from_pretrained(dense, quantization_config=lpaf.CompressionConfig(rank=4))
    layers = [module for module in model.modules() if isinstance(module, LowRankSparseLinear)]
    assert len(layers) == 12
    model.save_pretrained(tmp_path / "small")
    again = AutoModel.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).last_hidden_state, model(input_ids=IDS).last_hidden_state)


def edit_config(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_wrong_rank_in_the_configuration_is_refused(tmp_path):
    _, directory = make_compressed(tmp_path)
    edit_config(directory, lambda c: c["modules"]["encoder.layer.0.attention.self.query"].update(rank=5))
    with pytest.raises((InputError, RuntimeError)):
        AutoModelForSequenceClassification.from_pretrained(directory)


def test_missing_tensor_is_refused(tmp_path):
    _, directory = make_compressed(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    del tensors["bert.encoder.layer.1.output.dense.up"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layer\.1\.output\.dense\.up is missing"):
        AutoModelForSequenceClassification.from_pretrained(directory)


def test_unknown_matrix_in_the_configuration_is_refused(tmp_path):
    _, directory = make_compressed(tmp_path)
    edit_config(directory, lambda c: c["modules"].update({"encoder.layer.9.output.dense": {"rank": 4, "kept": 0}}))
    with pytest.raises(InputError, match=r"encoder\.layer\.9\.output\.dense"):
        AutoModelForSequenceClassification.from_pretrained(directory)


def test_newer_layout_is_refused(tmp_path):
    _, directory = make_compressed(tmp_path)
    edit_config(directory, lambda c: c.update(format_version=99))
    with pytest.raises(ValueError, match="upgrade lpaf-kernels"):
        AutoModelForSequenceClassification.from_pretrained(directory)


def test_repeated_kept_columns_are_refused(tmp_path):
    _, directory = make_compressed(tmp_path, keep=0.2)
    tensors = load_file(directory / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.kept"].fill_(3)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="kept"):
        AutoModelForSequenceClassification.from_pretrained(directory)
