"""Fisher information: exact squared gradients of single examples, the file they are kept in, and --method fwsvd."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_bad_input import nothing_written, refused, words
from test_kill import assert_same_run, command, kill_and_resume
from test_processes import run
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lpaf.data import load_task, tokenize
from lpaf.data.tasks import TOKEN_PROBLEMS
from lpaf.errors import InputError
from lpaf.factorize import FISHER_TRANSFORMS, RowFisher, SVDFactorizer, fisher_row_weights, transform_fisher
from lpaf.factorize.fisher import ENTRIES, Use, examples_separate, fisher_weights, row_squares, short
from lpaf.models.checkpoint import load_dense
from lpaf.models.outputs import forward_inputs
from lpaf.models.targets import encoder_linears
from lpaf.recipes import compress as compress_run
from lpaf.recipes import study as study_recipe
from lpaf.recipes.compress import Compression
from lpaf.recipes.fisher import METADATA, load_fisher, row_fisher, save_fisher
from lpaf.recipes.options import CompressOptions
from lpaf.recipes.prepare import prepare
from lpaf.retrain.batches import Collator
from lpaf.retrain.objective import example_losses
from lpaf_kernels.ops.weighted_svd import ROW_WEIGHT_FLOOR, weighted_svd_reference
from tiny import (
    SMALL,
    build,
    questions,
    sentences,
    stories,
    write_masked_model,
    write_model,
    write_rows,
    write_text_model,
)

Batch = dict[str, torch.Tensor]

# exact gradients ------------------------------------------------------------------------------------------------------

LENGTHS = (7, 3, 12, 5)


def masked_language_model() -> nn.Module:
    """Of 40 words, the output tied to the word embeddings."""
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL))


def padded(rows: list[torch.Tensor], value: int) -> torch.Tensor:
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


class Problem:
    """A tiny model in float64, examples of several lengths, and the losses that transformers gives them."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float64) -> None:
        self.kind = kind
        self.model = (masked_language_model() if kind == "masked" else build(kind)).to(dtype).eval()
        generator = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(5, 40, (length,), generator=generator) for length in LENGTHS]
        if kind == "masked":
            chosen = [torch.rand(length, generator=generator) < 0.5 for length in LENGTHS]
            for some in chosen:
                some[0] = True
            self.labels = [ids.masked_fill(~some, -100) for ids, some in zip(self.ids, chosen, strict=True)]
        elif self.causal:
            self.labels = [torch.cat((ids[1:], torch.tensor([-100]))) for ids in self.ids]
        elif self.model.config.is_encoder_decoder:
            self.labels = [ids[: length // 2 + 1] for ids, length in zip(self.ids, LENGTHS, strict=True)]
        else:
            self.labels = [torch.tensor(index % 2) for index in range(len(LENGTHS))]

    @property
    def causal(self) -> bool:
        return type(self.model).__name__.endswith(("ForCausalLM", "LMHeadModel"))

    def batch(self, *places: int) -> Batch:
        labels = [self.labels[place] for place in places]
        return {
            "input_ids": padded([self.ids[place] for place in places], 0),
            "attention_mask": padded([torch.ones_like(self.ids[place]) for place in places], 0),
            "labels": padded(labels, -100) if labels[0].dim() else torch.stack(labels),
        }

    def losses(self, batch: Batch) -> torch.Tensor:
        outputs = self.model(**forward_inputs(self.model, batch))
        return example_losses(outputs.logits, batch["labels"], "classification")

    def loss(self, place: int) -> torch.Tensor:
        """transformers' own loss of one example, a mean over its labels, times their number. That of causal models
        rounds to float32."""
        batch = self.batch(place)
        if self.causal:
            logits = self.model(self.ids[place][None]).logits[0]
            return nn.functional.cross_entropy(logits[:-1], self.ids[place][1:], reduction="sum")
        return self.model(**batch).loss * (batch["labels"] != -100).sum()


def one_by_one(model: nn.Module, losses: list[Callable[[], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Row sums of the squared gradients, by one backward pass for each loss."""
    weights = fisher_weights(model)
    sums = {name: torch.zeros(len(weight), dtype=torch.float64) for name, weight in weights.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss(), list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.double().square().sum(dim=1)
    return sums


def assert_same_rows(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float) -> None:
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert bool(rows.any()), name
        apart = (found[name] - rows).abs().max() / rows.max()
        assert float(apart) <= rtol, name


#: bert: word embeddings apart; masked, gpt2 and t5: tied to the output; albert: layers that share their weights; opt:
#: rows of all examples in one dimension; bart: two stacks
SEPARATE = ("bert", "distilbert", "albert", "modernbert", "masked", "gpt2", "opt", "llama", "bart", "t5")


@pytest.mark.parametrize("kind", SEPARATE)
def test_row_sums_are_those_of_one_backward_pass_per_example(kind):
    problem = Problem(kind)
    expected = one_by_one(problem.model, [lambda place=place: problem.loss(place) for place in range(4)])
    with RowFisher(problem.model, problem.losses) as fisher:
        first = fisher.add(problem.batch(0, 1, 2))
        last = fisher.add(problem.batch(3))
    assert fisher.examples == 4
    assert_same_rows(fisher.sums, expected, rtol=1e-9)
    losses = torch.stack([problem.loss(place) for place in range(4)])
    torch.testing.assert_close(torch.cat((first, last)).double(), losses.detach(), rtol=1e-6, atol=1e-6)
    with RowFisher(problem.model, problem.losses, batched=False) as single:
        for place in range(4):
            single.add(problem.batch(place))
    assert_same_rows(single.sums, expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["bert", "masked", "gpt2"])
def test_float32_rounds_and_no_more(kind):
    problem = Problem(kind, torch.float32)
    exact = Problem(kind)
    exact.model.load_state_dict(problem.model.state_dict())
    with RowFisher(problem.model, problem.losses) as fisher:
        fisher.add(problem.batch(0, 1, 2, 3))
    expected = one_by_one(exact.model, [lambda place=place: exact.loss(place) for place in range(4)])
    assert_same_rows(fisher.sums, expected, rtol=1e-4)


def test_squares_are_of_examples_and_not_of_the_batch():
    """Two examples with opposite labels: their gradients nearly cancel, their squares add up."""
    problem = Problem("bert")
    problem.ids[1], problem.labels = problem.ids[0], [torch.tensor(0), torch.tensor(1)]
    with RowFisher(problem.model, problem.losses) as fisher:
        fisher.add(problem.batch(0, 1))
    batch = one_by_one(problem.model, [lambda: problem.losses(problem.batch(0, 1)).sum()])
    single = one_by_one(problem.model, [lambda: problem.losses(problem.batch(0)).sum()])
    for name, rows in fisher.sums.items():
        assert float(rows.sum()) > float(single[name].sum()), name
        assert float(batch[name].sum()) < 0.1 * float(rows.sum()), name


def test_tokens_have_information_only_where_they_are_read():
    problem = Problem("bert")
    with RowFisher(problem.model, problem.losses) as fisher:
        fisher.add(problem.batch(0, 1))
    rows = fisher.sums["bert.embeddings.word_embeddings"]
    assert rows.shape == (40,)
    assert set(rows.nonzero().flatten().tolist()) == set(torch.cat(problem.ids[:2]).tolist())


@pytest.mark.parametrize("kind", ["masked", "gpt2"])
def test_tied_embeddings_add_both_uses_before_they_are_squared(kind):
    """The cross terms of reading and of predicting count."""
    problem = Problem(kind)
    name = next(iter(fisher_weights(problem.model)))
    with RowFisher(problem.model, problem.losses) as fisher:
        fisher.add(problem.batch(0, 1, 2, 3))
    output = problem.model.get_output_embeddings()
    output.weight = nn.Parameter(output.weight.detach().clone())
    reading = one_by_one(problem.model, [lambda p=p: problem.loss(p) for p in range(4)])[name]
    predicting = torch.zeros_like(reading)
    for place in range(4):
        predicting += torch.autograd.grad(problem.loss(place), output.weight)[0].square().sum(dim=1)
    apart = fisher.sums[name] - reading - predicting
    assert float(apart.abs().max()) > 1e-3 * float(fisher.sums[name].max())


def test_gradients_are_squared_in_slices(monkeypatch):
    """Of rows, where all of a matrix would take too much memory."""
    generator = torch.Generator().manual_seed(0)
    x, g, e = (torch.randn(3, 5, width, generator=generator, dtype=torch.float64) for width in (4, 7, 4))
    ids = torch.randint(0, 7, (3, 5), generator=generator)
    gradient = g.mT @ x
    for example in range(3):
        gradient[example].index_add_(0, ids[example], e[example])
    uses = [Use(x, None, g), Use(ids, None, e)]
    expected = gradient.square().sum((0, 2))
    for entries in (1, 3 * 4 * 3, ENTRIES):
        monkeypatch.setattr("lpaf.factorize.fisher.ENTRIES", entries)
        torch.testing.assert_close(row_squares(uses, 3, (7, 4)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_short_examples_need_no_gradients(dtype, monkeypatch):
    """Products of positions give the same rows, also where the positions of an example all but cancel."""
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(4, 6, width, generator=generator, dtype=torch.float64) for width in (90, 70))
    x[:, 1:] = x[:, :1] + 1e-3 * x[:, 1:]
    g[..., :40] -= g[..., :40].mean(dim=1, keepdim=True)
    g, x = g.to(dtype), x.to(dtype)
    uses = [Use(x[:, :2], None, g[:, :2]), Use(x[:, 2:], None, g[:, 2:])]
    expected = (g.double().mT @ x.double()).square().sum((0, 2))
    assert float(expected[:40].max()) < 1e-4 * float(expected[40:].min())
    assert short(6, (90, 70))
    assert not short(20, (90, 70))
    torch.testing.assert_close(row_squares(uses, 4, (90, 70)), expected, rtol=1e-8, atol=0.0)
    monkeypatch.setattr("lpaf.factorize.fisher.short", lambda *_: False)
    rounding = 1e-4 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(row_squares(uses, 4, (90, 70))[40:], expected[40:], rtol=rounding, atol=0.0)


@pytest.mark.parametrize("kind", ["deberta-v2", "gemma"])
def test_models_whose_examples_share_inputs_or_scale_outputs_are_found_out(kind):
    """Positions of all examples at once; word embeddings whose module multiplies them."""
    problem = Problem(kind)
    alone = [problem.batch(place) for place in (1, 2)]
    assert not examples_separate(problem.model, problem.losses, problem.batch(1, 2), alone)
    with RowFisher(problem.model, problem.losses, batched=False) as fisher:
        for place in range(4):
            fisher.add(problem.batch(place))
    expected = one_by_one(problem.model, [lambda p=p: problem.loss(p) for p in range(4)])
    assert_same_rows(fisher.sums, expected, rtol=1e-6)  # DeBERTa's own loss is of float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["bert", "masked", "t5"])
def test_models_whose_batches_tell_examples_apart_are_known(kind, dtype):
    problem = Problem(kind, dtype)
    alone = [problem.batch(place) for place in (1, 2)]
    assert examples_separate(problem.model, problem.losses, problem.batch(1, 2), alone)


def test_model_is_left_as_it_was():
    problem = Problem("bert")
    embeddings = problem.model.get_input_embeddings()
    embeddings.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in problem.model.named_parameters()}
    for batched in (True, False):
        with RowFisher(problem.model, problem.losses, batched) as fisher:
            fisher.add(problem.batch(0))
        assert {name: parameter.requires_grad for name, parameter in problem.model.named_parameters()} == before
        assert all(parameter.grad is None for parameter in problem.model.parameters())
        assert not any(module._forward_hooks for module in problem.model.modules())
    with fisher, pytest.raises(ValueError, match="expected one example, got 2"):
        fisher.add(problem.batch(0, 1))


# the pipeline's examples ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mood(tmp_path_factory) -> Path:
    """Folder of a classifier with random weights that do something, and of its data."""
    folder = tmp_path_factory.mktemp("mood")
    write_rows(folder / "data" / "train.jsonl", sentences(96, seed=1))
    write_rows(folder / "data" / "validation.jsonl", sentences(40, seed=2))
    source = write_model(folder / "source")
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(source, label2id={"0": 0, "1": 1})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embeddings" not in name:
                parameter.mul_(5)
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(folder / "model")
    return folder


def encoded_problem(tmp_path: Path, task: str) -> tuple:
    """(model, tokenised training set, tokenizer) of a small task of this kind."""
    rows = {
        "text-classification": sentences,
        "text-regression": lambda count, seed: [row | {"label": row["label"] + 0.5} for row in sentences(count, seed)],
        "question-answering": questions,
        "summarization": stories,
        "language-modeling": stories,
        "mlm": stories,
    }[task]
    for name, seed in (("train", 1), ("validation", 2)):
        write_rows(tmp_path / "data" / f"{name}.jsonl", rows(10, seed))
    texts = {"summarization": "bart", "language-modeling": "gpt2"}
    if task in texts:
        source = write_text_model(tmp_path / "model", texts[task])
    elif task == "mlm":
        source = write_masked_model(tmp_path / "model")
    else:
        source = write_model(tmp_path / "model")
    data = load_task(task, data_dir=tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    model, _ = load_dense(str(source), data.labels, data.spec.problem)
    return model, tokenize(data.train, tokenizer, data.spec, 20, data.labels), tokenizer, data.spec.problem


def own_loss(model: nn.Module, batch: Batch, problem: str) -> torch.Tensor:
    """transformers' own loss of one example as the sum over its decisions."""
    batch = dict(batch)
    if problem == "language-modeling":
        return model(**batch | {"labels": batch["input_ids"]}).loss * (batch["labels"] != -100).sum()
    if problem == "question-answering":
        start, end = batch.pop("labels").unbind(1)
        return 2 * model(**batch, start_positions=start, end_positions=end).loss
    loss = model(**batch).loss
    if problem in TOKEN_PROBLEMS:  # of a block without hidden words the mean is none
        loss = (loss * (batch["labels"] != -100).sum()).nan_to_num()
    return loss


TASKS = ("text-classification", "text-regression", "question-answering", "summarization", "language-modeling", "mlm")


@pytest.mark.parametrize("task", TASKS)
def test_every_problem_has_its_loss(tmp_path, task):
    model, encoded, tokenizer, problem = encoded_problem(tmp_path, task)
    model.train()
    rows, record = row_fisher(model, encoded, tokenizer, problem, batch_size=4)
    assert model.training, "dropout was off meanwhile, and is on again"
    model.eval()
    columns = {"input_ids", "attention_mask", "token_type_ids", "labels"} & set(encoded.column_names)
    collate = Collator(tokenizer, problem)
    examples = [collate([row]) for row in encoded.select_columns(sorted(columns))]
    losses = [own_loss(model, example, problem) for example in examples]
    expected = one_by_one(model, [lambda e=e: own_loss(model, e, problem) for e in examples])
    assert_same_rows(rows, {name: total / len(examples) for name, total in expected.items()}, rtol=1e-3)
    assert record["examples"] == len(examples)
    assert record["tokens"] == sum(map(len, encoded["input_ids"]))
    assert record["loss"] == pytest.approx(float(torch.stack(losses).detach().mean()), rel=1e-4)
    assert record["batched"]


def test_models_that_need_it_run_one_example_at_a_time(tmp_path, capsys):
    write_rows(tmp_path / "data" / "train.jsonl", sentences(6, seed=1))
    write_rows(tmp_path / "data" / "validation.jsonl", sentences(6, seed=2))
    source = write_model(tmp_path / "model", "deberta-v2")
    data = load_task("text-classification", data_dir=tmp_path / "data")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model, _ = load_dense(str(source), data.labels, "classification")
    encoded = tokenize(data.train, tokenizer, data.spec, 20, data.labels)
    rows, record = row_fisher(model, encoded, tokenizer, "classification")
    assert not record["batched"]
    assert "one by one" in capsys.readouterr().err
    examples = [Collator(tokenizer, "classification")([row]) for row in encoded.remove_columns("length")]
    expected = one_by_one(model.eval(), [lambda e=e: model(**e).loss for e in examples])
    assert_same_rows(rows, {name: total / 6 for name, total in expected.items()}, rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "wrong"), [(math.nan, "expected finite numbers"), (0.0, "expected a number above 0")]
)
def test_model_without_gradients_is_refused(mood, value, wrong):
    data = load_task("text-classification", data_dir=mood / "data")
    tokenizer = AutoTokenizer.from_pretrained(mood / "model")
    model = AutoModelForSequenceClassification.from_pretrained(mood / "model")
    model.classifier.weight.data[:] = value
    encoded = tokenize(data.train, tokenizer, data.spec, 16)
    with pytest.raises(InputError, match=rf"--fisher compute: .*word_embeddings on 96 examples: {wrong}.*--model"):
        row_fisher(model, encoded, tokenizer, "classification")


# weights --------------------------------------------------------------------------------------------------------------


def test_row_weights_are_the_roots_and_no_row_vanishes():
    rows = torch.tensor([4.0, 0.0, 1.0], dtype=torch.float64)
    assert fisher_row_weights(rows).tolist() == pytest.approx([1.0, ROW_WEIGHT_FLOOR, 0.5])
    assert fisher_row_weights(1e-300 * rows)[2] == 0.5


@pytest.mark.parametrize("name", FISHER_TRANSFORMS)
def test_transforms_have_mean_one_and_keep_the_order(name):
    rows = torch.tensor([0.0, 3e-9, 2e-4, 5e-7, 2e-4, 0.0], dtype=torch.float64)
    weights = transform_fisher(rows, name)
    assert weights.dtype == torch.float64
    assert float(weights.mean()) == pytest.approx(1.0)
    assert bool((weights > 0).all())
    assert (weights[2], weights[0]) == (weights[4], weights[5])
    assert weights[0] < weights[1] < weights[3] < weights[2]
    torch.testing.assert_close(transform_fisher(1e-6 * rows, name), weights, msg="the unit does not count")
    torch.testing.assert_close(transform_fisher(torch.full((5,), 3.0), name), torch.ones(5).double())


def test_transforms_are_those_of_the_paper():
    rows = torch.tensor([1.0, math.e, math.e**2], dtype=torch.float64)
    for power in (0.1, 0.5, 0.9, 2.0):
        expected = rows**power / (rows**power).mean()
        torch.testing.assert_close(transform_fisher(rows, f"x^{power:g}"), expected)
    torch.testing.assert_close(transform_fisher(rows, "raw"), rows / rows.mean())
    logs = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64) + 2e-3
    torch.testing.assert_close(transform_fisher(rows, "log"), logs / logs.mean())
    torch.testing.assert_close(transform_fisher(rows, "log+10"), (logs + 10) / (logs + 10).mean())


@pytest.mark.parametrize("rows", [[0.0, 0.0], [1.0, -1.0], [1.0, math.inf], [math.nan, 1.0]])
def test_what_no_information_can_be_is_refused(rows):
    for weigh in (fisher_row_weights, lambda rows: transform_fisher(rows, "log")):
        with pytest.raises(ValueError, match="rows: expected finite numbers of 0 or more, not all 0"):
            weigh(torch.tensor(rows))
    with pytest.raises(ValueError, match=r"name: expected one of x\^0.1, .*, got 'x\^3'"):
        transform_fisher(torch.ones(2), "x^3")


# the optimum ----------------------------------------------------------------------------------------------------------


def weighted_errors(dense: nn.Module, small: nn.Module, rows: dict[str, torch.Tensor]) -> dict[str, float]:
    """sum_i rows_i ||(W - A B)_i||^2 of every encoder matrix, float64."""
    found = {}
    for name, linear in encoder_linears(dense).items():
        layer = small.get_submodule(name)
        left = linear.weight.detach().double() - layer.up.detach().double().mT @ layer.down.detach().double()
        found[name] = float((rows[name] * left.square().sum(dim=1)).sum())
    return found


def test_factors_have_the_least_weighted_error():
    """That of LAPACK's SVD of D W in float64; a few rows have no information."""
    dense, small, plain = (build("bert") for _ in range(3))
    generator = torch.Generator().manual_seed(3)
    rows = {
        name: torch.rand(linear.out_features, generator=generator).double() ** 6 * 1e-9
        for name, linear in encoder_linears(dense).items()
    }
    for values in rows.values():
        values[[1, 4]] = 0.0
    reported = SVDFactorizer(5, "fisher")(small, rows).errors
    SVDFactorizer(5)(plain)
    found, without = weighted_errors(dense, small, rows), weighted_errors(dense, plain, rows)
    for name, linear in encoder_linears(dense).items():
        weight, values = linear.weight.detach().double(), rows[name]
        floor = values.max() * ROW_WEIGHT_FLOOR**2
        a, b = weighted_svd_reference(weight, 5, values.clamp_min(floor).sqrt())
        best = float((values * (weight - a @ b).square().sum(dim=1)).sum())
        whole = float((values * weight.square().sum(dim=1)).sum())
        assert found[name] == pytest.approx(best, rel=1e-4, abs=1e-9 * whole)
        assert found[name] < 0.8 * without[name]
        assert reported[name] == pytest.approx(math.sqrt(best / whole), rel=1e-3)
        layer = small.get_submodule(name)
        product = (layer.up.mT @ layer.down).detach()
        assert bool((product[[1, 4]].norm(dim=1) > 0.05 * weight[[1, 4]].norm(dim=1)).all()), "they do not vanish"


def test_equal_rows_give_the_plain_svd():
    plain, weighted = build("bert"), build("bert")
    rows = {name: torch.full((linear.out_features,), 2e-5) for name, linear in encoder_linears(plain).items()}
    SVDFactorizer(5)(plain)
    SVDFactorizer(5, "fisher")(weighted, rows)
    for name, layer in encoder_linears(plain).items():
        other = weighted.get_submodule(name)
        torch.testing.assert_close(other.up.mT @ other.down, layer.up.mT @ layer.down)


def test_weighting_without_information_is_an_error():
    with pytest.raises(ValueError, match="weighting: 'fisher' needs the row sums"):
        SVDFactorizer(5, "fisher")(build("bert"))


# runs -----------------------------------------------------------------------------------------------------------------


def options_of(mood: Path, output: Path, **changes) -> CompressOptions:
    """A run that trains nothing."""
    given = {
        "model": str(mood / "model"), "task": "text-classification", "output": str(output), "method": "fwsvd",
        "data_dir": str(mood / "data"), "rank": 4, "finetune_epochs": 0, "retrain_epochs": 0, "batch_size": 16,
        "bench_batch": 2, "bench_length": 16, "max_length": 16,
    }  # fmt: skip
    return CompressOptions(**given | changes)


@pytest.fixture(scope="module")
def computed(mood, tmp_path_factory) -> tuple[Path, dict]:
    """(folder of the output and of the Fisher information of a run, its report)."""
    folder = tmp_path_factory.mktemp("computed")
    options = options_of(mood, folder / "out", save_fisher=str(folder / "kept" / "fisher.safetensors"))
    return folder, compress_run(options)[1]


def test_run_weighs_rows_by_the_training_set(mood, computed, tmp_path):
    folder, report = computed
    assert report["method"] == "fwsvd"
    assert report["config"]["weighting"] == "fisher"
    assert report["training"] == {}
    found = report["fisher"]
    assert (found["source"], found["examples"], found["batched"]) == ("compute", 96, True)
    rows = load_file(folder / "kept" / "fisher.safetensors")
    models = [AutoModelForSequenceClassification.from_pretrained(path) for path in (mood / "model", folder / "out")]
    compress_run(options_of(mood, tmp_path / "plain", method="svd"))
    models.append(AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain"))
    errors, plain = (weighted_errors(models[0], small, rows) for small in models[1:])
    assert all(errors[name] < plain[name] for name in errors)
    linears = encoder_linears(models[0]).items()
    whole = {name: float((rows[name] * each.weight.double().square().sum(1)).sum()) for name, each in linears}
    for name, entry in report["rank"]["per_matrix"].items():
        assert entry["error"] == pytest.approx(math.sqrt(errors[name] / whole[name]), rel=1e-4)
    card = (folder / "out" / "README.md").read_text()
    assert "Rows weighted by the Fisher information of their weights on 96 examples of the training set" in card


def test_file_says_what_it_is_of(mood, computed):
    folder, report = computed
    with safe_open(folder / "kept" / "fisher.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()[METADATA])
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (cannot be iterated)
        assert file.get_tensor("bert.embeddings.word_embeddings").dtype == torch.float64
    names = {"schema", "examples", "tokens", "loss", "batched", "task", "model", "finetune_epochs"}
    assert record.keys() == names
    assert record["schema"] == 1
    assert record["task"] == "text-classification"
    assert {name: report["fisher"][name] for name in record if name != "schema"} == {
        name: value for name, value in record.items() if name != "schema"
    }
    model = AutoModelForSequenceClassification.from_pretrained(mood / "model")
    assert shapes == {name: [len(weight)] for name, weight in fisher_weights(model).items()}
    assert [path.name for path in (folder / "kept").iterdir()] == ["fisher.safetensors"]


def test_kept_information_gives_the_same_factors_without_training_data(mood, computed, tmp_path, capsys):
    folder, _ = computed
    options = options_of(
        mood, tmp_path / "out", fisher=str(folder / "kept" / "fisher.safetensors"), data_dir=None,
        validation_file=str(mood / "data" / "validation.jsonl"),
    )  # fmt: skip
    _, report = compress_run(options)
    assert "another --model" not in capsys.readouterr().err
    assert report["data"]["train"] == 0
    assert report["fisher"]["source"] == str(folder / "kept" / "fisher.safetensors")
    assert "fisher" not in report["seconds"]
    first, second = (load_file(path / "out" / "model.safetensors") for path in (folder, tmp_path))
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_information_of_another_model_is_told(mood, computed, tmp_path, capsys):
    folder, _ = computed
    other = tmp_path / "model"
    model = AutoModelForSequenceClassification.from_pretrained(mood / "model")
    model.classifier.bias.data += 1
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(mood / "model").save_pretrained(other)
    file = folder / "kept" / "fisher.safetensors"
    compress_run(options_of(mood, tmp_path / "out", model=str(other), fisher=str(file)))
    assert f"--fisher {file}: was computed with another --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    "size", [{"rank": None, "ratio": 0.4}, {"rank": "auto", "ratio": 0.4}, {"rank": None, "rank_error": 0.4}]
)
def test_sizes_and_retraining_are_those_of_svd(mood, tmp_path, size):
    training = {"finetune_epochs": 1, "prune_epochs": 1, "retrain_epochs": 1, "checkpoint_steps": 0}
    _, report = compress_run(options_of(mood, tmp_path / "out", fisher_samples=20, **training, **size))
    assert report["fisher"]["examples"] == 20
    assert report["training"].keys() == {"finetune", "retrain"}
    assert report["training"]["retrain"][-1]["epoch"] == 2.0, "and the updates of pruning"
    ranks = [entry["compressed"] for entry in report["rank"]["per_matrix"].values()]
    if "rank_error" in size:
        assert all(entry["error"] <= 0.4 * (1 + 1e-4) for entry in report["rank"]["per_matrix"].values())
    else:
        assert 0.3 < report["encoder_params"]["ratio"] <= 0.4
    assert (len(set(ranks)) > 1) == (size["rank"] == "auto" or "rank_error" in size)


def test_rows_and_inputs_can_both_be_weighted(mood, computed, tmp_path):
    _, report = compress_run(options_of(mood, tmp_path / "out", calibration="train"))
    assert report["calibration"]["examples"] == report["fisher"]["examples"] == 96
    plain = computed[1]["rank"]["per_matrix"]
    assert all(0 < entry["error"] < plain[name]["error"] for name, entry in report["rank"]["per_matrix"].items())


def test_language_model_is_weighted_by_running_text(tmp_path):
    model = write_text_model(tmp_path / "model", "gpt2")
    for name, seed in (("train", 1), ("validation", 2)):
        write_rows(tmp_path / "data" / f"{name}.jsonl", stories(30, seed))
    options = options_of(tmp_path, tmp_path / "out", model=str(model), task="language-modeling", fisher_samples=8)
    _, report = compress_run(options)
    assert report["fisher"]["examples"] == 8
    assert 7 * 16 < report["fisher"]["tokens"] <= 8 * 16, "the last block is shorter"


# keys and studies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"seed": 1}, True),
        ({"fisher_samples": 8}, True),
        ({"finetune_epochs": 1}, True),
        ({"max_length": 12}, True),
        ({"fisher_samples": 256}, False),
        ({"fisher": "compute"}, False),
        ({"rank": 3}, False),
        ({"retrain_epochs": 1}, False),
        ({"save_fisher": "kept"}, False),
        ({"calibration": "train"}, False),
    ],
)
def test_stage_changes_with_what_decides_it(mood, tmp_path, monkeypatch, change, changed):
    monkeypatch.chdir(tmp_path)
    first, second = (
        Compression(prepare(options_of(mood, tmp_path / name, **more)), command="")
        for name, more in (("a", {}), ("b", change))
    )
    assert (first.key("fisher") != second.key("fisher")) == changed
    if "fisher_samples" in change:
        assert first.key("finetune") == second.key("finetune")


def test_runs_with_other_information_are_other_runs(computed, tmp_path):
    file = computed[0] / "kept" / "fisher.safetensors"
    rows = load_file(file)
    other = tmp_path / "fisher.safetensors"
    save_fisher(other, {name: 2 * values for name, values in rows.items()}, {})
    base = {"model": "m", "task": "text-classification", "rank": 4, "data_dir": str(tmp_path / "d")}
    names = [
        study_recipe.Run("x", (), 0, {}, base | more).name
        for more in (
            {"method": "svd"},
            {"method": "fwsvd"},
            {"method": "fwsvd", "fisher_samples": 8},
            {"method": "fwsvd", "fisher": str(file)},
            {"method": "fwsvd", "fisher": str(other)},
        )
    ]
    assert len(set(names)) == len(names)


def test_study_leaves_out_what_a_method_ignores(tmp_path):
    path = tmp_path / "s.toml"
    path.write_text(
        '[options]\nmodel = "m"\ntask = "sst2"\nfisher_samples = 8\nweighting = "mask"\n[grid]\nrank = [2]\n'
        '[methods.svd]\nmethod = "svd"\n[methods.fwsvd]\nmethod = "fwsvd"\n[methods.lpaf]\nmethod = "lpaf"\n'
    )
    file = study_recipe.read_study(path)
    taken = {label: file.settings(label, (), 0, {}).keys() & {"fisher_samples", "weighting"} for label in file.methods}
    assert taken == {"svd": {"weighting"}, "fwsvd": {"fisher_samples"}, "lpaf": {"weighting"}}


# refusals -------------------------------------------------------------------------------------------------------------

QUERY = "bert.encoder.layer.0.attention.self.query"
BROKEN = {
    "zeros everywhere": (lambda rows: rows * 0, ("expected a number above 0 in some row, got 0 in all",)),
    "a negative row": (lambda rows: rows.index_fill(0, torch.tensor([3]), -1.0), ("of 0 or more, got -1 in row 3",)),
    "not a number": (lambda rows: rows.index_fill(0, torch.tensor([5]), math.nan), ("finite", "got nan in row 5")),
    "infinity": (lambda rows: rows.index_fill(0, torch.tensor([0]), math.inf), ("finite", "got inf in row 0")),
    "other rows": (lambda rows: rows[:-1].clone(), ("expected shape [32]", "got [31]")),
    "a matrix": (lambda rows: rows[:, None].clone(), ("expected shape [32]", "got [32, 1]")),
    "whole numbers": (lambda rows: (rows * 0 + 2).long(), ("floating-point numbers, got int64",)),
    "a missing matrix": (lambda _: None, ("has no tensor", "shape [32]")),
}


def refused_with(mood: Path, capsys, tmp_path: Path, changes: dict, *fragments: str) -> None:
    options = {
        "--model": mood / "model", "--task": "text-classification", "--output": tmp_path / "out", "--method": "fwsvd",
        "--data-dir": mood / "data", "--rank": "4", "--finetune-epochs": "0", "--retrain-epochs": "0",
    }  # fmt: skip
    before = {path.name for path in tmp_path.iterdir()}
    given = {key: value for key, value in (options | changes).items() if value is not None}
    refused(capsys, ["compress", *words(given)], *fragments)
    nothing_written(tmp_path, before)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_information_is_refused(name, mood, computed, capsys, tmp_path):
    change, fragments = BROKEN[name]
    rows = load_file(computed[0] / "kept" / "fisher.safetensors")
    changed = change(rows.pop(QUERY))
    file = tmp_path / "fisher.safetensors"
    save_file(rows if changed is None else rows | {QUERY: changed}, file)
    refused_with(mood, capsys, tmp_path, {"--fisher": file}, f"--fisher {file}", QUERY, *fragments)


def test_rows_without_information_are_taken(mood, computed, tmp_path):
    rows = load_file(computed[0] / "kept" / "fisher.safetensors")
    rows[QUERY][[2, 9]] = 0.0
    del rows["bert.embeddings.word_embeddings"]  # for other methods
    save_file({name: values.float() for name, values in rows.items()}, tmp_path / "fisher.safetensors")
    found, record = load_fisher(tmp_path / "fisher.safetensors", {QUERY: 32})
    assert record == {}
    assert found[QUERY].dtype == torch.float64
    options = options_of(mood, tmp_path / "out", fisher=str(tmp_path / "fisher.safetensors"))
    compressed, report = compress_run(options)
    assert report["fisher"] == {"source": str(tmp_path / "fisher.safetensors")}
    layer = compressed.get_submodule(QUERY)
    assert bool(((layer.up.mT @ layer.down)[[2, 9]].norm(dim=1) > 0).all())


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"no tensors", ("cannot be read as safetensors",)),
        (b"", ("cannot be read as safetensors",)),
        ({METADATA: '{"schema": 2}'}, ("has schema 2, expected 1",)),
        ({METADATA: "{"}, (METADATA, "no JSON object")),
        ({METADATA: "[]"}, (METADATA, "no JSON object")),
    ],
)
def test_files_of_another_kind_are_refused(mood, capsys, tmp_path, content, fragments):
    file = tmp_path / "fisher.safetensors"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        save_file({"a": torch.ones(2)}, file, metadata=content)
    refused_with(mood, capsys, tmp_path, {"--fisher": file}, f"--fisher {file}", *fragments)


REFUSED = {
    "no such file": ({"--fisher": "/no/such.safetensors"}, ("--fisher /no/such.safetensors", "no such file")),
    "a folder": ({"--fisher": "/"}, ("--fisher /", "no such file")),
    "no samples": ({"--fisher-samples": "0"}, ("--fisher-samples 0", "above 0")),
    "samples of a file": (
        {"--fisher": "f.safetensors", "--fisher-samples": "9"},
        ("--fisher-samples", "--fisher f.safetensors", "nothing to compute"),
    ),
    "a file kept again": (
        {"--fisher": "f.safetensors", "--save-fisher": "g.safetensors"},
        ("--save-fisher", "--fisher f.safetensors", "nothing to compute"),
    ),
    "plain svd": ({"--method": "svd", "--fisher": "compute"}, ("--fisher", "--method svd", "--method fwsvd")),
    "lpaf": ({"--method": "lpaf", "--fisher-samples": "9"}, ("--fisher-samples", "--method lpaf", "--method fwsvd")),
    "layers left out": (
        {"--method": "truncate", "--rank": None, "--ratio": "0.5", "--save-fisher": "f"},
        ("--save-fisher", "--method truncate", "--method fwsvd"),
    ),
    "other row weights": ({"--weighting": "mask"}, ("--weighting", "--method fwsvd", "Fisher information")),
    "row weights that no option knows": ({"--weighting": "fisher"}, ("--weighting 'fisher'", "none, mask, scores")),
    "a pruner": ({"--pruner": "cap"}, ("--pruner cap", "--method fwsvd does not prune")),
    "no training data": (
        {"--data-dir": None, "--validation-file": "v.jsonl"},
        ("--validation-file", "--train-file"),
    ),
    "a folder to write": ({"--save-fisher": "/"}, ("--save-fisher /", "is a directory")),
    "a place below a file": ({"--save-fisher": "/dev/null/f"}, ("--save-fisher /dev/null/f", "is not a directory")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_refused(name, mood, capsys, tmp_path):
    changes, fragments = REFUSED[name]
    refused_with(mood, capsys, tmp_path, changes, *fragments)


def test_places_of_other_things_are_not_written(mood, capsys, tmp_path):
    (tmp_path / "mine").write_text("mine")
    refused_with(mood, capsys, tmp_path, {"--save-fisher": tmp_path / "mine"}, "--save-fisher", "--overwrite")
    assert (tmp_path / "mine").read_text() == "mine"
    inside = tmp_path / "out" / "fisher.safetensors"
    refused_with(mood, capsys, tmp_path, {"--save-fisher": inside}, f"--save-fisher {inside}", "--output")


# processes and death --------------------------------------------------------------------------------------------------


def words_of(mood: Path, output: Path) -> list[str]:
    more = {"retrain-epochs": 1, "rank": 4, "finetune-epochs": 1, "save-fisher": output.parent / "fisher.safetensors"}
    return command(mood / "model", mood / "data", output, "--method", "fwsvd", **more)


@pytest.fixture(scope="module")
def alone(mood, tmp_path_factory) -> Path:
    """Folder of the output of one undisturbed process, and of what its stages left."""
    folder = tmp_path_factory.mktemp("alone")
    run(words_of(mood, folder / "out"), folder / "out", probe="stages")
    return folder


def test_two_processes_find_the_information_of_one(mood, computed, tmp_path):
    """Of a model that is not trained, which dropout would make another."""
    file, output = tmp_path / "fisher.safetensors", tmp_path / "out"
    more = {"retrain-epochs": 0, "rank": 4, "finetune-epochs": 0, "max-train-samples": 96, "save-fisher": file}
    words = command(mood / "model", mood / "data", output, "--method", "fwsvd", **more)
    del words[words.index("--prune-epochs") : words.index("--prune-epochs") + 2]
    del words[words.index("--retrain-lr") : words.index("--retrain-lr") + 2]
    said = run(words, output, processes=2)
    assert said[1] == ""
    one, both = load_file(computed[0] / "kept" / "fisher.safetensors"), load_file(file)
    assert_same_rows(both, one, rtol=1e-5)
    records = [json.loads((folder / "out" / "report.json").read_text())["fisher"] for folder in (computed[0], tmp_path)]
    assert records[1] == records[0] | {"loss": pytest.approx(records[0]["loss"])}
    first, second = (load_file(folder / "out" / "model.safetensors") for folder in (computed[0], tmp_path))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("death", ["fisher", "fisher store", "retrain"])
def test_killed_run_ends_with_the_same_weights(alone, mood, tmp_path, death):
    kill_and_resume(words_of(mood, tmp_path / "out"), tmp_path / "out", death)
    assert_same_run(tmp_path / "out", alone / "out")
    first, second = (load_file(folder / "fisher.safetensors") for folder in (tmp_path, alone))
    assert [name for name in second if not torch.equal(first[name], second[name])] == []
    records = [json.loads((folder / "out" / "report.json").read_text())["fisher"] for folder in (tmp_path, alone)]
    assert records[0] == records[1]
