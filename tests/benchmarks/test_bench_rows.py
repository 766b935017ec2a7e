"""Rows survive, and an interrupted run goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import run
from benchmarks.cases import LinearCase, case_name
from benchmarks.environment import Ceilings, describe
from benchmarks.errors import InputError
from benchmarks.measure import Measurement, Session
from benchmarks.providers import choose
from benchmarks.rows import append_rows, cell_name, latest, read_rows

CPU = torch.device("cpu")
CASES = [LinearCase(16, 24, 4, kept, 8) for kept in (0, 2, 3)]


@pytest.fixture
def session():
    return Session(CPU, describe(CPU), Ceilings(1e10, 1e11), choose(["chain", "ours"], CPU, {}))


def test_rows_come_back_as_they_were_and_are_only_added_to(tmp_path, make_row):
    path = tmp_path / "new" / "rows.jsonl"
    first, second = make_row(), make_row("chain", None, failed="gate: y")
    append_rows(path, [first])
    before = path.read_bytes()
    append_rows(path, [second])
    assert path.read_bytes().startswith(before)
    assert read_rows(path) == [first, second]


def test_what_an_interrupted_write_left_is_no_row(tmp_path, make_row):
    path = tmp_path / "rows.jsonl"
    append_rows(path, [make_row()])
    with path.open("a") as file:
        file.write('{"op": "lin')
    assert read_rows(path) == [make_row()]
    append_rows(path, [make_row("chain")])
    assert read_rows(path) == [make_row(), make_row("chain")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no rows"),
        ("{}\n", "line 1.*lacks op"),
        ("[1]\n", "line 1.*lacks everything"),
        ("not json\n", "line 1: not JSON"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, words):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_rows(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_rows(tmp_path / "none.jsonl")


def test_a_row_has_its_cases_name(make_row):
    row = make_row()
    assert cell_name(row) == "768x3072-r80-k0-m128-float32"
    ffn = {"in": 768, "out": 3072, "rank": 96, "batch": 16, "length": 128}
    assert case_name("ffn", ffn, "bfloat16", "forward") == "ffn-768x3072-r96-b16x128-bfloat16"


def test_of_a_cell_the_last_run_counts_whole(make_row):
    old = [make_row("ours", 5.0), make_row("chain", 6.0)]
    new = [make_row("ours", 7.0, run="b")]
    ((_, providers),) = latest(old + new).items()
    assert {name: row["median_us"] for name, row in providers.items()} == {"ours": 7.0}


def test_an_interrupted_run_keeps_what_it_finished_and_resume_does_the_rest(tmp_path, session, monkeypatch):
    path = tmp_path / "rows.jsonl"

    class Interrupted(Measurement):
        def __init__(self, case, session):
            if case == CASES[2]:
                raise KeyboardInterrupt
            super().__init__(case, session)

    with monkeypatch.context() as patch:
        patch.setattr(run, "Measurement", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.run_cases(CASES, session, path, 0.01, say=lambda line: None)
    assert len(read_rows(path)) == 4
    assert run.pending(CASES, path, session) == [CASES[2]]
    run.run_cases(run.pending(CASES, path, session), session, path, 0.01, say=lambda line: None)
    assert len(read_rows(path)) == 6
    assert run.pending(CASES, path, session) == []


def test_resume_does_not_take_another_codes_rows_or_fewer_providers(tmp_path, session):
    path = tmp_path / "rows.jsonl"
    rows = run.run_cases(CASES[:1], session, path, 0.01, say=lambda line: None)
    more = Session(CPU, session.environment, session.ceilings, choose(["dense", "chain", "ours"], CPU, {}))
    assert run.pending(CASES[:1], path, more) == CASES[:1]
    path.write_text("".join(json.dumps(row | {"commit": "other"}) + "\n" for row in rows))
    assert run.pending(CASES[:1], path, session) == CASES[:1]


def test_a_budget_ends_a_run_between_cases(tmp_path, session, monkeypatch):
    said = []
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(run.time, "monotonic", lambda: float(next(clock)))
    rows = run.run_cases(CASES, session, tmp_path / "rows.jsonl", 0.01, budget=25, say=said.append)
    assert {row["kept"] for row in rows} == {0}
    assert any("2 of 3 cases left" in line for line in said)
