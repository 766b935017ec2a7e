"""lpaf tune: which layers are measured; the measurement itself is tested with the kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from lpaf.cli import main
from lpaf.errors import InputError
from lpaf.evaluate import tune as tune_module
from lpaf.evaluate.tune import block_shapes, layer_shapes, tune
from lpaf.models.checkpoint import load_tokenizer, save_compressed
from lpaf.models.targets import encoder_linears
from lpaf_kernels import swap_linears
from lpaf_kernels.tuning.tune_lowrank_attention import checked_sizes as checked_attention
from lpaf_kernels.tuning.tune_lowrank_ffn import checked_sizes as checked_ffn
from tiny import build, write_model


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> tuple[Path, set]:
    """A compressed classifier, and the shapes of its layers."""
    directory = tmp_path_factory.mktemp("tune")
    source = write_model(directory / "dense")
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    linears = dict(encoder_linears(model))
    swap_linears(model, rank=4, keep=0.25, names=list(linears))
    expected = {(m.in_features, m.out_features, 4, round(0.25 * m.out_features)) for m in linears.values()}
    save_compressed(model, load_tokenizer(str(source)), directory / "compressed", "svd")
    return directory / "compressed", expected


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """What would be measured, on a machine that seems to have a GPU: (function, shapes, options)."""
    found: list[tuple] = []

    def record(name):
        def measure(shapes, **options):
            found.append((name, shapes, options))
            return Path("table.json")

        return measure

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune_module, "missing", lambda: None)
    for name in ("tune_linear", "tune_ffn", "tune_attention"):
        monkeypatch.setattr(tune_module, name, record(name))
    return found


def test_shapes_of_a_directory(compressed):
    directory, expected = compressed
    found = layer_shapes(str(directory))
    assert set(found) == expected
    assert len(found) == len(expected) > 1


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_blocks_of_a_directory(model_type, tmp_path):
    model = build(model_type)
    swap_linears(model, rank=4, keep=0.25, names=list(encoder_linears(model)))
    source = write_model(tmp_path / "dense")
    save_compressed(model, load_tokenizer(str(source)), tmp_path / "compressed", "svd")
    ffn, attention = block_shapes(str(tmp_path / "compressed"))
    assert ffn == [(32, 48, 32, (4, 4), (12, 8), 0)]
    assert attention == [(32, 2, 2, 16, 32, (4, 4, 4, 4), (8, 8, 8, 8), False)]
    assert [checked_ffn(sizes) for sizes in ffn] == ffn
    assert [checked_attention(sizes) for sizes in attention] == attention


def test_a_model_without_known_blocks_has_no_shapes_of_them(tmp_path, calls):
    model = build("albert")
    swap_linears(model, rank=4, names=list(encoder_linears(model)))
    source = write_model(tmp_path / "dense")
    save_compressed(model, load_tokenizer(str(source)), tmp_path / "compressed", "svd")
    tune(model=str(tmp_path / "compressed"))
    assert [name for name, *_ in calls] == ["tune_linear"]


def test_a_directory_and_further_shapes(compressed, calls, capsys):
    directory, expected = compressed
    arguments = ["tune", "--model", str(directory), "--shape", "768,3072,80", "--shape", "768,3072,80,307"]
    assert main([*arguments, "--rows", "128,16,128", "--for", "inference", "--budget", "30", "--output", "t.json"]) == 0
    (name, shapes, options), *blocks = calls
    assert [name, *(name for name, *_ in blocks)] == ["tune_linear", "tune_ffn", "tune_attention"]
    assert set(shapes) == expected | {(768, 3072, 80, 0), (768, 3072, 80, 307)}
    assert options["rows"] == [16, 128]
    assert options["directions"] == ("forward",)
    assert options["dtype"] == torch.bfloat16
    assert all(29 < options["budget_s"] <= 30 for *_, options in calls)
    assert all(options["output"] == Path("t.json") for *_, options in calls)
    assert blocks[0][2]["directions"] == ("forward",)
    assert blocks[0][2]["rows"] == [16, 128]
    assert blocks[1][2]["batches"] == [(1, 128)]
    assert "table.json" in capsys.readouterr().out


def test_training_measures_both_directions(calls):
    tune(shapes=[(768, 768, 0, 4)])
    assert calls[0][2]["directions"] == ("forward", "backward")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--shape: expected at least one layer"),
        (["--shape", "768,768,769"], "--shape 768,768,769,0: RANK is at most IN and OUT"),
        (["--shape", "768,768,0,0"], "--shape 768,768,0,0: RANK"),
        (["--shape", "768,768,80", "--budget", "0"], "--budget 0.0: expected more than 0 seconds"),
        (["--model", "absent/model"], "--model absent/model"),
    ],
)
def test_bad_input(arguments, text, calls, capsys):
    assert main(["tune", *arguments]) == 2
    assert text in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize("text", ["768", "768,768", "a,b,c", "768,768,-1", "0,768,1", "1,2,3,4,5"])
def test_bad_shapes_are_explained(text, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["tune", f"--shape={text}"])
    assert exit_.value.code == 2
    assert "expected IN,OUT,RANK" in capsys.readouterr().err


def test_dense_directory(compressed, calls):
    with pytest.raises(InputError, match="is not compressed"):
        tune(model=str(compressed[0].parent / "dense"))


def test_configuration_of_another_model(compressed, calls, tmp_path):
    directory = tmp_path / "other"
    directory.mkdir()
    for file in compressed[0].iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["modules"]["encoder.layer.99.output.dense"] = {"rank": 4, "kept": 0}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"encoder\.layer\.99"):
        tune(model=str(directory))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert main(["tune", "--shape", "768,768,80"]) == 2
    assert "lpaf tune: tuning measures on an NVIDIA GPU, and this torch sees none" in capsys.readouterr().err
