"""The SST-2 files of the studies: 20,000 training and 5,000 test phrases from the training file, the validation file.

python -m benchmarks.studies.split --glue FOLDER/glue --output runs/sst2/data
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

TRAIN, TEST, SEED = 20_000, 5_000, 13


def split(glue: Path, output: Path) -> None:
    """Write train.jsonl, test.jsonl and validation.jsonl into ``output``."""
    output.mkdir(parents=True, exist_ok=True)
    lines = (glue / "sst2" / "train.jsonl").read_text().splitlines()
    order = random.Random(SEED).sample(range(len(lines)), TRAIN + TEST)
    (output / "train.jsonl").write_text("".join(lines[i] + "\n" for i in order[:TRAIN]))
    (output / "test.jsonl").write_text("".join(lines[i] + "\n" for i in order[TRAIN:]))
    (output / "validation.jsonl").write_text((glue / "sst2" / "validation.jsonl").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", type=Path, required=True, help="folder with sst2/{train,validation}.jsonl")
    parser.add_argument("--output", type=Path, default=Path("runs/sst2/data"))
    arguments = parser.parse_args()
    split(arguments.glue, arguments.output)


if __name__ == "__main__":
    main()
