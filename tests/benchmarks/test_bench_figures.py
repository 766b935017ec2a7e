"""``lpaf bench --plot`` draws rows, and says in one line what is wrong with a file."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from benchmarks.rows import append_rows
from lpaf.cli import main
from lpaf.errors import InputError
from lpaf.report.bench_figures import (
    bench_pictures,
    kept_share,
    read_bench_rows,
    roofline_figure,
    speedup_figure,
    speedups,
)

NAMES = {
    "speedup_dense_rank",
    "speedup_dense_rows",
    "speedup_chain_rank",
    "speedup_chain_rows",
    "roofline",
}


@pytest.fixture
def rows(make_row):
    found = []
    for (inputs, outputs), rank, kept, m in itertools.product(((768, 3072), (768, 768)), (16, 80), (0, 0.1), (16, 512)):
        shape = {"in": inputs, "out": outputs, "rank": rank, "kept": round(kept * outputs), "rows": m}
        found += [make_row("dense", 40.0, **shape), make_row("chain", 20.0, **shape), make_row("ours", 10.0, **shape)]
    return found


@pytest.fixture
def file(tmp_path, rows) -> Path:
    append_rows(tmp_path / "rows.jsonl", rows)
    return tmp_path / "rows.jsonl"


def test_plot_writes_the_pictures(file, tmp_path, capsys):
    assert main(["bench", "--plot", str(file), "--output", str(tmp_path / "new" / "pictures")]) == 0
    written = {path.stem: path for path in (tmp_path / "new" / "pictures").iterdir()}
    assert set(written) == NAMES
    out = capsys.readouterr().out
    for name, path in written.items():
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
        assert f"{name}.svg" in out


def test_by_default_the_pictures_are_beside_the_rows(file):
    assert main(["bench", "--plot", str(file)]) == 0
    assert {path.stem for path in file.parent.glob("*.svg")} == NAMES


def test_a_panel_per_matrix_and_a_line_per_kept_share(rows):
    figure = speedup_figure(rows, "chain", "rank")
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == ["768 x 768", "768 x 3072"]
    for axes in panels:
        # The dashed line at 1, kept 0 % and kept 10 %.
        lines = axes.get_lines()
        assert len(lines) == 3
        assert list(lines[1].get_xdata()) == [16, 80]
        assert lines[1].get_ydata() == pytest.approx([2, 2])
    words = {text.get_text() for text in figure.legends[0].get_texts()}
    assert words == {"kept 0 %", "kept 10 %"}


def test_a_ratio_is_of_one_run(make_row):
    rows = [make_row("chain", 20.0, run="a"), make_row("ours", 10.0, run="a"), make_row("ours", 5.0, run="b")]
    assert speedups(rows, "chain") == []
    ((row, factor),) = speedups([*rows, make_row("chain", 30.0, run="b")], "chain")
    assert factor == 6
    assert kept_share(row) == 0


def test_the_roofline_joins_both_ceilings(rows, make_row):
    figure = roofline_figure([*rows, make_row("ours", 3.0, dtype="bfloat16"), make_row("losparse", 30.0, rows=512)])
    assert len(figure.axes) == 2
    for axes in figure.axes:
        x, y = axes.get_lines()[0].get_data()
        assert x[1] == pytest.approx(1e11 / 2e10)
        assert list(y[1:]) == [1e11, 1e11]
        assert y[0] == pytest.approx(x[0] * 2e10)
    assert "losparse" in {text.get_text() for text in figure.legends[0].get_texts()}


def test_rows_without_a_pair_draw_a_note(make_row):
    pictures = bench_pictures([make_row("chain")])
    assert {picture.name for picture in pictures} == NAMES
    text = pictures[0].figure.axes[0].texts[0].get_text()
    assert text == "no forward cell has both ours and dense"


def test_rows_that_failed_are_left_out(tmp_path, make_row):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [make_row("chain"), make_row("ours", None, failed="gate: y")])
    assert [row["provider"] for row in read_bench_rows(path)] == ["chain"]
    append_rows(path, [])
    with path.open("a") as file:
        file.write('{"op":')
    assert len(read_bench_rows(path)) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("", "holds no row with a time"),
        ("hello\n", "line 1 is not a row"),
        ('{"op": "linear"}\n', "line 1 is not a row"),
        ("[]\n", "line 1 is not a row"),
    ],
)
def test_a_bad_file_is_one_line(text, words, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    assert main(["bench", "--plot", str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert f"--plot {path}" in error
    assert error.count("\n") == 1


def test_rows_of_two_devices_are_not_drawn_together(tmp_path, make_row, capsys):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [make_row(), make_row(device="GPU", rows=16)])
    assert main(["bench", "--plot", str(path)]) == 2
    assert "mixes CPU Example, GPU" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_one_line(file, capsys):
    assert main(["bench", "--plot", str(file), "--output", str(file / "inside")]) == 2
    assert "--output" in capsys.readouterr().err


def test_negative_numbers_are_no_rows(tmp_path, make_row):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [make_row(median_us=-1.0)])
    with pytest.raises(InputError, match="line 1"):
        read_bench_rows(path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench"], "--plot"),
        (["bench", "--model", "m", "--plot", "rows.jsonl"], "not allowed with"),
    ],
)
def test_one_of_model_and_plot_is_needed(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_output_is_for_pictures(capsys):
    assert main(["bench", "--model", "m", "--output", "there"]) == 2
    assert "--output" in capsys.readouterr().err
