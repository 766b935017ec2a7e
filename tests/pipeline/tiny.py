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
    **{name: {"num_key_value_heads": 1} for name in ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")},
    "gpt2": {"n_embd": 32, "n_layer": LAYERS, "n_head": 2, "n_inner": 48, "n_positions": 40},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
_BART = {
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
}
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": LAYERS, "num_decoder_layers": LAYERS, "num_heads": 2}
#: encoder-decoders -> sizes under their own names
SEQ2SEQ = {
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian", "blenderbot-small"), _BART),
    "t5": {**_T5, "feed_forward_proj": "relu"},
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu"},
}
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "opt", "gpt_neox")


def build(model_type: str, **changes: int) -> torch.nn.Module:
    """A small model of this type with random weights: a sequence classifier, or what writes texts with nn.Linear in
    place of Conv1D; ``changes`` of its configuration."""
    import torch
    import transformers

    from lpaf.models.conv1d import use_linears

    if model_type in SEQ2SEQ:
        sizes = {"vocab_size": 40, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
        options = sizes | SEQ2SEQ[model_type] | changes
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **options)
        return transformers.AutoModelForSeq2SeqLM.from_config(config)
    options = SMALL | changes
    if model_type == "gpt2":
        options = {name: options[name] for name in ("vocab_size", "pad_token_id")} | changes
    if model_type in DECODERS:
        options |= {"bos_token_id": 1, "eos_token_id": 2}
    if model_type == "distilbert":
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            options.pop(name)
    config = transformers.AutoConfig.for_model(model_type, **options, **SPECIAL.get(model_type, {}))
    torch.manual_seed(0)
    if model_type in DECODERS:
        return use_linears(transformers.AutoModelForCausalLM.from_config(config))
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


#: model type -> (special tokens in the order of their ids, what stands around a text)
_SPECIAL_TOKENS = {
    "bart": (("<s>", "<pad>", "</s>", "<unk>"), "<s> $A </s>"),
    "t5": (("<pad>", "</s>", "<unk>"), "$A </s>"),
    "gpt2": (("<unk>", "</s>"), "$A"),
    "llama": (("<unk>", "<s>", "</s>"), "<s> $A"),
}


def word_tokenizer(model_type: str):
    """A fast tokenizer of the tiny words with the special tokens of a model type; gpt2's and llama's cannot pad."""
    import tokenizers
    import transformers

    special, around = _SPECIAL_TOKENS[model_type]
    words = [*special, *GOOD, *BAD, *FILLER, "summarize", ":"]
    ids = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=around, special_tokens=[(token, ids[token]) for token in special if token in around]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{name: token for name, token in names.items() if token in special}
    )


def write_text_model(directory: Path, model_type: str, **changes) -> Path:
    """Save a tiny bart, t5, gpt2 or llama with random weights and its tokenizer into ``directory``."""
    from lpaf.models.conv1d import as_published

    tokenizer = word_tokenizer(model_type)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    start = {"bart": "eos_token_id", "t5": "pad_token_id"}.get(model_type)
    if start:
        ids["decoder_start_token_id"] = ids[start]
    if model_type == "bart":
        ids |= {"forced_eos_token_id": None, "forced_bos_token_id": None}
    model = build(model_type, **{"vocab_size": len(tokenizer), "dropout": 0.0} | ids | changes)
    with as_published(model):
        model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


#: tokens of the tiny masked language models; "films" and "goodly" have two pieces
MASKED_VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER, "##s", "##ly", ".")


def masked_tokenizer():
    """BERT's tokenizer with the words of ``MASKED_VOCABULARY``."""
    import transformers

    return transformers.BertTokenizerFast(vocab={word: index for index, word in enumerate(MASKED_VOCABULARY)})


def build_masked(model_type: str, **changes) -> torch.nn.Module:
    """A small masked language model of this type with random weights; ``changes`` of its configuration."""
    import torch
    import transformers

    options = SMALL | {"vocab_size": len(MASKED_VOCABULARY)} | SPECIAL.get(model_type, {}) | changes
    if model_type == "distilbert":
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"):
            options.pop(name)
    torch.manual_seed(0)
    return transformers.AutoModelForMaskedLM.from_config(transformers.AutoConfig.for_model(model_type, **options))


def write_masked_model(directory: Path, model_type: str = "bert", **changes) -> Path:
    """Save a model of :func:`build_masked` and its tokenizer into ``directory``."""
    build_masked(model_type, **changes).save_pretrained(directory)
    masked_tokenizer().save_pretrained(directory)
    return directory


def stories(count: int, seed: int) -> list[dict]:
    """Texts whose first good or bad word decides what follows, and their summaries: the words of mood in order."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        mood = [rng.choice(GOOD + BAD) for _ in range(2)]
        words = [word for each in mood for word in ("the", "film", "is", each, *rng.choices(FILLER[5:8], k=1))]
        rows.append({"text": " ".join(words), "summary": " ".join(mood)})
    return rows


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
