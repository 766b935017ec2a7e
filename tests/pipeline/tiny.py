"""Builders of tiny models and a tiny task: random weights, word-level vocabulary, sentences of good and bad words."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

GOOD = ("good", "great", "lovely", "fine", "warm", "bright")
BAD = ("bad", "awful", "dull", "cold", "grim", "weak")
FILLER = ("the", "film", "is", "a", "very", "story", "and", "with", "plot", "cast", "of", "an", "this", "was")

LAYERS = 2
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
# What a model type's configuration wants beyond, or instead of, the usual names.
SPECIAL = {
    "distilbert": {"dim": 32, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 48},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4},
    "deberta": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    "albert": {"embedding_size": 16, "num_hidden_groups": 1},
    "layoutlm": {"max_2d_position_embeddings": 64},
    "electra": {"embedding_size": 16},
    "modernbert": {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "global_attn_every_n_layers": 1,
    },
}


def build(model_type: str, **changes: int) -> torch.nn.Module:
    """A small sequence classifier of this type with random weights; ``changes`` of its configuration."""
    import torch
    import transformers

    options = SMALL | changes
    if model_type == "distilbert":
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            options.pop(name)
    config = transformers.AutoConfig.for_model(model_type, **options, **SPECIAL.get(model_type, {}))
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_config(config)


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


def questions(count: int, seed: int, unanswerable: float = 0.0) -> list[dict]:
    """Questions as the Hub has them: the answer is the one good or bad word of a context of some 20 words; a share of
    the contexts has none."""
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        words = [rng.choice(FILLER) for _ in range(rng.randint(6, 30))]
        found: dict[str, list] = {"text": [], "answer_start": []}
        if rng.random() >= unanswerable:
            place, mood = rng.randrange(len(words) + 1), rng.choice(GOOD + BAD)
            found = {"text": [mood], "answer_start": [len("".join(f"{word} " for word in words[:place]))]}
            words.insert(place, mood)
        rows.append({"id": f"q{index}", "question": "is the film", "context": " ".join(words), "answers": found})
    return rows


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
