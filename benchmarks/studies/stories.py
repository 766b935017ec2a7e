"""A small Llama that tells stories, for studies of language models without a network.

    python -m benchmarks.studies.stories --bin stories260K.bin --tokenizer tok512.bin --output DIR

``--bin`` is a checkpoint in llama2.c's format (version 0): seven int32 (dim, hidden_dim, n_layers, n_heads, n_kv_heads,
vocab_size, seq_len; a negative vocab_size says that the output is not the embedding), then the weights in float32.
``--tokenizer`` is its tokenizer: an int32, then for every token a float32 score, an int32 length and its UTF-8 bytes.

Written are ``DIR/model``, which transformers loads, and ``DIR/data`` with train.txt and validation.txt, stories that
the model tells at temperature 1: text of which no other model can expect a better perplexity. Between two stories
stands ``<s>``, as in the training of such models, for which it ends one story and begins the next.
"""

from __future__ import annotations

import argparse
import re
import struct
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEADER = struct.Struct("7i")
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
#: stories told at once
BATCH = 64
#: what stands for a space inside tokens
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def read_checkpoint(path: Path) -> LlamaForCausalLM:
    """The model of a llama2.c checkpoint; ValueError where the file has another size than its header asks for."""
    content = path.read_bytes()
    dim, hidden, layers, heads, kv_heads, vocabulary, length = HEADER.unpack_from(content)
    config = LlamaConfig(
        hidden_size=dim,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=abs(vocabulary),
        max_position_embeddings=length,
        tie_word_embeddings=vocabulary > 0,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=1,  # the begin of the next story
    )
    values = np.frombuffer(content, dtype="<f4", offset=HEADER.size)
    at = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        size = int(np.prod(shape))
        if at + size > values.size:
            raise ValueError(f"{path}: ends after {values.size} numbers; its header asks for more")
        at += size
        return torch.from_numpy(values[at - size : at].reshape(shape).copy())

    head, kv = dim // heads, dim // heads * kv_heads
    state = {"model.embed_tokens.weight": take(abs(vocabulary), dim)}
    # in the order of the file: every kind of matrix for all layers
    kinds = {
        "input_layernorm": (dim,),
        "self_attn.q_proj": (dim, dim),
        "self_attn.k_proj": (kv, dim),
        "self_attn.v_proj": (kv, dim),
        "self_attn.o_proj": (dim, dim),
        "post_attention_layernorm": (dim,),
        "mlp.gate_proj": (hidden, dim),
        "mlp.down_proj": (dim, hidden),
        "mlp.up_proj": (hidden, dim),
    }
    for kind, shape in kinds.items():
        weights = take(layers, *shape)
        for layer, weight in enumerate(weights):
            if kind.endswith(("q_proj", "k_proj")):
                weight = halves_from_pairs(weight, head)
            state[f"model.layers.{layer}.{kind}.weight"] = weight
    state["model.norm.weight"] = take(dim)
    take(length, head)  # cosines and sines of the rotary embedding, which transformers works out
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if vocabulary > 0 else take(abs(vocabulary), dim)
    if at != values.size:
        raise ValueError(f"{path}: has {values.size} numbers; its header asks for {at}")
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(state)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=1, pad_token_id=0)
    return model


def halves_from_pairs(weight: torch.Tensor, head: int) -> torch.Tensor:
    """Rows of each head reordered: llama2.c rotates neighbours (0, 1), (2, 3), ..., transformers row i with row
    i + head / 2."""
    rows, columns = weight.shape
    return weight.view(rows // head, head // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def read_tokens(path: Path) -> list[tuple[str, float]]:
    """(token, score) in the order of their ids, spaces as ``SPACE``."""
    content, tokens = path.read_bytes(), []
    at = 4
    while at < len(content):
        score, length = struct.unpack_from("<fi", content, at)
        at += 8
        tokens.append((content[at : at + length].decode("utf-8").strip("\n").replace(" ", SPACE), score))
        at += length
    return tokens


def make_tokenizer(tokens: list[tuple[str, float]], length: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer that cuts texts as llama2.c does: characters (bytes where there is no such token), of which the
    neighbours whose union has the best score are joined, again and again, the first of equal ones first."""
    ids = {token: index for index, (token, _) in enumerate(tokens)}
    scores = dict(tokens)
    special = [UNKNOWN, BEGIN, END]
    merges = []
    for token, index in ids.items():
        if token in special or re.fullmatch("<0x[0-9A-F]{2}>", token):
            continue
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        merges += [(-scores[token], index, pair) for pair in pairs if all(part in ids for part in pair)]
    backend = Tokenizer(
        BPE(ids, [pair for _, _, pair in sorted(merges)], unk_token=UNKNOWN, byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, ids[BEGIN])])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BEGIN, eos_token=BEGIN, unk_token=UNKNOWN, model_max_length=length
    )


@torch.no_grad()
def tell(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[str]:
    """``count`` stories, each sampled token by token at temperature 1 until it ends or fills the model's context."""
    torch.manual_seed(seed)
    stories: list[str] = []
    while len(stories) < count:
        begin = torch.full((min(BATCH, count - len(stories)), 1), tokenizer.bos_token_id)
        told = model.generate(
            begin, do_sample=True, temperature=1.0, top_k=0, max_length=model.config.max_position_embeddings
        )
        stories += [text.strip() for text in tokenizer.batch_decode(told, skip_special_tokens=True)]
    return stories


def write(checkpoint: Path, tokens: Path, output: Path, samples: int, seed: int) -> None:
    """The model and tokenizer in ``output``/model, their stories in ``output``/data."""
    model = read_checkpoint(checkpoint)
    tokenizer = make_tokenizer(read_tokens(tokens), model.config.max_position_embeddings)
    model.save_pretrained(output / "model")
    tokenizer.save_pretrained(output / "model")
    (output / "data").mkdir(parents=True, exist_ok=True)
    for name, count, own_seed in (("train", samples, 2 * seed), ("validation", -(-samples // 10), 2 * seed + 1)):
        stories = tell(model, tokenizer, count, own_seed)
        (output / "data" / f"{name}.txt").write_text(BEGIN.join(stories), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, required=True, help="checkpoint in llama2.c's format")
    parser.add_argument("--tokenizer", type=Path, required=True, help="its tokenizer")
    parser.add_argument("--output", type=Path, required=True, help="folder to write model/ and data/ into")
    parser.add_argument("--samples", type=int, default=500, help="stories in train.txt; a tenth in validation.txt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.bin, arguments.tokenizer, arguments.output, arguments.samples, arguments.seed)


if __name__ == "__main__":
    main()
