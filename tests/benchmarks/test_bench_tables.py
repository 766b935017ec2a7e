"""What the table says, and that a planted slowdown is named."""

from __future__ import annotations

import pytest

from benchmarks.__main__ import main
from benchmarks.errors import InputError
from benchmarks.rows import append_rows
from benchmarks.tables import compare, failures, run_table, summary


@pytest.fixture
def rows(make_row):
    """Three cells: ours twice as fast as the chain, half as fast, and, at M = 1, without a time."""
    return [
        make_row("dense", 40.0),
        make_row("chain", 20.0),
        make_row("ours", 10.0),
        make_row("dense", 40.0, kept=154),
        make_row("chain", 10.0, kept=154),
        make_row("ours", 20.0, kept=154),
        make_row("dense", 40.0, rows=1),
        make_row("chain", 10.0, rows=1),
        make_row("ours", None, rows=1, failed="gate: y: error 1, allowed 0.5", roofline_share=None),
    ]


def test_the_table_has_a_line_per_cell(rows):
    lines = run_table(rows).splitlines()
    assert lines[0].split() == ["case", "ours", "us", "over", "dense", "over", "chain", "roofline", "%"]
    assert lines[2].split() == ["768x3072-r80-k0-m128-float32", "10.0", "4.00x", "2.00x", "50"]
    assert lines[3].split() == ["768x3072-r80-k154-m128-float32", "20.0", "2.00x", "0.50x", "50"]
    assert lines[4].split() == ["768x3072-r80-k0-m1-float32", "-", "-", "-", "-"]


def test_the_summary_counts_cells_with_m_of_16_and_more(rows):
    over_chain, over_dense = summary(rows)
    assert "ours is at least as fast as chain in 1 of 2 cells" in over_chain
    assert "2.00x at kept = 0, 0.50x at kept > 0; least 0.50x" in over_chain
    assert "dense in 2 of 2 cells" in over_dense
    assert failures(rows) == ["768x3072-r80-k0-m1-float32 ours: gate: y: error 1, allowed 0.5"]


def test_a_planted_slowdown_is_named(make_row):
    old = [make_row("ours", 10.0), make_row("chain", 20.0), make_row("ours", 5.0, rows=16)]
    new = [make_row("ours", 11.0), make_row("chain", 20.8), make_row("ours", 4.0, rows=16)]
    result = compare(old, new)
    assert result.compared == 3
    assert result.slower == ["768x3072-r80-k0-m128-float32 ours: 10.0 -> 11.0 us, 1.10x the time"]
    assert result.faster == ["768x3072-r80-k0-m16-float32 ours: 5.0 -> 4.0 us, 0.80x the time"]
    assert compare(old, new, threshold=1.2).slower == []


def test_overlapping_spreads_are_said(make_row):
    new = make_row("ours", 11.0, p20_us=9.0)
    assert compare([make_row("ours", 10.0)], [new]).slower[0].endswith("(spreads overlap)")


def test_a_time_that_is_lost_is_a_loss(make_row):
    result = compare([make_row()], [make_row(median_us=None, failed="gate: y")])
    assert result.slower == ["768x3072-r80-k0-m128-float32 ours: had 10.0 us, now none: gate: y"]


def test_what_only_one_file_has_is_said(make_row):
    result = compare([make_row(), make_row(rank=16)], [make_row(), make_row("chain")])
    assert result.only_old == ["768x3072-r16-k0-m128-float32 ours"]
    assert result.only_new == ["768x3072-r80-k0-m128-float32 chain"]


@pytest.mark.parametrize("change", [{"device": "CPU Other"}, {"threads": 4}, {"dtype": "bfloat16"}])
def test_rows_that_cannot_be_compared_are_refused(make_row, change):
    with pytest.raises(InputError, match=next(iter(change))):
        compare([make_row()], [make_row(**change)])


def test_mixed_devices_are_refused(make_row):
    rows = [make_row(), make_row(device="CPU Other", rows=16)]
    with pytest.raises(InputError, match="both files mix"):
        compare(rows, rows)


def test_the_command_fails_on_a_slowdown(tmp_path, make_row, capsys):
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    append_rows(old, [make_row("ours", 10.0)])
    append_rows(new, [make_row("ours", 11.0)])
    assert main(["compare", str(old), str(new)]) == 1
    assert "slower by over 5 %: 768x3072-r80-k0-m128-float32 ours" in capsys.readouterr().out
    assert main(["compare", str(new), str(old)]) == 0
    assert main(["compare", str(old), str(new), "--threshold", "1.2"]) == 0
    assert main(["compare", str(old), str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_the_command_prints_a_files_table(tmp_path, rows, capsys):
    append_rows(tmp_path / "rows.jsonl", rows)
    assert main(["table", str(tmp_path / "rows.jsonl")]) == 0
    out = capsys.readouterr().out
    assert "CPU Example, 2 threads" in out
    assert "in 1 of 2 cells" in out
