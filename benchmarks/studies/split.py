"""The files of the studies: training and test examples drawn from a GLUE task's training file, and its validation file.

python -m benchmarks.studies.split --glue FOLDER/glue --output runs/sst2/data
python -m benchmarks.studies.split --glue FOLDER/glue --task mrpc --output runs/mrpc/data
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

#: task -> (training examples, test examples)
SIZES = {"sst2": (20_000, 5_000), "mrpc": (2_668, 1_000)}
SEED = 13


def split(glue: Path, task: str, output: Path) -> None:
    """Write train.jsonl, test.jsonl and validation.jsonl into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    lines = (glue / task / "train.jsonl").read_text().splitlines()
    train, test = SIZES[task]
    order = random.Random(SEED).sample(range(len(lines)), train + test)
    (output / "train.jsonl").write_text("".join(lines[i] + "\n" for i in order[:train]))
    (output / "test.jsonl").write_text("".join(lines[i] + "\n" for i in order[train:]))
    (output / "validation.jsonl").write_text((glue / task / "validation.jsonl").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", type=Path, required=True, help="folder with TASK/{train,validation}.jsonl")
    parser.add_argument("--task", choices=SIZES, default="sst2", help="which task (default: sst2)")
    parser.add_argument("--output", type=Path, help="folder to write (default: runs/TASK/data)")
    arguments = parser.parse_args()
    split(arguments.glue, arguments.task, arguments.output or Path("runs") / arguments.task / "data")


if __name__ == "__main__":
    main()
