"""LPAF against fine-tuned SVD on SST-2 with MiniLM: the study behind docs/results/sst2-minilm.md.

    python benchmarks/sst2_minilm.py --glue FOLDER/glue --output runs/sst2-minilm

Splits the training file (seeded) into 20,000 training phrases and 5,000 test phrases, fine-tunes the dense model once,
tunes the retraining rate of both methods over the same grid on 8,000 phrases, then runs both methods at 25 and 16 % of
the encoder and tests the pairs. Every step is one `lpaf` command and is skipped when its output exists, so that the
study can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lpaf.evaluate.metrics import mcnemar

TRAIN, TEST, TUNE = 20_000, 5_000, 8_000
RATES = ("4e-4", "8e-4")
COMMON = ["--task", "sst2", "--bf16", "--freeze-embeddings", "--batch-size", "32", "--seed", "0"]
EPOCHS = ["--prune-epochs", "1", "--retrain-epochs", "2"]
SIZES = {"25": "0.25", "16": "0.16"}


def split(glue: Path, data: Path) -> None:
    """Write train, validation and test files once."""
    if (data / "test.jsonl").is_file():
        return
    data.mkdir(parents=True, exist_ok=True)
    lines = (glue / "sst2" / "train.jsonl").read_text().splitlines()
    order = random.Random(13).sample(range(len(lines)), TRAIN + TEST)
    (data / "train.jsonl").write_text("".join(lines[i] + "\n" for i in order[:TRAIN]))
    (data / "validation.jsonl").write_text((glue / "sst2" / "validation.jsonl").read_text())
    (data / "test.jsonl").write_text("".join(lines[i] + "\n" for i in order[TRAIN:]))


def lpaf(*words: str, done: Path) -> None:
    """One command, unless ``done`` exists."""
    if done.exists():
        return
    command = [sys.executable, "-m", "lpaf", *map(str, words)]
    print("$", shlex.join(["lpaf", *map(str, words)]), flush=True)
    start = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)


def compress(run: Path, method: str, ratio: str, rate: str, model: Path, data: Path, *more: str) -> dict:
    """One compression; returns its report."""
    words = ["--model", model, "--data-dir", data, "--method", method, "--ratio", ratio, "--retrain-lr", rate]
    lpaf("compress", *COMMON, *EPOCHS, *words, "--output", run, "--resume", *more, done=run / "report.json")
    return json.loads((run / "report.json").read_text())


def predictions(run: Path, file: Path, out: Path) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, true) labels of a model on one file."""
    lpaf(
        "evaluate",
        "--task",
        "sst2",
        "--model",
        run,
        "--validation-file",
        file,
        "--predictions",
        out,
        "--json",
        done=out,
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return np.array([row["prediction"] for row in rows]), np.array([row["label"] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--glue", type=Path, required=True, help="folder with sst2/train.jsonl and sst2/validation.jsonl"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/sst2-minilm"))
    parser.add_argument("--model", default="minilm-l6")
    arguments = parser.parse_args()
    root = arguments.output
    data, dense = root / "data", root / "dense"
    split(arguments.glue, data)

    # The dense model comes out of the first command; that command's own compression is not used.
    first = ["--model", arguments.model, "--data-dir", data, "--method", "svd", "--ratio", "0.25", "--no-prune"]
    first += ["--finetune-epochs", "2", "--prune-epochs", "0", "--retrain-epochs", "0.01", "--save-dense", dense]
    lpaf("compress", *COMMON, *first, "--output", root / "first", "--overwrite", done=dense)

    best = {}
    for method in ("lpaf", "svd"):
        scores = {}
        for rate in RATES:
            run = root / "tune" / f"{method}-{rate}"
            more = ("--max-train-samples", str(TUNE))
            scores[rate] = compress(run, method, SIZES["16"], rate, dense, data, *more)["metric"]["compressed"]
        best[method] = max(scores, key=scores.get)
        print(f"tuning {method}: {scores} -> {best[method]}", flush=True)

    truth = {}
    guesses: dict[tuple[str, str, str], np.ndarray] = {}
    for size, ratio in SIZES.items():
        for method in ("lpaf", "svd"):
            run = root / f"{method}-{size}"
            report = compress(run, method, ratio, best[method], dense, data)
            for name in ("test", "validation"):
                guess, truth[name] = predictions(run, data / f"{name}.jsonl", root / f"{method}-{size}-{name}.jsonl")
                guesses[method, size, name] = guess
            print(
                method, size, report["metric"], report["rank"]["mean_before"], report["rank"]["mean_after"], flush=True
            )
    for name in ("test", "validation"):
        guess, truth[name] = predictions(dense, data / f"{name}.jsonl", root / f"dense-{name}.jsonl")
        print(f"dense {name}: {np.mean(guess == truth[name]):.4f}")
        for size in SIZES:
            pair = [guesses[method, size, name] for method in ("lpaf", "svd")]
            right = [float(np.mean(guess == truth[name])) for guess in pair]
            print(f"{size} % {name}: lpaf {right[0]:.4f} svd {right[1]:.4f}", mcnemar(*pair, truth[name]))


if __name__ == "__main__":
    main()
