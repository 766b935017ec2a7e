"""Tasks, files, labels and tokenisation."""

from __future__ import annotations

import json
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from transformers import BertTokenizerFast

from lpaf.data import TASKS, TaskSpec, check_labels, get_task, load, load_task, tokenize
from lpaf.errors import InputError

TRAIN = [{"text": "a good film", "label": "good"}, {"text": "a bad film", "label": "bad"}]


def write(path, rows):
    """Rows as the kind of file that the suffix names."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0])] + [",".join(f'"{value}"' for value in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A function that writes train.jsonl and validation.jsonl and loads them."""

    def load_rows(task, train, validation=None, **options):
        write(tmp_path / "train.jsonl", train)
        write(tmp_path / "validation.jsonl", train if validation is None else validation)
        return load_task(task, data_dir=tmp_path, **options)

    return load_rows


@pytest.fixture
def broken(tmp_path):
    """A function that loads a training file with the given content and returns the one-line error."""

    def error(name, content, task="text-classification"):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8")
        validation = write(tmp_path / "other.jsonl", TRAIN)
        with pytest.raises(InputError) as caught:
            load_task(task, train_file=path, validation_file=validation)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"--train-file {path}: ")
        return message

    return error


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "good",
        "bad",
        "film",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
    ]
    path.write_text("\n".join(words), encoding="utf-8")
    return BertTokenizerFast(vocab=str(path), vocab_file=str(path), model_max_length=64)


def config(*names):
    return SimpleNamespace(num_labels=len(names), id2label=dict(enumerate(names)))


# --- the registry


def test_registry_covers_glue_and_own_data():
    glue = ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"]
    own = ["text-classification", "text-regression", "question-answering"]
    texts = ["cnn_dailymail", "xsum", "summarization", "language-modeling", "mlm"]
    assert list(TASKS) == [*glue, "squad", "squad_v2", *texts, *own, "docstrings"]
    assert TASKS["squad"].hub == ("rajpurkar/squad", "plain_text")
    assert [task.name for task in TASKS.values() if task.unanswerable] == ["squad_v2"]
    assert all(TASKS[name].hub == ("nyu-mll/glue", name) for name in glue)
    assert TASKS["mnli"].validation_splits == ("validation_matched", "validation_mismatched")
    assert TASKS["mnli"].labels == ("entailment", "neutral", "contradiction")
    assert TASKS["cola"].main_metric == "matthews_correlation"
    assert [task.name for task in TASKS.values() if task.is_regression] == ["stsb", "text-regression"]


def test_unknown_task_lists_the_known():
    with pytest.raises(InputError, match=r"--task sst3: no such task; choose one of cola, sst2, .*docstrings"):
        get_task("sst3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problem": "ranking"}, "problem='ranking'"),
        ({"metrics": ("bleu",)}, "unknown 'bleu'"),
        ({"main_metric": "f1"}, "main_metric='f1'"),
        ({"text_columns": ()}, "text_columns"),
        ({"validation_splits": ()}, "validation_splits"),
    ],
)
def test_specification_is_validated(change, message):
    fields = {
        "name": "x",
        "text_columns": (("text",),),
        "problem": "classification",
        "metrics": ("accuracy",),
        "main_metric": "accuracy",
    }
    with pytest.raises(ValueError, match=message):
        TaskSpec(**{**fields, **change})


# --- files


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_data(tmp_path, suffix):
    # Texts that a type-guessing reader would turn into null, a number or a date.
    rows = [{"text": text, "label": label} for text, label in [("NA", "b"), ("007", "a"), ("2020-01-01, ok", "b")]]
    train = write(tmp_path / f"x{suffix}", rows)
    data = load_task("text-classification", train_file=train, validation_file=train)
    assert data.labels == ("a", "b")
    assert data.num_labels == 2
    assert data.train.to_dict() == {"text": ["NA", "007", "2020-01-01, ok"], "label": [1, 0, 1]}
    reference = write(tmp_path / "reference.jsonl", rows)
    other = load_task("text-classification", train_file=reference, validation_file=reference)
    assert other.fingerprint == data.fingerprint


def test_json_variants(tmp_path):
    content = {
        "lines.json": "".join(json.dumps(row) + "\n" for row in TRAIN),
        "data.json": json.dumps({"version": 1, "data": TRAIN}),
        "array.json": json.dumps(TRAIN),
        "blank.jsonl": "\n".join(json.dumps(row) + "\n" for row in TRAIN),
        "bom.jsonl": "\ufeff" + "".join(json.dumps(row) + "\n" for row in TRAIN),
    }
    for name, text in content.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        data = load_task("text-classification", train_file=tmp_path / name, validation_file=tmp_path / name)
        assert data.train["text"][:] == [row["text"] for row in TRAIN], name


def test_csv_quotes_and_line_numbers(broken):
    content = 'text,label\n"two\nlines, ""quoted""",a\nplain,b\nno label,\n'
    assert "line 5: label missing" in broken("x.csv", content)


def test_data_dir_finds_its_files(tmp_path):
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, 2)]
    write(tmp_path / "train.csv", rows)
    write(tmp_path / "dev_matched.json", rows)
    write(tmp_path / "validation_mismatched.jsonl", rows[:1])
    data = load_task("mnli", data_dir=tmp_path)
    assert list(data.validation) == ["validation_matched", "validation_mismatched"]
    assert data.main_split == "validation_matched"
    assert len(data.validation["validation_mismatched"]) == 1
    (tmp_path / "validation_mismatched.jsonl").unlink()
    (tmp_path / "dev_matched.json").rename(tmp_path / "validation.json")
    assert list(load_task("mnli", data_dir=tmp_path).validation) == ["validation_matched"]


@pytest.mark.parametrize(
    ("task", "columns"),
    [
        ("text-classification", ("text",)),
        ("text-classification", ("sentence",)),
        ("text-classification", ("sentence1", "sentence2")),
        ("qqp", ("question1", "question2")),
        ("qnli", ("question", "sentence")),
    ],
)
def test_text_columns(folder, task, columns):
    rows = [{**dict.fromkeys(columns, "a"), "label": label, "idx": 7} for label in (0, 1)]
    assert folder(task, rows).train.column_names == [*columns, "label"]


def test_regression(folder):
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "2.5"}]
    data = folder("text-regression", rows)
    assert data.labels is None
    assert data.num_labels == 1
    assert data.train["label"][:] == [1.0, 2.5]


@pytest.mark.parametrize(
    ("values", "labels", "indices"),
    [
        (["b", "a", "c"], ("a", "b", "c"), [1, 0, 2]),
        ([10, 9, 100], ("9", "10", "100"), [1, 0, 2]),
        ([1.0, 0.0], ("0", "1"), [1, 0]),
        ([True, False], ("0", "1"), [1, 0]),
        ([-1, 1], ("-1", "1"), [0, 1]),
        (["1", "0"], ("0", "1"), [1, 0]),
    ],
)
def test_classes_of_own_data(folder, values, labels, indices):
    data = folder("text-classification", [{"text": "a", "label": value} for value in values])
    assert data.labels == labels
    assert data.train["label"][:] == indices


@pytest.mark.parametrize("values", [[1, 0], ["1", "0"], ["entailment", "not_entailment"][::-1]])
def test_glue_labels_are_numbers_or_names(folder, values):
    data = folder("rte", [{"sentence1": "a", "sentence2": "b", "label": value} for value in values])
    assert data.labels == ("entailment", "not_entailment")
    assert data.train["label"][:] == [1, 0]


def test_max_train_samples_is_a_seeded_choice(folder):
    rows = [{"text": f"text {n}", "label": n % 2} for n in range(100)]
    first = folder("text-classification", rows, max_train_samples=10, seed=1)
    again = folder("text-classification", rows, max_train_samples=10, seed=1)
    other = folder("text-classification", rows, max_train_samples=10, seed=2)
    assert len(first.train) == 10
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(first.validation["validation"]) == 100
    assert len(folder("text-classification", rows, max_train_samples=1000).train) == 100
    with pytest.raises(InputError, match=r"--max-train-samples 0: pass a number"):
        folder("text-classification", rows, max_train_samples=0)
    with pytest.raises(InputError, match=r"--max-train-samples 1: only the class"):
        folder("text-classification", rows, max_train_samples=1)


# --- bad files


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a", "label": 0}\n{"text": "a", "label"\n', "line 2: not valid JSON"),
        ("x.jsonl", '{"text": "a", "label": 0}\n[1]\n', "line 2: not a JSON object but a list"),
        ("x.jsonl", b'{"text": "a", "label": 0}\n{"text": "\xff", "label": 1}\n', "line 2: not UTF-8"),
        ("x.jsonl", "", "is empty"),
        ("x.jsonl", "\n\n", "is empty"),
        ("x.jsonl", '{"text": "a", "label": 0}\n{"label": 1}\n', "line 2: column 'text' is missing"),
        ("x.jsonl", '{"text": "a", "label": 0}\n{"text": 5, "label": 1}\n', "line 2: column 'text' is a int"),
        ("x.jsonl", '{"text": "a", "label": 0}\n{"text": "a", "label": null}\n', "line 2: label missing"),
        ("x.jsonl", '{"text": "a", "label": 0}\n{"text": "a", "label": NaN}\n', "line 2: label missing"),
        (
            "x.jsonl",
            '{"text": "a", "label": 0}\n{"text": "a", "label": 0.5}\n',
            "line 2: label 0.5 is not a class",
        ),
        ("x.jsonl", '{"text": "a", "label": 0}\n{"text": "a", "label": [1]}\n', "line 2: label is a list"),
        ("x.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "label": 0}\n', "only the class '0'"),
        ("x.jsonl", '{"body": "a", "label": 0}\n', "no column 'text' (it has body, label)"),
        ("x.jsonl", '{"text": "a", "class": 0}\n', "no column 'label' (it has text, class)"),
        ("x.json", '[\n{"text": "a", "label": 0},\n{"text": }\n]', "line 3: not valid JSON"),
        ("x.json", '[{"text": "a", "label": 0}\n{"text": "b", "label": 1}]', "line 2: not valid JSON"),
        ("x.json", '[{"text": "a", "label": 0},\n7]', "line 2: not a JSON object"),
        ("x.json", '[{"text": "a", "label": 0}', "line 1: not valid JSON"),
        ("x.json", '[{"text": "a", "label": 0}]\nmore', "line 2: not valid JSON (text after the array)"),
        ("x.json", '{\n"data": [}', "line 2: not valid JSON"),
        ("x.json", "[]", "is empty"),
        ("x.json", " ", "is empty"),
        ("x.csv", "text,label\na,0\nb,1,2\n", "line 3: 3 fields, the header has 2"),
        ("x.csv", 'text,label\na,0\n"b,1\n', "line 3: not valid csv"),
        ("x.csv", "text,text,label\na,b,0\n", "line 1: column 'text' occurs twice"),
        ("x.csv", "text,label\n", "is empty"),
        ("x.parquet", "no parquet", "not a readable parquet file"),
        ("x.parquet", "", "is empty"),
        ("x.txt", "a", "unknown kind of file; pass one of .csv, .json, .jsonl, .parquet"),
    ],
)
def test_bad_files_are_named_with_the_line(broken, name, content, message):
    assert message in broken(name, content)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"high"', "line 2: label 'high' is not a number"),
        ("NaN", "line 2: label missing"),
        ("Infinity", "line 2: label is inf"),
        ('"nan"', "line 2: label is nan"),
        ("1", "every label is 1.0"),
    ],
)
def test_bad_numbers(broken, value, message):
    content = f'{{"text": "a", "label": 1}}\n{{"text": "b", "label": {value}}}\n'
    assert message in broken("x.jsonl", content, "text-regression")


def test_bad_parquet_row(tmp_path):
    path = write(tmp_path / "x.parquet", [{"text": "a", "label": "b"}, {"text": None, "label": "c"}])
    with pytest.raises(InputError, match=r"x.parquet: row 2: column 'text' is missing"):
        load_task("text-classification", train_file=path, validation_file=path)


def test_label_outside_the_classes(folder):
    with pytest.raises(
        InputError, match=r"validation.jsonl: line 1: label 'fair' is not one of the classes \(bad, good\)"
    ):
        folder("text-classification", TRAIN, [{"text": "x", "label": "fair"}])
    with pytest.raises(InputError, match=r"train.jsonl: line 2: label '-1' is not one of the classes"):
        folder("sst2", [{"sentence": "x", "label": label} for label in (0, -1)])


def test_files_must_have_the_same_columns(folder):
    with pytest.raises(InputError, match="use the same columns in both files"):
        folder("text-classification", TRAIN, [{"sentence": "x", "label": "good"}])


def test_missing_files_and_contradictions(tmp_path):
    train = write(tmp_path / "train.jsonl", TRAIN)
    cases = [
        ({"data_dir": tmp_path / "none"}, r"--data-dir .*none: no such directory"),
        ({"data_dir": train}, "no such directory"),
        ({"data_dir": tmp_path}, r"no validation\.\* or dev\.\* in it"),
        ({"data_dir": tmp_path, "train_file": train}, "--train-file: not together with --data-dir"),
        ({"data_dir": tmp_path, "validation_file": train}, "--validation-file: not together with --data-dir"),
        ({"train_file": train}, "needs --validation-file"),
        ({"validation_file": train}, "needs --train-file"),
        ({"train_file": tmp_path / "none.csv", "validation_file": train}, r"none.csv: no such file"),
        ({}, "--task text-classification: needs your data; pass --data-dir"),
    ]
    for arguments, message in cases:
        with pytest.raises(InputError, match=message):
            load_task("text-classification", **arguments)
    write(tmp_path / "train.csv", TRAIN)
    write(tmp_path / "validation.csv", TRAIN)
    with pytest.raises(InputError, match=r"both train.csv and train.jsonl"):
        load_task("text-classification", data_dir=tmp_path)


# --- the Hub


def test_no_network_gives_up_at_once(monkeypatch, tmp_path):
    def no_retries(*_, **__):
        raise AssertionError("load_dataset retries for half a minute")

    monkeypatch.setattr(load, "hub_has_dataset", lambda _: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", no_retries)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=r"--task rte: the Hub cannot be reached .* pass --data-dir"):
        load_task("rte")


def test_one_failed_request_means_no_hub(monkeypatch):
    def unreachable(*_, timeout, **__):
        assert 0 < timeout <= 10
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    assert not load.hub_has_dataset("nyu-mll/glue")


def test_offline_mode_without_a_cached_copy(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"--task rte: the Hub cannot be reached"):
        load_task("rte")


def test_hub_layout(monkeypatch):
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["entailment", "neutral", "contradiction"]),
            "idx": datasets.Value("int32"),
        }
    )
    rows = {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0], "idx": [0, 1]}
    names = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    splits = {name: datasets.Dataset.from_dict(rows, features=features) for name in names}
    asked = []
    monkeypatch.setattr(load, "hub_has_dataset", lambda _: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or splits)
    data = load_task("mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert list(data.validation) == ["validation_matched", "validation_mismatched"]
    assert data.train.to_dict() == {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [2, 0]}


# --- a model's classes


def test_evaluation_needs_no_training_file(tmp_path):
    path = write(tmp_path / "validation.jsonl", TRAIN)
    for source in ({"data_dir": tmp_path}, {"validation_file": path}):
        data = load_task("text-classification", evaluation_only=True, **source)
        assert data.train is None
        assert data.labels == ("bad", "good")


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        (["good", "bad"], ("good", "bad"), [0, 1]),
        (["good", "bad"], ("Bad", "fair", "GOOD"), [2, 0]),
        (["good", "bad"], ("LABEL_0", "LABEL_1"), [1, 0]),
        ([1, 0], ("negative", "positive"), [1, 0]),
        ([1], ("negative", "positive"), [1]),
        ([5, 1], ("1", "2", "3", "4", "5"), [4, 0]),
    ],
)
def test_check_labels_uses_the_models_order(tmp_path, labels, names, indices):
    write(tmp_path / "validation.jsonl", [{"text": "a", "label": label} for label in labels])
    data = check_labels(load_task("text-classification", data_dir=tmp_path, evaluation_only=True), config(*names))
    assert data.validation["validation"]["label"][:] == indices
    assert data.labels == names
    assert data.train is None


def test_check_labels_moves_all_splits(folder):
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in (0, 1, 2)]
    data = folder("mnli", rows)
    assert check_labels(data, config(*data.labels)) is data
    moved = check_labels(data, config("contradiction", "entailment", "neutral"))
    assert moved.train["label"][:] == [1, 2, 0]
    assert moved.validation["validation_matched"]["label"][:] == [1, 2, 0]


@pytest.mark.parametrize(
    ("task", "labels", "names", "message"),
    [
        (
            "text-classification",
            ["good", "fair"],
            ("good", "bad"),
            r"label 'fair' is not one of .* \(good, bad\)",
        ),
        ("text-classification", [0, 1, 2], ("negative", "positive"), "label '2' is not one of"),
        ("text-classification", [0, 1], ("1", "2"), "cannot be told apart"),
        ("text-classification", ["good", "bad"], ("LABEL_0",), "the model predicts a number"),
        ("text-regression", [1.5, 2.5], ("good", "bad"), "the model has 2 classes"),
    ],
)
def test_labels_outside_the_models_classes(folder, task, labels, names, message):
    data = folder(task, [{"text": "a", "label": label} for label in labels])
    with pytest.raises(InputError, match=message):
        check_labels(data, config(*names))


# --- tokens


def test_tokenize(folder, tokenizer):
    data = folder("text-classification", TRAIN)
    encoded = tokenize(data.train, tokenizer, data.spec, 16, data.labels)
    assert encoded["input_ids"][0] == tokenizer("a good film")["input_ids"]
    assert encoded["labels"][:] == [1, 0]
    assert encoded["length"][:] == [5, 5]
    assert encoded.column_names == ["input_ids", "token_type_ids", "attention_mask", "labels", "length"]
    with pytest.raises(ValueError, match="labels="):
        tokenize(data.train, tokenizer, data.spec, 16, ("only",))
    with pytest.raises(InputError, match="--max-length 2"):
        tokenize(data.train, tokenizer, data.spec, 2)


def test_tokenize_cuts_pairs_and_respects_the_tokenizer(folder, tokenizer):
    long = "one two three four five six seven eight " * 20
    rows = [{"sentence1": long, "sentence2": "a good film", "label": score} for score in (0.5, 4.0)]
    data = folder("stsb", rows)
    for length, expected in ((16, 16), (512, 64)):
        encoded = tokenize(data.train, tokenizer, data.spec, length)
        assert encoded["length"][:] == [expected, expected]
    ids, types = encoded["input_ids"][0], encoded["token_type_ids"][0]
    assert [one for one, kind in zip(ids, types) if kind == 1] == tokenizer("a good film")["input_ids"][1:]
    assert encoded["labels"][:] == [0.5, 4.0]
    assert encoded.features["labels"].dtype == "float32"


def test_tokenize_in_chunks(folder, tokenizer, monkeypatch):
    data = folder("text-classification", [{"text": "film " * (1 + n % 5), "label": n % 2} for n in range(50)])
    whole = tokenize(data.train, tokenizer, data.spec).to_dict()
    monkeypatch.setattr(load, "_TOKENIZE_CHUNK", 7)
    assert tokenize(data.train, tokenizer, data.spec).to_dict() == whole
