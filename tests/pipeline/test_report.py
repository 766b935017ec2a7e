"""The report of a run: pictures, page, model card, terminal tables, inspection of saved models."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from lpaf.errors import InputError
from lpaf.evaluate.spectra import numerical_rank
from lpaf.recipes import methods as recipes
from lpaf.recipes.measure import neuron_record
from lpaf.report import card, figures, summary, terminal
from lpaf.report.card import front_matter, hub_id, render_card
from lpaf.report.html import render_html
from lpaf.report.inspect import (
    inspect_directory,
    is_encoder_matrix,
    render_inspection,
    write_pictures,
)
from lpaf.report.write import report_json, validate_report, write_report
from lpaf_kernels import LowRankSparseLinear

LAYERS, HIDDEN, WIDE, RANK = 3, 48, 96, 12
KINDS = {
    "attention.self.query": (HIDDEN, HIDDEN),
    "attention.self.key": (HIDDEN, HIDDEN),
    "attention.self.value": (HIDDEN, HIDDEN),
    "attention.output.dense": (HIDDEN, HIDDEN),
    "intermediate.dense": (WIDE, HIDDEN),
    "output.dense": (HIDDEN, WIDE),
}


def synthetic(pruned: bool = True, model: str = "owner/tiny-bert") -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A complete report and analysis: pruning removed whole rows, as first-order pruning does."""
    generator = torch.Generator().manual_seed(7)
    per_matrix: dict[str, Any] = {}
    analysis: dict[str, torch.Tensor] = {}
    for layer in range(LAYERS):
        for kind, shape in KINDS.items():
            name = f"bert.encoder.layer.{layer}.{kind}"
            weight = torch.randn(shape, generator=generator)
            rows = torch.rand(shape[0], 1, generator=generator) < 0.3 + 0.1 * layer
            mask = rows & (torch.rand(shape, generator=generator) < 0.5)
            dense, sparse = torch.linalg.svdvals(weight), torch.linalg.svdvals(weight * mask)
            analysis[f"singular_values.dense.{name}"] = dense
            if pruned:
                analysis[f"singular_values.pruned.{name}"] = sparse
                if kind in ("attention.self.query", "output.dense"):
                    analysis[f"mask.{name}"] = figures.pack_mask(mask)
            per_matrix[name] = {
                "shape": list(shape),
                "dense": numerical_rank(dense, shape),
                "pruned": numerical_rank(sparse, shape) if pruned else None,
                "compressed": RANK,
                "kept": 0,
                "kept_share": float(mask.float().mean()) if pruned else None,
                "error": 0.31,
            }

    def mean(stage: str) -> float | None:
        values = [entry[stage] for entry in per_matrix.values()]
        return None if values[0] is None else sum(values) / len(values)

    def curve(steps: int, **extra: Any) -> list[dict[str, Any]]:
        return [
            {
                "step": step,
                "loss": 2 * math.exp(-step / 80),
                "learning_rate": 5e-5 * (1 - step / steps),
                "grad_norm": 1.0,
            }
            | {key: value(step / steps) for key, value in extra.items()}
            for step in range(0, steps, 10)
        ]

    training = {"finetune": curve(200)}
    if pruned:
        training["prune"] = curve(300, keep=lambda t: 0.25 + 0.75 * (1 - t) ** 3)
    training["retrain"] = curve(
        300,
        mixed_rank_p=lambda t: max(0.5 - t, 0.0),
        consistency=lambda t: 0.2 * (1 - t),
        distillation=lambda t: 0.5 - 0.3 * t,
    )
    report = {
        "schema": 1,
        "method": "lpaf" if pruned else "svd",
        "model": model,
        "task": "docstrings",
        "seed": 0,
        "command": "lpaf compress --model tiny --task docstrings --ratio 0.25",
        "metric": {
            "name": "accuracy",
            "dense": 0.9214,
            "pruned": 0.9176 if pruned else None,
            "factorized": 0.6401,
            "compressed": 0.9098,
            "details": {
                "dense": {"validation": {"accuracy": 0.9214, "f1": 0.9187}},
                "compressed": {"test": {"accuracy": 0.9098}},
            },
        },
        "encoder_params": {"dense": 10_616_832, "compressed": 2_654_208, "ratio": 0.25},
        "total_params": {"dense": 22_713_216, "compressed": 14_750_592},
        "file_bytes": {"dense": 90_868_376, "compressed": 59_018_640},
        "flops": {"dense": 1_434_451_968, "compressed": 415_236_096, "sequence_length": 128},
        "latency_ms": {
            "dense": 81.4,
            "compressed": 38.2,
            "speedup": 2.131,
            "batch": 8,
            "length": 128,
            "device": "cpu",
            "device_type": "cpu",
            "dtype": "float32",
            "threads": 2,
            "p20": {"dense": 80.0, "compressed": 37.5},
            "p80": {"dense": 84.9, "compressed": 40.1},
            "rounds": 40,
        },
        "rank": {
            "mean_before": mean("dense"),
            "mean_after": mean("pruned"),
            "mean_compressed": mean("compressed"),
            "per_matrix": per_matrix,
        },
        "training": training,
        "seconds": {"finetune": 61.2, "prune": 202.9, "retrain": 3725.0},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "config": {
            "rank": None,
            "ratio": 0.25,
            "keep": 0.25,
            "options": {"no_prune": False, "names": ["a", "b"]},
        },
        "data": {"train": 6000, "validation": {"validation": 872}, "fingerprint": "0123abcd"},
    }
    return report, analysis


@pytest.fixture(scope="module")
def run() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return synthetic()


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.extend((tag, name, value or "") for name, value in attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def assert_self_contained(text: str) -> Page:
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(found.tags)
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href", "action", "data"):
            assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:60])
    assert "@import" not in text
    assert not re.search(r"url\((?!#|\"#)", text)
    ids = [value for _, name, value in found.attributes if name == "id"]
    assert len(ids) == len(set(ids)), "ids of different pictures collide"
    references = set(re.findall(r"url\(#([^)]+)\)", text))
    references |= {value[1:] for _, name, value in found.attributes if name.endswith("href") and value[0] == "#"}
    assert references <= set(ids)
    return found


def test_page_has_the_required_content(run):
    report, analysis = run
    found = assert_self_contained(render_html(report, analysis))
    assert found.tags.count("svg") == 7
    for words in (
        "4.00x",
        "2.13x",
        "98.7 %",
        "0.9214",
        "0.9176",
        "0.6401",
        "0.9098",
        "2.65 M",
        "59.0 MB",
        "415 M",
    ):
        assert words in found.text, words
    for words in (
        "import lpaf",
        "from_pretrained",
        "lpaf compress --model tiny",
        "5.23.0",
        "options.no_prune",
        "0123abcd",
    ):
        assert words in found.text, words
    for caption in (figures.RANK_DISTRIBUTION_CAPTION, figures.SPARSITY_CAPTION, figures.SPECTRA_CAPTION):
        assert caption in found.text


def test_page_of_a_run_without_pruning_leaves_out_its_pictures():
    report, analysis = synthetic(pruned=False)
    found = assert_self_contained(render_html(report, analysis))
    assert found.tags.count("svg") == 6
    assert figures.SPARSITY_CAPTION not in found.text
    assert [row.pruned for row in summary.stage_rows(report)] == ["-"] * 7


def test_page_escapes_everything():
    report, analysis = synthetic(model="<script>alert(1)</script>")
    evil = '"><img src=x onerror=alert(2)>'
    report |= {
        "task": evil,
        "method": evil,
        "command": evil,
        "config": {evil: evil},
        "versions": {evil: evil},
        "seconds": {evil: 1.0},
    }
    report["metric"] |= {"name": evil, "details": {evil: {evil: {evil: 1.0}}}}
    report["data"] = {"train": evil, "validation": {evil: evil}, "fingerprint": evil}
    report["training"] = {evil: report["training"]["prune"]}
    report["rank"]["per_matrix"] = {evil: next(iter(report["rank"]["per_matrix"].values()))}
    report["latency_ms"]["device"] = evil
    text = render_html(report, analysis)
    found = assert_self_contained(text)
    assert "img" not in found.tags
    assert "<script" not in text


def test_everything_written_is_deterministic(run, tmp_path):
    report, analysis = run
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, copy.deepcopy(report), dict(reversed(analysis.items())))
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert files == ["README.md", "analysis.safetensors", "report.html", "report.json"]
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    pictures = figures.pictures(report, analysis), figures.pictures(report, analysis)
    for first, second in zip(*pictures, strict=True):
        assert figures.to_png(first.figure) == figures.to_png(second.figure)
        assert figures.to_svg(first.figure) == figures.to_svg(second.figure)


def test_json_is_sorted_and_has_no_nan(run):
    report, _ = run
    changed = copy.deepcopy(report)
    changed["training"]["prune"][0]["grad_norm"] = math.inf
    changed["metric"]["pruned"] = math.nan
    text = report_json(changed)
    loaded = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert loaded["training"]["prune"][0]["grad_norm"] is None
    assert loaded["metric"]["pruned"] is None
    assert list(loaded) == sorted(loaded)
    assert report_json(loaded) == text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("method",), "report lacks method"),
        (("metric", "factorized"), "metric lacks factorized"),
        (("encoder_params", "ratio"), "encoder_params lacks ratio"),
        (("latency_ms", "p80"), "latency_ms lacks p80"),
        (("rank", "per_matrix", "bert.encoder.layer.0.output.dense", "kept"), "output.dense lacks kept"),
        (("training", "prune", 0, "loss"), "training.prune.* lacks loss"),
    ],
)
def test_missing_keys_are_named(run, tmp_path, path, words):
    report = copy.deepcopy(run[0])
    block = report
    for key in path[:-1]:
        block = block[key]
    del block[path[-1]]
    with pytest.raises(ValueError, match=words):
        write_report(tmp_path, report, {})
    assert not list(tmp_path.iterdir())


def test_wrong_kinds_are_named(run):
    for change, words in (
        ({"schema": 2}, "schema is 2, expected 1"),
        ({"rank": []}, "rank is list"),
        ({"training": {"prune": 3}}, "training.prune is int"),
    ):
        with pytest.raises(ValueError, match=words):
            validate_report({**run[0], **change})
    with pytest.raises(ValueError, match="report is list, expected a mapping"):
        validate_report([])
    broken = copy.deepcopy(run[0])
    next(iter(broken["rank"]["per_matrix"].values()))["shape"] = [3]
    with pytest.raises(ValueError, match=r"shape is \[3\], expected \[out, in\]"):
        validate_report(broken)


def test_every_method_has_its_line_and_tags():
    assert set(card.METHODS) == set(card.TAGS) == set(recipes.METHODS)
    assert set(card.WITHOUT_RETRAINING) <= set(recipes.METHODS)


def test_card_front_matter_is_yaml(run):
    report, _ = run
    card = render_card(report)
    assert card.startswith("---\n")
    matter = yaml.safe_load(card.split("---\n")[1])
    assert matter == front_matter(report)
    assert matter["base_model"] == "owner/tiny-bert"
    assert matter["metrics"] == ["accuracy"]
    assert "license" not in matter
    for words in (
        "import lpaf",
        "AutoModelForSequenceClassification.from_pretrained",
        "| accuracy |",
        "98.7 %",
        "0123abcd",
    ):
        assert words in card, words


def test_card_survives_odd_names():
    report, _ = synthetic(model="a: [b] | `c` \n---\n# d")
    report["metric"]["name"] = "x: y"
    card = render_card(report)
    matter = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert "base_model" not in matter
    assert matter["metrics"] == ["x: y"]
    assert card.count("\n---\n") == 1
    assert "\n# d" not in card


def test_base_model_is_a_hub_name_and_no_local_path(tmp_path, monkeypatch):
    assert hub_id("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"
    for local in ("/models/bert", "./bert", "bert", "a/b/c", "../a/b", "a/b c"):
        assert hub_id(local) is None
    (tmp_path / "runs" / "one").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("runs/one") is None


@pytest.mark.parametrize("terminal_width", [None, 200, 80])
def test_tables_fit_80_columns(run, tmp_path, terminal_width):
    report, analysis = run
    report = {**report, "model": "an-organisation-with-a-long-name/" + "a-model-with-a-very-long-name-" * 3}
    write_report(tmp_path, report, analysis)
    rows = [
        terminal.comparison_row("dense", report, "dense"),
        terminal.comparison_row("compressed to 25 % of its encoder", report),
        {"name": "rank-1 control", "metric": None},
    ]
    bench = [
        {
            "model": "a/very/long/path/to/some/model" * 2,
            "mode": "compiled",
            "batch": 8,
            "length": 128,
            "latency_ms": 81.44,
            "p20": 80.0,
            "p80": 1234.5,
            "speedup": 1.0,
        }
    ]
    tables = {
        "98.7 %": terminal.final_table(report),
        "rank-1 control": terminal.comparison_table(rows, metric="accuracy", title="demo"),
        "81.4 ms": terminal.bench_table(bench, title="cpu float32"),
        "0.9214": terminal.metrics_table(report["metric"]["details"]["dense"]),
        "layer.2": terminal.inspection_table(inspect_directory(tmp_path)),
    }
    for words, table in tables.items():
        file = io.StringIO()
        target = Console(file=file, force_terminal=True, width=terminal_width) if terminal_width else file
        terminal.show(table, target)
        text = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
        assert words in text, text
        assert max(len(line) for line in text.splitlines()) <= 80, text
        if terminal_width is None:
            assert text.isascii()
            assert "\x1b" not in file.getvalue()


def test_table_text_is_not_markup(run):
    file = io.StringIO()
    terminal.show(terminal.comparison_table([{"name": "[red]x[/red] [/nothing]"}]), file)
    assert "[red]x[/red]" in file.getvalue()


def test_comparison_row_checks_its_stage(run):
    with pytest.raises(ValueError, match="stage: got 'pruned'"):
        terminal.comparison_row("x", run[0], "pruned")


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (summary.format_count, 85_054_464, "85.1 M"),
        (summary.format_count, 999_999, "1.00 M"),
        (summary.format_count, 512, "512"),
        (summary.format_count, None, "-"),
        (summary.format_count, 35.4e9, "35.4 G"),
        (summary.format_bytes, 437_961_724, "438 MB"),
        (summary.format_bytes, 12, "12 B"),
        (summary.format_milliseconds, 9.996, "10.0 ms"),
        (summary.format_milliseconds, 1234.4, "1234 ms"),
        (summary.format_milliseconds, math.nan, "-"),
        (summary.format_seconds, 4.21, "4.2 s"),
        (summary.format_seconds, 200, "3 min 20 s"),
        (summary.format_seconds, 7500, "2 h 05 min"),
        (summary.format_factor, 4.0, "4.00x"),
        (summary.format_factor, 12.2, "12x"),
        (summary.format_percent, 0.25, "25.0 %"),
        (summary.significant, 0.01234, "0.0123"),
        (summary.significant, 0, "0"),
    ],
)
def test_number_formats(function, value, text):
    assert function(value) == text


def test_metric_change_by_kind_of_metric():
    assert summary.metric_change("accuracy", 0.9, 0.81) == "90.0 % kept"
    assert summary.metric_change("perplexity", 0.5, 0.6) == "+0.1000"
    assert summary.metric_change("matthews_correlation", -0.1, 0.2) == "+0.3000"
    assert summary.metric_change("accuracy", None, 0.2) == "-"


def test_latency_names_processor_and_threads(run):
    report = copy.deepcopy(run[0])
    report["latency_ms"] |= {"device": "AMD EPYC", "device_type": "cpu"}
    assert summary.latency_conditions(report) == "batch 8, length 128, AMD EPYC float32, 2 threads"
    report["latency_ms"] |= {"device": "NVIDIA H100", "device_type": "cuda"}
    assert "threads" not in summary.latency_conditions(report)


def test_headline_without_dense_numbers(run):
    report = copy.deepcopy(run[0])
    report["metric"] |= {"dense": None}
    report["latency_ms"] |= {"dense": None, "compressed": None, "speedup": None}
    words = summary.headline_sentence(report)
    assert "4.00x smaller" in words
    assert "faster" not in words
    assert "0.9098 accuracy" in words
    slower = copy.deepcopy(run[0])
    slower["latency_ms"]["speedup"] = 0.8
    assert "0.80x the dense speed" in summary.headline_sentence(slower)


def test_spectrum_curves_match_the_svd():
    weight = torch.randn(20, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    errors, shares = figures.spectrum_curves(s.flip(0))
    assert errors.shape == shares.shape == (13,)
    for k in (0, 1, 5, 12):
        cut = (u[:, :k] * s[:k]) @ v[:k]
        assert errors[k] == pytest.approx(float((weight - cut).norm() / weight.norm()), abs=1e-12)
        assert shares[k] == pytest.approx(float(s[:k].sum() / s.sum()))
    errors, shares = figures.spectrum_curves(torch.zeros(4))
    assert (errors == 0).all()
    assert (shares == 1).all()


def test_masks_round_trip_and_downsample():
    mask = torch.rand(37, 501, generator=torch.Generator().manual_seed(2)) < 0.2
    mask[5] = False
    packed = figures.pack_mask(mask)
    assert packed.dtype == torch.uint8
    np.testing.assert_array_equal(figures.unpack_mask(packed, (37, 501)), mask.numpy())
    density = figures.block_density(mask.numpy(), largest=50)
    assert density.shape == (37, 50)
    assert (density[5] == 0).all()
    np.testing.assert_allclose(figures.block_density(mask.numpy(), largest=1), mask.double().mean().item())
    with pytest.raises(ValueError, match="mask: expected uint8"):
        figures.unpack_mask(packed[:-1], (37, 501))


def test_places_of_matrices():
    assert figures.matrix_place("bert.encoder.layer.11.attention.self.query") == (11, "attention.self.query")
    assert figures.matrix_place("encoder.block.2.layer.0.SelfAttention.q") == (2, "layer.0.SelfAttention.q")
    assert figures.matrix_place("decoder.block.2.layer.1.EncDecAttention.q") == (2, "layer.1.EncDecAttention.q")
    assert figures.matrix_place("model.decoder.layers.0.fc1") == (0, "fc1")
    assert figures.matrix_place("head") == (0, "head")
    names = {"l.10.b": {}, "l.2.c": {}, "l.2.a": {}}
    assert list(figures.in_order(names)) == ["l.2.a", "l.2.c", "l.10.b"]


def test_pictures_of_few_or_odd_numbers(run):
    _report, _analysis = run
    assert figures.to_png(figures.rank_distribution({})).startswith(b"\x89PNG")
    assert figures.to_png(figures.spectra({}, {})).startswith(b"\x89PNG")
    assert figures.to_png(figures.training_curves({"prune": []})).startswith(b"\x89PNG")
    assert figures.to_png(figures.sparsity_patterns({}, {})).startswith(b"\x89PNG")
    assert figures.to_png(figures.rank_by_layer({})).startswith(b"\x89PNG")
    mixed = {
        "l.0.a": {
            "shape": [8, 8],
            "dense": 8,
            "pruned": None,
            "compressed": 5,
            "kept": 2,
            "kept_share": None,
            "error": None,
        },
        "l.1.b": {
            "shape": [8, 4],
            "dense": 4,
            "pruned": None,
            "compressed": None,
            "kept": None,
            "kept_share": None,
            "error": None,
        },
    }
    assert summary.whole_rank(mixed["l.0.a"]) == 7
    assert summary.whole_rank(mixed["l.0.a"] | {"kept": 4}) == 8, "full rank"
    assert summary.whole_rank(mixed["l.1.b"]) is None
    spectra = {"singular_values.dense.l.0.a": torch.rand(8), "singular_values.dense.l.1.b": torch.zeros(4)}
    for picture in figures.matrix_pictures(mixed, spectra):
        assert figures.to_svg(picture.figure).startswith(b"<?xml")
    one = {"prune": [{"step": 1, "loss": math.nan, "learning_rate": 0.0}]}
    assert figures.to_png(figures.training_curves(one)).startswith(b"\x89PNG")


def neurons(scope: str = "global", low_rank: int = 6) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """per_matrix and analysis of an encoder-decoder whose neurons of most importance are kept, half of them of all or
    of every matrix."""
    generator = torch.Generator().manual_seed(3)
    shapes = {
        f"model.{stack}.layers.{layer}.{kind}": shape
        for stack in ("decoder", "encoder")
        for layer in range(2)
        for kind, shape in {"self_attn.q_proj": (24, 24), "fc1": (40, 24), "fc2": (24, 40)}.items()
    }
    scores = {
        name: (4 if ".1." in name else 1) * torch.rand(out, generator=generator) ** 3
        for name, (out, _) in shapes.items()
    }
    median = torch.cat(list(scores.values())).median()
    per_matrix, analysis = {}, {}
    for name, values in scores.items():
        kept = torch.nonzero(values > (median if scope == "global" else values.median())).flatten().int()
        analysis |= {f"importance.{name}": values, f"kept_neurons.{name}": kept}
        analysis[f"singular_values.dense.{name}"] = torch.linspace(2, 0, 24)
        per_matrix[name] = {
            "shape": list(shapes[name]), "dense": 24, "pruned": None, "compressed": low_rank, "kept": len(kept),
            "kept_share": None, "error": 0.2,
        }  # fmt: skip
    return per_matrix, analysis


def words_of(figure: Any) -> list[str]:
    """Every text of a drawn figure."""
    figures.to_png(figure)
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text"))]


def test_stacks_are_told_apart():
    per_matrix, _ = neurons()
    ordered = figures.in_order(per_matrix)
    assert [name.split(".")[1] for name in ordered] == ["encoder"] * 6 + ["decoder"] * 6
    places = figures.matrix_places(ordered)
    assert places["model.decoder.layers.1.fc1"] == (1, "decoder fc1")
    assert len(set(places.values())) == len(per_matrix), "no cell stands for two matrices"
    assert figures.matrix_places(["bert.encoder.layer.1.output.dense"]).popitem()[1] == (1, "output.dense")
    assert figures.matrix_places(["head", "l.1.a"]) == {"head": (0, "head"), "l.1.a": (1, "a")}


def test_what_each_matrix_stores_is_in_its_cell():
    per_matrix, _ = neurons()
    figure = figures.kept_by_layer(figures.in_order(per_matrix))
    ranks, kept = figure.axes[0], figure.axes[1]
    names = [label.get_text() for label in kept.get_yticklabels()]
    assert names[0] == "encoder fc1"
    cells = np.array(kept.images[0].get_array())
    assert cells.shape == (6, 2)
    entry = per_matrix["model.decoder.layers.1.fc1"]
    assert cells[names.index("decoder fc1"), 1] == pytest.approx(entry["kept"] / 40)
    assert kept.images[0].get_clim() == (0, pytest.approx(cells.max())), "the darkest is the largest share"
    assert str(entry["kept"]) in words_of(figure)
    assert np.allclose(ranks.images[0].get_array(), 6 / 24)
    alone = figures.kept_by_layer(neurons(low_rank=0)[0])
    assert [axes.get_title(loc="left").partition(",")[0] for axes in alone.axes if axes.images] == ["neurons kept"]


def test_importance_is_counted_by_kind_and_side_of_the_threshold():
    per_matrix, analysis = neurons()
    figure = figures.importance(figures.in_order(per_matrix), analysis)
    plots = [axes for axes in figure.axes if axes.patches]
    assert [axes.get_title(loc="left") for axes in plots[:2]] == ["encoder fc1", "encoder fc2"]
    assert {axes.get_yscale() for axes in plots} == {"log"}
    pruned, kept = plots[0].patches
    names = ["model.encoder.layers.0.fc1", "model.encoder.layers.1.fc1"]
    expected = sum(per_matrix[name]["kept"] for name in names)
    assert (kept.get_data().values.sum(), pruned.get_data().values.sum()) == (expected, 80 - expected)
    assert not (kept.get_data().values * pruned.get_data().values).any(), "the threshold is an edge of the bins"
    least = min(float(analysis[f"importance.{name}"][analysis[f"kept_neurons.{name}"].long()].min()) for name in names)
    assert plots[0].lines[0].get_xdata()[0] == pytest.approx(least)
    assert {"kept", "pruned", "threshold"} <= set(words_of(figure))


def test_importance_without_one_threshold_or_without_a_choice():
    per_matrix, analysis = neurons(scope="matrix")
    figure = figures.importance(per_matrix, analysis)
    assert not any(axes.lines for axes in figure.axes), "each matrix has a threshold of its own"
    all_alike = {name: tensor for name, tensor in analysis.items() if name.startswith("importance.")}
    figure = figures.importance(per_matrix, all_alike)
    assert [len(axes.patches) for axes in figure.axes] == [1] * 6
    assert not figure.legends
    zero = {name: torch.zeros_like(tensor) for name, tensor in all_alike.items()}
    assert figures.to_png(figures.importance(per_matrix, zero)).startswith(b"\x89PNG")
    assert figures.to_png(figures.importance({}, {})).startswith(b"\x89PNG")


@pytest.mark.parametrize(("top", "threshold"), [(3.0, None), (3.0, 0.4), (3.0, 3.0), (3.0, 1e-9), (0.0, None)])
def test_bins_reach_from_zero_over_the_largest(top, threshold):
    bins = figures.importance_bins(top, threshold)
    assert bins[0] == 0
    assert bins[-1] >= top * (1 - 1e-6)
    assert 2 <= len(bins) <= 202
    np.testing.assert_allclose(np.diff(bins), bins[1])
    if threshold and threshold > 1e-6:
        assert np.abs(bins - threshold).min() < 1e-12


def test_singular_values_fall_from_one_on_a_log_axis():
    per_matrix, analysis = neurons()
    figure = figures.singular_values(per_matrix, analysis)
    (plot,) = figure.axes
    assert plot.get_yscale() == "log"
    assert len(plot.lines) == 6, "the matrices of the middle layer of each stack"
    values = plot.lines[0].get_ydata()
    assert values[0] == 1.0
    assert np.isnan(values[-1]), "a zero has no place on a log axis"
    assert (np.diff(values[:-1]) < 0).all()
    assert figures.to_png(figures.singular_values({}, {})).startswith(b"\x89PNG")


def test_pictures_of_neurons_are_drawn_where_there_are_numbers(run):
    report, analysis = run
    always = [picture.name for picture in figures.pictures(report, analysis)]
    assert not {"importance", "kept_by_layer"} & set(always)
    per_matrix, more = neurons()
    assert {"importance", "kept_by_layer"} < {picture.name for picture in figures.matrix_pictures(per_matrix, more)}
    ranks = copy.deepcopy(report["rank"]["per_matrix"])
    next(iter(ranks.values()))["compressed"] += 1
    assert "kept_by_layer" in [picture.name for picture in figures.matrix_pictures(ranks, {})]


def test_neurons_of_a_compact_model_are_recorded():
    kept = torch.tensor([1, 4], dtype=torch.int32)
    model = torch.nn.ModuleDict({"a": LowRankSparseLinear(6, 5, 2, kept=kept), "b": torch.nn.Linear(6, 5)})
    scores = {"a": torch.rand(5, dtype=torch.float64), "b": torch.rand(5), "c": torch.rand(5, 6)}
    found = neuron_record(scores, model)
    assert found.keys() == {"importance.a", "kept_neurons.a", "importance.b"}
    assert torch.equal(found["importance.a"], scores["a"].float())
    assert found["kept_neurons.a"].tolist() == [1, 4]


def test_figures_leave_matplotlib_settings_alone(run):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.to_svg(figures.summary_bars(run[0]))
    assert dict(matplotlib.rcParams) == before


def save_bert(directory: Path, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[4:] = 0
    model.save_pretrained(directory, **changes)
    return model


@pytest.mark.parametrize("changes", [{}, {"max_shard_size": "20KB"}], ids=["one file", "shards"])
def test_inspect_plain_directory(tmp_path, changes):
    model = save_bert(tmp_path / "bert", **changes)
    found = inspect_directory(tmp_path / "bert", progress=False)
    assert found.kind == "dense"
    assert found.report is None
    expected = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and ".layer." in name
    ]
    assert sorted(found.per_matrix) == sorted(expected)
    assert len(expected) == 12
    for name, entry in found.per_matrix.items():
        weight = model.get_submodule(name).weight.detach().numpy()
        assert entry["dense"] == np.linalg.matrix_rank(weight)
        assert entry["shape"] == list(weight.shape)
        values = found.analysis[f"singular_values.dense.{name}"]
        np.testing.assert_allclose(values.numpy(), np.linalg.svd(weight, compute_uv=False), rtol=1e-4, atol=1e-5)
    last = "bert.encoder.layer.1.output.dense"
    assert found.per_matrix[last]["dense"] == 4
    assert found.per_matrix[last]["kept_share"] == 4 / 32
    assert [key for key in found.analysis if key.startswith("mask.")] == [f"mask.{last}"]
    assert found.summary["matrices"] == 12
    assert found.summary["layers"] == 2
    assert found.summary["mean_rank"] == {"dense": (11 * 32 + 4) / 12, "pruned": None, "compressed": None}
    assert json.loads(json.dumps(found.to_json()))["summary"]["mean_full_rank"] == 32
    assert_self_contained(render_inspection(found))
    paths = write_pictures(found, tmp_path / "pictures")
    assert [path.name for path in paths] == [
        "rank_distribution.png",
        "rank_by_layer.png",
        "spectra.png",
        "singular_values.png",
        "sparsity_patterns.png",
        "inspect.html",
    ]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_inspect_compressed_directory(run, tmp_path):
    report, analysis = run
    write_report(tmp_path, report, analysis)
    found = inspect_directory(str(tmp_path))
    assert found.kind == "compressed"
    assert len(found.per_matrix) == LAYERS * len(KINDS)
    means = found.summary["mean_rank"]
    assert means["dense"] == pytest.approx(report["rank"]["mean_before"])
    assert means["pruned"] == pytest.approx(report["rank"]["mean_after"])
    assert means["pruned"] < means["dense"]
    assert means["compressed"] == RANK
    effective = found.summary["mean_effective_rank"]
    assert effective["pruned"] < effective["dense"]
    assert "mean rank: dense 48.0, pruned" in found.sentence()
    page = assert_self_contained(render_inspection(found))
    assert page.tags.count("svg") == 7
    paths = write_pictures(found, tmp_path / "deep" / "er")
    assert len(paths) == 8
    assert (tmp_path / "deep" / "er" / "training.png").is_file()
    for key, tensor in analysis.items():
        assert torch.equal(found.analysis[key], tensor)


def test_inspect_bad_input(run, tmp_path):
    report, analysis = run

    def refuses(directory: Path, *words: str) -> None:
        with pytest.raises(InputError) as caught:
            inspect_directory(directory, progress=False)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith("model: ")
        for word in words:
            assert word in message, message

    refuses(tmp_path / "nowhere", "is not a directory")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuses(empty, "neither report.json nor model.safetensors")

    whole = tmp_path / "run"
    whole.mkdir()
    write_report(whole, report, analysis)
    content = (whole / "analysis.safetensors").read_bytes()
    (whole / "analysis.safetensors").write_bytes(content[:-100])
    refuses(whole, "analysis.safetensors cannot be read", "compress again")
    (whole / "analysis.safetensors").unlink()
    refuses(whole, "analysis.safetensors is missing")
    (whole / "report.json").write_text("{")
    refuses(whole, "report.json cannot be read")
    (whole / "report.json").write_text(json.dumps({"schema": 1}))
    refuses(whole, "is not a report", "lacks")

    save_bert(tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    refuses(tmp_path / "bert", "cannot be read")
    weights.write_bytes(b"")
    refuses(tmp_path / "bert", "cannot be read")

    save_bert(tmp_path / "shards", max_shard_size="20KB")
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    refuses(tmp_path / "shards", "is missing", "copy the whole directory")

    from safetensors.torch import save_file

    for name, tensors, words in (
        ("odd", {"embeddings.weight": torch.ones(3, 4)}, "no weight matrices"),
        ("nan", {"encoder.layer.0.dense.weight": torch.full((4, 4), math.nan)}, "NaN or infinite"),
    ):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        refuses(tmp_path / name, words)


def test_broken_mask_is_refused(run, tmp_path):
    report, analysis = run
    name = "mask.bert.encoder.layer.0.output.dense"
    write_report(tmp_path, report, analysis)
    from safetensors.torch import save_file

    save_file({**analysis, name: analysis[name][:-1].clone()}, tmp_path / "analysis.safetensors")
    with pytest.raises(InputError, match="broken mask"):
        inspect_directory(tmp_path)


def test_pictures_need_a_writable_place(run, tmp_path):
    save_bert(tmp_path / "bert")
    found = inspect_directory(tmp_path / "bert", progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output: .* cannot be written"):
        write_pictures(found, tmp_path / "file")


def test_encoder_matrices_by_name():
    assert is_encoder_matrix("bert.encoder.layer.0.attention.self.query.weight", (8, 8))
    assert is_encoder_matrix("transformer.layer.3.ffn.lin1.weight", (8, 4))
    for name, shape in (
        ("bert.embeddings.word_embeddings.weight", (9, 8)),
        ("bert.encoder.layer.0.output.LayerNorm.weight", (8,)),
        ("classifier.0.weight", (2, 8)),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 4)),
        ("bert.pooler.dense.weight", (8, 8)),
        ("encoder.layer.0.down", (4, 8)),
    ):
        assert not is_encoder_matrix(name, shape), name


def test_numerical_rank_is_numpys():
    weight = torch.randn(30, 5, generator=torch.Generator().manual_seed(3)) @ torch.randn(
        5, 20, generator=torch.Generator().manual_seed(4)
    )
    assert numerical_rank(torch.linalg.svdvals(weight), weight.shape) == np.linalg.matrix_rank(weight.numpy()) == 5
    assert numerical_rank(torch.zeros(4), (4, 4)) == 0
    assert numerical_rank(torch.empty(0), (0, 3)) == 0
