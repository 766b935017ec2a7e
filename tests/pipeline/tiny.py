"""Builders of a tiny model and a tiny task: random weights, word-level vocabulary, sentences of good and bad words."""

from __future__ import annotations

import json
import random
from pathlib import Path

GOOD = ("good", "great", "lovely", "fine", "warm", "bright")
BAD = ("bad", "awful", "dull", "cold", "grim", "weak")
FILLER = ("the", "film", "is", "a", "very", "story", "and", "with", "plot", "cast", "of", "an", "this", "was")


def write_model(directory: Path, architecture: str = "bert", layers: int = 2) -> Path:
    """Save a randomly initialised encoder with a word-level tokenizer into ``directory``."""
    import torch
    import transformers

    directory.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
    common = {"vocab_size": len(words), "max_position_embeddings": 32, "pad_token_id": 0}
    if architecture == "bert":
        config = transformers.BertConfig(
            hidden_size=32, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=64, **common
        )
        cls = transformers.BertModel
    elif architecture == "distilbert":
        config = transformers.DistilBertConfig(dim=32, n_layers=layers, n_heads=2, hidden_dim=64, **common)
        cls = transformers.DistilBertModel
    elif architecture == "deberta-v2":
        config = transformers.DebertaV2Config(
            hidden_size=32,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=64,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            position_biased_input=False,
            type_vocab_size=0,
            **common,
        )
        cls = transformers.DebertaV2Model
    else:
        raise ValueError(architecture)
    torch.manual_seed(0)
    cls(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def sentences(count: int, seed: int) -> list[dict]:
    """Labelled sentences whose class is the majority of good and bad words."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        label = rng.randrange(2)
        mood = [rng.choice(GOOD if label else BAD) for _ in range(rng.randint(1, 3))]
        words = mood + [rng.choice(FILLER) for _ in range(rng.randint(2, 8))]
        rng.shuffle(words)
        rows.append({"sentence": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
