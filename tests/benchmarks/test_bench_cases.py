"""The cells of every set, and their arithmetic."""

from __future__ import annotations

import pytest

from benchmarks.cases import (
    CASE_SETS,
    KEPT_PERCENT,
    LINEAR_RANKS,
    LINEAR_SHAPES,
    AttentionCase,
    EncoderCase,
    FfnCase,
    LinearCase,
    MaskedCase,
    core_cases,
    cpu_cases,
    full_cases,
    parse_slice,
    select,
)
from benchmarks.errors import InputError


def test_the_full_grid_is_every_cell_whose_rank_is_below_both_sides():
    cases = full_cases("float32")
    pairs = sum(rank < min(shape) for shape in LINEAR_SHAPES for rank in LINEAR_RANKS)
    assert len(cases) == pairs * 4 * 7 == 1848
    assert all(case.rank < min(case.in_features, case.out_features) for case in cases)
    assert {case.rank for case in cases if case.in_features == 1024} == {16, 20, 32, 41, 80, 130, 260}


def test_the_cpu_cells_are_forty_and_visit_everything():
    cases = cpu_cases("float32")
    assert len(cases) == len(set(cases)) == 40
    assert {(case.in_features, case.out_features) for case in cases} == set(LINEAR_SHAPES)
    assert {case.rank for case in cases} == set(LINEAR_RANKS)
    assert {case.rows for case in cases} == {1, 16, 128, 512, 1024}
    assert {round(100 * case.kept / case.out_features) for case in cases} == set(KEPT_PERCENT)


def test_the_core_cells_are_about_sixty_and_hold_training_steps():
    cases = core_cases("bfloat16")
    assert 55 <= len(cases) == len(set(cases)) <= 65
    assert {case.direction for case in cases} == {"forward", "forward+backward"}
    assert {1, 16, 512, 65536} <= {case.rows for case in cases}


def test_the_core_blocks_are_bert_base_in_a_few_cells():
    cases = select(["core-blocks"], "bfloat16")
    assert len(cases) == 17
    assert {case.op: case.hidden for case in cases} == {"ffn": 768, "attention": 768, "encoder": 768}
    assert {(case.rank, case.batch, case.length) for case in cases if case.rank in (96, 192)} == {
        (96, 16, 4096),
        (192, 16, 4096),
    }


@pytest.mark.parametrize("name", CASE_SETS)
def test_names_are_unique(name):
    cases = CASE_SETS[name]("float32")
    assert len({str(case) for case in cases}) == len(cases)


def test_forward_counts_by_hand():
    # x [5, 8], down [3 + 2, 8], up [3, 6], bias [6], y [5, 6], kept int32 [2]
    case = LinearCase(8, 6, 3, 2, 5, "bfloat16")
    assert case.flops() == 2 * 5 * (5 * 8 + 3 * 6) == 580
    assert case.bytes() == 2 * (5 * 8 + 5 * 8 + 3 * 6 + 6 + 5 * 6) + 4 * 2 == 276
    assert case.flops("dense") == 2 * 5 * 8 * 6
    assert case.bytes("dense") == 2 * (5 * 8 + 8 * 6 + 6 + 5 * 6)


def test_a_training_step_has_three_times_the_products_and_two_passes_of_bytes():
    forward = LinearCase(8, 6, 3, 2, 5)
    step = LinearCase(8, 6, 3, 2, 5, direction="forward+backward")
    assert step.flops() == 3 * forward.flops()
    parameters = 5 * 8 + 3 * 6 + 6
    # dy, x and the parameters in; dx and the parameters' gradients out.
    assert step.bytes() - forward.bytes() == 4 * (5 * 6 + 2 * 5 * 8 + 2 * parameters) + 4 * 2
    assert step.flops("dense") == 3 * forward.flops("dense")


def test_masked_counts_by_hand():
    # x [5, 8], weight and scores [6, 8] and bias [6] in float32, y [5, 6]
    case = MaskedCase(8, 6, 5, "bfloat16", "forward")
    assert str(case) == "masked-8x6-m5-bfloat16"
    assert case.flops() == case.flops("dense") == 2 * 5 * 8 * 6
    parameters = 4 * (2 * 6 * 8 + 6)
    assert case.bytes() == 2 * (5 * 8 + 5 * 6) + parameters
    assert case.bytes() - case.bytes("dense") == 4 * 6 * 8
    step = MaskedCase(8, 6, 5, "bfloat16")
    assert step.flops() == 3 * case.flops()
    assert step.bytes() - case.bytes() == 2 * (5 * 6 + 2 * 5 * 8) + 2 * parameters
    assert {case.rows for case in select(["masked"], "bfloat16")} == {4096, 16384}
    assert {case.direction for case in select(["cpu-masked", "masked"], "float32")} == {"forward+backward"}
    with pytest.raises(ValueError, match="rows: expected at least 1, got 0"):
        MaskedCase(8, 6, 0)


def test_ffn_counts_by_hand():
    case = FfnCase(hidden=8, intermediate=12, rank=3, batch=2, length=5)
    assert case.rows == 10
    assert case.flops() == 2 * 10 * (8 * 3 + 3 * 12 + 12 * 3 + 3 * 8)
    assert case.bytes() == 4 * (2 * 10 * 8 + 2 * 3 * (8 + 12) + 12 + 8)
    assert case.flops("dense") == 2 * 10 * 2 * 8 * 12


def test_attention_and_encoder_counts_by_hand():
    shared = {"hidden": 8, "rank": 3, "batch": 2, "length": 5}
    attention = AttentionCase(heads=2, **shared)
    # Four weights, and per token and head the products with five keys and five values of four numbers.
    assert attention.flops() == 2 * 10 * 4 * 3 * (8 + 8) + 2 * 10 * 2 * 2 * 5 * 4
    assert attention.flops("dense") == 2 * 10 * 4 * 8 * 8 + 2 * 10 * 2 * 2 * 5 * 4
    assert attention.parameters() == 4 * 3 * 16 + 4 * 8 + 2 * 8
    encoder = EncoderCase(heads=2, intermediate=12, layers=3, **shared)
    ffn = FfnCase(intermediate=12, **shared)
    assert encoder.flops() == 3 * (attention.flops() + ffn.flops())
    assert encoder.parameters() == 3 * (attention.parameters() + ffn.parameters() + 2 * 8)
    assert encoder.bytes() == 4 * (2 * 10 * 8 + encoder.parameters())
    assert str(encoder) == "encoder-8x12-l3-h2-r3-b2x5-float32"
    assert str(attention) == "attention-8x8-h2-r3-b2x5-float32"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"heads": 3}, "heads: expected a divisor of 8, got 3"),
        ({"layers": 0}, "layers: expected at least 1, got 0"),
        ({"intermediate": 0}, "intermediate: expected at least 1"),
        ({"rank": 9}, "rank: expected at least 1, at most 8, got 9"),
    ],
)
def test_bad_blocks_are_refused(change, text):
    case = {"hidden": 8, "rank": 3, "batch": 2, "length": 5, "heads": 2, "intermediate": 12, "layers": 3}
    with pytest.raises(ValueError, match=text):
        EncoderCase(**case | change)


def test_the_encoder_sets_are_bert_and_minilm():
    cases = select(["encoder"], "bfloat16")
    assert {(case.hidden, case.intermediate, case.heads, case.layers) for case in cases} == {
        (768, 3072, 12, 12),
        (384, 1536, 12, 12),
    }
    assert len(select(["cpu-encoder"], "float32")) == 6
    assert {case.op for case in select(["cpu-blocks"], "float32")} == {"ffn", "attention"}


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((8, 6, 6, 0, 5), "rank"),
        ((8, 6, 3, 7, 5), "kept"),
        ((8, 6, 3, 0, 0), "rows"),
        ((8, 6, 3, 0, 5, "int8"), "dtype"),
        ((8, 6, 3, 0, 5, "float32", "backward"), "direction"),
    ],
)
def test_bad_cases_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        LinearCase(*arguments)
    if word == "direction":
        with pytest.raises(ValueError, match="expected forward for ffn"):
            FfnCase(hidden=8, intermediate=12, rank=3, batch=2, length=5, direction="forward+backward")


def test_slices_share_out_every_case():
    every = select(["full"], "float32")
    slices = [select(["full"], "float32", slice_=(i, 7)) for i in range(1, 8)]
    assert sorted(map(str, every)) == sorted(str(case) for part in slices for case in part)
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_selection_by_name_and_direction():
    cases = select(["cpu", "ffn"], "float16", "forward+backward", only="768x3072-r80")
    assert {case.direction for case in cases} == {"forward+backward"}
    assert {(case.op, case.dtype, case.rank) for case in cases} == {("linear", "float16", 80)}
    assert len(select(["cpu", "cpu"], "float32")) == 40


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/0", "-1/3", "1/3/5"])
def test_bad_slices_are_refused(text):
    with pytest.raises(InputError, match="--slice"):
        parse_slice(text)


def test_an_unknown_set_and_an_empty_selection_are_refused():
    with pytest.raises(InputError, match=r"--direction forward\+backward: no case of encoder has it"):
        select(["encoder"], "float32", "forward+backward")
    with pytest.raises(InputError, match="--slice 7/7: there are 6 cases"):
        select(["cpu-encoder"], "float32", slice_=(7, 7))
    with pytest.raises(InputError, match="--cases nightly"):
        select(["nightly"], "float32")
    with pytest.raises(InputError, match="--only nothing"):
        select(["cpu"], "float32", only="nothing")
