"""The built-in task: same on every build, balanced, masked, without near-duplicates across its split."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest

from lpaf.data import docstrings, load_task
from lpaf.data.docstrings import PACKAGES, build_docstrings, docstrings_of, first_sentences, mask, shingles
from lpaf.errors import InputError

GIVEAWAYS = [
    "numpy",
    "scipy",
    "pandas",
    "sklearn",
    "scikit",
    "torch",
    "pytorch",
    "matplotlib",
    "sympy",
    "networkx",
    "transformers",
    "datasets",
    "hugging",
    "python",
]


@pytest.fixture(scope="module")
def data():
    return load_task("docstrings")


def words(text):
    return docstrings.Docstring("", "", text).words


def test_size_and_balance(data):
    train, validation = data.train, data.validation["validation"]
    assert data.labels == PACKAGES
    assert len(PACKAGES) >= 8
    assert len(train) + len(validation) >= 6000
    assert len(validation) >= 1000
    for split in (train, validation):
        counts = Counter(split["label"])
        assert set(counts) == set(range(len(PACKAGES)))
        assert max(counts.values()) <= 1.1 * min(counts.values())


def test_no_near_duplicates(data):
    """Within 0.5 Jaccard similarity of word trigrams there is no second text, on either side of the split."""
    texts = [*data.train["text"], *data.validation["validation"]["text"]]
    assert len({" ".join(words(text)) for text in texts}) == len(texts)
    holders = defaultdict(list)
    sets = [shingles(words(text)) for text in texts]
    for index, own in enumerate(sets):
        common = Counter(other for shingle in own for other in holders[shingle])
        for other, n in common.items():
            assert n / len(own | sets[other]) < 0.5, (texts[index], texts[other])
        for shingle in own:
            holders[shingle].append(index)


def test_nothing_gives_the_package_away(data):
    for text in (*data.train["text"], *data.validation["validation"]["text"]):
        assert not set(GIVEAWAYS) & set(words(text)), text
        assert "`" not in text
        assert "\n" not in text
        assert len(words(text)) >= 5
        assert len(text.split()) <= 40


def test_the_run_seed_does_not_move_examples_between_the_splits(data, monkeypatch):
    """Whatever seed a model was trained with, `lpaf evaluate` must use examples that it has not seen."""
    calls = []
    monkeypatch.setattr(docstrings, "build_docstrings", lambda *given, **named: calls.append((given, named)) or data)
    assert len(load_task("docstrings", seed=5, max_train_samples=100).train) == 100
    assert load_task("docstrings", evaluation_only=True).train is None
    assert calls == [((), {}), ((), {})]


def test_builds_are_equal_and_seeded():
    options = {"packages": ("networkx", "sklearn", "python"), "per_package": 60}
    first, again, other = (build_docstrings(seed, **options) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.train.to_dict() == again.train.to_dict()
    assert first.labels == ("networkx", "sklearn", "python")
    assert Counter([*first.train["label"], *first.validation["validation"]["label"]]) == {0: 60, 1: 60, 2: 60}


def test_a_files_examples_stay_on_one_side():
    examples = [docstrings.Docstring("p", f"file{n % 20}.py", f"text number {n} of the file") for n in range(200)]
    train, validation = docstrings._split(examples, 0.2, 0)
    assert {example.source for example in train}.isdisjoint(example.source for example in validation)
    assert len(train) == 160
    assert len(validation) == 40


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Return a NumPy array, see numpy.array.", "Return a _ array, see _."),
        ("Wraps :class:`~torch.nn.Module` and ``x`` or `y`_.", "Wraps _ and _ or _."),
        ("Like scikit-learn's fit() on a DataFrame.", "Like _ 's _ on a _."),
        ("A 🤗 Transformers model of the HF hub, https://hf.co/x.", "A 🤗 _ model of the _ hub, _"),
        ("*args* of my_function, other_function", "args of _"),
        ("Pythonic torches and npm stay.", "Pythonic torches and npm stay."),
    ],
)
def test_mask(text, masked):
    assert mask(text) == masked


def test_first_sentences():
    text = "\n    One thing\n    over lines. Two! `three` is here.\n\n    Another paragraph."
    assert first_sentences(text) == "One thing over lines."
    assert first_sentences(text, 2) == "One thing over lines. Two!"
    assert first_sentences(text, 9) == "One thing over lines. Two! `three` is here."


def test_docstrings_of_source():
    source = b'''"""Module."""
class A:
    """Class."""
    def method(self):
        """Method."""
        def inner():
            """Not part of the interface."""
if True:
    async def function():
        """Function."""
def bare(): pass
'''
    assert list(docstrings_of(source)) == ["Module.", "Class.", "Method.", "Function."]
    assert list(docstrings_of(b"def broken(:")) == []
    assert list(docstrings_of(b"\xff")) == []


def test_missing_package():
    with pytest.raises(InputError, match="--task docstrings: package no_such_package is not installed"):
        build_docstrings(packages=("python", "no_such_package"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("packages", ("python",)),
        ("packages", ("python", "numpy", "python")),
        ("per_package", 5),
        ("sentences", 0),
        ("words", (9, 8)),
        ("validation_share", 1.0),
    ],
)
def test_arguments_are_checked(argument, value):
    with pytest.raises(ValueError, match=f"{argument}="):
        build_docstrings(**{argument: value})
