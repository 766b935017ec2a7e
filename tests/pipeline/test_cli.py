"""The command line: help that teaches, and the commands beside compress."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lpaf.cli import COMMANDS, main
from lpaf.models.checkpoint import load_tokenizer, save_compressed
from lpaf.models.targets import encoder_linears
from lpaf.recipes.methods import METHODS
from lpaf.recipes.options import CompressOptions, flag
from lpaf_kernels import fuse, swap_linears
from tiny import write_model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A compressed classifier that was never trained."""
    directory = tmp_path_factory.mktemp("small")
    source = write_model(directory / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    swap_linears(model, rank=4, names=list(encoder_linears(model)))
    save_compressed(model, load_tokenizer(str(source)), directory / "compressed", "svd")
    return directory / "compressed"


def helped(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_names_every_command_and_how_to_begin(capsys):
    text = helped(["--help"], capsys)
    assert all(name in text for name in COMMANDS)
    assert "lpaf demo" in text
    assert "import lpaf" in text


def test_compress_help_names_every_option_and_method(capsys):
    text = helped(["compress", "--help"], capsys)
    for name, field in CompressOptions.__dataclass_fields__.items():
        expected = f"--no-{flag(name)[2:]}" if field.metadata.get("negate") else flag(name)
        assert expected in text
    text = re.sub(r"-\n\s+", "-", text)  # a line may end at a hyphen
    assert [name for name in METHODS if name not in text] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    assert f"lpaf {name}" in helped([name, "--help"], capsys)


def test_version(capsys):
    assert "lpaf-kernels" in helped(["--version"], capsys)


def test_bench_times_every_cell(small, capsys):
    arguments = ["bench", "--model", str(small), "--batch", "1,2", "--length", "8,16", "--rounds", "3", "--json"]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["batch"], row["length"]) for row in rows] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    assert {row["mode"] for row in rows} == {"eager"}
    for row in rows:
        assert row["speedup"] == pytest.approx(row["against_ms"] / row["model_ms"])
        assert row["model_macs"] < row["against_macs"]
        assert row["encoder_ratio"] < 1


def test_bench_against_a_directory_prints_a_table(small, tmp_path, capsys):
    dense = AutoModelForSequenceClassification.from_pretrained(small.parent / "dense", num_labels=2)
    dense.save_pretrained(tmp_path / "dense")
    arguments = ["bench", "--model", str(small), "--against", str(tmp_path / "dense"), "--length", "8", "--rounds", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "median" in out
    assert "speed" in out


def test_bench_times_a_model_fused_against_itself(small, monkeypatch, capsys):
    fused = []
    monkeypatch.setattr("lpaf_kernels.fuse", lambda model: fused.append(model) or fuse(model))
    arguments = ["bench", "--model", str(small), "--against", str(small), "--fuse", "--length", "8", "--rounds", "2"]
    assert main([*arguments, "--batch", "1", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert len(fused) == 1
    assert (row["model"], row["against"]) == (f"{small} (fused)", str(small))
    assert row["encoder_ratio"] == 1
    assert main(arguments) == 0
    assert "eager" in capsys.readouterr().out


def test_bench_calls_the_models_as_asked(small, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **_: compiled.append(model) or model)
    arguments = ["bench", "--model", str(small), "--batch", "1", "--length", "8,16", "--rounds", "2", "--json"]
    assert main([*arguments, "--mode", "eager,compiled"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["mode"], row["length"]) for row in rows] == [
        ("eager", 8), ("eager", 16), ("compiled", 8), ("compiled", 16),
    ]  # fmt: skip
    assert len(compiled) == 4


def test_evaluate_prints_json(small, tiny_data, capsys):
    arguments = [
        "evaluate",
        "--model",
        str(small),
        "--task",
        "text-classification",
        "--data-dir",
        str(tiny_data),
        "--json",
    ]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert 0 <= result["metrics"]["validation"]["accuracy"] <= 1
    assert result["examples"] == {"validation": 40}


def test_evaluate_takes_glue_files(tiny_model, glue_data, tmp_path, capsys):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2)
    model.save_pretrained(tmp_path / "m")
    load_tokenizer(str(tiny_model)).save_pretrained(tmp_path / "m")
    arguments = ["evaluate", "--model", tmp_path / "m", "--task", "rte", "--data-dir", glue_data / "rte", "--json"]
    assert main([*map(str, arguments), "--max-length", "32"]) == 0
    assert json.loads(capsys.readouterr().out)["examples"] == {"validation": 277}


@pytest.mark.slow
def test_quick_demo(tmp_path, capsys):
    assert main(["demo", "--quick", "--output", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    assert "rank-1 control" in out
    assert "compressed" in out
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report["encoder_params"]["ratio"] == pytest.approx(0.25, abs=0.005)
