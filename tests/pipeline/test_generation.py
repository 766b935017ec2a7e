"""Texts as tasks: language models and summarisers from files to reloaded, writing, compressed models."""

from __future__ import annotations

import csv
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from test_kill import assert_same_run, kill_and_resume, story
from test_processes import assert_same_training, difference, run
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import lpaf
from lpaf.cli import main
from lpaf.data import get_task, load, load_task, sampled, tokenize
from lpaf.data.texts import IGNORED, TextOptions
from lpaf.errors import InputError
from lpaf.evaluate.evaluate import evaluate_directory
from lpaf.evaluate.predict import NotNumbersError, task_outputs, token_losses, write_texts
from lpaf.models import CompressionConfig
from lpaf.models.checkpoint import load_dense, load_task_model, load_tokenizer, save_compressed, save_model
from lpaf.models.conv1d import as_published, conv1d_names, use_linears
from lpaf.models.count import forward_macs
from lpaf.models.outputs import forward_inputs
from lpaf.models.t5 import leave_out_casts
from lpaf.models.targets import encoder_linears
from lpaf.retrain import Objective
from lpaf.retrain.batches import Collator
from lpaf_kernels import LowRankSparseLinear, swap_linears
from tiny import SEQ2SEQ, build, stories, word_tokenizer, write_rows, write_text_model

LM, SUMMARY = get_task("language-modeling"), get_task("summarization")
PROBLEMS = {"bart": SUMMARY, "t5": SUMMARY, "gpt2": LM, "llama": LM}
CLASSES = {"summarization": AutoModelForSeq2SeqLM, "language-modeling": AutoModelForCausalLM}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model type -> directory of a tiny model; "t5-gated" is T5 1.1's."""
    folder = tmp_path_factory.mktemp("models")
    found = {name: write_text_model(folder / name, name) for name in PROBLEMS}
    found["t5-gated"] = write_text_model(folder / "t5-gated", "t5", feed_forward_proj="gated-gelu")
    return found


def problem(name: str) -> str:
    return PROBLEMS[name.partition("-")[0]].problem


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stories")
    for name, count, seed in (("train", 61, 1), ("validation", 20, 2)):
        write_rows(folder / f"{name}.jsonl", stories(count, seed))
    return folder


# data -----------------------------------------------------------------------------------------------------------------


def documents(*texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts)})


@pytest.mark.parametrize("length", [4, 5, 7, 64])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_token_is_in_one_block_and_a_label_once(kind, length):
    texts = [row["text"] for row in stories(9, seed=0)]
    tokenizer = word_tokenizer(kind)
    blocks = tokenize(documents(*texts[:4], "", *texts[4:]), tokenizer, LM, length)
    end = tokenizer.eos_token_id
    each = [tokenizer(text)["input_ids"] for text in texts]
    stream = each[0] + [token for ids in each[1:] for token in (end, *ids)]
    stream = stream[: len(stream) - (len(stream) % length == 1)]  # a last block of one token has nothing to predict
    assert list(itertools.chain(*blocks["input_ids"])) == stream
    assert blocks["length"] == [len(block) for block in blocks["input_ids"]]
    assert set(blocks["length"][:-1]) <= {length}
    for ids, labels in zip(blocks["input_ids"], blocks["labels"], strict=True):
        assert labels == [*ids[1:], IGNORED]


def test_one_token_that_ends_and_begins_documents_stands_once_between_them():
    tokenizer = word_tokenizer("llama")
    tokenizer.eos_token = tokenizer.bos_token
    (ids,) = tokenize(documents("film is good", "bad"), tokenizer, LM, 32)["input_ids"]
    begin = tokenizer.bos_token_id
    words = tokenizer.convert_tokens_to_ids(["film", "is", "good", "bad"])
    assert ids == [begin, *words[:3], begin, words[3]]


def test_text_files_and_rows(tmp_path):
    (tmp_path / "train.txt").write_text("the film\n\nis good\n")
    write_rows(tmp_path / "validation.jsonl", [{"text": "the film"}, {"text": ""}, {"text": "is bad"}])
    found = load_task("language-modeling", data_dir=tmp_path)
    assert found.train["text"] == ["the film\n\nis good\n"], "one document, as it is"
    assert found.validation["validation"]["text"] == ["the film", "", "is bad"]
    assert (found.labels, found.num_labels) == (None, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.txt", b"", r"train\.txt: is empty"),
        ("train.txt", b" \n\n", r"train\.txt: is empty"),
        ("train.txt", b"good\n\xff\n", r"line 2: not UTF-8"),
        ("train.jsonl", b'{"text": ""}', "every text is empty"),
        ("train.jsonl", b'{"text": 3}', r"line 1: column 'text' is a int"),
        ("train.jsonl", b'{"body": "good"}', "no column 'text'"),
        ("train.md", b"good", r"no train\.\* in it; add one of .*\.txt"),
    ],
)
def test_bad_running_text_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "validation.txt").write_text("good")
    with pytest.raises(InputError, match=message):
        load_task("language-modeling", data_dir=tmp_path)


def test_text_files_are_for_running_text_only(tmp_path):
    for name in ("train.txt", "validation.txt"):
        (tmp_path / name).write_text("good")
    with pytest.raises(InputError, match=r"no train\.\* in it"):
        load_task("text-classification", data_dir=tmp_path)
    with pytest.raises(InputError, match="unknown kind of file"):
        load_task("summarization", train_file=tmp_path / "train.txt", validation_file=tmp_path / "validation.txt")


def test_lines_of_the_hub_become_one_text(monkeypatch):
    lines = Dataset.from_dict({"text": ["", " = Title = \n", " the film \n"]})
    monkeypatch.setattr(load, "_from_hub", lambda spec: {"train": lines, "validation": lines, "test": lines})
    assert load_task("language-modeling").train["text"] == [" = Title = \n the film \n"]


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("cnn_dailymail", ("article", "highlights")),
        ("xsum", ("document", "summary")),
        ("summarization", ("dialogue", "summary")),
    ],
)
def test_columns_of_summaries(tmp_path, task, columns):
    rows = [dict(zip(columns, pair, strict=True)) | {"id": 1} for pair in (("the film is good", "good"), ("", "bad"))]
    for name in ("train", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    found = load_task(task, data_dir=tmp_path)
    assert found.train.to_list() == [{name: row[name] for name in columns} for row in rows]
    tokens = tokenize(found.train, word_tokenizer("t5"), get_task(task), 4, texts=TextOptions(prefix="summarize: "))
    vocabulary = word_tokenizer("t5").convert_ids_to_tokens
    assert [vocabulary(ids) for ids in tokens["input_ids"]] == [
        ["summarize", ":", "the", "</s>"],
        ["summarize", ":", "</s>"],
    ]
    assert [vocabulary(ids) for ids in tokens["labels"]] == [["good", "</s>"], ["bad", "</s>"]]
    write_rows(tmp_path / "train.jsonl", [row | {columns[1]: " "} for row in rows])
    with pytest.raises(InputError, match="every summary is empty"):
        load_task(task, data_dir=tmp_path)


def test_training_examples_of_running_text_are_blocks():
    blocks = tokenize(documents(*(row["text"] for row in stories(9, 0))), word_tokenizer("gpt2"), LM, 8)
    chosen = sampled(blocks, 5, seed=1)
    assert len(chosen) == 5
    rows = blocks.to_list()
    places = [rows.index(row) for row in chosen.to_list()]
    assert places == sorted(places)
    assert sampled(blocks, len(blocks), seed=1) is blocks


# batches and losses -------------------------------------------------------------------------------------------------


def batch_of(name: str, count: int = 5, passes: int = 1):
    """(model, its batch, the model's own logits) of tiny stories."""
    spec, tokenizer = PROBLEMS[name], word_tokenizer(name)
    rows = Dataset.from_list([*stories(count, seed=3), {"text": "the film", "summary": "good"}])
    encoded = tokenize(rows, tokenizer, spec, 7 if spec is LM else 12, texts=TextOptions(max_target_length=4))
    model = build(name, vocab_size=len(tokenizer)).eval()
    return model, Collator(tokenizer, spec.problem)(encoded.to_list()), encoded


@torch.no_grad()
@pytest.mark.parametrize("name", PROBLEMS)
def test_loss_is_that_of_the_model_itself(name):
    model, batch, _ = batch_of(name)
    inputs = forward_inputs(model, batch)
    assert "labels" not in inputs
    assert (batch["labels"] == IGNORED).any()
    loss, _ = Objective(PROBLEMS[name].problem)(model(**inputs).logits, batch["labels"], None)
    labels = batch["labels"]
    if PROBLEMS[name] is LM:  # transformers shifts by itself, ours are shifted
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
    torch.testing.assert_close(loss, own)


def test_terms_are_means_over_tokens():
    torch.manual_seed(0)
    logits, teacher = torch.randn(2 * 3, 4, 7), torch.randn(3, 4, 7)
    labels = torch.randint(0, 7, (3, 4))
    labels[0, 1:] = IGNORED
    labels[2, 3] = IGNORED
    _, parts = Objective("summarization", distill=0.5, temperature=3.0, consistency=1.0)(logits, labels, teacher)
    found = {name: [] for name in parts}
    for row, column in (labels != IGNORED).nonzero().tolist():
        first, second = logits[row, column], logits[3 + row, column]
        target = F.softmax(teacher[row, column] / 3, -1)
        p, q = F.softmax(first, -1), F.softmax(second, -1)
        for each in (first, second):
            found["task"].append(F.cross_entropy(each, labels[row, column]))
            found["distillation"].append(9 * (target * (target.log() - F.log_softmax(each / 3, -1))).sum())
        found["consistency"].append(0.5 * ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()))
    for name, values in found.items():
        torch.testing.assert_close(parts[name], torch.stack(values).mean())


@torch.no_grad()
@pytest.mark.parametrize("name", PROBLEMS)
def test_losses_do_not_depend_on_the_batch(name):
    model, _, encoded = batch_of(name)
    tokenizer, kind = word_tokenizer(name), PROBLEMS[name].problem
    one, many = (token_losses(model, encoded, tokenizer, size, problem=kind) for size in (1, 4))
    assert one.dtype == torch.float64
    torch.testing.assert_close(one, many, rtol=1e-5, atol=0)
    single = Collator(tokenizer, kind)([encoded[2]])
    logits = model(**forward_inputs(model, single)).logits[0]
    expected = -logits.log_softmax(-1).gather(1, single["labels"][0].clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(one[2], expected[single["labels"][0] != IGNORED].double().sum(), rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_summaries_are_those_of_generate(name):
    model, _, encoded = batch_of(name)
    for linear in encoder_linears(model).values():
        linear.weight.mul_(20)  # else a random decoder hardly looks at the text
    tokenizer = word_tokenizer(name)
    texts = TextOptions(num_beams=3, generate_length=5, no_repeat_ngram=2)
    found = write_texts(model, encoded, tokenizer, texts, batch_size=4)
    settings = {"num_beams": 3, "max_new_tokens": 5, "no_repeat_ngram_size": 2, "do_sample": False}
    for row, text in zip(encoded, found, strict=True):
        written = model.generate(input_ids=torch.tensor([row["input_ids"]]), **settings)
        assert text == tokenizer.decode(written[0], skip_special_tokens=True).strip()
    assert len(set(found)) > 1


@pytest.mark.parametrize("name", ["bart", "gpt2"])
def test_models_of_nan_are_not_scored(name):
    model, _, encoded = batch_of(name)
    with torch.no_grad():
        list(encoder_linears(model).values())[-1].weight[0, 0] = math.nan
    examples = Dataset.from_list(stories(len(encoded), seed=3))
    with pytest.raises(NotNumbersError):
        task_outputs(model, PROBLEMS[name], examples, encoded, word_tokenizer(name), None)


# GPT-2's Conv1D -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_conv1d_becomes_a_linear_and_back(models, tmp_path):
    plain = GPT2LMHeadModel.from_pretrained(models["gpt2"]).eval()
    ids = torch.arange(12).view(2, 6)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    expected = plain(input_ids=ids).logits
    names = {name for name, module in plain.named_modules() if isinstance(module, Conv1D)}
    assert conv1d_names(plain) == names
    assert len(names) == 8
    use_linears(plain)
    assert set(encoder_linears(plain)) == names
    torch.testing.assert_close(plain(input_ids=ids).logits, expected)
    with as_published(plain):
        assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())
    assert not any(isinstance(module, Conv1D) for module in plain.modules())
    save_model(plain, load_tokenizer(str(models["gpt2"])), tmp_path / "again")
    assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path / "again")(input_ids=ids).logits, expected)


@torch.no_grad()
def test_what_stays_dense_of_a_compressed_gpt2_is_saved_as_conv1d(models, tmp_path):
    model, _ = load_dense(str(models["gpt2"]), None, "language-modeling")
    names = list(encoder_linears(model))
    swap_linears(model.eval(), rank=4, names=names[::2])
    save_compressed(model, load_tokenizer(str(models["gpt2"])), tmp_path / "small", "svd")
    ids = torch.arange(12).view(2, 6)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert isinstance(again.get_submodule(names[1]), Conv1D)
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dense_gpt2_is_compressed_on_the_fly(models):
    model = AutoModelForCausalLM.from_pretrained(models["gpt2"], quantization_config=CompressionConfig(rank=4))
    layers = encoder_linears(model)
    assert len(layers) == 8
    assert all(isinstance(layer, LowRankSparseLinear) and layer.rank == 4 for layer in layers.values())


# reload and count -----------------------------------------------------------------------------------------------------


def call(model, ids):
    """Logits of ids, which are the source and the target of an encoder-decoder."""
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits


@torch.no_grad()
@pytest.mark.parametrize("name", ["bart", "t5", "t5-gated", "gpt2", "llama"])
def test_reload_is_bitwise_equal_and_writes_the_same(models, tmp_path, name):
    source = str(models[name])
    model, trained = load_dense(source, None, problem(name))
    assert trained
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (name != "llama")
    swap_linears(model.eval(), rank=4, keep=0.2, names=list(encoder_linears(model)))
    save_compressed(model, load_tokenizer(source), tmp_path / "small", "svd")
    ids = torch.randint(3, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        again = CLASSES[problem(name)].from_pretrained(tmp_path / "small", dtype=dtype)
        for parameter in model.parameters():  # not the frequencies of the rotary embedding, which stay float32
            parameter.data = parameter.data.to(dtype)
        assert torch.equal(call(again, ids), call(model, ids))
        assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
        written = [each.generate(input_ids=ids, max_new_tokens=6, num_beams=2) for each in (model, again)]
        assert torch.equal(*written)
    assert type(load_task_model(str(tmp_path / "small"))) is type(model), "its architecture says what it is for"


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "mt5"])
def test_t5_never_builds_the_weights_of_compressed_layers(name, monkeypatch):
    model = build(name).eval()
    ids = torch.arange(10).view(2, 5)
    swap_linears(model, rank=4, names=list(encoder_linears(model)))
    expected = call(model, ids)
    leave_out_casts(model)
    monkeypatch.setattr(LowRankSparseLinear, "weight", property(lambda layer: pytest.fail("built a dense weight")))
    assert torch.equal(call(model, ids), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", [*sorted(SEQ2SEQ), "gpt2", "llama", "qwen3", "gemma2", "opt", "gpt_neox"])
def test_counted_products_are_those_that_run(name):
    model = build(name).eval()
    model.set_attn_implementation("eager")
    length = 6
    ids = torch.full((1, length), 5)
    with FlopCounterMode(display=False) as counter:
        call(model, ids)
    head = length * model.get_output_embeddings().weight.numel()
    assert counter.get_total_flops() / 2 == forward_macs(model, length) + head


# bad input ----------------------------------------------------------------------------------------------------------


def options_of(model, data, output, task, **more) -> lpaf.CompressOptions:
    values = {
        "model": str(model), "task": task, "data_dir": str(data), "output": str(output), "rank": 4, "batch_size": 16,
        "finetune_lr": 5e-3, "retrain_lr": 5e-3, "finetune_epochs": 1, "prune_epochs": 1, "retrain_epochs": 1,
        "checkpoint_steps": 0, "bench_batch": 2, "bench_length": 16, "max_length": 12,
    }  # fmt: skip
    if task == "summarization":
        values |= {"max_target_length": 5, "num_beams": 2}
    return lpaf.CompressOptions(**values | more)


@pytest.mark.parametrize(
    ("name", "task", "more", "message"),
    [
        (None, "language-modeling", {}, r"^--model .*: a bert sees the tokens that it would have to predict"),
        ("bart", "language-modeling", {}, r"^--model .*: a bart sees the tokens"),
        (None, "summarization", {}, r"^--model .*: a bert is no encoder-decoder"),
        ("gpt2", "summarization", {}, r"^--model .*: a gpt2 is no encoder-decoder"),
        ("gpt2", "language-modeling", {"num_beams": 3}, r"^--num-beams: is for summarisation, not for --task lang"),
        ("gpt2", "language-modeling", {"n_best": 3}, r"^--n-best: is for question answering"),
        ("gpt2", "language-modeling", {"max_length": 41}, r"^--max-length 41: the model takes at most 40 tokens"),
        ("bart", "summarization", {"max_target_length": 41}, r"^--max-target-length 41: the model takes at most 40"),
        ("bart", "summarization", {"generate_length": 41}, r"^--generate-length 41: the model takes at most 40"),
        ("bart", "summarization", {"num_beams": 0}, r"^--num-beams 0: must be at least 1"),
        ("bart", "summarization", {"length_penalty": math.nan}, r"^--length-penalty nan: must be a finite"),
        ("bart", "summarization", {"method": "kd", "rank": None, "ratio": 0.5}, r"^--method kd: leaves layers out of"),
        ("t5", "summarization", {"method": "truncate", "rank": None, "ratio": 0.5}, r"^--method truncate: leaves"),
        ("bart", "summarization", {"pruner": "cap"}, r"^--pruner cap: contrasts sentences"),
        ("llama", "language-modeling", {"pruner": "cap"}, r"^--pruner cap: contrasts sentences"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(models, tiny_model, data, tmp_path, name, task, more, message):
    model = models[name] if name else tiny_model
    with pytest.raises(InputError, match=message) as caught:
        lpaf.compress(options_of(model, data, tmp_path / "out", task, **more), command="")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_summariser_without_a_first_token_is_refused(models, data, tmp_path):
    directory = write_text_model(tmp_path / "m", "t5")
    config = json.loads((directory / "config.json").read_text())
    config.pop("decoder_start_token_id")
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json has no decoder_start_token_id"):
        evaluate_directory(str(directory), "summarization", data_dir=str(data))


# the whole pipeline -------------------------------------------------------------------------------------------------

RUNS = [("gpt2", "svd"), ("llama", "lpaf"), ("bart", "lpaf"), ("t5", "losparse")]
TASKS = {"bart": "summarization", "t5": "summarization", "gpt2": "language-modeling", "llama": "language-modeling"}


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def finished(request, models, data, tmp_path_factory):
    """(model, report, options) of a run."""
    name, method = request.param
    folder = tmp_path_factory.mktemp("run")
    more = {"save_dense": str(folder / "dense"), "prune_lr": 2e-3, "finetune_epochs": 3}
    if method == "svd":
        more.pop("prune_lr")
    if method == "losparse":
        more |= {"rank": None, "ratio": 0.4}
    options = options_of(models[name], data, folder / "out", TASKS[name], method=method, **more)
    model, report = lpaf.compress(options, command="lpaf compress ...")
    return model, report, options


def evaluated(options, model=None, **more):
    names = ("max_length", "max_target_length", "num_beams")
    given = {name: getattr(options, name) for name in names}
    return evaluate_directory(model or options.output, options.task, data_dir=options.data_dir, **given | more)


@torch.no_grad()
def test_run_reloads_and_evaluate_repeats_it(finished, tmp_path):
    model, report, options = finished
    assert report["problem"] == options.task
    assert {"task", "distillation"} <= set(report["training"]["retrain"][-1])
    again = CLASSES[options.task].from_pretrained(options.output)
    ids = torch.randint(4, 20, (2, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(call(again, ids), call(model, ids))
    settings = {"max_new_tokens": 5, "num_beams": 2}
    assert torch.equal(again.generate(input_ids=ids, **settings), model.generate(input_ids=ids, **settings))
    rows = tmp_path / "rows.jsonl"
    assert evaluated(options, predictions=str(rows))["metrics"] == report["metric"]["details"]["compressed"]
    dense = evaluated(options, options.save_dense)["metrics"]["validation"]
    assert dense == pytest.approx(report["metric"]["details"]["dense"]["validation"], rel=1e-5)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    if options.task == "summarization":
        assert [row["summary"] for row in found] == [row["summary"] for row in stories(20, 2)]
    else:
        mean = np.average([row["loss"] for row in found], weights=[row["tokens"] for row in found])
        assert math.exp(mean) == pytest.approx(report["metric"]["compressed"])


def test_training_lowers_the_loss(finished):
    _, report, options = finished
    first, *_, last = report["training"]["finetune"]
    assert last["task"] < 0.9 * first["task"]
    if options.task == "language-modeling":
        assert report["metric"]["compressed"] < 15, "a model that knows nothing has 30, the number of words"


def test_card_and_report_say_how_to_use_it(finished, capsys):
    options = finished[2]
    card = (Path(options.output) / "README.md").read_text()
    tag = {"summarization": "summarization", "language-modeling": "text-generation"}[options.task]
    assert f"pipeline_tag: {tag}\n" in card
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", options.output)
    if options.task == "summarization":  # tiny models take 40 tokens
        code = code.replace("max_new_tokens=128", "max_new_tokens=8")
    exec(code.replace("max_new_tokens=40", "max_new_tokens=8"), {})
    assert capsys.readouterr().out.endswith("\n")
    config = json.loads((Path(options.output) / "report.json").read_text())["config"]
    assert config["max_length"] == 12
    assert config["num_beams"] == (2 if options.task == "summarization" else None)


def test_commands(finished, capsys):
    _, report, options = finished
    assert main(["bench", "--model", options.output, "--rounds", "2", "--length", "8", "--batch", "2"]) == 0
    assert main(["inspect", "--model", options.output]) == 0
    assert main(["bench", "--model", options.output, "--step"]) == 2
    capsys.readouterr()
    words = ["evaluate", "--model", options.output, "--task", options.task, "--data-dir", options.data_dir, "--json"]
    words += ["--max-length", "12"]
    if options.task == "summarization":
        words += ["--max-target-length", "5", "--num-beams", "2"]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == report["metric"]["details"]["compressed"]
    assert main([*words, "--n-best", "3"]) == 2


@pytest.mark.parametrize("method", ["truncate", "kd"])
def test_students_of_decoders(models, data, tmp_path, method):
    options = options_of(
        models["gpt2"], data, tmp_path / "out", "language-modeling", method=method, rank=None, ratio=0.5
    )
    model, report = lpaf.compress(options, command="")
    assert len(model.transformer.h) == 1
    plain = GPT2LMHeadModel.from_pretrained(options.output)
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert evaluated(options)["metrics"]["validation"] == pytest.approx(
        report["metric"]["details"]["compressed"]["validation"]
    )


# death and many processes ---------------------------------------------------------------------------------------------


def words_of(model: Path, data: Path, output: Path, task: str, **more) -> list[str]:
    """The command line of a run without dropout."""
    values = {
        "model": model, "task": task, "data-dir": data, "output": output, "rank": 4, "batch-size": 16, "max-length": 12,
        "finetune-lr": 2e-3, "retrain-lr": 2e-3, "finetune-epochs": 1, "prune-epochs": 1, "retrain-epochs": 1,
        "checkpoint-steps": 2, "bench-batch": 2, "bench-length": 16, "method": "svd",
    }  # fmt: skip
    values |= {"max-target-length": 5, "num-beams": 2} if task == "summarization" else {}
    return ["compress", *(str(word) for name, value in (values | more).items() for word in (f"--{name}", value))]


@pytest.mark.slow
@pytest.mark.parametrize("death", ["finetune", "retrain"])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_killed_run_resumes_to_the_same_weights(models, data, tmp_path, name, death):
    """With a tied output, transposed layers, and a teacher that runs beside."""
    outputs = [tmp_path / kind / "out" for kind in ("whole", "killed")]
    for output in outputs:
        output.parent.mkdir()
    epochs = {"finetune-epochs": 3, "retrain-epochs": 2}
    run(words_of(models[name], data, outputs[0], TASKS[name], **epochs), outputs[0])
    kill_and_resume(words_of(models[name], data, outputs[1], TASKS[name], **epochs), outputs[1], death)
    assert_same_run(outputs[1], outputs[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_two_processes_end_with_the_weights_of_one(data, tmp_path, name):
    """Their shares of a batch hold different numbers of tokens."""
    no_dropout = {"dropout_rate": 0.0} if name == "t5" else {}
    model = write_text_model(tmp_path / "m", name, **no_dropout)
    outputs = {processes: tmp_path / str(processes) / "out" for processes in (1, 2)}
    for processes, output in outputs.items():
        output.parent.mkdir()
        run(words_of(model, data, output, TASKS[name], **{"checkpoint-steps": 0}), output, processes)
    files = [output / "model.safetensors" for output in outputs.values()]
    assert difference(*files, without=()) < 5e-3, "shares weighed by examples stray by 3e-2"
    assert_same_training(*(story(output) for output in outputs.values()))


# real texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_real_articles(cnn_dailymail, tmp_path, name):
    """Real columns, lengths and characters: the run's figures come back exactly."""
    source = cnn_dailymail / "validation.csv"
    csv.field_size_limit(10**7)
    with source.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for split, part in (("train", rows[:64]), ("validation", rows[64:80])):
        with (tmp_path / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(part)
    model = write_text_model(tmp_path / "m", name, **({"max_position_embeddings": 160} if name == "bart" else {}))
    sizes = {"max_length": 128, "max_target_length": 32, "num_beams": 2, "rank": None, "ratio": 0.4}
    options = options_of(
        model, tmp_path, tmp_path / "out", "cnn_dailymail", method="losparse", distill="layer", **sizes
    )
    _, report = lpaf.compress(options, command="")
    assert report["metric"]["name"] == "rouge2"
    assert 0.39 < report["encoder_params"]["ratio"] <= 0.4
    assert report["training"]["prune"][-1]["layer_distillation"] > 0
    assert evaluated(options)["metrics"] == report["metric"]["details"]["compressed"]
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    assert any(isinstance(module, LowRankSparseLinear) for module in again.modules())
