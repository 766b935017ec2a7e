"""The story teller of the studies: llama2.c's checkpoint and tokenizer against their plain meaning."""

from __future__ import annotations

import itertools
import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.studies.stories import BEGIN, HEADER, make_tokenizer, read_checkpoint, read_tokens, write

WORDS = ("once", "upon", "a", "time", "the", "cat", "saw", "naïve", "dogs", ".", "\n")


def pairs_from_halves(weight: torch.Tensor, head: int) -> np.ndarray:
    """The rows as llama2.c has them: row i of a head's first half before row i of its second half."""
    rows = [
        row
        for start in range(0, len(weight), head)
        for i in range(head // 2)
        for row in (weight[start + i], weight[start + head // 2 + i])
    ]
    return torch.stack(rows).numpy()


def write_checkpoint(path: Path, tied: bool) -> LlamaForCausalLM:
    """A random grouped-query model, written in llama2.c's format."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=20, max_position_embeddings=12, tie_word_embeddings=tied, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    parts = [state["model.embed_tokens.weight"].numpy()]
    for kind in (
        "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj",
    ):  # fmt: skip
        for layer in range(2):
            weight = state[f"model.layers.{layer}.{kind}.weight"]
            turned = kind.endswith(("q_proj", "k_proj"))
            parts.append(pairs_from_halves(weight, 4) if turned else weight.numpy())
    parts += [state["model.norm.weight"].numpy(), np.zeros(12 * 4, dtype=np.float32)]
    if not tied:
        parts.append(state["lm_head.weight"].numpy())
    content = HEADER.pack(16, 24, 2, 4, 2, 20 if tied else -20, 12)
    path.write_bytes(content + b"".join(part.astype("<f4").tobytes() for part in parts))
    return model


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_checkpoint_is_read_as_it_was_written(tmp_path, tied):
    model = write_checkpoint(tmp_path / "m.bin", tied)
    again = read_checkpoint(tmp_path / "m.bin")
    ids = torch.arange(18).view(2, 9)
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    content = (tmp_path / "m.bin").read_bytes()
    for wrong in (content[:-4], content + b"0000"):
        (tmp_path / "m.bin").write_bytes(wrong)
        with pytest.raises(ValueError, match="its header asks for"):
            read_checkpoint(tmp_path / "m.bin")


def write_tokens(path: Path, seed: int) -> list[str]:
    """A vocabulary of bytes, letters and random pieces of the words, with random scores; the tokens, with spaces."""
    rng = random.Random(seed)
    text = " " + " ".join(WORDS)
    letters = sorted(set(text) - {"\n", "ï"})
    pieces = sorted({text[at : at + length] for length in (2, 3, 4) for at in range(len(text) - length)})
    chosen = [piece for piece in pieces if rng.random() < 0.5 and not set(piece) & {"\n", "ï"}]
    tokens = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *chosen]
    content = struct.pack("i", 8)
    for place, token in enumerate(tokens):
        raw = token.encode()
        score = -float(rng.sample(range(1000), 1)[0]) - place / 1e4 if token in chosen else 0.0
        content += struct.pack("<fi", score, len(raw)) + raw
    path.write_bytes(content)
    return tokens


def plainly(text: str, tokens: dict[str, int], scores: dict[str, float]) -> list[int]:
    """llama2.c's rule, one merge after the other."""
    pieces = []
    for letter in f" {text}":
        pieces += [letter] if letter in tokens else [f"<0x{byte:02X}>" for byte in letter.encode()]
    while True:
        pairs = enumerate(itertools.pairwise(pieces))
        best = max(((scores[a + b], -at) for at, (a, b) in pairs if a + b in tokens), default=None)
        if best is None:
            return [tokens[piece] for piece in pieces]
        at = -best[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@pytest.mark.parametrize("seed", range(3))
def test_tokenizer_merges_by_score(tmp_path, seed):
    names = write_tokens(tmp_path / "t.bin", seed)
    tokens = {name: index for index, name in enumerate(names)}
    found = read_tokens(tmp_path / "t.bin")
    scores = {name: score for name, (_, score) in zip(names, found, strict=True)}
    tokenizer = make_tokenizer(found, 32)
    rng = random.Random(seed)
    for _ in range(40):
        text = " ".join(rng.choices(WORDS, k=6))
        assert tokenizer(text)["input_ids"] == [1, *plainly(text, tokens, scores)]
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    both = tokenizer(f"the cat{BEGIN}once")["input_ids"]
    assert both == [1, *plainly("the cat", tokens, scores), 1, *plainly("once", tokens, scores)]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_real_model_tells_stories(tmp_path):
    folder = Path(os.environ.get("LPAF_TEST_DATA", "shared")) / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("no models/stories260K in LPAF_TEST_DATA")
    write(folder / "stories260K.bin", folder / "tok512.bin", tmp_path, samples=20, seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    stories = (tmp_path / "data" / "train.txt").read_text().split(BEGIN)
    assert len(stories) == 20
    assert sum(" the " in story and " a " in story for story in stories) >= 18
    losses = []
    for story in stories:
        ids = torch.tensor([tokenizer(story)["input_ids"]])
        with torch.no_grad():
            losses.append((float(model(input_ids=ids, labels=ids).loss), ids.shape[1] - 1))
    mean, tokens = zip(*losses, strict=True)
    assert 2.5 < np.exp(np.average(mean, weights=tokens)) < 5
