"""Factors for the outputs on calibration data: the optimum, the moments behind it, and runs that train nothing."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_bad_input import nothing_written, refused, words
from test_kill import assert_same_run, command, kill_and_resume
from test_processes import run
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lpaf.data import load_task, tokenize
from lpaf.errors import InputError
from lpaf.factorize import InputMoments, SVDFactorizer, rank_for_error, score_row_weights, weighted_spectra
from lpaf.factorize.whitening import DAMPING, input_factor
from lpaf.models.targets import encoder_linears
from lpaf.recipes.calibrate import choose, input_moments
from lpaf.recipes.compress import compress
from lpaf.recipes.options import INDEPENDENT, CompressOptions
from tiny import SMALL, build, questions, sentences, stories, write_model, write_rows, write_text_model

# the optimum ----------------------------------------------------------------------------------------------------------


class Stack(nn.Module):
    """One matrix where the factoriser finds it."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="stack")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight.clone())
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": linear})])


NAME = "layers.0.fc"


def factorize(
    weight: torch.Tensor, x: torch.Tensor | None, rank: int, scores: torch.Tensor | None = None
) -> tuple[torch.Tensor, float]:
    """(A B, reported relative error) of ``weight`` [n, m] for the inputs ``x`` [tokens, m]."""
    model = Stack(weight)
    factorizer = SVDFactorizer(rank, "none" if scores is None else "scores")
    found = factorizer(model, scores if scores is None else {NAME: scores}, x if x is None else moments_of(x))
    layer = model.get_submodule(NAME)
    return (layer.up.mT @ layer.down).detach(), found.errors[NAME]


def moments_of(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {NAME: x.double().mT @ x.double()}


def problem(
    n: int, m: int, tokens: int, seed: int = 0, decay: float = 0.0, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """A random matrix [n, m] and inputs [tokens, m] whose directions shrink by 10^-decay from the first to the last."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, m, dtype=torch.float64, generator=generator)
    x = torch.randn(tokens, m, dtype=torch.float64, generator=generator)
    turn = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64, generator=generator)).Q
    return weight.to(dtype), ((x * torch.logspace(0, -decay, m, dtype=torch.float64)) @ turn).to(dtype)


SHAPES = [(24, 16), (16, 24), (20, 20)]


@pytest.mark.parametrize(("n", "m"), SHAPES)
@pytest.mark.parametrize("decay", [0.0, 3.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_error_of_the_outputs_is_what_the_singular_values_leave(n, m, decay, weighted):
    weight, x = problem(n, m, tokens=100, decay=decay)
    scores = weight.abs().cumsum(0) if weighted else None
    d = score_row_weights(scores).double()[:, None] if weighted else torch.ones(n, 1, dtype=torch.float64)
    values = torch.linalg.svdvals(d * weight @ x.mT)[: min(n, m)]
    given = (None, "none") if scores is None else ({NAME: scores}, "scores")
    spectrum = weighted_spectra(Stack(weight), *given, moments=moments_of(x))[NAME]
    torch.testing.assert_close(spectrum, values, rtol=1e-6, atol=1e-6 * float(values[0]))
    for rank in (1, 5, min(n, m)):
        product, reported = factorize(weight, x, rank, scores)
        found = float((d * ((weight - product) @ x.mT)).norm() / values.norm())
        expected = float(values[rank:].norm() / values.norm())
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)
        assert reported == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_factors_are_those_of_the_triangular_solve(n, m):
    """SVD-LLM's B = S V^T L^-1, where L has an inverse."""
    weight, x = problem(n, m, tokens=100, decay=1.0)
    factor = torch.linalg.cholesky(x.mT @ x)
    u, s, v = torch.linalg.svd(weight @ factor, full_matrices=False)
    b = torch.linalg.solve_triangular(factor, s[:6, None] * v[:6], upper=False, left=False)
    torch.testing.assert_close(factorize(weight, x, 6)[0], u[:, :6] @ b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_no_alternating_least_squares_finds_better_outputs(seed):
    weight, x = problem(12, 15, tokens=60, seed=seed, decay=1.5)
    outputs = weight @ x.mT
    best = float((outputs - factorize(weight, x, 4)[0] @ x.mT).norm())
    a = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for _ in range(400):
        b = torch.linalg.lstsq(x, torch.linalg.lstsq(a, outputs).solution.mT).solution.mT
        a = torch.linalg.lstsq((b @ x.mT).mT, outputs.mT).solution.mT
        assert float((outputs - a @ b @ x.mT).norm()) >= best * (1 - 1e-9)
    assert float((outputs - a @ b @ x.mT).norm()) == pytest.approx(best, rel=1e-4), "the search comes to the optimum"


def test_known_inputs_beat_the_plain_svd_on_them_and_lose_on_others():
    weight, x = problem(24, 16, tokens=100, decay=3.0)
    fitted, plain = factorize(weight, x, 5)[0], factorize(weight, None, 5)[0]
    assert float(((weight - fitted) @ x.mT).norm()) < 0.5 * float(((weight - plain) @ x.mT).norm())
    assert float((weight - fitted).norm()) > float((weight - plain).norm())


def test_white_inputs_give_the_plain_svd():
    weight, _ = problem(24, 16, tokens=1)
    torch.testing.assert_close(factorize(weight, torch.eye(16).double(), 5)[0], factorize(weight, None, 5)[0])


# too few inputs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_beyond_the_tokens_go_to_the_rest_of_the_matrix(dtype):
    """4 tokens of 16 inputs: 4 ranks give their outputs exactly, the other 5 are the plain SVD of what is left."""
    weight, x = problem(24, 16, tokens=4, dtype=dtype)
    product, error = factorize(weight, x, 9)
    basis = torch.linalg.qr((weight @ x.mT).double()).Q
    rest = weight.double() - basis @ (basis.mT @ weight.double())
    expected = torch.linalg.svdvals(rest)[5:].norm()
    assert float((weight - product).norm()) == pytest.approx(float(expected), rel=1e-3)
    assert error < 1e-3
    assert float(((weight - product) @ x.mT).norm()) < 1e-3 * float((weight @ x.mT).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dead_inputs_do_no_harm(dtype):
    """Inputs that are always 0 leave the optimum of the others, and what the matrix makes of them bounded."""
    weight, x = problem(24, 16, tokens=100, decay=1.0, dtype=dtype)
    dead = torch.zeros(16, dtype=torch.bool)
    dead[[2, 11]] = True
    x[:, dead] = 0.0
    product, _ = factorize(weight, x, 5)
    living = factorize(weight[:, ~dead], x[:, ~dead], 5)[0]
    error = float(((weight - product) @ x.mT).norm())
    assert error == pytest.approx(float(((weight[:, ~dead] - living) @ x[:, ~dead].mT).norm()), rel=1e-4)
    assert float(product.norm()) <= float(weight.norm()) * (1 + 1e-6), "a projection of W"


def test_no_inputs_at_all_give_the_plain_svd():
    weight, _ = problem(24, 16, tokens=1)
    silent, error = factorize(weight, torch.zeros(3, 16), 5)
    plain, expected = factorize(weight, None, 5)
    torch.testing.assert_close(silent, plain)
    assert error == pytest.approx(expected)


def test_moment_that_rounding_made_indefinite_is_damped_until_it_has_a_factor():
    _, x = problem(24, 16, tokens=4)
    moment = x.mT @ x - 1e-6 * torch.eye(16).double() * (x.mT @ x).diagonal().mean()
    factor, damping = input_factor(moment)
    assert damping > DAMPING
    assert damping < 1e-4
    scale = moment.diagonal().mean()
    torch.testing.assert_close(factor @ factor.mT, moment + damping * scale * torch.eye(16).double())
    assert input_factor(x.mT @ x)[1] == DAMPING


def test_moment_that_is_not_finite_is_refused():
    weight, x = problem(24, 16, tokens=20)
    x[3, 4] = math.inf
    with pytest.raises(ValueError, match="moment: expected finite values"):
        factorize(weight, x, 5)


@pytest.mark.parametrize("decay", [1.0, 4.0, 7.0])
def test_float32_model_comes_to_the_optimum_of_float64(decay):
    """By the bound of ``weighted_svd``, 1e-4 of the optimal error and 10 eps of the whole, under the damping."""
    weight, x = problem(40, 32, tokens=300, decay=decay, dtype=torch.float32)
    values = torch.linalg.svdvals(weight.double() @ x.double().mT)
    for rank in (4, 16, 28):
        product, _ = factorize(weight, x, rank)
        error = float(((weight.double() - product.double()) @ x.double().mT).norm())
        damping = DAMPING * float(x.double().square().sum()) / x.shape[1]
        best = math.hypot(float(values[rank:].norm()), math.sqrt(damping) * float(weight.norm()))
        assert error - best <= 1e-4 * best + 10 * torch.finfo(torch.float32).eps * float(values.norm())


def test_rank_for_an_error_reaches_it_on_the_outputs():
    weight, x = problem(24, 16, tokens=100, decay=2.0)
    spectrum = weighted_spectra(Stack(weight), moments=moments_of(x))[NAME]
    for error in (0.3, 0.1, 0.01):
        rank = rank_for_error(spectrum, error)
        assert factorize(weight, x, rank)[1] <= error * (1 + 1e-6)
        assert rank == 1 or factorize(weight, x, rank - 1)[1] > error


# the moments ----------------------------------------------------------------------------------------------------------


def batches(lengths: list[int], side: str, seed: int = 0) -> tuple[list[dict], dict]:
    """(every example alone without padding, all of them padded on one side); tokens are below 40."""
    generator = torch.Generator().manual_seed(seed)
    alone = [
        {
            "input_ids": torch.randint(5, 40, (1, length), generator=generator),
            "attention_mask": torch.ones(1, length, dtype=torch.int64),
        }
        for length in lengths
    ]

    def pad(row: torch.Tensor) -> torch.Tensor:
        gap = max(lengths) - row.shape[1]
        return nn.functional.pad(row, (gap, 0) if side == "left" else (0, gap))

    return alone, {name: torch.cat([pad(row[name]) for row in alone]) for name in alone[0]}


def gather(model: nn.Module, examples: list[dict]) -> InputMoments:
    with torch.no_grad(), InputMoments(model, examples[0]) as moments:
        for example in examples:
            model(**example)
    return moments


def assert_same_moments(found: InputMoments, expected: InputMoments) -> None:
    assert found.owners == expected.owners
    assert found.rows == expected.rows
    for name, moment in found.sums.items():
        torch.testing.assert_close(moment, expected.sums[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("model_type", "side"),
    [
        ("bert", "right"),
        ("distilbert", "right"),
        ("electra", "right"),
        ("albert", "right"),
        ("modernbert", "right"),
        ("modernbert", "left"),  # whose rotary positions do not see how much padding stands before
    ],
)
def test_padding_does_not_count(model_type, side):
    model = build(model_type).double().eval()
    alone, together = batches([7, 3, 12, 5], side)
    moments = gather(model, [together])
    assert_same_moments(moments, gather(model, alone))
    calls = 2 if model_type == "albert" else 1  # its layers share their weights
    assert set(moments.rows.values()) == {27 * calls}
    assert moments.owners.keys() == encoder_linears(model).keys()


def test_moment_is_the_sum_over_the_inputs():
    model = build("bert").double().eval()
    alone, together = batches([7, 3, 12, 5], "right")
    seen: dict[str, list] = {name: [] for name in encoder_linears(model)}
    for name, linear in encoder_linears(model).items():
        linear.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
    with torch.no_grad():
        for example in alone:
            model(**example)
    expected = {name: torch.cat(inputs).mT @ torch.cat(inputs) for name, inputs in seen.items()}
    found = gather(model, [together]).by_linear()
    assert found.keys() == expected.keys()
    for name, moment in found.items():
        torch.testing.assert_close(moment, expected[name], rtol=1e-9, atol=1e-9)


def test_linears_that_share_an_input_share_the_moment():
    moments = gather(build("bert").eval(), batches([7, 3], "right")[0])
    found = moments.by_linear()
    assert len(moments.sums) == 2 * 4
    first = "bert.encoder.layer.0.attention.self."
    assert found[f"{first}query"] is found[f"{first}key"] is found[f"{first}value"]
    assert moments.bytes == 8 * 2 * (3 * SMALL["hidden_size"] ** 2 + SMALL["intermediate_size"] ** 2)
    assert not any(module._forward_pre_hooks for module in moments.model.modules()), "no hook is left behind"


@pytest.mark.parametrize("model_type", ["deberta-v2", "deberta"])
def test_linears_of_positions_see_them_whole(model_type):
    model = build(model_type).double().eval()
    alone, together = batches([7, 3, 12, 5], "right")
    moments = gather(model, [together])
    linears = encoder_linears(model)
    assert moments.owners.keys() == linears.keys()
    assert all(moments.rows[owner] >= 1 for owner in moments.owners.values())
    value = next(name for name in linears if name.endswith(("value_proj", "in_proj")))
    owner = moments.owners[value]
    torch.testing.assert_close(moments.sums[owner], gather(model, alone).sums[owner], rtol=1e-9, atol=1e-9)
    assert moments.rows[owner] == 27


@pytest.mark.parametrize("masked", ["decoder_attention_mask", "labels"])
@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_decoders_have_their_own_padding_and_the_encoders_for_what_they_take_from_it(model_type, masked):
    small = {"vocab_size": 40, "d_model": 16, "pad_token_id": 0, "dropout": 0.0, "decoder_start_token_id": 2}
    if model_type == "bart":
        small |= {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        small |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20}
    else:
        small |= {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 24}
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(model_type, **small))
    model = model.double().eval()
    alone, together = batches([9, 4, 6], "right")
    short, padded = batches([3, 9, 2], "right", seed=1)  # as long as the sources at the longest
    for batch, target in zip([*alone, together], [*short, padded], strict=True):
        batch["labels"] = target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)
        if masked == "decoder_attention_mask":
            batch |= {masked: target["attention_mask"]}
    moments = gather(model, [together])
    assert_same_moments(moments, gather(model, alone))
    crossing = [
        name for name in moments.owners if re.search(r"(encoder_attn|EncDecAttention)\.(k|v|k_proj|v_proj)$", name)
    ]
    assert len(crossing) == 2 * 2
    assert len({moments.owners[name] for name in crossing}) == 1, "all layers take the same tensor"
    for name, owner in moments.owners.items():
        own = ".decoder." not in f".{name}" or name in crossing
        assert moments.rows[owner] == (19 if own else 14), name


@pytest.fixture(scope="module")
def mood(tmp_path_factory) -> Path:
    """Folder of a model, data, and a calibration file without labels.

    The model is random, but its matrices do something, and as in trained ones some of their inputs are large.
    """
    folder = tmp_path_factory.mktemp("mood")
    write_rows(folder / "data" / "train.jsonl", sentences(96, seed=1))
    write_rows(folder / "data" / "validation.jsonl", sentences(40, seed=2))
    write_rows(folder / "calibration.jsonl", [{"sentence": row["sentence"]} for row in sentences(60, seed=3)])
    source = write_model(folder / "source")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(source, label2id={"0": 0, "1": 1})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter.copy_(torch.logspace(0.5, -1, len(parameter)))
            elif parameter.dim() == 2 and "embeddings" not in name:
                parameter.mul_(10)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "model")
    return folder


def untrained(mood: Path, output: Path, **changes) -> CompressOptions:
    """A run that trains nothing and reads no training file."""
    given = {
        "model": str(mood / "model"), "task": "text-classification", "output": str(output), "method": "svd", "rank": 4,
        "validation_file": str(mood / "data" / "validation.jsonl"), "calibration": str(mood / "calibration.jsonl"),
        "finetune_epochs": 0, "retrain_epochs": 0, "batch_size": 16, "bench_batch": 2, "bench_length": 16,
        "max_length": 16,
    }  # fmt: skip
    return CompressOptions(**given | changes)


def test_examples_are_chosen_by_the_seed(mood):
    data = load_task("text-classification", data_dir=mood / "data")
    encoded = tokenize(data.train, AutoTokenizer.from_pretrained(mood / "model"), data.spec, 16)

    def chosen(**changes) -> list:
        return list(choose(encoded, untrained(mood, Path("out"), **changes))["input_ids"])

    assert chosen() == list(encoded["input_ids"]), "256 by default"
    some = chosen(calibration_samples=20)
    assert len(some) == 20
    assert some == chosen(calibration_samples=20) != chosen(calibration_samples=20, seed=1)
    places = [list(encoded["input_ids"]).index(ids) for ids in some]
    assert places == sorted(places)
    with pytest.raises(InputError, match=r"--calibration .*: holds no token"):
        choose(encoded.select([]), untrained(mood, Path("out")))


def test_batches_change_nothing_but_the_order_of_the_sum(mood):
    data = load_task("text-classification", data_dir=mood / "data")
    tokenizer = AutoTokenizer.from_pretrained(mood / "model")
    encoded = tokenize(data.train, tokenizer, data.spec, 16)
    model = AutoModelForSequenceClassification.from_pretrained(mood / "model").double().train()
    whole, record = input_moments(model, encoded, tokenizer, "classification", batch_size=96)
    parts, same = input_moments(model, encoded, tokenizer, "classification", batch_size=7)
    assert model.training, "dropout was off meanwhile, and is on again"
    assert record == same
    assert (record["examples"], record["tokens"]) == (96, sum(encoded["length"]))
    for name, moment in whole.items():
        torch.testing.assert_close(parts[name], moment, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def logits_error(mood: Path, output: Path) -> float:
    """Mean squared distance of the logits on the validation sentences from those of the dense model."""
    tokenizer = AutoTokenizer.from_pretrained(mood / "model")
    texts = [json.loads(line)["sentence"] for line in (mood / "data" / "validation.jsonl").open()]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    dense, small = (
        AutoModelForSequenceClassification.from_pretrained(path).eval() for path in (mood / "model", output)
    )
    return float((dense(**inputs).logits - small(**inputs).logits).square().mean())


@pytest.mark.parametrize("size", [{"rank": 2}, {"rank": 6}, {"rank": "auto", "ratio": 0.3}])
def test_calibrated_factors_give_the_dense_logits_better_without_any_training(mood, tmp_path, size):
    distances = {}
    for name, calibration in {"plain": None, "calibrated": str(mood / "calibration.jsonl")}.items():
        _, report = compress(untrained(mood, tmp_path / name, calibration=calibration, **{"rank": None} | size))
        assert report["training"] == {}
        assert not {"finetune", "teacher", "retrain"} & report["seconds"].keys()
        assert report["metric"]["factorized"] == report["metric"]["compressed"]
        assert report["data"]["train"] == 0
        distances[name] = logits_error(mood, tmp_path / name)
    assert distances["calibrated"] < 0.7 * distances["plain"]


def test_report_and_card_say_what_was_used(mood, tmp_path):
    _, report = compress(untrained(mood, tmp_path / "out", calibration_samples=50))
    found = report["calibration"]
    assert found["source"] == str(mood / "calibration.jsonl")
    assert (found["examples"], found["moments"], found["short_of_tokens"]) == (50, 8, 0)
    assert found["bytes"] == 8 * 2 * (3 * 32**2 + 64**2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "without training" in card
    assert f"on 50 examples of `{mood / 'calibration.jsonl'}` ({found['tokens']} tokens)" in card


def test_few_tokens_are_reported(mood, tmp_path, capsys):
    _, report = compress(untrained(mood, tmp_path / "out", calibration_samples=1))
    assert 0 < report["calibration"]["tokens"] < 16
    assert report["calibration"]["short_of_tokens"] == 12
    assert "12 of 12 matrices have more inputs than there are tokens" in capsys.readouterr().err


def test_training_set_calibrates_as_a_file_of_it_does(mood, tmp_path):
    for name, options in {
        "file": {"calibration": str(mood / "data" / "train.jsonl")},
        "set": {"calibration": "train", "data_dir": str(mood / "data"), "validation_file": None},
    }.items():
        compress(untrained(mood, tmp_path / name, **options))
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("file", "set"))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_pruned_matrices_are_fitted_with_their_row_weights(mood, tmp_path):
    """--weighting and --calibration together, then retraining: errors are those of D (W - A B) L."""
    _, report = compress(
        untrained(
            mood, tmp_path / "out", method="lpaf", validation_file=None, data_dir=str(mood / "data"), rank=None,
            rank_error=0.5, force=True, prune_epochs=2, retrain_epochs=1, checkpoint_steps=0,
        )
    )  # fmt: skip
    assert report["config"]["weighting"] == "scores"
    assert report["training"].keys() == {"prune", "retrain"}
    for name, entry in report["rank"]["per_matrix"].items():
        assert 0 < entry["error"] <= 0.5 * (1 + 1e-4), name
        assert entry["compressed"] < min(entry["shape"])


def test_questions_calibrate(mood, tmp_path):
    """Windows of several lengths, and answers as in training."""
    for name, seed in (("validation", 4), ("calibration", 5)):
        write_rows(tmp_path / f"{name}.jsonl", questions(30, seed))
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(mood / "source")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(mood / "source").save_pretrained(tmp_path / "model")
    options = {
        "model": str(tmp_path / "model"), "task": "question-answering", "max_length": 24, "doc_stride": 6,
        "validation_file": str(tmp_path / "validation.jsonl"), "calibration": str(tmp_path / "calibration.jsonl"),
        "calibration_samples": 40,
    }  # fmt: skip
    _, report = compress(untrained(mood, tmp_path / "out", **options))
    assert report["calibration"]["examples"] == 40, "windows, of which there are more than questions"


def test_updates_of_pruning_go_to_retraining_only_where_there_is_some(mood, tmp_path):
    options = {"data_dir": str(mood / "data"), "validation_file": None, "calibration": None, "prune_epochs": 2.0}
    _, report = compress(untrained(mood, tmp_path / "some", retrain_epochs=1, checkpoint_steps=0, **options))
    assert report["training"]["retrain"][-1]["epoch"] == 3.0


def test_stages_before_do_not_depend_on_calibration():
    for stage, independent in INDEPENDENT.items():
        assert {"calibration", "calibration_samples"} <= set(independent), stage


@pytest.mark.parametrize(("model_type", "task"), [("gpt2", "language-modeling"), ("bart", "summarization")])
def test_texts_calibrate(tmp_path, model_type, task):
    """Blocks of a text file, and summaries, whose tokens are what enters the decoder."""
    model = write_text_model(tmp_path / "model", model_type)
    file = tmp_path / "calibration.txt"
    if task == "summarization":
        file = write_rows(tmp_path / "calibration.jsonl", stories(20, seed=1))
    else:
        file.write_text(" ".join(row["text"] for row in stories(40, seed=1)))
    write_rows(tmp_path / "validation.jsonl", stories(10, seed=2))
    _, report = compress(
        untrained(
            tmp_path, tmp_path / "out", model=str(model), task=task, max_length=20, calibration=str(file),
            calibration_samples=15, validation_file=str(tmp_path / "validation.jsonl"),
        )
    )  # fmt: skip
    found, linears = report["calibration"], report["rank"]["per_matrix"]
    assert found["examples"] == 15
    assert found["moments"] == {"gpt2": 2 * 4, "bart": 2 * 4 + 2 * 6 + 1}[model_type]
    assert all(0 < entry["error"] < 1 for entry in linears.values())


def test_summaries_have_the_mask_of_their_own_tokens(tmp_path):
    """The batches of the pipeline, in which the decoder's inputs are made of labels padded with -100."""
    source = write_text_model(tmp_path / "model", "bart")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(source).double()
    tokenizer = AutoTokenizer.from_pretrained(source)
    file = write_rows(tmp_path / "validation.jsonl", [row | {"summary": row["text"]} for row in stories(6, seed=3)])
    file.write_text(file.read_text() + json.dumps({"text": "the film is good and a warm story", "summary": "good"}))
    data = load_task("summarization", validation_file=file, evaluation_only=True)
    encoded = tokenize(data.validation["validation"], tokenizer, data.spec, 20)
    whole, record = input_moments(model, encoded, tokenizer, "summarization", batch_size=7)
    alone, _ = input_moments(model, encoded, tokenizer, "summarization", batch_size=1)
    for name, moment in whole.items():
        torch.testing.assert_close(alone[name], moment, rtol=1e-9, atol=1e-9, msg=name)
    assert record["tokens"] == max(sum(map(len, encoded["labels"])), sum(encoded["length"]))


# refusals -------------------------------------------------------------------------------------------------------------

FILE = "calibration.jsonl"
REFUSED = {
    "no such file": ({"--calibration": "/no/such.jsonl"}, None, ("--calibration /no/such.jsonl", "no such file")),
    "unknown kind of file": ({"--calibration": "/no/such.xyz"}, None, ("--calibration /no/such.xyz", ".jsonl")),
    "empty file": ({}, "", ("--calibration", FILE, "is empty")),
    "other columns": ({}, '{"words": "a"}\n', ("--calibration", FILE, "no column 'text'", "sentence")),
    "columns of pairs": (
        {},
        '{"sentence1": "a", "sentence2": "b"}\n',
        ("--calibration", FILE, "sentence1, sentence2", "those of the validation data are sentence;"),
    ),
    "a row without text": ({}, '{"sentence": "a"}\n{"sentence": 3}\n', ("--calibration", "line 2", "int")),
    "no number of samples": ({"--calibration-samples": "0"}, None, ("--calibration-samples 0", "above 0")),
    "samples of nothing": (
        {"--calibration": None, "--calibration-samples": "8"},
        None,
        ("--calibration-samples 8", "pass --calibration FILE"),
    ),
    "layers left out": (
        {"--method": "truncate", "--rank": None, "--ratio": "0.5"},
        None,
        ("--calibration", "--method truncate factorises nothing"),
    ),
    "teacher of fewer layers": (
        {"--method": "kd", "--rank": None, "--ratio": "0.5"},
        None,
        ("--calibration", "--method kd factorises nothing"),
    ),
    "rate of no retraining": ({"--retrain-lr": "1e-3"}, None, ("--retrain-lr", "--retrain-epochs 0")),
    "paths of no retraining": (
        {"--method": "lpaf", "--no-mixed-rank": True},
        None,
        ("--no-mixed-rank", "--retrain-epochs 0"),
    ),
    "updates that go nowhere": ({"--prune-epochs": "5"}, None, ("--prune-epochs", "--retrain-epochs 0")),
    "training set without training": ({"--calibration": "train"}, None, ("--validation-file", "--train-file")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_calibration_is_refused(name, mood, capsys, tmp_path):
    changes, content, fragments = REFUSED[name]
    file = tmp_path / FILE
    file.write_text('{"sentence": "good film"}\n' if content is None else content)
    options = {
        "--model": mood / "model", "--task": "text-classification", "--output": tmp_path / "out", "--method": "svd",
        "--validation-file": mood / "data" / "validation.jsonl", "--calibration": file, "--rank": "4",
        "--finetune-epochs": "0", "--retrain-epochs": "0",
    }  # fmt: skip
    given = {key: value for key, value in (options | changes).items() if value is not None}
    refused(capsys, ["compress", *words(given)], *fragments)
    nothing_written(tmp_path, {FILE})


def test_model_whose_activations_are_not_finite_is_refused(mood):
    data = load_task("text-classification", data_dir=mood / "data")
    tokenizer = AutoTokenizer.from_pretrained(mood / "model")
    encoded = tokenize(data.train, tokenizer, data.spec, 16)
    model = AutoModelForSequenceClassification.from_pretrained(mood / "model")
    encoder_linears(model)["bert.encoder.layer.0.intermediate.dense"].bias.data[3] = math.inf
    with pytest.raises(InputError, match=r"--calibration: what enters bert.encoder.layer.0.output.dense is not finite"):
        input_moments(model, encoded, tokenizer, "classification", batch_size=16)


# a real language model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def story_teller(tmp_path_factory) -> Path:
    """Folder of a small Llama and of stories that it tells, by different seeds for calibration and evaluation."""
    shared = Path(os.environ.get("LPAF_TEST_DATA", Path(__file__).parents[3] / "shared")) / "models" / "stories260K"
    if not shared.is_dir():
        pytest.skip("no story teller; point LPAF_TEST_DATA at a folder with models/stories260K/stories260K.bin")
    root = Path(__file__).parents[2]
    output = tmp_path_factory.mktemp("stories")
    words = [sys.executable, "-m", "benchmarks.studies.stories", "--samples", "60", "--output", output]
    words += ["--bin", shared / "stories260K.bin", "--tokenizer", shared / "tok512.bin"]
    subprocess.run([str(word) for word in words], cwd=root, check=True, capture_output=True)
    return output


@pytest.mark.slow
def test_calibration_lowers_the_perplexity_of_a_language_model(story_teller, tmp_path, monkeypatch):
    """No training and no training file; a rank of its own for each matrix."""
    monkeypatch.setattr("lpaf.report.write.render_html", lambda *_: "")  # its pictures take longer than the run
    data = story_teller / "data"
    for ratio in (0.8, 0.6, 0.4):
        perplexity = {}
        for given in ({}, {"calibration": str(data / "train.txt"), "calibration_samples": 40}):
            options = CompressOptions(
                model=str(story_teller / "model"), task="language-modeling", output=str(tmp_path / "out"),
                validation_file=str(data / "validation.txt"), method="svd", rank="auto", ratio=ratio,
                finetune_epochs=0, retrain_epochs=0, bench_batch=1, bench_length=16, overwrite=True, **given,
            )  # fmt: skip
            _, report = compress(options)
            assert report["metric"]["dense"] < 6.0, "the model's own stories"
            assert report["encoder_params"]["ratio"] == pytest.approx(ratio, abs=1e-3)
            perplexity[bool(given)] = report["metric"]["compressed"]
        assert perplexity[True] < 0.5 * perplexity[False], ratio


# processes and death --------------------------------------------------------------------------------------------------


def words_of(mood: Path, output: Path) -> list[str]:
    more = {"calibration": mood / FILE, "retrain-epochs": 1, "rank": 4, "finetune-epochs": 0}
    return command(mood / "model", mood / "data", output, "--method", "svd", **more)


@pytest.fixture(scope="module")
def alone(mood, tmp_path_factory) -> Path:
    """Folder of the output of one undisturbed process, and of what its stages left."""
    folder = tmp_path_factory.mktemp("alone")
    run(words_of(mood, folder / "out"), folder / "out", probe="stages")
    return folder


def test_two_processes_find_the_factors_of_one(alone, mood, tmp_path):
    run(words_of(mood, tmp_path / "out"), tmp_path / "out", processes=2, probe="stages")
    one = load_file(alone / "stages" / "before-retrain-0.safetensors")
    both = [load_file(tmp_path / "stages" / f"before-retrain-{process}.safetensors") for process in (0, 1)]
    assert one.keys() == both[0].keys()
    assert [name for name in one if not torch.equal(both[0][name], both[1][name])] == []
    factors = [name for name in one if name.endswith((".down", ".up"))]
    assert len(factors) == 2 * 12
    for name in factors:
        torch.testing.assert_close(both[0][name], one[name], rtol=1e-4, atol=1e-5)
    first, second = (json.loads((folder / "out" / "report.json").read_text()) for folder in (alone, tmp_path))
    assert first["calibration"] == second["calibration"]


@pytest.mark.parametrize("death", ["factorize", "retrain"])
def test_killed_run_calibrates_again_to_the_same_weights(alone, mood, tmp_path, death):
    kill_and_resume(words_of(mood, tmp_path / "out"), tmp_path / "out", death)
    assert_same_run(tmp_path / "out", alone / "out")
